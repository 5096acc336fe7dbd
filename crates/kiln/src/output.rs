//! Printing results: data on standard output, as a table for people or as JSON.

use std::fmt::Arguments;
use std::io::Write;

use serde::Serialize;

use crate::failure::{Failure, machine};

/// `print!`, for a reader that may have gone away (`kiln logs | head`).
macro_rules! out {
    ($($text:tt)*) => { $crate::output::write(format_args!($($text)*)) };
}

/// `println!`, likewise.
macro_rules! outln {
    ($($text:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// `eprintln!`, likewise: what can't be told is no reason to stop.
macro_rules! errln {
    ($($text:tt)*) => { $crate::output::tell(format_args!("{}\n", format_args!($($text)*))) };
}

/// As a shell reports a program that wrote to a pipe which nobody reads.
const NOBODY_READS: i32 = 141;
/// [`crate::failure::Kind::Machine`].
const NOT_WRITTEN: i32 = 6;

/// On standard output. Who can't write its result has nothing left to do.
pub fn write(text: Arguments) {
    let Err(error) = std::io::stdout().lock().write_fmt(text) else {
        return;
    };
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(NOBODY_READS);
    }
    errln!("error: standard output: {error}");
    std::process::exit(NOT_WRITTEN);
}

/// On standard error.
pub fn tell(text: Arguments) {
    let _ = std::io::stderr().lock().write_fmt(text);
}

/// One value, pretty, on standard output.
pub fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(machine)?;
    outln!("{text}");
    Ok(())
}

/// Columns as wide as their widest cell; the last is as long as it likes.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let last = cells.len().saturating_sub(1);
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(n, (cell, width))| match n == last {
                true => cell.clone(),
                false => format!("{cell:<width$}"),
            })
            .collect();
        outln!("{}", padded.join("  ").trim_end());
    };
    line(&head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    for row in rows {
        line(row);
    }
}

/// How long ago, for people.
pub fn ago(since: u64) -> String {
    let span = crate::context::now().saturating_sub(kiln_model::Millis(since));
    format!("{span} ago")
}

/// `2026-11-23 01:02:03`, UTC.
pub fn time(millis: u64) -> String {
    i64::try_from(millis)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|t| t.strftime("%Y-%m-%d %H:%M:%S").to_string())
        .unwrap_or_else(|| millis.to_string())
}
