//! What a rollout would do to each service, for people, before it is begun.

use kiln_model::ServiceName;
use kiln_model::spec::{CanaryStep, Strategy};
use serde::{Deserialize, Serialize};

use crate::canary::steps_of;
use crate::revision::replaced_with;
use crate::service::{is_exclusive, strategy};
use crate::world::Prepared;

/// How a service gets from one release to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Create,
    /// New copies beside the old, then traffic moves.
    Replace,
    /// One copy after the other, requests wait.
    Handoff,
    RunJob,
    /// Only counts or traffic settings differ.
    Adjust,
    Keep,
    Remove,
}

/// One service's line; `why` is empty where nothing changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub service: ServiceName,
    pub action: Action,
    pub why: String,
    /// Of its traffic, where it moves step by step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<CanaryStep>,
}

/// Services in the order of their names.
pub fn outline(from: Option<&Prepared>, to: &Prepared) -> Vec<Step> {
    let mut steps: Vec<Step> = to
        .release
        .services
        .keys()
        .map(|name| {
            let (action, why) = step(from, to, name);
            let steps = match action {
                Action::Replace => to.release.services.get(name).map_or(&[][..], steps_of),
                _ => &[],
            };
            Step {
                service: name.clone(),
                action,
                why,
                steps: steps.to_vec(),
            }
        })
        .collect();
    if let Some(from) = from {
        let gone = from
            .release
            .services
            .keys()
            .filter(|n| !to.release.services.contains_key(*n));
        steps.extend(gone.map(|name| Step {
            service: name.clone(),
            action: Action::Remove,
            why: "it is not in the new release".into(),
            steps: Vec::new(),
        }));
    }
    steps
}

fn step(from: Option<&Prepared>, to: &Prepared, name: &ServiceName) -> (Action, String) {
    let Some(new) = to.release.services.get(name) else {
        return (Action::Keep, String::new());
    };
    if to.is_job(name) {
        return match from.is_some_and(|f| f.digest == to.digest) {
            true => (Action::Keep, String::new()),
            false => (Action::RunJob, "once for each release".into()),
        };
    }
    let Some(old) = from.and_then(|f| f.release.services.get(name)) else {
        return (Action::Create, "it is new".into());
    };
    if from.and_then(|f| f.revisions.get(name)) == to.revisions.get(name) {
        return match old == new {
            true => (Action::Keep, String::new()),
            false => (
                Action::Adjust,
                "only counts or traffic settings differ".into(),
            ),
        };
    }
    let why = match (changes(old, new), taken_along(from, to, new)) {
        (parts, Some(other)) if parts.is_empty() => format!("`{other}` is replaced"),
        (parts, _) if parts.is_empty() => "its definition changed".into(),
        (parts, _) => format!("{} changed", parts.join(", ")),
    };
    let rollout = new.service.kiln.rollout.as_ref();
    let warm = rollout.is_some_and(|r| r.keep_warm.is_some());
    let canary = strategy(new) == Some(&Strategy::Canary);
    match is_exclusive(new) {
        true if canary => (
            Action::Handoff,
            format!("{why}; two copies must not overlap, so that its traffic has no steps"),
        ),
        true if warm => (
            Action::Handoff,
            format!("{why}; two copies must not overlap, so that none is kept warm"),
        ),
        true => (
            Action::Handoff,
            format!("{why}; two copies must not overlap"),
        ),
        false => (Action::Replace, why),
    }
}

/// The service whose replacement takes this one with it.
fn taken_along<'r>(
    from: Option<&Prepared>,
    to: &Prepared,
    new: &'r kiln_model::release::ReleasedService,
) -> Option<&'r ServiceName> {
    replaced_with(&new.service)
        .find(|other| from.and_then(|f| f.revisions.get(*other)) != to.revisions.get(*other))
}

/// Which parts differ, in words.
fn changes(
    old: &kiln_model::release::ReleasedService,
    new: &kiln_model::release::ReleasedService,
) -> Vec<&'static str> {
    let (o, n) = (&old.service, &new.service);
    let mut parts = Vec::new();
    let mut note = |differs: bool, what| {
        if differs {
            parts.push(what);
        }
    };
    note(old.image.digest != new.image.digest, "image");
    note(
        old.files != new.files || o.files != n.files,
        "configs or secrets",
    );
    note(
        o.process.environment != n.process.environment,
        "environment",
    );
    note(
        (&o.process.command, &o.process.entrypoint) != (&n.process.command, &n.process.entrypoint),
        "command",
    );
    note(o.mounts != n.mounts, "mounts");
    note(old.scratch != new.scratch, "scratch");
    note(o.network != n.network, "networks");
    note(o.limits != n.limits, "limits");
    note(o.security != n.security, "security");
    note(o.health != n.health, "health check");
    parts
}
