//! Chores of the repository: `cargo xtask test`, `bench`, `reproduce`, `simulate`, `goldens`,
//! `advisories`.
//!
//! `test` is built without any dependency, so that it starts at once; `bench`, `reproduce` and
//! `simulate` start this program again with a feature of their own.

mod cargo;
mod debian;
mod tally;
mod test;

#[cfg(feature = "bench")]
mod bench;
#[cfg(feature = "reproduce")]
mod reproduce;
#[cfg(feature = "simulate")]
mod simulate;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask test     install what the tests need (Debian, as root), then check and test everything
       cargo xtask bench    measure the release build, as a table; --runs N (default 20), NAME of one measure
       cargo xtask soak     50 replacements under every kind of load, 500 requests a second (as root)
       cargo xtask reproduce    build images on 30 Debian packages twice in other conditions, and compare (as root); PACKAGE… for others
       cargo xtask simulate run kiln's loop against a made-up machine and its faults; --seeds N (default 1000), --seed FIRST (default 1)
       cargo xtask goldens  ask docker (one that reaches an engine; as root) what it makes of the build cases, and keep that
       cargo xtask advisories   look for known holes in the dependencies (needs cargo-deny and its database)";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("test") if words.len() == 1 => test::run(),
        Some("advisories") if words.len() == 1 => test::advisories(),
        Some("bench") => bench(&words[1..]),
        Some("soak") if words.len() == 1 => soak(),
        Some("reproduce") => reproduce(&words[1..]),
        Some("goldens") if words.len() == 1 => goldens(),
        Some("simulate") => simulate(&words[1..]),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

#[cfg(feature = "bench")]
fn bench(words: &[String]) -> ExitCode {
    bench::run(words)
}

#[cfg(not(feature = "bench"))]
fn bench(words: &[String]) -> ExitCode {
    optimised("bench", words)
}

#[cfg(feature = "reproduce")]
fn reproduce(words: &[String]) -> ExitCode {
    reproduce::run(words)
}

#[cfg(not(feature = "reproduce"))]
fn reproduce(words: &[String]) -> ExitCode {
    optimised("reproduce", words)
}

/// Builds kiln and this program with one of its features, optimised, and starts the latter.
#[cfg(not(all(feature = "bench", feature = "reproduce")))]
fn optimised(feature: &str, words: &[String]) -> ExitCode {
    let build: &[&str] = &["build", "--release", "--package", "kiln"];
    let built = again(build, &[]);
    if built != ExitCode::SUCCESS {
        return built;
    }
    let run = format!("run --quiet --release --package xtask --features {feature} -- {feature}");
    again(&run.split(' ').collect::<Vec<_>>(), words)
}

/// The end-to-end tests' own soak at full length, with an optimised kiln.
fn soak() -> ExitCode {
    let build = "build --release --package kiln --example app";
    let built = again(&build.split(' ').collect::<Vec<_>>(), &[]);
    if built != ExitCode::SUCCESS {
        return built;
    }
    let run = "test --release --package kiln --test e2e --config env.KILN_SOAK='full' \
               soak:: -- --nocapture";
    again(&run.split_whitespace().collect::<Vec<_>>(), &[])
}

/// The conformance test, recording instead of comparing. The shim is what builds the image
/// that the cases begin with.
fn goldens() -> ExitCode {
    let built = again(&["build", "--package", "kiln-runtime"], &[]);
    if built != ExitCode::SUCCESS {
        return built;
    }
    let run = "test --package kiln-build --test conformance --config env.KILN_GOLDENS='record' \
               -- --nocapture";
    again(&run.split_whitespace().collect::<Vec<_>>(), &[])
}

#[cfg(feature = "simulate")]
fn simulate(words: &[String]) -> ExitCode {
    simulate::run(words)
}

/// The simulator's crates are optimised in the ordinary profile, too.
#[cfg(not(feature = "simulate"))]
fn simulate(words: &[String]) -> ExitCode {
    let run = "run --quiet --package xtask --features simulate -- simulate";
    again(&run.split(' ').collect::<Vec<_>>(), words)
}

fn again(step: &[&str], words: &[String]) -> ExitCode {
    match cargo::cargo(step).args(words).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
