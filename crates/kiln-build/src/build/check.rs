//! A build's file looked at by the lint rules, without building.

use kiln_model::spec::Build;

use super::{BuildError, read_file};
use crate::containerfile::{self, Containerfile};
use crate::context;
use crate::lint::{self, Around, Directive, Finding};

/// Build argument that takes the place of a file's `# check=`, as with BuildKit.
const ARGUMENT: &str = "BUILDKIT_DOCKERFILE_CHECK";

/// What was found.
#[derive(Debug)]
pub struct Checked {
    /// For people.
    pub file: String,
    pub text: String,
    pub findings: Vec<Finding>,
}

/// Reads a build's file and applies every rule; `pinned` as in [`Around::pinned`].
pub fn check(build: &Build, pinned: &dyn Fn(&str) -> bool) -> Result<Checked, BuildError> {
    let (name, path, text) = read_file(build)?;
    let file = containerfile::parse(&text).map_err(|errors| BuildError::Parse {
        file: name.clone(),
        errors,
    })?;
    let directive = directive(build, &name, &file)?;
    let ignored = context::read_ignore(&build.context, path.as_deref())?;
    let contexts = build.additional_contexts.keys();
    let around = Around {
        args: &build.args,
        contexts: &contexts.map(String::as_str).collect::<Vec<_>>(),
        ignored: &ignored,
        pinned,
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(Checked {
        file: name,
        findings: lint::lint(&text, &file, &around, &directive),
        text,
    })
}

fn directive(build: &Build, name: &str, file: &Containerfile) -> Result<Directive, BuildError> {
    let given = build.args.get(ARGUMENT).map(String::as_str);
    let directive = Directive::parse(given.or(file.check.as_deref()));
    directive.map_err(|cause| BuildError::Directive {
        file: name.to_owned(),
        cause,
    })
}

/// Stops a build whose file says `error=true` and has findings. kiln's own rules stop none:
/// BuildKit builds such a file.
pub(super) fn enforce(build: &Build, name: &str, file: &Containerfile) -> Result<(), BuildError> {
    if !directive(build, name, file)?.error {
        return Ok(());
    }
    let mut checked = check(build, &|_| true)?;
    let stops = |finding: &Finding| !finding.rule.is_kilns() && !finding.uncertain;
    checked.findings.retain(stops);
    match checked.findings.is_empty() {
        true => Ok(()),
        false => Err(BuildError::Findings(checked)),
    }
}

/// One finding a line.
pub(super) fn shown(checked: &Checked) -> String {
    let line = |f: &Finding| format!("{}: {}: {}: {}", checked.file, f.span, f.rule, f.message);
    let lines: Vec<String> = checked.findings.iter().map(line).collect();
    lines.join("\n")
}
