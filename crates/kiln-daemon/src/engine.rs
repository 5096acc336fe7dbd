//! One environment's loop: a message comes in, the planner steps, the world is stored,
//! effects go out. Nothing here decides.

mod message;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::release::{Outcome, Reason};
use kiln_model::{InstanceId, Millis, Release, ReleaseNumber, ReleaseRecord};
use kiln_plan::{
    Conclusion, Effect, EffectKey, Event, Goal, Keeper, Layout, Plan, Refused, Releases, TRY_AGAIN,
    World,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::api::error::ApiError;
use crate::api::types::{EventKind, EventRecord, ReleaseAnswer};
use crate::crash;
use crate::execute::Executor;
use crate::narrate::outline_lines;
use crate::shared::Shared;
use crate::{log_tail, status};
pub use message::{EngineHandle, Message};

/// How often the runtime is asked what it really holds: what told of an instance's end
/// may itself have failed.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Messages that wait for an engine; senders wait when it is full.
const QUEUE: usize = 256;
/// How long the proxy of an earlier daemon may take to be found again.
const ROUTES_LIMIT: Duration = Duration::from_secs(3);
/// Lines of a failing instance's log that are shown.
const SHOWN_LOG_LINES: usize = 30;

pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) keeper: Keeper,
    executor: Executor,
    receiver: mpsc::Receiver<Message>,
    wake: Option<Instant>,
    observers: BTreeMap<InstanceId, JoinHandle<()>>,
    report: Vec<String>,
    look_again: Interval,
    /// Nothing is left to see to.
    forgotten: bool,
}

/// Starts the engine of an environment, new or as it was stored.
pub fn spawn(shared: Arc<Shared>, world: World) -> EngineHandle {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let executor = Executor::new(shared.clone(), world.environment.clone(), sender.clone());
    let engine = Engine {
        shared,
        keeper: Keeper::resume(world),
        executor,
        receiver,
        wake: None,
        observers: BTreeMap::new(),
        report: Vec::new(),
        look_again: look_again(),
        forgotten: false,
    };
    tokio::spawn(engine.run());
    EngineHandle { sender }
}

fn look_again() -> Interval {
    let mut interval = tokio::time::interval_at(Instant::now() + LOOK_AGAIN, LOOK_AGAIN);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Engine {
    async fn run(mut self) {
        if let Err(error) = self.close_records() {
            self.warn(format!("releases that were not begun: {}", error.message));
        }
        self.adopt().await;
        for early in self.find_routes().await {
            self.handle(early).await;
        }
        while !self.forgotten
            && let Some(message) = self.next().await
        {
            self.handle(message).await;
        }
    }

    /// The next message, or the tick that was asked for. `None`: all senders are gone.
    async fn next(&mut self) -> Option<Message> {
        loop {
            let wake = self.wake;
            tokio::select! {
                message = self.receiver.recv() => return message,
                _ = self.look_again.tick() => self.look_again().await,
                () = sleep_until(wake) => {
                    self.wake = None;
                    return Some(Message::Event(Event::Tick));
                }
            }
        }
    }

    /// Takes in events until it is known what the proxy sends where, so that nobody is
    /// told that nothing serves because nothing is known yet. Returns the questions that
    /// came meanwhile: those are answered after at most [`ROUTES_LIMIT`], come what may.
    async fn find_routes(&mut self) -> Vec<Message> {
        let mut early = Vec::new();
        let limit = Instant::now() + ROUTES_LIMIT;
        let unknown = |world: &World| {
            (world.routes.is_none() || world.routes_doubtful)
                && (world.goal.release().is_some() || !world.instances.is_empty())
        };
        while unknown(&self.keeper.world) && early.len() < QUEUE {
            let message = tokio::select! {
                message = self.next() => message,
                () = tokio::time::sleep_until(limit) => break,
            };
            match message {
                Some(event @ Message::Event(_)) => self.handle(event).await,
                Some(question) => early.push(question),
                None => break,
            }
        }
        early
    }

    /// A daemon may have ended between a release's record and its rollout: nobody ever
    /// wanted it, and it says so.
    fn close_records(&mut self) -> Result<(), ApiError> {
        let world = &self.keeper.world;
        let mut wanted = world.needed_releases();
        wanted.extend(world.concluding.as_ref().and_then(Conclusion::release));
        let name = world.environment.clone();
        for record in self.records()? {
            if record.outcome == Outcome::RollingOut && !wanted.contains(&record.number) {
                let cause = "the daemon ended before it was begun".to_owned();
                let outcome = Outcome::Failed { cause };
                let closed = self.shared.state.set_outcome(&name, record.number, outcome);
                closed.map_err(|e| ApiError::internal(e.to_string()))?;
            }
        }
        Ok(())
    }

    /// Finds out what the runtime really holds of this environment.
    async fn adopt(&mut self) {
        match self.executor.found(&self.keeper.world).await {
            Ok(instances) => {
                for observed in &instances {
                    if self.keeper.world.instances.contains_key(&observed.id) {
                        self.executor.watch_exit(observed.id.clone());
                    }
                }
                self.noticed(Event::Found { instances });
            }
            Err(cause) => self.warn(format!("instances could not be listed: {cause}")),
        }
    }

    async fn look_again(&mut self) {
        if self.keeper.world.instances.is_empty() {
            return;
        }
        match self.executor.found(&self.keeper.world).await {
            Ok(instances) => self.noticed(Event::Found { instances }),
            Err(cause) => self.warn(format!("instances could not be listed: {cause}")),
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Event(event) => self.noticed(event),
            Message::Release {
                release,
                by,
                dry_run,
                reply,
            } => {
                let answer = self.release(*release, Reason::Up, by, dry_run).await;
                let _ = reply.send(answer);
            }
            Message::Rollback { to, by, reply } => {
                let answer = self.rollback(to, by).await;
                let _ = reply.send(answer);
            }
            Message::Down { by, reply } => {
                let _ = reply.send(self.down(by));
            }
            Message::Abandon { by, reply } => {
                let why = format!("asked by {by}");
                let _ = reply.send(self.wish(Event::Abandoned { why }));
            }
            Message::Forget { by, reply } => {
                let done = self.forget(&by).await;
                self.forgotten = done.is_ok();
                let _ = reply.send(done);
            }
            Message::Pause { by, reply } => {
                let _ = reply.send(self.pause(&by));
            }
            Message::Resume { by, reply } => {
                let _ = reply.send(self.resume(&by));
            }
            Message::Promote { by, reply } => {
                let _ = reply.send(self.promote(&by));
            }
            Message::Tainted {
                id,
                by,
                command,
                reply,
            } => {
                let _ = reply.send(self.tainted(id, by, command));
            }
            Message::Status { reply } => {
                let (world, releases) = (&self.keeper.world, &self.keeper.releases);
                let status = status::environment(world, releases, self.report.clone());
                let _ = reply.send(Ok(status));
            }
            Message::Explain { id, reply } => {
                let _ = reply.send(status::explain(
                    &self.shared,
                    &self.keeper.world,
                    &self.keeper.releases,
                    &id,
                ));
            }
        }
    }

    /// Takes an event in and sees to what follows; what that brings about at once comes
    /// next.
    pub(crate) fn happened(&mut self, event: Event) -> Result<(), Refused> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            self.tell_failure(&event);
            let asked = matches!(event, Event::Paused { .. });
            let before = self.keeper.world.clone();
            let taken = self
                .keeper
                .take(&self.shared.state, event, Shared::steady_now());
            self.tell_changes(&before);
            self.tell_turns(&before, asked);
            let plan = match taken {
                Ok(plan) => plan,
                Err(refused) => {
                    tracing::error!(?refused, "step refused");
                    self.warn(format!("a step was refused: {refused}"));
                    self.wake_in(TRY_AGAIN);
                    return Err(refused);
                }
            };
            next = self.carry_out(plan);
        }
        Ok(())
    }

    /// A fact: if nothing can be done about it now, it is planned for again soon.
    fn noticed(&mut self, event: Event) {
        // Said and set to be tried again by `happened`.
        let _ = self.happened(event);
    }

    fn wake_in(&mut self, ahead: Millis) {
        let at = Instant::now() + Duration::from(ahead);
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }

    fn carry_out(&mut self, plan: Plan) -> Option<Event> {
        let mut follows = None;
        if let Some(at) = plan.wake {
            self.wake_in(at.saturating_sub(Shared::steady_now()));
        }
        if !plan.report.is_empty() {
            self.report = plan
                .report
                .iter()
                .map(|line| match &line.service {
                    Some(service) => format!("{service}: {}", line.text),
                    None => line.text.clone(),
                })
                .collect();
        }
        for effect in plan.effects {
            match effect {
                Effect::Conclude(conclusion) => {
                    crash::point("before", "conclude");
                    follows = self.conclude(conclusion);
                    crash::point("after", "conclude");
                }
                Effect::Observe { id, probe } => {
                    let task = self.executor.observe(&self.keeper.world, id.clone(), probe);
                    if let Some(old) = self.observers.insert(id, task) {
                        old.abort();
                    }
                }
                other => self
                    .executor
                    .begin(&self.keeper.world, &self.keeper.releases, other),
            }
        }
        let world = &self.keeper.world;
        self.observers.retain(|id, task| {
            let keep = world.instances.get(id).is_some_and(|i| i.phase.rising());
            if !keep {
                task.abort();
            }
            keep
        });
        follows
    }

    async fn release(
        &mut self,
        release: Release,
        reason: Reason,
        by: String,
        dry_run: bool,
    ) -> Result<ReleaseAnswer, ApiError> {
        let digest = release
            .digest()
            .map_err(|e| ApiError::internal(e.to_string()))?;
        let after_event = self
            .shared
            .state
            .last_event()
            .map_err(|e| ApiError::internal(e.to_string()))?;
        self.keeper
            .load(&self.shared.state, None)
            .map_err(ApiError::internal)?;
        let present = self
            .keeper
            .world
            .goal
            .release()
            .and_then(|n| Some((n, self.keeper.releases.get(n)?)));
        let mut probe = Releases::default();
        let probe_number = ReleaseNumber(0);
        probe
            .insert(probe_number, release.clone())
            .map_err(|e| ApiError::internal(e.to_string()))?;
        let outline = probe.get(probe_number).map_or_else(Vec::new, |to| {
            outline_lines(kiln_plan::outline::outline(present.map(|(_, p)| p), to))
        });
        // Who asks for what is under way already sees it through like who began it: so an
        // answer that was lost may be asked for again.
        if let Some((number, prepared)) = present
            && prepared.digest == digest
            && (self.keeper.world.rollout.is_none() || self.is_rolling_out(number))
        {
            return Ok(ReleaseAnswer {
                number,
                digest,
                unchanged: self.keeper.world.rollout.is_none(),
                after_event,
                outline,
            });
        }
        let records = self.records()?;
        let number = records.last().map_or(ReleaseNumber(1), |r| r.number.next());
        if dry_run {
            return Ok(ReleaseAnswer {
                number,
                digest,
                unchanged: false,
                after_event,
                outline,
            });
        }
        self.refuse_second_rollout()?;
        let layout = self.executor.lay_out(&self.keeper.world, &release).await?;
        self.executor.pin(&release, number).await?;
        let record = ReleaseRecord {
            number,
            digest,
            reason: reason.clone(),
            created: Shared::now(),
            by: by.clone(),
            outcome: Outcome::RollingOut,
        };
        crash::point("before", "release");
        self.shared
            .state
            .add_release(&release, &record)
            .map_err(|e| ApiError::internal(e.to_string()))?;
        crash::point("after", "release");
        self.audit_release(&by, &record);
        self.tell(
            None,
            None,
            EventKind::Rollout,
            format!("rolling out release {number}"),
        );
        // What never proved itself gets no credit for having been there before.
        let proven = |number| {
            records
                .iter()
                .any(|r| r.number == number && r.outcome == Outcome::Proven)
        };
        let rollback = matches!(reason, Reason::Rollback { to } if proven(to));
        self.want(Goal::Release(number), layout, rollback)?;
        Ok(ReleaseAnswer {
            number,
            digest,
            unchanged: false,
            after_event,
            outline,
        })
    }

    /// What could not be stored was not begun, and its release says so.
    fn want(&mut self, goal: Goal, layout: Layout, rollback: bool) -> Result<(), ApiError> {
        let desired = Event::Desired {
            goal,
            layout,
            rollback,
        };
        let Err(refused) = self.happened(desired) else {
            return Ok(());
        };
        if let Some(number) = goal.release() {
            let cause = refused.to_string();
            let environment = &self.keeper.world.environment;
            let outcome = Outcome::Failed { cause };
            if let Err(error) = self.shared.state.set_outcome(environment, number, outcome) {
                self.warn(format!("the outcome of release {number}: {error}"));
            }
        }
        Err(ApiError::internal(refused.to_string()))
    }

    fn audit_release(&self, by: &str, record: &ReleaseRecord) {
        let subject = format!(
            "{} release {}",
            self.keeper.world.environment, record.number
        );
        let digest = ("digest", record.digest.to_string());
        match &record.reason {
            Reason::Up => self.shared.record(by, "release", &subject, &[digest]),
            Reason::Rollback { to } => {
                self.shared
                    .record(by, "rollback", &subject, &[digest, ("to", to.to_string())]);
            }
        }
    }

    pub(crate) fn records(&self) -> Result<Vec<ReleaseRecord>, ApiError> {
        self.shared
            .state
            .records(&self.keeper.world.environment)
            .map_err(|e| ApiError::internal(e.to_string()))
    }

    async fn rollback(
        &mut self,
        to: Option<ReleaseNumber>,
        by: String,
    ) -> Result<ReleaseAnswer, ApiError> {
        let records = self.records()?;
        let present = self
            .keeper
            .world
            .goal
            .release()
            .or(self.keeper.world.proven);
        let now = records
            .iter()
            .find(|r| Some(r.number) == present)
            .map(|r| r.digest);
        let target = match to {
            Some(number) => records.iter().find(|r| r.number == number),
            None => records.iter().rev().find(|r| {
                r.outcome == Outcome::Proven && Some(r.number) < present && Some(r.digest) != now
            }),
        };
        let Some(target) = target.map(|r| r.number) else {
            let what = to.map_or("there is no earlier proven release".to_owned(), |n| {
                format!("there is no release {n}")
            });
            return Err(ApiError::not_found(
                format!("{what} in `{}`", self.keeper.world.environment),
                "kiln releases lists what there is",
            ));
        };
        let release = self
            .shared
            .state
            .release(&self.keeper.world.environment, target)
            .map_err(|e| ApiError::internal(e.to_string()))?
            .ok_or_else(|| ApiError::internal(format!("release {target} has no content")))?;
        self.release(release, Reason::Rollback { to: target }, by, false)
            .await
    }

    fn down(&mut self, by: String) -> Result<u64, ApiError> {
        self.refuse_second_rollout()?;
        let after = self
            .shared
            .state
            .last_event()
            .map_err(|e| ApiError::internal(e.to_string()))?;
        self.shared
            .record(&by, "down", self.keeper.world.environment.as_str(), &[]);
        self.tell(
            None,
            None,
            EventKind::Rollout,
            "taking everything down".into(),
        );
        let layout = self.keeper.world.layout.clone();
        self.want(Goal::Nothing, layout, false)?;
        Ok(after)
    }

    fn tainted(
        &mut self,
        id: InstanceId,
        by: String,
        command: Vec<String>,
    ) -> Result<(), ApiError> {
        if !self.keeper.world.instances.contains_key(&id) {
            return Err(ApiError::not_found(
                format!("there is no instance `{id}`"),
                "kiln status lists them",
            ));
        }
        self.shared
            .record(&by, "exec", id.as_str(), &[("command", command.join(" "))]);
        let service = self
            .keeper
            .world
            .instances
            .get(&id)
            .map(|i| i.service.clone());
        self.tell(
            service,
            Some(id.clone()),
            EventKind::Warning,
            format!(
                "{by} ran `{}` in {id}: it is tainted now",
                command.join(" ")
            ),
        );
        self.noticed(Event::Tainted { id });
        Ok(())
    }

    /// Records how a rollout ended, then tells it.
    fn conclude(&mut self, conclusion: Conclusion) -> Option<Event> {
        let name = self.keeper.world.environment.clone();
        let done = conclusion.clone();
        let (number, outcome, kind, text) = match conclusion {
            Conclusion::Proven { release } => (
                Some(release),
                Outcome::Proven,
                EventKind::Succeeded,
                format!("release {release} is proven and serves"),
            ),
            Conclusion::Stayed { release, cause } => {
                let kind = EventKind::Failed { log: Vec::new() };
                let text = format!("not taken down: {cause}; release {release} serves");
                (None, Outcome::Proven, kind, text)
            }
            Conclusion::Down => {
                let text = "everything is down".to_owned();
                (None, Outcome::Proven, EventKind::Succeeded, text)
            }
            Conclusion::Failed {
                release,
                cause,
                instance,
                back,
            } => {
                let log = instance
                    .map(|id| log_tail::read(&self.shared.runtime, &id, SHOWN_LOG_LINES))
                    .unwrap_or_default();
                let back = match back {
                    Some(n) => format!("release {n} serves"),
                    None => "nothing serves, as before".to_owned(),
                };
                let text = format!("release {release} failed: {cause}; {back}");
                let outcome = Outcome::Failed { cause };
                (Some(release), outcome, EventKind::Failed { log }, text)
            }
        };
        let action = match &outcome {
            Outcome::Failed { .. } => "refuse",
            _ => "replace",
        };
        let details = [("outcome", text.clone())];
        if let Some(number) = number
            && let Err(error) = self.shared.state.set_outcome(&name, number, outcome)
        {
            let cause = error.to_string();
            self.executor.failed_later(EffectKey::Conclude, cause);
            return None;
        }
        self.shared.record("kiln", action, name.as_str(), &details);
        self.tell(None, None, kind, text);
        if done.empties() {
            // It has ended when they are gone.
            self.executor.forget_environment(done);
            return None;
        }
        Some(Event::Concluded { conclusion: done })
    }

    pub(crate) fn warn(&self, text: String) {
        tracing::warn!(environment = %self.keeper.world.environment, "{text}");
        self.tell(None, None, EventKind::Warning, text);
    }

    pub(crate) fn tell(
        &self,
        service: Option<kiln_model::ServiceName>,
        instance: Option<InstanceId>,
        kind: EventKind,
        text: String,
    ) {
        self.shared.tell(EventRecord {
            id: 0,
            time: Shared::now(),
            environment: self.keeper.world.environment.clone(),
            service,
            instance,
            kind,
            text,
        });
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
