//! What is to be done next, from the world alone.

use std::collections::BTreeSet;

use kiln_model::release::ReleasedService;
use kiln_model::spec::Condition;
use kiln_model::{Generation, InstanceId, Millis, ReleaseNumber, ServiceName};

use crate::age;
use crate::before::{Before, has_begun};
use crate::effect::{Conclusion, Effect, EffectKey, Plan, ReportLine};
use crate::handoff::{free_places, held, making_room, room};
use crate::probe::probe_plan;
use crate::routes;
use crate::service::{batch, drain_limit, is_exclusive, restarts, stop_of, stops_first};
use crate::watch::{is_warm, written_off};
use crate::world::{Goal, Health, Instance, Phase, Prepared, Releases, World};

pub(crate) fn decide(world: &mut World, releases: &Releases, now: Millis) -> Plan {
    let mut planner = Planner {
        world,
        releases,
        now,
        plan: Plan::default(),
    };
    planner.rest_what_has_finished();
    planner.give_up_waiting_for_outcomes();
    planner.give_up_if_hopeless();
    planner.judge_what_is_watched();
    planner.judge_while_it_moves();
    planner.step_canary();
    planner.start_what_is_missing();
    planner.keep_whole_what_serves();
    planner.remember_how_it_was();
    planner.route();
    planner.end_watch();
    planner.retire_what_is_not_wanted();
    planner.act_on_phases();
    planner.conclude();
    planner.record_conclusion();
    planner.measure();
    planner.wake_for_lost_outcomes();
    planner.plan
}

pub(crate) struct Planner<'a> {
    pub(crate) world: &'a mut World,
    pub(crate) releases: &'a Releases,
    pub(crate) now: Millis,
    plan: Plan,
}

impl<'a> Planner<'a> {
    pub(crate) fn goal(&self) -> Option<(ReleaseNumber, &'a Prepared)> {
        let number = self.world.goal.release()?;
        Some((number, self.releases.get(number)?))
    }

    /// What should have been told of long ago is planned again, if it is still wanted.
    fn give_up_waiting_for_outcomes(&mut self) {
        let now = self.now;
        let lost = |due: &Millis| *due <= now;
        let routing = self.world.under_way.get(&EffectKey::Route);
        self.world.routes_doubtful |= routing.is_some_and(lost);
        self.world.under_way.retain(|_, due| !lost(due));
    }

    fn start_what_is_missing(&mut self) {
        let Some((number, goal)) = self.goal() else {
            return;
        };
        // The networks of what was taken down are still going.
        let concluding = self.world.concluding.as_ref();
        if concluding.is_some_and(Conclusion::empties) {
            return;
        }
        if !self.world.networks_ready {
            let networks = self.world.layout.networks.values().cloned().collect();
            let wish = self.world.networks_wish + 1;
            if self.emit(Effect::EnsureNetworks { networks, wish }) {
                self.world.networks_wish = wish;
            }
        }
        for (name, released) in &goal.release.services {
            if goal.is_job(name) {
                self.run_job(number, goal, name, released);
            } else {
                self.fill(number, goal, name, released);
            }
        }
    }

    fn rest_what_has_finished(&mut self) {
        if let Some((_, goal)) = self.goal() {
            for (name, released) in &goal.release.services {
                let fails_it = self.world.rollout.is_some();
                self.rest_copies(goal, name, released, fails_it);
            }
        }
    }

    /// Copies that ended by themselves and whose policy says to leave it at that. Whose
    /// failure `fails` a rollout does not rest: it is judged.
    pub(crate) fn rest_copies(
        &mut self,
        goal: &Prepared,
        name: &ServiceName,
        released: &ReleasedService,
        fails: bool,
    ) {
        let job = goal.is_job(name);
        let revision = goal.revisions.get(name);
        let policy = &released.service.restart;
        for (_, instance) in self.world.instances.of_service(name) {
            let Phase::Ended { status, .. } = instance.phase else {
                continue;
            };
            if job || Some(&instance.revision) != revision {
                continue;
            }
            // What the host lost (a reboot) is brought back whatever the policy.
            let lost = status == kiln_model::instance::ExitStatus::Unknown;
            let key = (name.clone(), instance.index, instance.revision);
            if let Some(attempt) = self.world.attempts.get_mut(&key)
                && !lost
                && !restarts(policy, !status.success(), attempt.failures)
            {
                attempt.finished = status.success() || !fails;
            }
        }
    }

    fn run_job(
        &mut self,
        number: ReleaseNumber,
        goal: &Prepared,
        name: &ServiceName,
        released: &ReleasedService,
    ) {
        let key = (goal.digest, name.clone());
        let runs: Vec<(InstanceId, Phase)> = self
            .world
            .of_service(name)
            .filter(|(_, i)| i.job && i.release == number)
            .map(|(id, i)| (id.clone(), i.phase.clone()))
            .collect();
        for (id, phase) in &runs {
            if let Phase::Ended { status, .. } = phase
                && status.success()
            {
                self.world.jobs_done.insert(key.clone());
                self.report(Some(name), format!("job {id} completed"));
            }
        }
        let running = runs.iter().any(|(_, p)| p.alive());
        if self.world.jobs_done.contains(&key)
            || running
            || self.attempts_left(goal, name, 1).is_none()
        {
            return;
        }
        if let Some(blocked) = waits_for(self.world, goal, released) {
            self.report(Some(name), format!("job waits: {blocked}"));
            return;
        }
        self.start(number, goal, name, 1, true);
    }

    /// Starts copies of a service until it has as many as wanted.
    fn fill(
        &mut self,
        number: ReleaseNumber,
        goal: &Prepared,
        name: &ServiceName,
        released: &ReleasedService,
    ) {
        let well: BTreeSet<u32> = self
            .current(goal, name)
            .iter()
            .filter(|(_, i)| !i.is_sick())
            .map(|(_, i)| i.index)
            .collect();
        let mut missing: Vec<u32> = (1..=released.service.replicas)
            .filter(|index| !well.contains(index))
            .filter(|index| !routes::rests(self.world, goal, name, *index))
            .collect();
        if missing.is_empty() {
            missing.extend(self.too_old(goal, name, released));
        }
        if missing.is_empty() {
            return;
        }
        // What has begun is finished, and the next batch waits.
        let moved = self.world.rollout.as_ref().is_some_and(|r| r.moved);
        let ready = || {
            self.current(goal, name)
                .iter()
                .any(|(_, i)| i.phase.ready())
        };
        if held(self.world) && (moved || ready()) {
            missing.retain(|index| has_begun(self.world, goal, name, *index));
        }
        // One that fails again and again must not take the others' turn.
        let revision = goal.revisions.get(name);
        missing.sort_by_key(|index| {
            let attempt = self.world.attempt(name, *index, revision);
            attempt.map_or(0, |a| a.failures)
        });
        if let Some(blocked) = waits_for(self.world, goal, released) {
            self.report(Some(name), format!("waits: {blocked}"));
            return;
        }
        if is_exclusive(released) {
            // Until another may be started, a sick copy is better than none.
            let due = |p: &mut Self, index: &u32| p.attempts_left(goal, name, *index).is_some();
            if !missing.iter().any(|index| due(self, index)) || self.hand_over(name) {
                return;
            }
        }
        let mut room = match room(self.world, goal, name, released, self.now) {
            Ok(room) => room,
            Err(later) => return self.wake_at(later),
        };
        if stops_first(self.world, released) {
            room = room.min(free_places(self.world, goal, name, released));
        }
        for index in missing {
            if room == 0 {
                break;
            }
            if self.attempts_left(goal, name, index).is_none() {
                continue;
            }
            self.start(number, goal, name, index, false);
            room -= 1;
        }
    }

    /// The copy that has lived as long as it may.
    fn too_old(
        &mut self,
        goal: &Prepared,
        name: &ServiceName,
        released: &ReleasedService,
    ) -> Option<u32> {
        let (index, due) = age::next(self.world, goal, name, released)?;
        if due > self.now {
            self.wake_at(due);
            return None;
        }
        self.report(Some(name), format!("copy {index} has reached its max_age"));
        Some(index)
    }

    /// Waits out the backoff after failures; `None`: not now.
    pub(crate) fn attempts_left(
        &mut self,
        goal: &Prepared,
        name: &ServiceName,
        index: u32,
    ) -> Option<()> {
        let revision = goal.revisions.get(name);
        let Some(attempt) = self.world.attempt(name, index, revision) else {
            return Some(());
        };
        let at = attempt.next();
        if at > self.now {
            self.wake_at(at);
            return None;
        }
        Some(())
    }

    /// Retires what must be gone before a copy of an exclusive service may start.
    /// True while it is not.
    fn hand_over(&mut self, name: &ServiceName) -> bool {
        let holders: Vec<InstanceId> = self
            .world
            .of_service(name)
            .filter(|(_, i)| i.phase != Phase::Removing)
            .filter(|(_, i)| !matches!(i.phase, Phase::Ended { .. }))
            .map(|(id, _)| id.clone())
            .collect();
        let parked = self.proxy_known()
            && self.world.routes.as_ref().is_some_and(|table| {
                table
                    .services
                    .get(name)
                    .is_none_or(|route| route.backends.is_empty())
            });
        for id in &holders {
            let Some(instance) = self.world.instances.get_mut(id) else {
                continue;
            };
            match instance.phase {
                Phase::Ready { .. } if parked => instance.phase = Phase::Draining,
                Phase::Starting | Phase::Warming { .. } => instance.phase = Phase::Stopping,
                _ => {}
            }
        }
        if !holders.is_empty() {
            self.report(
                Some(name),
                "handoff: the old copy must end before the new may start",
            );
        }
        !holders.is_empty()
    }

    /// Copies of the wanted revision that serve or are on their way to.
    fn current<'s>(
        &'s self,
        goal: &Prepared,
        name: &'s ServiceName,
    ) -> Vec<(&'s InstanceId, &'s Instance)> {
        routes::current(self.world, goal, name)
    }

    pub(crate) fn start(
        &mut self,
        number: ReleaseNumber,
        goal: &Prepared,
        name: &ServiceName,
        index: u32,
        job: bool,
    ) {
        let (Some(released), Some(revision)) =
            (goal.release.services.get(name), goal.revisions.get(name))
        else {
            return;
        };
        self.world.counter += 1;
        let counter = self.world.counter;
        let text = format!("{:.40}-{name:.40}-{counter}", self.world.environment);
        let Ok(id) = InstanceId::new(text) else {
            return;
        };
        let Some(addresses) = routes::take_addresses(self.world, released) else {
            self.report(Some(name), "no free address is left on one of its networks");
            return;
        };
        let Some(joined) = routes::partners(self.world, goal, released, index) else {
            self.report(
                Some(name),
                "waits: for the service whose namespaces it shares",
            );
            return;
        };
        self.report(Some(name), format!("start {id} (copy {index})"));
        self.world.instances.insert(
            id,
            Instance {
                service: name.clone(),
                release: number,
                revision: *revision,
                index,
                job,
                addresses,
                joined,
                phase: Phase::Starting,
                health: Health::Unknown,
                tainted: false,
                created: self.now,
            },
        );
    }

    fn route(&mut self) {
        if routes::gate_open(self.world, self.releases)
            && let Some(rollout) = &mut self.world.rollout
        {
            rollout.moved = true;
        }
        let mut table = routes::wanted(self.world, self.releases, self.now);
        let same = self.proxy_known()
            && self
                .world
                .routes
                .as_ref()
                .is_some_and(|current| routes::same_but_for_generation(current, &mut table));
        let nothing_yet = self.world.routes.is_none()
            && table.services.is_empty()
            && self.world.goal == Goal::Nothing
            && self.world.instances.is_empty();
        // Names and addresses can only be served on networks that stand.
        if same || nothing_yet || (!self.world.networks_ready && !table.networks.is_empty()) {
            return;
        }
        if self.emit(Effect::Route(table)) {
            self.world.generation = self.world.generation.next();
        }
    }

    fn retire_what_is_not_wanted(&mut self) {
        let leaving = self.making_room();
        let warm = |i: &Instance| is_warm(self.world, self.releases, i, self.now);
        let before = Before::of(self.world, self.releases);
        let awaited = |i: &Instance| before.as_ref().is_some_and(|b| b.awaits(self.world, i));
        let unwanted: Vec<InstanceId> = self
            .world
            .instances
            .iter()
            .filter(|(id, i)| i.phase.rising() && !self.is_wanted(id, i))
            .filter(|(id, i)| leaving.contains(*id) || !(warm(i) || awaited(i)))
            .map(|(id, _)| id.clone())
            .collect();
        if unwanted.is_empty() {
            return;
        }
        let wanted = routes::wanted(self.world, self.releases, self.now);
        let open = routes::gate_open(self.world, self.releases);
        let retiring: BTreeSet<ServiceName> = unwanted
            .iter()
            .filter_map(|id| self.world.instances.get(id))
            .map(|i| i.service.clone())
            .collect();
        for id in unwanted {
            let Some(instance) = self.world.instances.get(&id) else {
                continue;
            };
            let service = instance.service.clone();
            let in_wanted = wanted
                .services
                .values()
                .any(|s| s.backends.iter().any(|b| b.instance == id));
            let phase = match instance.phase {
                Phase::Starting | Phase::Warming { .. } => Phase::Stopping,
                _ if in_wanted => continue,
                _ if !open && !leaving.contains(&id) && !self.left_over(&id, instance) => continue,
                _ if !self.proxy_known() || self.world.routed(&id) => continue,
                _ if self.still_needed_by(&service, &retiring) => continue,
                _ => Phase::Draining,
            };
            let verb = if phase == Phase::Draining {
                "drain"
            } else {
                "stop"
            };
            self.report(
                Some(&service),
                format!("{verb} {id}: it is not part of the release"),
            );
            if let Some(instance) = self.world.instances.get_mut(&id) {
                instance.phase = phase;
            }
        }
    }

    /// Kept warm behind the release that serves, which another is to follow now; or
    /// another copy serves in its place.
    fn left_over(&self, id: &InstanceId, instance: &Instance) -> bool {
        let from = self.world.rollout.as_ref().and_then(|r| r.from);
        let of_another =
            |from: &Prepared| from.revisions.get(&instance.service) != Some(&instance.revision);
        from.and_then(|n| self.releases.get(n))
            .is_some_and(of_another)
            || self.is_replaced(id, instance)
    }

    /// Old copies of `stop-first`, whose turn it is before all has been proven.
    fn making_room(&self) -> BTreeSet<InstanceId> {
        let Some((_, goal)) = self.goal() else {
            return BTreeSet::new();
        };
        let names = goal.release.services.keys();
        names
            .flat_map(|name| making_room(self.world, goal, name, self.now))
            .cloned()
            .collect()
    }

    /// The table in force is known: none is on its way that could still send traffic
    /// to what is about to be drained.
    pub(crate) fn proxy_known(&self) -> bool {
        self.world.routes.is_some()
            && !self.world.routes_doubtful
            && !self.world.under_way.contains_key(&EffectKey::Route)
    }

    fn is_wanted(&self, id: &InstanceId, instance: &Instance) -> bool {
        let Some((number, goal)) = self.goal() else {
            return false;
        };
        if instance.job {
            return instance.release == number;
        }
        let Some(released) = goal.release.services.get(&instance.service) else {
            return false;
        };
        let revision = goal.revisions.get(&instance.service);
        if instance.index > released.service.replicas || !self.world.is_current(instance, revision)
        {
            return false;
        }
        !self.is_replaced(id, instance)
    }

    /// Another copy of its number and revision serves. A sick one may get well again after
    /// that: one of them goes.
    fn is_replaced(&self, id: &InstanceId, instance: &Instance) -> bool {
        let better = |other: &InstanceId, i: &Instance| {
            i.index == instance.index
                && other != id
                && i.phase.ready()
                && !i.job
                && !i.is_sick()
                && (instance.is_sick() || routes::newer(other, id))
                && self.world.is_current(i, Some(&instance.revision))
        };
        let mut others = self.world.of_service(&instance.service);
        others.any(|(other, i)| better(other, i))
    }

    /// When services go for good, those that depend on others go first: as the release that
    /// is left says. Instances may be of older ones, whose orders contradict each other.
    fn still_needed_by(&self, service: &ServiceName, retiring: &BTreeSet<ServiceName>) -> bool {
        let stays = self
            .goal()
            .is_some_and(|(_, g)| g.release.services.contains_key(service));
        let left = self.world.rollout.as_ref().and_then(|r| r.from);
        let left = left
            .or(self.world.proven)
            .and_then(|n| self.releases.get(n));
        let depends = |other: &ServiceName| {
            let released = left.and_then(|l| l.release.services.get(other));
            released.is_some_and(|r| r.service.depends_on.contains_key(service))
        };
        !stays
            && self.world.instances.values().any(|other| {
                other.phase.alive()
                    && (retiring.contains(&other.service) || !other.phase.rising())
                    && depends(&other.service)
            })
    }

    /// What each instance's phase asks for.
    fn act_on_phases(&mut self) {
        let kept = self.kept_for_its_log();
        let asked: Vec<Effect> = self
            .world
            .instances
            .iter()
            // A failed instance is kept until its log has been shown.
            .filter(|(id, i)| i.phase.alive() || kept.as_ref() != Some(*id))
            .filter_map(|(id, instance)| self.asked_by(id, instance))
            .collect();
        for effect in asked {
            self.emit(effect);
        }
    }

    fn asked_by(&self, id: &InstanceId, instance: &Instance) -> Option<Effect> {
        let under_way = |key: EffectKey| self.world.under_way.contains_key(&key);
        // A start that is under way ends first, or it would outlive the removal.
        if under_way(EffectKey::Start(id.clone())) {
            return None;
        }
        let released = self.releases.service_of(instance);
        let id = id.clone();
        Some(match instance.phase {
            Phase::Starting if !self.world.networks_ready => return None,
            Phase::Starting => Effect::Start { id },
            Phase::Warming { .. } | Phase::Ready { .. } => {
                if under_way(EffectKey::Observe(id.clone())) {
                    return None;
                }
                let proven = self.world.goes_back();
                let probe = probe_plan(released.filter(|_| !instance.job)?, proven);
                Effect::Observe { id, probe }
            }
            Phase::Draining => {
                let limit = self.drain_limit_of(instance);
                Effect::Drain { id, limit }
            }
            Phase::Stopping => {
                let (signal, grace) = stop_of(released);
                Effect::Stop { id, signal, grace }
            }
            Phase::Ended { .. } | Phase::Removing => Effect::Remove { id },
        })
    }

    /// While an exclusive service is handed over its callers wait, so what the old copy
    /// still holds gets less time, unless the file says how much.
    fn drain_limit_of(&self, instance: &Instance) -> Millis {
        const HANDOFF: Millis = Millis(2000);
        let released = self.releases.service_of(instance);
        let stays = self
            .goal()
            .is_some_and(|(_, g)| g.release.services.contains_key(&instance.service));
        let stated = released.and_then(|r| r.service.kiln.drain);
        match (stated, released) {
            (None, Some(r)) if is_exclusive(r) && stays => HANDOFF,
            _ => drain_limit(released),
        }
    }

    /// An effect whose outcome never comes is planned again.
    fn wake_for_lost_outcomes(&mut self) {
        let due = self.world.under_way.values().min().copied();
        if let Some(due) = due.filter(|due| *due != Millis(u64::MAX)) {
            self.wake_at(due);
        }
    }

    /// Adds an effect unless it is under way already; tells whether it was added.
    pub(crate) fn emit(&mut self, effect: Effect) -> bool {
        let proven = |id| {
            let instance = self.world.instances.get(id);
            instance.is_some_and(|i| i.phase.ready())
        };
        let due = match &effect {
            Effect::Observe { id, .. } if proven(id) => Millis(u64::MAX),
            _ => self.now.saturating_add(effect.patience()),
        };
        let key = effect.key();
        let fresh = !self.world.under_way.contains_key(&key);
        if fresh {
            self.world.under_way.insert(key, due);
            self.plan.effects.push(effect);
        }
        fresh
    }

    pub(crate) fn report(&mut self, service: Option<&ServiceName>, text: impl Into<String>) {
        self.plan.report.push(ReportLine {
            service: service.cloned(),
            text: text.into(),
        });
    }

    pub(crate) fn wake_at(&mut self, at: Millis) {
        self.plan.wake = Some(self.plan.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// The generation a table that is planned now would have.
pub(crate) fn next_generation(world: &World) -> Generation {
    world.generation.next()
}

/// Why a service can't start yet, if so.
pub(crate) fn waits_for(
    world: &World,
    goal: &Prepared,
    released: &ReleasedService,
) -> Option<String> {
    // Until the proxy has a table, no name resolves.
    let told = world.networks_ready && !world.routes_doubtful;
    let Some(routes) = world.routes.as_ref().filter(|_| told) else {
        return Some("for its networks".into());
    };
    released
        .service
        .depends_on
        .iter()
        .find_map(|(dependency, how)| {
            let Some(other) = goal.release.services.get(dependency) else {
                return how
                    .required
                    .then(|| format!("for `{dependency}`, which is not there"));
            };
            let current = routes::current(world, goal, dependency);
            let completed = world.jobs_done.contains(&(goal.digest, dependency.clone()));
            let (met, what) = match how.condition {
                Condition::Started => {
                    let begun = current.iter().any(|(_, i)| i.phase != Phase::Starting);
                    let rests = routes::rests(world, goal, dependency, 1);
                    (begun || rests || completed, "to be started")
                }
                Condition::Healthy => {
                    let ready = current.iter().filter(|(_, i)| i.phase.ready()).count();
                    // Healthy, and reached by its name.
                    let reached = routes
                        .services
                        .get(dependency)
                        .is_some_and(|r| !r.backends.is_empty());
                    // A job's health is that it has completed.
                    let spared = written_off(world, goal, dependency, other);
                    let well = (ready + spared) as u32 >= batch(world, other) && reached;
                    (well || completed, "to be healthy")
                }
                Condition::CompletedSuccessfully => (completed, "to complete"),
            };
            (!met).then(|| format!("for `{dependency}` {what}"))
        })
}
