//! Carries effects out: one `match`, one call an arm. Each runs in a task of its own
//! and comes back as an event; what could not be done comes back as
//! [`Event::Failed`] after a pause, and is then planned again.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kiln_model::instance::{ExitStatus, InstanceSpec, Observed, ObservedState};
use kiln_model::network::BridgeNetwork;
use kiln_model::release::Release;
use kiln_model::spec::{FileVersion, Hook, Port, Protocol};
use kiln_model::{EnvironmentName, InstanceId, Millis, ReleaseNumber, ServiceName};
use kiln_plan::{
    Conclusion, Effect, EffectKey, Event, Layout, ProbePlan, Releases, World, host_port_key,
};
use kiln_runtime::RuntimeError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::error::ApiError;
use crate::api::types::{EventKind, EventRecord};
use crate::crash;
use crate::engine::Message;
use crate::overtaken::Overtaken;
use crate::shared::{Shared, blocking, ended};
use crate::snapshots::Wish;
use crate::{inside, instance_spec, probe, prometheus, snapshots, volumes};

/// Pause before an effect that could not be carried out is planned again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Executor {
    shared: Arc<Shared>,
    environment: EnvironmentName,
    sender: mpsc::Sender<Message>,
    overtaken: Arc<Overtaken>,
}

impl Executor {
    pub fn new(
        shared: Arc<Shared>,
        environment: EnvironmentName,
        sender: mpsc::Sender<Message>,
    ) -> Self {
        Self {
            shared,
            environment,
            sender,
            overtaken: Arc::default(),
        }
    }

    /// Begins one effect. What it needs of the world is taken now.
    pub fn begin(&self, world: &World, releases: &Releases, effect: Effect) {
        let key = effect.key();
        match effect {
            Effect::EnsureNetworks { networks, wish } => {
                self.ensure_networks(key, networks, wish);
            }
            Effect::Start { id } => {
                let spec = instance_spec::build(&self.shared, world, releases, &id);
                self.start(key, id, spec);
            }
            Effect::Route(table) => {
                let shared = self.shared.clone();
                self.spawn(key, async move {
                    let failed = shared.proxy.apply(&table).await?;
                    Ok(Event::Routed { table, failed })
                });
            }
            Effect::Measure { number, instances } => {
                let shared = self.shared.clone();
                self.spawn(key, async move {
                    let traffic = shared.proxy.traffic(instances).await?;
                    Ok(Event::Measured { number, traffic })
                });
            }
            Effect::Query {
                service,
                prometheus,
            } => self.spawn(key, async move {
                let value = prometheus::value(&prometheus).await;
                Ok(Event::Queried { service, value })
            }),
            Effect::Drain { id, limit } => {
                let shared = self.shared.clone();
                self.spawn(key, async move {
                    shared.proxy.drain(&id, limit).await?;
                    Ok(Event::Drained { id })
                });
            }
            Effect::Stop { id, signal, grace } => {
                self.overtaken.no_start(&id);
                let instance = world.instances.get(&id);
                let released = instance.and_then(|i| releases.service_of(i));
                let hooks = released.map_or_else(Vec::new, |r| r.service.pre_stop.clone());
                self.stop(key, id, (signal, grace), hooks);
            }
            Effect::Remove { id } => {
                self.overtaken.no_start(&id);
                let shared = self.shared.clone();
                self.spawn(key, async move {
                    let gone = id.clone();
                    blocking(move || shared.runtime.remove(&gone).map_err(|e| e.to_string()))
                        .await??;
                    Ok(Event::Removed { id })
                });
            }
            // The engine sees to these itself.
            Effect::Observe { .. } | Effect::Conclude(_) => {}
        }
    }

    fn ensure_networks(&self, key: EffectKey, networks: Vec<BridgeNetwork>, wish: u64) {
        let this = self.clone();
        let turn = self.overtaken.wish();
        self.spawn(key, async move {
            let port = this.shared.proxy.catch_all_port().await?;
            blocking(move || match this.overtaken.turn(turn) {
                Some(_turn) => this
                    .shared
                    .networks
                    .ensure(&this.environment, networks, port),
                None => Err("other networks are wanted by now".to_owned()),
            })
            .await??;
            Ok(Event::NetworksReady { wish })
        });
    }

    fn spawn(
        &self,
        key: EffectKey,
        work: impl Future<Output = Result<Event, String>> + Send + 'static,
    ) {
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let effect = crash::name(&key);
            crash::point("before", effect);
            let done = work.await;
            crash::point("after", effect);
            let event = match done {
                Ok(event) => event,
                Err(cause) => {
                    tokio::time::sleep(PAUSE).await;
                    Event::Failed { key, cause }
                }
            };
            // The engine only ends with the daemon.
            let _ = sender.send(Message::Event(event)).await;
        });
    }

    /// What the engine itself could not do is planned again after a pause.
    pub fn failed_later(&self, key: EffectKey, cause: String) {
        self.spawn(key, std::future::ready(Err(cause)));
    }

    fn start(&self, key: EffectKey, id: InstanceId, spec: Result<instance_spec::Built, String>) {
        let this = self.clone();
        self.overtaken.start_begins(&id);
        self.spawn(key, async move {
            let built = match spec {
                Ok(built) => built,
                Err(cause) => return Ok(Event::StartFailed { id, cause }),
            };
            let shared = this.shared.clone();
            let (volumes, instance) = (built.volumes, built.spec);
            let overtaken = this.overtaken.clone();
            let copier = this.clone();
            let started = blocking(move || {
                for wish in &built.snapshots {
                    copier.snapshot(wish)?;
                }
                let _turn = volumes::TURN.read().unwrap_or_else(PoisonError::into_inner);
                volumes::prepare(&shared, &volumes)?;
                if !overtaken.may_start(&instance.id) {
                    return Err("it is not wanted any more".to_owned());
                }
                shared.runtime.start(&instance).map_err(|e| e.to_string())
            })
            .await?;
            if let Err(cause) = started {
                return Ok(Event::StartFailed { id, cause });
            }
            this.watch_exit(id.clone());
            let (runtime, target) = (this.shared.runtime.clone(), id.clone());
            let hooks = built.post_start;
            let ran =
                blocking(move || inside::hooks(&runtime, &target, "post_start", &hooks)).await?;
            Ok(match ran {
                Ok(()) => Event::Started { id },
                Err(reason) => Event::Unhealthy { id, reason },
            })
        });
    }

    fn snapshot(&self, wish: &Wish) -> Result<(), String> {
        let volume = &wish.volume;
        let taken = snapshots::take(&self.shared.root, wish, Shared::now())
            .map_err(|e| format!("no snapshot of the volume `{volume}`: {e}"))?;
        let Some(taken) = taken else { return Ok(()) };
        let (number, release) = (taken.number, wish.release);
        let text =
            format!("snapshot {number} of volume {volume} is taken before release {release}");
        let details = [
            ("snapshot", number.to_string()),
            ("before", release.to_string()),
        ];
        self.shared
            .record("kiln", "snapshot", volume.as_str(), &details);
        self.tell(Some(wish.service.clone()), None, EventKind::Note, text);
        Ok(())
    }

    /// Runs the hooks of one that is to be stopped, and stops it however they went.
    fn stop(
        &self,
        key: EffectKey,
        id: InstanceId,
        (signal, grace): (String, Millis),
        hooks: Vec<Hook>,
    ) {
        let this = self.clone();
        self.spawn(key, async move {
            let target = id.clone();
            let status = blocking(move || {
                let runtime = &this.shared.runtime;
                let state = runtime.observe(&target).map(|o| o.state);
                if matches!(state, Some(ObservedState::Running { .. }))
                    && let Err(cause) = inside::hooks(runtime, &target, "pre_stop", &hooks)
                {
                    this.warn(&target, &cause);
                }
                match runtime.stop(&target, &signal, grace) {
                    // There is nothing to be ended: that is all that was wanted.
                    Err(RuntimeError::Unknown(_) | RuntimeError::NotRunning(_)) => {
                        Ok(ExitStatus::Unknown)
                    }
                    other => other.map_err(|e| e.to_string()),
                }
            })
            .await??;
            Ok(Event::Exited { id, status })
        });
    }

    fn warn(&self, id: &InstanceId, text: &str) {
        let text = format!("{id}: {text}");
        self.tell(None, Some(id.clone()), EventKind::Warning, text);
    }

    fn tell(
        &self,
        service: Option<ServiceName>,
        instance: Option<InstanceId>,
        kind: EventKind,
        text: String,
    ) {
        self.shared.tell(EventRecord {
            id: 0,
            time: Shared::now(),
            environment: self.environment.clone(),
            service,
            instance,
            kind,
            text,
        });
    }

    /// Tells the engine when the instance has ended, by itself or not.
    pub fn watch_exit(&self, id: InstanceId) {
        let this = self.clone();
        tokio::spawn(async move {
            if let Ok(shim) = this.shared.runtime.exit_fd(&id) {
                // If it can't be waited for here, the call below waits.
                let _ = ended(shim).await;
            }
            let shared = this.shared.clone();
            let ended = id.clone();
            let status = blocking(move || shared.runtime.wait(&ended)).await;
            if let Ok(Ok(status)) = status {
                let _ = this
                    .sender
                    .send(Message::Event(Event::Exited { id, status }))
                    .await;
            }
        });
    }

    pub fn observe(&self, world: &World, id: InstanceId, plan: ProbePlan) -> JoinHandle<()> {
        let instance = world.instances.get(&id);
        let target = probe::Target {
            id: id.clone(),
            address: instance
                .and_then(|i| i.addresses.values().next())
                .map(|a| std::net::IpAddr::V4(*a)),
            proven: instance.is_some_and(|i| i.phase.ready()),
        };
        let sender = self.sender.clone();
        tokio::spawn(probe::run(
            self.shared.runtime.clone(),
            target,
            plan,
            sender,
        ))
    }

    /// What the runtime holds of this environment; leftovers that the world does not
    /// know are removed on the way.
    pub async fn found(&self, world: &World) -> Result<Vec<Observed>, String> {
        let runtime = self.shared.runtime.clone();
        let environment = self.environment.clone();
        let known: Vec<InstanceId> = world.instances.keys().cloned().collect();
        blocking(move || {
            let mut mine = Vec::new();
            for observed in runtime.list() {
                if known.contains(&observed.id) {
                    mine.push(observed);
                    continue;
                }
                let stray = runtime
                    .spec(&observed.id)
                    .is_some_and(|spec: InstanceSpec| {
                        spec.purpose
                            .membership()
                            .is_some_and(|m| m.environment == environment)
                    });
                if stray && !matches!(observed.state, ObservedState::Starting) {
                    runtime.remove(&observed.id).map_err(|e| e.to_string())?;
                }
            }
            Ok(mine)
        })
        .await?
    }

    /// Gives the release's networks, services and open ports their addresses.
    pub async fn lay_out(&self, world: &World, release: &Release) -> Result<Layout, ApiError> {
        let shared = self.shared.clone();
        let environment = self.environment.clone();
        let release = release.clone();
        let mut layout = world.layout.clone();
        blocking(move || {
            shared
                .networks
                .lay_out(&environment, &release, &mut layout)
                .map_err(|e| ApiError::invalid(e, "change or leave out the network's settings"))?;
            choose_host_ports(&release, &mut layout)?;
            Ok(layout)
        })
        .await
        .map_err(ApiError::internal)?
    }

    /// Makes sure that everything the release needs is in the store and stays there.
    pub async fn pin(&self, release: &Release, number: ReleaseNumber) -> Result<(), ApiError> {
        let shared = self.shared.clone();
        let release = release.clone();
        blocking(move || pin(&shared, &release, number))
            .await
            .map_err(ApiError::internal)?
    }

    /// The environment is empty: its networks go, and volumes in memory that it had. What
    /// can't be removed is only untidy.
    pub fn forget_environment(&self, conclusion: Conclusion) {
        let shared = self.shared.clone();
        let environment = self.environment.clone();
        let (overtaken, wish) = (self.overtaken.clone(), self.overtaken.wish());
        self.spawn(EffectKey::Conclude, async move {
            let port = shared.proxy.catch_all_port().await.unwrap_or(0);
            let inner = shared.clone();
            let result = blocking(move || match overtaken.turn(wish) {
                Some(_turn) => inner.networks.forget(&environment, port),
                None => Err("networks are wanted again".to_owned()),
            })
            .await;
            if let Ok(Err(cause)) | Err(cause) = result {
                tracing::warn!(%cause, "networks not removed");
            }
            if let Ok(Err(cause)) = blocking(move || volumes::let_go(&shared)).await {
                tracing::warn!(%cause, "volumes in memory not removed");
            }
            Ok(Event::Concluded { conclusion })
        });
    }
}

fn pin(shared: &Shared, release: &Release, number: ReleaseNumber) -> Result<(), ApiError> {
    let missing = |what: String| {
        ApiError::invalid(
            format!("{what} is not in the store"),
            "run `kiln up` to build it anew",
        )
    };
    let mut pins: BTreeMap<String, kiln_model::Digest> = BTreeMap::new();
    let prefix = format!("release/{}/{number}", release.environment);
    for (name, released) in &release.services {
        let image = released.image.digest;
        let found = shared
            .store
            .image(&image)
            .map_err(|e| ApiError::internal(e.to_string()))?;
        if found.is_none() {
            return Err(missing(format!("the image {image} of service `{name}`")));
        }
        pins.insert(format!("{prefix}/{name}/image"), image);
        for (n, digest) in released.mounted_images.values().enumerate() {
            pins.insert(format!("{prefix}/{name}/mounted-{n}"), *digest);
        }
        for (key, version) in &released.files {
            match version {
                FileVersion::Config(digest) => {
                    pins.insert(format!("{prefix}/{name}/config-{key}"), *digest);
                }
                FileVersion::Secret(id) if !shared.secrets.path(id).exists() => {
                    return Err(missing(format!("the secret `{key}` of service `{name}`")));
                }
                FileVersion::Secret(_) => {}
            }
        }
    }
    for (name, digest) in pins {
        shared
            .store
            .set_ref(&name, &digest)
            .map_err(|e| ApiError::internal(e.to_string()))?;
    }
    Ok(())
}

/// A free host port for each port the file leaves open; those chosen before stay.
fn choose_host_ports(release: &Release, layout: &mut Layout) -> Result<(), ApiError> {
    for (name, released) in &release.services {
        for port in released
            .service
            .ports
            .iter()
            .filter(|p| p.published.is_none())
        {
            let key = host_port_key(name, port);
            if layout.host_ports.contains_key(&key) {
                continue;
            }
            let chosen = free_port(port).ok_or_else(|| {
                ApiError::conflict(
                    format!(
                        "no free host port for port {} of service `{name}`",
                        port.target
                    ),
                    "name one that is free, or widen the range",
                )
            })?;
            layout.host_ports.insert(key, chosen);
        }
    }
    Ok(())
}

/// Asks the kernel; another program may still be faster, which shows when the proxy
/// opens the port.
fn free_port(port: &Port) -> Option<u16> {
    let ip = port
        .host_ip
        .unwrap_or(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
    let free = |candidate: u16| {
        let address = SocketAddr::new(ip, candidate);
        match port.protocol {
            Protocol::Tcp => TcpListener::bind(address).and_then(|l| l.local_addr()),
            Protocol::Udp => UdpSocket::bind(address).and_then(|s| s.local_addr()),
        }
        .ok()
        .map(|a| a.port())
    };
    match port.range {
        Some((low, high)) => (low..=high).find_map(free),
        None => free(0),
    }
}
