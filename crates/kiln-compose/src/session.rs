//! One load in progress: what was read, what was found wrong, what is left of the bounds.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use crate::diag::{Code, Diagnostics};
use crate::interpolate::{Environment, Interpolation};
use crate::node::Node;
use crate::project::Skip;
use crate::span::{Source, Sources, Span, Via};
use crate::yaml;

/// Compose files of one project, included and extended ones counted each time.
pub const MAX_FILES: usize = 500;
/// Values of one project: files, and what `extends` and `include` copy.
pub const MAX_TOTAL_NODES: usize = 500_000;

/// Reads a file; the only way this crate's core learns what is on a disk.
pub trait Reader {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
}

impl<F> Reader for F
where
    F: Fn(&Path) -> io::Result<Vec<u8>>,
{
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self(path)
    }
}

pub(crate) struct Session<'a> {
    pub reader: &'a dyn Reader,
    pub sources: Sources,
    pub diagnostics: Diagnostics,
    /// Unset variables already warned about.
    pub warned: BTreeSet<String>,
    /// Everything that was read and exists.
    pub files_read: Vec<PathBuf>,
    pub skip: Skip,
    opened: usize,
    nodes: usize,
    /// A bound was reached and told; what follows is not worth doing.
    pub exhausted: bool,
}

impl<'a> Session<'a> {
    pub fn new(reader: &'a dyn Reader) -> Self {
        Self {
            reader,
            sources: Sources::default(),
            diagnostics: Diagnostics::default(),
            warned: BTreeSet::new(),
            files_read: vec![],
            skip: Skip::default(),
            opened: 0,
            nodes: 0,
            exhausted: false,
        }
    }

    /// The content of a file that must be there; says what it is for when it isn't.
    pub fn read(&mut self, path: &Path, from: Span, what: &str) -> Option<Vec<u8>> {
        match self.reader.read(path) {
            Ok(bytes) => {
                self.note_read(path);
                Some(bytes)
            }
            Err(error) => {
                let message = match error.kind() {
                    io::ErrorKind::NotFound => format!("{what} {} not found", path.display()),
                    io::ErrorKind::IsADirectory => {
                        format!("{what} {} is a folder", path.display())
                    }
                    _ => format!("{what} {} cannot be read: {error}", path.display()),
                };
                self.diagnostics.error(Code::File, from, message);
                None
            }
        }
    }

    /// The content of a file that may be missing (or be a folder).
    pub fn read_optional(&mut self, path: &Path, from: Span, what: &str) -> Option<Vec<u8>> {
        match self.reader.read(path) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::IsADirectory
                ) =>
            {
                None
            }
            Err(error) => {
                let message = format!("{what} {} cannot be read: {error}", path.display());
                self.diagnostics.error(Code::File, from, message);
                None
            }
            Ok(bytes) => {
                self.note_read(path);
                Some(bytes)
            }
        }
    }

    pub fn note_read(&mut self, path: &Path) {
        if !self.files_read.iter().any(|known| known == path) {
            self.files_read.push(path.to_owned());
        }
    }

    /// Reads and parses a compose file. `None`: already reported.
    pub fn documents(&mut self, path: &Path, from: Option<(Via, Span)>) -> Option<Vec<Node>> {
        let place = from.map_or(Span::NONE, |(_, span)| span);
        self.opened += 1;
        if self.opened > MAX_FILES {
            let message = format!("the project reads more than {MAX_FILES} compose files");
            self.exhaust(place, message);
        }
        if self.exhausted {
            return None;
        }
        let bytes = self.read(path, place, "the compose file")?;
        let Ok(text) = String::from_utf8(bytes) else {
            let message = format!("{} is not UTF-8 text", path.display());
            self.diagnostics.error(Code::Syntax, place, message);
            return None;
        };
        let file = self.sources.add(Source {
            path: path.to_owned(),
            text: text.as_str().into(),
            from,
        });
        match yaml::parse(&text, file) {
            Ok(documents) => self.spend(text.len() / 8, place).then_some(documents),
            Err(diagnostic) => {
                self.diagnostics.push(diagnostic);
                None
            }
        }
    }

    /// Fills variables in, unless they are to stay.
    pub fn interpolate(&mut self, document: &mut Node, environment: &Environment) {
        if self.skip.interpolation {
            return;
        }
        Interpolation {
            environment,
            diagnostics: &mut self.diagnostics,
            warned: &mut self.warned,
        }
        .run(document);
    }

    /// Runs a check or change. Where variables stay, what it says about them is no error:
    /// `${PORT}:80` may well be a port.
    pub fn lenient(&mut self, check: impl FnOnce(&mut Diagnostics)) {
        if !self.skip.interpolation {
            return check(&mut self.diagnostics);
        }
        let mut found = Diagnostics::default();
        check(&mut found);
        for diagnostic in found.into_list() {
            let text = self.sources.text(diagnostic.span);
            if !text.is_some_and(|text| text.contains('$')) {
                self.diagnostics.push(diagnostic);
            }
        }
    }

    /// Counts values that are made or copied; false when there are too many.
    pub fn spend(&mut self, nodes: usize, place: Span) -> bool {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MAX_TOTAL_NODES {
            self.exhaust(
                place,
                format!(
                    "the project has more than {MAX_TOTAL_NODES} values once all is put together"
                ),
            );
        }
        !self.exhausted
    }

    /// Says once that a bound is reached; nothing more is read or copied then.
    pub fn exhaust(&mut self, place: Span, message: String) {
        if !std::mem::replace(&mut self.exhausted, true) {
            self.diagnostics.error(Code::Limit, place, message);
        }
    }
}

/// The number of values in a tree.
pub(crate) fn size(node: &Node) -> usize {
    use crate::node::Value;
    1 + match &node.value {
        Value::Seq(seq) => seq.iter().map(size).sum(),
        Value::Map(map) => map.values().map(size).sum(),
        _ => 0,
    }
}
