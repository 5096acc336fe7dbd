//! `status`, `releases`, `diff`, `events`, `explain`, `audit`: reading, changing nothing.

use std::collections::BTreeMap;

use kiln_daemon::api::types::{EnvironmentStatus, ReleaseLine};
use kiln_model::release::{Outcome, Reason, ReleasedService};
use kiln_model::{EnvironmentName, Release, ReleaseNumber};
use serde::Serialize;

use crate::cli::{
    AuditArgs, AuditCommand, DiffArgs, EnvironmentArgs, EventsArgs, ExplainArgs, StatusArgs,
};
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::tested::{History, Tests, With};
use crate::{output, packages, steer};

pub async fn status(context: &Context, args: &StatusArgs) -> Result<(), Failure> {
    let names = if args.all {
        context.client.daemon().await?.environments
    } else {
        vec![context.environment(&args.project)?]
    };
    let mut all = Vec::new();
    for name in &names {
        let status = context.client.status(name).await?;
        let tests = known(tests_of(context, &status).await).flatten();
        all.push((status, tests));
    }
    if !context.json {
        for (status, tests) in &all {
            print_status(status);
            tests.iter().for_each(Tests::print);
        }
        return Ok(());
    }
    let all = all.iter().map(|(of, tests)| {
        let tests = tests.clone();
        With { of, tests }
    });
    let all: Vec<_> = all.collect();
    match (args.all, all.as_slice()) {
        (false, [one]) => output::json(one),
        _ => output::json(&all),
    }
}

/// How the release that is wanted was tested.
async fn tests_of(context: &Context, status: &EnvironmentStatus) -> Result<Option<Tests>, Failure> {
    let Some(goal) = status.goal else {
        return Ok(None);
    };
    let environment = &status.environment;
    let mut lines = context.client.releases(environment).await?;
    lines.retain(|line| line.number == goal);
    let history = History::read(context)?;
    let mut tests = history.of_releases(context, environment, &lines).await?;
    Ok(tests.remove(&goal))
}

/// Without it, there is still the rest to be told.
fn known<T>(tests: Result<T, Failure>) -> Option<T> {
    let tell = |why: &Failure| {
        errln!(
            "warning: how images were tested is not known: {}",
            why.message
        )
    };
    tests.inspect_err(tell).ok()
}

fn print_status(status: &EnvironmentStatus) {
    let release = steer::release;
    outln!("{}: {} serves", status.environment, release(status.serving));
    steer::print(status);
    if let Some(problem) = &status.problem {
        outln!("  problem: {problem}");
    }
    let rows: Vec<Vec<String>> = status
        .services
        .iter()
        .flat_map(|service| {
            let head = vec![
                service.service.to_string(),
                service.state.clone(),
                service.ports.join(", "),
                service.image.clone(),
            ];
            let none = service.instances.is_empty().then(|| {
                [
                    head.clone(),
                    vec!["–".into(), String::new(), String::new(), String::new()],
                ]
                .concat()
            });
            let instances = service.instances.iter().enumerate().map(move |(n, i)| {
                let blank = vec![String::new(); 4];
                let head = if n == 0 { head.clone() } else { blank };
                let mut marks = Vec::new();
                if !i.sealed {
                    marks.push("unsealed".to_owned());
                }
                if i.tainted {
                    marks.push("tainted".into());
                }
                if !i.current {
                    marks.push(format!("of release {}", i.release));
                }
                marks.extend(i.drift.iter().map(|d| format!("drift: {d}")));
                marks.extend(i.warnings.iter().map(|w| format!("note: {w}")));
                let state = format!("{}, {}", i.phase, i.health);
                [
                    head,
                    vec![
                        i.id.to_string(),
                        state,
                        output::ago(i.since),
                        marks.join("; "),
                    ],
                ]
                .concat()
            });
            none.into_iter().chain(instances).collect::<Vec<_>>()
        })
        .collect();
    if !rows.is_empty() {
        output::table(
            &[
                "SERVICE", "STATE", "PORTS", "IMAGE", "INSTANCE", "HEALTH", "SINCE", "NOTES",
            ],
            &rows,
        );
    }
}

pub async fn releases(context: &Context, args: &EnvironmentArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    let releases = context.client.releases(&environment).await?;
    let tests = match History::read(context) {
        Ok(history) => history.of_releases(context, &environment, &releases).await,
        Err(why) => Err(why),
    };
    let tests = known(tests).unwrap_or_default();
    if context.json {
        let all = releases.iter().map(|of| With {
            of,
            tests: tests.get(&of.number).cloned(),
        });
        return output::json(&all.collect::<Vec<_>>());
    }
    let row = |line: &ReleaseLine| release_row(line, tests.get(&line.number));
    let rows: Vec<Vec<String>> = releases.iter().rev().map(row).collect();
    output::table(
        &[
            "RELEASE",
            "DIGEST",
            "WHEN (UTC)",
            "BY",
            "WHY",
            "TESTED",
            "OUTCOME",
        ],
        &rows,
    );
    Ok(())
}

fn release_row(line: &ReleaseLine, tests: Option<&Tests>) -> Vec<String> {
    let why = match &line.reason {
        Reason::Up => "up".to_owned(),
        Reason::Rollback { to } => format!("rollback to {to}"),
    };
    let outcome = match &line.outcome {
        Outcome::RollingOut => "rolling out".to_owned(),
        Outcome::Proven if line.serving => "serving".to_owned(),
        Outcome::Proven => "proven".to_owned(),
        Outcome::Failed { cause } => format!("failed: {cause}"),
        Outcome::Abandoned => "abandoned".to_owned(),
    };
    vec![
        line.number.to_string(),
        line.digest.short(),
        output::time(line.created),
        line.by.clone(),
        why,
        tests.map(Tests::summary).unwrap_or_default(),
        outcome,
    ]
}

/// What differs between two releases, by service.
#[derive(Serialize, Default)]
struct Difference {
    added: Vec<String>,
    removed: Vec<String>,
    changed: BTreeMap<String, Vec<String>>,
}

pub async fn diff(context: &Context, args: &DiffArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    let a = context
        .client
        .release(&environment, ReleaseNumber(args.a))
        .await?;
    let b = context
        .client
        .release(&environment, ReleaseNumber(args.b))
        .await?;
    let mut difference = Difference::default();
    for (name, new) in &b.services {
        let Some(old) = a.services.get(name) else {
            difference.added.push(name.to_string());
            continue;
        };
        let mut lines = service_difference(old, new)?;
        if old.image.tree != new.image.tree {
            let (before, after) = (&old.image.digest, &new.image.digest);
            lines.extend(packages::differences(&*context.store()?, before, after)?);
            lines.extend(file_differences(context, old, new)?);
        }
        if !lines.is_empty() {
            difference.changed.insert(name.to_string(), lines);
        }
    }
    difference.removed = missing_from(&a, &b);
    if context.json {
        return output::json(&difference);
    }
    print_difference(&environment, args, &difference);
    Ok(())
}

fn missing_from(a: &Release, b: &Release) -> Vec<String> {
    a.services
        .keys()
        .filter(|n| !b.services.contains_key(*n))
        .map(ToString::to_string)
        .collect()
}

fn print_difference(environment: &EnvironmentName, args: &DiffArgs, difference: &Difference) {
    outln!("{environment}: release {} → {}", args.a, args.b);
    for name in &difference.added {
        outln!("+ {name}");
    }
    for name in &difference.removed {
        outln!("- {name}");
    }
    for (name, lines) in &difference.changed {
        outln!("~ {name}");
        for line in lines {
            outln!("    {line}");
        }
    }
    if difference.added.is_empty() && difference.removed.is_empty() && difference.changed.is_empty()
    {
        outln!("no difference");
    }
}

/// Every leaf of the two definitions that differs. Values of environment variables and
/// secrets are masked: they may be passwords.
fn service_difference(
    old: &ReleasedService,
    new: &ReleasedService,
) -> Result<Vec<String>, Failure> {
    let a = serde_json::to_value(old).map_err(machine)?;
    let b = serde_json::to_value(new).map_err(machine)?;
    let mut lines = Vec::new();
    differing_leaves("", &a, &b, &mut lines);
    Ok(lines)
}

fn differing_leaves(
    path: &str,
    a: &serde_json::Value,
    b: &serde_json::Value,
    lines: &mut Vec<String>,
) {
    use serde_json::Value;
    if a == b {
        return;
    }
    if let (Value::Object(a), Value::Object(b)) = (a, b) {
        let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for key in keys {
            let null = Value::Null;
            let below = if path.is_empty() {
                key.clone()
            } else {
                format!("{path}.{key}")
            };
            let (left, right) = (a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null));
            differing_leaves(&below, left, right, lines);
        }
        return;
    }
    let path = path.strip_prefix("service.").unwrap_or(path);
    let masked = path.starts_with("process.environment.") || path.contains("config.env");
    lines.push(match masked {
        true => format!("{path}: {} → {} (masked)", presence(a), presence(b)),
        false => format!("{path}: {a} → {b}"),
    });
}

fn presence(value: &serde_json::Value) -> &'static str {
    if value.is_null() { "unset" } else { "***" }
}

/// Files that differ between the two images, at most so many.
const SHOWN_FILES: usize = 40;

fn file_differences(
    context: &Context,
    old: &ReleasedService,
    new: &ReleasedService,
) -> Result<Vec<String>, Failure> {
    let store = context.store()?;
    let load = |tree| {
        store
            .load_tree(tree)
            .map_err(|e| Failure::new(Kind::Damage, e.to_string()))
    };
    let (a, b) = (load(&old.image.tree)?, load(&new.image.tree)?);
    let changes = kiln_store::tree::diff(&a, &b);
    let mut lines: Vec<String> = changes
        .iter()
        .take(SHOWN_FILES)
        .map(|change| format!("file {change}"))
        .collect();
    if changes.len() > SHOWN_FILES {
        lines.push(format!("… and {} more files", changes.len() - SHOWN_FILES));
    }
    let layers = |image| -> Result<Vec<kiln_model::Digest>, Failure> {
        let image = store
            .image(image)
            .map_err(|e| Failure::new(Kind::Damage, e.to_string()))?;
        Ok(image
            .map(|i| i.layers.iter().map(|l| l.digest).collect())
            .unwrap_or_default())
    };
    let (before, after) = (layers(&old.image.digest)?, layers(&new.image.digest)?);
    let shared = before.iter().filter(|l| after.contains(l)).count();
    lines.push(format!(
        "layers: {} of {} are those of before",
        shared,
        after.len()
    ));
    Ok(lines)
}

pub async fn events(context: &Context, args: &EventsArgs) -> Result<(), Failure> {
    let environment = context.environment(&args.project)?;
    let print = |event: kiln_daemon::api::types::EventRecord| {
        if context.json {
            if let Ok(line) = serde_json::to_string(&event) {
                outln!("{line}");
            }
        } else {
            outln!("{}  {}", output::time(event.time.0), event.text);
        }
        true
    };
    tokio::select! {
        result = context.client.events(&environment, 0, args.follow, print) => Ok(result?),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

pub async fn explain(context: &Context, args: &ExplainArgs) -> Result<(), Failure> {
    let environment = context.environment_at(&args.at).await?;
    let id = args
        .instance
        .parse()
        .map_err(|e| Failure::new(Kind::Input, format!("{e}")).hint("kiln status lists them"))?;
    let explanation = context.client.explain(&environment, &id).await?;
    if context.json {
        return output::json(&explanation);
    }
    outln!("{}", explanation.id);
    for (key, lines) in &explanation.facts {
        outln!("  {key}:");
        for line in lines {
            outln!("    {line}");
        }
    }
    Ok(())
}

pub fn audit(context: &Context, args: &AuditArgs) -> Result<(), Failure> {
    let log = context.audit()?;
    let damage = |e: kiln_trust::AuditError| Failure::new(Kind::Damage, e.to_string());
    if let Some(AuditCommand::Verify) = &args.command {
        let verified = log.verify().map_err(damage)?;
        let head = verified.head.map_or("–".into(), |d| d.to_string());
        if context.json {
            return output::json(&serde_json::json!({"entries": verified.entries, "head": head}));
        }
        outln!("{} entries, unbroken; head {head}", verified.entries);
        return Ok(());
    }
    let entries = log.entries().map_err(damage)?;
    if context.json {
        return output::json(&entries);
    }
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|e| {
            let details: Vec<String> = e
                .fact
                .details
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            vec![
                e.number.to_string(),
                output::time(e.fact.time.0),
                e.fact.actor.clone(),
                e.fact.action.clone(),
                e.fact.subject.clone(),
                details.join(" "),
            ]
        })
        .collect();
    output::table(
        &["#", "WHEN (UTC)", "WHO", "WHAT", "SUBJECT", "DETAILS"],
        &rows,
    );
    Ok(())
}
