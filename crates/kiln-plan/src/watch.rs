//! The time after a switch: how long a release is judged by how it does, how many of its
//! copies may fail meanwhile, and which old instances are kept ready.

use kiln_model::Millis;
use kiln_model::release::ReleasedService;
use kiln_model::spec::{FailureAction, UpdateConfig};
use kiln_model::{ReleaseNumber, ServiceName};

use crate::canary;
use crate::handoff::held;
use crate::service::{is_exclusive, manner, restarts, stops_first};
use crate::world::{Instance, Phase, Prepared, Releases, Rollout, Watch, World};

/// Where the file says nothing.
const MONITOR: Millis = Millis(10_000);

/// The file says something of the time after the switch: the rollout is not over before.
fn is_asked_for(update: &UpdateConfig) -> bool {
    let off = update.monitor == Some(Millis(0));
    let stated = update.monitor.is_some()
        || update.failure_action.is_some()
        || update.max_failure_ratio.is_some();
    stated && !off
}

/// How long old copies of the service stay ready after the verdict was begun.
fn keep_warm(released: &ReleasedService) -> Millis {
    let rollout = released.service.kiln.rollout.as_ref();
    rollout.and_then(|r| r.keep_warm).unwrap_or_default()
}

/// The services of `to` whose instances are others than those of `back`.
pub(crate) fn changed<'r>(
    back: Option<&'r Prepared>,
    to: &'r Prepared,
) -> impl Iterator<Item = (&'r ServiceName, &'r ReleasedService)> {
    to.release.services.iter().filter(move |(name, _)| {
        let before = back.and_then(|b| b.revisions.get(*name));
        before != to.revisions.get(*name) && !to.is_job(name)
    })
}

/// How long the service is judged by how it does. Without a word of the file's, a first
/// release has nowhere to return to, and who goes back by hand does not want to be sent
/// forward again.
pub(crate) fn span(world: &World, watch: &Watch, released: &ReleasedService) -> Millis {
    let update = manner(world, released);
    let judged = is_asked_for(update) || (watch.back.is_some() && !watch.rollback);
    match update.monitor {
        Some(stated) => stated,
        None if judged => MONITOR,
        None => Millis(0),
    }
}

/// What begins when all traffic has moved, and whether the rollout waits for its end.
pub(crate) fn begins(
    world: &World,
    releases: &Releases,
    rollout: &Rollout,
    now: Millis,
) -> Option<(Watch, bool)> {
    let release = rollout.to.release()?;
    let to = releases.get(release)?;
    let back = rollout.from.and_then(|n| releases.get(n));
    let mut watch = Watch {
        release,
        back: rollout.from,
        since: now,
        until: now,
        rollback: rollout.rollback,
    };
    let asked = changed(back, to).filter(|(_, s)| is_asked_for(manner(world, s)));
    let asked = asked.map(|(_, s)| span(world, &watch, s)).max();
    watch.until = now.saturating_add(asked.unwrap_or_default());
    let any = end(world, back, &watch, to) > now;
    any.then_some((watch, asked.is_some()))
}

/// Copies of the release that have failed since, with the reason; not those that did
/// their work and rest.
pub(crate) fn failed<'w>(
    world: &'w World,
    to: &'w Prepared,
    since: Millis,
    name: &'w ServiceName,
    released: &'w ReleasedService,
) -> Vec<(u32, &'w str)> {
    let revision = to.revisions.get(name);
    let policy = &released.service.restart;
    (1..=released.service.replicas)
        .filter_map(|index| {
            let attempt = world.attempt(name, index, revision)?;
            let rests = attempt.well && !restarts(policy, false, attempt.failures);
            let counts = attempt.last > since && !rests;
            counts.then_some((index, attempt.cause.as_str()))
        })
        .collect()
}

/// So many failed copies are less than the file bears.
pub(crate) fn bearable(world: &World, released: &ReleasedService, failed: usize) -> bool {
    let ratio = manner(world, released).max_failure_ratio.unwrap_or(0);
    failed as u64 * 1000 <= u64::from(ratio) * u64::from(released.service.replicas)
}

/// What is to be done about more.
pub(crate) fn action(world: &World, released: &ReleasedService) -> FailureAction {
    let stated = manner(world, released).failure_action;
    stated.unwrap_or(FailureAction::Rollback)
}

/// The release being watched and the one that it would return to.
fn pair(world: &World) -> Option<(ReleaseNumber, ReleaseNumber, Option<Watch>)> {
    let goal = world.goal.release()?;
    if let Some(watch) = world.watch {
        return (watch.release == goal).then_some((goal, watch.back?, Some(watch)));
    }
    let rollout = world.rollout.as_ref().filter(|r| r.proving())?;
    Some((goal, rollout.from?, None))
}

/// It takes no traffic any more, and is kept ready to take it again at once.
pub(crate) fn is_warm(
    world: &World,
    releases: &Releases,
    instance: &Instance,
    now: Millis,
) -> bool {
    let Some((goal, back, watch)) = pair(world) else {
        return false;
    };
    let (Some(goal), Some(back)) = (releases.get(goal), releases.get(back)) else {
        return false;
    };
    let service = &instance.service;
    let (Some(new), Some(old)) = (
        goal.release.services.get(service),
        back.release.services.get(service),
    ) else {
        return false;
    };
    let fit = instance.phase.ready()
        && !instance.job
        && !instance.is_sick()
        && instance.index <= old.service.replicas
        && world.is_current(instance, back.revisions.get(service))
        && back.revisions.get(service) != goal.revisions.get(service);
    let stepping = canary::under_way(world, releases).is_some();
    let warm = stepping || warm_now(world, new, watch, now);
    fit && !is_exclusive(new) && !stops_first(world, new) && warm
}

fn warm_now(world: &World, new: &ReleasedService, watch: Option<Watch>, now: Millis) -> bool {
    let Some(watch) = watch else {
        return is_asked_for(manner(world, new)) || keep_warm(new) > Millis(0);
    };
    let judged = world.rollout.is_some() && is_asked_for(manner(world, new));
    judged || now < watch.since.saturating_add(keep_warm(new))
}

/// When the watch has nothing left to wait for.
pub(crate) fn end(world: &World, back: Option<&Prepared>, watch: &Watch, to: &Prepared) -> Millis {
    let times = changed(back, to).map(|(_, s)| span(world, watch, s).max(keep_warm(s)));
    let last = times.max().unwrap_or_default();
    watch.since.saturating_add(last).max(watch.until)
}

/// Copies that could not be proven and need not be, because the file bears it.
pub(crate) fn written_off(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
) -> usize {
    let over = crate::verdict::over(world, goal, name, released);
    let ready = |index: u32| {
        let new = crate::routes::current(world, goal, name);
        new.iter().any(|(_, i)| i.index == index && i.phase.ready())
    };
    match bearable_unproven(world, released, over.len()) && !held(world) {
        true => over.iter().filter(|(index, _)| !ready(*index)).count(),
        false => 0,
    }
}

/// As [`bearable`], of copies that were never proven: of none at all nothing is known.
pub(crate) fn bearable_unproven(world: &World, released: &ReleasedService, failed: usize) -> bool {
    bearable(world, released, failed) && failed < released.service.replicas as usize
}

/// The instance whose failure it was: its log says more.
pub(crate) fn culprit(
    world: &World,
    to: &Prepared,
    name: &ServiceName,
    index: u32,
) -> Option<kiln_model::InstanceId> {
    let revision = to.revisions.get(name);
    let copies = world
        .of_service(name)
        .filter(|(_, i)| i.index == index && Some(&i.revision) == revision);
    copies
        .max_by_key(|(_, i)| {
            let ended = matches!(i.phase, Phase::Ended { .. });
            (ended, i.is_sick())
        })
        .map(|(id, _)| id.clone())
}
