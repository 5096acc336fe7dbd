//! Follows a rollout from the caller's side: shows what happens, answers Ctrl-C, and
//! says in the end what is really serving.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_daemon::api::types::{EventKind, EventRecord, ReleaseAnswer};
use kiln_model::EnvironmentName;

use crate::context::{Context, who};
use crate::failure::{Failure, Kind};
use crate::live::Live;

/// While an environment is on its way, it takes no other release. Asked so often, so long.
const BUSY_STEP: Duration = Duration::from_millis(100);
const BUSY_LIMIT: Duration = Duration::from_secs(120);

/// How a rollout ended.
enum End {
    Succeeded(String),
    Failed {
        text: String,
        log: Vec<String>,
    },
    /// It waits for somebody.
    Paused(String),
}

/// Shows events after `after` until the rollout is over. The first Ctrl-C gives it up
/// (the environment returns to what served before), the second leaves it to the daemon.
pub async fn follow(
    context: &Context,
    environment: &EnvironmentName,
    after: u64,
) -> Result<(), Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let live = Live::begin(context, environment);
    let mut end = None;
    let mut seen = after;
    loop {
        let followed = context.client.events(environment, seen, true, |event| {
            seen = event.id;
            show(context, live.as_ref(), &event);
            end = ended(event);
            end.is_none()
        });
        tokio::select! {
            result = followed => match result {
                Ok(()) if end.is_some() => break,
                // The daemon went away: the next one goes on where it was.
                Ok(()) | Err(_) => context.need_daemon().await?,
            },
            _ = tokio::signal::ctrl_c() => {
                if interrupted.swap(true, Ordering::SeqCst) {
                    return Err(left_alone(environment));
                }
                let text = "giving up; Ctrl-C again leaves the rollout to the daemon";
                say(live.as_ref(), text);
                context.client.abandon(environment, &who()).await?;
            }
        }
    }
    drop(live);
    let interrupted = interrupted.load(Ordering::SeqCst);
    match end {
        Some(End::Succeeded(text)) => {
            if !context.json {
                errln!("{text}");
            }
            Ok(())
        }
        Some(End::Paused(text)) => Err(Failure::new(Kind::Rollout, text)
            .hint("kiln rollout resume, promote or abort says how to go on")),
        Some(End::Failed { text, log }) => Err(failed(text, &log, interrupted)),
        None => Ok(()),
    }
}

/// Waits until nothing is on its way: a rollout that failed may still be returning.
pub async fn until_idle(context: &Context, environment: &EnvironmentName) -> Result<(), Failure> {
    let idle = async {
        while let Ok(status) = context.client.status(environment).await
            && status.rollout.is_some()
        {
            tokio::time::sleep(BUSY_STEP).await;
        }
    };
    match tokio::time::timeout(BUSY_LIMIT, idle).await {
        Ok(()) => Ok(()),
        Err(_) => Err(Failure::new(
            Kind::Conflict,
            format!("`{environment}` does not come to rest"),
        )),
    }
}

fn left_alone(environment: &EnvironmentName) -> Failure {
    Failure::new(
        Kind::Interrupted,
        "interrupted; the daemon goes on with the rollout",
    )
    .hint(format!("kiln status -e {environment} says what serves"))
}

fn failed(text: String, log: &[String], interrupted: bool) -> Failure {
    let mut message = text;
    if !log.is_empty() {
        message.push_str("\nthe failing instance's last lines:");
        for line in log {
            message.push_str("\n  | ");
            message.push_str(line);
        }
    }
    let kind = if interrupted {
        Kind::Interrupted
    } else {
        Kind::Rollout
    };
    Failure::new(kind, message)
}

fn ended(event: EventRecord) -> Option<End> {
    match event.kind {
        EventKind::Succeeded => Some(End::Succeeded(event.text)),
        EventKind::Paused => Some(End::Paused(event.text)),
        EventKind::Failed { log } => Some(End::Failed {
            text: event.text,
            log,
        }),
        _ => None,
    }
}

fn show(context: &Context, live: Option<&Live>, event: &EventRecord) {
    if context.json {
        if let Ok(line) = serde_json::to_string(event) {
            errln!("{line}");
        }
        return;
    }
    match &event.kind {
        EventKind::Succeeded | EventKind::Failed { .. } | EventKind::Paused => {}
        EventKind::Warning => say(live, &format!("warning: {}", event.text)),
        EventKind::Instance { phase } => {
            // What every instance passes through says nothing; its milestones do.
            if matches!(
                phase.as_str(),
                "starting" | "ready" | "draining" | "ended" | "gone"
            ) {
                say(live, &format!("  {}", event.text));
            }
        }
        EventKind::Note | EventKind::Rollout => say(live, &event.text),
    }
}

/// A line above the live view, where there is one.
fn say(live: Option<&Live>, text: &str) {
    match live {
        Some(live) => live.line(text),
        None => errln!("{text}"),
    }
}

/// Prints the answer's outline, for `plan` and `--dry-run`.
pub fn print_outline(context: &Context, answer: &ReleaseAnswer) -> Result<(), Failure> {
    if context.json {
        return crate::output::json(answer);
    }
    if answer.unchanged {
        outln!(
            "nothing would change: release {} is what runs",
            answer.number
        );
        return Ok(());
    }
    outln!(
        "release {} ({}) would:",
        answer.number,
        answer.digest.short()
    );
    for line in &answer.outline {
        let why = if line.why.is_empty() {
            String::new()
        } else {
            format!(" ({})", line.why)
        };
        outln!("  {} {}{why}", line.action, line.service);
        for step in &line.steps {
            outln!("    {} % of its traffic for {}", step.weight, step.duration);
        }
        if !line.steps.is_empty() {
            outln!("    then all of it");
        }
    }
    Ok(())
}
