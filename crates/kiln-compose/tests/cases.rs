//! Small projects, each about one corner of the language, against what docker compose 2.40.3
//! makes of them (`tests/cases.jsonl`: a line a project, with its files, and the `config` or
//! `error` of `docker compose --profile '*' config --format json`; HOME is /root).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_compose::disk::{FILE_NAMES, OVERRIDE_NAMES};
use kiln_compose::{Environment, LoadError, LoadOptions, resolve};
use serde_json::Value as Json;

const CASES: &str = include_str!("cases.jsonl");

/// Where kiln differs on purpose.
const DIFFERENCES: &[(&str, &str)] = &[
    ("net", "newer compose prints ipam.options, which 2.40 drops"),
    (
        "dup-ports",
        "compose misses that `published: 80` and \"80\" are the same port",
    ),
    (
        "scalar-2",
        "compose refuses unquoted dates; kiln takes them as text",
    ),
    (
        "scalar-3",
        "compose refuses unquoted times; kiln takes them as text",
    ),
    ("scalar-6", "kiln refuses !!binary by name"),
    (
        "include-badkey",
        "compose drops unknown keys of include in silence",
    ),
    (
        "include-extends",
        "newer compose includes before it extends",
    ),
    ("expose-float", "kiln refuses it when it is lowered"),
    ("bytes", "newer compose takes memswap_limit: \"-1\""),
    ("bytes-13", "compose takes underscores in sizes"),
    (
        "port-24",
        "newer compose takes IPv6 addresses without brackets",
    ),
    (
        "dotenv-6",
        "compose misreads a name without value on a last line without line break",
    ),
    ("dotenv-32", "the same"),
    ("dotenv-33", "the same"),
];

fn run(case: &Json) -> Result<Json, LoadError> {
    let folder = Path::new("/case").join(case["name"].as_str().unwrap());
    let files: BTreeMap<PathBuf, String> = case["files"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (folder.join(name), text.as_str().unwrap().to_owned()))
        .collect();
    let named: Vec<PathBuf> = match case["args"].as_array() {
        Some(args) => args
            .iter()
            .map(|arg| folder.join(arg.as_str().unwrap()))
            .collect(),
        None => [&FILE_NAMES, &OVERRIDE_NAMES]
            .iter()
            .filter_map(|names| {
                names
                    .iter()
                    .map(|n| folder.join(n))
                    .find(|p| files.contains_key(p))
            })
            .collect(),
    };
    let project = named[0].parent().unwrap().to_owned();
    let mut environment = Environment::from([("HOME".into(), "/root".into())]);
    for (name, value) in case["env"].as_object().into_iter().flatten() {
        environment.insert(name.clone(), value.as_str().unwrap().to_owned());
    }
    if let Some(text) = files.get(&project.join(".env")) {
        let mut found = BTreeMap::new();
        let lookup = |name: &str| environment.get(name).cloned();
        kiln_compose::dotenv::parse(text.as_bytes(), &mut found, &lookup).expect(".env");
        for (name, value) in found {
            environment.entry(name).or_insert(value);
        }
    }
    let reader = |path: &Path| -> io::Result<Vec<u8>> {
        let text = files.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.clone().into_bytes())
    };
    let options = LoadOptions {
        files: named,
        folder: project,
        environment,
        profiles: vec!["*".into()],
        ..LoadOptions::default()
    };
    resolve(&options, &reader).map(|resolved| resolved.project.config_json())
}

fn same(ours: &Json, theirs: &Json) -> bool {
    match (ours, theirs) {
        (Json::Object(a), Json::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| same(v, w)))
        }
        (Json::Array(a), Json::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(v, w)| same(v, w))
        }
        (Json::Number(a), Json::Number(b)) => a.as_f64() == b.as_f64(),
        (a, b) => a == b,
    }
}

#[test]
fn each_case_ends_as_with_docker_compose() {
    let mut failures = vec![];
    let mut count = 0;
    for line in CASES.lines() {
        let case: Json = serde_json::from_str(line).unwrap();
        let name = case["name"].as_str().unwrap();
        count += 1;
        let problem = match (run(&case), case.get("config")) {
            (Ok(ours), Some(theirs)) if same(&ours, theirs) => None,
            (Ok(ours), Some(theirs)) => Some(format!("{ours}\n  docker compose: {theirs}")),
            (Ok(_), None) => Some(format!("accepted; docker compose: {}", case["error"])),
            (Err(error), Some(_)) => Some(format!("refused: {error}")),
            (Err(_), None) => None,
        };
        let known = DIFFERENCES.iter().any(|(known, _)| *known == name);
        match problem {
            Some(problem) if !known => failures.push(format!("{name}: {problem}")),
            None if known => failures.push(format!("{name}: listed as different, but is the same")),
            _ => {}
        }
    }
    println!("{count} cases, {} differ on purpose", DIFFERENCES.len());
    assert!(
        failures.is_empty(),
        "{} differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// A small generator of numbers: the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % bound.max(1)
    }
}

const PIECES: [&str; 24] = [
    "${",
    "}",
    "$",
    ":",
    "-",
    "\n",
    "  ",
    "[",
    "]",
    "{",
    "}",
    "null",
    "*a",
    "&a ",
    "<<: ",
    "!reset ",
    "!override ",
    "'",
    "\"",
    "#",
    "99999999999999999999",
    "é",
    "\t",
    "extends",
];

#[test]
fn no_damaged_file_makes_it_panic() {
    let mut numbers = Numbers(7);
    let cases: Vec<Json> = CASES
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let mut refused = 0;
    for case in &cases {
        for _ in 0..6 {
            let mut damaged = case.clone();
            for text in damaged["files"].as_object_mut().unwrap().values_mut() {
                let mut chars: Vec<char> = text.as_str().unwrap().chars().collect();
                for _ in 0..=numbers.below(3) {
                    let at = numbers.below(chars.len() + 1);
                    let cut = numbers.below(4).min(chars.len() - at);
                    let piece = PIECES[numbers.below(PIECES.len())];
                    chars.splice(at..at + cut, piece.chars());
                }
                *text = Json::String(chars.into_iter().collect());
            }
            if damaged["files"].get(".env").is_none() {
                refused += usize::from(full(&damaged).is_err());
            }
        }
    }
    assert!(refused > 100, "only {refused} damaged files were refused");
}

/// The whole way, with rendering.
fn full(case: &Json) -> Result<(), ()> {
    let folder = Path::new("/case");
    let files: BTreeMap<PathBuf, String> = case["files"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (folder.join(name), text.as_str().unwrap().to_owned()))
        .collect();
    let reader = |path: &Path| -> io::Result<Vec<u8>> {
        let text = files.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.clone().into_bytes())
    };
    let options = LoadOptions {
        files: vec![files.keys().next().unwrap().clone()],
        folder: folder.to_owned(),
        ..LoadOptions::default()
    };
    match kiln_compose::load(&options, &reader) {
        Ok(loaded) => {
            loaded.config(kiln_compose::ConfigFormat::Yaml);
            loaded.render_notes(kiln_compose::RenderOptions::default());
            Ok(())
        }
        Err(error) => {
            assert!(
                !error
                    .render(kiln_compose::RenderOptions::default())
                    .is_empty()
            );
            Err(())
        }
    }
}
