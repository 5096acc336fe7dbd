//! Whole-stack tests: the service that `x-kiln.test.service` names runs with those it
//! depends on, from the candidate release, in an environment of their own that is thrown
//! away. Its exit code is the verdict, before anything that serves is touched.
//!
//! The environment is the daemon's, as any other: same planner, networks, names and jobs.
//! What makes it private is taken from the project first ([`alone`]). A folder below
//! `cache/run` that this process holds names it; whoever finds such a folder unheld (a
//! killed command) takes the environment away.
//!
//! # Format
//! A verdict is remembered by the digest of the release that was tested, which has those of
//! all images, configs and secrets: `cache/tests/<digest>.json`, a [`Record`], version 1.
//! Only one that passed.

mod alone;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kiln_build::held::{self, Held};
use kiln_build::test::{Case, CaseResult, Verdict};
use kiln_compose::disk::DiskOptions;
use kiln_daemon::api::client::ClientError;
use kiln_daemon::api::error::ErrorKind;
use kiln_daemon::api::types::{EventKind, ReleaseRequest};
use kiln_model::spec::StackTest;
use kiln_model::{Digest, EnvironmentName, Millis, Release};
use serde::{Deserialize, Serialize};

use crate::assemble::{Assembled, Over, Shares};
use crate::context::{Context, who};
use crate::failure::{Failure, Kind, machine};
use crate::junit::Suite;
use crate::{project, rollout, up};

/// Behind the project's name, where the digest is taken.
const SUFFIX: &str = "-test";
/// Before the letters and digits of the folder that names the environment.
const PREFIX: &str = "stack-";
/// The file in it that does.
const NAME_FILE: &str = "environment";
const FORMAT: u32 = 1;
/// What is going on with an environment that is to go is asked for so often, so long.
const STEP: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    /// The test service.
    service: String,
    /// All that took part, by service.
    images: BTreeMap<String, Digest>,
    took: Millis,
}

/// The candidate, and how it was read.
pub struct Candidate<'a> {
    pub options: &'a DiskOptions,
    pub test: &'a StackTest,
    pub assembled: &'a Assembled,
}

/// Tests the candidate, unless the same was tested before. The suite says how it went; a
/// failure is said by it and by the error.
pub async fn prove(
    context: &Context,
    candidate: &Candidate<'_>,
    suites: &mut Vec<Suite>,
) -> Result<(), Failure> {
    let service = candidate.test.service.as_str();
    sweep(context).await?;
    let (release, project) = assemble(context, candidate).await?;
    let digest = release.digest().map_err(machine)?;
    let path = context.root.join("cache/tests");
    let path = path.join(format!("{}.json", digest.hex()));
    if let Some(record) = read(&path) {
        errln!("test {service}: the whole stack was tested as it is");
        suites.push(suite(service, &digest, &record.images, record.took, Ok(())));
        return Ok(());
    }
    let images = release.services.iter();
    let images: BTreeMap<String, Digest> = images
        .map(|(name, one)| (name.to_string(), one.image.digest))
        .collect();
    let began = Instant::now();
    errln!("test {service}: the whole stack, in an environment of its own");
    let result = throw_away(context, candidate.test, &release).await;
    let took = Millis::from(began.elapsed());
    let verdict = result.as_ref().map(|_| ()).map_err(|f| f.message.clone());
    let interrupted = matches!(&result, Err(f) if f.kind == Kind::Interrupted);
    if !interrupted {
        suites.push(suite(service, &digest, &images, took, verdict.clone()));
        let subject = format!("{project}/{service}");
        let how = match &verdict {
            Ok(()) => ("verdict", "passed".to_owned()),
            Err(cause) => ("failed", cause.lines().next().unwrap_or("").to_owned()),
        };
        let mut details = vec![("stack", digest.to_string()), how];
        let listed = images
            .iter()
            .map(|(name, digest)| format!("{name}@{digest}"));
        details.push(("images", listed.collect::<Vec<_>>().join(" ")));
        context.record("test", &subject, &details)?;
    }
    result?;
    errln!("test {service}: passed in {took}");
    let record = Record {
        format: FORMAT,
        service: service.to_owned(),
        images,
        took,
    };
    if let Err(cause) = write(&path, &record) {
        errln!("warning: the verdict was not remembered: {cause}");
    }
    Ok(())
}

/// The release that is tested, under a name that stays the same, and the project's own name.
async fn assemble(
    context: &Context,
    candidate: &Candidate<'_>,
) -> Result<(Release, String), Failure> {
    let mut options = candidate.options.clone();
    let main = &candidate.assembled.release;
    options.services = vec![candidate.test.service.to_string()];
    options.project_name = Some(format!("{}{SUFFIX}", main.project));
    let loaded = kiln_compose::disk::load_from_disk(&options);
    let mut loaded = loaded.map_err(|e| project::failure(&e))?;
    alone::alone(&mut loaded.spec, &candidate.test.service)?;
    let known = main.services.iter();
    let mut proven: BTreeMap<_, _> = known
        .map(|(name, one)| {
            let verdict = Verdict::known(one.scratch.clone(), one.listens.clone());
            (name.clone(), verdict)
        })
        .collect();
    // It can't do alone what it is for.
    proven.insert(candidate.test.service.clone(), Verdict::default());
    let over = Over {
        bases: candidate.assembled.bases.clone(),
        proven,
        ..Over::default()
    };
    let environment = loaded.spec.project.as_str().parse();
    let environment = environment.map_err(|e| Failure::new(Kind::Input, format!("{e}")))?;
    let cancel = Arc::new(AtomicBool::new(false));
    // The candidate's results have been exported, and would be replaced by the test's alone.
    let shares = Shares {
        no_export: true,
        ..Shares::default()
    };
    let assembler = up::assembler(context, &loaded, &cancel)?.shares(shares);
    let assembled = up::assemble(&assembler, &cancel, &environment, &over).await?;
    Ok((assembled.release, main.project.to_string()))
}

/// Rolls it out in a new environment, waits for its end, and takes everything away.
async fn throw_away(context: &Context, test: &StackTest, release: &Release) -> Result<(), Failure> {
    let run = context.root.join("cache/run");
    std::fs::create_dir_all(&run).map_err(machine)?;
    let held = Held::new(&run, PREFIX).map_err(machine)?;
    let own = held.name().to_lowercase().replace(PREFIX, "");
    let environment = format!("{}-{own}", release.environment);
    let environment: EnvironmentName = environment.parse().map_err(machine)?;
    context.need_daemon().await?;
    // Before there is one: what can't be found can't be swept.
    std::fs::write(held.path().join(NAME_FILE), environment.as_str()).map_err(machine)?;
    let named = alone::named(release.clone(), &environment)?;
    let verdict = tokio::select! {
        verdict = run_to_end(context, test, named) => verdict,
        () = interrupted() => Err(Failure::new(
            Kind::Interrupted,
            "interrupted in the whole-stack test; nothing that serves was touched",
        )),
    };
    match remove(context, &environment).await {
        Ok(()) => verdict,
        Err(failure) => {
            held.leave();
            errln!("warning: `{environment}` is left: {}", failure.message);
            verdict
        }
    }
}

async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
    errln!("interrupted; taking the whole-stack test away");
}

async fn run_to_end(context: &Context, test: &StackTest, release: Release) -> Result<(), Failure> {
    let environment = release.environment.clone();
    let request = ReleaseRequest {
        release,
        by: who(),
        dry_run: false,
    };
    let answer = context.client.roll_out(&request).await?;
    let end = ended(context, &environment, answer.after_event);
    let end = match tokio::time::timeout(test.timeout.into(), end).await {
        Ok(end) => end?,
        Err(_) => {
            let what = format!("it did not end within {}", test.timeout);
            return Err(failed(test, &what, &[]));
        }
    };
    match end {
        Ok(()) => Ok(()),
        Err((text, log)) => {
            let cause = text.strip_prefix("release 1 failed: ").unwrap_or(&text);
            let cause = cause.strip_suffix("; nothing serves, as before");
            Err(failed(test, cause.unwrap_or(&text), &log))
        }
    }
}

fn failed(test: &StackTest, cause: &str, log: &[String]) -> Failure {
    let mut message = format!("the whole-stack test `{}` failed: {cause}", test.service);
    if !log.is_empty() {
        message.push_str("; its last lines:");
        for line in log {
            message.push_str("\n  | ");
            message.push_str(line);
        }
    }
    Failure::new(Kind::Test, message)
        .hint("nothing that serves was touched; the test ran beside it and is gone")
}

type End = Result<(), (String, Vec<String>)>;

/// How what is under way in an environment ends. A daemon that goes away is started again
/// and goes on.
async fn ended(
    context: &Context,
    environment: &EnvironmentName,
    after: u64,
) -> Result<End, Failure> {
    let mut seen = after;
    let mut end = None;
    loop {
        let followed = context.client.events(environment, seen, true, |event| {
            seen = event.id;
            end = match event.kind {
                EventKind::Succeeded => Some(Ok(())),
                EventKind::Failed { log } => Some(Err((event.text, log))),
                EventKind::Paused => Some(Err((event.text, Vec::new()))),
                _ => None,
            };
            end.is_none()
        });
        let followed = followed.await;
        match (end, followed) {
            (Some(end), _) => return Ok(end),
            (None, _) => context.need_daemon().await?,
        }
        end = None;
    }
}

/// Takes an environment away, whatever is going on in it. One that is not there is gone.
async fn remove(context: &Context, environment: &EnvironmentName) -> Result<(), Failure> {
    // Without a daemon nobody can say whether it is there.
    context.need_daemon().await?;
    let status = match context.client.brief(environment).await {
        Ok(status) => status,
        Err(ClientError::Api(error)) if error.kind == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if status.rollout.is_some() {
        // It may have ended meanwhile.
        let _ = context.client.abandon(environment, &who()).await;
    }
    rollout::until_idle(context, environment).await?;
    let after = context.client.down(environment, &who()).await?;
    if let Err((text, _)) = ended(context, environment, after).await? {
        return Err(machine(text));
    }
    let limit = Instant::now() + LIMIT;
    // What has ended may have to be put in order yet.
    while let Err(error) = context.client.forget(environment, &who()).await {
        if Instant::now() > limit {
            return Err(error.into());
        }
        tokio::time::sleep(STEP).await;
    }
    Ok(())
}

/// Takes away what killed commands have left.
async fn sweep(context: &Context) -> Result<(), Failure> {
    let run = context.root.join("cache/run");
    if !run.exists() {
        return Ok(());
    }
    for held in held::abandoned(&run, &[PREFIX]).map_err(machine)? {
        let name = std::fs::read_to_string(held.path().join(NAME_FILE)).unwrap_or_default();
        let Ok(environment) = name.parse::<EnvironmentName>() else {
            // It was killed before it had made anything.
            continue;
        };
        errln!("taking away `{environment}`, which an earlier test has left");
        if let Err(failure) = remove(context, &environment).await {
            held.leave();
            return Err(failure);
        }
    }
    Ok(())
}

fn suite(
    service: &str,
    digest: &Digest,
    images: &BTreeMap<String, Digest>,
    took: Millis,
    verdict: Result<(), String>,
) -> Suite {
    let result = match verdict {
        Ok(()) => CaseResult::Passed,
        Err(cause) => CaseResult::Failed(cause),
    };
    let mut properties = vec![("stack".to_owned(), digest.to_string())];
    let images = images.iter();
    properties.extend(images.map(|(name, digest)| (format!("image {name}"), digest.to_string())));
    Suite {
        name: format!("{service} (whole stack)"),
        properties,
        cases: vec![Case {
            name: "exit code".into(),
            result,
            took,
        }],
        log: Vec::new(),
    }
}

fn read(path: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (record.format == FORMAT).then_some(record)
}

fn write(path: &PathBuf, record: &Record) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&unfinished, serde_json::to_vec(record)?)?;
    std::fs::rename(&unfinished, path)
}
