//! What goes first. Pure.

use std::time::{Duration, SystemTime};

/// Something of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// On disk, and only because of it.
    pub bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    /// What it took to make.
    pub cost: Duration,
}

const DAY: f64 = 86_400.0;
const MIB: f64 = (1 << 20) as f64;

/// Seconds saved for each MiB kept, halved after a day without use, a third after two …
fn worth(entry: &Entry, now: SystemTime) -> f64 {
    let age = now.duration_since(entry.used).unwrap_or_default();
    let size = entry.bytes as f64 / MIB;
    entry.cost.as_secs_f64() / size.max(f64::MIN_POSITIVE) / (1.0 + age.as_secs_f64() / DAY)
}

/// The entries that must go for the rest to fit into `cap`, the least valuable first; of
/// equals, what was used longest ago.
pub fn choose(entries: &[Entry], cap: u64, now: SystemTime) -> Vec<usize> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (&entries[*a], &entries[*b]);
        worth(a, now)
            .total_cmp(&worth(b, now))
            .then(a.used.cmp(&b.used))
    });
    let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
    let mut going = Vec::new();
    for index in order {
        if bytes <= cap {
            break;
        }
        // What takes nothing (another keeps its content) frees nothing, unless all must go.
        if entries[index].bytes == 0 && cap > 0 {
            continue;
        }
        bytes -= entries[index].bytes;
        going.push(index);
    }
    going
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    fn entry(mib: u64, days: u64, seconds: u64) -> Entry {
        Entry {
            bytes: mib * MB,
            used: SystemTime::UNIX_EPOCH + Duration::from_secs((100 - days) * 86_400),
            cost: Duration::from_secs(seconds),
        }
    }

    fn going(entries: &[Entry], cap: u64) -> Vec<usize> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100 * 86_400);
        choose(entries, cap * MB, now)
    }

    #[test]
    fn what_saves_the_least_for_its_size_goes_first() {
        // The first took long, the second is small, the third is neither.
        let entries = [entry(100, 1, 100), entry(10, 1, 10), entry(100, 1, 10)];
        assert_eq!(going(&entries, 210), [0; 0], "it fits");
        assert_eq!(going(&entries, 209), [2]);
        assert_eq!(going(&entries, 105), [2, 0], "of equals, in their order");
        assert_eq!(going(&entries, 0), [2, 0, 1]);
    }

    #[test]
    fn what_was_not_used_for_long_is_worth_less() {
        let entries = [entry(10, 0, 10), entry(10, 9, 50), entry(10, 9, 500)];
        assert_eq!(
            going(&entries, 20),
            [1],
            "50 s are worth 5 s after nine days"
        );
        assert_eq!(going(&entries, 10), [1, 0]);
        let same = [entry(10, 3, 0), entry(10, 5, 0), entry(10, 4, 0)];
        assert_eq!(going(&same, 10), [1, 2]);
    }

    #[test]
    fn what_frees_nothing_stays_as_long_as_anything_does() {
        let entries = [entry(0, 50, 0), entry(10, 0, 10)];
        assert_eq!(going(&entries, 5), [1]);
        assert_eq!(going(&entries, 0), [0, 1]);
    }
}
