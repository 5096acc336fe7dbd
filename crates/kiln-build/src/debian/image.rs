//! From a finished root folder to an image: one layer, configuration, manifest.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, Seek as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use kiln_model::{Digest, ImageConfig};
use kiln_oci::layer::{Entry, EntryKind, LayerWriteError, LayerWriter};
use kiln_oci::manifest::{
    ConfigDocument, Descriptor, History, Manifest, media_type, timestamp, write_config,
};
use kiln_oci::{BlobWrite, BlobWriteError, Expected};

/// Deeper folders can't be named by one path (PATH_MAX).
const MAX_DEPTH: usize = 2048;
/// Names and values of one file's attributes (Linux XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_XATTR_BYTES: usize = 65536;

/// Why a root could not become an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot read {path} of the new root")]
    Scan {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Layer(#[from] LayerWriteError),
    #[error("cannot make the layer's file in {path}")]
    Temporary {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Blob(#[from] BlobWriteError),
}

/// What the image says beside its files.
pub struct Description {
    pub config: ImageConfig,
    /// What made the layer, in the image's history.
    pub created_by: String,
    /// Seconds; later file times become this, and the image's own time is this.
    pub epoch: i64,
}

/// The digests of everything an image consists of.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImageBlobs {
    pub manifest: Digest,
    pub config: Digest,
    pub layer: Digest,
}

/// Writes the root `folder` as an image of one layer. `scratch`: a folder for the layer
/// while it is made. Blocking.
pub fn write(
    folder: &Path,
    scratch: &Path,
    description: Description,
    blobs: &dyn BlobWrite,
) -> Result<ImageBlobs, ImageError> {
    let temporary = |source| ImageError::Temporary {
        path: scratch.into(),
        source,
    };
    let file = tempfile::tempfile_in(scratch).map_err(temporary)?;
    let out = io::BufWriter::with_capacity(1 << 18, file);
    let mut writer = LayerWriter::new(out, Some(description.epoch))?;
    Scan {
        root: folder,
        links: HashMap::new(),
    }
    .folder(Path::new(""), 0, &mut writer)?;
    let (layer, out) = writer.finish()?;
    let mut file = out.into_inner().map_err(|e| temporary(e.into_error()))?;
    file.rewind().map_err(temporary)?;
    let expected = Expected {
        digest: layer.digest,
        size: layer.size,
    };
    blobs.write(Some(expected), &mut file)?;
    let created = Some(timestamp(description.epoch));
    let document = ConfigDocument {
        config: description.config,
        created: created.clone(),
        diff_ids: vec![layer.diff_id],
        history: vec![History {
            created,
            created_by: Some(description.created_by),
            ..History::default()
        }],
        ..ConfigDocument::default()
    };
    let (config, size) = blobs.write(None, &mut write_config(&document).as_slice())?;
    let config_descriptor = Descriptor::new(media_type::OCI_CONFIG, config, size);
    let manifest = Manifest::new(config_descriptor, vec![layer.descriptor()]);
    let (manifest, _) = blobs.write(None, &mut manifest.to_bytes().as_slice())?;
    Ok(ImageBlobs {
        manifest,
        config,
        layer: layer.digest,
    })
}

struct Scan<'a> {
    root: &'a Path,
    /// Files with several names: device and inode → the first name.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Scan<'_> {
    /// Writes the folder `path` (relative) and all that is in it: parents before
    /// children, siblings by the bytes of their names.
    fn folder<W: io::Write>(
        &mut self,
        path: &Path,
        depth: usize,
        writer: &mut LayerWriter<W>,
    ) -> Result<(), ImageError> {
        let full = self.root.join(path);
        let fail = |source| ImageError::Scan {
            path: full.clone(),
            source,
        };
        if depth > MAX_DEPTH {
            return Err(fail(io::Error::other("folders are nested too deep")));
        }
        let meta = full.symlink_metadata().map_err(fail)?;
        let entry = self.entry(path, &meta, EntryKind::Dir).map_err(fail)?;
        writer.entry(&entry, &mut io::empty())?;
        let mut names = Vec::new();
        for child in std::fs::read_dir(&full).map_err(fail)? {
            names.push(child.map_err(fail)?.file_name());
        }
        names.sort();
        for name in names {
            let path = path.join(&name);
            let meta = self.root.join(&path).symlink_metadata().map_err(fail)?;
            match meta.is_dir() {
                true => self.folder(&path, depth + 1, writer)?,
                false => self.file(&path, &meta, writer)?,
            }
        }
        Ok(())
    }

    fn file<W: io::Write>(
        &mut self,
        path: &Path,
        meta: &Metadata,
        writer: &mut LayerWriter<W>,
    ) -> Result<(), ImageError> {
        let full = self.root.join(path);
        let fail = |source| ImageError::Scan {
            path: full.clone(),
            source,
        };
        let Some(kind) = self.kind(path, meta).map_err(fail)? else {
            return Ok(());
        };
        let with_content = matches!(kind, EntryKind::File { .. });
        let entry = self.entry(path, meta, kind).map_err(fail)?;
        match with_content {
            true => writer.entry(&entry, &mut File::open(&full).map_err(fail)?)?,
            false => writer.entry(&entry, &mut io::empty())?,
        }
        Ok(())
    }

    /// `None`: nothing an image holds (sockets, an overlay's mark for a removed file).
    fn kind(&mut self, path: &Path, meta: &Metadata) -> io::Result<Option<EntryKind>> {
        let kind = meta.file_type();
        let (major, minor) = (
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev()),
        );
        if kind.is_socket() || (kind.is_char_device() && (major, minor) == (0, 0)) {
            return Ok(None);
        }
        let bytes = path.as_os_str().as_bytes();
        if meta.nlink() > 1 {
            let first = self
                .links
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| bytes.to_vec());
            if first != bytes {
                return Ok(Some(EntryKind::Hardlink {
                    target: first.clone(),
                }));
            }
        }
        Ok(Some(if kind.is_file() {
            EntryKind::File { size: meta.len() }
        } else if kind.is_symlink() {
            let target = std::fs::read_link(self.root.join(path))?;
            EntryKind::Symlink {
                target: target.as_os_str().as_bytes().to_vec(),
            }
        } else if kind.is_fifo() {
            EntryKind::Fifo
        } else if kind.is_char_device() {
            EntryKind::Char { major, minor }
        } else {
            EntryKind::Block { major, minor }
        }))
    }

    fn entry(&self, path: &Path, meta: &Metadata, kind: EntryKind) -> io::Result<Entry> {
        Ok(Entry {
            path: path.as_os_str().as_bytes().to_vec(),
            xattrs: match kind {
                EntryKind::Hardlink { .. } => BTreeMap::new(),
                _ => xattrs(&self.root.join(path))?,
            },
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
        })
    }
}

/// The attributes that belong to an image: not those of the machine's own security
/// modules and mounts.
fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = Vec::with_capacity(1024);
    let mut found = BTreeMap::new();
    match rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names)) {
        Ok(0) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(found),
        Ok(_) => {}
        Err(rustix::io::Errno::RANGE) => {
            names.reserve(MAX_XATTR_BYTES);
            rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names))?;
        }
        Err(error) => return Err(error.into()),
    }
    for name in names.split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let wanted = name == b"security.capability" || name.starts_with(b"user.");
        if wanted {
            let mut value = Vec::with_capacity(MAX_XATTR_BYTES);
            rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value))?;
            found.insert(name.to_vec(), value);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use kiln_oci::testing::MemoryBlobs;

    fn write_once(folder: &Path, mode: u32) -> (ImageBlobs, MemoryBlobs) {
        std::fs::create_dir_all(folder.join("a/b")).unwrap();
        std::fs::write(folder.join("a/x"), "hello").unwrap();
        if !folder.join("a/y").exists() {
            std::fs::hard_link(folder.join("a/x"), folder.join("a/y")).unwrap();
            std::os::unix::fs::symlink("x", folder.join("a/b/link")).unwrap();
        }
        for path in ["a", "a/b", "a/x", "."] {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(folder.join(path), permissions).unwrap();
        }
        let blobs = MemoryBlobs::new();
        let description = Description {
            config: ImageConfig {
                platform: "linux/amd64".into(),
                ..ImageConfig::default()
            },
            created_by: "test".into(),
            epoch: 0,
        };
        let image = write(folder, folder.parent().unwrap(), description, &blobs).unwrap();
        (image, blobs)
    }

    #[test]
    fn equal_folders_give_equal_images_whenever_and_wherever() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (first, blobs) = write_once(&folders[0].path().join("one"), 0o755);
        let (second, _) = write_once(&folders[1].path().join("two"), 0o755);
        assert_eq!(first, second);
        let (third, _) = write_once(&folders[1].path().join("two"), 0o750);
        assert_ne!(first.layer, third.layer);
        let manifest = String::from_utf8(blobs.get(&first.manifest).unwrap()).unwrap();
        assert!(
            manifest.contains(&first.layer.to_string())
                && manifest.contains(&first.config.to_string())
        );
    }
}
