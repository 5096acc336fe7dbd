//! What is known and wanted of one environment: the planner's whole memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::Arc;

use kiln_model::instance::ExitStatus;
use kiln_model::network::BridgeNetwork;
use kiln_model::release::ReleasedService;
use kiln_model::route::{RoutingTable, ServiceRoute};
use kiln_model::{
    Digest, EnvironmentName, Generation, InstanceId, Millis, NetworkName, Release, ReleaseNumber,
    ServiceName, Traffic,
};
use serde::{Deserialize, Serialize};

use crate::effect::{Conclusion, EffectKey};
use crate::instances::Instances;
use crate::revision;
use crate::service::{self, backoff};

/// A release with what planning needs of it computed once.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub release: Release,
    pub digest: Digest,
    pub revisions: BTreeMap<ServiceName, Digest>,
    jobs: BTreeSet<ServiceName>,
}

impl Prepared {
    /// It runs once for each release, to its end.
    pub fn is_job(&self, service: &ServiceName) -> bool {
        self.jobs.contains(service)
    }
}

/// The releases a world refers to, by number.
#[derive(Clone, Debug, Default)]
pub struct Releases(BTreeMap<ReleaseNumber, Prepared>);

impl Releases {
    /// # Errors
    /// When the release can't be serialised.
    pub fn insert(
        &mut self,
        number: ReleaseNumber,
        release: Release,
    ) -> Result<(), serde_json::Error> {
        let digest = release.digest()?;
        let revisions = revision::of(&release)?;
        let jobs = service::jobs(&release);
        self.0.insert(
            number,
            Prepared {
                release,
                digest,
                revisions,
                jobs,
            },
        );
        Ok(())
    }

    pub fn get(&self, number: ReleaseNumber) -> Option<&Prepared> {
        self.0.get(&number)
    }

    pub fn retain(&mut self, keep: impl Fn(ReleaseNumber) -> bool) {
        self.0.retain(|number, _| keep(*number));
    }

    /// The service as the release that started `instance` has it.
    pub fn service_of(&self, instance: &Instance) -> Option<&ReleasedService> {
        self.get(instance.release)?
            .release
            .services
            .get(&instance.service)
    }
}

/// Everything the planner knows of one environment; stored whole after every step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct World {
    pub environment: EnvironmentName,
    pub generation: Generation,
    pub goal: Goal,
    /// The release that last proved itself: where a failed rollout returns to.
    pub proven: Option<ReleaseNumber>,
    pub rollout: Option<Rollout>,
    /// The release that traffic moved to last, as long as it is judged by how it does, or
    /// the one before it is kept ready.
    #[serde(default)]
    pub watch: Option<Watch>,
    pub instances: Instances,
    /// Jobs that have succeeded, by the digest of the release they ran for.
    pub jobs_done: BTreeSet<(Digest, ServiceName)>,
    /// Ends and failures since a copy last proved itself.
    #[serde(with = "attempts_as_list")]
    pub attempts: Attempts,
    pub layout: Layout,
    /// The table the proxy last confirmed.
    pub routes: Option<Arc<RoutingTable>>,
    /// It may follow another one, or none: it must be told anew before anything is done
    /// that relies on it.
    #[serde(default)]
    pub routes_doubtful: bool,
    /// Published ports that could not be opened, in words; cleared by the next table.
    #[serde(default)]
    pub ports_failed: Option<String>,
    /// Counts instances ever made here; part of their ids.
    pub counter: u64,
    /// Networks stand as the layout says.
    pub networks_ready: bool,
    /// Counts what was wanted of them: only the answer to the latest is believed.
    #[serde(default)]
    pub networks_wish: u64,
    /// How the last rollout ended, until that is recorded.
    #[serde(default)]
    pub concluding: Option<Conclusion>,
    /// Effects handed out whose outcome is not known yet, and when it is taken for lost.
    /// Not kept over a restart.
    #[serde(skip)]
    pub under_way: BTreeMap<EffectKey, Millis>,
    /// What later counts of the proxy's are compared with.
    #[serde(default)]
    pub marks: Marks,
    /// The proxy's last counts. Not kept over a restart.
    #[serde(skip)]
    pub measured: Measured,
}

/// The proxy's counts as they were, for the release on its way or watched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// When the rollout, or the present step of its canary, began.
    pub start: BTreeMap<InstanceId, Traffic>,
    /// How the services that it changes did before any traffic moved.
    pub before: BTreeMap<ServiceName, Traffic>,
}

/// What has last been told of traffic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Counts the questions: only the answer to the latest is believed.
    pub number: u64,
    pub at: Option<Millis>,
    pub traffic: BTreeMap<InstanceId, Traffic>,
    /// Prometheus' answers in the present step, and when they came.
    pub queried: BTreeMap<ServiceName, (Millis, Result<f64, String>)>,
}

/// What should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    Nothing,
    Release(ReleaseNumber),
}

impl Goal {
    pub fn release(self) -> Option<ReleaseNumber> {
        match self {
            Goal::Nothing => None,
            Goal::Release(number) => Some(number),
        }
    }
}

/// A change of the goal that has not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    pub to: Goal,
    pub from: Option<ReleaseNumber>,
    pub started: Millis,
    pub state: RolloutState,
    /// It goes back to an earlier release: `rollback_config` says how.
    #[serde(default)]
    pub rollback: bool,
    /// Why nothing is moved or concluded until somebody says so.
    #[serde(default)]
    pub paused: Option<String>,
    /// Somebody said that what is left of the verdict is not to be waited for.
    #[serde(default)]
    pub promoted: bool,
    /// Traffic has begun to move.
    #[serde(default)]
    pub moved: bool,
    /// How far traffic has moved, where it moves step by step.
    #[serde(default)]
    pub canary: Canary,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// Counts from 0; as many as there are steps: it is through.
    pub step: u32,
    /// The proxy has split traffic as the step says since then.
    pub since: Option<Millis>,
    /// Of the steps that have ended.
    pub verdicts: Vec<StepVerdict>,
}

impl Canary {
    /// When its last step ended.
    pub(crate) fn ended_at(&self) -> Option<Millis> {
        self.verdicts.last().map(|verdict| verdict.at)
    }
}

/// How a step of a canary ended, and the numbers that it was judged by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepVerdict {
    pub at: Millis,
    /// Percent of each service's traffic.
    pub weights: BTreeMap<ServiceName, u8>,
    pub good: bool,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum RolloutState {
    /// New instances are being started and proven, then traffic moves to them.
    Proving,
    /// Traffic has moved; how the new instances do decides ([`Watch`]).
    Watching,
    /// Something failed; the goal is where it came from.
    Returning {
        cause: String,
        instance: Option<InstanceId>,
    },
}

/// The time after a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    pub release: ReleaseNumber,
    /// What served before, and serves again if this one fails.
    pub back: Option<ReleaseNumber>,
    /// All traffic had moved.
    pub since: Millis,
    /// The rollout is over then, if the file asks for a verdict.
    pub until: Millis,
    /// Somebody went back to an earlier release.
    pub rollback: bool,
}

/// One running copy, as far as known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub service: ServiceName,
    pub release: ReleaseNumber,
    pub revision: Digest,
    pub index: u32,
    pub job: bool,
    /// One per network, in the order of the service's networks.
    pub addresses: BTreeMap<NetworkName, Ipv4Addr>,
    /// Instances of other services whose namespaces it shares: it goes when they go.
    #[serde(default)]
    pub joined: BTreeMap<ServiceName, InstanceId>,
    pub phase: Phase,
    pub health: Health,
    /// Someone ran a command in it: it may differ from its release.
    #[serde(default)]
    pub tainted: bool,
    pub created: Millis,
}

impl Instance {
    pub(crate) fn is_sick(&self) -> bool {
        matches!(self.health, Health::Unhealthy { .. })
    }
}

/// Where an instance is in its life; it only ever moves down this list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    Starting,
    /// Runs, not proven yet.
    Warming {
        since: Millis,
    },
    /// Proven; takes traffic when the routes say so.
    Ready {
        since: Millis,
    },
    /// Takes no new traffic; what it holds goes on.
    Draining,
    Stopping,
    /// Ended by itself, or was found dead.
    Ended {
        status: ExitStatus,
        at: Millis,
    },
    /// Its process is gone; what is left of it is being removed.
    Removing,
}

impl Phase {
    /// A process of it may be running.
    pub fn alive(&self) -> bool {
        !matches!(self, Phase::Ended { .. } | Phase::Removing)
    }

    pub fn ready(&self) -> bool {
        matches!(self, Phase::Ready { .. })
    }

    /// On its way to serving, or serving.
    pub fn rising(&self) -> bool {
        matches!(
            self,
            Phase::Starting | Phase::Warming { .. } | Phase::Ready { .. }
        )
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "health")]
pub enum Health {
    #[default]
    Unknown,
    Healthy,
    Unhealthy {
        reason: String,
    },
}

/// How often a copy has failed in a row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub failures: u32,
    pub last: Millis,
    pub cause: String,
    /// It ended and its restart policy says to leave it.
    pub finished: bool,
    /// It had all the time it may take to get ready: another try in this rollout would only
    /// take as long again.
    #[serde(default)]
    pub timed_out: bool,
    /// The last end was a success.
    #[serde(default)]
    pub well: bool,
}

/// By service, index and revision: while one release replaces another, each has its own.
pub type Attempts = BTreeMap<(ServiceName, u32, Digest), Attempt>;

impl Watch {
    /// Its whole time from now on.
    pub(crate) fn begin_anew(&mut self, now: Millis) {
        let span = self.until.saturating_sub(self.since);
        (self.since, self.until) = (now, now.saturating_add(span));
    }
}

impl Attempt {
    /// The next copy may be started then.
    pub(crate) fn next(&self) -> Millis {
        self.last.saturating_add(backoff(self.failures))
    }
}

/// Addresses handed out in this environment; they outlive instances.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub networks: BTreeMap<NetworkName, BridgeNetwork>,
    /// Networks of another environment's, with this one's share of them.
    #[serde(default)]
    pub shares: BTreeMap<NetworkName, u32>,
    /// Stable service addresses.
    pub services: BTreeMap<NetworkName, BTreeMap<ServiceName, Ipv4Addr>>,
    /// Host ports chosen where the file leaves them open: `<service>/<target>/<protocol>`.
    pub host_ports: BTreeMap<String, u16>,
}

impl Layout {
    /// Addresses for instances on a network, as numbers in its subnet.
    pub(crate) fn instance_range(&self, network: &NetworkName) -> Option<Range<u32>> {
        let share = self.shares.get(network).copied();
        Some(self.networks.get(network)?.instances(share))
    }
}

impl Rollout {
    pub(crate) fn proving(&self) -> bool {
        self.state == RolloutState::Proving
    }

    /// Nothing has turned back yet.
    pub(crate) fn hopeful(&self) -> bool {
        !matches!(self.state, RolloutState::Returning { .. })
    }
}

impl World {
    pub fn new(environment: EnvironmentName) -> Self {
        Self {
            environment,
            generation: Generation(0),
            goal: Goal::Nothing,
            proven: None,
            rollout: None,
            watch: None,
            instances: Instances::default(),
            jobs_done: BTreeSet::new(),
            attempts: Attempts::new(),
            layout: Layout::default(),
            routes: None,
            routes_doubtful: false,
            ports_failed: None,
            counter: 0,
            networks_ready: false,
            networks_wish: 0,
            concluding: None,
            under_way: BTreeMap::new(),
            marks: Marks::default(),
            measured: Measured::default(),
        }
    }

    /// Forgets what cannot be known any more after a restart of the caller: what was
    /// under way, and whether networks and routes still stand.
    pub fn recovered(mut self) -> Self {
        self.under_way.clear();
        self.networks_ready = false;
        self.routes_doubtful = true;
        self
    }

    /// Equal but for what is not stored.
    pub(crate) fn stored_alike(&self, other: &World) -> bool {
        let Self {
            environment,
            generation,
            goal,
            proven,
            rollout,
            watch,
            instances,
            jobs_done,
            attempts,
            layout,
            routes,
            routes_doubtful,
            ports_failed,
            counter,
            networks_ready,
            networks_wish,
            concluding,
            under_way: _,
            marks,
            measured: _,
        } = self;
        *instances == other.instances
            && *generation == other.generation
            && *counter == other.counter
            && *goal == other.goal
            && *proven == other.proven
            && *rollout == other.rollout
            && *watch == other.watch
            && *concluding == other.concluding
            && *marks == other.marks
            && *attempts == other.attempts
            && *jobs_done == other.jobs_done
            && *routes == other.routes
            && *routes_doubtful == other.routes_doubtful
            && *layout == other.layout
            && *ports_failed == other.ports_failed
            && *networks_ready == other.networks_ready
            && *networks_wish == other.networks_wish
            && *environment == other.environment
    }

    /// The clock was set back: a wait that began in the future would last for ever.
    pub(crate) fn forget_the_future(&mut self, now: Millis) {
        let clamp = |at: &mut Millis| *at = (*at).min(now);
        for instance in self.instances.values_mut() {
            clamp(&mut instance.created);
            match &mut instance.phase {
                Phase::Warming { since } | Phase::Ready { since } => clamp(since),
                Phase::Ended { at, .. } => clamp(at),
                _ => {}
            }
        }
        for attempt in self.attempts.values_mut() {
            clamp(&mut attempt.last);
        }
        if let Some(rollout) = &mut self.rollout {
            clamp(&mut rollout.started);
            rollout.canary.since.iter_mut().for_each(clamp);
            for verdict in &mut rollout.canary.verdicts {
                clamp(&mut verdict.at);
            }
        }
        self.measured.at.iter_mut().for_each(clamp);
        if let Some(watch) = self.watch.as_mut().filter(|w| w.since > now) {
            watch.begin_anew(now);
        }
    }

    /// The releases this world needs to be planned.
    pub fn needed_releases(&self) -> BTreeSet<ReleaseNumber> {
        let rollout = self.rollout.iter().flat_map(|r| [r.to.release(), r.from]);
        self.instances
            .values()
            .map(|i| i.release)
            .chain(rollout.flatten())
            .chain(
                self.watch
                    .iter()
                    .flat_map(|w| [Some(w.release), w.back])
                    .flatten(),
            )
            .chain(self.goal.release())
            .chain(self.proven)
            .collect()
    }

    /// Nothing is left to do and nothing is failing.
    pub fn settled(&self) -> bool {
        self.rollout.is_none()
            && self.watch.is_none()
            && self.concluding.is_none()
            && self
                .under_way
                .keys()
                .all(|key| matches!(key, EffectKey::Observe(_)))
            && self.instances.values().all(|i| i.phase.ready())
    }

    pub fn of_service<'a>(
        &'a self,
        service: &ServiceName,
    ) -> impl Iterator<Item = (&'a InstanceId, &'a Instance)> + use<'a> {
        self.instances.of_service(service)
    }

    /// What has happened to copies of this number and revision.
    pub(crate) fn attempt(
        &self,
        service: &ServiceName,
        index: u32,
        revision: Option<&Digest>,
    ) -> Option<&Attempt> {
        self.attempts.get(&(service.clone(), index, *revision?))
    }

    /// On the way to an earlier release, by wish or after a failure.
    pub(crate) fn goes_back(&self) -> bool {
        match &self.rollout {
            Some(rollout) => rollout.rollback || !rollout.hopeful(),
            None => self.watch.is_some_and(|w| w.rollback),
        }
    }

    /// It is of this revision, and those whose namespaces it shares are still there.
    pub(crate) fn is_current(&self, instance: &Instance, revision: Option<&Digest>) -> bool {
        revision == Some(&instance.revision)
            && instance.joined.values().all(|id| {
                let other = self.instances.get(id);
                other.is_some_and(|other| other.phase.rising())
            })
    }

    /// Instances the proxy sends new traffic to.
    pub fn routed(&self, id: &InstanceId) -> bool {
        let Some(table) = &self.routes else {
            return false;
        };
        let has = |route: &ServiceRoute| route.backends.iter().any(|b| &b.instance == id);
        match self.instances.get(id) {
            Some(instance) => table.services.get(&instance.service).is_some_and(has),
            None => table.services.values().any(has),
        }
    }
}

mod attempts_as_list {
    use super::{Attempt, Attempts, Digest, ServiceName};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Listed<A> {
        #[serde(flatten)]
        attempt: A,
        revision: Digest,
    }

    pub fn serialize<S: Serializer>(map: &Attempts, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map.iter().map(|((name, index, revision), attempt)| {
            let revision = *revision;
            ((name, index), Listed { attempt, revision })
        }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Attempts, D::Error> {
        let list = Vec::<((ServiceName, u32), Listed<Attempt>)>::deserialize(deserializer)?;
        let entry = |((name, index), listed): (_, Listed<_>)| {
            ((name, index, listed.revision), listed.attempt)
        };
        Ok(list.into_iter().map(entry).collect())
    }
}
