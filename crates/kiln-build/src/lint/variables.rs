//! Rules about what variables stand for, which is followed through the stages.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use kiln_oci::reference::Reference;

use super::{Around, Found, Rule};
use crate::containerfile::expand::{Lexer, Variables};
use crate::containerfile::{Containerfile, Copy, Instruction, Kind, Source, Stage};

/// What FROM and its flags know without an ARG.
const PREDEFINED: [&str; 9] = [
    "BUILDPLATFORM",
    "BUILDOS",
    "BUILDARCH",
    "BUILDVARIANT",
    "TARGETPLATFORM",
    "TARGETOS",
    "TARGETARCH",
    "TARGETVARIANT",
    "TARGETSTAGE",
];
/// Distance up to which a known name is offered for an unknown one.
const NEAR: usize = 2;

/// Variables that remember which ones were asked for and are not there.
struct Asked<'a> {
    known: &'a BTreeMap<String, String>,
    missed: RefCell<BTreeSet<String>>,
}

impl Variables for Asked<'_> {
    fn get(&self, name: &str) -> Option<String> {
        Variables::get(self.known, name)
    }

    fn missed(&self, name: &str) {
        self.missed.borrow_mut().insert(name.to_owned());
    }
}

/// The names that `texts` ask for in vain. What can't be expanded is no finding: the
/// build tells of it.
fn missed<'a>(
    lexer: &Lexer,
    texts: impl IntoIterator<Item = &'a str>,
    known: &BTreeMap<String, String>,
) -> BTreeSet<String> {
    let asked = Asked {
        known,
        missed: RefCell::default(),
    };
    for text in texts {
        let _ = lexer.word(text, &asked);
    }
    asked.missed.into_inner()
}

/// What a stage ends with.
#[derive(Clone, Default)]
struct State {
    variables: BTreeMap<String, String>,
    /// ARGs without a value: known, and empty.
    declared: BTreeSet<String>,
    /// An image that isn't looked into may set more.
    uncertain: bool,
    /// WORKDIR was given in this file.
    placed: bool,
}

pub(super) fn lint(file: &Containerfile, around: &Around<'_>, found: &mut Found) {
    let lexer = Lexer::new(file.escape);
    let globals = Globals::new(file, around, &lexer);
    let mut states: Vec<State> = Vec::new();
    for (index, stage) in file.stages.iter().enumerate() {
        globals.from(&lexer, stage, found);
        let base = lexer.word(&stage.base, &globals.values).unwrap_or_default();
        let lower = base.to_ascii_lowercase();
        let is = |s: &Stage| s.name.as_deref() == Some(lower.as_str());
        let mut state = match file.stages[..index].iter().rposition(is) {
            Some(earlier) => states[earlier].clone(),
            None => State {
                uncertain: base != "scratch",
                ..State::default()
            },
        };
        if !around.contexts.contains(&base.as_str()) {
            globals.default_base(&lexer, stage, found);
        }
        let default = crate::evaluate::DEFAULT_PATH;
        let path = state.variables.entry("PATH".into());
        path.or_insert_with(|| default.into());
        for instruction in &stage.instructions {
            state.step(&lexer, &globals, around, instruction, found);
        }
        states.push(state);
    }
}

/// What each FROM means; empty: it can't be told.
pub(super) fn bases(file: &Containerfile, around: &Around<'_>) -> Vec<String> {
    let lexer = Lexer::new(file.escape);
    let globals = Globals::new(file, around, &lexer);
    let base = |stage: &Stage| lexer.word(&stage.base, &globals.values);
    let bases = file.stages.iter().map(base);
    bases.map(Result::unwrap_or_default).collect()
}

/// ARGs before the first FROM.
struct Globals {
    values: BTreeMap<String, String>,
    /// As if no argument were given.
    defaults: BTreeMap<String, String>,
    names: BTreeSet<String>,
}

impl Globals {
    fn new(file: &Containerfile, around: &Around<'_>, lexer: &Lexer) -> Self {
        // What they stand for differs; that they stand for something does not.
        let known = PREDEFINED.map(|name| (name.to_owned(), "linux".to_owned()));
        let mut globals = Self {
            values: known.clone().into(),
            defaults: known.into(),
            names: PREDEFINED.map(str::to_owned).into(),
        };
        for instruction in &file.global_args {
            let Kind::Arg(args) = &instruction.kind else {
                continue;
            };
            for arg in args {
                globals.names.insert(arg.name.clone());
                let expand = |known: &BTreeMap<String, String>| {
                    let text = arg.default.as_deref()?;
                    lexer.word(text, known).ok()
                };
                let given = around.args.get(&arg.name).cloned();
                if let Some(value) = given.or_else(|| expand(&globals.values)) {
                    globals.values.insert(arg.name.clone(), value);
                }
                if let Some(value) = expand(&globals.defaults) {
                    globals.defaults.insert(arg.name.clone(), value);
                }
            }
        }
        globals
    }

    fn from(&self, lexer: &Lexer, stage: &Stage, found: &mut Found) {
        let texts = [Some(stage.base.as_str()), stage.platform.as_deref()];
        for name in missed(lexer, texts.into_iter().flatten(), &self.values) {
            if !self.names.contains(&name) {
                let near = near(&name, self.names.iter());
                found.add(
                    Rule::UndefinedArgInFrom,
                    stage.span,
                    format!("no ARG before the first FROM declares `{name}`{near}"),
                );
            }
        }
    }

    /// What FROM means when no argument is given.
    fn default_base(&self, lexer: &Lexer, stage: &Stage, found: &mut Found) {
        if !stage.base.contains('$') {
            return;
        }
        let Ok(base) = lexer.word(&stage.base, &self.defaults) else {
            return;
        };
        if base.parse::<Reference>().is_err() {
            found.add(
                Rule::InvalidDefaultArgInFrom,
                stage.span,
                format!(
                    "without arguments `{}` is `{base}`, which names no image",
                    stage.base
                ),
            );
        }
    }
}

impl State {
    fn step(
        &mut self,
        lexer: &Lexer,
        globals: &Globals,
        around: &Around<'_>,
        instruction: &Instruction,
        found: &mut Found,
    ) {
        let body = Lexer {
            ignore_quotes: true,
            ..*lexer
        };
        let mut asked = missed(lexer, texts(&instruction.kind), &self.variables);
        asked.extend(missed(&body, bodies(&instruction.kind), &self.variables));
        for name in asked {
            if self.declared.contains(&name) {
                continue;
            }
            let rule = Rule::UndefinedVar;
            let message = format!("`${name}` is not set{}", near(&name, self.variables.keys()));
            match self.uncertain {
                false => found.add(rule, instruction.span, message),
                true => {
                    let message = format!("{message}, unless the base image sets it");
                    found.note(rule, instruction.span, message);
                }
            }
        }
        match &instruction.kind {
            Kind::Env(pairs) => {
                let expand = |text: &str| lexer.word(text, &self.variables).unwrap_or_default();
                let set: Vec<_> = pairs
                    .iter()
                    .map(|pair| (expand(&pair.key), expand(&pair.value)))
                    .collect();
                self.variables.extend(set);
            }
            Kind::Arg(args) => {
                for arg in args {
                    let default = arg.default.as_deref();
                    let default = default.and_then(|text| lexer.word(text, &self.variables).ok());
                    let given = around.args.get(&arg.name).cloned();
                    let global = || globals.values.get(&arg.name).cloned();
                    match given.or(default).or_else(global) {
                        // ENV goes before ARG.
                        Some(value) => {
                            let slot = self.variables.entry(arg.name.clone());
                            slot.or_insert(value);
                        }
                        None => {
                            self.declared.insert(arg.name.clone());
                        }
                    }
                }
            }
            Kind::Workdir(path) => {
                let path = lexer.word(path, &self.variables).unwrap_or_default();
                if !self.placed && !path.starts_with('/') {
                    found.add(
                        Rule::WorkdirRelativePath,
                        instruction.span,
                        format!(
                            "where `{path}` is depends on the base image; write it from `/` on"
                        ),
                    );
                }
                self.placed = true;
            }
            _ => {}
        }
    }
}

/// What an instruction has expanded.
fn texts(kind: &Kind) -> Vec<&str> {
    match kind {
        Kind::Add(copy) | Kind::Copy(copy) => of_copy(copy),
        Kind::Arg(args) => args.iter().filter_map(|a| a.default.as_deref()).collect(),
        Kind::Env(pairs) | Kind::Label(pairs) => pairs
            .iter()
            .flat_map(|pair| [pair.key.as_str(), pair.value.as_str()])
            .collect(),
        Kind::Expose(texts) | Kind::Volume(texts) => texts.iter().map(String::as_str).collect(),
        Kind::Run(run) => run.mounts.iter().map(String::as_str).collect(),
        Kind::StopSignal(text) | Kind::User(text) | Kind::Workdir(text) => vec![text],
        Kind::Cmd(_)
        | Kind::Declared(_)
        | Kind::Entrypoint(_)
        | Kind::Healthcheck(_)
        | Kind::Maintainer(_)
        | Kind::Onbuild(..)
        | Kind::Shell(_) => Vec::new(),
    }
}

fn of_copy(copy: &Copy) -> Vec<&str> {
    let sources = copy.sources.iter().filter_map(|source| match source {
        Source::Path(path) => Some(path.as_str()),
        Source::Inline { .. } => None,
    });
    let flags = [&copy.chown, &copy.chmod, &copy.checksum];
    let flags = flags.into_iter().filter_map(|flag| flag.as_deref());
    sources
        .chain([copy.destination.as_str()])
        .chain(flags)
        .chain(copy.exclude.iter().map(String::as_str))
        .collect()
}

/// Files that are written in the instruction itself.
fn bodies(kind: &Kind) -> Vec<&str> {
    let (Kind::Add(copy) | Kind::Copy(copy)) = kind else {
        return Vec::new();
    };
    let bodies = copy.sources.iter().filter_map(|source| match source {
        Source::Inline {
            content, expand, ..
        } => expand.then_some(content.as_str()),
        Source::Path(_) => None,
    });
    bodies.collect()
}

fn near<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> String {
    let distance = |other: &String| crate::containerfile::distance(name, other);
    let nearest = known.map(|other| (distance(other), other)).min();
    match nearest {
        Some((distance, other)) if distance <= NEAR && distance < other.len() => {
            format!(" (did you mean `{other}`?)")
        }
        _ => String::new(),
    }
}
