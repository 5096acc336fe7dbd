//! Regular expressions in Go's syntax, which both formats use
//! (<https://pkg.go.dev/regexp/syntax>).
//!
//! The `regex` crate descends from the same RE2, and differs in a few places that real
//! files do use. [`Pattern::translated`] writes those in its syntax: `\d`, `\s`, `\w`
//! with their opposites and `\b` mean ASCII; a `{` that begins no count is itself; `\Q…\E`;
//! `[`, `&&`, `--` and `~~` within a class are themselves; so are `\<` and `\>`.
//! What stays different: octal escapes (`\012`) are refused, `a**` is taken, and `\B` knows
//! the letters of all languages.

use serde::{Deserialize, Serialize};

/// As it was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub String);

impl Pattern {
    /// The same for the `regex` crate.
    pub fn translated(&self) -> String {
        let mut out = String::with_capacity(self.0.len() + 8);
        let mut rest = self.0.as_str();
        while let Some(next) = rest.chars().next() {
            let used = match next {
                '\\' => escape(rest, false, &mut out),
                '[' => class(rest, &mut out),
                '{' => match count(rest) {
                    Some(length) => push(&rest[..length], length, &mut out),
                    None => push("\\{", 1, &mut out),
                },
                other => {
                    out.push(other);
                    other.len_utf8()
                }
            };
            rest = &rest[used..];
        }
        out
    }
}

fn push(text: &str, used: usize, out: &mut String) -> usize {
    out.push_str(text);
    used
}

/// The length of `{n}`, `{n,}` or `{n,m}` at the beginning of `text`.
fn count(text: &str) -> Option<usize> {
    let end = text.find('}')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let inner = &text[1..end];
    let counts = match inner.split_once(',') {
        Some((least, most)) => digits(least) && (most.is_empty() || digits(most)),
        None => digits(inner),
    };
    counts.then_some(end + 1)
}

/// What begins with `\`; gives how much of `text` it was.
fn escape(text: &str, in_class: bool, out: &mut String) -> usize {
    let Some(next) = text[1..].chars().next() else {
        // Refused by the crate, as by Go.
        return push("\\", 1, out);
    };
    let ascii = match next {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        's' => r"[\t\n\x0C\r ]",
        'S' => r"[^\t\n\x0C\r ]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        'b' if !in_class => r"(?-u:\b)",
        '<' => "<",
        '>' => ">",
        'Q' if !in_class => return quoted(text, out),
        other => {
            out.push('\\');
            out.push(other);
            return 1 + other.len_utf8();
        }
    };
    push(ascii, 2, out)
}

/// `\Q…\E`, or to the end.
fn quoted(text: &str, out: &mut String) -> usize {
    let inner = &text[2..];
    let (plain, used) = match inner.find("\\E") {
        Some(end) => (&inner[..end], 2 + end + 2),
        None => (inner, text.len()),
    };
    for c in plain.chars() {
        if c.is_ascii_punctuation() {
            out.push('\\');
        }
        out.push(c);
    }
    used
}

/// A class in brackets; gives how much of `text` it was.
fn class(text: &str, out: &mut String) -> usize {
    let mut at = push("[", 1, out);
    if text[at..].starts_with('^') {
        at += push("^", 1, out);
    }
    // The first `]` is itself.
    if text[at..].starts_with(']') {
        at += push("\\]", 1, out);
    }
    while let Some(next) = text[at..].chars().next() {
        let here = &text[at..];
        at += match next {
            ']' => {
                out.push(']');
                return at + 1;
            }
            '\\' => escape(here, true, out),
            '[' => match here.starts_with("[:").then(|| here.find(":]")).flatten() {
                Some(end) => push(&here[..end + 2], end + 2, out),
                None => push("\\[", 1, out),
            },
            '&' | '~' => push(if next == '&' { "\\&" } else { "\\~" }, 1, out),
            // `--` is a difference of classes there; `+--` is a range here.
            '-' if here.starts_with("--") => push("-\\-", 2, out),
            other => {
                out.push(other);
                other.len_utf8()
            }
        };
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_writes_otherwise_is_translated() {
        for (go, rust) in [
            (r"^v\d+\.\d+$", r"^v[0-9]+\.[0-9]+$"),
            (r#"{"a": 1}"#, r#"\{"a": 1}"#),
            ("a{2,3}b{4}c{5,}", "a{2,3}b{4}c{5,}"),
            ("a{,3}", r"a\{,3}"),
            (r"\Qa.b*\E.c", r"a\.b\*.c"),
            (r"\Qa.b", r"a\.b"),
            (r"[[]", r"[\[]"),
            (r"[]a]", r"[\]a]"),
            (r"[^]a]", r"[^\]a]"),
            (r"[[:alpha:]\d_]", r"[[:alpha:][0-9]_]"),
            (r"[a&&b~~c]", r"[a\&\&b\~\~c]"),
            (r"[+--]", r"[+-\-]"),
            (r"\<a\>", "<a>"),
            (r"\bword\b", r"(?-u:\b)word(?-u:\b)"),
            ("é{", r"é\{"),
            ("[a", "[a"),
            ("\\", "\\"),
        ] {
            assert_eq!(Pattern(go.into()).translated(), rust, "{go}");
        }
    }
}
