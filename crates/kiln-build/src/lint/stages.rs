//! Rules about stages and about single instructions of theirs.

use std::collections::BTreeMap;

use super::{Around, Found, Rule};
use crate::containerfile::{
    CommandLine, Containerfile, Copy, Instruction, Kind, Source, Span, Stage,
};
use crate::context::ignore::clean;
use crate::remote;

/// Names that a stage can't be meant by.
const RESERVED: [&str; 2] = ["scratch", "context"];
/// Between `_`, or at a name's ends: what is likely secret.
const SECRET: [&str; 10] = [
    "apikey",
    "auth",
    "credential",
    "credentials",
    "key",
    "password",
    "pword",
    "passwd",
    "secret",
    "token",
];
const NOT_SECRET: &str = "public";

pub(super) fn lint(file: &Containerfile, around: &Around<'_>, found: &mut Found) {
    for (index, stage) in file.stages.iter().enumerate() {
        name(file, index, found);
        platform(stage, found);
        once(stage, found);
        let mut shell = false;
        for instruction in &stage.instructions {
            single(instruction, shell, found);
            shell |= matches!(instruction.kind, Kind::Shell(_));
            ignored(instruction, around, found);
        }
    }
    for instruction in &file.global_args {
        single(instruction, false, found);
    }
}

fn name(file: &Containerfile, index: usize, found: &mut Found) {
    let stage = &file.stages[index];
    let words: Vec<&str> = stage.text.split_whitespace().collect();
    let [.., keyword, written] = words.as_slice() else {
        return;
    };
    let Some(name) = &stage.name else { return };
    let from = words.first().copied().unwrap_or_default();
    let cased = |word: &str| (word == word.to_lowercase(), word == word.to_uppercase());
    let differs = match cased(from) {
        (true, _) => !cased(keyword).0,
        (_, true) => !cased(keyword).1,
        _ => false,
    };
    if differs {
        found.add(
            Rule::FromAsCasing,
            stage.span,
            format!("the casing of `{keyword}` and `{from}` differs"),
        );
    }
    if written != name {
        found.add(
            Rule::StageNameCasing,
            stage.span,
            format!("the stage name `{written}` should be lowercase"),
        );
    }
    if RESERVED.contains(&name.as_str()) {
        found.add(
            Rule::ReservedStageName,
            stage.span,
            format!("`{name}` means something else already; name the stage otherwise"),
        );
    }
    let mut before = file.stages[..index].iter();
    if before.any(|other| other.name.as_ref() == Some(name)) {
        found.add(
            Rule::DuplicateStageName,
            stage.span,
            format!("a stage before this one is named `{name}` already"),
        );
    }
}

fn platform(stage: &Stage, found: &mut Found) {
    let Some(platform) = &stage.platform else {
        return;
    };
    if matches!(platform.as_str(), "$TARGETPLATFORM" | "${TARGETPLATFORM}") {
        found.add(
            Rule::RedundantTargetPlatform,
            stage.span,
            format!("--platform={platform} is what FROM does anyway"),
        );
    }
    let name = stage.name.as_deref().unwrap_or_default();
    let mut parts = platform.split('/');
    if !platform.contains('$') && !parts.any(|part| name.contains(part)) {
        found.add(
            Rule::FromPlatformFlagConstDisallowed,
            stage.span,
            format!("--platform={platform} is the same for whatever platform is asked for"),
        );
    }
}

/// Of these only the last one counts.
fn once(stage: &Stage, found: &mut Found) {
    let mut last: BTreeMap<&str, Span> = BTreeMap::new();
    for instruction in &stage.instructions {
        let name = instruction.kind.name();
        if !["CMD", "ENTRYPOINT", "HEALTHCHECK"].contains(&name) {
            continue;
        }
        if let Some(earlier) = last.insert(name, instruction.span) {
            found.add(
                Rule::MultipleInstructionsDisallowed,
                earlier,
                format!("this {name} is not used: the stage has a later one"),
            );
        }
    }
}

fn single(instruction: &Instruction, own_shell: bool, found: &mut Found) {
    let span = instruction.span;
    let name = instruction.kind.name();
    match &instruction.kind {
        Kind::Cmd(CommandLine::Shell(_)) | Kind::Entrypoint(CommandLine::Shell(_))
            if !own_shell =>
        {
            found.add(
                Rule::JSONArgsRecommended,
                span,
                format!("{name} without JSON form runs below a shell, which keeps signals from it"),
            );
        }
        Kind::Env(pairs) => {
            let names = pairs.iter().map(|pair| pair.key.as_str());
            secrets(name, span, names, found);
        }
        Kind::Arg(args) => {
            let names = args.iter().map(|arg| arg.name.as_str());
            secrets(name, span, names, found);
        }
        Kind::Expose(ports) => ports.iter().for_each(|port| expose(port, span, found)),
        _ => {}
    }
}

fn secrets<'a>(what: &str, span: Span, names: impl Iterator<Item = &'a str>, found: &mut Found) {
    for name in names.filter(|name| is_secret(name)) {
        found.add(
            Rule::SecretsUsedInArgOrEnv,
            span,
            format!(
                "{what} `{name}` would keep a secret in the image; use RUN --mount=type=secret"
            ),
        );
    }
}

/// Whether a variable's name says that its value is secret.
pub(super) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let has = |word: &str| format!("_{name}_").contains(&format!("_{word}_"));
    SECRET.iter().any(|word| has(word)) && !has(NOT_SECRET)
}

fn expose(port: &str, span: Span, found: &mut Found) {
    let (ports, protocol) = port.split_once('/').unwrap_or((port, ""));
    if protocol.bytes().any(|b| b.is_ascii_uppercase()) {
        found.add(
            Rule::ExposeProtoCasing,
            span,
            format!("the protocol `{protocol}` should be lowercase"),
        );
    }
    // A variable's `${x:-y}` is no mapping.
    if ports.contains(':') && !ports.contains('$') {
        found.add(
            Rule::ExposeInvalidFormat,
            span,
            format!("EXPOSE takes neither an address nor a port of the host: `{port}`"),
        );
    }
}

fn ignored(instruction: &Instruction, around: &Around<'_>, found: &mut Found) {
    let (Kind::Copy(copy) | Kind::Add(copy)) = &instruction.kind else {
        return;
    };
    for path in of_context(copy) {
        let cleaned = clean(path);
        let path = cleaned.trim_start_matches('/');
        let plain = !path.is_empty() && path != "." && !path.contains(['*', '?', '[', '$']);
        if plain && around.ignored.leaves_out(path) {
            let name = instruction.kind.name();
            found.add(
                Rule::CopyIgnoredFile,
                instruction.span,
                format!("{name} takes `{path}`, which .dockerignore leaves out"),
            );
        }
    }
}

/// The sources that are paths in the build's own context.
fn of_context(copy: &Copy) -> impl Iterator<Item = &str> {
    let own = copy.from.is_none();
    copy.sources.iter().filter_map(move |source| match source {
        Source::Path(path) if own && !remote::is_remote(path) => Some(path.as_str()),
        _ => None,
    })
}
