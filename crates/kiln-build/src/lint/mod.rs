//! What is allowed in a Containerfile and likely meant otherwise: BuildKit's lint rules
//! under BuildKit's names, and kiln's own about what makes a build depend on the day.
//! Pure: a file's text and what surrounds it in, findings out.

mod directive;
mod file;
mod reproducible;
mod stages;
mod variables;

use std::collections::BTreeMap;
use std::fmt;

pub use directive::{BadDirective, Directive};

use crate::containerfile::{Containerfile, Span};
use crate::context::ignore::Patterns;

/// What is looked for. The names are what `# check=skip=` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    ConsistentInstructionCasing,
    CopyIgnoredFile,
    DuplicateStageName,
    ExposeInvalidFormat,
    ExposeProtoCasing,
    FromAsCasing,
    FromPlatformFlagConstDisallowed,
    InvalidDefaultArgInFrom,
    /// Only where `# check=experimental=` asks for it, as with BuildKit.
    InvalidDefinitionDescription,
    JSONArgsRecommended,
    LegacyKeyValueFormat,
    MaintainerDeprecated,
    MultipleInstructionsDisallowed,
    NoEmptyContinuation,
    RedundantTargetPlatform,
    ReservedStageName,
    SecretsUsedInArgOrEnv,
    StageNameCasing,
    UndefinedArgInFrom,
    UndefinedVar,
    WorkdirRelativePath,
    // From here on kiln's own.
    PipeToShell,
    UncheckedAdd,
    UnpinnedBase,
    UnrecordedDownload,
}

/// Every rule, in the order of the list above.
pub const RULES: [Rule; 25] = [
    Rule::ConsistentInstructionCasing,
    Rule::CopyIgnoredFile,
    Rule::DuplicateStageName,
    Rule::ExposeInvalidFormat,
    Rule::ExposeProtoCasing,
    Rule::FromAsCasing,
    Rule::FromPlatformFlagConstDisallowed,
    Rule::InvalidDefaultArgInFrom,
    Rule::InvalidDefinitionDescription,
    Rule::JSONArgsRecommended,
    Rule::LegacyKeyValueFormat,
    Rule::MaintainerDeprecated,
    Rule::MultipleInstructionsDisallowed,
    Rule::NoEmptyContinuation,
    Rule::RedundantTargetPlatform,
    Rule::ReservedStageName,
    Rule::SecretsUsedInArgOrEnv,
    Rule::StageNameCasing,
    Rule::UndefinedArgInFrom,
    Rule::UndefinedVar,
    Rule::WorkdirRelativePath,
    Rule::PipeToShell,
    Rule::UncheckedAdd,
    Rule::UnpinnedBase,
    Rule::UnrecordedDownload,
];

impl Rule {
    /// Not one of BuildKit's.
    pub fn is_kilns(self) -> bool {
        self >= Rule::PipeToShell
    }

    fn is_experimental(self) -> bool {
        self == Rule::InvalidDefinitionDescription
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A place where a rule struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub rule: Rule,
    /// It may be as it should be: a note, not a warning.
    pub uncertain: bool,
    pub span: Span,
    pub message: String,
}

/// What surrounds a file.
pub struct Around<'a> {
    pub args: &'a BTreeMap<String, String>,
    /// Names of the build's contexts.
    pub contexts: &'a [&'a str],
    /// What the context leaves out.
    pub ignored: &'a Patterns,
    /// Whether an image or a URL is known by its digest although it is named without one.
    pub pinned: &'a dyn Fn(&str) -> bool,
}

/// Finds everything, in line order. `text`: what `file` was parsed from.
pub fn lint(
    text: &str,
    file: &Containerfile,
    around: &Around<'_>,
    directive: &Directive,
) -> Vec<Finding> {
    let mut found = Found(Vec::new());
    file::lint(text, file, &mut found);
    stages::lint(file, around, &mut found);
    variables::lint(file, around, &mut found);
    reproducible::lint(file, around, &mut found);
    let mut findings = found.0;
    findings.retain(|finding| directive.wants(finding.rule));
    findings.sort_by_key(|finding| (finding.span, finding.rule));
    findings
}

/// Findings while they are made.
struct Found(Vec<Finding>);

impl Found {
    fn add(&mut self, rule: Rule, span: Span, message: impl Into<String>) {
        self.0.push(Finding {
            rule,
            uncertain: false,
            span,
            message: message.into(),
        });
    }

    fn note(&mut self, rule: Rule, span: Span, message: impl Into<String>) {
        self.add(rule, span, message);
        if let Some(last) = self.0.last_mut() {
            last.uncertain = true;
        }
    }
}

#[cfg(test)]
mod tests;
