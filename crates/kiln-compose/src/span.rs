//! Where a value stands: files by number, byte ranges, lines and columns.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A byte range of one source file. The file is [`Sources`]' number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    pub file: u32,
    pub start: u32,
    pub end: u32,
}

impl Span {
    /// For values no file has: defaults, and what options say.
    pub const NONE: Span = Span {
        file: u32::MAX,
        start: 0,
        end: 0,
    };

    pub fn is_none(self) -> bool {
        self.file == u32::MAX
    }
}

/// One file that was read.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub text: Arc<str>,
    /// Which `include`, `extends` or `x-kiln.test` brought it in.
    pub from: Option<(Via, Span)>,
}

/// What made a file part of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Include,
    Extends,
    Test,
}

impl Via {
    pub fn verb(self) -> &'static str {
        match self {
            Via::Include => "included",
            Via::Extends => "extended",
            Via::Test => "named",
        }
    }
}

/// A place for people: lines and columns count from 1, columns in characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub line: usize,
    pub column: usize,
}

/// All files of one load.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    files: Vec<Source>,
}

impl Sources {
    pub(crate) fn add(&mut self, source: Source) -> u32 {
        self.files.push(source);
        u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX)
    }

    pub fn get(&self, file: u32) -> Option<&Source> {
        self.files.get(usize::try_from(file).ok()?)
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
    }

    /// What stands there.
    pub fn text(&self, span: Span) -> Option<&str> {
        let range = usize::try_from(span.start).ok()?..usize::try_from(span.end).ok()?;
        self.get(span.file)?.text.get(range)
    }

    /// The place after its last character. `None` for [`Span::NONE`].
    pub fn end(&self, span: Span) -> Option<Place> {
        self.place(Span {
            start: span.end,
            ..span
        })
    }

    /// `None` for [`Span::NONE`].
    pub fn place(&self, span: Span) -> Option<Place> {
        let source = self.get(span.file)?;
        let start = usize::try_from(span.start).ok()?.min(source.text.len());
        let before = source.text.get(..start)?;
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Some(Place {
            path: source.path.clone(),
            line: before.bytes().filter(|b| *b == b'\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        })
    }
}
