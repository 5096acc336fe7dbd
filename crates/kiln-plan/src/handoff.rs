//! Old copies that go before new ones come: a single writer is handed over, and a service
//! whose file says `stop-first` makes room, a batch at a time.

use kiln_model::release::ReleasedService;
use kiln_model::{InstanceId, Millis, ServiceName};

use crate::age;
use crate::decide::waits_for;
use crate::routes::{current, rests};
use crate::service::{batch, is_exclusive, manner, stops_first};
use crate::world::{Instance, Phase, Prepared, World};

/// A handoff begins when the new copy could start but for the one there is, which is of
/// another revision, surplus, sick or too old. The new release says whether copies may overlap; the
/// old one may have had several.
pub(crate) fn can_hand_over(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    now: Millis,
) -> bool {
    let Some(released) = goal.release.services.get(name) else {
        return false;
    };
    let keeps = |i: &Instance| {
        i.phase.ready()
            && i.index <= released.service.replicas
            && world.is_current(i, goal.revisions.get(name))
            && !i.is_sick()
            && !age::is_over(world, released, i, now)
    };
    let copies: Vec<_> = world.of_service(name).filter(|(_, i)| !i.job).collect();
    is_exclusive(released)
        && !held(world)
        && !due(world, goal, name, released, now).is_empty()
        && copies.iter().any(|(_, i)| i.phase.alive() && !keeps(i))
        && !copies.iter().any(|(_, i)| keeps(i))
        && waits_for(world, goal, released).is_none()
}

/// A rollout is paused that has not moved any traffic yet.
pub(crate) fn held(world: &World) -> bool {
    let proving = world.rollout.as_ref().filter(|r| r.proving());
    proving.is_some_and(|r| r.paused.is_some())
}

/// Copies that do not rest and whose time after a failure has passed.
fn due(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
    now: Millis,
) -> Vec<u32> {
    (1..=released.service.replicas)
        .filter(|index| {
            let attempt = world.attempt(name, *index, goal.revisions.get(name));
            attempt.is_none_or(|a| a.next() <= now) && !rests(world, goal, name, *index)
        })
        .collect()
}

/// How many copies may be begun now (`parallelism` and `delay`), or when to ask again.
/// Which of them, while the rollout is paused, others say.
pub(crate) fn room(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
    now: Millis,
) -> Result<u32, Millis> {
    let current = current(world, goal, name);
    let unproven = current.iter().filter(|(_, i)| !i.phase.ready()).count() as u32;
    let proven = current.iter().filter_map(|(_, i)| match i.phase {
        Phase::Ready { since } => Some(since),
        _ => None,
    });
    let delay = manner(world, released).delay.unwrap_or_default();
    let next = proven.max().map(|latest| latest.saturating_add(delay));
    match next {
        Some(next) if world.rollout.is_some() && next > now => Err(next),
        _ => Ok(batch(world, released).saturating_sub(unproven)),
    }
}

/// Copies of `stop-first` that may be begun beside those which have not gone yet.
pub(crate) fn free_places(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
) -> u32 {
    let alive = || world.of_service(name).filter(|(_, i)| i.phase.alive());
    let revision = goal.revisions.get(name);
    match alive().any(|(_, i)| !world.is_current(i, revision)) {
        true => released
            .service
            .replicas
            .saturating_sub(alive().count() as u32),
        false => u32::MAX,
    }
}

/// Old copies that have to go now for the next batch of new ones.
pub(crate) fn making_room<'w>(
    world: &'w World,
    goal: &Prepared,
    name: &'w ServiceName,
    now: Millis,
) -> Vec<&'w InstanceId> {
    let Some(released) = goal.release.services.get(name) else {
        return Vec::new();
    };
    if !stops_first(world, released) || held(world) || waits_for(world, goal, released).is_some() {
        return Vec::new();
    }
    let revision = goal.revisions.get(name);
    let new = current(world, goal, name);
    let mut missing = due(world, goal, name, released, now);
    missing.retain(|index| !new.iter().any(|(_, i)| i.index == *index));
    let room = room(world, goal, name, released, now).unwrap_or(0);
    let wanted = room.min(missing.len() as u32);
    if wanted == 0 {
        return Vec::new();
    }
    let alive = || world.of_service(name).filter(|(_, i)| i.phase.alive());
    let staying = alive().filter(|(_, i)| i.phase.rising()).count() as u32;
    let lacking = (staying + wanted).saturating_sub(released.service.replicas);
    let old = alive().filter(|(_, i)| i.phase.ready() && !world.is_current(i, revision));
    old.map(|(id, _)| id).take(lacking as usize).collect()
}
