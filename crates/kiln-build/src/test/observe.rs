//! The running image: what is asked of it from its start on, each a case.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_model::instance::{ExitStatus, ObservedState};
use kiln_model::spec::{HealthTest, Healthcheck};
use kiln_model::suite::Resource;
use kiln_model::{InstanceId, Millis};

use super::sheet::{CaseResult, Sheet};
use super::{Outcome, TestFailure, TestRequest, Tester, check, goss, look_again};

/// How long a service must stay up once it listens.
const LISTENING: Duration = Duration::from_millis(300);

/// How long checks are retried, all together: a program may listen late. After that, each
/// of them is tried once.
const CHECK_LIMIT: Duration = Duration::from_secs(20);

/// How long a `post_start` hook may take alone.
const HOOK_LIMIT: Millis = Millis(120_000);

/// A healthcheck's start period and retries are waited for, but never longer.
const HEALTH_LIMIT: Duration = Duration::from_secs(120);

/// Between two attempts, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Why waiting ended.
enum End {
    Settled,
    Exited(ExitStatus),
}

/// How a test went on once it had begun.
enum Standing {
    /// It runs: its checks can be asked.
    Up,
    /// It has ended as it should.
    Completed,
    /// It can't tell without its peers; why.
    Inconclusive(String),
    /// The sheet says why.
    Down,
}

/// An image that runs.
pub(super) struct Running<'a> {
    pub tester: &'a Tester,
    pub request: &'a TestRequest,
    pub id: &'a InstanceId,
    pub cancel: &'a AtomicBool,
}

impl Running<'_> {
    /// Takes down what was found. `Err`: it could not be found out.
    pub fn observe(&self, sheet: &mut Sheet) -> Result<(Outcome, Vec<u16>), TestFailure> {
        let mut outcome = match self.begin(sheet)? {
            Standing::Up => self.health(sheet)?,
            Standing::Completed => {
                self.skip_checks(sheet, "the job has ended");
                return Ok((Outcome::Passed, Vec::new()));
            }
            Standing::Inconclusive(why) => {
                self.skip_checks(sheet, &why);
                return Ok((Outcome::Inconclusive(why), Vec::new()));
            }
            Standing::Down => {
                self.skip_checks(sheet, "it did not stay up");
                return Ok((Outcome::Passed, Vec::new()));
            }
        };
        if sheet.has_failed() {
            outcome = Outcome::Passed;
        }
        let limit = Instant::now() + CHECK_LIMIT;
        for (name, check) in self.request.running_checks() {
            let result = self.until(limit, || check::run(&self.tester.runtime, self.id, check))?;
            sheet.checked(name, result);
        }
        for (file, goss) in self.request.goss() {
            for resource in &goss.resources {
                self.resource(file, resource, limit, sheet)?;
            }
        }
        let listens = self.tester.runtime.listening(self.id).unwrap_or_default();
        Ok((outcome, listens))
    }

    fn skip_checks(&self, sheet: &mut Sheet, why: &str) {
        let checks = self.request.running_checks().map(|(name, _)| name);
        let resources = self.request.goss().flat_map(|(file, goss)| {
            let resources = goss.resources.iter();
            resources.map(move |resource| format!("{file}: {}", resource.id))
        });
        for name in checks.chain(resources) {
            sheet.take(name, CaseResult::Skipped(why.to_owned()));
        }
    }

    /// One of goss's, looked at until all its attributes are as they must be.
    fn resource(
        &self,
        file: &str,
        resource: &Resource,
        limit: Instant,
        sheet: &mut Sheet,
    ) -> Result<(), TestFailure> {
        let mut seen = Vec::new();
        let settled = self.until(limit, || {
            let inside = goss::Instance::of(&self.tester.runtime, self.id)?;
            seen = goss::look(&inside, resource);
            let failed =
                |(_, result): &(String, CaseResult)| matches!(result, CaseResult::Failed(_));
            match seen.iter().any(failed) {
                true => Err("it is not as it must be".into()),
                false => Ok(()),
            }
        })?;
        if seen.is_empty() {
            sheet.checked(format!("{file}: {}", resource.id), settled);
        }
        for (name, result) in seen {
            sheet.take(format!("{file}: {name}"), result);
        }
        Ok(())
    }

    /// The hooks, and whether it stays up.
    fn begin(&self, sheet: &mut Sheet) -> Result<Standing, TestFailure> {
        let peers = self.request.peers;
        for hook in &self.request.post_start {
            match check::hook(&self.tester.runtime, self.id, hook, HOOK_LIMIT) {
                Ok(()) => sheet.take("post_start", CaseResult::Passed),
                Err(cause) if peers => {
                    sheet.take("post_start", CaseResult::Skipped(cause.clone()));
                    let why = format!("post_start fails alone: {cause}");
                    return Ok(Standing::Inconclusive(why));
                }
                Err(cause) => {
                    sheet.take("post_start", CaseResult::Failed(cause));
                    return Ok(Standing::Down);
                }
            }
        }
        let limit = self.request.settle;
        let (why, alone) = match (self.settle()?, self.request.completes) {
            (End::Exited(status), true) if status.success() => {
                sheet.take("start", CaseResult::Passed);
                return Ok(Standing::Completed);
            }
            (End::Settled, false) => {
                sheet.take("start", CaseResult::Passed);
                return Ok(Standing::Up);
            }
            // Checks need something that runs: without it they have failed.
            (End::Exited(status), _) => {
                let alone = peers && !self.request.asks_what_runs();
                (format!("the program {status}"), alone)
            }
            (End::Settled, true) => (format!("the job was still running after {limit}"), peers),
        };
        Ok(match alone {
            true => {
                let why = format!("{why} alone");
                sheet.take("start", CaseResult::Skipped(why.clone()));
                Standing::Inconclusive(why)
            }
            false => {
                let why = format!("{why} in its isolated test");
                sheet.take("start", CaseResult::Failed(why));
                Standing::Down
            }
        })
    }

    /// Waits until the program ends, or has stayed up for its time. One that listens is
    /// done with its start: it has [`LISTENING`] to show what it writes then.
    fn settle(&self) -> Result<End, TestFailure> {
        let mut end = Instant::now() + Duration::from(self.request.settle);
        let mut listens = self.request.completes;
        let runtime = &self.tester.runtime;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(TestFailure::Cancelled);
            }
            match runtime.observe(self.id).map(|o| o.state) {
                Some(ObservedState::Exited { status, .. }) => return Ok(End::Exited(status)),
                Some(ObservedState::Dead) | None => return Ok(End::Exited(ExitStatus::Unknown)),
                Some(ObservedState::Starting | ObservedState::Running { .. }) => {}
            }
            if !listens && runtime.listening(self.id).is_ok_and(|p| !p.is_empty()) {
                listens = true;
                end = end.min(Instant::now() + LISTENING);
            }
            if Instant::now() >= end {
                return Ok(End::Settled);
            }
            look_again();
        }
    }

    /// Tries until it succeeds, or until `limit`.
    fn until(
        &self,
        limit: Instant,
        mut attempt: impl FnMut() -> Result<(), String>,
    ) -> Result<Result<(), String>, TestFailure> {
        let (mut wait, longest) = RETRY;
        loop {
            let result = attempt();
            if result.is_ok() || Instant::now() >= limit {
                return Ok(result);
            }
            if self.cancel.load(Ordering::Relaxed) {
                return Err(TestFailure::Cancelled);
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(longest);
        }
    }

    fn health(&self, sheet: &mut Sheet) -> Result<Outcome, TestFailure> {
        let Some((health, command)) = self.health_command() else {
            return Ok(Outcome::Passed);
        };
        match self.healthy(health, &command)? {
            Ok(()) => sheet.take("healthcheck", CaseResult::Passed),
            Err(cause) if self.request.peers => {
                let why = format!("the healthcheck fails alone: {cause}");
                sheet.take("healthcheck", CaseResult::Skipped(why.clone()));
                return Ok(Outcome::Inconclusive(why));
            }
            Err(cause) => {
                let cause = format!("it kept failing: {cause}");
                sheet.take("healthcheck", CaseResult::Failed(cause));
            }
        }
        Ok(Outcome::Passed)
    }

    fn health_command(&self) -> Option<(&Healthcheck, Vec<String>)> {
        let health = self.request.healthcheck.as_ref()?;
        let command = match health.test.as_ref()? {
            HealthTest::Exec(argv) => argv.clone(),
            HealthTest::Shell(text) => {
                let shell = self.request.shell.as_slice();
                let default = ["/bin/sh", "-c"].map(str::to_owned);
                let shell = if shell.is_empty() { &default } else { shell };
                shell.iter().cloned().chain([text.clone()]).collect()
            }
        };
        Some((health, command))
    }

    fn healthy(
        &self,
        health: &Healthcheck,
        command: &[String],
    ) -> Result<Result<(), String>, TestFailure> {
        let second = Millis::from_secs(1);
        let interval = health.interval.unwrap_or(Millis::from_secs(30));
        let retries = u64::from(health.retries.unwrap_or(3)).max(1);
        let patience = health
            .start_period
            .unwrap_or_default()
            .saturating_add(Millis(interval.0.saturating_mul(retries)))
            .saturating_add(second);
        let limit = Instant::now() + Duration::from(patience).min(HEALTH_LIMIT);
        let timeout = health.timeout.unwrap_or(Millis::from_secs(30));
        let runtime = &self.tester.runtime;
        self.until(limit, || {
            check::command(runtime, self.id, command, 0, None, timeout)
        })
    }
}
