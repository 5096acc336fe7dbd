//! One environment's loop: a message comes in, the planner steps, the world is stored,
//! effects go out. Nothing here decides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::release::{Outcome, Reason};
use kiln_model::{InstanceId, Release, ReleaseNumber, ReleaseRecord};
use kiln_plan::{
    Conclusion, Effect, EffectKey, Event, Goal, Phase, Plan, Releases, RolloutState, World, check,
    step,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::api::error::ApiError;
use crate::api::types::{
    EnvironmentStatus, EventKind, EventRecord, Explanation, OutlineLine, ReleaseAnswer,
};
use crate::execute::Executor;
use crate::shared::Shared;
use crate::{log_tail, status};

/// Messages that wait for an engine; senders wait when it is full.
const QUEUE: usize = 256;
/// How long the proxy of an earlier daemon may take to be found again.
const ROUTES_LIMIT: Duration = Duration::from_secs(3);
/// Lines of a failing instance's log that are shown.
const SHOWN_LOG_LINES: usize = 30;

/// Something for an engine to take in.
pub enum Message {
    Event(Event),
    Release {
        release: Box<Release>,
        by: String,
        dry_run: bool,
        reply: Reply<ReleaseAnswer>,
    },
    Rollback {
        to: Option<ReleaseNumber>,
        by: String,
        reply: Reply<ReleaseAnswer>,
    },
    Down {
        by: String,
        reply: Reply<u64>,
    },
    Abandon {
        by: String,
        reply: Reply<()>,
    },
    Tainted {
        id: InstanceId,
        by: String,
        command: Vec<String>,
        reply: Reply<()>,
    },
    Status {
        reply: Reply<EnvironmentStatus>,
    },
    Explain {
        id: InstanceId,
        reply: Reply<Explanation>,
    },
}

pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

#[derive(Clone)]
pub struct EngineHandle {
    sender: mpsc::Sender<Message>,
}

impl EngineHandle {
    pub async fn send(&self, message: Message) -> Result<(), ApiError> {
        self.sender
            .send(message)
            .await
            .map_err(|_| ApiError::internal("the environment's engine has stopped"))
    }

    /// Sends a question and waits for its answer.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Message) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply)).await?;
        answer
            .await
            .map_err(|_| ApiError::internal("the environment's engine gave no answer"))?
    }
}

pub struct Engine {
    shared: Arc<Shared>,
    world: World,
    releases: Releases,
    executor: Executor,
    receiver: mpsc::Receiver<Message>,
    wake: Option<Instant>,
    observers: BTreeMap<InstanceId, JoinHandle<()>>,
    report: Vec<String>,
}

/// Starts the engine of an environment, new or as it was stored.
pub fn spawn(shared: Arc<Shared>, world: World) -> EngineHandle {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let executor = Executor::new(shared.clone(), world.environment.clone(), sender.clone());
    let engine = Engine {
        shared,
        world: world.recovered(),
        releases: Releases::default(),
        executor,
        receiver,
        wake: None,
        observers: BTreeMap::new(),
        report: Vec::new(),
    };
    tokio::spawn(engine.run());
    EngineHandle { sender }
}

impl Engine {
    async fn run(mut self) {
        self.adopt().await;
        for early in self.find_routes().await {
            self.handle(early).await;
        }
        while let Some(message) = self.next().await {
            self.handle(message).await;
        }
    }

    /// The next message, or the tick that was asked for. `None`: all senders are gone.
    async fn next(&mut self) -> Option<Message> {
        tokio::select! {
            message = self.receiver.recv() => message,
            () = sleep_until(self.wake) => {
                self.wake = None;
                Some(Message::Event(Event::Tick))
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
            world.routes.is_none()
                && (world.goal.release().is_some() || !world.instances.is_empty())
        };
        while unknown(&self.world) && early.len() < QUEUE {
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

    /// Finds out what the runtime really holds of this environment.
    async fn adopt(&mut self) {
        match self.executor.found(&self.world).await {
            Ok(instances) => {
                for observed in &instances {
                    if self.world.instances.contains_key(&observed.id) {
                        self.executor.watch_exit(observed.id.clone());
                    }
                }
                self.happened(Event::Found { instances });
            }
            Err(cause) => self.warn(format!("instances could not be listed: {cause}")),
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Event(event) => self.happened(event),
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
                self.happened(Event::Abandoned {
                    why: format!("asked by {by}"),
                });
                let _ = reply.send(Ok(()));
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
                let status = status::environment(
                    &self.shared,
                    &self.world,
                    &self.releases,
                    self.report.clone(),
                );
                tokio::spawn(async move {
                    let _ = reply.send(status.await);
                });
            }
            Message::Explain { id, reply } => {
                let _ = reply.send(status::explain(
                    &self.shared,
                    &self.world,
                    &self.releases,
                    &id,
                ));
            }
        }
    }

    fn happened(&mut self, event: Event) {
        let wanted = match &event {
            Event::Desired { goal, .. } => goal.release(),
            _ => None,
        };
        if let Err(error) = self.load_releases(wanted) {
            self.warn(format!("a release could not be read: {error}"));
            return;
        }
        let before = self.world.clone();
        self.tell_failure(&event);
        let plan = step(&mut self.world, &self.releases, event, Shared::now());
        if let Err(violation) = check(&self.world, &self.releases, &plan) {
            self.refuse(before, &plan, &violation.to_string());
            return;
        }
        self.tell_changes(&before);
        if self.world != before
            && let Err(error) = self.shared.state.save_world(&self.world)
        {
            // Effects without a stored intent would be forgotten by a crash.
            self.refuse(before, &plan, &error.to_string());
            return;
        }
        self.carry_out(plan);
    }

    /// Takes back a step; the same situation is planned again a second later.
    fn refuse(&mut self, before: World, plan: &Plan, why: &str) {
        tracing::error!(%why, ?plan, "plan refused");
        self.warn(format!("a step was refused: {why}"));
        self.world = before;
        self.wake = Some(Instant::now() + Duration::from_secs(1));
    }

    fn carry_out(&mut self, plan: Plan) {
        if let Some(at) = plan.wake {
            let ahead = Duration::from(at.saturating_sub(Shared::now()));
            let at = Instant::now() + ahead;
            self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
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
                Effect::Conclude(conclusion) => self.conclude(conclusion),
                Effect::Observe { id, probe } => {
                    let task = self.executor.observe(&self.world, id.clone(), probe);
                    if let Some(old) = self.observers.insert(id, task) {
                        old.abort();
                    }
                }
                other => self.executor.begin(&self.world, &self.releases, other),
            }
        }
        let world = &self.world;
        self.observers.retain(|id, task| {
            let keep = world.instances.get(id).is_some_and(|i| i.phase.rising());
            if !keep {
                task.abort();
            }
            keep
        });
    }

    /// Those the world refers to, and the one that is about to be wanted.
    fn load_releases(&mut self, wanted: Option<ReleaseNumber>) -> Result<(), String> {
        let mut needed = self.world.needed_releases();
        needed.extend(wanted);
        self.releases.retain(|number| needed.contains(&number));
        for number in needed {
            self.load(number)?;
        }
        Ok(())
    }

    fn load(&mut self, number: ReleaseNumber) -> Result<(), String> {
        if self.releases.get(number).is_some() {
            return Ok(());
        }
        let release = self
            .shared
            .state
            .release(&self.world.environment, number)
            .map_err(|e| e.to_string())?
            .ok_or_else(|| format!("release {number} is not in the database"))?;
        self.releases
            .insert(number, release)
            .map_err(|e| e.to_string())
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
        self.load_releases(None).map_err(ApiError::internal)?;
        let present = self
            .world
            .goal
            .release()
            .and_then(|n| Some((n, self.releases.get(n)?)));
        let mut probe = Releases::default();
        let probe_number = ReleaseNumber(0);
        probe
            .insert(probe_number, release.clone())
            .map_err(|e| ApiError::internal(e.to_string()))?;
        let outline = probe.get(probe_number).map_or_else(Vec::new, |to| {
            outline_lines(kiln_plan::outline::outline(present.map(|(_, p)| p), to))
        });
        if let Some((number, prepared)) = present
            && prepared.digest == digest
            && self.world.rollout.is_none()
        {
            return Ok(ReleaseAnswer {
                number,
                digest,
                unchanged: true,
                after_event,
                outline,
            });
        }
        let number = self.next_number()?;
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
        let layout = self.executor.lay_out(&self.world, &release).await?;
        self.executor.pin(&release, number).await?;
        let record = ReleaseRecord {
            number,
            digest,
            reason: reason.clone(),
            created: Shared::now(),
            by: by.clone(),
            outcome: Outcome::RollingOut,
        };
        self.shared
            .state
            .add_release(&release, &record)
            .map_err(|e| ApiError::internal(e.to_string()))?;
        self.audit_release(&by, &record);
        self.tell(
            None,
            None,
            EventKind::Rollout,
            format!("rolling out release {number}"),
        );
        self.happened(Event::Desired {
            goal: Goal::Release(number),
            layout,
        });
        Ok(ReleaseAnswer {
            number,
            digest,
            unchanged: false,
            after_event,
            outline,
        })
    }

    fn audit_release(&self, by: &str, record: &ReleaseRecord) {
        let subject = format!("{} release {}", self.world.environment, record.number);
        let digest = ("digest", record.digest.to_string());
        match &record.reason {
            Reason::Up => self.shared.record(by, "release", &subject, &[digest]),
            Reason::Rollback { to } => {
                self.shared
                    .record(by, "rollback", &subject, &[digest, ("to", to.to_string())]);
            }
        }
    }

    fn refuse_second_rollout(&self) -> Result<(), ApiError> {
        let Some(rollout) = &self.world.rollout else {
            return Ok(());
        };
        let what = match (&rollout.state, rollout.to) {
            (RolloutState::Returning { .. }, _) => "the return from a failed rollout".to_owned(),
            (_, Goal::Release(n)) => format!("the rollout of release {n}"),
            (_, Goal::Nothing) => "taking everything down".to_owned(),
        };
        Err(ApiError::conflict(
            format!("{what} is still under way in `{}`", self.world.environment),
            "wait for it (kiln status), or give it up with Ctrl-C in the `kiln up` that began it",
        ))
    }

    fn next_number(&self) -> Result<ReleaseNumber, ApiError> {
        let records = self.records()?;
        Ok(records.last().map_or(ReleaseNumber(1), |r| r.number.next()))
    }

    fn records(&self) -> Result<Vec<ReleaseRecord>, ApiError> {
        self.shared
            .state
            .records(&self.world.environment)
            .map_err(|e| ApiError::internal(e.to_string()))
    }

    async fn rollback(
        &mut self,
        to: Option<ReleaseNumber>,
        by: String,
    ) -> Result<ReleaseAnswer, ApiError> {
        let records = self.records()?;
        let present = self.world.goal.release().or(self.world.proven);
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
                format!("{what} in `{}`", self.world.environment),
                "kiln releases lists what there is",
            ));
        };
        let release = self
            .shared
            .state
            .release(&self.world.environment, target)
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
            .record(&by, "down", self.world.environment.as_str(), &[]);
        self.tell(
            None,
            None,
            EventKind::Rollout,
            "taking everything down".into(),
        );
        let layout = self.world.layout.clone();
        self.happened(Event::Desired {
            goal: Goal::Nothing,
            layout,
        });
        Ok(after)
    }

    fn tainted(
        &mut self,
        id: InstanceId,
        by: String,
        command: Vec<String>,
    ) -> Result<(), ApiError> {
        if !self.world.instances.contains_key(&id) {
            return Err(ApiError::not_found(
                format!("there is no instance `{id}`"),
                "kiln status lists them",
            ));
        }
        self.shared
            .record(&by, "exec", id.as_str(), &[("command", command.join(" "))]);
        let service = self.world.instances.get(&id).map(|i| i.service.clone());
        self.tell(
            service,
            Some(id.clone()),
            EventKind::Warning,
            format!(
                "{by} ran `{}` in {id}: it is tainted now",
                command.join(" ")
            ),
        );
        self.happened(Event::Tainted { id });
        Ok(())
    }

    fn conclude(&mut self, conclusion: Conclusion) {
        self.world.under_way.remove(&EffectKey::Conclude);
        let name = self.world.environment.clone();
        let (number, outcome, kind, text) = match conclusion {
            Conclusion::Proven { release } => (
                Some(release),
                Outcome::Proven,
                EventKind::Succeeded,
                format!("release {release} is proven and serves"),
            ),
            Conclusion::Down => {
                self.executor.forget_environment();
                (
                    None,
                    Outcome::Proven,
                    EventKind::Succeeded,
                    "everything is down".to_owned(),
                )
            }
            Conclusion::Failed {
                release,
                cause,
                instance,
            } => {
                let log = instance
                    .map(|id| log_tail::read(&self.shared.runtime, &id, SHOWN_LOG_LINES))
                    .unwrap_or_default();
                let back = match self.world.goal {
                    Goal::Release(n) => format!("release {n} serves"),
                    Goal::Nothing => "nothing serves, as before".to_owned(),
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
        self.shared.record("kiln", action, name.as_str(), &details);
        if let Some(number) = number
            && let Err(error) = self.shared.state.set_outcome(&name, number, outcome)
        {
            self.warn(format!(
                "the outcome of release {number} was not stored: {error}"
            ));
        }
        if let Err(error) = self.shared.state.save_world(&self.world) {
            self.warn(format!("the environment's state was not stored: {error}"));
        }
        self.tell(None, None, kind, text);
    }

    fn tell_failure(&self, event: &Event) {
        match event {
            Event::Failed { key, cause } => self.warn(format!("{}: {cause}", name_of(key))),
            Event::StartFailed { id, cause } => {
                let service = self.world.instances.get(id).map(|i| i.service.clone());
                let text = format!("{id} could not be started: {cause}");
                self.tell(service, Some(id.clone()), EventKind::Warning, text);
            }
            Event::Unhealthy { id, reason } => {
                let service = self.world.instances.get(id).map(|i| i.service.clone());
                let text = format!("{id} is unhealthy: {reason}");
                self.tell(service, Some(id.clone()), EventKind::Warning, text);
            }
            Event::Routed {
                failed: Some(cause),
                ..
            } => self.warn(cause.clone()),
            _ => {}
        }
    }

    fn tell_changes(&self, before: &World) {
        for (id, instance) in &self.world.instances {
            let old = before.instances.get(id).map(|i| &i.phase);
            let changed = old.is_none_or(|phase| {
                std::mem::discriminant(phase) != std::mem::discriminant(&instance.phase)
            });
            if changed {
                let phase = phase_name(&instance.phase);
                let text = match &instance.phase {
                    Phase::Ended { status, .. } => format!("{id} {status}"),
                    _ => format!("{id} {phase}"),
                };
                let kind = EventKind::Instance {
                    phase: phase.to_owned(),
                };
                self.tell(Some(instance.service.clone()), Some(id.clone()), kind, text);
            }
        }
        for (id, instance) in &before.instances {
            if !self.world.instances.contains_key(id) {
                let kind = EventKind::Instance {
                    phase: "gone".into(),
                };
                let text = format!("{id} is gone");
                self.tell(Some(instance.service.clone()), Some(id.clone()), kind, text);
            }
        }
    }

    fn warn(&self, text: String) {
        tracing::warn!(environment = %self.world.environment, "{text}");
        self.tell(None, None, EventKind::Warning, text);
    }

    fn tell(
        &self,
        service: Option<kiln_model::ServiceName>,
        instance: Option<InstanceId>,
        kind: EventKind,
        text: String,
    ) {
        self.shared.tell(EventRecord {
            id: 0,
            time: Shared::now(),
            environment: self.world.environment.clone(),
            service,
            instance,
            kind,
            text,
        });
    }
}

/// A phase in one word.
pub fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Warming { .. } => "warming",
        Phase::Ready { .. } => "ready",
        Phase::Draining => "draining",
        Phase::Stopping => "stopping",
        Phase::Ended { .. } => "ended",
        Phase::Removing => "removing",
    }
}

fn name_of(key: &EffectKey) -> String {
    match key {
        EffectKey::Networks => "setting up networks".into(),
        EffectKey::Start(id) => format!("starting {id}"),
        EffectKey::Observe(id) => format!("watching {id}"),
        EffectKey::Route => "telling the proxy".into(),
        EffectKey::Drain(id) => format!("draining {id}"),
        EffectKey::Stop(id) => format!("stopping {id}"),
        EffectKey::Remove(id) => format!("removing {id}"),
        EffectKey::Conclude => "concluding".into(),
    }
}

fn outline_lines(steps: Vec<kiln_plan::outline::Step>) -> Vec<OutlineLine> {
    use kiln_plan::outline::Action;
    steps
        .into_iter()
        .map(|step| {
            let action = match step.action {
                Action::Create => "create",
                Action::Replace => "replace",
                Action::Handoff => "hand over",
                Action::RunJob => "run",
                Action::Adjust => "adjust",
                Action::Keep => "keep",
                Action::Remove => "remove",
            };
            OutlineLine {
                service: step.service,
                action: action.into(),
                why: step.why,
            }
        })
        .collect()
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
