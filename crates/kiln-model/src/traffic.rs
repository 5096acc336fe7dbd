//! What the proxy has counted of an instance's traffic: plain numbers that can be
//! subtracted and added up.

use serde::{Deserialize, Serialize};

/// Counts since the proxy has known the instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Requests (HTTP) and raw connections it was chosen for, however they ended.
    pub requests: u64,
    /// Of these: answered with 5xx, not answered to the end, or not even connected.
    pub failed: u64,
    /// Of the answered requests: the time to the first byte of the answer.
    pub latency: Latency,
}

impl Traffic {
    /// What came after `mark`; all of it, if the proxy has begun anew since.
    pub fn since(&self, mark: &Traffic) -> Traffic {
        if self.requests < mark.requests {
            return self.clone();
        }
        let before = |at: usize| mark.latency.0.get(at).copied().unwrap_or(0);
        let cells = self.latency.0.iter().enumerate();
        Traffic {
            requests: self.requests - mark.requests,
            failed: self.failed.saturating_sub(mark.failed),
            latency: Latency::new(cells.map(|(at, n)| n.saturating_sub(before(at))).collect()),
        }
    }

    pub fn add(&mut self, other: &Traffic) {
        self.requests += other.requests;
        self.failed += other.failed;
        let cells = &mut self.latency.0;
        cells.resize(cells.len().max(other.latency.0.len()), 0);
        for (cell, n) in cells.iter_mut().zip(&other.latency.0) {
            *cell += n;
        }
    }
}

/// How many took how long: eight cells for each doubling of the time, in microseconds, so
/// that what is read from it is wrong by 7 % at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Latency(Vec<u64>);

/// Cells of a doubling.
const FINE: usize = 8;

impl Latency {
    /// As many cells as there can be; the last one also has all that took longer (67 s).
    pub const CELLS: usize = 24 * FINE + FINE;

    /// Cells in their order; empty ones at the end may be left out.
    pub fn new(mut cells: Vec<u64>) -> Self {
        let used = cells
            .iter()
            .rposition(|n| *n > 0)
            .map_or(0, |last| last + 1);
        cells.truncate(used);
        Self(cells)
    }

    /// The cell of a time.
    pub fn cell(micros: u64) -> usize {
        let fine = FINE as u64;
        if micros < fine {
            return micros as usize;
        }
        let doubling = micros.ilog2() - fine.ilog2();
        let within = (micros >> doubling) % fine;
        (FINE * (doubling as usize + 1) + within as usize).min(Self::CELLS - 1)
    }

    /// The middle of a cell.
    fn micros(cell: usize) -> u64 {
        let Some(doubling) = (cell / FINE).checked_sub(1) else {
            return cell as u64;
        };
        let width = 1u64 << doubling;
        (FINE + cell % FINE) as u64 * width + width / 2
    }

    /// The time, in microseconds, that so many thousandths did not exceed.
    pub fn quantile(&self, thousandths: u64) -> Option<u64> {
        let total: u64 = self.0.iter().sum();
        let rank = (total * thousandths).div_ceil(1000).max(1);
        let mut seen = 0;
        let cell = self.0.iter().position(|n| {
            seen += n;
            seen >= rank
        });
        cell.map(Self::micros)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(times: &[u64]) -> Latency {
        let mut cells = vec![0; Latency::CELLS];
        for micros in times {
            cells[Latency::cell(*micros)] += 1;
        }
        Latency::new(cells)
    }

    #[test]
    fn a_time_is_found_again_with_little_error() {
        let times = (0..26).flat_map(|n| [1u64 << n, (1 << n) + (1 << n) / 3, (2 << n) - 1]);
        let mut before = 0;
        for micros in times {
            let cell = Latency::cell(micros);
            assert!(cell >= before && cell < Latency::CELLS);
            before = cell;
            let read = of(&[micros]).quantile(990).unwrap();
            assert!(read.abs_diff(micros) * 100 <= micros * 7, "{micros} {read}");
        }
        assert_eq!(Latency::cell(u64::MAX), Latency::CELLS - 1);
    }

    #[test]
    fn a_quantile_is_what_so_many_did_not_exceed() {
        let mut times = vec![1000; 98];
        times.extend([50_000, 900_000]);
        let latency = of(&times);
        let near = |thousandths, micros: u64| {
            let read = latency.quantile(thousandths).unwrap();
            assert!(read.abs_diff(micros) * 100 <= micros * 7, "{read}");
        };
        near(500, 1000);
        near(980, 1000);
        near(990, 50_000);
        near(1000, 900_000);
        assert_eq!(Latency::default().quantile(990), None);
    }

    #[test]
    fn what_came_since_a_mark_is_counted_also_by_a_new_proxy() {
        let traffic = |requests, failed, times: &[u64]| Traffic {
            requests,
            failed,
            latency: of(times),
        };
        let mark = traffic(10, 1, &[100, 100_000]);
        let mut later = mark.clone();
        later.add(&traffic(5, 2, &[100, 3]));
        assert_eq!(later.since(&mark), traffic(5, 2, &[100, 3]));
        assert_eq!(mark.since(&mark), Traffic::default());
        let anew = traffic(3, 0, &[7]);
        assert_eq!(anew.since(&mark), anew);
    }
}
