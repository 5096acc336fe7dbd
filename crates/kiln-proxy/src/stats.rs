//! Counters: relaxed atomics, nothing more, so that counting costs next to nothing.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kiln_model::Traffic;
use kiln_model::traffic::Latency;

use crate::status::{DnsStatus, Failures};

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Why a request or a connection could not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    NoBackend,
    ParkTimeout,
    ParkFull,
    Connect,
    ConnectTimeout,
    NoAnswer,
    HalfAnswer,
    DrainCut,
}

#[derive(Debug, Default)]
pub(crate) struct FailureCounts([Counter; 8]);

impl FailureCounts {
    pub(crate) fn count(&self, failure: Failure) {
        if let Some(counter) = self.0.get(failure as usize) {
            counter.add(1);
        }
    }

    pub(crate) fn snapshot(&self) -> Failures {
        let get = |failure: Failure| self.0.get(failure as usize).map_or(0, Counter::get);
        Failures {
            no_backend: get(Failure::NoBackend),
            park_timeout: get(Failure::ParkTimeout),
            park_full: get(Failure::ParkFull),
            connect: get(Failure::Connect),
            connect_timeout: get(Failure::ConnectTimeout),
            no_answer: get(Failure::NoAnswer),
            half_answer: get(Failure::HalfAnswer),
            drain_cut: get(Failure::DrainCut),
        }
    }
}

/// What one instance has done.
#[derive(Debug)]
pub(crate) struct InstanceCounts {
    pub(crate) connections: Counter,
    pub(crate) connect_failures: Counter,
    /// Requests that were sent to it, and it closed the connection instead of an answer.
    pub(crate) unanswered: Counter,
    /// It closed the connection within its answer.
    pub(crate) broken_off: Counter,
    pub(crate) latency_us: Counter,
    pub(crate) cut: Counter,
    answers: [Counter; 5],
    latencies: [Counter; Latency::CELLS],
}

impl Default for InstanceCounts {
    fn default() -> Self {
        Self {
            connections: Counter::default(),
            connect_failures: Counter::default(),
            unanswered: Counter::default(),
            broken_off: Counter::default(),
            latency_us: Counter::default(),
            cut: Counter::default(),
            answers: Default::default(),
            latencies: std::array::from_fn(|_| Counter::default()),
        }
    }
}

impl InstanceCounts {
    /// It has begun to answer, so long after it was asked.
    pub(crate) fn answer(&self, status: http::StatusCode, latency_us: u64) {
        let class = usize::from(status.as_u16() / 100).saturating_sub(1);
        if let Some(counter) = self.answers.get(class) {
            counter.add(1);
        }
        self.latency_us.add(latency_us);
        if let Some(counter) = self.latencies.get(Latency::cell(latency_us)) {
            counter.add(1);
        }
    }

    pub(crate) fn answers(&self) -> [u64; 5] {
        std::array::from_fn(|class| self.answers.get(class).map_or(0, Counter::get))
    }

    /// Read one after the other: what is counted meanwhile may be in one and not in another.
    pub(crate) fn traffic(&self) -> Traffic {
        let answers = self.answers();
        let lost = self.unanswered.get() + self.connect_failures.get();
        let [.., server_errors] = answers;
        Traffic {
            requests: answers.iter().sum::<u64>() + self.connections.get() + lost,
            failed: server_errors + self.broken_off.get() + lost,
            latency: Latency::new(self.latencies.iter().map(Counter::get).collect()),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct DnsCounts {
    pub(crate) answered: Counter,
    pub(crate) forwarded: Counter,
    pub(crate) failed: Counter,
}

impl DnsCounts {
    pub(crate) fn snapshot(&self) -> DnsStatus {
        DnsStatus {
            answered: self.answered.get(),
            forwarded: self.forwarded.get(),
            failed: self.failed.get(),
        }
    }
}
