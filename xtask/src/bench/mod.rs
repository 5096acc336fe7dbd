//! `cargo xtask bench`: how fast and how small, as a table of medians.
//!
//! Everything is measured from outside, on the release build of `kiln`, over a project of
//! its own in a temporary folder with a `KILN_ROOT` of its own. Nothing asserts a time:
//! the machine decides those. A request that failed is an error, whatever the machine.

mod bed;
mod behind;
mod build;
mod compose;
mod debian;
mod memory;
mod peers;
mod plan;
mod replace;
mod rollback;
mod scale;
mod start;
mod table;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bed::Bed;
use kiln_testkit::load::Mode;
use replace::Subject;
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

const NAMES: [&str; 11] = [
    "build", "compose", "debian", "plan", "up", "start", "replace", "rollback", "memory", "scale",
    "peers",
];
/// Debian roots composed of each kind.
const MOST_ROOTS: usize = 5;
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
            if NAMES.contains(&word.as_str()) {
                options.only = Some(word.clone());
                continue;
            }
            let value = words.next().ok_or(format!("{word} needs a value"))?;
            match word.as_str() {
                "--runs" => {
                    options.runs = value
                        .parse()
                        .ok()
                        .filter(|runs| *runs > 0)
                        .ok_or(format!("--runs {value}: not a number above 0"))?;
                }
                _ => return Err(format!("{word}: --runs N or one of {}", NAMES.join(", "))),
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
        rows.extend(compose::corpus(&crate::cargo::kiln()?, PASSES)?);
    }
    if options.wants("plan") {
        eprintln!("plan: {} runs", options.runs);
        rows.extend(plan::steps(options.runs)?);
    }
    if options.wants("build") {
        eprintln!("build: {} runs", options.runs);
        build::measure(options.runs, rows)?;
    }
    if options.wants("debian") {
        // Half a minute of mmdebstrap each.
        let runs = options.runs.min(MOST_ROOTS);
        eprintln!("debian: {runs} runs");
        rows.extend(debian::rows(runs)?);
    }
    match options.only.as_deref() {
        Some("build" | "compose" | "debian" | "plan") => Ok(()),
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
        failed = replacements(&bed, options.runs, rows)?;
    }
    if options.wants("rollback") {
        eprintln!("rollback: {} runs", options.runs);
        rows.push(rollback::first_byte(&bed, options.runs)?);
    }
    if options.wants("scale") {
        eprintln!("scale: {} runs", options.runs);
        rows.extend(scale::instances(&bed, options.runs)?);
    }
    if failed > 0 {
        return Err(format!("{failed} requests failed while instances were replaced").into());
    }
    Ok(())
}

/// kiln's, and those of others who can be run; how many of kiln's requests failed.
fn replacements(bed: &Bed, runs: usize, rows: &mut Vec<Row>) -> Result<u64, Failure> {
    let keep_alive = Mode::KeepAlive {
        connections: CONNECTIONS,
    };
    let loads = [
        ("new connections", Mode::NewConnection),
        ("keep-alive", keep_alive),
    ];
    let mut others = behind::peers();
    let mut failed = 0;
    for (name, mode) in loads {
        eprintln!("replace, {name}: {runs} runs");
        let mut kiln = Subject {
            who: "kiln",
            address: bed.address,
            aim: Some(Duration::from_secs(1)),
            replace: &mut |revision| replace::by_kiln(bed, revision),
        };
        let (row, failures) = replace::under_load(&mut kiln, name, mode, runs)?;
        rows.push(row);
        failed += failures;
        for (who, other) in &mut others {
            rows.push(by_other(who, other, (name, mode), runs)?);
        }
    }
    Ok(failed)
}

fn by_other(
    who: &'static str,
    other: &mut behind::Started,
    (name, mode): (&str, Mode),
    runs: usize,
) -> Result<Row, Failure> {
    let other = match other {
        Ok(other) => other,
        Err(why) => {
            let what = format!("replacing instances, {name}");
            return Ok(Row::not_run(&what, who, &why.to_string()));
        }
    };
    let mut subject = Subject {
        who,
        address: other.address(),
        aim: None,
        replace: &mut |revision| other.replace(revision),
    };
    Ok(replace::under_load(&mut subject, name, mode, runs)?.0)
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
