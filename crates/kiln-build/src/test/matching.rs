//! Regular expressions over what a program printed or a file contains.

use kiln_model::suite::Pattern;
use regex::Regex;

/// Compiled, a pattern takes at most this many bytes, as where it was read.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// So much of a text is shown where it is not what was wanted.
const SHOWN: usize = 400;

/// Whether all of `wanted` and none of `unwanted` are found in `text`.
pub fn found(
    what: &str,
    text: &str,
    wanted: &[Pattern],
    unwanted: &[Pattern],
) -> Result<(), String> {
    for pattern in wanted {
        if !compiled(pattern)?.is_match(text) {
            return Err(format!(
                "{what} doesn't match `{}`: {}",
                pattern.0,
                shown(text)
            ));
        }
    }
    for pattern in unwanted {
        if let Some(found) = compiled(pattern)?.find(text) {
            let found = shown(found.as_str());
            return Err(format!(
                "{what} matches `{}`, which it must not: {found}",
                pattern.0
            ));
        }
    }
    Ok(())
}

pub fn compiled(pattern: &Pattern) -> Result<Regex, String> {
    regex::RegexBuilder::new(&pattern.translated())
        .size_limit(MAX_PATTERN_BYTES)
        .build()
        .map_err(|e| format!("`{}` is not a regular expression: {e}", pattern.0))
}

/// The beginning of a text, for people.
pub fn shown(text: &str) -> String {
    if text.trim().is_empty() {
        return "it is empty".into();
    }
    match text.char_indices().nth(SHOWN) {
        None => text.trim_end().to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<Pattern> {
        vec![Pattern(text.into())]
    }

    #[test]
    fn patterns_mean_what_they_mean_in_go() {
        for (pattern, text, matches) in [
            (r"^v\d+$", "v12", true),
            // Arabic digits are none for Go's \d.
            (r"^\d$", "\u{0663}", false),
            (r"^\w+$", "é", false),
            (r"^[\w.]+$", "a.b", true),
            (r"^[^\s]+$", "a b", false),
            (r#"{"a": \d}"#, r#"{"a": 1}"#, true),
            (r"\Q1+1\E=2", "1+1=2", true),
            (r"[[]x]", "[x]", true),
            (r"[a&&b]+", "&", true),
            // The end is the end of the text, unless (?m) says lines.
            (r"a$", "a\n", false),
            (r"(?m)a$", "a\nb", true),
            (r"a.b", "a\nb", false),
            (r"(?i)HELLO", "hello", true),
            (r"\bcat\b", "a cat.", true),
            (r"\bcat\b", "concat", false),
            (r"x{2}", "xx", true),
            (r"x{,2}", "x{,2}", true),
            (r"\x41\.", "A.", true),
            (r"[[:upper:]]", "a", false),
            (r"\<b\>", "<b>", true),
        ] {
            let result = found("it", text, &of(pattern), &[]);
            assert_eq!(result.is_ok(), matches, "{pattern} in {text}: {result:?}");
            assert_eq!(found("it", text, &[], &of(pattern)).is_ok(), !matches);
        }
    }

    #[test]
    fn long_texts_are_shown_in_part() {
        assert_eq!(shown("a\n"), "a");
        assert_eq!(shown(" \n"), "it is empty");
        let long = "é".repeat(SHOWN + 1);
        assert_eq!(shown(&long).chars().count(), SHOWN + 1);
    }
}
