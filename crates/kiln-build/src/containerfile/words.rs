//! Splitting an instruction's text: keyword, flags, words, JSON arrays.

use super::{Cause, instruction};

const BLANK: [char; 5] = ['\t', '\u{b}', '\u{c}', '\r', ' '];

/// An instruction's keyword, flags (quotes removed) and the remaining text.
pub(super) struct Split<'a> {
    pub keyword: &'a str,
    pub flags: Vec<String>,
    pub rest: &'a str,
}

/// Splits a logical line.
pub(super) fn split(line: &str, escape: char) -> Split<'_> {
    let line = line.trim();
    let Some((keyword, rest)) = line.split_once(BLANK) else {
        return Split {
            keyword: line,
            flags: Vec::new(),
            rest: "",
        };
    };
    let (flags, rest) = flags(rest, escape);
    Split {
        keyword,
        flags,
        rest: rest.trim(),
    }
}

/// Takes the leading `--word`s; a lone `--` ends them.
fn flags(text: &str, escape: char) -> (Vec<String>, &str) {
    let mut flags = Vec::new();
    let mut rest = text.trim_start();
    while rest.starts_with("--") {
        let (word, after) = flag(rest, escape);
        rest = after.trim_start();
        if word == "--" {
            break;
        }
        flags.push(word);
    }
    (flags, rest)
}

/// One flag with quotes and escapes taken away, and what follows.
fn flag(text: &str, escape: char) -> (String, &str) {
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match quote {
            None if c.is_whitespace() => return (word, &text[at..]),
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(q) if c == q => quote = None,
            _ if c == escape => word.extend(chars.next().map(|(_, c)| c)),
            _ => word.push(c),
        }
    }
    (word, "")
}

/// Words of `ENV`, `LABEL` and `ARG`: separated by white space, quotes and escapes kept
/// for the expansion to come.
pub(super) fn quoted(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            continue;
        }
        if c == escape && quote != Some('\'') {
            // At the end of the line it stands for nothing.
            if let Some(next) = chars.next() {
                word.push(c);
                word.push(next);
            }
            continue;
        }
        match quote {
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(q) if c == q => quote = None,
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Splits at blanks only; no quotes.
pub(super) fn plain(text: &str) -> Vec<String> {
    text.split(BLANK)
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A JSON array of texts; `None`: not JSON, so the shell form. An array that holds
/// anything else than texts is an error, as in BuildKit.
pub(super) fn json(text: &str, instruction: &'static str) -> Result<Option<Vec<String>>, Cause> {
    let text = text.trim_start();
    if !text.starts_with('[') {
        return Ok(None);
    }
    let Ok(values) = serde_json::from_str::<Vec<serde_json::Value>>(text) else {
        return Ok(None);
    };
    values
        .into_iter()
        .map(|value| match value {
            serde_json::Value::String(text) => Ok(text),
            _ => Err(Cause::Arguments {
                instruction,
                rule: "in JSON form takes an array of texts only",
            }),
        })
        .collect::<Result<_, _>>()
        .map(Some)
}

/// Whether heredoc bodies may follow a line: RUN, COPY, ADD (also as ONBUILD triggers)
/// that are not in JSON form.
pub(super) fn may_hold_heredocs(line: &str, escape: char) -> bool {
    let mut split = split(line, escape);
    if split.keyword.eq_ignore_ascii_case("onbuild") {
        split = self::split(split.rest, escape);
    }
    let holds = ["run", "copy", "add"]
        .iter()
        .any(|k| split.keyword.eq_ignore_ascii_case(k));
    holds && !matches!(json(split.rest, instruction::ANY), Ok(Some(_)))
}
