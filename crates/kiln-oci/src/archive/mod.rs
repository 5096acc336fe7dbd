//! Images from files and into them: an OCI layout (image-spec v1.1, image-layout.md) as a folder or
//! a tar of it, and the archives that `docker save` writes.
//!
//! Everything is verified against its digest while it is taken in. A docker-archive
//! has no manifest; one is made from its parts, the same one each time.
//!
//! A layout in a folder also takes and gives [artifacts](Layout), one after another.

mod artifact;
mod docker;
mod export;
mod layout;
mod source;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kiln_model::Digest;

use crate::blob::{BlobWrite, BlobWriteError, Expected};
use crate::layer::LayerReadError;
use crate::manifest::{ImageError, ManifestError};
use crate::platform::Platform;
use crate::reference::Reference;
use source::Source;

pub use artifact::Layout;
pub use export::{ExportError, export};

/// Most members of an archive.
const MAX_MEMBERS: u64 = 200_000;
/// Largest archive, uncompressed, in bytes.
const MAX_ARCHIVE_BYTES: u64 = 256 << 30;

/// Which image to take from where.
#[derive(Clone, Copy, Debug)]
pub struct Import<'a> {
    /// A folder, or a tar file with any compression that layers may have.
    pub path: &'a Path,
    /// Its name in there, needed when there are several: `nginx:1.27`, or whatever
    /// an OCI layout calls it.
    pub name: Option<&'a str>,
    pub platform: &'a Platform,
    /// An existing folder with room for the archive if it is compressed; what is put
    /// there has no name and goes with the process.
    pub scratch: &'a Path,
}

/// Why an image could not be taken from a file.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{}: it could not be read: {source}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: it could not be unpacked into {}: {source}", path.display(), scratch.display())]
    Scratch {
        path: PathBuf,
        scratch: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {source}", path.display())]
    Tar {
        path: PathBuf,
        #[source]
        source: LayerReadError,
    },
    #[error(
        "{}: it is neither an OCI image layout nor a docker-archive: it has neither `index.json` nor `manifest.json`. A file system alone (`docker export`) can be added to an image with ADD",
        path.display()
    )]
    NotAnImage { path: PathBuf },
    #[error("{}: `{member}` is missing, so the image is not whole", path.display())]
    Missing { path: PathBuf, member: String },
    #[error("{}: `{member}` could not be read: {source}", path.display())]
    Member {
        path: PathBuf,
        member: String,
        #[source]
        source: io::Error,
    },
    #[error("{}: `{member}` is unusable: {problem}", path.display())]
    Unusable {
        path: PathBuf,
        member: String,
        problem: String,
    },
    #[error("{}: `{member}` is unusable: {source}", path.display())]
    Manifest {
        path: PathBuf,
        member: String,
        #[source]
        source: ManifestError,
    },
    #[error("{}: `{member}` can't be taken in: {source}", path.display())]
    Blob {
        path: PathBuf,
        member: String,
        #[source]
        source: BlobWriteError,
    },
    #[error("{}: the image can't be used: {source}", path.display())]
    Image {
        path: PathBuf,
        #[source]
        source: ImageError,
    },
    #[error("{}: there is no image `{name}` in it; it has: {names}", path.display())]
    NoSuchName {
        path: PathBuf,
        name: String,
        names: String,
    },
    #[error("{}: it has several images; say which one: {names}", path.display())]
    Ambiguous { path: PathBuf, names: String },
    #[error("{}: it has no image for {wanted}; it has: {found}", path.display())]
    NoPlatform {
        path: PathBuf,
        wanted: String,
        found: String,
    },
}

/// Takes an image in: all its blobs. Gives the digest of its manifest.
pub fn import(what: &Import<'_>, blobs: &dyn BlobWrite) -> Result<Digest, ArchiveError> {
    let opened = Opened {
        path: what.path,
        source: Source::open(what.path, what.scratch)?,
    };
    let importer = Importer {
        what,
        opened,
        blobs,
    };
    // `docker save` of today writes both; the layout has the true manifest.
    let source = &importer.opened.source;
    if source.has("oci-layout")? && source.has("index.json")? {
        layout::import(&importer)
    } else if source.has("manifest.json")? {
        docker::import(&importer)
    } else {
        Err(ArchiveError::NotAnImage {
            path: what.path.into(),
        })
    }
}

/// A folder or file whose members are read.
struct Opened<'a> {
    path: &'a Path,
    source: Source,
}

impl Opened<'_> {
    /// A whole member of at most `limit` bytes.
    fn read_small(&self, member: &str, limit: u64) -> Result<Vec<u8>, ArchiveError> {
        let (content, _) = self.open(member)?;
        let mut bytes = Vec::new();
        content
            .take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|source| ArchiveError::Member {
                path: self.path.into(),
                member: member.into(),
                source,
            })?;
        if bytes.len() as u64 > limit {
            return Err(self.unusable(member, format!("it is larger than {limit} bytes")));
        }
        Ok(bytes)
    }

    /// A member's content and size.
    fn open(&self, member: &str) -> Result<(Box<dyn Read + Send>, u64), ArchiveError> {
        self.source
            .member(member)?
            .ok_or_else(|| ArchiveError::Missing {
                path: self.path.into(),
                member: member.into(),
            })
    }

    /// Gives a member's content to `blobs`.
    fn write(
        &self,
        (member, content): (&str, &mut dyn Read),
        expected: Option<Expected>,
        blobs: &dyn BlobWrite,
    ) -> Result<(Digest, u64), ArchiveError> {
        let written = blobs.write(expected, content);
        written.map_err(|source| ArchiveError::Blob {
            path: self.path.into(),
            member: member.into(),
            source,
        })
    }

    fn unusable(&self, member: &str, problem: impl ToString) -> ArchiveError {
        ArchiveError::Unusable {
            path: self.path.into(),
            member: member.into(),
            problem: problem.to_string(),
        }
    }

    fn manifest_error(&self, member: &str, source: ManifestError) -> ArchiveError {
        ArchiveError::Manifest {
            path: self.path.into(),
            member: member.into(),
            source,
        }
    }

    fn no_such_name(&self, name: &str, names: &[String]) -> ArchiveError {
        ArchiveError::NoSuchName {
            path: self.path.into(),
            name: name.into(),
            names: listed(names),
        }
    }

    fn ambiguous(&self, names: &[String]) -> ArchiveError {
        ArchiveError::Ambiguous {
            path: self.path.into(),
            names: listed(names),
        }
    }
}

/// What both kinds of import need.
struct Importer<'a> {
    what: &'a Import<'a>,
    opened: Opened<'a>,
    blobs: &'a dyn BlobWrite,
}

impl Importer<'_> {
    fn image_error(&self, source: ImageError) -> ArchiveError {
        ArchiveError::Image {
            path: self.what.path.into(),
            source,
        }
    }
}

/// Names for a message, not endlessly many.
fn listed(names: &[String]) -> String {
    const MOST: usize = 20;
    match names.len() {
        0 => "only images without a name".into(),
        n if n > MOST => format!("{} and {} more", names[..MOST].join(", "), n - MOST),
        _ => names.join(", "),
    }
}

/// Whether two names mean the same image: `nginx` and `docker.io/library/nginx:latest`.
fn same_name(one: &str, other: &str) -> bool {
    let full = |text: &str| {
        text.parse::<Reference>()
            .map(|r| r.with_default_tag().to_string())
    };
    one == other || matches!((full(one), full(other)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests;
