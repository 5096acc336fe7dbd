//! One service: its instances, least in flight first, and the queue while it is parked.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use kiln_model::route::{AppProtocol, RouteMode};
use kiln_model::{EnvironmentName, InstanceId, ServiceName};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::instance::{Instance, Lease};
use crate::limits::{PARK_QUEUE, RELEASE_BURST, RELEASE_PACE};
use crate::lock;
use crate::stats::{Failure, FailureCounts};
use crate::status::ServiceStatus;

/// What the table says of a service now.
pub(crate) struct Route {
    pub(crate) mode: RouteMode,
    pub(crate) backends: Vec<Arc<Instance>>,
    pub(crate) protocols: BTreeMap<u16, AppProtocol>,
}

impl Route {
    fn empty() -> Self {
        Self {
            mode: RouteMode::Serve,
            backends: Vec::new(),
            protocols: BTreeMap::new(),
        }
    }

    /// The instance with the fewest in flight that has not been tried; those which
    /// refused a connection lately come last. `turn` decides between equals.
    fn pick(&self, tried: &[IpAddr], turn: usize) -> Option<&Arc<Instance>> {
        let count = self.backends.len().max(1);
        let start = turn % count;
        let (before, from) = self.backends.split_at(start.min(self.backends.len()));
        from.iter()
            .chain(before)
            .filter(|instance| !tried.contains(&instance.address))
            .min_by_key(|instance| (instance.failed_lately(), instance.in_flight()))
    }
}

pub(crate) struct Service {
    pub(crate) environment: EnvironmentName,
    pub(crate) name: ServiceName,
    pub(crate) failures: FailureCounts,
    route: watch::Sender<Route>,
    waiting: AtomicUsize,
    /// How many of the waiting went on since the route was set.
    released: AtomicU32,
    turn: AtomicUsize,
    /// Ports on which HTTP was recognised: a hint for the next connection, no more.
    http_ports: Mutex<HashSet<u16>>,
}

impl Service {
    pub(crate) fn new(environment: EnvironmentName, name: ServiceName) -> Arc<Self> {
        Arc::new(Self {
            environment,
            name,
            failures: FailureCounts::default(),
            route: watch::Sender::new(Route::empty()),
            waiting: AtomicUsize::new(0),
            released: AtomicU32::new(0),
            turn: AtomicUsize::new(0),
            http_ports: Mutex::default(),
        })
    }

    pub(crate) fn set_route(&self, route: Route) {
        self.released.store(0, Ordering::Relaxed);
        self.route.send_replace(route);
    }

    pub(crate) fn remove(&self) {
        self.set_route(Route::empty());
    }

    pub(crate) fn protocol(&self, port: u16) -> Option<AppProtocol> {
        self.route.borrow().protocols.get(&port).copied()
    }

    pub(crate) fn spoke_http(&self, port: u16) -> bool {
        lock(&self.http_ports).contains(&port)
    }

    pub(crate) fn learn(&self, port: u16, http: bool) {
        let mut ports = lock(&self.http_ports);
        if http {
            ports.insert(port);
        } else {
            ports.remove(&port);
        }
    }

    /// An instance for one request or connection, not one of `tried`. Waits while the
    /// service is parked. Where all have been tried: [`Failure::Connect`].
    pub(crate) async fn acquire(&self, tried: &[IpAddr]) -> Result<Lease, Failure> {
        if let Some(outcome) = self.try_acquire(tried) {
            return outcome;
        }
        let _place = self.wait_place()?;
        let begun = Instant::now();
        let mut route = self.route.subscribe();
        let mut paced = false;
        loop {
            let limit = match route.borrow_and_update().mode {
                RouteMode::Serve => None,
                RouteMode::Park { limit } => Some(limit),
            };
            let Some(limit) = limit else {
                if !paced {
                    paced = true;
                    self.pace().await;
                }
                if let Some(outcome) = self.try_acquire(tried) {
                    return outcome;
                }
                continue;
            };
            let end = begun.checked_add(limit.into());
            let changed = route.changed();
            let in_time = match end {
                Some(end) => tokio::time::timeout_at(end, changed).await.is_ok(),
                None => changed.await.is_ok(),
            };
            if !in_time {
                return Err(Failure::ParkTimeout);
            }
        }
    }

    async fn pace(&self) {
        let number = self.released.fetch_add(1, Ordering::Relaxed);
        let wait = RELEASE_PACE * number.saturating_sub(RELEASE_BURST);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// `None` while parked. The lease is taken while the route can't change: after
    /// [`set_route`](Self::set_route) returns, nothing goes to who is not in it.
    fn try_acquire(&self, tried: &[IpAddr]) -> Option<Result<Lease, Failure>> {
        let route = self.route.borrow();
        if matches!(route.mode, RouteMode::Park { .. }) {
            return None;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        Some(match route.pick(tried, turn) {
            Some(instance) => Ok(instance.lease()),
            None if route.backends.is_empty() => Err(Failure::NoBackend),
            None => Err(Failure::Connect),
        })
    }

    /// An instance for datagrams, which are not in flight anywhere. None while parked.
    pub(crate) fn choose(&self) -> Option<Arc<Instance>> {
        let route = self.route.borrow();
        if matches!(route.mode, RouteMode::Park { .. }) {
            return None;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        route.pick(&[], turn).cloned()
    }

    fn wait_place(&self) -> Result<Place<'_>, Failure> {
        let waiting = self.waiting.fetch_add(1, Ordering::AcqRel);
        let place = Place(&self.waiting);
        if waiting >= PARK_QUEUE {
            return Err(Failure::ParkFull);
        }
        Ok(place)
    }

    pub(crate) fn has(&self, instance: &InstanceId) -> bool {
        let route = self.route.borrow();
        route.backends.iter().any(|backend| backend.id == *instance)
    }

    pub(crate) fn status(&self) -> ServiceStatus {
        let route = self.route.borrow();
        ServiceStatus {
            parked: matches!(route.mode, RouteMode::Park { .. }),
            waiting: self.waiting.load(Ordering::Relaxed) as u64,
            failures: self.failures.snapshot(),
            instances: route.backends.iter().map(|i| i.status()).collect(),
        }
    }
}

/// A place in the queue of a parked service.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::Millis;
    use std::time::Duration;

    fn service() -> Arc<Service> {
        Service::new("shop".parse().unwrap(), "web".parse().unwrap())
    }

    fn instances(n: u8) -> Vec<Arc<Instance>> {
        (1..=n)
            .map(|i| Instance::new(format!("web-{i}").parse().unwrap(), [127, 0, 0, i].into()))
            .collect()
    }

    fn route(mode: RouteMode, backends: &[Arc<Instance>]) -> Route {
        Route {
            mode,
            backends: backends.to_vec(),
            protocols: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn leases_spread_to_the_least_loaded_and_skip_the_tried() {
        let (service, backends) = (service(), instances(3));
        service.set_route(route(RouteMode::Serve, &backends));
        let mut held = Vec::new();
        for _ in 0..9 {
            held.push(service.acquire(&[]).await.unwrap());
        }
        assert!(backends.iter().all(|b| b.in_flight() == 3));
        held.retain(|lease| lease.instance.id != backends[1].id);
        assert_eq!(backends[1].in_flight(), 0);
        let tried = [backends[0].address, backends[2].address];
        let lease = service.acquire(&tried).await.unwrap();
        assert_eq!(lease.instance.id, backends[1].id);
        let all: Vec<IpAddr> = backends.iter().map(|b| b.address).collect();
        assert_eq!(service.acquire(&all).await.err(), Some(Failure::Connect));
    }

    #[tokio::test]
    async fn one_that_refused_is_asked_last() {
        let (service, backends) = (service(), instances(2));
        service.set_route(route(RouteMode::Serve, &backends));
        backends[0].connect_failed();
        for _ in 0..4 {
            let lease = service.acquire(&[]).await.unwrap();
            assert_eq!(lease.instance.id, backends[1].id);
        }
        let lease = service.acquire(&[backends[1].address]).await.unwrap();
        assert_eq!(lease.instance.id, backends[0].id);
    }

    #[tokio::test(start_paused = true)]
    async fn the_parked_wait_go_on_or_give_up() {
        let (service, backends) = (service(), instances(1));
        let limit = Millis(1000);
        service.set_route(route(RouteMode::Park { limit }, &[]));
        let waiting = tokio::spawn({
            let service = Arc::clone(&service);
            async move { service.acquire(&[]).await.map(|l| l.instance.id.clone()) }
        });
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(service.status().waiting, 1);
        service.set_route(route(RouteMode::Serve, &backends));
        assert_eq!(waiting.await.unwrap().unwrap(), backends[0].id);

        service.set_route(route(RouteMode::Park { limit }, &backends));
        assert_eq!(service.acquire(&[]).await.err(), Some(Failure::ParkTimeout));
        assert_eq!(service.status().waiting, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_bounded() {
        let service = service();
        let limit = Millis(1000);
        service.set_route(route(RouteMode::Park { limit }, &[]));
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..=PARK_QUEUE {
            let service = Arc::clone(&service);
            waiting.spawn(async move { service.acquire(&[]).await.err() });
        }
        let outcomes = waiting.join_all().await;
        let full = |o: &&Option<Failure>| **o == Some(Failure::ParkFull);
        assert_eq!(outcomes.iter().filter(full).count(), 1);
    }
}
