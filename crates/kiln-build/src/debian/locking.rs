//! From what a compose file asks of a base to the exact package files, through the
//! lock: a complete entry is taken as it is and asks no one; otherwise the base is
//! resolved anew, keeping what still holds, and the entry is rewritten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::spec::DebianBase;
use kiln_model::{Progress, ProgressEvent};

use super::base::PackageFile;
use super::fetch::{self, Expected, FetchError, Fetcher, Meter};
use super::index::{self, IndexError, Universe};
use super::lists::{self, ListsError, ListsRequest};
use super::resolve::{self, Request, ResolveError};
use super::sources::{self, Archive, SourcesError};
use crate::cache;
use crate::lock::{ArchiveKind, Lock, LockedBase, LockedPackage};

/// Why a base's packages could not be settled or had.
#[derive(Debug, thiserror::Error)]
pub enum LockingError {
    #[error(transparent)]
    Sources(#[from] SourcesError),
    #[error(transparent)]
    Lists(#[from] ListsError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(
        "{name} {version}, which kiln.lock pins, is no longer on the mirror ({cause}); run `kiln lock --update` to move to the versions that are there, or set x-kiln.debian.mirror to one that keeps old versions"
    )]
    Vanished {
        name: String,
        version: String,
        #[source]
        cause: Box<FetchError>,
    },
    #[error("kiln.lock names package `{name}` with an unsafe name or path")]
    UnsafeLock { name: String },
    #[error("base `{base}`: `{package}` is not a package name")]
    PackageName { base: String, package: String },
    #[error("base `{base}` has no suite")]
    NoSuite { base: String },
}

/// The machine around: where apt's configuration is, and what time it is.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `/`, or another folder with an `etc/apt` and `usr/share/keyrings` in it.
    pub root: PathBuf,
    /// Seconds since the epoch.
    pub now: u64,
    /// Debian's name for the architecture: `amd64`.
    pub arch: String,
}

/// What is being composed, for messages and progress.
pub struct Asked<'a> {
    pub name: &'a str,
    pub base: &'a DebianBase,
    pub mirror: Option<&'a str>,
}

impl Asked<'_> {
    fn task(&self) -> String {
        format!("base {}", self.name)
    }

    fn components(&self) -> Vec<String> {
        match self.base.components.is_empty() {
            true => vec!["main".into()],
            false => self.base.components.clone(),
        }
    }

    /// What the lock entry remembers of the request.
    fn request(&self) -> Vec<String> {
        let mut request = self.base.packages.clone();
        request.sort();
        request.dedup();
        request
    }

    fn with_required(&self) -> bool {
        self.base.essential && !self.base.distroless
    }

    fn check(&self) -> Result<(), LockingError> {
        if self.base.suite.is_empty() {
            return Err(LockingError::NoSuite {
                base: self.name.into(),
            });
        }
        for package in &self.base.packages {
            let name = package.split('=').next().unwrap_or_default();
            if !index::plain_name(name) {
                return Err(LockingError::PackageName {
                    base: self.name.into(),
                    package: package.clone(),
                });
            }
        }
        Ok(())
    }
}

/// The locked packages, if the entry still answers what is asked.
pub fn complete<'l>(lock: &'l Lock, asked: &Asked, arch: &str) -> Option<&'l [LockedPackage]> {
    let entry = lock.bases.get(asked.name)?;
    let same = entry.suite == asked.base.suite
        && entry.components == asked.components()
        && entry.distroless == asked.base.distroless
        && entry.essential == asked.with_required()
        && entry.request == asked.request();
    let packages = entry.architectures.get(arch).filter(|_| same)?;
    Some(packages)
}

/// The archives `asked` is served from, by the rules of [`sources`].
fn archives(asked: &Asked, machine: &Machine) -> Result<Vec<Archive>, LockingError> {
    Ok(match asked.mirror {
        Some(mirror) => sources::mirror_archives(mirror, &asked.base.suite)?,
        None => sources::archives(
            &sources::read(&machine.root)?,
            &asked.base.suite,
            &machine.arch,
        )?,
    })
}

/// The packages of the base: the lock's, or newly resolved and entered there.
pub async fn packages(
    fetcher: &Fetcher,
    machine: &Machine,
    asked: &Asked<'_>,
    lock: &mut Lock,
    progress: &Arc<dyn Progress>,
) -> Result<Vec<LockedPackage>, LockingError> {
    asked.check()?;
    if let Some(packages) = complete(lock, asked, &machine.arch) {
        for package in packages {
            check_locked(package)?;
        }
        return Ok(packages.to_vec());
    }
    let archives = archives(asked, machine)?;
    let components = asked.components();
    let request = ListsRequest {
        archives: &archives,
        components: &components,
        arch: &machine.arch,
        now: machine.now,
        root: &machine.root,
    };
    progress.event(ProgressEvent::Started {
        task: asked.task(),
        detail: format!(
            "resolving {} packages of {}",
            asked.base.packages.len(),
            asked.base.suite
        ),
    });
    let lists = lists::fetch(fetcher, &request, progress, &asked.task()).await?;
    let old = lock
        .bases
        .get(asked.name)
        .filter(|entry| entry.suite == asked.base.suite);
    let old: &[LockedPackage] = old
        .and_then(|e| e.architectures.get(&machine.arch))
        .map_or(&[], Vec::as_slice);
    let packages = resolve_in(&lists, asked, machine, old, progress)?;
    enter(lock, asked, &machine.arch, packages.clone());
    Ok(packages)
}

fn resolve_in(
    lists: &[lists::List],
    asked: &Asked,
    machine: &Machine,
    old: &[LockedPackage],
    progress: &Arc<dyn Progress>,
) -> Result<Vec<LockedPackage>, LockingError> {
    let mut candidates = Vec::new();
    for list in lists {
        candidates.extend(list.packages(&machine.arch)?);
    }
    let universe = Universe::new(candidates);
    let preferred: BTreeMap<&str, &str> = old
        .iter()
        .map(|p| (p.name.as_str(), p.version.as_str()))
        .collect();
    let mut names: Vec<&str> = asked.base.packages.iter().map(String::as_str).collect();
    match asked.base.distroless {
        // Common folders, /etc/os-release.
        true => names.push("base-files"),
        // The required set has it in some suites only.
        false if asked.with_required() => names.push("apt"),
        false => {}
    }
    let request = Request {
        packages: names,
        required: asked.with_required(),
        scriptless: asked.base.distroless,
        preferred,
    };
    let chosen = resolve::resolve(&universe, &request, &asked.base.suite)?;
    let packages: Vec<LockedPackage> = chosen
        .iter()
        .filter_map(|i| universe.packages[*i].lock())
        .collect();
    let moved = packages.iter().filter(|new| {
        old.iter()
            .any(|o| o.name == new.name && o.version != new.version)
    });
    for new in moved {
        progress.event(ProgressEvent::Warning {
            task: asked.task(),
            text: format!(
                "{} moves to {}: its locked version is gone or no longer fits",
                new.name, new.version
            ),
        });
    }
    Ok(packages)
}

/// Rewrites the entry; other architectures' packages stay if they answer the same.
fn enter(lock: &mut Lock, asked: &Asked, arch: &str, packages: Vec<LockedPackage>) {
    let mut entry = LockedBase {
        suite: asked.base.suite.clone(),
        components: asked.components(),
        essential: asked.with_required(),
        distroless: asked.base.distroless,
        request: asked.request(),
        architectures: BTreeMap::new(),
    };
    if let Some(old) = lock.bases.remove(asked.name) {
        let same = LockedBase {
            architectures: BTreeMap::new(),
            ..old.clone()
        } == entry;
        if same {
            entry.architectures = old.architectures;
        }
    }
    entry.architectures.insert(arch.into(), packages);
    lock.bases.insert(asked.name.into(), entry);
}

/// The lock comes with a repository: its names and paths become file names and
/// addresses.
fn check_locked(package: &LockedPackage) -> Result<(), LockingError> {
    let size_fine = package.size > 0 && package.size <= fetch::MAX_PACKAGE_BYTES;
    if index::plain_name(&package.name) && index::plain_path(&package.path) && size_fine {
        return Ok(());
    }
    Err(LockingError::UnsafeLock {
        name: package.name.clone(),
    })
}

/// Brings the files of `packages` into the cache; with all of them there, neither the
/// network nor apt's configuration is touched.
pub async fn files(
    fetcher: &Fetcher,
    machine: &Machine,
    asked: &Asked<'_>,
    packages: &[LockedPackage],
    progress: &Arc<dyn Progress>,
) -> Result<Vec<PackageFile>, LockingError> {
    let expected = |p: &LockedPackage| Expected {
        digest: p.sha256,
        size: p.size,
    };
    let missing: Vec<&LockedPackage> = packages
        .iter()
        .filter(|p| !fetcher.has(&expected(p)))
        .collect();
    for package in packages {
        if fetcher.has(&expected(package)) {
            cache::used(&fetcher.path(&package.sha256));
        }
    }
    if !missing.is_empty() {
        let archives = archives(asked, machine)?;
        let total = missing.iter().map(|p| p.size).sum();
        progress.event(ProgressEvent::Started {
            task: asked.task(),
            detail: format!("fetching {} packages", missing.len()),
        });
        let meter = Meter::new(progress.clone(), asked.task(), total);
        let wanted = missing
            .iter()
            .map(|p| (addresses(&archives, p), expected(p)));
        fetch::all(fetcher, wanted.collect(), &meter)
            .await
            .map_err(|cause| vanished(&missing, cause))?;
    }
    let file = |p: &LockedPackage| PackageFile {
        name: p.name.clone(),
        path: fetcher.path(&p.sha256),
        digest: p.sha256,
    };
    Ok(packages.iter().map(file).collect())
}

fn addresses(archives: &[Archive], package: &LockedPackage) -> Vec<String> {
    let mut urls: Vec<String> = Vec::new();
    let same = archives.iter().filter(|a| a.kind == package.archive);
    for archive in same {
        let url = format!("{}/{}", archive.uri, package.path);
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    if package.archive == ArchiveKind::Security && urls.is_empty() {
        return addresses(
            archives,
            &LockedPackage {
                archive: ArchiveKind::Debian,
                ..package.clone()
            },
        );
    }
    urls
}

fn vanished(missing: &[&LockedPackage], cause: FetchError) -> LockingError {
    let FetchError::Missing { url, .. } = &cause else {
        return cause.into();
    };
    match missing.iter().find(|p| url.ends_with(&p.path)) {
        Some(package) => LockingError::Vanished {
            name: package.name.clone(),
            version: package.version.clone(),
            cause: Box::new(cause),
        },
        None => cause.into(),
    }
}

/// The cache folder for package files below a kiln root's `cache`.
pub fn cache_folder(cache: &Path) -> PathBuf {
    cache.join("debian")
}
