//! Writes what happened into the world. Events may come late, twice, or for things
//! long gone: each changes only what it can still be about.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_model::instance::{ExitStatus, Observed, ObservedState};
use kiln_model::{InstanceId, Millis};

use crate::effect::{Conclusion, EffectKey, Event};
use crate::world::{
    Attempt, Canary, Goal, Health, Instance, Layout, Marks, Phase, Rollout, RolloutState, World,
};

/// Takes one event in. Nothing is planned here.
pub fn apply(world: &mut World, event: Event, now: Millis) {
    match event {
        Event::Desired {
            goal,
            layout,
            rollback,
        } => desire(world, (goal, rollback), layout, now),
        Event::Abandoned { why } => fail_rollout(world, format!("given up: {why}"), None),
        Event::Paused { why } => {
            if let Some(rollout) = world.rollout.as_mut().filter(|r| r.hopeful()) {
                rollout.paused = Some(why);
            }
        }
        Event::Resumed => resume(world, now),
        Event::Promoted => promote(world),
        Event::Found { instances } => found(world, instances, now),
        Event::NetworksReady { wish } => {
            if wish == world.networks_wish {
                world.under_way.remove(&EffectKey::Networks);
                world.networks_ready = true;
            }
        }
        Event::Started { id } => {
            world.under_way.remove(&EffectKey::Start(id.clone()));
            with(world, &id, |i| {
                if i.phase == Phase::Starting {
                    i.phase = Phase::Warming { since: now };
                }
            });
        }
        Event::StartFailed { id, cause } => {
            world.under_way.remove(&EffectKey::Start(id.clone()));
            start_failed(world, &id, cause, now);
        }
        Event::Ready { id } => with(world, &id, |i| {
            if matches!(i.phase, Phase::Warming { .. }) {
                i.phase = Phase::Ready { since: now };
                i.health = Health::Healthy;
            }
        }),
        Event::Healthy { id } => with(world, &id, |i| i.health = Health::Healthy),
        Event::Unhealthy { id, reason } => {
            // A hook of its start has failed.
            world.under_way.remove(&EffectKey::Start(id.clone()));
            unhealthy(world, &id, reason, now);
        }
        Event::Exited { id, status } => {
            world.under_way.remove(&EffectKey::Stop(id.clone()));
            world.under_way.remove(&EffectKey::Observe(id.clone()));
            end(world, &id, status, now);
        }
        Event::Routed { table, failed } => {
            // A late answer says nothing about the table in force.
            if table.generation != world.generation {
                return;
            }
            world.under_way.remove(&EffectKey::Route);
            world.routes = Some(Arc::new(table));
            world.routes_doubtful = false;
            if let Some(cause) = &failed {
                fail_rollout(world, cause.clone(), None);
            }
            world.ports_failed = failed;
        }
        Event::Measured { number, traffic } => {
            // A late answer may be older than the mark that it would be compared with.
            if number == world.measured.number {
                world.under_way.remove(&EffectKey::Measure);
                world.measured.at = Some(now);
                world.measured.traffic = traffic;
                if world.marks.start.is_empty() {
                    world.marks.start = world.measured.traffic.clone();
                }
            }
        }
        Event::Queried { service, value } => {
            world.under_way.remove(&EffectKey::Query(service.clone()));
            world.measured.queried.insert(service, (now, value));
        }
        Event::Drained { id } => {
            world.under_way.remove(&EffectKey::Drain(id.clone()));
            with(world, &id, |i| {
                if i.phase == Phase::Draining {
                    i.phase = Phase::Stopping;
                }
            });
        }
        Event::Removed { id } => {
            world.instances.remove(&id);
            world
                .under_way
                .retain(|key, _| key_instance(key) != Some(&id));
        }
        Event::Failed { key, .. } => {
            // It may have taken the table and failed to say so.
            world.routes_doubtful |= key == EffectKey::Route;
            world.under_way.remove(&key);
        }
        Event::Tainted { id } => with(world, &id, |i| i.tainted = true),
        Event::ProxyRestarted => {
            world.networks_ready = false;
            world.routes_doubtful = true;
        }
        Event::Concluded { conclusion } => {
            if world.concluding.as_ref() == Some(&conclusion) {
                world.under_way.remove(&EffectKey::Conclude);
                world.concluding = None;
            }
        }
        Event::Tick => {}
    }
}

/// A rollout's end; its conclusion stays in the world until it has been recorded.
pub(crate) fn conclude(world: &mut World, conclusion: Conclusion) {
    match &conclusion {
        Conclusion::Proven { release } => world.proven = Some(*release),
        Conclusion::Down => world.proven = None,
        Conclusion::Failed { .. } | Conclusion::Stayed { .. } => {}
    }
    world.rollout = None;
    world.concluding = Some(conclusion);
    if world.goal == Goal::Nothing {
        // The caller takes the networks down with the environment.
        world.networks_ready = false;
        world.networks_wish += 1;
    }
}

/// Ends the rollout's hope: the goal turns back to where it came from.
pub(crate) fn fail_rollout(world: &mut World, cause: String, instance: Option<InstanceId>) {
    let Some(rollout) = &mut world.rollout else {
        return;
    };
    if !rollout.hopeful() {
        return;
    }
    world.goal = rollout.from.map_or(Goal::Nothing, Goal::Release);
    rollout.state = RolloutState::Returning { cause, instance };
    rollout.paused = None;
    world.watch = None;
    world.attempts.clear();
}

/// What failed before the pause is not held against the release any more.
fn resume(world: &mut World, now: Millis) {
    let paused = world.rollout.as_mut().filter(|r| r.paused.is_some());
    let Some(rollout) = paused else {
        return;
    };
    rollout.paused = None;
    rollout.canary.since = None;
    world.marks.start.clear();
    world.measured.at = None;
    if let Some(watch) = &mut world.watch {
        watch.begin_anew(now);
    }
}

fn promote(world: &mut World) {
    match &mut world.rollout {
        Some(rollout) if rollout.hopeful() => {
            rollout.paused = None;
            rollout.promoted = true;
        }
        Some(_) => {}
        None => world.watch = None,
    }
}

fn desire(world: &mut World, (goal, rollback): (Goal, bool), layout: Layout, now: Millis) {
    if world.layout.networks != layout.networks {
        world.networks_ready = false;
        world.under_way.remove(&EffectKey::Networks);
    }
    world.layout = layout;
    world.attempts.clear();
    world.watch = None;
    world.marks = Marks::default();
    let from = world.proven;
    world.goal = goal;
    world.rollout = Some(Rollout {
        to: goal,
        from,
        started: now,
        state: RolloutState::Proving,
        rollback,
        paused: None,
        promoted: false,
        moved: false,
        canary: Canary::default(),
    });
}

fn found(world: &mut World, observed: Vec<Observed>, now: Millis) {
    let mut observed: BTreeMap<_, _> = observed.into_iter().map(|o| (o.id, o.state)).collect();
    let ids: Vec<InstanceId> = world.instances.keys().cloned().collect();
    for id in ids {
        let state = observed.remove(&id);
        let Some(instance) = world.instances.get_mut(&id) else {
            continue;
        };
        // Its start may still bring it up: until that is told nothing is lost.
        let starting = world.under_way.contains_key(&EffectKey::Start(id.clone()));
        match (state, &instance.phase) {
            (None | Some(ObservedState::Dead | ObservedState::Starting), _) if starting => {}
            (Some(ObservedState::Running { .. }), _) => {}
            // Starting again under the same id is safe: the runtime finishes or redoes it,
            // and hooks that may not have come to their end are run.
            (None | Some(ObservedState::Dead | ObservedState::Starting), Phase::Starting) => {}
            (Some(ObservedState::Exited { status, at }), phase) if phase.alive() => {
                end(world, &id, status, at);
            }
            (None | Some(ObservedState::Dead | ObservedState::Starting), phase)
                if phase.alive() =>
            {
                lost(world, &id, now);
            }
            _ => {}
        }
    }
}

/// It was running and is gone with nobody to tell how: a reboot, or its shim was killed.
/// That says nothing against it, so it does not count as a failure of its own.
fn lost(world: &mut World, id: &InstanceId, now: Millis) {
    with(world, id, |i| {
        i.phase = match i.phase {
            Phase::Stopping => Phase::Removing,
            _ => Phase::Ended {
                status: ExitStatus::Unknown,
                at: now,
            },
        }
    });
}

fn unhealthy(world: &mut World, id: &InstanceId, reason: String, now: Millis) {
    let Some(instance) = world.instances.get_mut(id) else {
        return;
    };
    match instance.phase {
        Phase::Starting | Phase::Warming { .. } => {
            let timed_out = instance.phase != Phase::Starting;
            instance.phase = Phase::Stopping;
            instance.health = Health::Unhealthy {
                reason: reason.clone(),
            };
            let instance = instance.clone();
            count_failure(world, &instance, None, reason, now).timed_out |= timed_out;
        }
        Phase::Ready { since } if instance.health == Health::Healthy => {
            instance.health = Health::Unhealthy {
                reason: reason.clone(),
            };
            let instance = instance.clone();
            count_failure(world, &instance, Some(since), reason, now);
        }
        _ => {}
    }
}

/// Something of it may run all the same, from an earlier try: that is ended first.
fn start_failed(world: &mut World, id: &InstanceId, cause: String, now: Millis) {
    let Some(instance) = world.instances.get_mut(id) else {
        return;
    };
    if instance.phase.rising() {
        instance.phase = Phase::Stopping;
        let instance = instance.clone();
        count_failure(world, &instance, None, cause, now);
    }
}

fn end(world: &mut World, id: &InstanceId, status: ExitStatus, now: Millis) {
    let Some(instance) = world.instances.get_mut(id) else {
        return;
    };
    match instance.phase {
        Phase::Draining | Phase::Stopping => instance.phase = Phase::Removing,
        ref phase @ (Phase::Starting | Phase::Warming { .. } | Phase::Ready { .. }) => {
            let ready_since = match phase {
                Phase::Ready { since } => Some(*since),
                _ => None,
            };
            instance.phase = Phase::Ended { status, at: now };
            let instance = instance.clone();
            if instance.job && status.success() {
                return;
            }
            if status != ExitStatus::Unknown {
                let cause = format!("it {status}");
                let attempt = count_failure(world, &instance, ready_since, cause, now);
                attempt.well = status.success();
            }
        }
        Phase::Ended { .. } | Phase::Removing => {}
    }
}

/// A copy that has served for this long has paid for its earlier failures.
const FORGIVEN_AFTER: Millis = Millis(30_000);

fn count_failure<'w>(
    world: &'w mut World,
    instance: &Instance,
    ready_since: Option<Millis>,
    cause: String,
    now: Millis,
) -> &'w mut Attempt {
    let attempt = world
        .attempts
        .entry((instance.service.clone(), instance.index, instance.revision))
        .or_default();
    let served = ready_since.map_or(Millis(0), |since| now.saturating_sub(since));
    if served >= FORGIVEN_AFTER {
        *attempt = Default::default();
    }
    attempt.failures += 1;
    attempt.last = now;
    attempt.cause = cause;
    attempt.well = false;
    attempt
}

fn with(world: &mut World, id: &InstanceId, change: impl FnOnce(&mut Instance)) {
    if let Some(instance) = world.instances.get_mut(id) {
        change(instance);
    }
}

fn key_instance(key: &EffectKey) -> Option<&InstanceId> {
    match key {
        EffectKey::Start(id)
        | EffectKey::Observe(id)
        | EffectKey::Drain(id)
        | EffectKey::Stop(id)
        | EffectKey::Remove(id) => Some(id),
        EffectKey::Networks
        | EffectKey::Route
        | EffectKey::Measure
        | EffectKey::Query(_)
        | EffectKey::Conclude => None,
    }
}
