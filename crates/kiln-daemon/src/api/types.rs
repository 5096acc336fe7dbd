//! The API's bodies: what the CLI, other programs and the OpenAPI document speak of.

use std::collections::BTreeMap;

use kiln_model::network::Subnet;
use kiln_model::release::{Outcome, Reason};
use kiln_model::spec::CanaryStep;
use kiln_model::{
    Digest, EnvironmentName, InstanceId, Millis, NetworkName, Release, ReleaseNumber, ServiceName,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The daemon itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DaemonStatus {
    pub version: String,
    pub pid: u32,
    /// systemd started it, and starts it again when it ends.
    #[serde(default)]
    pub supervised: bool,
    /// KILN_ROOT.
    pub root: String,
    /// Milliseconds since the epoch.
    pub since: u64,
    pub proxy_pid: Option<u32>,
    #[schema(value_type = Vec<String>)]
    pub environments: Vec<EnvironmentName>,
}

/// Asks for a release to be rolled out.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReleaseRequest {
    #[schema(value_type = Object)]
    pub release: Release,
    /// Login name of whoever asks.
    pub by: String,
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What became of the request.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReleaseAnswer {
    #[schema(value_type = u64)]
    pub number: ReleaseNumber,
    #[schema(value_type = String)]
    pub digest: Digest,
    /// The environment already runs exactly this: nothing is done.
    pub unchanged: bool,
    /// Events after this one are about this rollout.
    pub after_event: u64,
    pub outline: Vec<OutlineLine>,
}

/// What a rollout does to one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OutlineLine {
    #[schema(value_type = String)]
    pub service: ServiceName,
    pub action: String,
    pub why: String,
    /// Of its traffic, where it moves step by step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub steps: Vec<CanaryStep>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RollbackRequest {
    /// `None`: the one that was proven before the present one.
    #[schema(value_type = Option<u64>)]
    pub to: Option<ReleaseNumber>,
    pub by: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DownRequest {
    pub by: String,
}

/// A network to be made that belongs to no environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NetworkRequest {
    #[schema(value_type = String)]
    pub name: NetworkName,
    /// `a.b.c.d/n`; `None`: a free one.
    #[schema(value_type = Option<String>)]
    pub subnet: Option<Subnet>,
    /// No way out of it.
    pub internal: bool,
    pub by: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NetworkLine {
    pub name: String,
    #[schema(value_type = String)]
    pub subnet: Subnet,
    pub internal: bool,
    pub bridge: String,
    /// Whose it is; `None`: nobody's.
    #[schema(value_type = Option<String>)]
    pub environment: Option<EnvironmentName>,
    /// Environments that use it now.
    pub used_by: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExecNotice {
    pub by: String,
    pub command: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EnvironmentStatus {
    #[schema(value_type = String)]
    pub environment: EnvironmentName,
    /// The release that is wanted.
    #[schema(value_type = Option<u64>)]
    pub goal: Option<ReleaseNumber>,
    /// The release that last proved itself.
    #[schema(value_type = Option<u64>)]
    pub proven: Option<ReleaseNumber>,
    /// The release that traffic goes to; of one that is watched the verdict may be open.
    #[schema(value_type = Option<u64>)]
    pub serving: Option<ReleaseNumber>,
    pub rollout: Option<RolloutStatus>,
    /// The time after the last switch, while it lasts.
    #[serde(default)]
    pub watch: Option<WatchStatus>,
    pub services: Vec<ServiceStatus>,
    /// Ports that could not be opened, if any.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RolloutStatus {
    #[schema(value_type = Option<u64>)]
    pub to: Option<ReleaseNumber>,
    #[schema(value_type = Option<u64>)]
    pub from: Option<ReleaseNumber>,
    /// `proving`, `moving` (traffic), `canary` (it moves step by step), `watching`, `paused`,
    /// `returning`.
    pub state: String,
    /// Why it waits for `kiln rollout resume`, `promote` or `abort`.
    pub paused: Option<String>,
    /// Why it turns back, if it does.
    pub failed: Option<String>,
    pub report: Vec<String>,
    /// Where traffic moves step by step.
    #[serde(default)]
    pub canary: Option<CanaryStatus>,
}

/// How far traffic has moved, and how the steps so far ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CanaryStatus {
    /// Counts from 1; `None`: there is no step any more.
    pub step: Option<usize>,
    pub steps: Option<usize>,
    /// Percent of each service's traffic that the new instances get.
    #[schema(value_type = Object)]
    pub weights: BTreeMap<ServiceName, u8>,
    /// Milliseconds until the step is judged; `None`: traffic is not yet split so.
    pub verdict_in: Option<u64>,
    pub verdicts: Vec<StepVerdictLine>,
}

/// How a canary's step ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StepVerdictLine {
    #[schema(value_type = Object)]
    pub weights: BTreeMap<ServiceName, u8>,
    pub good: bool,
    /// The numbers that it was judged by.
    pub text: String,
}

/// A release is judged by how it does, or the one before is kept ready.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WatchStatus {
    #[schema(value_type = u64)]
    pub release: ReleaseNumber,
    /// What would serve again.
    #[schema(value_type = Option<u64>)]
    pub back: Option<ReleaseNumber>,
    /// When all traffic had moved.
    pub since: u64,
    /// Milliseconds until the rollout is over; 0: nobody waits for it.
    pub verdict_in: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ServiceStatus {
    #[schema(value_type = String)]
    pub service: ServiceName,
    /// `serving`, `starting`, `completed`, `parked`, `down`.
    pub state: String,
    pub image: String,
    /// `127.0.0.1:8080 → 80/tcp`.
    pub ports: Vec<String>,
    pub instances: Vec<InstanceStatus>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    #[schema(value_type = String)]
    pub id: InstanceId,
    /// The release that started it.
    #[schema(value_type = u64)]
    pub release: ReleaseNumber,
    /// Of the goal's revision.
    pub current: bool,
    pub phase: String,
    pub health: String,
    pub serving: bool,
    /// What the proxy has counted; unknown where nothing was ever sent to it.
    #[serde(default)]
    pub traffic: Option<Traffic>,
    /// Milliseconds since the epoch.
    pub since: u64,
    pub pid: Option<u32>,
    /// Its root is read-only by design.
    pub sealed: bool,
    pub tainted: bool,
    /// How it differs from its release, in words; empty: not at all.
    pub drift: Vec<String>,
    pub warnings: Vec<String>,
}

/// What one instance did for its callers, since the proxy first knew it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Traffic {
    /// Requests (HTTP) and connections (everything else) that came to it.
    pub served: u64,
    /// Of these, what it holds now.
    pub in_flight: u64,
}

/// A line of an environment's history.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReleaseLine {
    #[schema(value_type = u64)]
    pub number: ReleaseNumber,
    #[schema(value_type = String)]
    pub digest: Digest,
    pub created: u64,
    pub by: String,
    #[schema(value_type = Object)]
    pub reason: Reason,
    #[schema(value_type = Object)]
    pub outcome: Outcome,
    /// It is what serves.
    pub serving: bool,
}

/// Something that happened in an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EventRecord {
    /// Rises; 0 before it is stored.
    #[serde(default)]
    pub id: u64,
    #[schema(value_type = u64)]
    pub time: Millis,
    #[schema(value_type = String)]
    pub environment: EnvironmentName,
    #[schema(value_type = Option<String>)]
    pub service: Option<ServiceName>,
    #[schema(value_type = Option<String>)]
    pub instance: Option<InstanceId>,
    pub kind: EventKind,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum EventKind {
    Note,
    /// An instance's phase changed.
    Instance {
        phase: String,
    },
    /// A rollout began.
    Rollout,
    /// A rollout is over and the new release serves, or all is down.
    Succeeded,
    /// A rollout is over and what ran before serves again.
    Failed {
        /// The last lines the failing instance printed.
        log: Vec<String>,
    },
    /// Something failed, and the rollout waits for somebody to say how to go on.
    Paused,
    Warning,
}

/// Every error's body.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ApiErrorBody {
    /// `not_found`, `conflict`, `invalid`, `internal`.
    pub kind: String,
    pub message: String,
    pub hint: Option<String>,
}

/// What `kiln explain` shows.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    #[schema(value_type = String)]
    pub id: InstanceId,
    pub facts: BTreeMap<String, Vec<String>>,
}
