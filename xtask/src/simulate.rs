//! `cargo xtask simulate`: many seeds, how fast they went, and for one that fails what
//! happened and how to see it again.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use kiln_testkit::sim::{Summary, simulate};

/// How often a line says how far it is.
const EVERY: Duration = Duration::from_secs(10);

struct Asked {
    seeds: u64,
    first: u64,
}

pub fn run(words: &[String]) -> ExitCode {
    let Some(asked) = parse(words) else {
        eprintln!("usage: cargo xtask simulate [--seeds N] [--seed FIRST]");
        return ExitCode::from(2);
    };
    let began = Instant::now();
    let mut told = began;
    let mut sum = Summary::default();
    for (done, seed) in (asked.first..asked.first + asked.seeds).enumerate() {
        match simulate(seed, None) {
            Ok(summary) => sum.add(&summary),
            Err(failure) => {
                for line in &failure.trace {
                    println!("{line}");
                }
                println!("\nseed {seed}, step {}: {}", failure.steps, failure.broken);
                println!("again: cargo xtask simulate --seeds 1 --seed {seed}");
                return ExitCode::FAILURE;
            }
        }
        if told.elapsed() >= EVERY {
            told = Instant::now();
            eprintln!("{}", line(done as u64 + 1, &sum, began.elapsed()));
        }
    }
    println!("{}", line(asked.seeds, &sum, began.elapsed()));
    ExitCode::SUCCESS
}

fn parse(words: &[String]) -> Option<Asked> {
    let mut asked = Asked {
        seeds: 1000,
        first: 1,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let number = words.next()?.parse().ok()?;
        match word.as_str() {
            "--seeds" => asked.seeds = number,
            "--seed" => asked.first = number,
            _ => return None,
        }
    }
    Some(asked)
}

fn line(seeds: u64, sum: &Summary, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(0.001);
    format!(
        "{seeds} seeds clean, {:.1} seeds/s, {} steps ({:.0}/s): {} rollouts ({} proven, {} \
         failed), {} faults, {} requests ({} answered)",
        seeds as f64 / seconds,
        sum.steps,
        sum.steps as f64 / seconds,
        sum.rollouts,
        sum.proven,
        sum.failed,
        sum.faults,
        sum.requests,
        sum.answered,
    )
}
