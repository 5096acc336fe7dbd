//! `watch`: rolls a project out anew whenever its files change. Nothing that runs is edited:
//! each change is a release of a throw-away environment, tested and proven like any other.
//!
//! What changed is found by looking at the files again; [`eyes`] only says when. [`rules`]
//! decides what follows. What must not enter: another way to build, test or roll out than
//! that of `up`.

mod eyes;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_compose::Loaded;
use kiln_compose::disk::DiskOptions;
use kiln_daemon::api::types::ReleaseRequest;
use kiln_model::{Digest, EnvironmentName, ServiceName};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::eyes::Eyes;
use self::rules::{Laid, Turn, Watched};
use crate::assemble::{Over, Shares};
use crate::cli::WatchArgs;
use crate::context::{Context, who};
use crate::failure::{Failure, Kind, machine};
use crate::{project, rollout, up};

/// Behind the project's name: nobody else's environment, volumes or networks are touched.
const SUFFIX: &str = "-watch";
/// The annotation because of which the instances of a `restart` are replaced.
const RESTART: &str = "kiln.watch.restart";
/// New folders are looked at again, as something may have come before they were watched;
/// folders within folders that keep coming are left to the next event after so many times.
const LOOKS: usize = 10;

struct Watch<'a> {
    context: &'a Context,
    options: DiskOptions,
    loaded: Loaded,
    environment: EnvironmentName,
    rules: Vec<Watched>,
    eyes: Eyes,
    folders: BTreeSet<PathBuf>,
    /// The images as they were last built.
    bases: BTreeMap<ServiceName, Digest>,
}

pub async fn watch(context: &Context, args: &WatchArgs) -> Result<(), Failure> {
    context.need_root()?;
    context.make_root()?;
    let mut end = End::new().map_err(machine)?;
    let mut watch = Watch::new(context, args)?;
    // Held for as long as it lasts: the images below what is synced are pinned by nobody.
    let _lease = context.store()?.lease().map_err(machine)?;
    let watched = watch.until(&mut end).await;
    let down = watch.down().await;
    watched.and(down)
}

impl<'a> Watch<'a> {
    fn new(context: &'a Context, args: &WatchArgs) -> Result<Self, Failure> {
        let mut options = project::options(&args.project);
        let named = kiln_compose::disk::load_from_disk(&options);
        let named = named.map_err(|e| project::failure(&e))?;
        options.project_name = Some(format!("{}{SUFFIX}", named.spec.project));
        let loaded = project::load_with(&options)?;
        let environment = loaded.spec.project.as_str().parse();
        let environment = environment.map_err(|e| Failure::new(Kind::Input, format!("{e}")))?;
        let mut warnings = Vec::new();
        let rules = rules::of(&loaded.spec, &mut warnings)?;
        for warning in warnings {
            errln!("warning: {warning}");
        }
        if rules.is_empty() {
            let text = "no service has anything to watch (`develop.watch`)";
            return Err(Failure::new(Kind::Input, text)
                .hint("`kiln up` rolls out once; a rule has a `path` and an `action`"));
        }
        let mut watch = Self {
            context,
            options,
            loaded,
            environment,
            rules,
            eyes: Eyes::new().map_err(machine)?,
            folders: BTreeSet::new(),
            bases: BTreeMap::new(),
        };
        // Before anything is built: what changes meanwhile is a change.
        for (rule, seen) in watch.look()?.into_iter().enumerate() {
            watch.rules[rule].begin(seen);
        }
        Ok(watch)
    }

    /// Rolls out, and again after each change, until someone ends it.
    async fn until(&mut self, end: &mut End) -> Result<(), Failure> {
        let everything = self.loaded.spec.services.keys().cloned().collect();
        let first = self.roll_out(&everything).await;
        self.told(first)?;
        for rule in &self.rules {
            errln!("watching: {}", rule.describe());
        }
        loop {
            tokio::select! {
                biased;
                () = end.asked() => return Ok(()),
                stirred = self.eyes.stirred() => stirred.map_err(machine)?,
            }
            let mut turn = Turn::default();
            for (rule, seen) in self.look()?.into_iter().enumerate() {
                self.rules[rule].take(seen, &mut turn);
            }
            if turn.told.is_empty() {
                continue;
            }
            for line in &turn.told {
                errln!("{line}");
            }
            let rolled = match turn.rebuild.is_empty() {
                true => Ok(()),
                false => self.reload(),
            };
            let rolled = match rolled {
                Ok(()) => self.roll_out(&turn.rebuild).await,
                Err(failure) => Err(failure),
            };
            self.told(rolled)?;
        }
    }

    /// Looks at every rule's path, and watches each folder that was seen.
    fn look(&mut self) -> Result<Vec<Option<kiln_build::context::Context>>, Failure> {
        let mut looks = 0;
        loop {
            let seen: Result<Vec<_>, _> = self.rules.iter().map(Watched::look).collect();
            let seen = seen.map_err(|e| Failure::with_causes(Kind::Input, &e))?;
            let rules = self.rules.iter().zip(&seen);
            let folders: BTreeSet<PathBuf> = rules
                .flat_map(|(rule, seen)| rule.folders(seen.as_ref()))
                .collect();
            for folder in &folders {
                // Also those that are known: another folder may have the name by now.
                self.eyes.on(folder).map_err(|e| no_more(folder, &e))?;
            }
            let new = !folders.is_subset(&self.folders);
            self.folders = folders;
            looks += 1;
            if !new || looks == LOOKS {
                return Ok(seen);
            }
        }
    }

    /// A build is `up`: the project's files are read anew. Its rules stay as they were.
    fn reload(&mut self) -> Result<(), Failure> {
        let loaded = kiln_compose::disk::load_from_disk(&self.options);
        // What it has to note was told at the beginning.
        self.loaded = loaded.map_err(|e| project::failure(&e))?;
        Ok(())
    }

    /// One release: `rebuild` is built, and what was synced is put over the other images.
    async fn roll_out(&mut self, rebuild: &BTreeSet<ServiceName>) -> Result<(), Failure> {
        let laid = Laid::of(&self.rules, rebuild);
        let cancel = Arc::new(AtomicBool::new(false));
        let mut loaded = self.loaded.clone();
        for (name, hook) in laid.hooks() {
            if let Some(service) = loaded.spec.services.get_mut(name) {
                service.post_start.push(hook.clone());
            }
        }
        for (name, parts) in laid.restarts() {
            let digest = up::assembler(self.context, &self.loaded, &cancel)?.digest_of(&parts)?;
            if let Some(service) = loaded.spec.services.get_mut(&name) {
                let annotations = &mut service.annotations;
                annotations.insert(RESTART.to_owned(), digest.to_string());
            }
        }
        let bases = self.bases.iter();
        let over = Over {
            bases: bases
                .filter(|(name, _)| !rebuild.contains(*name))
                .map(|(name, base)| (name.clone(), *base))
                .collect(),
            synced: laid.synced(),
            proven: BTreeMap::new(),
        };
        // Others get what was built on purpose, not what each save came to.
        let shares = Shares {
            no_export: true,
            ..Shares::default()
        };
        let assembler = up::assembler(self.context, &loaded, &cancel)?.shares(shares);
        let assembled = up::assemble(&assembler, &cancel, &self.environment, &over).await?;
        self.bases = assembled.bases;
        for rule in &mut self.rules {
            if rebuild.contains(&rule.service) {
                rule.built();
            }
        }
        self.release(assembled.release).await
    }

    async fn release(&self, release: kiln_model::Release) -> Result<(), Failure> {
        self.context.need_daemon().await?;
        rollout::until_idle(self.context, &self.environment).await?;
        let request = ReleaseRequest {
            release,
            by: who(),
            dry_run: false,
        };
        let answer = self.context.client.roll_out(&request).await?;
        if answer.unchanged {
            errln!("nothing changed: release {} is what runs", answer.number);
            return Ok(());
        }
        rollout::follow(self.context, &self.environment, answer.after_event).await?;
        if answer.number.0 == 1 {
            up::print_urls(self.context, &self.environment).await?;
        }
        Ok(())
    }

    /// What the next change may put right is told; anything else ends the watching.
    fn told(&self, result: Result<(), Failure>) -> Result<(), Failure> {
        match result {
            Ok(()) => Ok(()),
            Err(failure) => match failure.kind {
                Kind::Build | Kind::Test | Kind::Rollout | Kind::Input | Kind::Conflict => {
                    failure.tell(self.context.json);
                    errln!("waiting for a change");
                    Ok(())
                }
                // Whoever asked for it is heard where all are that end the watching.
                Kind::Interrupted => Ok(()),
                Kind::Machine | Kind::Damage => Err(failure),
            },
        }
    }

    /// Takes the environment down, if there ever was one; volumes and releases stay.
    async fn down(&self) -> Result<(), Failure> {
        if self.context.client.status(&self.environment).await.is_err() {
            return Ok(());
        }
        rollout::until_idle(self.context, &self.environment).await?;
        let after = self.context.client.down(&self.environment, &who()).await?;
        rollout::follow(self.context, &self.environment, after).await
    }
}

fn no_more(folder: &std::path::Path, error: &std::io::Error) -> Failure {
    let failure = machine(format!("{} can't be watched: {error}", folder.display()));
    match error.kind() {
        std::io::ErrorKind::StorageFull => failure.hint(
            "this machine watches no more folders: ignore some, or raise the kernel's \
             fs.inotify.max_user_watches",
        ),
        _ => failure,
    }
}

/// The ways to end it. Asked for at any time, heard at the next moment of rest.
struct End([Signal; 3]);

impl End {
    fn new() -> std::io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
