//! Debian bases without a registry: a base image composed of packages from the
//! mirrors the machine's apt is configured for.
//!
//! The way of a base, one module a step:
//! [`sources`] (where Debian is) → [`lists`] (signed indexes) → [`resolve`] (which
//! packages) → [`crate::lock`] → [`fetch`] (their files, by sha256) → [`base`] (unpack,
//! configure in a sandbox, clean) → [`image`] (layer, configuration, manifest).
//! [`compose`] goes it, and goes no further back than the lock and the caches ask for:
//! with a complete lock entry only package files are fetched, with those in the cache
//! there is no network at all, and a base that was made before is not made again.
//!
//! Invariants: no byte is used that neither a verified signature nor the lock covers;
//! the same lock entry gives the same digest on every machine. What must not enter:
//! clocks and environment variables (time and epoch are arguments), other vendors'
//! archives, services of a base being started.

mod aptconf;
pub mod base;
mod clean;
mod database;
mod deb;
pub(crate) mod deb822;
mod edit;
pub mod fetch;
pub mod image;
pub mod index;
pub mod lists;
pub mod locking;
pub mod relation;
pub mod release;
pub mod resolve;
mod root;
pub mod sandbox;
mod scripts;
mod settings;
pub mod sources;
pub mod verify;
pub mod version;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kiln_model::instance::ExitStatus;
use kiln_model::progress::Finish;
use kiln_model::spec::DebianBase;
use kiln_model::{Digest, ImageConfig, Progress, ProgressEvent};
use kiln_oci::BlobWrite;

pub use self::base::{BaseError, ScriptRun};
pub use self::image::{ImageBlobs, ImageError};
pub use self::locking::{Asked, LockingError, Machine};
use crate::cache;
use crate::held::Held;
use crate::lock::{Lock, LockedPackage};

/// Counts changes in how kiln builds bases: a higher number rebuilds all of them.
const BUILD_FORMAT: u32 = 3;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a base could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    #[error("cannot compose the base `{name}`")]
    Locking {
        name: String,
        #[source]
        source: Box<LockingError>,
    },
    #[error("cannot compose the base `{name}`")]
    Base {
        name: String,
        #[source]
        source: Box<BaseError>,
    },
    #[error("cannot compose the base `{name}`")]
    Image {
        name: String,
        #[source]
        source: Box<ImageError>,
    },
    #[error("cannot use the cache folder {path}")]
    Cache {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot compose the base `{name}`")]
    Fetch {
        name: String,
        #[source]
        source: fetch::FetchError,
    },
    #[error("base `{name}`: building it ended early")]
    Ended { name: String },
    #[error(
        "base `{name}`: `essential: false` leaves out what maintainer scripts need: set `distroless: true` as well, or leave it out"
    )]
    NeitherNor { name: String },
}

/// Runs maintainer scripts in a sandbox ([`sandbox::instance`] says which), giving each
/// line of output to its second argument.
pub type RunScripts = dyn Fn(
        &ScriptRun,
        &mut dyn FnMut(&str),
    ) -> Result<ExitStatus, Box<dyn std::error::Error + Send + Sync>>
    + Send
    + Sync;

/// What composing needs from around.
#[derive(Clone)]
pub struct DebianContext {
    /// Where the image goes.
    pub blobs: Arc<dyn BlobWrite>,
    pub run_scripts: Arc<RunScripts>,
    /// The kiln root's `cache`; package files and half-made roots go below `debian` in it.
    pub cache: PathBuf,
    pub client: reqwest::Client,
    pub progress: Arc<dyn Progress>,
    /// SOURCE_DATE_EPOCH, in seconds.
    pub epoch: i64,
    pub machine: Machine,
}

/// A composed base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Composed {
    /// Names what the image was made from: a good name for its garbage-collection ref
    /// (`cache/debian/<key>`).
    pub key: String,
    pub image: ImageBlobs,
    /// It had been made before.
    pub cached: bool,
}

/// Completes `lock` for the base `asked`, without composing it.
pub async fn lock(
    ctx: &DebianContext,
    asked: &Asked<'_>,
    lock: &mut Lock,
) -> Result<(), DebianError> {
    let _in_use = in_use(ctx)?;
    let start = Instant::now();
    let locked = packages(ctx, asked, lock).await;
    if let Err(error) = &locked {
        ctx.progress.event(ProgressEvent::Finished {
            task: format!("base {}", asked.name),
            how: Finish::Failed {
                cause: error.to_string(),
            },
            took: start.elapsed().into(),
        });
    }
    locked.map(drop)
}

/// Whether the base `asked` has been composed of what `lock` says, and is there.
pub fn is_composed(ctx: &DebianContext, asked: &Asked<'_>, lock: &Lock) -> bool {
    let packages = locking::complete(lock, asked, &ctx.machine.arch);
    packages.is_some_and(|packages| {
        let key = key(ctx, asked.base, packages);
        recorded(&record(ctx, &key), &*ctx.blobs).is_some()
    })
}

/// Composes the base `asked`, honouring and completing `lock`.
pub async fn compose(
    ctx: &DebianContext,
    asked: &Asked<'_>,
    lock: &mut Lock,
) -> Result<Composed, DebianError> {
    let name = asked.name.to_string();
    let task = format!("base {name}");
    let start = Instant::now();
    let outcome = compose_inner(ctx, asked, lock).await;
    let how = match &outcome {
        Ok(composed) if composed.cached => Finish::Cached,
        Ok(_) => Finish::Done,
        Err(error) => Finish::Failed {
            cause: error.to_string(),
        },
    };
    ctx.progress.event(ProgressEvent::Finished {
        task,
        how,
        took: start.elapsed().into(),
    });
    outcome
}

async fn compose_inner(
    ctx: &DebianContext,
    asked: &Asked<'_>,
    lock: &mut Lock,
) -> Result<Composed, DebianError> {
    let name = || asked.name.to_string();
    if !asked.base.essential && !asked.base.distroless {
        return Err(DebianError::NeitherNor { name: name() });
    }
    let locking = |source| DebianError::Locking {
        name: name(),
        source: Box::new(source),
    };
    let _in_use = in_use(ctx)?;
    let (fetcher, packages) = packages(ctx, asked, lock).await?;
    let key = key(ctx, asked.base, &packages);
    let record = record(ctx, &key);
    if let Some(image) = recorded(&record, &*ctx.blobs) {
        return Ok(Composed {
            key,
            image,
            cached: true,
        });
    }
    let files = locking::files(&fetcher, &ctx.machine, asked, &packages, &ctx.progress)
        .await
        .map_err(locking)?;
    ctx.progress.event(ProgressEvent::Started {
        task: format!("base {}", asked.name),
        detail: format!(
            "building {} from {} packages",
            asked.base.suite,
            files.len()
        ),
    });
    let (ctx, base, task) = (ctx.clone(), asked.base.clone(), name());
    let image = tokio::task::spawn_blocking(move || build(&ctx, &task, &base, &files))
        .await
        .map_err(|_| DebianError::Ended { name: name() })??;
    remember(&record, &image)?;
    Ok(Composed {
        key,
        image,
        cached: false,
    })
}

/// Nobody cuts the cache while lists and package files are taken from it.
fn in_use(ctx: &DebianContext) -> Result<cache::InUse, DebianError> {
    cache::in_use(&ctx.cache).map_err(|source| DebianError::Cache {
        path: ctx.cache.clone(),
        source,
    })
}

/// The packages of a base, and what fetches their files.
async fn packages(
    ctx: &DebianContext,
    asked: &Asked<'_>,
    lock: &mut Lock,
) -> Result<(fetch::Fetcher, Vec<LockedPackage>), DebianError> {
    let name = || asked.name.to_string();
    let folder = locking::cache_folder(&ctx.cache);
    let fetcher = fetch::Fetcher::new(ctx.client.clone(), folder);
    let fetcher = fetcher.map_err(|source| DebianError::Fetch {
        name: name(),
        source,
    })?;
    let packages = locking::packages(&fetcher, &ctx.machine, asked, lock, &ctx.progress).await;
    let packages = packages.map_err(|source| DebianError::Locking {
        name: name(),
        source: Box::new(source),
    })?;
    Ok((fetcher, packages))
}

/// Where it is remembered what a base came to.
fn record(ctx: &DebianContext, key: &str) -> PathBuf {
    locking::cache_folder(&ctx.cache).join("images").join(key)
}

/// Names everything that the image depends on.
fn key(ctx: &DebianContext, base: &DebianBase, packages: &[LockedPackage]) -> String {
    let mut text = format!(
        "{BUILD_FORMAT}\n{}\n{}\n{}\n",
        ctx.machine.arch, base.distroless, ctx.epoch
    );
    for package in packages {
        text += &format!("{} {}\n", package.name, package.sha256);
    }
    for (name, value) in &base.env {
        text += &format!("{name:?}={value:?}\n");
    }
    text += &base.suite;
    Digest::of(text).hex()
}

fn recorded(record: &Path, blobs: &dyn BlobWrite) -> Option<ImageBlobs> {
    let image: ImageBlobs = serde_json::from_slice(&std::fs::read(record).ok()?).ok()?;
    let all = [image.manifest, image.config, image.layer];
    let there = |digest| blobs.contains(digest).unwrap_or(false);
    all.iter().all(there).then(|| {
        cache::used(record);
        image
    })
}

fn remember(record: &Path, image: &ImageBlobs) -> Result<(), DebianError> {
    let fail = |source| DebianError::Cache {
        path: record.into(),
        source,
    };
    let folder = record.parent().unwrap_or(record);
    std::fs::create_dir_all(folder).map_err(fail)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail)?;
    serde_json::to_writer(&mut file, image).map_err(|e| fail(e.into()))?;
    file.persist(record).map_err(|e| fail(e.error))?;
    Ok(())
}

fn build(
    ctx: &DebianContext,
    name: &str,
    base: &DebianBase,
    files: &[base::PackageFile],
) -> Result<ImageBlobs, DebianError> {
    let scratch = crate::exec::scratch(&ctx.cache)
        .map_err(io::Error::other)
        .and_then(|folder| Held::apart(&folder, sandbox::PREFIX))
        .map_err(|source| DebianError::Cache {
            path: ctx.cache.clone(),
            source,
        })?;
    let run = (!base.distroless).then_some(&*ctx.run_scripts);
    let run: Option<&base::RunScripts> = run.map(|run| run as &base::RunScripts);
    let mut on_line = |line: &str| {
        ctx.progress.event(ProgressEvent::Output {
            task: format!("base {name}"),
            line: line.into(),
        });
    };
    let root =
        base::build(scratch.path(), files, ctx.epoch, run, &mut on_line).map_err(|source| {
            DebianError::Base {
                name: name.into(),
                source: Box::new(source),
            }
        })?;
    image::write(
        &root,
        scratch.path(),
        describe(ctx, base, files.len()),
        &*ctx.blobs,
    )
    .map_err(|source| DebianError::Image {
        name: name.into(),
        source: Box::new(source),
    })
}

fn describe(ctx: &DebianContext, base: &DebianBase, packages: usize) -> image::Description {
    let mut env: Vec<(String, String)> = PATH
        .split_once('=')
        .map(|(k, v)| (k.into(), v.into()))
        .into_iter()
        .collect();
    env.retain(|(name, _)| !base.env.contains_key(name));
    env.extend(
        base.env
            .iter()
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    image::Description {
        config: ImageConfig {
            platform: platform(&ctx.machine.arch),
            env,
            cmd: if base.distroless {
                Vec::new()
            } else {
                vec!["/bin/bash".into()]
            },
            ..ImageConfig::default()
        },
        created_by: format!("kiln base: Debian {}, {packages} packages", base.suite),
        epoch: ctx.epoch,
    }
}

/// Debian's architecture and OCI's platform say the same in other words.
const ARCHITECTURES: [(&str, &str); 9] = [
    ("amd64", "linux/amd64"),
    ("arm64", "linux/arm64"),
    ("armhf", "linux/arm/v7"),
    ("armel", "linux/arm/v5"),
    ("i386", "linux/386"),
    ("ppc64el", "linux/ppc64le"),
    ("riscv64", "linux/riscv64"),
    ("s390x", "linux/s390x"),
    ("loong64", "linux/loong64"),
];

fn platform(arch: &str) -> String {
    let found = ARCHITECTURES.iter().find(|(debian, _)| *debian == arch);
    found.map_or_else(
        || format!("linux/{arch}"),
        |(_, platform)| platform.to_string(),
    )
}

/// Debian's name for an OCI platform; `None`: Debian has no such architecture.
pub fn architecture(platform: &str) -> Option<&'static str> {
    let baseline = platform.strip_suffix("/v8").unwrap_or(platform);
    let found = ARCHITECTURES.iter().find(|(_, oci)| *oci == baseline);
    found.map(|(debian, _)| *debian)
}
