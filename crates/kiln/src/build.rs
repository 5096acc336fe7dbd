//! `build`: images built and tested, nothing rolled out; or their files only looked at.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_build::build::{BuildError, Checked, check};
use kiln_build::lock::Lock;
use kiln_build::{containerfile, lint};
use kiln_compose::{Loaded, Severity};
use kiln_model::Digest;
use kiln_model::spec::{Build, ImageSource};
use kiln_oci::Reference;

use crate::assemble::Over;
use crate::cache;
use crate::check::verdict;
use crate::cli::{BuildArgs, Fetching};
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::junit;
use crate::report::{self, Problem, Region};
use crate::test::{Asked, Proven};
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
    if !args.platform.is_empty() || args.output.is_some() || args.push || several(args)? {
        return images(context, args).await;
    }
    let live = args.network == Fetching::Live;
    let asked = Asked {
        stack: false,
        live,
        shares: args.shared.shares(),
        junit: args.junit.as_deref(),
    };
    let release = Proven::of(context, &args.project, asked).await?.release;
    if context.json {
        return output::json(&release);
    }
    for (name, service) in &release.services {
        outln!("{name}  {}@{}", service.image.name, service.image.digest);
    }
    Ok(())
}

/// The file asks for images of more than this machine's platform.
fn several(args: &BuildArgs) -> Result<bool, Failure> {
    let loaded = project::load(&args.project)?;
    let mut services = loaded.spec.services.values();
    Ok(services.any(|service| match &service.image {
        ImageSource::Build { build, .. } => !build.platforms.is_empty(),
        ImageSource::Reference(_) => false,
    }))
}

/// Images for some platforms, or that are taken out. Those of this machine are tested.
async fn images(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    let loaded = project::load(&args.project)?;
    let cancel = Arc::new(AtomicBool::new(false));
    let live = args.network == Fetching::Live;
    let assembler = up::assembler(context, &loaded, &cancel)?;
    let assembler = assembler.live(live).shares(args.shared.shares());
    let work = async {
        let built = assembler.images(&args.platform).await?;
        let tested = match assembler.tests_here(&built) {
            true => {
                let environment = up::environment(&args.project, &loaded)?;
                let release = assembler.release(&environment, &Over::default()).await;
                release.map(drop)
            }
            false => Ok(()),
        };
        if let Some(path) = &args.junit {
            junit::write(path, &assembler.suites())?;
        }
        tested?;
        if let Some(path) = &args.output {
            let all = built
                .values()
                .map(|image| (image.name.clone(), image.digest));
            let all: Vec<(String, Digest)> = all.collect();
            let store = context.store()?;
            kiln_oci::archive::export(path, &all, &*store)
                .map_err(|error| Failure::with_causes(Kind::Machine, &error))?;
        }
        if args.push {
            assembler.push(&built).await?;
        }
        Ok::<_, Failure>(built)
    };
    let built = tokio::select! {
        built = work => built?,
        () = up::interrupted(cancel.clone()) => {
            return Err(Failure::new(Kind::Interrupted, "interrupted while building"));
        }
    };
    if context.json {
        return output::json(&built);
    }
    for (name, image) in &built {
        outln!("{name}  {}@{}", image.name, image.digest);
        if image.platforms.len() > 1 {
            for (platform, digest) in &image.platforms {
                outln!("  {platform}  {digest}");
            }
        }
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
                let stage = difference.stage.as_deref().unwrap_or_default();
                let within = if stage.is_empty() { "" } else { ": " };
                outln!("{name}: {path}: {how}");
                outln!("    {stage}{within}{}", difference.instruction);
                if let Some(why) = difference.why {
                    outln!("    {why}");
                }
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

/// The project's builds that have a Containerfile, each once.
fn builds(loaded: &Loaded) -> Vec<&Build> {
    let mut builds: Vec<&Build> = Vec::new();
    for service in loaded.spec.services.values() {
        if let ImageSource::Build { build, .. } = &service.image
            && build.declared.is_none()
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
