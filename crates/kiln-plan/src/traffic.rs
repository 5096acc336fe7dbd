//! What is known of a release's traffic: the proxy's counters, asked for again and again
//! while a release is on its way or watched, and compared with what they were.

use kiln_model::release::ReleasedService;
use kiln_model::spec::Analysis;
use kiln_model::{Digest, InstanceId, Millis, ServiceName, Traffic};

use crate::analysis::{MIN_REQUESTS, Opinion, judge, unstated, worse};
use crate::decide::Planner;
use crate::effect::Effect;
use crate::watch::{changed, span};
use crate::world::{Goal, Instance, Marks, Prepared, RolloutState, Watch, World};

/// How often the proxy is asked.
const INTERVAL: Millis = Millis(500);

/// The release that is judged, and the one that it is compared with, if any.
type Pair<'r> = (Option<&'r Prepared>, &'r Prepared);

/// What the service's traffic says; `None`: it has no limit that it could be held to.
pub(crate) fn opinion(
    world: &World,
    (back, to): Pair<'_>,
    name: &ServiceName,
    released: &ReleasedService,
) -> Option<Opinion> {
    let stated = released.service.kiln.rollout.as_ref();
    let stated = stated.and_then(|r| r.analysis.clone());
    let analysis = match stated {
        Some(stated) if stated.limits_traffic() => stated,
        // What is new has nothing to be worse than.
        _ if back.is_none_or(|back| !back.revisions.contains_key(name)) => return None,
        stated => Analysis {
            min_requests: stated.and_then(|a| a.min_requests),
            ..unstated()
        },
    };
    let new = since_the_mark(world, name, to.revisions.get(name));
    let beside = back.and_then(|back| back.revisions.get(name));
    let beside = since_the_mark(world, name, beside);
    let before = world
        .marks
        .before
        .get(name)
        .filter(|_| beside.requests < MIN_REQUESTS);
    Some(judge(&analysis, &new, before.unwrap_or(&beside)))
}

/// The instance that fails the most.
pub(crate) fn culprit(world: &World, to: &Prepared, name: &ServiceName) -> Option<InstanceId> {
    let revision = to.revisions.get(name);
    let new = copies(world, name, revision);
    let worst = new.max_by_key(|(id, _)| traffic_of(world, id).failed);
    worst.map(|(id, _)| id.clone())
}

fn since_the_mark(world: &World, name: &ServiceName, revision: Option<&Digest>) -> Traffic {
    let mut sum = Traffic::default();
    for (id, _) in copies(world, name, revision) {
        sum.add(&traffic_of(world, id));
    }
    sum
}

fn copies<'w>(
    world: &'w World,
    name: &'w ServiceName,
    revision: Option<&'w Digest>,
) -> impl Iterator<Item = (&'w InstanceId, &'w Instance)> {
    let copies = world.of_service(name);
    copies.filter(move |(_, i)| !i.job && Some(&i.revision) == revision)
}

fn traffic_of(world: &World, id: &InstanceId) -> Traffic {
    let Some(counted) = world.measured.traffic.get(id) else {
        return Traffic::default();
    };
    match world.marks.start.get(id) {
        Some(mark) => counted.since(mark),
        None => counted.clone(),
    }
}

impl Planner<'_> {
    /// How the old release does, as long as all traffic is its own: worse of all the time
    /// that it has served, and of now.
    pub(crate) fn remember_how_it_was(&mut self) {
        let rollout = self.world.rollout.as_ref();
        let Some(rollout) = rollout.filter(|r| r.proving() && !r.moved) else {
            return;
        };
        let from = rollout.from.and_then(|n| self.releases.get(n));
        let (Some(from), Some((_, to))) = (from, self.goal()) else {
            return;
        };
        for (name, _) in changed(Some(from), to) {
            let revision = from.revisions.get(name);
            let mut ever = Traffic::default();
            for (id, _) in copies(self.world, name, revision) {
                if let Some(counted) = self.world.measured.traffic.get(id) {
                    ever.add(counted);
                }
            }
            let lately = since_the_mark(self.world, name, revision);
            if ever.requests > 0 {
                self.world
                    .marks
                    .before
                    .insert(name.clone(), worse(ever, lately));
            }
        }
    }

    /// Asks what traffic there is, as long as a release is judged by it.
    pub(crate) fn measure(&mut self) {
        if self.world.rollout.is_none() && self.world.watch.is_none() {
            self.world.marks = Marks::default();
            self.world.measured.traffic.clear();
            return;
        }
        let instances = self.judged();
        if instances.is_empty() {
            return;
        }
        let next = self.world.measured.at.map(|at| at.saturating_add(INTERVAL));
        if let Some(next) = next.filter(|next| *next > self.now) {
            return self.wake_at(next);
        }
        let number = self.world.measured.number + 1;
        if self.emit(Effect::Measure { number, instances }) {
            self.world.measured.number = number;
        }
    }

    /// All that traffic may go to of the services that are changed.
    fn judged(&self) -> Vec<InstanceId> {
        let (rollout, watch) = (self.world.rollout.as_ref(), self.world.watch);
        let Some((number, to)) = self.goal() else {
            return Vec::new();
        };
        // Nobody is judged; who is then begins anew.
        if rollout.is_some_and(|r| r.paused.is_some()) {
            return Vec::new();
        }
        let proving = rollout.filter(|r| r.proving() && r.to == Goal::Release(number));
        let watching = rollout.is_none_or(|r| r.state == RolloutState::Watching);
        let watch = watch.filter(|w| watching && w.release == number);
        let back = match (proving, &watch) {
            (Some(rollout), _) if rollout.from.is_none() => return Vec::new(),
            (Some(rollout), _) => rollout.from,
            (None, Some(watch)) => watch.back,
            (None, None) => return Vec::new(),
        };
        let back = back.and_then(|n| self.releases.get(n));
        let names = changed(back, to).filter(|(_, released)| {
            let over =
                |w: Watch| self.now >= w.since.saturating_add(span(self.world, &w, released));
            !watch.is_some_and(over)
        });
        names
            .flat_map(|(name, _)| self.world.of_service(name))
            .filter(|(_, i)| i.phase.ready() && !i.job)
            .map(|(id, _)| id.clone())
            .collect()
    }
}
