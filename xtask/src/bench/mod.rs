//! `cargo xtask bench`: how fast and how small, as a table of medians.
//!
//! Everything is measured from outside, on the release build of `kiln`, over a project of
//! its own in a temporary folder with a `KILN_ROOT` of its own. Nothing asserts a time:
//! the machine decides those. A request that failed is an error, whatever the machine.

mod bed;
mod compose;
mod memory;
mod peers;
mod replace;
mod start;
mod table;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bed::Bed;
use kiln_testkit::load::Mode;
use table::{Row, Samples};

type Failure = Box<dyn std::error::Error>;

/// Runs of each measure, unless told otherwise.
const RUNS: usize = 20;
/// Connections of a keep-alive load.
const CONNECTIONS: usize = 16;

struct Options {
    runs: usize,
    only: Option<String>,
}

const NAMES: [&str; 6] = ["compose", "up", "start", "replace", "memory", "peers"];
/// Passes over the corpus of compose files: each is a process for every file.
const PASSES: usize = 3;

impl Options {
    fn read(words: &[String]) -> Result<Self, String> {
        let mut options = Self {
            runs: RUNS,
            only: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let value = words.next().ok_or(format!("{word} needs a value"))?;
            match word.as_str() {
                "--runs" => {
                    options.runs = value
                        .parse()
                        .ok()
                        .filter(|runs| *runs > 0)
                        .ok_or(format!("--runs {value}: not a number above 0"))?;
                }
                "--only" if NAMES.contains(&value.as_str()) => options.only = Some(value.clone()),
                "--only" => return Err(format!("--only {value}: one of {}", NAMES.join(", "))),
                _ => return Err(format!("{word}: --runs N or --only NAME")),
            }
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == name)
    }
}

pub fn run(words: &[String]) -> ExitCode {
    let options = match Options::read(words) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let mut rows = Vec::new();
    let result = measure(&options, &mut rows);
    print!("{}", table::render(&rows));
    println!("\n{}", table::machine());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options, rows: &mut Vec<Row>) -> Result<(), Failure> {
    if options.wants("compose") {
        eprintln!("compose: {} runs, {PASSES} passes", options.runs);
        rows.push(compose::large(options.runs)?);
        rows.extend(compose::corpus(&bed::kiln()?, PASSES)?);
    }
    match options.only.as_deref() {
        Some("compose") => Ok(()),
        _ => measure_running(options, rows),
    }
}

/// What needs a project that runs.
fn measure_running(options: &Options, rows: &mut Vec<Row>) -> Result<(), Failure> {
    let bed = Bed::new()?;
    let first = Instant::now();
    bed.up(0)?;
    eprintln!("first `kiln up`: {:.1} s", first.elapsed().as_secs_f64());
    if options.wants("up") {
        eprintln!("up: {} runs", options.runs);
        rows.push(unchanged(&bed, options.runs)?);
    }
    if options.wants("start") {
        eprintln!("start: {} runs", options.runs);
        rows.push(start::first_byte(&bed, options.runs)?);
    }
    if options.wants("peers") || options.wants("start") {
        rows.extend(peers::first_byte(options.runs));
    }
    if options.wants("memory") {
        eprintln!("memory: {} samples", options.runs);
        rows.push(memory::idle(&bed, options.runs)?);
    }
    let mut failed = 0;
    if options.wants("replace") {
        let keep_alive = Mode::KeepAlive {
            connections: CONNECTIONS,
        };
        for (name, mode) in [
            ("new connections", Mode::NewConnection),
            ("keep-alive", keep_alive),
        ] {
            eprintln!("replace, {name}: {} runs", options.runs);
            let (row, failures) = replace::under_load(&bed, name, mode, options.runs)?;
            rows.push(row);
            failed += failures;
        }
    }
    if failed > 0 {
        return Err(format!("{failed} requests failed while instances were replaced").into());
    }
    Ok(())
}

/// `kiln up` when nothing has changed, as a whole process.
fn unchanged(bed: &Bed, runs: usize) -> Result<Row, Failure> {
    let mut samples = Samples::default();
    // The first one may still write caches.
    bed.up(0)?;
    for _ in 0..runs {
        let begun = Instant::now();
        let said = bed.up(0)?;
        samples.add(begun.elapsed());
        if !said.contains("nothing changed") {
            return Err(format!("`kiln up` was to change nothing, but says: {said}").into());
        }
    }
    Ok(Row::times(
        "kiln up, nothing changed",
        "kiln",
        &samples,
        Some(Duration::from_millis(100)),
    ))
}
