//! `cargo xtask test`: everything that must hold before a change is taken.
//!
//! Each check (formatting, clippy, the build, cargo deny) counts as one, beside the tests,
//! in the one line printed at the end. Nothing that did not run counts as passed.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::cargo::{answers, cargo, program, repository, stream};
use crate::debian;
use crate::tally::{Libtest, Nextest, Runner, Tally};

/// For all tests together. A single test has its own limit in `.config/nextest.toml`.
const TEST_LIMIT: Duration = Duration::from_secs(45 * 60);
/// For fetching the advisory database.
const ADVISORIES_LIMIT: Duration = Duration::from_secs(120);
const DENY_VERSION: &str = "0.20.2";

/// Features that cargo would unify otherwise in each call: one set for all of them, so
/// that nothing is compiled twice.
const ALL: [&str; 3] = ["--workspace", "--all-targets", "--all-features"];

pub fn run() -> ExitCode {
    let begun = Instant::now();
    let mut tally = Tally::default();
    if let Err(why) = debian::install() {
        eprintln!("warning: {why}");
    }
    heading("fmt");
    tool(&mut tally, "rustfmt", &["fmt", "--version"], || {
        cargo(&["fmt", "--all", "--check"])
    });
    heading("clippy");
    tool(&mut tally, "clippy", &["clippy", "--version"], || {
        let mut command = build(&["clippy", "--quiet"]);
        command.args(["--", "--deny", "warnings"]);
        command
    });
    heading("build");
    if check(&mut tally, "build", &mut build(&["build", "--quiet"])) {
        heading("test");
        tests(&mut tally);
    } else {
        eprintln!("nothing can be tested before it builds");
    }
    heading("deny");
    deny(&mut tally);
    report(&tally, begun.elapsed())
}

fn heading(what: &str) {
    println!("== {what}");
}

/// A cargo command over the whole workspace.
fn build(words: &[&str]) -> Command {
    let mut command = cargo(words);
    command.args(ALL);
    if in_ci() {
        command.arg("--locked");
    }
    command
}

fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

fn strict() -> bool {
    in_ci() || std::env::var_os("KILN_TEST_STRICT").is_some_and(|value| value == "1")
}

/// A component of the toolchain; only a strict run insists on having it.
fn tool(tally: &mut Tally, name: &str, version: &[&str], command: impl Fn() -> Command) {
    if answers(&mut cargo(version)) {
        check(tally, name, &mut command());
    } else if strict() {
        eprintln!("{name} is not installed");
        tally.fail(name);
    } else {
        skip(tally, &format!("{name} is not installed"));
    }
}

fn skip(tally: &mut Tally, what: &str) {
    println!("skipped: {what}");
    tally.skip(what);
}

/// Runs one check, its output shown as it comes.
fn check(tally: &mut Tally, name: &str, command: &mut Command) -> bool {
    let well = match command.status() {
        Ok(status) => status.success(),
        Err(error) => {
            eprintln!("{name}: {error}");
            false
        }
    };
    if well {
        tally.pass()
    } else {
        tally.fail(name)
    }
    well
}

fn tests(tally: &mut Tally) {
    if answers(&mut cargo(&["nextest", "--version"])) {
        let mut words = vec![
            "nextest",
            "run",
            "--workspace",
            "--all-features",
            "--cargo-quiet",
        ];
        words.extend(["--no-fail-fast", "--color=never", "--hide-progress-bar"]);
        words.extend(["--success-output=immediate", "--failure-output=immediate"]);
        words.extend(["--status-level=all", "--final-status-level=none"]);
        run_tests(tally, Box::<Nextest>::default(), &words);
        // Nextest leaves the examples in documentation to cargo.
        let words = [
            "test",
            "--workspace",
            "--all-features",
            "--quiet",
            "--no-fail-fast",
            "--doc",
        ];
        run_tests(tally, Box::<Libtest>::default(), &words);
    } else {
        let words = [
            "test",
            "--workspace",
            "--all-features",
            "--no-fail-fast",
            "--",
            "--show-output",
        ];
        run_tests(tally, Box::<Libtest>::default(), &words);
    }
}

fn run_tests(tally: &mut Tally, mut runner: Box<dyn Runner>, words: &[&str]) {
    let mut command = limited(TEST_LIMIT, &cargo(words));
    let shared = repository().with_file_name("shared");
    if std::env::var_os("KILN_SHARED").is_none() && shared.is_dir() {
        command.env("KILN_SHARED", shared);
    }
    if strict() {
        command.env("KILN_TEST_STRICT", "1");
    }
    let ended = stream(&mut command, &mut |line| {
        if runner.line(line) {
            println!("{line}");
        }
    });
    if let Err(error) = &ended {
        eprintln!("cargo {}: {error}", words.join(" "));
    }
    tally.add(runner.finish(ended.unwrap_or(false)));
}

/// The same command under coreutils' `timeout`.
fn limited(limit: Duration, command: &Command) -> Command {
    let mut outer = program("timeout");
    outer
        .args(["--kill-after=30", &limit.as_secs().to_string()])
        .arg(command.get_program())
        .args(command.get_args());
    outer
}

/// Licences, sources and duplicates, which need only the lock file. A strict run installs
/// the program it lacks. Advisories need a database from elsewhere: `cargo xtask advisories`.
fn deny(tally: &mut Tally) {
    if !answers(&mut cargo_deny(&["--version"])) {
        if !strict() {
            return skip(tally, "cargo-deny is not installed");
        }
        let root = tools();
        let mut install = cargo(&["install", "cargo-deny", "--locked", "--debug", "--quiet"]);
        install.arg("--root").arg(&root);
        install.args(["--version", DENY_VERSION]);
        if !check(tally, "cargo install cargo-deny", &mut install) {
            return;
        }
    }
    let mut rules = cargo_deny(&["--all-features", "check", "--hide-inclusion-graph"]);
    rules.args(["bans", "licenses", "sources"]);
    check(tally, "cargo deny", &mut rules);
}

/// Are there known holes in what kiln is made of? Needs the advisory database's host.
pub fn advisories() -> ExitCode {
    match limited(ADVISORIES_LIMIT, &cargo_deny(&["check", "advisories"])).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo deny: {error}; cargo install cargo-deny --locked");
            ExitCode::FAILURE
        }
    }
}

/// Programs of this repository's chores alone, beside what else is built.
fn tools() -> PathBuf {
    repository().join("target/tools")
}

/// cargo-deny: the machine's, or that of an earlier strict run.
fn cargo_deny(words: &[&str]) -> Command {
    let own = tools().join("bin/cargo-deny");
    let mut command = if own.exists() {
        program(own)
    } else {
        cargo(&["deny"])
    };
    command.args(words);
    command
}

fn report(tally: &Tally, took: Duration) -> ExitCode {
    println!("== result, after {} s", took.as_secs());
    for why in &tally.reasons {
        println!("skipped: {why}");
    }
    for what in &tally.failures {
        println!("failed: {what}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
