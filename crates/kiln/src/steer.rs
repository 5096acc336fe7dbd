//! `rollout`: how far one is, and a word in it.

use std::collections::BTreeMap;

use kiln_daemon::api::types::{CanaryStatus, EnvironmentStatus};
use kiln_model::{Millis, ReleaseNumber, ServiceName};

use crate::cli::{RolloutArgs, RolloutCommand};
use crate::context::{Context, who};
use crate::failure::{Failure, Kind};
use crate::output;

pub async fn rollout(context: &Context, args: &RolloutArgs) -> Result<(), Failure> {
    let environment = context.environment_at(&args.at).await?;
    let word = match args.command {
        RolloutCommand::Status => return status(context, args).await,
        RolloutCommand::Pause => "pause",
        RolloutCommand::Resume => "resume",
        RolloutCommand::Promote => "promote",
        RolloutCommand::Abort => {
            let status = context.client.brief(&environment).await?;
            if status.rollout.is_none() {
                return Err(Failure::new(
                    Kind::Conflict,
                    format!("no rollout is under way in `{environment}`"),
                )
                .hint("kiln status says what serves; kiln rollback goes back"));
            }
            context.client.abandon(&environment, &who()).await?;
            return Ok(());
        }
    };
    context.client.steer(&environment, word, &who()).await?;
    Ok(())
}

async fn status(context: &Context, args: &RolloutArgs) -> Result<(), Failure> {
    let environment = context.environment_at(&args.at).await?;
    let status = context.client.brief(&environment).await?;
    if context.json {
        let answer = serde_json::json!({
            "serving": status.serving, "rollout": status.rollout, "watch": status.watch,
        });
        return output::json(&answer);
    }
    outln!("{environment}: {} serves", release(status.serving));
    if status.rollout.is_none() && status.watch.is_none() {
        outln!("  no rollout is under way");
    }
    print(&status);
    Ok(())
}

pub fn release(number: Option<ReleaseNumber>) -> String {
    number.map_or("nothing".into(), |n| format!("release {n}"))
}

fn print_canary(canary: &CanaryStatus) {
    let shares = |weights: &BTreeMap<ServiceName, u8>| {
        let shares = weights
            .iter()
            .map(|(name, weight)| format!("{weight} % of {name}"));
        shares.collect::<Vec<_>>().join(", ")
    };
    for (at, verdict) in canary.verdicts.iter().enumerate() {
        let word = if verdict.good { "good" } else { "bad" };
        let (step, weights) = (at + 1, shares(&verdict.weights));
        outln!("  step {step} ({weights}) was {word}: {}", verdict.text);
    }
    if let (Some(step), Some(steps)) = (canary.step, canary.steps) {
        let when = match canary.verdict_in {
            Some(left) => format!("judged in {}", Millis(left)),
            None => "traffic is about to move".into(),
        };
        outln!(
            "  step {step} of {steps}: {}, {when}",
            shares(&canary.weights)
        );
    }
}

/// What is under way, and what the last switch is still held to.
pub fn print(status: &EnvironmentStatus) {
    if let Some(rollout) = &status.rollout {
        let to = release(rollout.to);
        match (&rollout.failed, &rollout.paused) {
            (Some(cause), _) => outln!("  {to} failed ({cause}); returning"),
            (None, Some(why)) => {
                outln!("  {to} is paused: {why}");
                outln!("  kiln rollout resume, promote or abort says how to go on");
            }
            (None, None) if rollout.state == "watching" => {}
            (None, None) => outln!("  rolling out {to}"),
        }
        if let Some(canary) = &rollout.canary {
            print_canary(canary);
        }
        for line in &rollout.report {
            outln!("  · {line}");
        }
    }
    let Some(watch) = &status.watch else { return };
    let back = release(watch.back);
    match status.rollout.as_ref().map(|r| r.paused.is_some()) {
        Some(true) => {}
        Some(false) => outln!(
            "  release {} is watched for another {}; then it is proven, or {back} serves again",
            watch.release,
            Millis(watch.verdict_in)
        ),
        None => outln!(
            "  release {} is watched; {back} can serve again",
            watch.release
        ),
    }
}
