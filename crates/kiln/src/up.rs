//! `up`, `plan`, `build`, `lock`, `rollback`, `down`: what changes something.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_compose::Loaded;
use kiln_daemon::api::types::{ReleaseAnswer, ReleaseRequest, RollbackRequest};
use kiln_model::{EnvironmentName, Progress, ReleaseNumber};

use crate::assemble::{Assembled, Assembler, Over, Shares};
use crate::cli::{EnvironmentArgs, LockArgs, ProjectArgs, RollbackArgs, SharedCacheArgs, UpArgs};
use crate::context::{Context, who};
use crate::failure::{Failure, Kind, machine};
use crate::test::{Asked, Proven};
use crate::{output, progress, project, rollout};

pub async fn up(context: &Context, args: &UpArgs) -> Result<(), Failure> {
    context.need_root()?;
    context.make_root()?;
    // Held from the first write until the daemon has pinned what the release needs.
    let _lease = context.store()?.lease().map_err(machine)?;
    let asked = Asked {
        stack: !args.dry_run,
        shares: args.shares(),
        ..Asked::whole(args.junit.as_deref())
    };
    let proven = Proven::of(context, &args.project, asked).await?;
    let (environment, release) = (proven.environment, proven.release);
    context.need_daemon().await?;
    let request = ReleaseRequest {
        release,
        by: who(),
        dry_run: args.dry_run,
    };
    let answer = context.client.roll_out(&request).await?;
    if args.dry_run {
        return rollout::print_outline(context, &answer);
    }
    if answer.unchanged {
        return unchanged(context, &environment, &answer).await;
    }
    if args.detach {
        errln!(
            "release {} is being rolled out; kiln status shows how far it is",
            answer.number
        );
        return Ok(());
    }
    rollout::follow(context, &environment, answer.after_event).await?;
    print_urls(context, &environment).await
}

impl SharedCacheArgs {
    pub fn shares(&self) -> Shares {
        Shares {
            from: self.cache_from.clone(),
            to: self.cache_to.clone(),
            no_export: false,
        }
    }
}

impl UpArgs {
    /// What is only shown is given to nobody.
    fn shares(&self) -> Shares {
        Shares {
            no_export: self.dry_run,
            ..self.shared.shares()
        }
    }
}

pub async fn plan(context: &Context, args: &ProjectArgs) -> Result<(), Failure> {
    let args = UpArgs {
        project: args.clone(),
        dry_run: true,
        detach: false,
        junit: None,
        shared: SharedCacheArgs::default(),
    };
    up(context, &args).await
}

/// What is said, or the project's name.
pub fn environment(args: &ProjectArgs, loaded: &Loaded) -> Result<EnvironmentName, Failure> {
    let name = match &args.environment {
        Some(name) => name.parse(),
        None => loaded.spec.project.as_str().parse(),
    };
    name.map_err(|e| Failure::new(Kind::Input, format!("{e}")))
}

/// Shows its progress on standard error.
pub fn assembler<'a>(
    context: &'a Context,
    loaded: &'a Loaded,
    cancel: &Arc<AtomicBool>,
) -> Result<Assembler<'a>, Failure> {
    let progress: Arc<dyn Progress> = Arc::from(progress::renderer(&context.shown));
    Assembler::new(context, loaded, progress, cancel.clone())
}

/// Builds and tests; Ctrl-C ends it with nothing touched that runs.
pub async fn assemble(
    assembler: &Assembler<'_>,
    cancel: &Arc<AtomicBool>,
    environment: &EnvironmentName,
    over: &Over<'_>,
) -> Result<Assembled, Failure> {
    let stopped = || {
        Failure::new(
            Kind::Interrupted,
            "interrupted while building; nothing that runs was touched",
        )
    };
    tokio::select! {
        assembled = assembler.release(environment, over) => match assembled {
            Ok(assembled) => Ok(assembled),
            // What was cut off fails, too, but that is not why.
            Err(_) if cancel.load(Ordering::SeqCst) => Err(stopped()),
            Err(failure) => Err(failure),
        },
        _ = interrupted(cancel.clone()) => Err(stopped()),
    }
}

/// Resolves a moment after Ctrl-C: steps in their sandboxes are ended first.
pub async fn interrupted(cancel: Arc<AtomicBool>) {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
    cancel.store(true, Ordering::SeqCst);
    errln!("interrupted; ending what is being built");
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
}

async fn unchanged(
    context: &Context,
    environment: &EnvironmentName,
    answer: &ReleaseAnswer,
) -> Result<(), Failure> {
    if context.json {
        return output::json(answer);
    }
    let status = context.client.brief(environment).await?;
    let ill: Vec<String> = status
        .services
        .iter()
        .filter(|s| !matches!(s.state.as_str(), "serving" | "running" | "completed"))
        .map(|s| format!("{} ({})", s.service, s.state))
        .collect();
    outln!("nothing changed: release {} is what runs", answer.number);
    if !ill.is_empty() {
        errln!("warning: not serving: {}; see kiln status", ill.join(", "));
    }
    Ok(())
}

pub async fn print_urls(context: &Context, environment: &EnvironmentName) -> Result<(), Failure> {
    let status = context.client.brief(environment).await?;
    if context.json {
        return output::json(&status);
    }
    for service in &status.services {
        for port in &service.ports {
            let Some((listen, target)) = port.split_once(" → ") else {
                continue;
            };
            if target.ends_with("/tcp") {
                let host = listen
                    .replace("0.0.0.0", "localhost")
                    .replace("[::]", "localhost");
                outln!("{}: http://{host}", service.service);
            }
        }
    }
    Ok(())
}

pub async fn lock(context: &Context, args: &LockArgs) -> Result<(), Failure> {
    context.need_root()?;
    context.make_root()?;
    let loaded = project::load(&args.project)?;
    let assembler = assembler(context, &loaded, &Arc::default())?;
    let changed = assembler.lock(args.update).await?;
    outln!(
        "kiln.lock {}",
        if changed { "written" } else { "is up to date" }
    );
    Ok(())
}

pub async fn rollback(context: &Context, args: &RollbackArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    context.need_daemon().await?;
    let request = RollbackRequest {
        to: args.release.map(ReleaseNumber),
        by: who(),
    };
    let answer = context.client.rollback(&environment, &request).await?;
    if answer.unchanged {
        outln!("nothing to do: that is what runs");
        return Ok(());
    }
    crate::snapshots::moved_on(context, &environment, &answer).await?;
    if args.detach {
        return Ok(());
    }
    rollout::follow(context, &environment, answer.after_event).await
}

pub async fn down(context: &Context, args: &EnvironmentArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    context.need_daemon().await?;
    let after = context.client.down(&environment, &who()).await?;
    rollout::follow(context, &environment, after).await
}
