//! Stanzas of `Field: value` lines with continuation lines (deb822(5)), scanned
//! without copying: the form of Packages, Release, control and `.sources` files.

/// The stanzas of `text`: runs of lines between blank ones. Lines of `#` are
/// comments.
pub fn stanzas(text: &str) -> impl Iterator<Item = Stanza<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(['\n', '\r']);
        if rest.is_empty() {
            return None;
        }
        let end = stanza_end(rest);
        let (stanza, tail) = rest.split_at(end);
        rest = tail;
        Some(Stanza { text: stanza })
    })
}

/// Where the first blank line (empty, or spaces and tabs only) starts.
fn stanza_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find('\n') {
        let next = from + at + 1;
        let line = text[next..].split('\n').next().unwrap_or_default();
        if next >= text.len() || line.trim().is_empty() {
            return next;
        }
        from = next;
    }
    text.len()
}

/// One stanza.
#[derive(Clone, Copy, Debug)]
pub struct Stanza<'a> {
    text: &'a str,
}

impl<'a> Stanza<'a> {
    pub fn text(self) -> &'a str {
        self.text
    }

    /// Field names as written, with the raw value: trimmed, continuation lines and
    /// their line ends included. Lines that are no field are passed over.
    pub fn fields(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let mut rest = self.text;
        std::iter::from_fn(move || {
            while !rest.is_empty() {
                let end = field_end(rest);
                let (field, tail) = rest.split_at(end);
                rest = tail;
                if field.starts_with('#') {
                    continue;
                }
                if let Some((name, value)) = field.split_once(':') {
                    return Some((name, value.trim()));
                }
            }
            None
        })
    }

    /// The first field of that name, in any case.
    pub fn get(self, name: &str) -> Option<&'a str> {
        self.fields()
            .find(|(found, _)| found.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }
}

fn field_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find('\n') {
        let next = from + at + 1;
        // A comment inside a value belongs to it; readers of such values skip it.
        if !matches!(text.as_bytes().get(next), Some(b' ' | b'\t')) {
            return next;
        }
        from = next;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn stanzas_fields_comments_and_continuations() {
        let text = "\n\nPackage: a\nDepends: b,\n c\nDescription: x\n .\n y\n\n \n# note\nPackage: d\nempty:\nno field\nlast: 1";
        let all: Vec<_> = stanzas(text).collect();
        let with_fields: Vec<_> = all.iter().filter(|s| s.get("package").is_some()).collect();
        assert_eq!(with_fields.len(), 2);
        assert_eq!(with_fields[0].get("Depends"), Some("b,\n c"));
        assert_eq!(with_fields[0].get("description"), Some("x\n .\n y"));
        assert_eq!(with_fields[1].get("Package"), Some("d"));
        assert_eq!(with_fields[1].get("empty"), Some(""));
        assert_eq!(with_fields[1].get("last"), Some("1"));
        assert_eq!(with_fields[1].get("no field"), None);
    }

    #[test]
    fn an_empty_text_has_no_stanza() {
        assert_eq!(stanzas("").count(), 0);
        assert_eq!(stanzas("\n\n").count(), 0);
    }
}
