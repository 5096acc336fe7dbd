//! How a rollout ends: given up before the switch, returned from after it, or proven.

use kiln_model::release::{Release, ReleasedService};
use kiln_model::spec::FailureAction;
use kiln_model::{InstanceId, Millis, ServiceName};

use crate::analysis::Opinion;
use crate::apply::{conclude, fail_rollout};
use crate::canary;
use crate::decide::Planner;
use crate::effect::{Conclusion, Effect};
use crate::probe::probe_plan;
use crate::routes;
use crate::service::{manner, tries_in_rollout};
use crate::traffic;
use crate::watch;
use crate::world::{Canary, Goal, Instance, Phase, Prepared, Rollout, RolloutState, Watch, World};

impl Planner<'_> {
    /// A copy of the new release has failed as often as it may: turn back.
    pub(crate) fn give_up_if_hopeless(&mut self) {
        let proving = self.world.rollout.as_ref().is_some_and(Rollout::proving);
        let Some((_, goal)) = self.goal().filter(|_| proving) else {
            return;
        };
        for (name, released) in &goal.release.services {
            let Some((index, cause)) = hopeless(self.world, goal, name, released) else {
                continue;
            };
            let failed = watch::culprit(self.world, goal, name, index);
            let text = format!("service `{name}`: {cause}");
            self.report(Some(name), format!("giving up the new release: {cause}"));
            fail_rollout(self.world, text, failed);
            return;
        }
    }

    /// Traffic has moved and new copies fail: what the file says is done, or the old
    /// release serves again.
    pub(crate) fn judge_what_is_watched(&mut self) {
        let Some(watch) = self.world.watch else {
            return;
        };
        let waiting = self.world.rollout.as_ref();
        let paused = waiting.is_some_and(|r| r.paused.is_some());
        let watched = self.world.goal == Goal::Release(watch.release)
            && waiting.is_none_or(|r| r.state == RolloutState::Watching);
        // Without a rollout that waits there must be something to return to.
        let nowhere = waiting.is_none() && watch.back.is_none();
        if !watched || paused || nowhere {
            return;
        }
        let Some(to) = self.releases.get(watch.release) else {
            return;
        };
        let back = watch.back.and_then(|n| self.releases.get(n));
        for (name, released) in watch::changed(back, to) {
            let span = watch::span(self.world, &watch, released);
            if self.now >= watch.since.saturating_add(span) {
                continue;
            }
            let failed = watch::failed(self.world, to, watch.since, name, released);
            let borne = watch::bearable(self.world, released, failed.len());
            let failure = match failed.first().filter(|_| !borne) {
                Some((index, cause)) => {
                    let culprit = watch::culprit(self.world, to, name, *index);
                    Some(((*cause).to_owned(), culprit))
                }
                None => self.bad_traffic((back, to), name, released),
            };
            let Some((cause, culprit)) = failure else {
                continue;
            };
            let text = format!("service `{name}`, after traffic had moved: {cause}");
            match (watch::action(self.world, released), &mut self.world.rollout) {
                (FailureAction::Continue, _) => continue,
                (FailureAction::Pause, Some(rollout)) => rollout.paused = Some(text),
                _ => self.turn_back(watch, text, culprit),
            }
            return;
        }
    }

    /// Traffic moves a batch at a time, and what has got some of it fails.
    pub(crate) fn judge_while_it_moves(&mut self) {
        let rollout = self.world.rollout.as_ref();
        let moving = rollout.filter(|r| r.proving() && r.moved && !r.rollback);
        let stepping = canary::under_way(self.world, self.releases).is_some();
        let moving = moving.filter(|r| r.paused.is_none() && !stepping);
        let from = moving.and_then(|r| self.releases.get(r.from?));
        let (Some(from), Some((_, to))) = (from, self.goal()) else {
            return;
        };
        for (name, released) in watch::changed(Some(from), to) {
            let judged = manner(self.world, released).monitor != Some(Millis(0));
            let bad = || self.bad_traffic((Some(from), to), name, released);
            if let Some((cause, culprit)) = judged.then(bad).flatten() {
                let text = format!("service `{name}`, while traffic moved: {cause}");
                self.report(None, format!("returning: {text}"));
                return fail_rollout(self.world, text, culprit);
            }
        }
    }

    fn bad_traffic(
        &self,
        (back, to): (Option<&Prepared>, &Prepared),
        name: &ServiceName,
        released: &ReleasedService,
    ) -> Option<(String, Option<InstanceId>)> {
        match traffic::opinion(self.world, (back, to), name, released)? {
            Opinion::Bad(why) => Some((why, traffic::culprit(self.world, to, name))),
            Opinion::Good(_) | Opinion::Few(_) => None,
        }
    }

    fn turn_back(&mut self, watch: Watch, cause: String, instance: Option<InstanceId>) {
        self.report(None, format!("returning: {cause}"));
        if self.world.rollout.is_none() {
            // It had been called proven.
            self.world.proven = watch.back;
            self.world.rollout = Some(Rollout {
                to: Goal::Release(watch.release),
                from: watch.back,
                started: self.now,
                state: RolloutState::Watching,
                rollback: false,
                paused: None,
                promoted: false,
                moved: true,
                canary: Canary::default(),
            });
        }
        fail_rollout(self.world, cause, instance);
    }

    /// A watch ends when nothing waits for it any more.
    pub(crate) fn end_watch(&mut self) {
        let waits = self.world.rollout.as_ref();
        let waits = waits.is_some_and(|r| r.state == RolloutState::Watching);
        let Some(watch) = self.world.watch.filter(|_| !waits) else {
            return;
        };
        let to = self.releases.get(watch.release);
        let back = watch.back.and_then(|n| self.releases.get(n));
        let end = to.map_or(watch.until, |to| watch::end(self.world, back, &watch, to));
        if self.now >= end || self.world.goal != Goal::Release(watch.release) {
            self.world.watch = None;
            return;
        }
        self.wake_at(end);
    }

    /// The instance that failed a rollout stays until its log has been shown.
    pub(crate) fn kept_for_its_log(&self) -> Option<InstanceId> {
        if let Some(Conclusion::Failed { instance, .. }) = &self.world.concluding {
            return instance.clone();
        }
        match &self.world.rollout.as_ref()?.state {
            RolloutState::Returning { instance, .. } => instance.clone(),
            RolloutState::Proving | RolloutState::Watching => None,
        }
    }

    pub(crate) fn conclude(&mut self) {
        let Some(rollout) = self.world.rollout.clone() else {
            return;
        };
        let arrived = match self.goal() {
            None => self.world.goal == Goal::Nothing && self.only_left(&rollout.state),
            // It had; who fails since is judged, or borne.
            Some(_) if rollout.state == RolloutState::Watching => true,
            Some((_, goal)) => self.arrived(goal, &rollout.state),
        };
        if !arrived || self.world.concluding.is_some() || !self.has_stood_the_test(&rollout) {
            return;
        }
        let conclusion = match (rollout.state, rollout.to) {
            (RolloutState::Proving | RolloutState::Watching, Goal::Nothing) => Conclusion::Down,
            (RolloutState::Proving | RolloutState::Watching, Goal::Release(release)) => {
                Conclusion::Proven { release }
            }
            (RolloutState::Returning { cause, .. }, Goal::Nothing) => match rollout.from {
                Some(release) => Conclusion::Stayed { release, cause },
                None => Conclusion::Down,
            },
            (RolloutState::Returning { cause, instance }, Goal::Release(release)) => {
                Conclusion::Failed {
                    release,
                    cause,
                    instance,
                    back: self.world.goal.release(),
                }
            }
        };
        conclude(self.world, conclusion);
    }

    /// Traffic has moved: nobody waits for a verdict, or it is a good one.
    fn has_stood_the_test(&mut self, rollout: &Rollout) -> bool {
        let paused = rollout.paused.is_some();
        let stepping = canary::under_way(self.world, self.releases).is_some();
        match rollout.state {
            RolloutState::Returning { .. } => true,
            RolloutState::Proving if paused || stepping => false,
            // The last step's verdict is told first.
            RolloutState::Proving if rollout.canary.ended_at() >= Some(self.now) => {
                self.wake_at(self.now.saturating_add(Millis(1)));
                false
            }
            RolloutState::Proving => {
                let begun = watch::begins(self.world, self.releases, rollout, self.now);
                self.world.watch = begun.map(|(watch, _)| watch);
                let asked = begun.filter(|(_, asked)| *asked && !rollout.promoted);
                let (Some((watch, _)), Some(rollout)) = (asked, &mut self.world.rollout) else {
                    return true;
                };
                rollout.state = RolloutState::Watching;
                self.wake_at(watch.until);
                false
            }
            RolloutState::Watching => {
                let until = self.world.watch.map_or(self.now, |w| w.until);
                let over = rollout.promoted || self.now >= until;
                if !over && !paused {
                    self.wake_at(until);
                }
                over && !paused
            }
        }
    }

    /// Told until it is recorded.
    pub(crate) fn record_conclusion(&mut self) {
        if let Some(conclusion) = self.world.concluding.clone() {
            self.emit(Effect::Conclude(conclusion));
        }
    }

    /// Nothing is left but the instance kept for its log.
    fn only_left(&self, state: &RolloutState) -> bool {
        let kept = match state {
            RolloutState::Returning { instance, .. } => instance.as_ref(),
            RolloutState::Proving | RolloutState::Watching => None,
        };
        self.world
            .instances
            .iter()
            .all(|(id, i)| Some(id) == kept && !i.phase.alive())
    }

    /// Every service serves with as many copies as wanted, and the proxy knows.
    fn arrived(&self, goal: &Prepared, state: &RolloutState) -> bool {
        let mut table = routes::wanted(self.world, self.releases, self.now);
        let routed = self.proxy_known()
            && self
                .world
                .routes
                .as_ref()
                .is_some_and(|current| routes::same_but_for_generation(current, &mut table));
        let returning = matches!(state, RolloutState::Returning { .. });
        routed
            && goal.release.services.iter().all(|(name, released)| {
                if goal.is_job(name) {
                    return returning
                        || self.world.jobs_done.contains(&(goal.digest, name.clone()));
                }
                let gave_up = returning && hopeless(self.world, goal, name, released).is_some();
                gave_up || self.all_ready(goal, name, &goal.release)
            })
            && self.world.instances.values().all(|i| !stray(i, goal))
    }

    fn all_ready(&self, goal: &Prepared, name: &ServiceName, release: &Release) -> bool {
        let Some(released) = release.services.get(name) else {
            return true;
        };
        let current = routes::current(self.world, goal, name);
        let lacking = (1..=released.service.replicas).filter(|index| {
            let mut copies = current.iter();
            !copies.any(|(_, i)| i.index == *index && i.phase.ready())
                && !finished(self.world, goal, name, released, *index)
        });
        lacking.count() <= watch::written_off(self.world, goal, name, released)
    }
}

/// More copies than the file bears have failed as often as they may: the first of them.
fn hopeless(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
) -> Option<(u32, String)> {
    let over = over(world, goal, name, released);
    let job = goal.is_job(name);
    let bearable = !job && watch::bearable_unproven(world, released, over.len());
    over.into_iter().next().filter(|_| !bearable)
}

/// Copies that have failed as often as they may.
pub(crate) fn over(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
) -> Vec<(u32, String)> {
    let tries = match goal.is_job(name) {
        true => 1,
        false => tries_in_rollout(&released.service.restart),
    };
    let revision = goal.revisions.get(name);
    (1..=released.service.replicas.max(1))
        .filter_map(|index| {
            let attempt = world.attempt(name, index, revision)?;
            let over = (attempt.failures >= tries || attempt.timed_out)
                && !finished(world, goal, name, released, index);
            over.then(|| (index, attempt.cause.clone()))
        })
        .collect()
}

/// It ended well, nothing waits for an answer from it, and its policy lets it rest.
fn finished(
    world: &World,
    goal: &Prepared,
    name: &ServiceName,
    released: &ReleasedService,
    index: u32,
) -> bool {
    routes::rests(world, goal, name, index) && probe_plan(released, false).ready.is_empty()
}

/// Still proving although another revision is wanted.
fn stray(instance: &Instance, goal: &Prepared) -> bool {
    matches!(instance.phase, Phase::Starting | Phase::Warming { .. })
        && goal.revisions.get(&instance.service) != Some(&instance.revision)
}
