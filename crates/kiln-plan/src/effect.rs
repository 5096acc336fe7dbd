//! What can happen to an environment and what can be done about it.

use std::collections::BTreeMap;

use kiln_model::instance::{ExitStatus, Observed};
use kiln_model::network::BridgeNetwork;
use kiln_model::spec::Prometheus;
use kiln_model::{InstanceId, Millis, ReleaseNumber, RoutingTable, ServiceName, Traffic};
use serde::{Deserialize, Serialize};

use crate::probe::ProbePlan;
use crate::world::{Goal, Layout};

/// Something that happened, as the caller observed it.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Someone wants another release (or nothing) to run. `layout` has addresses and
    /// ports for it.
    Desired {
        goal: Goal,
        layout: Layout,
        /// It is the content of an earlier release.
        rollback: bool,
    },
    /// The rollout is to be given up.
    Abandoned {
        why: String,
    },
    /// Nothing of the rollout is to move, or to be concluded, until it is resumed.
    Paused {
        why: String,
    },
    Resumed,
    /// What is left of the rollout's verdict is not to be waited for; after it: the old
    /// instances need not be kept.
    Promoted,
    /// What the runtime really holds for this environment. Newer than every outcome
    /// told before it: the caller looks while it takes nothing else in.
    Found {
        instances: Vec<Observed>,
    },
    /// The networks of this [`Effect::EnsureNetworks`] stand.
    NetworksReady {
        wish: u64,
    },
    Started {
        id: InstanceId,
    },
    StartFailed {
        id: InstanceId,
        cause: String,
    },
    /// Proven: may take traffic.
    Ready {
        id: InstanceId,
    },
    Healthy {
        id: InstanceId,
    },
    /// Its health check failed as often as it may, it never got ready in time, or a
    /// `post_start` hook failed.
    Unhealthy {
        id: InstanceId,
        reason: String,
    },
    Exited {
        id: InstanceId,
        status: ExitStatus,
    },
    /// The proxy follows this table; `failed` says which ports it could not open.
    Routed {
        table: RoutingTable,
        failed: Option<String>,
    },
    Drained {
        id: InstanceId,
    },
    /// What the proxy has counted of each instance, as asked for by this
    /// [`Effect::Measure`].
    Measured {
        number: u64,
        traffic: BTreeMap<InstanceId, Traffic>,
    },
    /// Prometheus' answer about a service's release.
    Queried {
        service: ServiceName,
        value: Result<f64, String>,
    },
    Removed {
        id: InstanceId,
    },
    /// An effect could not be carried out; it will be planned again.
    Failed {
        key: EffectKey,
        cause: String,
    },
    Tainted {
        id: InstanceId,
    },
    /// A rollout's end has been recorded.
    Concluded {
        conclusion: Conclusion,
    },
    /// The proxy is another process than before: it must be told everything again.
    ProxyRestarted,
    /// Time has passed.
    Tick,
}

/// One thing to do. Carrying one out twice does no harm.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    EnsureNetworks {
        networks: Vec<BridgeNetwork>,
        /// An answer to an earlier one says nothing: they may have gone since.
        wish: u64,
    },
    /// Start it and run its `post_start` hooks.
    Start {
        id: InstanceId,
    },
    /// Watch it: tell when it is ready, and from then on when its health changes.
    Observe {
        id: InstanceId,
        probe: ProbePlan,
    },
    Route(RoutingTable),
    /// Ask the proxy what it has counted of these.
    Measure {
        number: u64,
        instances: Vec<InstanceId>,
    },
    Query {
        service: ServiceName,
        prometheus: Prometheus,
    },
    /// Tell when nothing uses it any more, or the limit has passed.
    Drain {
        id: InstanceId,
        limit: Millis,
    },
    /// Run its `pre_stop` hooks and end it.
    Stop {
        id: InstanceId,
        signal: String,
        grace: Millis,
    },
    Remove {
        id: InstanceId,
    },
    /// A rollout has come to its end: to be recorded and told.
    Conclude(Conclusion),
}

impl Effect {
    pub fn key(&self) -> EffectKey {
        match self {
            Effect::EnsureNetworks { .. } => EffectKey::Networks,
            Effect::Start { id } => EffectKey::Start(id.clone()),
            Effect::Observe { id, .. } => EffectKey::Observe(id.clone()),
            Effect::Route(_) => EffectKey::Route,
            Effect::Measure { .. } => EffectKey::Measure,
            Effect::Query { service, .. } => EffectKey::Query(service.clone()),
            Effect::Drain { id, .. } => EffectKey::Drain(id.clone()),
            Effect::Stop { id, .. } => EffectKey::Stop(id.clone()),
            Effect::Remove { id } => EffectKey::Remove(id.clone()),
            Effect::Conclude(_) => EffectKey::Conclude,
        }
    }
}

/// Identifies an effect under way; at most one of each key is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EffectKey {
    Networks,
    Start(InstanceId),
    Observe(InstanceId),
    Route,
    Measure,
    Query(ServiceName),
    Drain(InstanceId),
    Stop(InstanceId),
    Remove(InstanceId),
    Conclude,
}

/// How a rollout ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "conclusion")]
pub enum Conclusion {
    Proven {
        release: ReleaseNumber,
    },
    /// The environment is empty, as wanted.
    Down,
    /// Taking everything down was given up: this release goes on.
    Stayed {
        release: ReleaseNumber,
        cause: String,
    },
    Failed {
        release: ReleaseNumber,
        cause: String,
        instance: Option<InstanceId>,
        /// What serves again; `None`: nothing did before.
        back: Option<ReleaseNumber>,
    },
}

impl Conclusion {
    /// The release whose rollout it ends.
    pub fn release(&self) -> Option<ReleaseNumber> {
        match self {
            Conclusion::Proven { release } | Conclusion::Failed { release, .. } => Some(*release),
            Conclusion::Down | Conclusion::Stayed { .. } => None,
        }
    }

    /// Nothing is left that needs the environment's networks: they are to go.
    pub fn empties(&self) -> bool {
        matches!(
            self,
            Conclusion::Down | Conclusion::Failed { back: None, .. }
        )
    }
}

/// What to do now, and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub effects: Vec<Effect>,
    pub report: Vec<ReportLine>,
    /// When to step again though nothing happened (milliseconds since the epoch).
    pub wake: Option<Millis>,
}

/// Why something is done, or not (yet).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportLine {
    pub service: Option<ServiceName>,
    pub text: String,
}

impl Effect {
    /// How long it may take at most; then its outcome is taken for lost and it is
    /// planned again. Watching goes on for as long as the instance does, but something
    /// must be heard of one that is not ready yet.
    pub fn patience(&self) -> Millis {
        const CALL: Millis = Millis(120_000);
        match self {
            Effect::EnsureNetworks { .. } | Effect::Start { .. } | Effect::Remove { .. } => CALL,
            Effect::Route(_) | Effect::Conclude(_) | Effect::Query { .. } => Millis(30_000),
            Effect::Measure { .. } => Millis(5_000),
            Effect::Drain { limit, .. } => limit.saturating_add(Millis(30_000)),
            Effect::Stop { grace, .. } => grace.saturating_add(CALL),
            Effect::Observe { probe, .. } => probe.deadline.saturating_add(Millis(30_000)),
        }
    }
}
