//! Variables that a RUN has for the recording proxy alone, and how they are taken out of
//! files that list a RUN's variables (`env > file`).

use std::collections::BTreeMap;

/// A longer file is no list of variables.
pub(super) const LONGEST: u64 = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct Variables {
    set: BTreeMap<String, String>,
    /// What at least one value of a list has in it.
    marks: Vec<String>,
}

impl Variables {
    /// `marks`: parts of values that nothing else has.
    pub fn new(set: BTreeMap<String, String>, marks: Vec<String>) -> Self {
        Self { set, marks }
    }

    /// The content without lines, or pieces between zero bytes, that set one of these.
    pub fn taken_out_of(&self, content: Vec<u8>) -> Vec<u8> {
        let has = |mark: &String| content.windows(mark.len()).any(|w| w == mark.as_bytes());
        if !self.marks.iter().any(has) {
            return content;
        }
        let separator = if content.contains(&0) { 0 } else { b'\n' };
        let pieces = content.split_inclusive(|byte| *byte == separator);
        let kept = pieces.filter(|piece| {
            let text = std::str::from_utf8(piece.strip_suffix(&[separator]).unwrap_or(piece));
            !text.is_ok_and(|text| self.is_set_by(text))
        });
        kept.flatten().copied().collect()
    }

    /// `NAME=value`, as `env`, `export` or `declare -x` print it.
    fn is_set_by(&self, line: &str) -> bool {
        let words = ["export ", "declare -x "];
        let line = words
            .iter()
            .find_map(|word| line.strip_prefix(word))
            .unwrap_or(line);
        let Some((name, value)) = line.split_once('=') else {
            return false;
        };
        self.set
            .get(name)
            .is_some_and(|set| value.trim_matches(['\'', '"']) == set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_set_goes() {
        let set = [("http_proxy", "http://p:1"), ("no_proxy", "l")];
        let set = set.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let variables = Variables::new(set.into(), vec!["//p:1".into()]);
        let left = |text: &str| {
            let left = variables.taken_out_of(text.into());
            String::from_utf8(left).unwrap_or_default()
        };
        let text = "A=1\nhttp_proxy=http://p:1\nno_proxy=l\nexport http_proxy='http://p:1'\nB=2";
        assert_eq!(left(text), "A=1\nB=2");
        assert_eq!(left("A=1\0http_proxy=http://p:1\0B=\n\0"), "A=1\0B=\n\0");
        assert_eq!(
            left("no_proxy=l\n"),
            "no_proxy=l\n",
            "that may be anybody's"
        );
        assert_eq!(left("http_proxy=http://p:12\n"), "http_proxy=http://p:12\n");
        let other = "see http://p:1\nhttp_proxy=http://q:1\n";
        assert_eq!(left(other), other);
    }
}
