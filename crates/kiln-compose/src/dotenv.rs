//! `.env` files as compose reads them: quotes, escapes, comments, `export`, several lines
//! in quotes, and variables that refer to earlier ones. Pure.

use std::collections::BTreeMap;

use crate::template::{self, TemplateError};

/// An env file longer than this is refused.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// Why an env file cannot be read. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DotenvError {
    #[error("line {line}: {what}")]
    Line { line: usize, what: String },
    #[error("line {line}: {source}")]
    Template { line: usize, source: TemplateError },
    #[error("the file has {0} bytes; an env file may have {MAX_FILE_BYTES}")]
    TooLong(usize),
    #[error("the file is not UTF-8 text")]
    NotText,
}

pub type Variables = BTreeMap<String, String>;

/// Reads `bytes` into `out`. `lookup` comes before what the file itself says, both for
/// `${…}` and for names without a value.
pub fn parse(
    bytes: &[u8],
    out: &mut Variables,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(), DotenvError> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(DotenvError::TooLong(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| DotenvError::NotText)?;
    let mut parser = Parser {
        rest: text.strip_prefix('\u{feff}').unwrap_or(text),
        line: 1,
        lookup,
    };
    while parser.statement(out)? {}
    Ok(())
}

/// `format: raw`: each line as it is, without quotes, escapes or variables.
pub fn parse_raw(bytes: &[u8], out: &mut Variables) -> Result<(), DotenvError> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(DotenvError::TooLong(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| DotenvError::NotText)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (at, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(DotenvError::Line {
                line: at + 1,
                what: format!("`{key}` is not a variable name"),
            });
        }
        out.insert(key.to_owned(), value.to_owned());
    }
    Ok(())
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Parser<'a> {
    /// Reads one variable; false at the end of the file.
    fn statement(&mut self, out: &mut Variables) -> Result<bool, DotenvError> {
        self.skip_blank_and_comments();
        if self.rest.is_empty() {
            return Ok(false);
        }
        self.skip_export();
        let (key, has_value) = self.key()?;
        if key.contains(' ') {
            return Err(self.error(format!("the name `{key}` has a space in it")));
        }
        if !has_value {
            if let Some(value) = (self.lookup)(&key) {
                out.insert(key, value);
            }
            return Ok(true);
        }
        let value = self.value(out)?;
        out.insert(key, value);
        Ok(true)
    }

    fn error(&self, what: String) -> DotenvError {
        DotenvError::Line {
            line: self.line,
            what,
        }
    }

    /// Moves on by `bytes`, counting lines.
    fn advance(&mut self, bytes: usize) {
        let (passed, rest) = self.rest.split_at(bytes);
        self.line += passed.bytes().filter(|b| *b == b'\n').count();
        self.rest = rest;
    }

    fn skip_blank_and_comments(&mut self) {
        loop {
            let blank = self.rest.len() - self.rest.trim_start().len();
            self.advance(blank);
            if !self.rest.starts_with('#') {
                return;
            }
            let end = self.rest.find('\n').unwrap_or(self.rest.len());
            self.advance(end);
        }
    }

    fn skip_export(&mut self) {
        if let Some(after) = self.rest.strip_prefix("export")
            && after.starts_with(char::is_whitespace)
        {
            self.rest = after.trim_start_matches(inline_space);
        }
    }

    /// The name, and whether `=` or `:` follows it.
    fn key(&mut self) -> Result<(String, bool), DotenvError> {
        let found = self
            .rest
            .char_indices()
            .find(|(_, c)| !(inline_space(*c) || name_char(*c)));
        let (end, has_value) = match found {
            Some((at, '=' | ':')) => (at, true),
            Some((at, '\n')) => (at, false),
            None => (self.rest.len(), false),
            Some((_, other)) => {
                let line = self.rest.lines().next().unwrap_or("");
                return Err(self.error(format!(
                    "`{other}` is not allowed in a variable name: `{line}`"
                )));
            }
        };
        let key = self.rest[..end].trim_end().to_owned();
        self.advance((end + 1).min(self.rest.len()));
        self.rest = self.rest.trim_start_matches(inline_space);
        Ok((key, has_value))
    }

    fn value(&mut self, out: &Variables) -> Result<String, DotenvError> {
        match self.rest.as_bytes().first() {
            Some(quote @ (b'"' | b'\'')) => self.quoted(char::from(*quote), out),
            _ => {
                let end = self.rest.find('\n').unwrap_or(self.rest.len());
                let raw = &self.rest[..end];
                let raw = raw.split_once(" #").map_or(raw, |(before, _)| before);
                let value = self.fill(raw.trim_end(), out)?;
                self.advance((end + 1).min(self.rest.len()));
                Ok(value)
            }
        }
    }

    fn quoted(&mut self, quote: char, out: &Variables) -> Result<String, DotenvError> {
        let mut text = String::new();
        let mut escaped = false;
        for (at, c) in self.rest.char_indices().skip(1) {
            if c == quote && !escaped {
                let value = if quote == '"' {
                    self.fill(&unescape(&text), out)?
                } else {
                    text
                };
                self.advance(at + 1);
                return Ok(value);
            }
            if c == '\\' && !escaped {
                escaped = true;
                continue;
            }
            if escaped && c != quote {
                text.push('\\');
            }
            escaped = false;
            text.push(c);
        }
        let line = self.rest.lines().next().unwrap_or("");
        Err(self.error(format!("the quote is never closed: {line}")))
    }

    fn fill(&self, text: &str, out: &Variables) -> Result<String, DotenvError> {
        let lookup = |name: &str| (self.lookup)(name).or_else(|| out.get(name).cloned());
        template::substitute(text, &lookup, &mut vec![]).map_err(|source| DotenvError::Template {
            line: self.line,
            source,
        })
    }
}

fn inline_space(c: char) -> bool {
    matches!(
        c,
        '\t' | '\u{b}' | '\u{c}' | '\r' | ' ' | '\u{85}' | '\u{a0}'
    )
}

fn name_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '[' | ']')
}

/// Escapes of double quotes. `\$` becomes `$$`, which the template turns into a dollar.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('a') => out.push('\u{7}'),
            Some('b') => out.push('\u{8}'),
            Some('c') => out.push_str("\\c"),
            Some('f') => out.push('\u{c}'),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('v') => out.push('\u{b}'),
            Some('$') => out.push_str("$$"),
            Some(same @ ('"' | '\\')) => out.push(same),
            Some('0') => octal(&mut chars, &mut out),
            Some(other) => {
                out.push('\\');
                out.push(other);
            }
            None => out.push('\\'),
        }
    }
    out
}

/// `\0ddd`: exactly three octal digits, else the text stays.
fn octal(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, out: &mut String) {
    let mut digits = String::new();
    while digits.len() < 3
        && let Some(digit) = chars.next_if(char::is_ascii_digit)
    {
        digits.push(digit);
    }
    let value = (digits.len() == 3)
        .then(|| u8::from_str_radix(&digits, 8).ok())
        .flatten();
    match value {
        Some(byte) => out.push(char::from(byte)),
        None => {
            out.push_str("\\0");
            out.push_str(&digits);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read(text: &str) -> Result<Variables, DotenvError> {
        let mut out = Variables::new();
        let lookup = |name: &str| (name == "OUTER").then(|| "o".to_owned());
        parse(text.as_bytes(), &mut out, &lookup)?;
        Ok(out)
    }

    #[test]
    fn every_form() {
        let text = "\u{feff}# comment\nA=1\n  export B = two words # note\nC='si$A\\n'\n\
            D=\"line\\n$A \\$A\\\"\"\nE: yaml\nF=\nOUTER\nNOPE\nG=${A}-${OUTER}\nH=\"two\nlines\"\n\
            I=a#b\nJ=$$A\nK='it\\'s'\nOUTER2=${OUTER:-x}\r\n";
        let vars = read(text).unwrap();
        for (key, value) in [
            ("A", "1"),
            ("B", "two words"),
            ("C", "si$A\\n"),
            ("D", "line\n1 $A\""),
            ("E", "yaml"),
            ("F", ""),
            ("OUTER", "o"),
            ("G", "1-o"),
            ("H", "two\nlines"),
            ("I", "a#b"),
            ("J", "$A"),
            ("K", "it's"),
            ("OUTER2", "o"),
        ] {
            assert_eq!(vars.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert!(!vars.contains_key("NOPE"));
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line) in [
            ("A=1\nB!=2", 2),
            ("A=\"x", 1),
            ("\n\nMY VAR=1", 3),
            ("A=1\n\nB=${", 3),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("line {line}:")), "{message}");
        }
    }

    #[test]
    fn raw_takes_lines_as_they_are() {
        let mut out = Variables::new();
        parse_raw(b"A='q' # x\n# c\nB=$A\n", &mut out).unwrap();
        assert_eq!(out["A"], "'q' # x");
        assert_eq!(out["B"], "$A");
    }
}
