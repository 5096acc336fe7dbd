//! The rules of `develop.watch`: what of a path is looked at, what has changed there, and
//! what that leads to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_build::build::Synced;
use kiln_build::context::changes::changes;
use kiln_build::context::ignore::Patterns;
use kiln_build::context::{Context, ContextError, read_ignore};
use kiln_build::files::{Names, shown};
use kiln_model::ServiceName;
use kiln_model::spec::{Hook, ImageSource, MountSource, Service, Spec, WatchAction, WatchRule};

use crate::failure::{Failure, Kind};

/// What editors, Git and kiln itself leave beside the files that matter; the editors'
/// names are those that docker compose knows.
const NOT_LOOKED_AT: &[&str] = &[
    "**/.git",
    "**/*___jb_old___",
    "**/*___jb_tmp___",
    "**/.idea",
    "**/.#*",
    "**/#*#",
    "**/4913",
    "**/*~",
    "**/.*.swp",
    "**/.*.swx",
    "**/.*.swo",
    "**/.*.swn",
    "**/.*.kate-swp",
    "**/*-go-tmp-umask",
    "**/kiln.lock",
    "**/kiln.lock.d",
];

/// Paths told of one rule's changes; of more, how many.
const TOLD_PATHS: usize = 3;

/// Patterns, and the folder that their paths count from.
struct Ignored {
    folder: PathBuf,
    patterns: Patterns,
}

/// One rule, and what it has seen.
pub struct Watched {
    pub service: ServiceName,
    rule: WatchRule,
    ignored: Vec<Arc<Ignored>>,
    include: Patterns,
    /// When it was last looked at; `None`: nothing is there.
    now: Option<Context>,
    /// What has changed since the service was built.
    touched: BTreeSet<Names>,
}

/// What a look at all rules leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Services that are built anew.
    pub rebuild: BTreeSet<ServiceName>,
    /// For people: what has changed, and what follows.
    pub told: Vec<String>,
}

/// All rules of a project. What can't be watched is told in `warnings`.
pub fn of(spec: &Spec, warnings: &mut Vec<String>) -> Result<Vec<Watched>, Failure> {
    let mut all = Vec::new();
    for (name, rules) in &spec.watch {
        let Some(service) = spec.services.get(name) else {
            continue;
        };
        let context = match &service.image {
            ImageSource::Build { build, .. } => {
                let patterns = read_ignore(&build.context, build.containerfile.as_deref());
                Some(Arc::new(Ignored {
                    folder: build.context.clone(),
                    patterns: patterns.map_err(|e| wrong(name, &e.to_string()))?,
                }))
            }
            ImageSource::Reference(_) => None,
        };
        for rule in rules {
            check(name, service, rule)?;
            if let Some(mount) = mounted(service, &rule.path) {
                warnings.push(format!(
                    "{name}: {} is not watched, as the instance sees it at {mount} anyway",
                    rule.path.display()
                ));
                continue;
            }
            all.push(Watched::new(name, rule, context.clone())?);
        }
    }
    Ok(all)
}

fn wrong(service: &ServiceName, what: &str) -> Failure {
    let text = format!("services.{service}.develop.watch: {what}");
    Failure::new(Kind::Input, text)
}

fn check(name: &ServiceName, service: &Service, rule: &WatchRule) -> Result<(), Failure> {
    let path = rule.path.display();
    let above = rule.path.parent();
    if !rule.path.exists() && !above.is_some_and(Path::is_dir) {
        return Err(wrong(name, &format!("there is no {path}")));
    }
    match &rule.action {
        WatchAction::Rebuild if matches!(service.image, ImageSource::Reference(_)) => {
            Err(wrong(name, "the action `rebuild` needs a `build:`"))
        }
        WatchAction::Sync {
            exec: Some(hook), ..
        } if hook.command.is_empty() => Err(wrong(
            name,
            &format!("the action `sync+exec` needs an `exec.command` ({path})"),
        )),
        _ => Ok(()),
    }
}

/// Where the service mounts this very path, or a folder that it is in.
fn mounted<'s>(service: &'s Service, path: &Path) -> Option<&'s str> {
    let of = |mount: &'s kiln_model::spec::Mount| match &mount.source {
        MountSource::Bind { path: bound, .. } if path.starts_with(bound) => Some(&*mount.target),
        _ => None,
    };
    service.mounts.iter().find_map(of)
}

impl Watched {
    fn new(
        service: &ServiceName,
        rule: &WatchRule,
        context: Option<Arc<Ignored>>,
    ) -> Result<Self, Failure> {
        let patterns = |texts: &mut dyn Iterator<Item = &str>| {
            Patterns::new(texts).map_err(|e| wrong(service, &e.to_string()))
        };
        let own = |patterns| {
            Arc::new(Ignored {
                folder: rule.path.clone(),
                patterns,
            })
        };
        let ignore = patterns(&mut rule.ignore.iter().map(String::as_str))?;
        let usual = patterns(&mut NOT_LOOKED_AT.iter().copied())?;
        Ok(Self {
            service: service.clone(),
            rule: rule.clone(),
            ignored: [own(ignore), own(usual)]
                .into_iter()
                .chain(context)
                .collect(),
            include: patterns(&mut rule.include.iter().map(String::as_str))?,
            now: None,
            touched: BTreeSet::new(),
        })
    }

    /// What is there now.
    pub fn look(&self) -> Result<Option<Context>, ContextError> {
        let out = |path: &str| {
            let host = self.rule.path.join(path);
            self.ignored.iter().any(|ignored| {
                let below = host.strip_prefix(&ignored.folder).ok();
                let below = below.and_then(Path::to_str).filter(|p| !p.is_empty());
                below.is_some_and(|path| ignored.patterns.leaves_out(path))
            })
        };
        let deep = self.ignored.iter().any(|i| i.patterns.takes_back());
        Context::look(&self.rule.path, &out, deep)
    }

    /// The folders that tell of changes: those of `seen`, and the one that the path itself
    /// comes to and goes from.
    pub fn folders(&self, seen: Option<&Context>) -> Vec<PathBuf> {
        let mut folders = seen.map(Context::folders).unwrap_or_default();
        folders.extend(self.rule.path.parent().map(Path::to_owned));
        folders
    }

    /// Takes a first look in: nothing has changed since.
    pub fn begin(&mut self, seen: Option<Context>) {
        self.now = seen;
        self.touched = self.fresh();
    }

    /// Takes in what is there now; what follows is added to the turn.
    pub fn take(&mut self, seen: Option<Context>, turn: &mut Turn) {
        let mut changed = changes(self.now.as_ref(), seen.as_ref());
        changed.retain(|path| self.includes(path));
        self.now = seen;
        if changed.is_empty() {
            return;
        }
        turn.told.push(format!(
            "{}: {}: {}",
            self.service,
            self.action(),
            self.listed(&changed)
        ));
        match self.rule.action {
            WatchAction::Rebuild => {
                turn.rebuild.insert(self.service.clone());
            }
            WatchAction::Restart | WatchAction::Sync { .. } => self.touched.extend(changed),
        }
    }

    /// The service has been built: its image has what was synced, or never will.
    pub fn built(&mut self) {
        self.touched = self.fresh();
    }

    /// What counts as changed just after the service was built.
    fn fresh(&self) -> BTreeSet<Names> {
        match (&self.rule.action, &self.now) {
            (WatchAction::Sync { initial: true, .. }, Some(now)) => {
                let mut paths = now.paths();
                paths.retain(|path| self.includes(path));
                paths
            }
            // What a restart was for still is, whatever the image.
            (WatchAction::Restart, _) => self.touched.clone(),
            _ => BTreeSet::new(),
        }
    }

    fn includes(&self, path: &[Vec<u8>]) -> bool {
        if self.include.is_empty() {
            return true;
        }
        // A rule's own path is known by its name alone.
        let name = self.rule.path.file_name().unwrap_or_default();
        match path.is_empty() {
            true => self.include.leaves_out(&name.to_string_lossy()),
            false => self.include.leaves_out(shown(path).trim_start_matches('/')),
        }
    }

    /// `rebuilt`: the service is about to be built.
    fn changed(&self, rebuilt: bool) -> BTreeSet<Names> {
        match rebuilt {
            true => self.fresh(),
            false => self.touched.clone(),
        }
    }

    fn action(&self) -> &'static str {
        match &self.rule.action {
            WatchAction::Rebuild => "rebuild",
            WatchAction::Restart => "restart",
            WatchAction::Sync { exec: None, .. } => "sync",
            WatchAction::Sync { exec: Some(_), .. } => "sync and exec",
        }
    }

    fn listed(&self, changed: &BTreeSet<Names>) -> String {
        let name = self.rule.path.file_name().unwrap_or_default();
        let name = name.to_string_lossy();
        let path = |path: &Names| match path.is_empty() {
            true => name.clone().into_owned(),
            false => format!("{name}{}", shown(path)),
        };
        let some: Vec<String> = changed.iter().take(TOLD_PATHS).map(path).collect();
        match changed.len().saturating_sub(TOLD_PATHS) {
            0 => some.join(", "),
            more => format!("{} and {more} more", some.join(", ")),
        }
    }

    /// For people: what is watched, and why.
    pub fn describe(&self) -> String {
        let path = self.rule.path.display();
        let to = match &self.rule.action {
            WatchAction::Sync { target, .. } => format!(" to {target}"),
            _ => String::new(),
        };
        format!("{}: {} {path}{to}", self.service, self.action())
    }
}

/// What all rules together put over and into the services of a release.
#[derive(Default)]
pub struct Laid {
    rules: Vec<Layer>,
}

struct Layer {
    service: ServiceName,
    action: WatchAction,
    now: Option<Context>,
    paths: BTreeSet<Names>,
}

impl Laid {
    /// `rebuild`: services that are about to be built.
    pub fn of(rules: &[Watched], rebuild: &BTreeSet<ServiceName>) -> Self {
        let layers = rules.iter().map(|watched| Layer {
            service: watched.service.clone(),
            action: watched.rule.action.clone(),
            now: watched.now.clone(),
            paths: watched.changed(rebuild.contains(&watched.service)),
        });
        Self {
            rules: layers.filter(|layer| !layer.paths.is_empty()).collect(),
        }
    }

    /// Files that are put over images.
    pub fn synced(&self) -> BTreeMap<ServiceName, Vec<Synced<'_>>> {
        self.parts(|action| match action {
            WatchAction::Sync { target, .. } => Some(target),
            _ => None,
        })
    }

    /// Files because of which instances are replaced.
    pub fn restarts(&self) -> BTreeMap<ServiceName, Vec<Synced<'_>>> {
        self.parts(|action| matches!(action, WatchAction::Restart).then_some(""))
    }

    /// Commands that run in each new instance, in the file's order.
    pub fn hooks(&self) -> impl Iterator<Item = (&ServiceName, &Hook)> {
        self.rules.iter().filter_map(|layer| match &layer.action {
            WatchAction::Sync {
                exec: Some(hook), ..
            } => Some((&layer.service, hook)),
            _ => None,
        })
    }

    fn parts<'l>(
        &'l self,
        target: impl Fn(&'l WatchAction) -> Option<&'l str>,
    ) -> BTreeMap<ServiceName, Vec<Synced<'l>>> {
        let mut parts: BTreeMap<ServiceName, Vec<Synced<'l>>> = BTreeMap::new();
        for layer in &self.rules {
            if let Some(target) = target(&layer.action) {
                let part = Synced {
                    context: layer.now.as_ref(),
                    paths: &layer.paths,
                    target,
                };
                parts.entry(layer.service.clone()).or_default().push(part);
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kiln_compose::disk::{DiskOptions, load_from_disk};

    use super::*;

    const COMPOSE: &str = "services:
  web:
    build: web
    volumes: [\"./web/bound:/bound\"]
    develop:
      watch:
        - {path: web, action: sync, target: /app, ignore: [\"*.log\", \"!keep.log\"]}
        - {path: web/bound, action: restart}
        - {path: web/assets, action: sync+exec, target: /assets, include: \"**/*.css\",
           initial_sync: true, exec: {command: make, user: app}}
        - {path: web/package.json, action: rebuild}
        - {path: conf, action: restart}
";
    const FILES: [&str; 8] = [
        "web/a.js",
        "web/a.log",
        "web/keep.log",
        "web/node_modules/x/y.js",
        "web/.git/HEAD",
        "web/assets/deep/a.css",
        "web/assets/deep/a.png",
        "conf/app.conf",
    ];

    fn project() -> (tempfile::TempDir, Vec<Watched>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "compose.yaml", COMPOSE);
        write(folder.path(), "web/.dockerignore", "node_modules\n");
        for path in FILES {
            write(folder.path(), path, "1");
        }
        let loaded = load_from_disk(&DiskOptions::new(folder.path())).unwrap();
        let mut warnings = vec![];
        let mut rules = of(&loaded.spec, &mut warnings).unwrap();
        for rule in &mut rules {
            let seen = rule.look().unwrap();
            rule.begin(seen);
        }
        (folder, rules, warnings)
    }

    fn write(folder: &Path, path: &str, text: &str) {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn turn(rules: &mut [Watched]) -> Turn {
        let mut turn = Turn::default();
        for rule in rules {
            let seen = rule.look().unwrap();
            rule.take(seen, &mut turn);
        }
        turn
    }

    /// `target/path` of everything that is put over the image.
    fn synced(rules: &[Watched], rebuild: &BTreeSet<ServiceName>) -> Vec<String> {
        let laid = Laid::of(rules, rebuild);
        let parts = laid.synced();
        let paths = parts.values().flatten().flat_map(|part| {
            let path = |path: &Names| format!("{}{}", part.target, shown(path));
            part.paths.iter().map(path).collect::<Vec<_>>()
        });
        paths.collect()
    }

    fn nothing() -> BTreeSet<ServiceName> {
        BTreeSet::new()
    }

    #[test]
    fn only_what_a_rule_names_is_seen() {
        let (folder, mut rules, warnings) = project();
        assert_eq!(warnings.len(), 1, "what is mounted is seen anyway");
        assert!(warnings[0].contains("/bound"), "{warnings:?}");
        assert_eq!(turn(&mut rules), Turn::default());
        assert_eq!(synced(&rules, &nothing()), ["/assets/deep/a.css"]);
        for path in FILES {
            write(folder.path(), path, "22");
        }
        write(folder.path(), "web/.a.js.swp", "an editor's");
        let turn = turn(&mut rules);
        assert_eq!(
            turn.told,
            [
                "web: sync: web/a.js, web/assets/deep/a.css, web/assets/deep/a.png and 1 more",
                "web: sync and exec: assets/deep/a.css",
                "web: restart: conf/app.conf",
            ]
        );
        assert_eq!(turn.rebuild, nothing());
        assert_eq!(
            synced(&rules, &nothing()),
            [
                "/app/a.js",
                "/app/assets/deep/a.css",
                "/app/assets/deep/a.png",
                "/app/keep.log",
                "/assets/deep/a.css",
            ]
        );
    }

    #[test]
    fn a_build_takes_over_what_was_synced_but_not_what_was_restarted_for() {
        let (folder, mut rules, _) = project();
        write(folder.path(), "web/a.js", "22");
        write(folder.path(), "conf/app.conf", "22");
        write(folder.path(), "web/package.json", "it was not there");
        let turn = turn(&mut rules);
        let web: BTreeSet<ServiceName> = ["web".parse().unwrap()].into();
        assert_eq!(turn.rebuild, web);
        assert_eq!(synced(&rules, &web), ["/assets/deep/a.css"]);
        // Until it has succeeded, the next change is put over the image that there is.
        assert_eq!(
            synced(&rules, &nothing()),
            ["/app/a.js", "/app/package.json", "/assets/deep/a.css"]
        );
        rules.iter_mut().for_each(Watched::built);
        let laid = Laid::of(&rules, &nothing());
        assert_eq!(synced(&rules, &nothing()), ["/assets/deep/a.css"]);
        assert_eq!(laid.restarts().len(), 1);
        let hooks: Vec<_> = laid.hooks().collect();
        assert_eq!(hooks.len(), 1);
        assert_eq!(hooks[0].1.command, ["make"]);
        assert_eq!(hooks[0].1.user.as_deref(), Some("app"));
    }
}
