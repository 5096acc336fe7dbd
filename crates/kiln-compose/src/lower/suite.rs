//! Files of tests that `x-kiln.test` names. What is wrong in them is told by their own lines
//! and columns.

use std::path::{Path, PathBuf};

use kiln_model::Digest;
use kiln_model::spec::Check;
use kiln_model::suite::{Pattern, Suite, SuiteKind};

use super::Lowering;
use super::goss::Parts;
use crate::diag::{Code, Diagnostic};
use crate::node::Node;
use crate::span::{Source, Span, Via};
use crate::yaml;

/// Compiled, a pattern takes at most this many bytes; also a bound for a file's patience.
const MAX_PATTERN_BYTES: usize = 1 << 20;

impl Lowering<'_> {
    /// `structure: FILE`, by its absolute path.
    pub(super) fn suite(&mut self, kind: SuiteKind, node: &Node, path: &str) -> Option<Check> {
        let file = PathBuf::from(self.string(node, path)?);
        let (root, bytes) = self.test_file(&file, node.span)?;
        let (digest, suite) = match kind {
            SuiteKind::Structure => (
                Digest::of(&bytes),
                Suite::Structure(Box::new(self.structure(&root))),
            ),
            SuiteKind::Goss => {
                let mut parts = Parts::new(&bytes);
                self.goss(&root, &file, &mut parts, 0);
                (parts.digest(), Suite::Goss(parts.into_goss()))
            }
        };
        self.suites.insert(digest, suite);
        let shown = file.strip_prefix(&self.project.folder).unwrap_or(&file);
        Some(Check::Suite {
            kind,
            path: shown.display().to_string(),
            digest,
        })
    }

    /// Reads and parses a file of tests that is named at `from`: its one document.
    pub(super) fn test_file(&mut self, file: &Path, from: Span) -> Option<(Node, Vec<u8>)> {
        let bytes = self.reader.read(file).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => format!("{} not found", file.display()),
            std::io::ErrorKind::IsADirectory => format!("{} is a folder", file.display()),
            _ => format!("{} cannot be read: {error}", file.display()),
        });
        let text = bytes.and_then(|bytes| {
            String::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8 text", file.display()))
        });
        let text = match text {
            Ok(text) => text,
            Err(what) => {
                let what = format!("the file of tests {what}");
                self.diagnostics.error(Code::File, from, what);
                return None;
            }
        };
        self.files_read.push(file.to_owned());
        let number = self.sources.add(Source {
            path: file.to_owned(),
            text: text.as_str().into(),
            from: Some((Via::Test, from)),
        });
        let begin = Span {
            file: number,
            start: 0,
            end: 0,
        };
        match yaml::parse(&text, number) {
            Err(diagnostic) => self.diagnostics.push(diagnostic),
            Ok(mut documents) => match documents.pop() {
                None => self.wrong(begin, "the file of tests is empty"),
                Some(second) if !documents.is_empty() => {
                    self.wrong(second.span, "a file of tests has one document");
                }
                Some(one) => return Some((one, text.into_bytes())),
            },
        }
        None
    }

    /// A regular expression in Go's syntax.
    pub(super) fn pattern(&mut self, node: &Node, path: &str) -> Option<Pattern> {
        let pattern = Pattern(self.string(node, path)?);
        self.compiles(&pattern, node.span, path).then_some(pattern)
    }

    pub(super) fn compiles(&mut self, pattern: &Pattern, place: Span, path: &str) -> bool {
        let compiled = regex::RegexBuilder::new(&pattern.translated())
            .size_limit(MAX_PATTERN_BYTES)
            .build();
        if let Err(error) = compiled {
            let why = error.to_string();
            // The crate draws the pattern and an arrow; its last line says what is wrong.
            let why = why.lines().last().unwrap_or_default();
            let why = why.strip_prefix("error: ").unwrap_or(why);
            self.diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    place,
                    format!("{path}: `{}` is not a regular expression: {why}", pattern.0),
                )
                .hint("they have Go's syntax (RE2): no look-around, no back-references"),
            );
            return false;
        }
        true
    }

    pub(super) fn patterns(&mut self, node: &Node, path: &str) -> Vec<Pattern> {
        let items = self.list(node, path).iter().enumerate();
        items
            .filter_map(|(at, item)| self.pattern(item, &format!("{path}[{at}]")))
            .collect()
    }

    /// A key that is known, and can't be honoured.
    pub(super) fn refused(&mut self, place: Span, what: &str, why: &str) {
        self.diagnostics.push(
            Diagnostic::error(
                Code::Unsupported,
                place,
                format!("kiln does not support `{what}`: {why}"),
            )
            .label("not supported"),
        );
    }
}
