//! What an image consists of, as package managers and compilers have recorded it in its
//! files: the data that a bill of materials is made of.
//!
//! Read are dpkg's and apk's databases, Python's `METADATA`, installed npm packages (or a
//! `package-lock.json` where none are), `Cargo.lock`, what cargo-auditable and Go's linker put
//! into programs, and gemspecs. Not read are rpm's database, and what is within archives
//! (jars).
//!
//! # Format
//! A [`Packages`] as JSON, version 1: a blob of the store that the image's record names
//! ([`kiln_store::Image::packages`]), so that it is kept as long as the image is. It follows
//! from the image's files alone.
//!
//! Invariants: everything read is bounded; what was found and could not be read is in the
//! record by its place, never left out in silence. What must not enter: SPDX and CycloneDX,
//! which are made of this.

mod elf;
mod manifests;
mod programs;

use std::collections::BTreeSet;
use std::io::{self, Read};

use kiln_model::Digest;
use kiln_oci::blob::{BlobWrite, BlobWriteError, ReadSmallError, read_small};
use kiln_store::tree::{Kind, Tree};
use kiln_store::{AddImageError, Image, LoadTreeError, Store};
use serde::{Deserialize, Serialize};

use crate::files::{names, shown};

const FORMAT: u32 = 1;
/// One manifest; the largest dpkg status seen has 5 MB.
const MAX_MANIFEST: u64 = 32 << 20;
/// Most packages of an image; large ones have some ten thousand.
const MAX_PACKAGES: usize = 200_000;
/// A name, a version or the like.
const MAX_TEXT: usize = 256;
/// A record; it bounds what is read of one.
const MAX_RECORD: u64 = 256 << 20;

/// Who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ecosystem {
    Deb,
    Apk,
    Pypi,
    Npm,
    Cargo,
    Golang,
    Gem,
}

impl Ecosystem {
    /// As package URLs have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Apk => "apk",
            Self::Pypi => "pypi",
            Self::Npm => "npm",
            Self::Cargo => "cargo",
            Self::Golang => "golang",
            Self::Gem => "gem",
        }
    }
}

/// One package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    pub ecosystem: Ecosystem,
    pub name: String,
    pub version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// What it was built from, where that has another name or version: `glibc 2.36-9`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The file that says so, absolute.
    pub place: String,
}

/// A file that would have told of packages, and could not be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Unread {
    pub place: String,
    pub why: String,
}

/// All of an image's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packages {
    pub format: u32,
    /// Sorted, each once.
    pub packages: Vec<Package>,
    pub unread: Vec<Unread>,
}

/// Why packages can't be told.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    #[error("the image {0} is not in the store")]
    NoImage(Digest),
    #[error(transparent)]
    Image(#[from] kiln_store::ImageError),
    #[error(transparent)]
    Tree(#[from] LoadTreeError),
    #[error(transparent)]
    Write(#[from] BlobWriteError),
    #[error(transparent)]
    Add(#[from] AddImageError),
    #[error(transparent)]
    Read(#[from] ReadSmallError),
    #[error("the record of packages can't be made")]
    Record(#[source] serde_json::Error),
    #[error("the record of packages {0} is damaged: {1}")]
    Damaged(Digest, #[source] serde_json::Error),
    #[error("the record of packages {0} has format {1}, this kiln knows {FORMAT}")]
    Format(Digest, u32),
}

/// Sees to it that an image's record of packages is there.
pub fn attach(store: &Store, manifest: &Digest) -> Result<Image, PackagesError> {
    let image = store.image(manifest)?;
    let image = image.ok_or(PackagesError::NoImage(*manifest))?;
    if image.packages.is_some() {
        return Ok(image);
    }
    let record = write(store, &store.load_tree(&image.tree)?)?;
    Ok(store.attach_packages(&image, record)?)
}

/// Looks through a tree, and puts the record into the store.
pub fn write(store: &Store, tree: &Tree) -> Result<Digest, PackagesError> {
    let bytes = serde_json::to_vec(&collect(tree, store)).map_err(PackagesError::Record)?;
    let (digest, _) = store.write(None, &mut bytes.as_slice())?;
    Ok(digest)
}

/// An image's packages; `None`: nobody has looked.
pub fn of(store: &Store, image: &Image) -> Result<Option<Packages>, PackagesError> {
    let Some(digest) = image.packages else {
        return Ok(None);
    };
    let bytes = read_small(store, &digest, MAX_RECORD)?;
    let damaged = |cause| PackagesError::Damaged(digest, cause);
    let record: Packages = serde_json::from_slice(&bytes).map_err(damaged)?;
    match record.format {
        FORMAT => Ok(Some(record)),
        other => Err(PackagesError::Format(digest, other)),
    }
}

/// Looks through a tree.
pub fn collect(tree: &Tree, store: &Store) -> Packages {
    let mut found = Found::default();
    for item in tree.walk() {
        let Kind::File { digest, size } = item.node.kind else {
            continue;
        };
        let path = String::from_utf8_lossy(&item.path).into_owned();
        let place = shown(&names(&item.path));
        if let Some(read) = manifests::reader(&path, tree) {
            match content(store, &digest, size) {
                Ok(bytes) => found.take(&place, read(&path, &bytes)),
                Err(why) => found.unread(&place, why.to_string()),
            }
        } else if item.node.meta.mode & 0o111 != 0 && size > elf::LEAST {
            let open = || {
                let object = store.open_object(&digest).map_err(io::Error::other)?;
                object.ok_or_else(|| io::Error::other("its content is not in the store"))
            };
            match open().and_then(|mut file| programs::packages(&mut file)) {
                Ok(packages) => found.take(&place, Ok(packages)),
                Err(why) => found.unread(&place, why.to_string()),
            }
        }
    }
    found.done()
}

fn content(store: &Store, digest: &Digest, size: u64) -> io::Result<Vec<u8>> {
    if size > MAX_MANIFEST {
        let why = format!("it has {size} bytes; {MAX_MANIFEST} are read");
        return Err(io::Error::other(why));
    }
    let object = store.open_object(digest).map_err(io::Error::other)?;
    let object = object.ok_or_else(|| io::Error::other("its content is not in the store"))?;
    let mut bytes = Vec::new();
    object.take(MAX_MANIFEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a manifest says, before anyone has looked whether it makes sense.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    ecosystem: Option<Ecosystem>,
    name: String,
    version: String,
    architecture: Option<String>,
    source: Option<String>,
}

impl Said {
    fn new(ecosystem: Ecosystem, name: &str, version: &str) -> Self {
        Self {
            ecosystem: Some(ecosystem),
            name: name.trim().to_owned(),
            version: version.trim().to_owned(),
            ..Self::default()
        }
    }
}

#[derive(Default)]
struct Found {
    packages: BTreeSet<Package>,
    unread: BTreeSet<Unread>,
    full: bool,
}

impl Found {
    fn take(&mut self, place: &str, said: Result<Vec<Said>, String>) {
        let said = match said {
            Ok(said) => said,
            Err(why) => return self.unread(place, why),
        };
        for one in said {
            if self.packages.len() >= MAX_PACKAGES {
                if !self.full {
                    self.unread(
                        place,
                        format!("there are more than {MAX_PACKAGES} packages"),
                    );
                }
                self.full = true;
                return;
            }
            let Some(ecosystem) = one.ecosystem else {
                continue;
            };
            let texts = [
                Some(&one.name),
                Some(&one.version),
                one.architecture.as_ref(),
            ];
            let texts = texts.into_iter().chain([one.source.as_ref()]).flatten();
            if one.name.is_empty() || !texts.into_iter().all(|text| is_plain(text)) {
                self.unread(
                    place,
                    "it names a package in a way that no package has".into(),
                );
                continue;
            }
            self.packages.insert(Package {
                ecosystem,
                name: one.name,
                version: one.version,
                architecture: one.architecture,
                source: one.source,
                place: place.to_owned(),
            });
        }
    }

    fn unread(&mut self, place: &str, why: String) {
        if self.unread.len() < MAX_PACKAGES {
            self.unread.insert(Unread {
                place: place.to_owned(),
                why,
            });
        }
    }

    fn done(self) -> Packages {
        Packages {
            format: FORMAT,
            packages: self.packages.into_iter().collect(),
            unread: self.unread.into_iter().collect(),
        }
    }
}

/// Terminals and tables are shown it: nothing in it may act on them.
fn is_plain(text: &str) -> bool {
    text.len() <= MAX_TEXT && !text.chars().any(|c| c.is_control())
}

#[cfg(test)]
mod tests;
