//! The proxy's state in one place, and what can be done to it: tables applied and removed,
//! instances drained, all of it told.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kiln_model::route::{Backend, DrainReport, ServiceRoute};
use kiln_model::{EnvironmentName, Generation, InstanceId, RoutingTable, ServiceName, Traffic};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::Client;
use crate::dns::forward::Forwarder;
use crate::handover::{Predecessors, Sockets};
use crate::instance::Instance;
use crate::limits::LEFT_CHECK;
use crate::listeners::{Listeners, Wanted, Wishes, taken_by};
use crate::routes::{Destination, Entry, Owners, Routes};
use crate::service::{Route, Service};
use crate::state::{State, StateError, save};
use crate::stats::DnsCounts;
use crate::status::{
    Applied, EnvironmentStatus, ListenFailure, ListenerStatus, Ports, Purpose, Status,
};

/// Why the proxy does not do what it was asked to. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefusedError {
    #[error("the table of `{environment}` has generation {given}, and {current} is in effect")]
    Older {
        environment: EnvironmentName,
        given: Generation,
        current: Generation,
    },
    #[error("the table of `{environment}` sends `{what}` to service `{service}`, which it lacks")]
    UnknownService {
        environment: EnvironmentName,
        service: ServiceName,
        what: String,
    },
    #[error("instance `{0}` still takes new traffic; apply a table without it first")]
    StillServing(InstanceId),
    #[error(transparent)]
    State(#[from] StateError),
}

pub(crate) struct Core {
    pub(crate) dns: DnsCounts,
    pub(crate) forwarder: Forwarder,
    routes: RwLock<Arc<Routes>>,
    inner: tokio::sync::Mutex<Inner>,
    places: Arc<Semaphore>,
    place_count: usize,
    open: AtomicU64,
    ending: watch::Sender<bool>,
    retired: watch::Sender<bool>,
    predecessors: Predecessors,
    started: Instant,
    state_file: PathBuf,
    dns_port: u16,
}

/// One open connection of a client, with what it was upgraded to.
pub(crate) struct Opened {
    pub(crate) core: Arc<Core>,
    /// Those of UDP have none.
    _place: Option<OwnedSemaphorePermit>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.core.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Inner {
    environments: BTreeMap<EnvironmentName, Environment>,
    /// Those in tables, and those which still have something in flight.
    instances: BTreeMap<InstanceId, Arc<Instance>>,
    owners: Owners,
    listeners: Listeners,
    catch_all: u16,
}

struct Environment {
    table: RoutingTable,
    services: BTreeMap<ServiceName, Arc<Service>>,
    failed: Vec<ListenFailure>,
}

impl Core {
    pub(crate) fn new(
        state_file: PathBuf,
        resolv_conf: PathBuf,
        dns_port: u16,
        connections: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            dns: DnsCounts::default(),
            forwarder: Forwarder::new(resolv_conf),
            routes: RwLock::default(),
            inner: tokio::sync::Mutex::default(),
            places: Arc::new(Semaphore::new(connections)),
            place_count: connections,
            open: AtomicU64::new(0),
            ending: watch::Sender::new(false),
            retired: watch::Sender::new(false),
            predecessors: Predecessors::default(),
            started: Instant::now(),
            state_file,
            dns_port,
        })
    }

    pub(crate) fn routes(&self) -> Arc<Routes> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&routes)
    }

    pub(crate) fn resolve(&self, entry: &Entry) -> Option<Destination> {
        self.routes().resolve(entry)
    }

    /// Room for one more connection; `None` when the proxy ends.
    pub(crate) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    pub(crate) fn try_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// Counts a connection as open until the answer is dropped.
    pub(crate) fn opened(self: &Arc<Self>, place: Option<OwnedSemaphorePermit>) -> Opened {
        self.open.fetch_add(1, Ordering::Relaxed);
        Opened {
            core: Arc::clone(self),
            _place: place,
        }
    }

    /// Resolves when the proxy ends.
    pub(crate) fn ending(&self) -> impl Future<Output = ()> + Send + use<> {
        set(&self.ending)
    }

    /// Resolves when another proxy has taken the place of this one.
    pub(crate) fn retired(&self) -> impl Future<Output = ()> + Send + use<> {
        set(&self.retired)
    }

    pub(crate) fn is_retired(&self) -> bool {
        *self.retired.borrow()
    }

    /// Copies of all listening sockets, for another proxy.
    pub(crate) async fn sockets(&self) -> std::io::Result<Sockets> {
        self.inner.lock().await.listeners.copies()
    }

    pub(crate) async fn inherit(&self, sockets: Sockets) {
        self.inner.lock().await.listeners.inherit(sockets);
    }

    /// From here on this proxy is the only one that takes anything new: what it inherited
    /// and does not want is closed, and retired ones beside `socket` are led.
    pub(crate) async fn succeed(&self, socket: &Path) {
        self.inner.lock().await.listeners.disinherit();
        self.predecessors.find(socket).await;
    }

    /// Takes nothing new from here on. Tables and drains are still followed, for the
    /// connections that are open.
    pub(crate) async fn retire(self: &Arc<Self>) {
        let mut inner = self.inner.lock().await;
        self.retired.send_replace(true);
        inner.listeners.retire(self).await;
        self.predecessors.forget();
    }

    /// Resolves when it is retired and its last connection has ended.
    pub(crate) async fn left(&self) {
        self.retired().await;
        // Not before `retire` has counted what it leaves open.
        drop(self.inner.lock().await);
        while self.open.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(LEFT_CHECK).await;
        }
    }

    /// Opens the catch-all. `wanted.port()` 0 takes any.
    pub(crate) async fn open_catch_all(
        self: &Arc<Self>,
        address: std::net::SocketAddr,
    ) -> std::io::Result<u16> {
        let mut inner = self.inner.lock().await;
        let local = inner.listeners.open(self, Wanted::CatchAll(address))?;
        inner.catch_all = local.port();
        Ok(local.port())
    }

    pub(crate) async fn save(&self) -> Result<(), StateError> {
        let inner = self.inner.lock().await;
        let tables = inner.environments.values().map(|e| e.table.clone());
        save(
            &self.state_file,
            &State::new(inner.catch_all, tables.collect()),
        )
    }

    /// Puts a table into effect, on disk first.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        table: RoutingTable,
    ) -> Result<Applied, RefusedError> {
        let mut inner = self.inner.lock().await;
        inner.check(&table)?;
        let current = inner.environments.get(&table.environment);
        let changed = current.is_none_or(|current| current.table != table);
        if changed && !self.is_retired() {
            let others = inner.environments.values().map(|e| &e.table);
            let tables = others
                .filter(|other| other.environment != table.environment)
                .chain([&table])
                .cloned()
                .collect();
            save(&self.state_file, &State::new(inner.catch_all, tables))?;
        }
        let applied = self.activate(&mut inner, table.clone()).await;
        drop(inner);
        let table = &table;
        let told = |p: Client| async move { p.apply(table).await };
        self.predecessors.each(told).await;
        Ok(applied)
    }

    /// Tables from the state file, at start.
    pub(crate) async fn restore(self: &Arc<Self>, tables: Vec<RoutingTable>) {
        let mut inner = self.inner.lock().await;
        for table in tables {
            if let Err(error) = inner.check(&table) {
                tracing::warn!(%error, "a table of the state file is left out");
                continue;
            }
            for failure in self.activate(&mut inner, table).await.failed {
                tracing::warn!("{failure}");
            }
        }
    }

    /// Drops an environment: its listeners are closed, its instances get nothing new.
    pub(crate) async fn remove_environment(
        self: &Arc<Self>,
        name: &EnvironmentName,
    ) -> Result<(), RefusedError> {
        let mut inner = self.inner.lock().await;
        if !inner.environments.contains_key(name) {
            return Ok(());
        }
        if !self.is_retired() {
            let others = inner.environments.values().map(|e| &e.table);
            let tables = others.filter(|t| t.environment != *name).cloned().collect();
            save(&self.state_file, &State::new(inner.catch_all, tables))?;
        }
        if let Some(gone) = inner.environments.remove(name) {
            for service in gone.services.values() {
                service.remove();
            }
        }
        self.settle(&mut inner).await;
        drop(inner);
        let forget = |p: Client| async move { p.remove_environment(name).await };
        self.predecessors.each(forget).await;
        Ok(())
    }

    async fn activate(self: &Arc<Self>, inner: &mut Inner, table: RoutingTable) -> Applied {
        let name = table.environment.clone();
        let generation = table.generation;
        let old = inner.environments.remove(&name);
        let mut services = old.map(|old| old.services).unwrap_or_default();
        services.retain(|service, known| {
            let stays = table.services.contains_key(service);
            if !stays {
                known.remove();
            }
            stays
        });
        for (service, route) in &table.services {
            let backends = inner.instances_of(route);
            let known = services
                .entry(service.clone())
                .or_insert_with(|| Service::new(name.clone(), service.clone()));
            known.set_route(Route::new(route, backends));
        }
        let environment = Environment {
            table,
            services,
            failed: Vec::new(),
        };
        inner.environments.insert(name.clone(), environment);
        self.settle(inner).await;
        let failed = inner.environments.get(&name).map(|e| e.failed.clone());
        Applied {
            generation,
            failed: failed.unwrap_or_default(),
        }
    }

    /// Brings routes, instances and listeners in line with the tables.
    async fn settle(self: &Arc<Self>, inner: &mut Inner) {
        inner.settle_owners();
        let owners = inner.owners.clone();
        let mut routes = Routes::default();
        for environment in inner.environments.values() {
            routes.add(&environment.table, &environment.services, &owners);
        }
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(routes);
        inner.retire_unnamed();

        if self.is_retired() {
            return;
        }
        let wishes = inner.wishes(self.dns_port);
        let failed = inner.listeners.reconcile(self, &wishes).await;
        for environment in inner.environments.values_mut() {
            environment.failed = failures(&environment.table, &owners, &failed, self.dns_port);
        }
    }

    /// Waits until the instance has nothing in flight, or cuts it at the limit.
    pub(crate) async fn drain(
        &self,
        id: &InstanceId,
        limit: Duration,
    ) -> Result<DrainReport, RefusedError> {
        let elsewhere = |p: Client| async move { p.drain(id, limit.into()).await };
        let elsewhere = self.predecessors.each(elsewhere);
        let instance = {
            let inner = self.inner.lock().await;
            let serving = |e: &Environment| e.services.values().any(|s| s.has(id));
            if inner.environments.values().any(serving) {
                return Err(RefusedError::StillServing(id.clone()));
            }
            inner.instances.get(id).cloned()
        };
        let here = async {
            match instance {
                Some(instance) => instance.drain(limit).await,
                None => 0,
            }
        };
        let (here, elsewhere) = tokio::join!(here, elsewhere);
        self.inner.lock().await.retire_unnamed();
        let here = u32::try_from(here).unwrap_or(u32::MAX);
        let cut = elsewhere
            .iter()
            .map(|r| r.cut)
            .fold(here, u32::saturating_add);
        Ok(DrainReport { cut })
    }

    pub(crate) async fn ports(&self) -> Ports {
        Ports {
            catch_all: self.inner.lock().await.catch_all,
            dns: self.dns_port,
        }
    }

    pub(crate) async fn status(&self) -> Status {
        let mut inner = self.inner.lock().await;
        inner.retire_unnamed();
        let environments = inner.environments.iter();
        let draining = inner.instances.values();
        Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            connections: self.open.load(Ordering::Relaxed),
            ports: Ports {
                catch_all: inner.catch_all,
                dns: self.dns_port,
            },
            environments: environments
                .map(|(name, environment)| (name.clone(), environment.status()))
                .collect(),
            draining: draining
                .filter(|instance| !instance.is_serving())
                .map(|instance| instance.status())
                .collect(),
            dns: self.dns.snapshot(),
        }
    }

    /// What was counted of these instances; those that are not known are left out.
    pub(crate) async fn traffic(&self, of: &[InstanceId]) -> BTreeMap<InstanceId, Traffic> {
        let inner = self.inner.lock().await;
        let known = |id: &InstanceId| Some((id.clone(), inner.instances.get(id)?.counts.traffic()));
        of.iter().filter_map(known).collect()
    }

    /// Closes idle connections to instances which are too old.
    pub(crate) async fn sweep(&self) {
        for instance in self.inner.lock().await.instances.values() {
            instance.pool.sweep();
        }
    }

    /// Takes nothing new, and waits for what is open, for at most `limit`.
    pub(crate) async fn end(&self, limit: Duration) {
        self.inner.lock().await.listeners.close_all().await;
        self.ending.send_replace(true);
        let all = u32::try_from(self.place_count).unwrap_or(u32::MAX);
        let _ = tokio::time::timeout(limit, self.places.acquire_many(all)).await;
    }
}

/// Resolves when the flag is set, or can't be any more.
fn set(flag: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + use<> {
    let mut flag = flag.subscribe();
    async move {
        let _ = flag.wait_for(|set| *set).await;
    }
}

impl Inner {
    fn check(&self, table: &RoutingTable) -> Result<(), RefusedError> {
        if let Some(current) = self.environments.get(&table.environment)
            && table.generation < current.table.generation
        {
            return Err(RefusedError::Older {
                environment: table.environment.clone(),
                given: table.generation,
                current: current.table.generation,
            });
        }
        let published = table
            .published
            .iter()
            .map(|p| (&p.service, p.listen.to_string()));
        let addresses = table
            .networks
            .iter()
            .flat_map(|n| &n.addresses)
            .map(|(address, service)| (service, address.to_string()));
        for (service, what) in published.chain(addresses) {
            if !table.services.contains_key(service) {
                return Err(RefusedError::UnknownService {
                    environment: table.environment.clone(),
                    service: service.clone(),
                    what,
                });
            }
        }
        Ok(())
    }

    fn instances_of(&mut self, route: &ServiceRoute) -> Vec<Arc<Instance>> {
        let mut instance = |backend: &Backend| {
            let known = self.instances.get(&backend.instance);
            let instance = match known {
                Some(known) if known.address == backend.address => Arc::clone(known),
                _ => Instance::new(backend.instance.clone(), backend.address),
            };
            instance.serve();
            let moved = self
                .instances
                .insert(backend.instance.clone(), Arc::clone(&instance));
            if let Some(moved) = moved
                && !Arc::ptr_eq(&moved, &instance)
            {
                moved.retire();
            }
            instance
        };
        route.backends.iter().map(&mut instance).collect()
    }

    /// Retires the instances which no table names, and forgets them once they are idle.
    fn retire_unnamed(&mut self) {
        let named: BTreeSet<&InstanceId> = self
            .environments
            .values()
            .flat_map(|e| e.table.services.values())
            .flat_map(|route| &route.backends)
            .map(|backend| &backend.instance)
            .collect();
        self.instances.retain(|id, instance| {
            if named.contains(id) {
                return true;
            }
            instance.retire();
            instance.in_flight() > 0
        });
    }

    /// Decides which environment has each published port: who had it before and still
    /// wants it, else the first by name.
    fn settle_owners(&mut self) {
        let mut owners = Owners::new();
        for environment in self.environments.values() {
            let name = &environment.table.environment;
            for published in &environment.table.published {
                let key = (published.listen, published.protocol);
                let had = self.owners.get(&key) == Some(name);
                if had || !owners.contains_key(&key) {
                    owners.insert(key, name.clone());
                }
            }
        }
        self.owners = owners;
    }

    fn wishes(&self, dns_port: u16) -> Wishes {
        let mut wishes = Wishes::new();
        for Environment { table, .. } in self.environments.values() {
            for published in &table.published {
                let key = (published.listen, published.protocol);
                if self.owners.get(&key) == Some(&table.environment) {
                    let purpose = Purpose::Published {
                        service: published.service.clone(),
                        protocol: published.protocol,
                    };
                    wishes.insert(Wanted::Published(key.0, key.1), purpose);
                }
            }
            for network in &table.networks {
                let purpose = Purpose::Dns {
                    network: network.network.clone(),
                };
                wishes.insert(Wanted::Dns(network.gateway, dns_port), purpose);
            }
        }
        wishes
    }
}

/// What of a table is not listened on, in the table's order.
fn failures(
    table: &RoutingTable,
    owners: &Owners,
    failed: &BTreeMap<Wanted, ListenFailure>,
    dns_port: u16,
) -> Vec<ListenFailure> {
    let mut all = Vec::new();
    for published in &table.published {
        let key = (published.listen, published.protocol);
        match owners.get(&key) {
            Some(owner) if *owner != table.environment => {
                all.push(taken_by(key.0, key.1, &published.service, owner));
            }
            _ => all.extend(failed.get(&Wanted::Published(key.0, key.1)).cloned()),
        }
    }
    for network in &table.networks {
        all.extend(failed.get(&Wanted::Dns(network.gateway, dns_port)).cloned());
    }
    all
}

impl Environment {
    fn status(&self) -> EnvironmentStatus {
        let listener = |published: &kiln_model::route::Published| ListenerStatus {
            listen: published.listen,
            protocol: published.protocol,
            service: published.service.clone(),
            target: published.target,
            failed: self.failure(published),
        };
        EnvironmentStatus {
            generation: self.table.generation,
            services: self
                .services
                .iter()
                .map(|(name, service)| (name.clone(), service.status()))
                .collect(),
            listeners: self.table.published.iter().map(listener).collect(),
        }
    }

    fn failure(&self, published: &kiln_model::route::Published) -> Option<ListenFailure> {
        let same = |failure: &&ListenFailure| {
            failure.listen == published.listen
                && matches!(&failure.purpose, Purpose::Published { protocol, .. }
                    if *protocol == published.protocol)
        };
        self.failed.iter().find(same).cloned()
    }
}
