//! What people have to say about a rollout that is under way: pause, resume, promote, and
//! what is shown of it. Giving it up is [`Event::Abandoned`].

use std::collections::BTreeMap;

use kiln_model::{ReleaseNumber, ServiceName};
use kiln_plan::{Event, Goal, Releases, Rollout, RolloutState, Stage, World};

use crate::api::error::ApiError;
use crate::api::types::{CanaryStatus, EventKind, RolloutStatus, StepVerdictLine, WatchStatus};
use crate::engine::Engine;
use crate::shared::Shared;

impl Engine {
    /// A wish that is refused if it can't be stored.
    pub(crate) fn wish(&mut self, event: Event) -> Result<(), ApiError> {
        let done = self.happened(event);
        done.map_err(|e| ApiError::internal(e.to_string()))
    }

    pub(crate) fn pause(&mut self, by: &str) -> Result<(), ApiError> {
        self.under_way()?;
        self.recorded(by, "pause");
        let why = format!("asked by {by}");
        self.wish(Event::Paused { why })
    }

    pub(crate) fn resume(&mut self, by: &str) -> Result<(), ApiError> {
        self.under_way()?;
        let rollout = self.keeper.world.rollout.as_ref();
        if rollout.is_none_or(|r| r.paused.is_none()) {
            return Err(ApiError::conflict(
                "the rollout is not paused",
                "kiln rollout status says how far it is",
            ));
        }
        self.recorded(by, "resume");
        self.tell(None, None, EventKind::Note, format!("resumed by {by}"));
        self.wish(Event::Resumed)
    }

    pub(crate) fn promote(&mut self, by: &str) -> Result<(), ApiError> {
        if self.keeper.world.watch.is_none() {
            self.under_way()?;
        }
        self.recorded(by, "promote");
        self.tell(None, None, EventKind::Note, format!("promoted by {by}"));
        self.wish(Event::Promoted)
    }

    fn recorded(&self, by: &str, action: &str) {
        let subject = self.keeper.world.environment.as_str();
        self.shared.record(by, action, subject, &[]);
    }

    /// There is a rollout that has not turned back.
    fn under_way(&self) -> Result<(), ApiError> {
        let environment = &self.keeper.world.environment;
        match self.keeper.world.rollout.as_ref().map(|r| &r.state) {
            None => Err(ApiError::conflict(
                format!("no rollout is under way in `{environment}`"),
                "kiln status says what serves; kiln rollback goes back",
            )),
            Some(RolloutState::Returning { cause, .. }) => Err(ApiError::conflict(
                format!("the rollout in `{environment}` is returning already: {cause}"),
                "kiln status says what serves",
            )),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn is_rolling_out(&self, number: ReleaseNumber) -> bool {
        self.keeper.world.rollout.as_ref().is_some_and(|rollout| {
            rollout.to == Goal::Release(number)
                && !matches!(rollout.state, RolloutState::Returning { .. })
                // Nothing would come of it until somebody says how to go on.
                && rollout.paused.is_none()
        })
    }

    pub(crate) fn refuse_second_rollout(&self) -> Result<(), ApiError> {
        let Some(rollout) = &self.keeper.world.rollout else {
            return Ok(());
        };
        let environment = &self.keeper.world.environment;
        if let Some(why) = &rollout.paused {
            return Err(ApiError::conflict(
                format!("the rollout in `{environment}` is paused: {why}"),
                "kiln rollout resume, promote or abort says how to go on",
            ));
        }
        let what = match (&rollout.state, rollout.to) {
            (RolloutState::Returning { .. }, _) => "the return from a failed rollout".to_owned(),
            (RolloutState::Watching, Goal::Release(n)) => {
                format!("release {n} serves, and its verdict")
            }
            (_, Goal::Release(n)) => format!("the rollout of release {n}"),
            (_, Goal::Nothing) => "taking everything down".to_owned(),
        };
        Err(ApiError::conflict(
            format!("{what} is still under way in `{environment}`"),
            "wait for it (kiln rollout status), or end it: kiln rollout abort, or promote",
        ))
    }

    /// A rollout's turns that no instance's phase tells of. `asked`: a pause was wished for,
    /// so that nobody has to be told that something is wrong.
    pub(crate) fn tell_turns(&self, before: &World, asked: bool) {
        let world = &self.keeper.world;
        let (Some(now), then) = (&world.rollout, &before.rollout) else {
            return;
        };
        self.tell_steps(now, then.as_ref());
        let said = |state: &RolloutState| then.as_ref().is_some_and(|r| r.state == *state);
        if let Some(why) = &now.paused
            && then.as_ref().is_none_or(|r| r.paused.is_none())
        {
            let release = now
                .to
                .release()
                .map_or_else(String::new, |n| format!(" {n}"));
            let text = format!("release{release} is paused: {why}");
            let kind = match asked {
                true => EventKind::Note,
                false => EventKind::Paused,
            };
            self.tell(None, None, kind, text);
        }
        if now.state == RolloutState::Watching
            && !said(&now.state)
            && let Some(watch) = world.watch
        {
            let span = watch.until.saturating_sub(watch.since);
            let text = format!(
                "release {} serves, and is watched for {span}",
                watch.release
            );
            self.tell(None, None, EventKind::Note, text);
        }
        if let RolloutState::Returning { cause, .. } = &now.state
            && !said(&now.state)
            && now.moved
        {
            self.tell(
                None,
                None,
                EventKind::Warning,
                format!("returning: {cause}"),
            );
        }
    }
}

impl Engine {
    /// A canary's steps: what begins, and how it ended, which the audit log keeps as well.
    fn tell_steps(&self, now: &Rollout, then: Option<&Rollout>) {
        let (Some(release), canary) = (now.to.release(), &now.canary) else {
            return;
        };
        let known = then.map_or(0, |r| r.canary.verdicts.len());
        for (at, verdict) in canary.verdicts.iter().enumerate().skip(known) {
            let step = at + 1;
            let word = if verdict.good { "good" } else { "bad" };
            let text = &verdict.text;
            let details = [
                ("step", step.to_string()),
                ("traffic", shares(&verdict.weights)),
                ("verdict", word.to_owned()),
                ("numbers", text.clone()),
            ];
            let subject = format!("{} release {release}", self.keeper.world.environment);
            self.shared.record("kiln", "canary", &subject, &details);
            let text = format!("canary step {step} of release {release} is {word}: {text}");
            self.tell(None, None, EventKind::Note, text);
        }
        let began = canary.since.is_some() && then.is_none_or(|r| r.canary.since.is_none());
        if began && let Some(stage) = kiln_plan::stage(&self.keeper.world, &self.keeper.releases) {
            let text = format!(
                "release {release} gets {} for {} (step {} of {})",
                shares(&stage.weights),
                stage.duration,
                stage.step,
                stage.steps
            );
            self.tell(None, None, EventKind::Note, text);
        }
    }
}

/// What is shown of a rollout under way.
pub(crate) fn status(
    world: &World,
    releases: &Releases,
    report: Vec<String>,
) -> Option<RolloutStatus> {
    let rollout = world.rollout.as_ref()?;
    let stage = kiln_plan::stage(world, releases);
    let state = match &rollout.state {
        _ if rollout.paused.is_some() => "paused",
        RolloutState::Proving if stage.is_some() => "canary",
        RolloutState::Proving if rollout.moved => "moving",
        RolloutState::Proving => "proving",
        RolloutState::Watching => "watching",
        RolloutState::Returning { .. } => "returning",
    };
    Some(RolloutStatus {
        to: rollout.to.release(),
        from: rollout.from,
        state: state.into(),
        paused: rollout.paused.clone(),
        failed: match &rollout.state {
            RolloutState::Returning { cause, .. } => Some(cause.clone()),
            RolloutState::Proving | RolloutState::Watching => None,
        },
        report,
        canary: canary(rollout, stage),
    })
}

fn canary(rollout: &Rollout, stage: Option<Stage>) -> Option<CanaryStatus> {
    let verdicts = &rollout.canary.verdicts;
    if stage.is_none() && verdicts.is_empty() {
        return None;
    }
    let ends = stage.as_ref().zip(rollout.canary.since);
    let ends = ends.map(|(stage, since)| since.saturating_add(stage.duration));
    Some(CanaryStatus {
        step: stage.as_ref().map(|s| s.step),
        steps: stage.as_ref().map(|s| s.steps),
        weights: stage.map(|s| s.weights).unwrap_or_default(),
        verdict_in: ends.map(|ends| ends.saturating_sub(Shared::steady_now()).0),
        verdicts: verdicts
            .iter()
            .map(|v| StepVerdictLine {
                weights: v.weights.clone(),
                good: v.good,
                text: v.text.clone(),
            })
            .collect(),
    })
}

/// `5 % of api, 10 % of web`.
fn shares(weights: &BTreeMap<ServiceName, u8>) -> String {
    let shares = weights
        .iter()
        .map(|(name, weight)| format!("{weight} % of {name}"));
    shares.collect::<Vec<_>>().join(", ")
}

/// The release that traffic goes to: while a verdict is waited for, the new one.
pub(crate) fn serving(world: &World) -> Option<ReleaseNumber> {
    let watching = world.rollout.as_ref().map(|r| &r.state) == Some(&RolloutState::Watching);
    let watched = world.watch.filter(|_| watching).map(|w| w.release);
    watched.or(world.proven)
}

/// The time after the last switch, with what is left of it.
pub(crate) fn watch(world: &World) -> Option<WatchStatus> {
    let watch = world.watch.as_ref()?;
    Some(WatchStatus {
        release: watch.release,
        back: watch.back,
        since: watch.since.0,
        verdict_in: watch.until.saturating_sub(Shared::steady_now()).0,
    })
}
