//! From bytes to logical lines: byte-order mark, parser directives, comments,
//! continuation lines and heredoc bodies.

use super::heredoc::{self, Heredoc};
use super::{Cause, MAX_FILE, MAX_LINE, Problem, Span, words};

/// An instruction's whole text, its lines joined.
pub(super) struct Line {
    pub text: String,
    pub span: Span,
    pub heredocs: Vec<Heredoc>,
}

#[derive(Default)]
pub(super) struct Lines {
    pub syntax: Option<String>,
    pub check: Option<String>,
    pub escape: char,
    pub lines: Vec<Line>,
    pub warnings: Vec<Problem>,
}

/// Reads all logical lines and what is wrong with them.
pub(super) fn read(content: &[u8]) -> (Lines, Vec<Problem>) {
    let mut reader = Reader::new(content);
    if content.len() > MAX_FILE {
        reader.problem(1, Cause::FileTooLong);
        return (reader.out, reader.problems);
    }
    while reader.instruction() {}
    if reader.out.lines.is_empty() && reader.problems.is_empty() {
        reader.problem(reader.number, Cause::Empty);
    }
    (reader.out, reader.problems)
}

struct Reader<'a> {
    rest: &'a [u8],
    /// The number of the line last taken.
    number: u32,
    /// Directives may stand only before anything else.
    directives_open: bool,
    escape_given: bool,
    out: Lines,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn new(content: &'a [u8]) -> Self {
        Self {
            rest: content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content),
            number: 0,
            directives_open: true,
            escape_given: false,
            out: Lines {
                escape: '\\',
                ..Lines::default()
            },
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, line: u32, cause: Cause) {
        let span = Span {
            start: line,
            end: self.number.max(line),
        };
        self.problems.push(Problem { span, cause });
    }

    /// The next physical line with its end (`\n` or `\r\n`).
    fn take(&mut self) -> Option<String> {
        if self.rest.is_empty() {
            return None;
        }
        let end = self
            .rest
            .iter()
            .position(|b| *b == b'\n')
            .map_or(self.rest.len(), |i| i + 1);
        let (line, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.number += 1;
        if line.len() > MAX_LINE {
            self.problem(self.number, Cause::LineTooLong);
        }
        let text = String::from_utf8_lossy(line);
        if let std::borrow::Cow::Owned(_) = text {
            self.out.warnings.push(Problem {
                span: Span {
                    start: self.number,
                    end: self.number,
                },
                cause: Cause::NotUtf8,
            });
        }
        Some(text.into_owned())
    }

    /// Reads one logical line; false at the end of the file.
    fn instruction(&mut self) -> bool {
        let Some(raw) = self.take() else {
            return false;
        };
        let first = trim_end(&raw).trim_start();
        self.directive(first);
        let first = if is_comment(first) { "" } else { first };
        let start = self.number;
        let (part, mut more) = continued(first, self.out.escape);
        if !more && part.is_empty() {
            return true;
        }
        let mut text = part.to_owned();
        let mut hole = false;
        while more {
            let Some(raw) = self.take() else { break };
            let line = trim_end(&raw);
            if is_comment(line) {
                continue;
            }
            if line.trim().is_empty() {
                hole = true;
                continue;
            }
            let (part, again) = continued(line, self.out.escape);
            text.push_str(part);
            more = again;
        }
        if hole {
            self.out.warnings.push(Problem {
                span: Span {
                    start,
                    end: self.number,
                },
                cause: Cause::EmptyContinuation,
            });
        }
        self.finish(text, start)
    }

    /// Adds the heredoc bodies that belong to the line; false if one has no end.
    fn finish(&mut self, text: String, start: u32) -> bool {
        let mut heredocs = Vec::new();
        if text.contains("<<") && words::may_hold_heredocs(&text, self.out.escape) {
            match heredoc::starts(&text) {
                Ok(found) => heredocs = found,
                Err(cause) => self.problem(start, cause),
            }
        }
        for doc in &mut heredocs {
            if !self.body(doc) {
                self.problem(start, Cause::UnterminatedHeredoc(doc.name.clone()));
                return false;
            }
        }
        let span = Span {
            start,
            end: self.number,
        };
        self.out.lines.push(Line {
            text,
            span,
            heredocs,
        });
        true
    }

    fn body(&mut self, doc: &mut Heredoc) -> bool {
        while let Some(line) = self.take() {
            let mut end = trim_end(&line);
            if doc.chomp {
                end = end.trim_start_matches('\t');
            }
            if end == doc.name {
                return true;
            }
            doc.content.push_str(&line);
        }
        false
    }

    /// Recognises `# key=value` at the very top.
    fn directive(&mut self, line: &str) {
        if !self.directives_open {
            return;
        }
        let found = line.strip_prefix('#').and_then(directive);
        let Some((key, value)) = found else {
            self.directives_open = false;
            return;
        };
        let slot = match key.as_str() {
            "syntax" => &mut self.out.syntax,
            "check" => &mut self.out.check,
            "escape" => return self.escape(value),
            _ => {
                self.directives_open = false;
                return;
            }
        };
        if slot.is_some() {
            self.problem(self.number, Cause::DirectiveTwice(key));
        } else {
            *slot = Some(value.to_owned());
        }
    }

    fn escape(&mut self, value: &str) {
        if std::mem::replace(&mut self.escape_given, true) {
            return self.problem(self.number, Cause::DirectiveTwice("escape".into()));
        }
        match value {
            "\\" => self.out.escape = '\\',
            "`" => self.out.escape = '`',
            _ => self.problem(self.number, Cause::BadEscape(value.to_owned())),
        }
    }
}

/// `key = value` with a key of ASCII letters and digits.
fn directive(text: &str) -> Option<(String, &str)> {
    let (key, value) = text.trim_start().split_once('=')?;
    let key = key.trim_end();
    let named = key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.chars().all(|c| c.is_ascii_alphanumeric());
    let value = value.trim();
    (named && !value.is_empty()).then(|| (key.to_ascii_lowercase(), value))
}

fn trim_end(line: &str) -> &str {
    line.trim_end_matches(['\r', '\n'])
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with('#')
}

/// Takes a trailing escape character off: the line goes on. A doubled one stands for
/// itself.
fn continued(line: &str, escape: char) -> (&str, bool) {
    match line.trim_end_matches([' ', '\t']).strip_suffix(escape) {
        Some(before) if !before.ends_with(escape) => (before, true),
        _ => (line, false),
    }
}
