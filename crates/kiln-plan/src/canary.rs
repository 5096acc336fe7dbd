//! Traffic that moves step by step: which part of it the new instances get, and what each
//! step is judged by before the next one. The services without steps that a release
//! changes move whole with the first step, and their old instances stay ready.

use std::collections::BTreeMap;

use kiln_model::release::ReleasedService;
use kiln_model::spec::{CanaryStep, Order, Prometheus, Strategy};
use kiln_model::{InstanceId, Millis, RoutingTable, ServiceName};

use crate::analysis::{Opinion, judge_value};
use crate::apply::fail_rollout;
use crate::decide::Planner;
use crate::effect::Effect;
use crate::service::{is_exclusive, strategy};
use crate::traffic;
use crate::watch::changed;
use crate::world::{Prepared, Releases, StepVerdict, World};

/// A step that can't be judged takes so many times its duration, before somebody has to
/// say how to go on.
const PATIENCE: u64 = 10;
/// Until Prometheus is asked again that gave no answer.
const ASK_AGAIN: Millis = Millis(5_000);

/// A rollout's canary that is not through.
#[derive(Clone, Copy)]
pub(crate) struct UnderWay<'r> {
    pub from: &'r Prepared,
    pub to: &'r Prepared,
    /// Counts from 0.
    pub step: usize,
}

/// The steps of the service, if it can have some: of two that must not overlap, or whose
/// old copies go first, no part can be new.
pub(crate) fn steps_of(released: &ReleasedService) -> &[CanaryStep] {
    let stops_first = released.service.update.order == Some(Order::StopFirst);
    let stated = released.service.kiln.rollout.as_ref();
    match stated.filter(|_| strategy(released) == Some(&Strategy::Canary)) {
        Some(options) if !is_exclusive(released) && !stops_first => &options.steps,
        _ => &[],
    }
}

/// What of `to` is moved step by step: what `from` has another revision of.
fn stepped<'r>(
    from: &'r Prepared,
    to: &'r Prepared,
) -> impl Iterator<Item = (&'r ServiceName, &'r [CanaryStep])> {
    changed(Some(from), to)
        .filter(|(name, _)| from.release.services.contains_key(*name) && !from.is_job(name))
        .map(|(name, released)| (name, steps_of(released)))
        .filter(|(_, steps)| !steps.is_empty())
}

/// The canary of the rollout under way. Who goes back does not go slowly.
pub(crate) fn under_way<'r>(world: &World, releases: &'r Releases) -> Option<UnderWay<'r>> {
    let rollout = world.rollout.as_ref().filter(|r| r.proving())?;
    let step = usize::try_from(rollout.canary.step).ok()?;
    let under_way = UnderWay {
        from: releases.get(rollout.from?)?,
        to: releases.get(rollout.to.release()?)?,
        step,
    };
    let over = rollout.rollback || rollout.promoted || step >= under_way.steps();
    (!over).then_some(under_way)
}

impl<'r> UnderWay<'r> {
    /// As many as the service with the most has.
    pub fn steps(&self) -> usize {
        let steps = stepped(self.from, self.to).map(|(_, steps)| steps.len());
        steps.max().unwrap_or(0)
    }

    fn of(self, name: &ServiceName) -> Option<&'r CanaryStep> {
        let (_, steps) = stepped(self.from, self.to).find(|(other, _)| *other == name)?;
        steps.get(self.step).or(steps.last())
    }

    /// The percentage that the service's new instances get now; `None`: it has no steps.
    pub fn weight(self, name: &ServiceName) -> Option<u8> {
        self.of(name).map(|step| step.weight)
    }

    /// The longest of the step's.
    fn duration(&self) -> Millis {
        let steps = stepped(self.from, self.to).filter_map(|(_, steps)| steps.get(self.step));
        steps.map(|step| step.duration).max().unwrap_or_default()
    }

    /// The services that the step is about, with their weights, in words.
    fn weights(self) -> Vec<(ServiceName, u8)> {
        let names = stepped(self.from, self.to).map(|(name, _)| name);
        names
            .filter_map(|name| Some((name.clone(), self.weight(name)?)))
            .collect()
    }

    /// The table splits traffic as the step says. Where no old instance is left, the new
    /// ones have all of it.
    fn is_in_force(self, world: &World, table: &RoutingTable) -> bool {
        self.weights().iter().all(|(name, weight)| {
            let Some(route) = table.services.get(name) else {
                return false;
            };
            let new = |id: &InstanceId| {
                let instance = world.instances.get(id);
                instance.is_some_and(|i| world.is_current(i, self.to.revisions.get(name)))
            };
            match &route.split {
                Some(split) => split.weight == *weight,
                None => {
                    !route.backends.is_empty() && route.backends.iter().all(|b| new(&b.instance))
                }
            }
        })
    }
}

/// What a step's traffic says at its end.
enum Outcome {
    Good(String),
    /// It can't be said yet.
    Open(String),
    /// Somebody has been asked, and will answer.
    Asked,
}

impl Planner<'_> {
    /// Judges the present step, and goes on to the next or back.
    pub(crate) fn step_canary(&mut self) {
        let Some(canary) = under_way(self.world, self.releases) else {
            return;
        };
        if self.world.routes_doubtful {
            // Of a new proxy, or after a restart: soon it is known again.
            return;
        }
        let table = self.world.routes.as_ref();
        let in_force = table.is_some_and(|table| canary.is_in_force(self.world, table));
        let now = self.now;
        let Some(rollout) = &mut self.world.rollout else {
            return;
        };
        if !in_force {
            rollout.canary.since = None;
            return;
        }
        if rollout.paused.is_some() {
            return;
        }
        let since = match (rollout.canary.since, self.world.measured.at) {
            (Some(since), _) => since,
            // What was counted by then is not the step's.
            (None, None) => return,
            (None, Some(_)) => {
                rollout.canary.since = Some(now);
                self.world.marks.start = self.world.measured.traffic.clone();
                self.world.measured.queried.clear();
                now
            }
        };
        if let Some((name, why, culprit)) = self.bad_step(canary) {
            self.give_up_canary(canary, &name, &why, culprit);
            return;
        }
        let end = since.saturating_add(canary.duration());
        if now < end {
            return self.wake_at(end);
        }
        match self.outcome(canary, end) {
            Ok(Outcome::Good(text)) => self.next_step(canary, text),
            Ok(Outcome::Open(why)) => self.go_on_waiting(canary, since, &why),
            Ok(Outcome::Asked) => {}
            Err((name, why)) => self.give_up_canary(canary, &name, &why, None),
        }
    }

    /// The first of the changed services whose traffic is bad.
    fn bad_step(&self, canary: UnderWay<'_>) -> Option<(ServiceName, String, Option<InstanceId>)> {
        changed(Some(canary.from), canary.to).find_map(|(name, released)| {
            let pair = (Some(canary.from), canary.to);
            match traffic::opinion(self.world, pair, name, released)? {
                Opinion::Bad(why) => {
                    let culprit = traffic::culprit(self.world, canary.to, name);
                    Some((name.clone(), why, culprit))
                }
                Opinion::Good(_) | Opinion::Few(_) => None,
            }
        })
    }

    /// Its time is over: do all services' numbers suffice?
    fn outcome(
        &mut self,
        canary: UnderWay<'_>,
        end: Millis,
    ) -> Result<Outcome, (ServiceName, String)> {
        if self.world.measured.at.is_none_or(|at| at < end) {
            return Ok(Outcome::Asked);
        }
        let mut said = Vec::new();
        for (name, released) in changed(Some(canary.from), canary.to) {
            let options = released.service.kiln.rollout.as_ref();
            let analysis = options.and_then(|r| r.analysis.as_ref());
            let stated = analysis.is_some_and(|a| a.min_requests.is_some());
            let pair = (Some(canary.from), canary.to);
            let counted = traffic::opinion(self.world, pair, name, released);
            if let Some(Opinion::Few(text)) = counted.as_ref().filter(|_| stated) {
                return Ok(Outcome::Open(format!("service `{name}` had {text}")));
            }
            let prometheus = analysis.and_then(|a| a.prometheus.as_ref());
            let value = match prometheus.map(|p| self.answer_of(name, p)) {
                None => None,
                Some(None) => return Ok(Outcome::Asked),
                Some(Some(Opinion::Bad(text))) => return Err((name.clone(), text)),
                Some(Some(Opinion::Few(text))) => {
                    return Ok(Outcome::Open(format!("service `{name}`: {text}")));
                }
                Some(good) => good,
            };
            for opinion in counted.into_iter().chain(value) {
                said.push(format!("{name}: {}", opinion.text()));
            }
        }
        Ok(Outcome::Good(said.join("; ")))
    }

    /// What Prometheus says; `None`: it has only now been asked.
    fn answer_of(&mut self, name: &ServiceName, prometheus: &Prometheus) -> Option<Opinion> {
        let answer = self.world.measured.queried.get(name).cloned();
        let (at, opinion) = match answer {
            Some((at, Ok(value))) => (at, Some(judge_value(prometheus, value))),
            Some((at, Err(cause))) => (at, Some(Opinion::Few(cause))),
            None => (Millis(0), None),
        };
        if opinion.is_none() || matches!(opinion, Some(Opinion::Few(_))) {
            self.ask_prometheus(name, prometheus.clone(), at);
        }
        opinion
    }

    fn ask_prometheus(&mut self, service: &ServiceName, prometheus: Prometheus, last: Millis) {
        let next = last.saturating_add(ASK_AGAIN);
        if next > self.now {
            return self.wake_at(next);
        }
        let service = service.clone();
        self.emit(Effect::Query {
            service,
            prometheus,
        });
    }

    fn next_step(&mut self, canary: UnderWay<'_>, text: String) {
        self.record(canary, true, text);
        if let Some(rollout) = &mut self.world.rollout {
            rollout.canary.step += 1;
            rollout.canary.since = None;
        }
    }

    fn go_on_waiting(&mut self, canary: UnderWay<'_>, since: Millis, why: &str) {
        let patience = Millis(canary.duration().0.saturating_mul(PATIENCE));
        let last = since.saturating_add(patience);
        self.report(
            None,
            format!("the canary's step {} goes on: {why}", canary.step + 1),
        );
        if self.now < last {
            return self.wake_at(last);
        }
        let why = format!(
            "step {} of the canary can't be judged: {why}",
            canary.step + 1
        );
        if let Some(rollout) = &mut self.world.rollout {
            rollout.paused = Some(why);
        }
    }

    fn give_up_canary(
        &mut self,
        canary: UnderWay<'_>,
        name: &ServiceName,
        why: &str,
        culprit: Option<InstanceId>,
    ) {
        self.record(canary, false, format!("{name}: {why}"));
        let part = match canary.weight(name) {
            Some(weight) => format!("at {weight} % of its traffic"),
            None => "after its traffic had moved".into(),
        };
        let cause = format!("service `{name}`, {part}: {why}");
        self.report(None, format!("returning: {cause}"));
        fail_rollout(self.world, cause, culprit);
    }

    fn record(&mut self, canary: UnderWay<'_>, good: bool, text: String) {
        let verdict = StepVerdict {
            at: self.now,
            weights: canary.weights().into_iter().collect(),
            good,
            text,
        };
        if let Some(rollout) = &mut self.world.rollout {
            rollout.canary.verdicts.push(verdict);
        }
    }
}

/// How far a canary is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Counts from 1.
    pub step: usize,
    pub steps: usize,
    /// Percent of each service's traffic.
    pub weights: BTreeMap<ServiceName, u8>,
    pub duration: Millis,
}

/// `None`: no traffic is being moved step by step.
pub fn stage(world: &World, releases: &Releases) -> Option<Stage> {
    world.rollout.as_ref().filter(|r| r.moved)?;
    let canary = under_way(world, releases)?;
    Some(Stage {
        step: canary.step + 1,
        steps: canary.steps(),
        weights: canary.weights().into_iter().collect(),
        duration: canary.duration(),
    })
}
