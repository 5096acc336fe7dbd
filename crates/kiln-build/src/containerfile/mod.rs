//! The Containerfile (Dockerfile) language as BuildKit's stable frontend accepts it:
//! text in, typed instructions with their lines out. Two steps, as there: what is written
//! ([`syntax()`]), and whether a build can be made of it ([`parse`]).
//!
//! Invariants: parsing is pure and total (any bytes end in a value or in named
//! problems with their lines); everything the language has is parsed, also what the
//! builder refuses to execute; variables are left unexpanded here, because what they
//! stand for depends on the stage that is being built ([`expand`]).
//!
//! What must not enter: the file system, the store, knowledge of what is built.

mod declared;
mod duration;
pub mod expand;
mod flags;
mod heredoc;
mod instruction;
mod lines;
pub mod mount;
mod pattern;
mod syntax;
mod words;

use std::fmt;

pub use declared::Declared;
pub use heredoc::{Heredoc, chomp};
pub use instruction::{
    Arg, CommandLine, Copy, Health, HealthCommand, Instruction, Kind, Pair, Run, RunNetwork,
    Source, Stage,
};
pub use syntax::{Form, Statement, Syntax, syntax};

/// A Containerfile's greatest size in bytes; real ones stay under 100 KiB.
pub const MAX_FILE: usize = 4 << 20;

/// A physical line's greatest length in bytes with its end, as BuildKit has it.
pub const MAX_LINE: usize = 65_535;

/// First and last line of something, counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}", self.start)
    }
}

/// A whole parsed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerfile {
    /// `# syntax=`, as written.
    pub syntax: Option<String>,
    /// `# check=`, as written.
    pub check: Option<String>,
    /// `# escape=`: a backslash or a backtick.
    pub escape: char,
    /// `ARG`s before the first `FROM`, one entry per instruction.
    pub global_args: Vec<Instruction>,
    pub stages: Vec<Stage>,
    /// What is accepted but likely meant otherwise.
    pub warnings: Vec<Problem>,
}

/// Something wrong at a place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{span}: {cause}")]
pub struct Problem {
    pub span: Span,
    pub cause: Cause,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    #[error("the file has no instructions")]
    Empty,
    #[error("the file has more than {MAX_FILE} bytes")]
    FileTooLong,
    #[error("the line has more than {MAX_LINE} bytes")]
    LineTooLong,
    #[error("bytes that are not UTF-8 were replaced by U+FFFD")]
    NotUtf8,
    #[error("an empty line within a continued instruction; remove it or write a comment there")]
    EmptyContinuation,
    #[error("the parser directive `{0}` is given twice")]
    DirectiveTwice(String),
    #[error("`{0}` can't be the escape character: only \\ and ` can")]
    BadEscape(String),
    #[error("the heredoc `<<{0}` is never ended by a line `{0}`")]
    UnterminatedHeredoc(String),
    #[error("unknown instruction `{name}`{}", hint(.near))]
    UnknownInstruction {
        name: String,
        near: Option<&'static str>,
    },
    #[error("`{0}` stands before the first FROM; only ARG may")]
    BeforeFrom(String),
    #[error("there is no FROM")]
    NoStage,
    #[error("{instruction} {rule}")]
    Arguments {
        instruction: &'static str,
        rule: &'static str,
    },
    #[error("{instruction}: `{text}` {rule}")]
    Value {
        instruction: &'static str,
        text: String,
        rule: &'static str,
    },
    #[error("{instruction} has no flag `--{flag}`{}", hint(.near))]
    UnknownFlag {
        instruction: &'static str,
        flag: String,
        near: Option<&'static str>,
    },
    #[error("{instruction}: the flag `--{flag}` is given twice")]
    FlagTwice {
        instruction: &'static str,
        flag: String,
    },
    #[error("{instruction}: the flag `--{flag}` {rule}")]
    FlagValue {
        instruction: &'static str,
        flag: String,
        rule: String,
    },
    #[error("in `{text}`: {cause}")]
    Expansion {
        text: String,
        cause: expand::ExpandError,
    },
    #[error("--mount={text}: {cause}")]
    Mount { text: String, cause: String },
}

fn hint(near: &Option<&'static str>) -> String {
    near.map(|n| format!("; did you mean `{n}`?"))
        .unwrap_or_default()
}

/// Every problem that stops the file from being used, in line order, at least one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ParseErrors(pub Vec<Problem>);

impl ParseErrors {
    fn sorted(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|p| p.span);
        Self(problems)
    }
}

/// Parses a whole file. All its problems are found at once, except that nothing is
/// looked for behind a heredoc without an end.
pub fn parse(content: &[u8]) -> Result<Containerfile, ParseErrors> {
    let (read, mut problems) = syntax::read(content);
    let mut global_args = Vec::new();
    let mut stages: Vec<Stage> = Vec::new();
    for statement in &read.statements {
        match instruction::parse(statement, read.escape) {
            Err(cause) => problems.push(Problem {
                span: statement.span,
                cause,
            }),
            Ok(instruction::Parsed::Stage(stage)) => stages.push(stage),
            Ok(instruction::Parsed::Instruction(instruction)) => {
                match (stages.last_mut(), &instruction.kind) {
                    (Some(stage), _) => stage.instructions.push(instruction),
                    (None, Kind::Arg(_)) => global_args.push(instruction),
                    (None, kind) => problems.push(Problem {
                        span: statement.span,
                        cause: Cause::BeforeFrom(kind.name().into()),
                    }),
                }
            }
        }
    }
    if problems.is_empty() && stages.is_empty() {
        problems.push(Problem {
            span: read.statements.last().map(|s| s.span).unwrap_or_default(),
            cause: Cause::NoStage,
        });
    }
    if !problems.is_empty() {
        return Err(ParseErrors::sorted(problems));
    }
    Ok(Containerfile {
        syntax: read.syntax,
        check: read.check,
        escape: read.escape,
        global_args,
        stages,
        warnings: read.warnings,
    })
}

/// Parses an image's ONBUILD instruction; its place is that of the FROM which has it run.
pub fn parse_trigger(text: &str, span: Span) -> Result<Vec<Instruction>, ParseErrors> {
    let file = parse(format!("FROM scratch\n{text}\n").as_bytes())?;
    let instructions = file.stages.into_iter().flat_map(|s| s.instructions);
    Ok(instructions.map(|i| Instruction { span, ..i }).collect())
}

/// The candidate nearest to `text`, if it is near: for "did you mean".
fn nearest(text: &str, candidates: &[&'static str]) -> Option<&'static str> {
    const NEAR: usize = 2;
    let text = text.to_ascii_lowercase();
    candidates
        .iter()
        .map(|c| (distance(&text, &c.to_ascii_lowercase()), *c))
        .filter(|(d, c)| *d <= NEAR && *d < c.len())
        .min()
        .map(|(_, c)| c)
}

/// Levenshtein's edit distance over bytes; `a` is cut at 64 bytes.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let a = &a.as_bytes()[..a.len().min(64)];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(*x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
