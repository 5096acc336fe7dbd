//! One instance as the proxy knows it: what it holds in flight, and how that ends.
//!
//! A [`Lease`] stands for one request, upgraded or raw connection. An instance is
//! *serving* while a table names it, then *retired* (nothing new; idle connections to
//! it are closed), and at its drain limit *cut*, part by part.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln_model::InstanceId;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::limits::{AVOID_FAILED, CUT_GRACE, CUT_SPREAD, CUT_STEPS};
use crate::pool::Pool;
use crate::stats::InstanceCounts;
use crate::status::InstanceStatus;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Retired,
    /// Leases of parts below this one end now.
    Cut(u8),
}

pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) address: IpAddr,
    pub(crate) counts: InstanceCounts,
    pub(crate) pool: Pool,
    in_flight: AtomicUsize,
    leases: AtomicU32,
    phase: watch::Sender<Phase>,
    idle: Notify,
    /// Milliseconds after `born`, plus one; 0: never.
    failed_at: AtomicU64,
    born: Instant,
}

impl Instance {
    pub(crate) fn new(id: InstanceId, address: IpAddr) -> Arc<Self> {
        Arc::new(Self {
            id,
            address,
            counts: InstanceCounts::default(),
            pool: Pool::default(),
            in_flight: AtomicUsize::new(0),
            leases: AtomicU32::new(0),
            phase: watch::Sender::new(Phase::Serving),
            idle: Notify::new(),
            failed_at: AtomicU64::new(0),
            born: Instant::now(),
        })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    pub(crate) fn is_serving(&self) -> bool {
        *self.phase.borrow() == Phase::Serving
    }

    /// Takes part in balancing (again: a rollback may bring a warm instance back).
    pub(crate) fn serve(&self) {
        self.phase
            .send_if_modified(|phase| std::mem::replace(phase, Phase::Serving) != Phase::Serving);
        self.pool.open();
    }

    /// Nothing new goes to it from here on.
    pub(crate) fn retire(&self) {
        self.phase.send_if_modified(|phase| {
            let serving = *phase == Phase::Serving;
            if serving {
                *phase = Phase::Retired;
            }
            serving
        });
        self.pool.close();
    }

    /// Refused a connection a moment ago.
    pub(crate) fn failed_lately(&self) -> bool {
        let failed_at = self.failed_at.load(Ordering::Relaxed);
        let avoid = u64::try_from(AVOID_FAILED.as_millis()).unwrap_or(u64::MAX);
        failed_at != 0 && self.age_ms().saturating_sub(failed_at - 1) < avoid
    }

    pub(crate) fn connect_failed(&self) {
        self.counts.connect_failures.add(1);
        self.failed_at.store(self.age_ms() + 1, Ordering::Relaxed);
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }

    /// Must be called while the table which names the instance can't change, so that
    /// nobody who saw it retired can miss the lease.
    pub(crate) fn lease(self: &Arc<Self>) -> Lease {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        let number = self.leases.fetch_add(1, Ordering::Relaxed);
        Lease {
            instance: Arc::clone(self),
            part: u8::try_from(number % u32::from(CUT_STEPS)).unwrap_or(0),
            counted: AtomicBool::new(false),
        }
    }

    /// Waits until nothing is in flight; after `limit` cuts what is left, spread out.
    /// Returns how many were cut. Ends early if the instance serves again.
    pub(crate) async fn drain(&self, limit: Duration) -> u64 {
        let before = self.counts.cut.get();
        if timeout(limit, self.ended()).await.is_err() {
            let step = CUT_SPREAD / u32::from(CUT_STEPS);
            for part in 1..=CUT_STEPS {
                self.cut_below(part);
                if timeout(step, self.ended()).await.is_ok() {
                    break;
                }
            }
            let _ = timeout(CUT_GRACE, self.ended()).await;
        }
        self.counts.cut.get().saturating_sub(before)
    }

    fn cut_below(&self, part: u8) {
        self.phase.send_if_modified(|phase| {
            let draining = *phase != Phase::Serving;
            if draining {
                *phase = Phase::Cut(part);
            }
            draining
        });
    }

    /// Nothing in flight, or serving again.
    async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if self.in_flight() == 0 || *phase.borrow_and_update() == Phase::Serving {
                return;
            }
            tokio::select! {
                () = idle => {}
                _ = phase.changed() => {}
            }
        }
    }

    pub(crate) fn status(&self) -> InstanceStatus {
        let answers = self.counts.answers();
        InstanceStatus {
            instance: self.id.clone(),
            address: self.address,
            in_flight: self.in_flight() as u64,
            requests: answers.iter().sum(),
            connections: self.counts.connections.get(),
            answers,
            latency_us: self.counts.latency_us.get(),
            connect_failures: self.counts.connect_failures.get(),
            cut: self.counts.cut.get(),
        }
    }
}

/// One thing in flight at an instance. Dropping it ends it.
pub(crate) struct Lease {
    pub(crate) instance: Arc<Instance>,
    part: u8,
    counted: AtomicBool,
}

impl Lease {
    /// Resolves when this has to end: the drain limit is reached and it is its turn.
    /// Does not borrow the lease.
    pub(crate) fn cut(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.instance.phase.subscribe();
        let part = self.part;
        async move {
            let mine = |phase: &Phase| matches!(phase, Phase::Cut(below) if *below > part);
            if phase.wait_for(mine).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Resolves when the instance takes nothing new any more.
    pub(crate) fn retired(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.instance.phase.subscribe();
        async move {
            if phase.wait_for(|p| *p != Phase::Serving).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Counts it as cut, once.
    pub(crate) fn was_cut(&self) {
        if !self.counted.swap(true, Ordering::Relaxed) {
            self.instance.counts.cut.add(1);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.instance.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.instance.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn instance() -> Arc<Instance> {
        Instance::new("web-1".parse().unwrap(), IpAddr::from([127, 0, 0, 2]))
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_what_is_in_flight_and_no_longer() {
        let instance = instance();
        let lease = instance.lease();
        instance.retire();
        let drain = tokio::spawn({
            let instance = Arc::clone(&instance);
            async move { instance.drain(Duration::from_secs(60)).await }
        });
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert!(!drain.is_finished());
        drop(lease);
        assert_eq!(drain.await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_leases_are_cut_one_part_after_the_other() {
        let instance = instance();
        let start = tokio::time::Instant::now();
        let mut cuts = tokio::task::JoinSet::new();
        for _ in 0..40 {
            let lease = instance.lease();
            cuts.spawn(async move {
                lease.cut().await;
                lease.was_cut();
                lease.was_cut();
                start.elapsed()
            });
        }
        instance.retire();
        assert_eq!(instance.drain(Duration::from_secs(3)).await, 40);
        let times = cuts.join_all().await;
        let (first, last) = (times.iter().min().unwrap(), times.iter().max().unwrap());
        assert!(*first >= Duration::from_secs(3));
        assert!(*last - *first > CUT_SPREAD / 2, "{first:?} {last:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_instance_that_serves_again_is_not_cut() {
        let instance = instance();
        let lease = instance.lease();
        instance.retire();
        let drain = tokio::spawn({
            let instance = Arc::clone(&instance);
            async move { instance.drain(Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        instance.serve();
        assert_eq!(drain.await.unwrap(), 0);
        assert!(timeout(Duration::from_secs(9), lease.cut()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_when_cut_does_not_hold_the_drain() {
        let instance = instance();
        let _lease = instance.lease();
        instance.retire();
        let drain = instance.drain(Duration::from_secs(1));
        timeout(Duration::from_secs(10), drain).await.unwrap();
    }
}
