//! Damaged and crossed projects, from seeds: whatever the bytes, an answer comes, the same
//! one each time, and what was accepted can be printed and read back.
//!
//! `fuzz/` does the same without end (`cargo +nightly fuzz run project`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_compose::{ConfigFormat, Environment, LoadError, LoadOptions, Resolved, lower, resolve};
use serde_json::Value as Json;

const CASES: &str = include_str!("cases.jsonl");
const ROUNDS: usize = 6_000;

/// Pieces that the language gives a meaning to.
const PIECES: &[&str] = &[
    "${",
    "}",
    "$$",
    ":-",
    ":?",
    ":+",
    "${A:-${B:?no}}",
    "<<: *a",
    "&a ",
    "*a",
    "!reset ",
    "!override ",
    "!!str ",
    "- ",
    ": ",
    "\n",
    "\t",
    "{",
    "[",
    "]",
    "\"",
    "'",
    "#",
    "|\n",
    ">-\n",
    "---\n",
    "null",
    "~",
    "0",
    "-1",
    "1e400",
    "0x1F",
    "9223372036854775808",
    "true",
    "yes",
    "services:",
    "extends:",
    "include:",
    "image: x",
    "name:",
    "\u{0}",
    "\u{feff}",
    "\u{1F525}",
];

/// xorshift: the same sequence on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n.max(1) as u64).unwrap()
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A place in `text` where it may be cut.
    fn place(&mut self, text: &str) -> usize {
        let mut at = self.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    }

    fn line(&mut self, text: &str) -> String {
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        lines
            .get(self.below(lines.len()))
            .map_or("", |l| l)
            .to_owned()
    }

    fn damage(&mut self, text: &mut String, other: &str) {
        let at = self.place(text);
        match self.below(6) {
            0 => text.insert_str(at, PIECES[self.below(PIECES.len())]),
            1 => {
                let end = self.place(text);
                text.replace_range(at.min(end)..at.max(end).min(at.min(end) + 40), "");
            }
            2 => {
                let line = self.line(other);
                let start = text[..at].rfind('\n').map_or(0, |n| n + 1);
                text.insert_str(start, &line);
            }
            3 => {
                let line = self.line(text);
                text.push_str(&line);
            }
            4 => {
                // One indentation more or less: keys change their owner.
                let start = text[..at].rfind('\n').map_or(0, |n| n + 1);
                match text[start..].starts_with("  ") && self.below(2) == 0 {
                    true => text.replace_range(start..start + 2, ""),
                    false => text.insert_str(start, "  "),
                }
            }
            _ => {
                let piece = self.place(other);
                let rest: String = other[piece..].chars().take(60).collect();
                text.insert_str(at, &rest);
            }
        }
    }
}

struct Case {
    files: BTreeMap<PathBuf, String>,
    named: Vec<PathBuf>,
}

impl Case {
    fn resolve(&self) -> Result<Resolved, LoadError> {
        let reader = |path: &Path| -> io::Result<Vec<u8>> {
            let text = self.files.get(path).ok_or(io::ErrorKind::NotFound)?;
            Ok(text.clone().into_bytes())
        };
        let options = LoadOptions {
            files: self.named.clone(),
            folder: "/case".into(),
            environment: Environment::from([("HOME".into(), "/root".into())]),
            profiles: vec!["*".into()],
            ..LoadOptions::default()
        };
        resolve(&options, &reader)
    }
}

fn cases() -> Vec<Case> {
    let cases = CASES
        .lines()
        .map(|line| serde_json::from_str::<Json>(line).unwrap());
    let accepted = cases
        .filter(|case| case.get("config").is_some())
        .map(|case| {
            let files: BTreeMap<PathBuf, String> = case["files"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, text)| {
                    (
                        Path::new("/case").join(name),
                        text.as_str().unwrap().to_owned(),
                    )
                })
                .collect();
            let yaml =
                |path: &&PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            let main = PathBuf::from("/case/compose.yaml");
            let named = match files.contains_key(&main) {
                true => vec![main],
                false => files.keys().filter(yaml).take(1).cloned().collect(),
            };
            Case { files, named }
        });
    accepted.filter(|case| !case.named.is_empty()).collect()
}

/// What there is to say of a result, without what differs by itself.
fn said(result: &Result<Resolved, LoadError>) -> String {
    match result {
        Ok(resolved) => resolved.project.config_json().to_string(),
        Err(error) => format!("{error}"),
    }
}

fn judge(case: &Case) -> Result<bool, String> {
    let result = case.resolve();
    let again = case.resolve();
    if said(&result) != said(&again) {
        return Err("not the same twice".into());
    }
    let resolved = match result {
        Ok(resolved) => resolved,
        Err(error) if error.errors().count() == 0 => return Err("refused without a word".into()),
        Err(_) => return Ok(false),
    };
    // What kiln can't honour is refused here, with words as well; only panics matter.
    let nothing = |_: &Path| -> io::Result<Vec<u8>> { Err(io::ErrorKind::NotFound.into()) };
    let _ = lower(
        &resolved.project,
        &nothing,
        &mut resolved.sources.clone(),
        &[],
    );
    let before = resolved.project.config_json();
    if compose_cannot_read_it_back(&before) {
        return Ok(true);
    }
    let text = resolved.project.config(ConfigFormat::Yaml);
    let printed = Case {
        files: [("/case/printed.yaml".into(), text)].into(),
        named: vec!["/case/printed.yaml".into()],
    };
    match printed.resolve().map(|read| read.project.config_json()) {
        Ok(read) if read == before => Ok(true),
        Ok(read) => Err(format!("read back as {read}\nnot {before}")),
        Err(error) => Err(format!("what was printed is refused: {error}")),
    }
}

/// What docker compose prints and then refuses or changes itself, and so does kiln: names
/// that are empty or have a `$`, `build: ""`, which has no context, limits of 0, and models without more.
fn compose_cannot_read_it_back(config: &Json) -> bool {
    let odd = |service: &Json| {
        let build = &service["build"];
        let limits = service["ulimits"].as_object().into_iter().flatten();
        let models = service["models"].as_object().into_iter().flatten();
        (build.is_object() && build.get("context").is_none())
            || limits
                .map(|(_, l)| l)
                .any(|l| l.is_object() && l.as_object().unwrap().len() < 2)
            || models.map(|(_, m)| m).any(Json::is_null)
    };
    let services = config["services"].as_object().into_iter().flatten();
    odd_names(config) || services.map(|(_, s)| s).any(odd)
}

fn odd_names(value: &Json) -> bool {
    match value {
        Json::Object(map) => map
            .iter()
            .any(|(name, value)| name.is_empty() || name.contains('$') || odd_names(value)),
        Json::Array(list) => list.iter().any(odd_names),
        _ => false,
    }
}

#[test]
fn whatever_the_bytes_an_answer_comes() {
    let cases = cases();
    let mut random = Random(0x6b69_6c6e);
    let (mut accepted, mut wrong) = (0, vec![]);
    for round in 0..ROUNDS {
        let from = random.of(&cases);
        let other = random.of(&cases);
        let other = other.files[&other.named[0]].clone();
        let mut case = Case {
            files: from.files.clone(),
            named: from.named.clone(),
        };
        let paths: Vec<PathBuf> = case.files.keys().cloned().collect();
        for _ in 0..=random.below(2) {
            let path = random.of(&paths).clone();
            random.damage(case.files.get_mut(&path).unwrap(), &other);
        }
        match judge(&case) {
            Ok(well) => accepted += usize::from(well),
            Err(why) => wrong.push(format!("round {round}: {why}\n{:#?}", case.files)),
        }
    }
    println!("{accepted} of {ROUNDS} accepted");
    assert!(
        wrong.is_empty(),
        "{}:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(5)].join("\n")
    );
    assert!(
        accepted > ROUNDS / 20,
        "only {accepted} were accepted: nothing was tested"
    );
}
