//! What a load run has seen.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::{Answered, Latency};

/// Why a request counts as failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// No connection.
    Connect,
    /// The connection ended before the answer.
    NoAnswer,
    /// The connection ended within the answer.
    HalfAnswer,
    /// Answered, but with a status of 400 or more (see [`Report::statuses`]).
    Status,
    /// Not what an echo should be.
    Wrong,
    /// Not in time.
    Timeout,
    /// The connections were all busy for so long that the queue was full.
    Overrun,
    /// A bug of the generator itself.
    Generator,
}

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub succeeded: u64,
    pub failures: BTreeMap<Failure, u64>,
    /// Every status that came, also of failed requests.
    pub statuses: BTreeMap<u16, u64>,
    /// Successful answers by who gave them: the server's header `x-instance`.
    pub by: BTreeMap<String, u64>,
    /// Of successful requests.
    pub latency: Latency,
    /// Connections made.
    pub connections: u64,
    /// Websockets that ended before the run, by the status of their close frame; `None`:
    /// they ended without one.
    pub closed_websockets: BTreeMap<Option<u16>, u64>,
    pub elapsed: Duration,
}

impl Report {
    pub fn requests(&self) -> u64 {
        self.succeeded + self.failed()
    }

    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    pub(crate) fn record(&mut self, outcome: Result<Answered, Failure>, latency: Duration) {
        match outcome {
            Ok(answered) => {
                if answered.status != 0 {
                    *self.statuses.entry(answered.status).or_default() += 1;
                }
                if answered.status >= 400 {
                    *self.failures.entry(Failure::Status).or_default() += 1;
                    return;
                }
                self.succeeded += 1;
                self.latency.record(latency);
                if let Some(by) = answered.by {
                    *self.by.entry(by).or_default() += 1;
                }
            }
            Err(failure) => *self.failures.entry(failure).or_default() += 1,
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        fn add<K: Ord>(to: &mut BTreeMap<K, u64>, from: BTreeMap<K, u64>) {
            for (key, count) in from {
                *to.entry(key).or_default() += count;
            }
        }
        self.succeeded += other.succeeded;
        self.connections += other.connections;
        self.latency.merge(&other.latency);
        add(&mut self.failures, other.failures);
        add(&mut self.statuses, other.statuses);
        add(&mut self.by, other.by);
        add(&mut self.closed_websockets, other.closed_websockets);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |percent| self.latency.percentile(percent).as_secs_f64() * 1000.0;
        write!(
            f,
            "{} requests in {:.1} s, {} failed {:?}; p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms; \
             statuses {:?}; by {:?}",
            self.requests(),
            self.elapsed.as_secs_f64(),
            self.failed(),
            self.failures,
            ms(50.0),
            ms(99.0),
            self.latency.max().as_secs_f64() * 1000.0,
            self.statuses,
            self.by,
        )?;
        if !self.closed_websockets.is_empty() {
            write!(f, "; websockets closed {:?}", self.closed_websockets)?;
        }
        Ok(())
    }
}
