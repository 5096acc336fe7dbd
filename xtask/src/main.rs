//! Chores of the repository: `cargo xtask test`, `cargo xtask bench`, `cargo xtask advisories`.
//!
//! `test` is built without any dependency, so that it starts at once; `bench` starts this
//! program again with its own feature, optimised.

mod cargo;
mod debian;
mod tally;
mod test;

#[cfg(feature = "bench")]
mod bench;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask test     install what the tests need (Debian, as root), then check and test everything
       cargo xtask bench    measure the release build, as a table; --runs N (default 20), --only NAME
       cargo xtask advisories   look for known holes in the dependencies (needs cargo-deny and its database)";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("test") if words.len() == 1 => test::run(),
        Some("advisories") if words.len() == 1 => test::advisories(),
        Some("bench") => bench(&words[1..]),
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

/// Builds kiln and this program, optimised, and starts the latter.
#[cfg(not(feature = "bench"))]
fn bench(words: &[String]) -> ExitCode {
    let steps: [&[&str]; 2] = [
        &["build", "--release", "--package", "kiln"],
        &[
            "run",
            "--quiet",
            "--release",
            "--package",
            "xtask",
            "--features",
            "bench",
            "--",
            "bench",
        ],
    ];
    for (at, step) in steps.iter().enumerate() {
        let mut command = cargo::cargo(step);
        if at == 1 {
            command.args(words);
        }
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(_) => return ExitCode::FAILURE,
            Err(error) => {
                eprintln!("cargo: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
