//! `logs`, `exec`, `images`, `networks`, `gc`, `fsck`: around instances and the store.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kiln_daemon::api::types::{
    EnvironmentStatus, ExecNotice, InstanceStatus, NetworkRequest, ServiceStatus,
};
use kiln_model::instance::ExitStatus;
use kiln_model::release::Outcome;
use kiln_model::{Digest, EnvironmentName, InstanceId};
use kiln_runtime::log::{Reader, Record, Stream};
use kiln_runtime::{ExecIo, ExecSpec};
use kiln_store::{GcError, GcReport, Store};

use crate::cache;
use crate::cli::{ExecArgs, FsckArgs, GcArgs, LogsArgs, NetworksCommand};
use crate::context::{Context, who};
use crate::failure::{Failure, Kind, machine};
use crate::output;
use crate::progress::human_bytes;

/// Between looks for new lines and new instances.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long another collection is waited for.
const BUSY: Duration = Duration::from_secs(10);

pub async fn logs(context: &Context, args: &LogsArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    let runtime = context.runtime()?;
    let mut followed: Vec<(InstanceId, Reader)> = Vec::new();
    let mut known = BTreeSet::new();
    let mut first = true;
    loop {
        let status = context.client.brief(&environment).await?;
        for id in chosen(&status, &args.service) {
            if !known.insert(id.clone()) {
                continue;
            }
            let mut reader = runtime.log(&id);
            if let Some(count) = args.tail.filter(|_| first) {
                for record in last(&mut reader, count)? {
                    print(context, &id, &record);
                }
            }
            followed.push((id, reader));
        }
        if first && known.is_empty() && !args.follow {
            return Err(Failure::new(Kind::Conflict, "no instance of that name")
                .hint("kiln status lists services and instances"));
        }
        first = false;
        for (id, reader) in &mut followed {
            // An instance that has gone has taken its log with it.
            while let Ok(Some(record)) = reader.next_record() {
                print(context, id, &record);
            }
        }
        if !args.follow {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn last(reader: &mut Reader, count: usize) -> Result<Vec<Record>, Failure> {
    let mut records = std::collections::VecDeque::new();
    while let Some(record) = reader.next_record().map_err(machine)? {
        if records.len() == count {
            records.pop_front();
        }
        records.push_back(record);
    }
    Ok(records.into())
}

fn chosen(status: &EnvironmentStatus, names: &[String]) -> Vec<InstanceId> {
    status
        .services
        .iter()
        .flat_map(|s| s.instances.iter().map(move |i| (s, i)))
        .filter(|(s, i)| {
            names.is_empty()
                || names
                    .iter()
                    .any(|n| n == s.service.as_str() || n == i.id.as_str())
        })
        .map(|(_, i)| i.id.clone())
        .collect()
}

fn print(context: &Context, id: &InstanceId, record: &Record) {
    if context.json {
        let line = serde_json::json!({
            "instance": id, "time": record.time, "stream": record.stream, "text": record.text,
        });
        outln!("{line}");
        return;
    }
    match record.stream {
        Stream::System => outln!("{id} ! {}", record.text),
        Stream::Stdout | Stream::Stderr => outln!("{id} | {}", record.text),
    }
}

pub async fn exec(context: &Context, args: &ExecArgs) -> Result<ExitCode, Failure> {
    context.need_root()?;
    let environment = context.environment_at(&args.at).await?;
    let id = instance_of(context, &environment, &args.target).await?;
    let notice = ExecNotice {
        by: who(),
        command: args.command.clone(),
    };
    // Recorded before it is run: whatever happens, it is known that it was.
    context.client.executed(&environment, &id, &notice).await?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let spec = ExecSpec {
        argv: args.command.clone(),
        user: args.user.clone(),
        tty: terminal && !args.no_tty,
        ..ExecSpec::default()
    };
    let own = |fd: std::os::fd::BorrowedFd<'_>| -> Result<OwnedFd, Failure> {
        fd.try_clone_to_owned().map_err(machine)
    };
    let io = ExecIo {
        stdin: own(std::io::stdin().as_fd())?,
        stdout: own(std::io::stdout().as_fd())?,
        stderr: own(std::io::stderr().as_fd())?,
    };
    let runtime = context.runtime()?;
    let status = tokio::task::spawn_blocking(move || runtime.exec(&id, &spec, io))
        .await
        .map_err(machine)?
        .map_err(machine)?;
    Ok(match status {
        ExitStatus::Code(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        ExitStatus::Signal(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
        _ => ExitCode::FAILURE,
    })
}

async fn instance_of(
    context: &Context,
    environment: &EnvironmentName,
    target: &str,
) -> Result<InstanceId, Failure> {
    let status = context.client.brief(environment).await?;
    meant(&status.services, target).ok_or_else(|| {
        Failure::new(
            Kind::Conflict,
            format!("no instance or service `{target}` runs"),
        )
        .hint("kiln status lists them")
    })
}

/// The instance of this name, else the one that best stands for the service: while it is
/// replaced, not the one that is about to go.
fn meant(services: &[ServiceStatus], target: &str) -> Option<InstanceId> {
    let all = || services.iter().flat_map(|s| &s.instances);
    if let Some(named) = all().find(|i| i.id.as_str() == target) {
        return Some(named.id.clone());
    }
    let service = services.iter().find(|s| s.service.as_str() == target)?;
    let worth = |i: &InstanceStatus| {
        let up = matches!(i.phase.as_str(), "starting" | "warming" | "ready");
        (up, i.serving, i.current)
    };
    // The first of equals: copy 1 before copy 2.
    let best = service.instances.iter().rev().max_by_key(|i| worth(i))?;
    Some(best.id.clone())
}

pub fn images(context: &Context) -> Result<(), Failure> {
    let store = context.store()?;
    let images = store.images().map_err(machine)?;
    if context.json {
        return output::json(&images);
    }
    let refs = store.refs("").map_err(machine)?;
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|image| {
            let uses: Vec<&str> = refs
                .iter()
                .filter(|(_, digest)| *digest == image.manifest)
                .map(|(name, _)| name.as_str())
                .collect();
            vec![
                image.manifest.short(),
                image.platform.clone(),
                image.layers.to_string(),
                human_bytes(image.size),
                uses.join(" "),
            ]
        })
        .collect();
    output::table(&["IMAGE", "PLATFORM", "LAYERS", "SIZE", "KEPT BY"], &rows);
    let usage = store.usage().map_err(machine)?;
    errln!(
        "{} images; the store takes {}",
        images.len(),
        human_bytes(usage.bytes())
    );
    Ok(())
}

pub async fn networks(context: &Context, command: &NetworksCommand) -> Result<(), Failure> {
    let by = who();
    match command {
        NetworksCommand::Create {
            name,
            subnet,
            internal,
        } => {
            let request = NetworkRequest {
                name: name.clone(),
                subnet: *subnet,
                internal: *internal,
                by,
            };
            Ok(context.client.create_network(&request).await?)
        }
        NetworksCommand::Remove { name } => Ok(context.client.remove_network(name, &by).await?),
        NetworksCommand::List => {
            let networks = context.client.networks().await?;
            if context.json {
                return output::json(&networks);
            }
            let rows: Vec<Vec<String>> = networks
                .into_iter()
                .map(|n| {
                    let whose = n.environment.map_or("-".into(), |e| e.to_string());
                    vec![n.name, n.subnet.to_string(), whose, n.used_by.join(" ")]
                })
                .collect();
            output::table(&["NETWORK", "SUBNET", "OF", "USED BY"], &rows);
            Ok(())
        }
    }
}

/// Releases beyond those kept lose their references; then what nothing refers to goes.
pub async fn gc(context: &Context, args: &GcArgs) -> Result<(), Failure> {
    context.need_root()?;
    let store = context.store()?;
    let environments = match context.client.daemon().await {
        Ok(daemon) => daemon.environments,
        // Without the daemon nobody knows which releases are needed: all of them are.
        Err(_) => Vec::new(),
    };
    for environment in &environments {
        for number in superfluous(context, environment, args.keep).await? {
            let prefix = format!("release/{environment}/{number}/");
            for (name, _) in store.refs(&prefix).map_err(machine)? {
                if !args.dry_run {
                    store.remove_ref(&name).map_err(machine)?;
                }
            }
        }
    }
    if !args.dry_run {
        sweep(context)?;
    }
    let mut roots = running_images(context)?;
    let cache = cache::keep(context, &store, &roots, args.dry_run)?;
    roots.extend(cache::layers(context, &store)?);
    let report = collect(&store, &roots, args.dry_run)
        .await
        .map_err(|e| Failure::new(Kind::Conflict, e.to_string()))?;
    if !args.dry_run {
        context.record("gc", "store", &[("bytes", report.bytes.to_string())])?;
    }
    if context.json {
        let mut all = serde_json::to_value(&report).map_err(machine)?;
        all["cache"] = serde_json::to_value(&cache).map_err(machine)?;
        return output::json(&all);
    }
    match &cache {
        Some(pruned) => outln!("{}", cache::told(pruned)),
        None => outln!("build cache: in use by a build, which keeps it to its cap"),
    }
    let verb = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    outln!(
        "{verb} {} images, {} trees, {} blobs, {} files: {}",
        report.images,
        report.trees,
        report.blobs,
        report.objects,
        human_bytes(report.bytes)
    );
    Ok(())
}

/// Everything but what serves, what is wanted, and the newest `keep` that were proven.
async fn superfluous(
    context: &Context,
    environment: &EnvironmentName,
    keep: usize,
) -> Result<Vec<u64>, Failure> {
    let status = context.client.brief(environment).await?;
    let releases = context.client.releases(environment).await?;
    let mut in_use: BTreeSet<u64> = status
        .goal
        .into_iter()
        .chain(status.proven)
        .map(|n| n.0)
        .collect();
    if let Some(rollout) = &status.rollout {
        in_use.extend(rollout.to.into_iter().chain(rollout.from).map(|n| n.0));
    }
    in_use.extend(status.watch.iter().filter_map(|w| w.back).map(|n| n.0));
    in_use.extend(
        status
            .services
            .iter()
            .flat_map(|s| &s.instances)
            .map(|i| i.release.0),
    );
    let proven = releases
        .iter()
        .rev()
        .filter(|r| r.outcome == Outcome::Proven);
    in_use.extend(proven.take(keep.saturating_add(1)).map(|r| r.number.0));
    Ok(releases
        .iter()
        .map(|r| r.number.0)
        .filter(|n| !in_use.contains(n))
        .collect())
}

/// A build that measures its cache collects for a moment: that is waited for.
async fn collect(store: &Store, roots: &[Digest], dry_run: bool) -> Result<GcReport, GcError> {
    let begun = Instant::now();
    loop {
        match store.gc(roots, dry_run) {
            Err(GcError::Busy) if begun.elapsed() < BUSY => tokio::time::sleep(LOOK_EVERY).await,
            other => return other,
        }
    }
}

/// Takes away what killed builds and tests have left.
pub fn sweep(context: &Context) -> Result<(), Failure> {
    kiln_build::exec::sweep(&cache::folder(context), &*context.runtime()?)
        .map_err(|e| Failure::with_causes(Kind::Machine, &e))
}

pub fn running_images(context: &Context) -> Result<Vec<Digest>, Failure> {
    let runtime = context.runtime()?;
    Ok(runtime
        .list()
        .iter()
        .filter_map(|observed| runtime.spec(&observed.id))
        .filter_map(|spec| spec.purpose.membership().map(|m| m.image))
        .collect())
}

pub fn fsck(context: &Context, args: &FsckArgs) -> Result<(), Failure> {
    let report = context.store()?.fsck(args.repair).map_err(machine)?;
    if context.json {
        output::json(&report)?;
    } else {
        for bad in &report.bad {
            outln!(
                "{}: should be {}, is {:?}",
                bad.path.display(),
                bad.expected,
                bad.found
            );
        }
        for lost in &report.lost {
            outln!("image {} is damaged: {}", lost.manifest, lost.reason);
        }
        outln!(
            "{} files checked, {} damaged",
            report.checked,
            report.bad.len()
        );
    }
    if report.bad.is_empty() && report.lost.is_empty() {
        return Ok(());
    }
    let failure = Failure::new(Kind::Damage, "the store is damaged");
    Err(match args.repair {
        true => failure.hint("what was damaged is moved aside; kiln up fetches or builds it anew"),
        false => failure.hint("kiln fsck --repair moves it aside"),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn instance(id: &str, phase: &str, serving: bool, current: bool) -> InstanceStatus {
        let text = serde_json::json!({
            "id": id, "release": 1, "current": current, "phase": phase, "health": "",
            "serving": serving, "since": 0, "pid": null, "sealed": true, "tainted": false,
            "drift": [], "warnings": [],
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn a_service_means_who_stays_and_an_instance_itself() {
        let service = |instances| ServiceStatus {
            service: "web".parse().unwrap(),
            state: String::new(),
            image: String::new(),
            ports: Vec::new(),
            instances,
        };
        let of = |instances: &[InstanceStatus], target: &str| {
            meant(&[service(instances.to_vec())], target).map(|id| id.as_str().to_owned())
        };
        let old = instance("p-web-1", "ready", true, false);
        let going = instance("p-web-1", "removing", false, false);
        let coming = instance("p-web-2", "warming", false, true);
        let new = instance("p-web-2", "ready", true, true);
        let twin = instance("p-web-3", "ready", true, true);
        assert_eq!(
            of(&[going.clone(), new.clone()], "web").as_deref(),
            Some("p-web-2")
        );
        assert_eq!(
            of(&[old.clone(), coming], "web").as_deref(),
            Some("p-web-1")
        );
        assert_eq!(
            of(&[old.clone(), new.clone()], "web").as_deref(),
            Some("p-web-2")
        );
        assert_eq!(of(&[new, twin], "web").as_deref(), Some("p-web-2"));
        assert_eq!(of(&[going], "p-web-1").as_deref(), Some("p-web-1"));
        assert_eq!(of(&[old], "other"), None);
    }
}
