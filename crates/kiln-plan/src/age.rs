//! Instances that may live only so long (`x-kiln.max_age`): each is replaced by another of
//! the same revision, with the machinery that replaces a sick one. One at a time, and never
//! while a release is on its way or being judged.

use kiln_model::release::ReleasedService;
use kiln_model::{Millis, ServiceName};

use crate::routes::current;
use crate::world::{Health, Instance, Phase, Prepared, World};

/// Copies that began together don't end together: each has up to a tenth less than the
/// one after it.
const SPREAD: u64 = 10;

/// When its time is over.
fn due(released: &ReleasedService, instance: &Instance) -> Option<Millis> {
    let age = released.service.kiln.max_age?.0;
    let Phase::Ready { since } = instance.phase else {
        return None;
    };
    let copies = u64::from(released.service.replicas.max(1));
    let after = copies.saturating_sub(u64::from(instance.index));
    let less = age / SPREAD * after / copies;
    Some(since.saturating_add(Millis(age.saturating_sub(less))))
}

fn is_quiet(world: &World) -> bool {
    world.rollout.is_none() && world.watch.is_none()
}

/// Another copy is to take its place.
pub(crate) fn is_over(
    world: &World,
    released: &ReleasedService,
    instance: &Instance,
    now: Millis,
) -> bool {
    is_quiet(world) && due(released, instance).is_some_and(|due| due <= now)
}

/// The copy whose turn is next, and when; `None` while any is being replaced or sick.
pub(crate) fn next(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
) -> Option<(u32, Millis)> {
    let copies = current(world, goal, name);
    let whole = copies.len() == released.service.replicas as usize
        && copies.iter().all(|(_, i)| i.health == Health::Healthy);
    if !is_quiet(world) || !whole {
        return None;
    }
    let due = |i: &Instance| Some((due(released, i)?, i.index));
    let first = copies.iter().filter_map(|(_, i)| due(i)).min();
    first.map(|(due, index)| (index, due))
}
