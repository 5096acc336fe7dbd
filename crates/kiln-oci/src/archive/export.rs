//! Writing an OCI layout: images with all their blobs, as a folder or one uncompressed tar.
//! The same images give the same bytes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_model::Digest;

use super::layout::{NAME_ANNOTATIONS, blob_member};
use crate::blob::{
    BlobRead, BlobWriteError, Expected, ReadSmallError, VerifyingReader, read_small,
};
use crate::layer::ustar::{self, Header};
use crate::manifest::{
    self, Descriptor, Document, Index, MAX_MANIFEST_BYTES, ManifestError, media_type,
};

pub(super) const LAYOUT: &[u8] = b"{\"imageLayoutVersion\":\"1.0.0\"}";
/// Indexes and manifests inside one another.
const MAX_DEPTH: usize = 4;

/// Why images could not be written to a file.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{}: it could not be written: {source}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{}: it is there already and not empty; name another folder, or a file that ends with .tar",
        path.display()
    )]
    NotEmpty { path: PathBuf },
    #[error(
        "{}: there is something else in it, and no OCI layout; name another folder",
        path.display()
    )]
    NoLayout { path: PathBuf },
    #[error(transparent)]
    Layout(#[from] super::ArchiveError),
    #[error(transparent)]
    Document(#[from] ReadSmallError),
    #[error("the manifest {digest} can't be used: {source}")]
    Manifest {
        digest: Digest,
        #[source]
        source: ManifestError,
    },
    #[error("the indexes of {digest} lie too deep in one another")]
    TooDeep { digest: Digest },
    #[error("the blob {digest} is not there, so the image is not whole")]
    Missing { digest: Digest },
    #[error(transparent)]
    Blob(#[from] BlobWriteError),
}

/// Writes `images` (a name for each manifest or index) to `path`: a tar where it ends with
/// `.tar`, which takes the place of one that is there; else a new or empty folder.
pub fn export(
    path: &Path,
    images: &[(String, Digest)],
    blobs: &dyn BlobRead,
) -> Result<(), ExportError> {
    let mut all = BTreeSet::new();
    let mut entries = Vec::new();
    for (name, digest) in images {
        let mut entry = document(digest, blobs, 0, &mut all)?;
        for key in NAME_ANNOTATIONS {
            entry.annotations.insert(key.into(), name.clone());
        }
        entries.push(entry);
    }
    let index = Index::new(entries).to_bytes();
    let write = |source| ExportError::Write {
        path: path.into(),
        source,
    };
    let mut sink = match path.extension().is_some_and(|e| e == "tar") {
        true => Sink::tar(path).map_err(write)?,
        false => Sink::folder(path)?,
    };
    for (name, bytes) in [("oci-layout", LAYOUT), ("index.json", &index)] {
        sink.member(name, bytes.len() as u64, &mut &bytes[..])
            .map_err(write)?;
    }
    for digest in all {
        let missing = || ExportError::Missing { digest };
        let size = blobs.size(&digest).map_err(write)?.ok_or_else(missing)?;
        let mut content = blobs.open(&digest).map_err(write)?.ok_or_else(missing)?;
        let expected = Some(Expected { digest, size });
        let mut verified = VerifyingReader::new(expected, &mut *content);
        sink.member(&blob_member(&digest), size, &mut verified)
            .map_err(write)?;
        verified.finish(expected)?;
    }
    sink.finish(path).map_err(write)
}

/// Describes a manifest or index, and adds all blobs that belong to it.
pub(super) fn document(
    digest: &Digest,
    blobs: &dyn BlobRead,
    depth: usize,
    all: &mut BTreeSet<Digest>,
) -> Result<Descriptor, ExportError> {
    if depth > MAX_DEPTH {
        return Err(ExportError::TooDeep { digest: *digest });
    }
    let bytes = read_small(blobs, digest, MAX_MANIFEST_BYTES)?;
    let parsed = manifest::parse(&bytes, None).map_err(|source| ExportError::Manifest {
        digest: *digest,
        source,
    })?;
    all.insert(*digest);
    let media_type = match &parsed {
        Document::Manifest(manifest) => {
            all.insert(manifest.config.digest);
            all.extend(manifest.layers.iter().map(|layer| layer.digest));
            manifest
                .media_type
                .as_deref()
                .unwrap_or(media_type::OCI_MANIFEST)
        }
        Document::Index(index) => {
            for entry in &index.manifests {
                document(&entry.digest, blobs, depth + 1, all)?;
            }
            index.media_type.as_deref().unwrap_or(media_type::OCI_INDEX)
        }
    };
    Ok(Descriptor::new(media_type, *digest, bytes.len() as u64))
}

enum Sink {
    Folder(PathBuf),
    Tar(BufWriter<tempfile::NamedTempFile>),
}

impl Sink {
    fn folder(path: &Path) -> Result<Self, ExportError> {
        let write = |source| ExportError::Write {
            path: path.into(),
            source,
        };
        fs::create_dir_all(path.join("blobs/sha256")).map_err(write)?;
        let mut names = fs::read_dir(path).map_err(write)?;
        let mut blobs = fs::read_dir(path.join("blobs/sha256")).map_err(write)?;
        let other = names.any(|name| name.is_ok_and(|name| name.file_name() != "blobs"));
        if other || blobs.next().is_some() {
            return Err(ExportError::NotEmpty { path: path.into() });
        }
        Ok(Self::Folder(path.into()))
    }

    fn tar(path: &Path) -> io::Result<Self> {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let file = tempfile::NamedTempFile::new_in(parent.unwrap_or(Path::new(".")))?;
        Ok(Self::Tar(BufWriter::with_capacity(1 << 18, file)))
    }

    fn member(&mut self, name: &str, size: u64, content: &mut dyn Read) -> io::Result<()> {
        match self {
            Self::Folder(folder) => {
                let mut file = File::create(folder.join(name))?;
                io::copy(content, &mut file)?;
                Ok(())
            }
            Self::Tar(out) => {
                let too_long = |_| io::Error::other("it is too long for a tar");
                let header = Header {
                    name: name.as_bytes().to_vec(),
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    size: i64::try_from(size).map_err(too_long)?,
                    mtime: 0,
                    kind: b'0',
                    link: Vec::new(),
                    major: 0,
                    minor: 0,
                };
                if size > ustar::MAX_OCTAL_11 {
                    return Err(io::Error::other(
                        "a layer is larger than 8 GiB: name a folder",
                    ));
                }
                out.write_all(&ustar::encode(&header))?;
                let copied = io::copy(content, out)?;
                let rest = (ustar::BLOCK - (copied % ustar::BLOCK as u64) as usize) % ustar::BLOCK;
                out.write_all(&[0; ustar::BLOCK][..rest])
            }
        }
    }

    /// Everything is on disk before a tar has its name.
    fn finish(self, path: &Path) -> io::Result<()> {
        match self {
            Self::Folder(_) => Ok(()),
            Self::Tar(mut out) => {
                out.write_all(&[0; 2 * ustar::BLOCK])?;
                let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
                file.as_file()
                    .set_permissions(fs::Permissions::from_mode(0o644))?;
                file.as_file().sync_all()?;
                file.persist(path)?;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::archive::{Import, import};
    use crate::testing::{MemoryBlobs, SampleImage};

    #[test]
    fn what_is_written_is_read_again_for_each_platform() {
        let blobs = MemoryBlobs::new();
        let images = ["linux/amd64", "linux/arm64"].map(|p| SampleImage::new(p, p));
        let mut entries = Vec::new();
        for image in &images {
            image.store(&blobs);
            let mut entry = image.descriptor();
            entry.platform = Some(image.platform.parse().unwrap());
            entries.push(entry);
        }
        let index = blobs.put(Index::new(entries).to_bytes());
        let folder = tempfile::tempdir().unwrap();
        let named = [("shop:1".to_owned(), index)];
        for name in ["layout", "layout.tar"] {
            let path = folder.path().join(name);
            export(&path, &named, &blobs).unwrap();
            for image in &images {
                let taken = MemoryBlobs::new();
                let what = Import {
                    path: &path,
                    name: Some("shop:1"),
                    platform: &image.platform.parse().unwrap(),
                    scratch: folder.path(),
                };
                assert_eq!(import(&what, &taken).unwrap(), image.digest(), "{name}");
                assert_eq!(taken.digests().len(), 4);
            }
        }
        let path = |name: &str| folder.path().join(name);
        let error = export(&path("layout"), &named, &blobs).unwrap_err();
        assert!(matches!(error, ExportError::NotEmpty { .. }), "{error}");
        // A file gives way, and the bytes are the same.
        let first = fs::read(path("layout.tar")).unwrap();
        export(&path("layout.tar"), &named, &blobs).unwrap();
        assert_eq!(fs::read(path("layout.tar")).unwrap(), first);
    }

    #[test]
    fn an_image_that_is_not_whole_is_not_written() {
        let blobs = MemoryBlobs::new();
        let image = SampleImage::new("linux/amd64", "x");
        let manifest = blobs.put(image.manifest.clone());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        let error = export(&path, &[("x".into(), manifest)], &blobs).unwrap_err();
        assert!(matches!(error, ExportError::Missing { .. }), "{error}");
        assert!(!path.exists());
    }
}
