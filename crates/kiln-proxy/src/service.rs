//! One service: its instances, least in flight first, how its traffic is split between
//! them, and the queue while it is parked.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use kiln_model::route::{AppProtocol, RouteMode, ServiceRoute};
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
    mode: RouteMode,
    backends: Vec<Arc<Instance>>,
    split: Option<Split>,
    protocols: BTreeMap<u16, AppProtocol>,
}

struct Split {
    /// Percent of the turns.
    weight: u8,
    to: Vec<Arc<Instance>>,
    rest: Vec<Arc<Instance>>,
}

impl Split {
    /// Whether this turn is one of those that go to `to`. Multiples of the golden ratio
    /// fill the circle evenly: of any few turns in a row the right part goes there, and
    /// no rhythm of the callers' meets one of its own.
    fn takes(&self, turn: usize) -> bool {
        const GOLDEN: u32 = 0x9E37_79B9;
        let place = (turn as u32).wrapping_mul(GOLDEN);
        u64::from(place) * 100 < u64::from(self.weight) << 32
    }
}

impl Route {
    /// As `route` says, whose backends are these instances.
    pub(crate) fn new(route: &ServiceRoute, backends: Vec<Arc<Instance>>) -> Self {
        let split = route.split.as_ref().map(|split| {
            let (to, rest) = backends
                .iter()
                .cloned()
                .partition(|instance| split.to.contains(&instance.id));
            Split {
                weight: split.weight,
                to,
                rest,
            }
        });
        Self {
            mode: route.mode,
            backends,
            split,
            protocols: route.protocols.clone(),
        }
    }

    fn empty() -> Self {
        Self {
            mode: RouteMode::Serve,
            backends: Vec::new(),
            split: None,
            protocols: BTreeMap::new(),
        }
    }

    /// The best instance that has not been tried: of the part whose turn it is, or, rather
    /// than none, of the other.
    fn pick(&self, tried: &[IpAddr], turn: usize) -> Option<&Arc<Instance>> {
        let Some(split) = &self.split else {
            return least_loaded(&self.backends, tried, turn);
        };
        let (first, second) = match split.takes(turn) {
            true => (&split.to, &split.rest),
            false => (&split.rest, &split.to),
        };
        least_loaded(first, tried, turn).or_else(|| least_loaded(second, tried, turn))
    }
}

/// The instance with the fewest in flight that has not been tried; those which refused a
/// connection lately come last. `turn` decides between equals.
fn least_loaded<'i>(
    instances: &'i [Arc<Instance>],
    tried: &[IpAddr],
    turn: usize,
) -> Option<&'i Arc<Instance>> {
    let count = instances.len().max(1);
    let (before, from) = instances.split_at((turn % count).min(instances.len()));
    from.iter()
        .chain(before)
        .filter(|instance| !tried.contains(&instance.address))
        .min_by_key(|instance| (instance.failed_lately(), instance.in_flight()))
}

/// What an instance is wanted for. Each kind has its own turns: a connection that is made
/// before it is known what the client speaks must not take a request's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Request,
    Connection,
}

pub(crate) struct Service {
    pub(crate) environment: EnvironmentName,
    pub(crate) name: ServiceName,
    pub(crate) failures: FailureCounts,
    route: watch::Sender<Route>,
    waiting: AtomicUsize,
    /// How many of the waiting went on since the route was set.
    released: AtomicU32,
    requests: AtomicUsize,
    connections: AtomicUsize,
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
            requests: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
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
    pub(crate) async fn acquire(&self, unit: Unit, tried: &[IpAddr]) -> Result<Lease, Failure> {
        if let Some(outcome) = self.try_acquire(unit, tried) {
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
                if let Some(outcome) = self.try_acquire(unit, tried) {
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
    fn try_acquire(&self, unit: Unit, tried: &[IpAddr]) -> Option<Result<Lease, Failure>> {
        let route = self.route.borrow();
        if matches!(route.mode, RouteMode::Park { .. }) {
            return None;
        }
        Some(match route.pick(tried, self.turn(unit, tried)) {
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
        route.pick(&[], self.turn(Unit::Connection, &[])).cloned()
    }

    /// Another try takes nobody's turn: those of a split are counted by first tries.
    fn turn(&self, unit: Unit, tried: &[IpAddr]) -> usize {
        let turns = match unit {
            Unit::Request => &self.requests,
            Unit::Connection => &self.connections,
        };
        match tried.is_empty() {
            true => turns.fetch_add(1, Ordering::Relaxed),
            false => turns.load(Ordering::Relaxed),
        }
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
            split: None,
            protocols: BTreeMap::new(),
        }
    }

    /// The last instance gets so many percent.
    fn split(weight: u8, backends: &[Arc<Instance>]) -> Route {
        let (to, rest) = backends.split_last().unwrap();
        Route {
            split: Some(Split {
                weight,
                to: vec![Arc::clone(to)],
                rest: rest.to_vec(),
            }),
            ..route(RouteMode::Serve, backends)
        }
    }

    #[tokio::test]
    async fn leases_spread_to_the_least_loaded_and_skip_the_tried() {
        let (service, backends) = (service(), instances(3));
        service.set_route(route(RouteMode::Serve, &backends));
        let mut held = Vec::new();
        for _ in 0..9 {
            held.push(service.acquire(Unit::Request, &[]).await.unwrap());
        }
        assert!(backends.iter().all(|b| b.in_flight() == 3));
        held.retain(|lease| lease.instance.id != backends[1].id);
        assert_eq!(backends[1].in_flight(), 0);
        let tried = [backends[0].address, backends[2].address];
        let lease = service.acquire(Unit::Request, &tried).await.unwrap();
        assert_eq!(lease.instance.id, backends[1].id);
        let all: Vec<IpAddr> = backends.iter().map(|b| b.address).collect();
        assert_eq!(
            service.acquire(Unit::Request, &all).await.err(),
            Some(Failure::Connect)
        );
    }

    #[tokio::test]
    async fn a_split_gives_each_part_its_share_of_any_hundred_turns() {
        for weight in [1, 5, 25, 50, 99] {
            let (service, backends) = (service(), instances(3));
            service.set_route(split(weight, &backends));
            for _ in 0..20 {
                let mut taken = 0;
                for _ in 0..100 {
                    // What else takes turns does not change it.
                    let other = service.acquire(Unit::Connection, &[]).await.unwrap();
                    let lease = service.acquire(Unit::Request, &[]).await.unwrap();
                    taken += u8::from(lease.instance.id == backends[2].id);
                    drop(other);
                }
                assert!(taken.abs_diff(weight) <= 2, "{taken} instead of {weight}");
            }
        }
    }

    #[tokio::test]
    async fn a_part_that_refuses_is_stood_in_for_by_the_other() {
        for weight in [1, 99] {
            let (service, backends) = (service(), instances(2));
            service.set_route(split(weight, &backends));
            for (tried, other) in [(0, 1), (1, 0)] {
                let tried = [backends[tried].address];
                for _ in 0..50 {
                    let lease = service.acquire(Unit::Request, &tried).await.unwrap();
                    assert_eq!(lease.instance.id, backends[other].id);
                }
            }
        }
    }

    #[tokio::test]
    async fn one_that_refused_is_asked_last() {
        let (service, backends) = (service(), instances(2));
        service.set_route(route(RouteMode::Serve, &backends));
        backends[0].connect_failed();
        for _ in 0..4 {
            let lease = service.acquire(Unit::Request, &[]).await.unwrap();
            assert_eq!(lease.instance.id, backends[1].id);
        }
        let lease = service
            .acquire(Unit::Request, &[backends[1].address])
            .await
            .unwrap();
        assert_eq!(lease.instance.id, backends[0].id);
    }

    #[tokio::test(start_paused = true)]
    async fn the_parked_wait_go_on_or_give_up() {
        let (service, backends) = (service(), instances(1));
        let limit = Millis(1000);
        service.set_route(route(RouteMode::Park { limit }, &[]));
        let waiting = tokio::spawn({
            let service = Arc::clone(&service);
            async move {
                service
                    .acquire(Unit::Request, &[])
                    .await
                    .map(|l| l.instance.id.clone())
            }
        });
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(service.status().waiting, 1);
        service.set_route(route(RouteMode::Serve, &backends));
        assert_eq!(waiting.await.unwrap().unwrap(), backends[0].id);

        service.set_route(route(RouteMode::Park { limit }, &backends));
        assert_eq!(
            service.acquire(Unit::Request, &[]).await.err(),
            Some(Failure::ParkTimeout)
        );
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
            waiting.spawn(async move { service.acquire(Unit::Request, &[]).await.err() });
        }
        let outcomes = waiting.join_all().await;
        let full = |o: &&Option<Failure>| **o == Some(Failure::ParkFull);
        assert_eq!(outcomes.iter().filter(full).count(), 1);
    }
}
