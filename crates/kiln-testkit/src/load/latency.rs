//! Percentiles from buckets which are at most 1/16 wide of what they hold.

use std::collections::BTreeMap;
use std::time::Duration;

/// How latencies are spread. Exact to about 6 %.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Lower bound in microseconds → how many.
    buckets: BTreeMap<u64, u64>,
    count: u64,
    max: Duration,
}

impl Latency {
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let shift = (u64::BITS - micros.leading_zeros()).saturating_sub(5);
        *self.buckets.entry(micros >> shift << shift).or_default() += 1;
        self.count += 1;
        self.max = self.max.max(latency);
    }

    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.buckets {
            *self.buckets.entry(*bucket).or_default() += count;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
    }

    /// `percent` of all are at most about this. Zero if there are none.
    pub fn percentile(&self, percent: f64) -> Duration {
        let rank = (self.count as f64 * percent / 100.0).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(*bucket);
            }
        }
        self.max
    }

    pub fn max(&self) -> Duration {
        self.max
    }

    pub fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_close() {
        let mut latency = Latency::default();
        for ms in 1..=1000 {
            latency.record(Duration::from_millis(ms));
        }
        for percent in [1.0, 50.0, 90.0, 99.0] {
            let exact = percent * 10_000.0;
            let found = latency.percentile(percent).as_micros() as f64;
            assert!((found - exact).abs() <= exact / 15.0, "{percent}: {found}");
        }
        assert_eq!(latency.max(), Duration::from_secs(1));
        assert_eq!(Latency::default().percentile(99.0), Duration::ZERO);
    }
}
