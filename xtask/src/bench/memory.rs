//! What the daemon and the proxy hold when nothing happens.

use std::time::Duration;

use super::Failure;
use super::bed::Bed;
use super::table::{Row, median};

/// After the last request, before the first sample.
const SETTLE: Duration = Duration::from_secs(5);
const BETWEEN: Duration = Duration::from_millis(250);
const BAR_KIB: u64 = 40 * 1024;

/// Proportional set size (PSS) of both processes together.
pub fn idle(bed: &Bed, runs: usize) -> Result<Row, Failure> {
    std::thread::sleep(SETTLE);
    let processes = bed.processes()?;
    let mut sums = Vec::new();
    for _ in 0..runs {
        let each = processes.iter().map(|pid| proportional(*pid));
        sums.push(each.sum::<Result<u64, Failure>>()?);
        std::thread::sleep(BETWEEN);
    }
    Ok(Row {
        what: "daemon and proxy, idle (PSS)".into(),
        who: "kiln".into(),
        value: format!("{:.1} MiB", median(&mut sums) as f64 / 1024.0),
        worst: format!(
            "{:.1} MiB",
            sums.last().copied().unwrap_or(0) as f64 / 1024.0
        ),
        bar: format!("{} MiB", BAR_KIB / 1024),
        note: format!("{runs} samples"),
    })
}

/// KiB, from the `Pss:` line of `/proc/<pid>/smaps_rollup`.
pub fn proportional(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| format!("{path}: no Pss").into())
}
