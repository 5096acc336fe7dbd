//! Printing results: data on standard output, as a table for people or as JSON.

use serde::Serialize;

use crate::failure::{Failure, machine};

/// One value, pretty, on standard output.
pub fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(machine)?;
    println!("{text}");
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
        println!("{}", padded.join("  ").trim_end());
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
