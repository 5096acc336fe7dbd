//! Rules about how a file is written.

use super::{Found, Rule};
use crate::containerfile::{Cause, Containerfile, Instruction, Kind, Pair, Span};

pub(super) fn lint(text: &str, file: &Containerfile, found: &mut Found) {
    for warning in &file.warnings {
        if warning.cause == Cause::EmptyContinuation {
            let rule = Rule::NoEmptyContinuation;
            found.add(rule, warning.span, "empty continuation line");
        }
    }
    casing(file, found);
    for instruction in instructions(file) {
        match &instruction.kind {
            Kind::Maintainer(_) => found.add(
                Rule::MaintainerDeprecated,
                instruction.span,
                "MAINTAINER is deprecated; use LABEL org.opencontainers.image.authors",
            ),
            Kind::Env(pairs) | Kind::Label(pairs) if is_legacy(pairs, &instruction.text) => {
                let name = instruction.kind.name();
                found.add(
                    Rule::LegacyKeyValueFormat,
                    instruction.span,
                    format!("write `{name} key=value` instead of `{name} key value`"),
                );
            }
            _ => {}
        }
    }
    descriptions(text, file, found);
}

/// Everything but FROM.
pub(super) fn instructions(file: &Containerfile) -> impl Iterator<Item = &Instruction> {
    let own = file.stages.iter().flat_map(|s| &s.instructions);
    file.global_args.iter().chain(own)
}

fn keyword(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or_default()
}

fn is_upper(word: &str) -> bool {
    !word.bytes().any(|b| b.is_ascii_lowercase())
}

fn is_lower(word: &str) -> bool {
    !word.bytes().any(|b| b.is_ascii_uppercase())
}

/// All keywords as most of them are.
fn casing(file: &Containerfile, found: &mut Found) {
    let froms = file.stages.iter().map(|s| (keyword(&s.text), s.span));
    let others = instructions(file).map(|i| (keyword(&i.text), i.span));
    let all: Vec<(&str, Span)> = froms.chain(others).collect();
    let upper = all.iter().filter(|(word, _)| is_upper(word)).count();
    let lower = all.iter().filter(|(word, _)| is_lower(word)).count();
    let (fits, wanted): (fn(&str) -> bool, _) = match lower > upper {
        true => (is_lower, "lowercase"),
        false => (is_upper, "uppercase"),
    };
    for (word, span) in all.into_iter().filter(|(word, _)| !fits(word)) {
        found.add(
            Rule::ConsistentInstructionCasing,
            span,
            format!("`{word}` should be written as most instructions here are ({wanted})"),
        );
    }
}

/// `ENV key value`.
fn is_legacy(pairs: &[Pair], text: &str) -> bool {
    let [pair] = pairs else { return false };
    let rest = text[keyword(text).len()..].trim_start();
    let after = rest.strip_prefix(pair.key.as_str());
    after.is_some_and(|after| after.starts_with(char::is_whitespace))
}

/// A comment right above an ARG or a named stage describes it: `# NAME …`.
fn descriptions(text: &str, file: &Containerfile, found: &mut Found) {
    let lines: Vec<&str> = text.lines().collect();
    let comment = |span: Span| -> Option<&str> {
        let above = lines.get((span.start as usize).checked_sub(2)?)?;
        // Directives describe nothing.
        let body = above.trim_start().strip_prefix('#')?.trim();
        (!body.contains("check=") && !body.contains("syntax=")).then_some(body)
    };
    let mut describe = |what: &str, span: Span, names: Vec<&str>| {
        let Some(comment) = comment(span).filter(|_| !names.is_empty()) else {
            return;
        };
        let first = comment.split(' ').next().unwrap_or_default();
        if !names.contains(&first) {
            let example = match names.as_slice() {
                [one] => one,
                _ => "<arg_key>",
            };
            found.add(
                Rule::InvalidDefinitionDescription,
                span,
                format!("the comment above {what} should read `# {example} <description>`"),
            );
        }
    };
    for stage in &file.stages {
        describe(
            "FROM",
            stage.span,
            stage.name.as_deref().into_iter().collect(),
        );
    }
    for instruction in instructions(file) {
        if let Kind::Arg(args) = &instruction.kind {
            let names = args.iter().map(|arg| arg.name.as_str());
            describe("ARG", instruction.span, names.collect());
        }
    }
}
