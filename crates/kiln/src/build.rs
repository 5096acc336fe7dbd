//! `build`: images built and tested, nothing rolled out; or their files only looked at.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_build::build::{BuildError, Checked, check};
use kiln_build::lock::Lock;
use kiln_build::{containerfile, lint};
use kiln_compose::{Loaded, Severity};
use kiln_model::spec::{Build, ImageSource};
use kiln_oci::Reference;

use crate::cache;
use crate::check::verdict;
use crate::cli::{BuildArgs, Fetching};
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::report::{self, Problem, Region};
use crate::{output, project, up};

pub async fn build(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    if args.check {
        return look(context, args);
    }
    context.need_root()?;
    context.make_root()?;
    if args.prune {
        return cache::empty(context);
    }
    let _lease = context.store()?.lease().map_err(machine)?;
    if args.verify {
        return verify(context, args).await;
    }
    let live = args.network == Fetching::Live;
    let (_, release) = up::assembled(context, &args.project, live, args.shared.shares()).await?;
    if context.json {
        return output::json(&release);
    }
    for (name, service) in &release.services {
        outln!("{name}  {}@{}", service.image.name, service.image.digest);
    }
    Ok(())
}

/// `--verify`: whether a second build gives the same images.
async fn verify(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    let loaded = project::load(&args.project)?;
    let cancel = Arc::new(AtomicBool::new(false));
    let live = args.network == Fetching::Live;
    let assembler = up::assembler(context, &loaded, &cancel)?.live(live);
    let assembler = assembler.shares(args.shared.shares());
    let found = tokio::select! {
        found = assembler.verify() => found?,
        () = up::interrupted(cancel.clone()) => {
            return Err(Failure::new(Kind::Interrupted, "interrupted while verifying"));
        }
    };
    if context.json {
        output::json(&found)?;
    } else {
        for (name, differences) in &found {
            if differences.is_empty() {
                outln!("{name}: the same again, bit for bit");
            }
            for difference in differences {
                let (path, how) = (&difference.path, &difference.how);
                outln!("{name}: {path}: {how}\n    {}", difference.instruction);
            }
        }
    }
    let differ = found.values().filter(|found| !found.is_empty()).count();
    match differ {
        0 => Ok(()),
        n => Err(Failure::new(
            Kind::Build,
            format!(
                "{n} of {} images differ when they are built again",
                found.len()
            ),
        )),
    }
}

/// `--check`: what the lint rules find in every Containerfile of the project.
fn look(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    let loaded = project::load(&args.project)?;
    let lock = Lock::load(&loaded.spec.folder.join("kiln.lock"));
    let lock = lock.map_err(|e| Failure::new(Kind::Input, e.to_string()))?;
    let pinned = |name: &str| is_pinned(&loaded, &lock, name);
    let mut all = Vec::new();
    for build in builds(&loaded) {
        let (problems, text) = match check(build, &pinned) {
            Ok(checked) => (found(&checked), checked.text),
            Err(BuildError::Parse { file, errors }) => (unreadable(&file, &errors), String::new()),
            Err(error) => return Err(Failure::with_causes(Kind::Input, &error)),
        };
        if !context.json {
            problems.iter().for_each(|problem| tell(problem, &text));
        }
        all.extend(problems);
    }
    if context.json {
        output::json(&all)?;
    }
    verdict(&all, args.fail_on)
}

/// The project's builds, each once.
fn builds(loaded: &Loaded) -> Vec<&Build> {
    let mut builds: Vec<&Build> = Vec::new();
    for service in loaded.spec.services.values() {
        if let ImageSource::Build { build, .. } = &service.image
            && !builds.contains(&&**build)
        {
            builds.push(build);
        }
    }
    builds
}

/// A base of the project's is pinned by its packages; others by digest.
fn is_pinned(loaded: &Loaded, lock: &Lock, name: &str) -> bool {
    let image = name.parse::<Reference>().map(Reference::with_default_tag);
    loaded.spec.bases.contains_key(name)
        || image.is_ok_and(|image| lock.images.contains_key(&image.to_string()))
        || lock.remote.urls.contains_key(name)
        || lock.remote.git.contains_key(name)
}

fn found(checked: &Checked) -> Vec<Problem> {
    let problem = |finding: &lint::Finding| Problem {
        rule: finding.rule.to_string(),
        severity: match finding.uncertain {
            true => Severity::Note,
            false => Severity::Warning,
        },
        message: finding.message.clone(),
        hint: None,
        at: Some(Region::lines(&checked.file, finding.span)),
    };
    checked.findings.iter().map(problem).collect()
}

fn unreadable(file: &str, errors: &containerfile::ParseErrors) -> Vec<Problem> {
    let problem = |error: &containerfile::Problem| Problem {
        rule: "syntax".into(),
        severity: Severity::Error,
        message: error.cause.to_string(),
        hint: None,
        at: Some(Region::lines(file, error.span)),
    };
    errors.0.iter().map(problem).collect()
}

/// One line, and the source text below it.
fn tell(problem: &Problem, text: &str) {
    let Some(at) = &problem.at else { return };
    outln!(
        "{}:{}: {}: {}: {}",
        at.file,
        at.line,
        report::level(problem.severity),
        problem.rule,
        problem.message
    );
    if let Some(line) = text.lines().nth(at.line.saturating_sub(1)) {
        outln!("    {}", line.trim());
    }
}
