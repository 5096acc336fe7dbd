//! Damaged and crossed Containerfiles, from seeds: whatever the bytes, an answer comes, the
//! same one each time, and what is refused is refused with a place in the file.
//!
//! `fuzz/` does the same without end (`cargo +nightly fuzz run containerfile`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;

use kiln_build::containerfile::{Kind, ParseErrors, parse, parse_trigger};
use kiln_build::context::ignore::Patterns;
use kiln_build::evaluate::{Start, evaluate};
use kiln_build::graph::{self, Ask, Triggers};
use kiln_build::lint::{Around, Directive, lint};
use kiln_model::ImageConfig;

const ROUNDS: usize = 8_000;

/// Pieces that the language gives a meaning to.
const PIECES: [&str; 48] = [
    "FROM ",
    "ARG ",
    "RUN ",
    "COPY ",
    "ADD ",
    "ONBUILD ",
    "ENV ",
    "HEALTHCHECK ",
    "SHELL ",
    "EXPOSE ",
    " AS ",
    "--from=",
    "--mount=type=",
    "--chown=",
    "--link",
    "--chmod=u+x,",
    "<<E",
    "<<-\"E\"",
    "E\n",
    "\\\n",
    "\\",
    "`",
    "\r\n",
    "\n\n",
    "\t",
    "# ",
    "# escape=`\n",
    "# check=error=true\n",
    "${",
    "}",
    "$",
    ":-",
    ":?",
    "%%",
    "##",
    "/*/",
    "\"",
    "'",
    "[\"",
    "\"]",
    ",",
    "=",
    "65536",
    "-1",
    "\u{0}",
    "\u{feff}",
    "\u{1F525}",
    "../",
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

    fn damage(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(bytes.len() + 1);
        let end = (at + self.below(40)).min(bytes.len());
        match self.below(6) {
            0 | 1 => {
                let piece = PIECES[self.below(PIECES.len())];
                bytes.splice(at..at, piece.bytes());
            }
            2 => drop(bytes.drain(at..end)),
            3 => {
                let from = self.below(other.len() + 1);
                let piece = &other[from..(from + 60).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            4 => {
                let piece = bytes[at..end].to_vec();
                bytes.extend(piece);
            }
            _ if at < bytes.len() => bytes[at] = self.below(256) as u8,
            _ => {}
        }
    }
}

/// The Containerfiles of the conformance cases.
fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/cases");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|item| item.unwrap().path())
        .collect();
    files.sort();
    let texts = files.iter().map(|path| fs::read_to_string(path).unwrap());
    let cases: Vec<String> = texts
        .flat_map(|text| {
            let cases = text.split("=== ").skip(1);
            let file = |case: &str| case.split_once('\n').map(|(_, rest)| rest.to_owned());
            cases.filter_map(file).collect::<Vec<_>>()
        })
        .collect();
    let files = cases.iter().filter_map(|case| case.split("\n--- ").next());
    files.map(|text| text.as_bytes().to_vec()).collect()
}

/// Everything that is done with a file before anything is built; true: it was accepted.
fn judge(bytes: &[u8]) -> Result<bool, String> {
    let file = match parse(bytes) {
        Ok(file) => file,
        Err(errors) => return refused(bytes, &errors).map(|()| false),
    };
    if parse(bytes) != Ok(file.clone()) {
        return Err("not the same twice".into());
    }
    let text = String::from_utf8_lossy(bytes);
    let args = BTreeMap::from([("A".to_owned(), "given".to_owned())]);
    let around = Around {
        args: &args,
        contexts: &["other"],
        ignored: &Patterns::new(["*.log"]).unwrap(),
        pinned: &|_| false,
    };
    lint(&text, &file, &around, &Directive::default());
    let ask = Ask {
        args: &args,
        target: None,
        platform: "linux/amd64",
        host: "linux/amd64",
        contexts: &["other"],
    };
    let graph = graph::resolve(&file, &ask, &Triggers::new());
    let globals = graph.map(|graph| graph.globals).unwrap_or_default();
    for (index, stage) in file.stages.iter().enumerate() {
        let start = Start {
            config: ImageConfig::default(),
            author: None,
            args: BTreeMap::new(),
            given: &args,
            globals: &globals,
            triggers: &[],
        };
        let evaluated = evaluate(&file, index, start);
        if let Err(error) = &evaluated {
            within(bytes, error.span.start, error)?;
        }
        for instruction in &stage.instructions {
            if let Kind::Onbuild(text, _) = &instruction.kind {
                // What is kept in an image must be understood when it is read there, if
                // the file has no escape character of its own.
                let read = parse_trigger(text, instruction.span);
                if file.escape == '\\' && read.is_err() {
                    return Err(format!("the trigger `{text}` is not read back: {read:?}"));
                }
            }
        }
    }
    Ok(true)
}

fn refused(bytes: &[u8], errors: &ParseErrors) -> Result<(), String> {
    if errors.0.is_empty() {
        return Err("refused without a word".into());
    }
    errors
        .0
        .iter()
        .try_for_each(|problem| within(bytes, problem.span.start, problem))
}

/// A problem's line is one of the file's; 0 where the file has none.
fn within(bytes: &[u8], line: u32, problem: &impl Debug) -> Result<(), String> {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    match usize::try_from(line).unwrap() <= lines {
        true => Ok(()),
        false => Err(format!("line {line} of {lines}: {problem:?}")),
    }
}

#[test]
fn whatever_the_bytes_an_answer_comes() {
    let seeds = seeds();
    assert!(seeds.len() > 300, "only {} seeds", seeds.len());
    let mut random = Random(0x6b69_6c6e);
    let (mut accepted, mut wrong) = (0, Vec::new());
    for round in 0..ROUNDS {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        for _ in 0..=random.below(3) {
            random.damage(&mut bytes, other);
        }
        match judge(&bytes) {
            Ok(well) => accepted += usize::from(well),
            Err(why) => wrong.push(format!(
                "round {round}: {why}\n{}",
                String::from_utf8_lossy(&bytes)
            )),
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

/// Sizes that nobody writes and somebody will: an answer, and soon.
#[test]
fn large_and_deep_files_are_answered() {
    let many = format!("FROM scratch\n{}", "ENV A=$A$B\n".repeat(1_000));
    assert_eq!(judge(many.as_bytes()), Ok(true));
    let stages: String = (0..1_000)
        .map(|n| format!("FROM scratch AS s{n}\n"))
        .collect();
    assert_eq!(judge(stages.as_bytes()), Ok(true));
    let doubling = format!(
        "FROM scratch\nENV A=xxxxxxxxxxxxxxxx\n{}",
        "ENV A=$A$A\n".repeat(64)
    );
    assert_eq!(
        judge(doubling.as_bytes()),
        Ok(true),
        "refused when evaluated"
    );
    for (start, end) in [("${A:-", "}"), ("${A/x/", "}"), ("\"", "\""), ("<<", " ")] {
        let deep = format!(
            "FROM scratch\nENV B={}{}",
            start.repeat(5_000),
            end.repeat(5_000)
        );
        judge(deep.as_bytes()).unwrap();
    }
    let json = format!(
        "FROM scratch\nRUN {}{}",
        "[".repeat(20_000),
        "]".repeat(20_000)
    );
    judge(json.as_bytes()).unwrap();
    let onbuild = format!("FROM scratch\n{}RUN x", "ONBUILD ".repeat(5_000));
    assert_eq!(judge(onbuild.as_bytes()), Ok(false));
    let lines = format!("FROM scratch\nRUN a{}b", " \\\n".repeat(100_000));
    assert_eq!(judge(lines.as_bytes()), Ok(true));
    let documents = format!("FROM scratch\nRUN {}\n", "<<E ".repeat(5_000));
    judge(documents.as_bytes()).unwrap();
}
