//! What serves until traffic has moved from it stays whole: old copies that end while the
//! next release is on its way (for hours, if it is paused or a canary) are replaced by
//! others of their own release.

use kiln_model::release::ReleasedService;
use kiln_model::{ReleaseNumber, ServiceName};

use crate::canary::{self, UnderWay};
use crate::decide::{Planner, waits_for};
use crate::handoff::held;
use crate::routes::{current, gate_open, rests};
use crate::service::{is_exclusive, stops_first};
use crate::world::{Instance, Phase, Prepared, Releases, World};

/// The release that serves beside the one on its way in.
pub(crate) struct Before<'r> {
    pub number: ReleaseNumber,
    pub from: &'r Prepared,
    to: &'r Prepared,
    canary: Option<UnderWay<'r>>,
    /// Traffic has moved, or may now.
    moved: bool,
}

impl<'r> Before<'r> {
    pub fn of(world: &World, releases: &'r Releases) -> Option<Self> {
        let rollout = world.rollout.as_ref().filter(|r| r.proving())?;
        let number = rollout.from?;
        Some(Self {
            number,
            from: releases.get(number)?,
            to: releases.get(world.goal.release()?)?,
            canary: canary::under_way(world, releases),
            moved: rollout.moved || gate_open(world, releases),
        })
    }

    /// Services whose old copies may run beside new ones, as they were.
    pub fn services(
        &self,
        world: &World,
    ) -> impl Iterator<Item = (&'r ServiceName, &'r ReleasedService)> {
        let (from, to) = (self.from, self.to);
        from.release.services.iter().filter(move |(name, old)| {
            let makes_room = |new: &ReleasedService| is_exclusive(new) || stops_first(world, new);
            let leaves = to.release.services.get(*name).is_some_and(makes_room);
            let same = from.revisions.get(*name) == to.revisions.get(*name);
            !same && !leaves && !is_exclusive(old) && !from.is_job(name) && !to.is_job(name)
        })
    }

    /// So many old copies traffic still needs. Where a paused rollout has moved some, each
    /// new copy that was begun stands for an old one.
    fn needed(&self, world: &World, name: &ServiceName, old: &ReleasedService) -> usize {
        let replicas = old.service.replicas;
        let weighted = || self.canary.is_some_and(|c| c.weight(name).is_some());
        if !self.moved || weighted() {
            return replicas as usize;
        }
        if !held(world) {
            return 0;
        }
        let copies = current(world, self.to, name);
        let begun = |index: &u32| {
            let there = copies.iter().any(|(_, i)| i.index == *index);
            there || has_begun(world, self.to, name, *index)
        };
        (1..=replicas).filter(|index| !begun(index)).count()
    }

    /// Numbers for as many old copies as are needed and not there, or not well.
    pub fn missing(&self, world: &World, name: &ServiceName, old: &ReleasedService) -> Vec<u32> {
        let copies = current(world, self.from, name);
        let well = |index: u32| copies.iter().any(|(_, i)| i.index == index && !i.is_sick());
        let free: Vec<u32> = (1..=old.service.replicas).filter(|i| !well(*i)).collect();
        let there = old.service.replicas as usize - free.len();
        let lacking = self.needed(world, name, old).saturating_sub(there);
        free.into_iter().take(lacking).collect()
    }

    /// An old copy that is not ready yet, and is still needed.
    pub fn awaits(&self, world: &World, instance: &Instance) -> bool {
        let name = &instance.service;
        let unproven = matches!(instance.phase, Phase::Starting | Phase::Warming { .. });
        let own = world.is_current(instance, self.from.revisions.get(name));
        let mut services = self.services(world);
        let old = services.find(|(other, _)| *other == name);
        let Some((_, old)) = old.filter(|_| unproven && own && !instance.job) else {
            return false;
        };
        let copies = current(world, self.from, name);
        let ready = copies
            .iter()
            .filter(|(_, i)| i.phase.ready() && !i.is_sick());
        instance.index <= old.service.replicas && ready.count() < self.needed(world, name, old)
    }
}

impl Planner<'_> {
    /// Old copies that ended although traffic has not moved from them.
    pub(crate) fn keep_whole_what_serves(&mut self) {
        let Some(before) = Before::of(self.world, self.releases) else {
            return;
        };
        let services: Vec<_> = before.services(self.world).collect();
        for (name, old) in services {
            self.rest_copies(before.from, name, old, false);
            for index in before.missing(self.world, name, old) {
                if rests(self.world, before.from, name, index)
                    || waits_for(self.world, before.from, old).is_some()
                    || self.attempts_left(before.from, name, index).is_none()
                {
                    continue;
                }
                self.start(before.number, before.from, name, index, false);
            }
        }
    }
}

/// A copy of this number has been tried.
pub(crate) fn has_begun(world: &World, goal: &Prepared, name: &ServiceName, index: u32) -> bool {
    let revision = goal.revisions.get(name);
    world.attempt(name, index, revision).is_some()
}
