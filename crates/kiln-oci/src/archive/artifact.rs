//! Artifacts in a layout that is a folder: put there under a name and taken from there blob
//! by blob, as from a repository of a registry.
//!
//! Invariants: a blob has its name only once it is whole and on disk, and the index names it
//! only after that, so that whoever reads meanwhile sees the artifact before or the one after;
//! of several writers each waits for the other; what only a replaced artifact needed is taken
//! away, and nothing else.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use kiln_model::Digest;

use super::export::{ExportError, LAYOUT, document};
use super::layout::{self, NAME_ANNOTATIONS, blob_member, is_named};
use super::source::Source;
use super::{ArchiveError, Opened};
use crate::blob::{BlobRead, BlobWrite, Expected, VerifyingReader};
use crate::manifest::{self, Descriptor, Index, MAX_MANIFEST_BYTES, Manifest};

/// A layout in a folder.
#[derive(Clone, Debug)]
pub struct Layout {
    folder: PathBuf,
}

/// The blobs of the folder itself.
struct Own<'a>(&'a Path);

impl Layout {
    pub fn new(folder: &Path) -> Self {
        let folder = folder.to_owned();
        Self { folder }
    }

    fn opened(&self) -> Opened<'_> {
        Opened {
            path: &self.folder,
            source: Source::Folder(self.folder.clone()),
        }
    }

    /// The manifest and the configuration of the artifact of this name, verified. The
    /// configuration must be of this media type and have at most `limit` bytes.
    pub fn artifact(
        &self,
        name: &str,
        media_type: &str,
        limit: u64,
    ) -> Result<(Manifest, Vec<u8>), ArchiveError> {
        let opened = self.opened();
        let index = layout::index(&opened)?;
        let mut named = index.manifests.iter().filter(|e| is_named(e, name));
        let entry = match (named.next(), named.next()) {
            (Some(entry), None) => entry,
            (None, _) => return Err(opened.no_such_name(name, &layout::names(&index))),
            (Some(_), Some(_)) => return Err(opened.ambiguous(&layout::names(&index))),
        };
        let member = blob_member(&entry.digest);
        let bytes = layout::read_blob(&opened, entry, MAX_MANIFEST_BYTES)?;
        let manifest = manifest::parse(&bytes, Some(&entry.media_type))
            .and_then(|document| document.artifact(media_type))
            .map_err(|source| opened.manifest_error(&member, source))?;
        let config = layout::read_blob(&opened, &manifest.config, limit)?;
        Ok((manifest, config))
    }

    /// Streams one blob into `blobs`, if it is what the descriptor says.
    pub fn fetch(&self, blob: &Descriptor, blobs: &dyn BlobWrite) -> Result<(), ArchiveError> {
        layout::take_blob(&self.opened(), blob, blobs)
    }

    /// Puts a manifest with all its blobs there, in place of what has this name. A folder that
    /// is not there is made.
    pub fn put(
        &self,
        name: &str,
        digest: &Digest,
        blobs: &dyn BlobRead,
    ) -> Result<(), ExportError> {
        let write = |source| ExportError::Write {
            path: self.folder.clone(),
            source,
        };
        fs::create_dir_all(&self.folder).map_err(write)?;
        // Goes with the handle.
        let lock = File::open(&self.folder).map_err(write)?;
        lock.lock().map_err(write)?;
        let before = self.entries()?;
        fs::create_dir_all(self.folder.join("blobs/sha256")).map_err(write)?;
        let mut needed = BTreeSet::new();
        let mut entry = document(digest, blobs, 0, &mut needed)?;
        for digest in &needed {
            self.put_blob(digest, blobs)?;
        }
        for key in NAME_ANNOTATIONS {
            entry.annotations.insert(key.into(), name.to_owned());
        }
        let (replaced, mut entries): (Vec<_>, Vec<_>) =
            before.into_iter().partition(|e| is_named(e, name));
        entries.push(entry);
        let index = Index::new(entries.clone()).to_bytes();
        self.put_file("oci-layout", &mut &LAYOUT[..])
            .and_then(|()| self.put_file("index.json", &mut &index[..]))
            .map_err(write)?;
        self.remove_unneeded(&replaced, &entries).map_err(write)
    }

    /// What is listed; nothing in a new folder. One that is not empty and no layout is left
    /// alone.
    fn entries(&self) -> Result<Vec<Descriptor>, ExportError> {
        let opened = self.opened();
        let there = |member: &str| opened.source.has(member);
        if there("oci-layout")? && there("index.json")? {
            return Ok(layout::index(&opened)?.manifests);
        }
        let write = |source| ExportError::Write {
            path: self.folder.clone(),
            source,
        };
        let own = ["blobs", "oci-layout"];
        for name in fs::read_dir(&self.folder).map_err(write)? {
            let name = name.map_err(write)?.file_name();
            if !own.iter().any(|own| name == *own) {
                return Err(ExportError::NoLayout {
                    path: self.folder.clone(),
                });
            }
        }
        Ok(Vec::new())
    }

    fn put_blob(&self, digest: &Digest, blobs: &dyn BlobRead) -> Result<(), ExportError> {
        let write = |source| ExportError::Write {
            path: self.folder.clone(),
            source,
        };
        let missing = || ExportError::Missing { digest: *digest };
        let size = blobs.size(digest).map_err(write)?.ok_or_else(missing)?;
        let member = blob_member(digest);
        let there = fs::metadata(self.folder.join(&member));
        // It got its name when it was whole.
        if there.is_ok_and(|meta| meta.is_file() && meta.len() == size) {
            return Ok(());
        }
        let mut content = blobs.open(digest).map_err(write)?.ok_or_else(missing)?;
        let expected = Some(Expected {
            digest: *digest,
            size,
        });
        let mut verified = VerifyingReader::new(expected, &mut *content);
        let mut unfinished = self.unfinished().map_err(write)?;
        io::copy(&mut verified, &mut unfinished).map_err(write)?;
        verified.finish(expected)?;
        self.name(unfinished, &member).map_err(write)
    }

    fn put_file(&self, member: &str, content: &mut dyn io::Read) -> io::Result<()> {
        let mut unfinished = self.unfinished()?;
        io::copy(content, &mut unfinished)?;
        self.name(unfinished, member)
    }

    /// Among the blobs: a killed writer leaves nothing where it would look like another's.
    fn unfinished(&self) -> io::Result<tempfile::NamedTempFile> {
        tempfile::NamedTempFile::new_in(self.folder.join("blobs"))
    }

    fn name(&self, unfinished: tempfile::NamedTempFile, member: &str) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let file = unfinished.as_file();
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.sync_all()?;
        unfinished.persist(self.folder.join(member))?;
        Ok(())
    }

    /// Takes away what only `replaced` needed. What can't be understood stays, with all that
    /// it might need.
    fn remove_unneeded(&self, replaced: &[Descriptor], kept: &[Descriptor]) -> io::Result<()> {
        let own = Own(&self.folder);
        let mut needed = BTreeSet::new();
        let mut gone = BTreeSet::new();
        for (entries, all) in [(kept, &mut needed), (replaced, &mut gone)] {
            for entry in entries {
                if document(&entry.digest, &own, 0, all).is_err() {
                    return Ok(());
                }
            }
        }
        for digest in gone.difference(&needed) {
            match fs::remove_file(self.folder.join(blob_member(digest))) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
                _ => {}
            }
        }
        Ok(())
    }
}

impl BlobRead for Own<'_> {
    fn open(&self, digest: &Digest) -> io::Result<Option<Box<dyn io::Read + Send>>> {
        match File::open(self.0.join(blob_member(digest))) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    fn size(&self, digest: &Digest) -> io::Result<Option<u64>> {
        match fs::metadata(self.0.join(blob_member(digest))) {
            Ok(meta) => Ok(Some(meta.len())),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(cause),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::MemoryBlobs;

    const KIND: &str = "application/vnd.example.v1+json";

    /// An artifact with these layers.
    fn artifact(blobs: &MemoryBlobs, config: &str, layers: &[&str]) -> Digest {
        let of = |kind: &str, text: &str| {
            Descriptor::new(kind, blobs.put(text.as_bytes()), text.len() as u64)
        };
        let layers = layers.iter().map(|text| of("text/plain", text)).collect();
        blobs.put(Manifest::new(of(KIND, config), layers).to_bytes())
    }

    fn there(folder: &Path) -> usize {
        fs::read_dir(folder.join("blobs/sha256")).unwrap().count()
    }

    #[test]
    fn what_is_put_is_found_by_its_name_and_takes_the_place_of_what_had_it() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(&folder.path().join("new/one"));
        let blobs = MemoryBlobs::new();
        let first = artifact(&blobs, "{1}", &["shared", "old"]);
        layout.put("a", &first, &blobs).unwrap();
        let other = artifact(&blobs, "{2}", &["shared", "only the other's"]);
        layout.put("b", &other, &blobs).unwrap();
        assert_eq!(there(&layout.folder), 7);

        let (manifest, config) = layout.artifact("a", KIND, 9).unwrap();
        assert_eq!(config, b"{1}");
        let taken = MemoryBlobs::new();
        for layer in &manifest.layers {
            layout.fetch(layer, &taken).unwrap();
        }
        assert_eq!(taken.digests().len(), 2);

        // A manifest, its configuration and a layer go; three others come.
        let second = artifact(&blobs, "{3}", &["shared", "new"]);
        layout.put("a", &second, &blobs).unwrap();
        assert_eq!(there(&layout.folder), 7);
        assert_eq!(layout.artifact("a", KIND, 9).unwrap().1, b"{3}");
        assert_eq!(layout.artifact("b", KIND, 9).unwrap().1, b"{2}");
        let gone = layout.fetch(&manifest.layers[1], &taken).unwrap_err();
        assert!(matches!(gone, ArchiveError::Missing { .. }), "{gone}");
        // Nothing unfinished is left.
        assert_eq!(
            fs::read_dir(layout.folder.join("blobs")).unwrap().count(),
            1
        );
    }

    #[test]
    fn what_is_not_there_or_of_another_kind_or_too_long_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let error = |name: &str, kind: &str, limit: u64| {
            let error = layout.artifact(name, kind, limit).unwrap_err().to_string();
            assert!(
                error.contains(&folder.path().display().to_string()),
                "{error}"
            );
            error
        };
        assert!(error("a", KIND, 9).contains("`oci-layout` is missing"));
        let blobs = MemoryBlobs::new();
        layout
            .put("a", &artifact(&blobs, "{1}", &["x"]), &blobs)
            .unwrap();
        assert!(error("b", KIND, 9).contains("no image `b` in it; it has: a"));
        assert!(error("a", "text/plain", 9).contains("not `text/plain`"));
        assert!(error("a", KIND, 2).contains("larger than 2 bytes"));
    }

    #[test]
    fn a_folder_with_other_things_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes"), "mine").unwrap();
        let blobs = MemoryBlobs::new();
        let digest = artifact(&blobs, "{1}", &["x"]);
        let error = Layout::new(folder.path()).put("a", &digest, &blobs);
        let error = error.unwrap_err();
        assert!(matches!(error, ExportError::NoLayout { .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_understood_keeps_everything() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let blobs = MemoryBlobs::new();
        layout
            .put("a", &artifact(&blobs, "{1}", &["old"]), &blobs)
            .unwrap();
        let index = fs::read_to_string(folder.path().join("index.json")).unwrap();
        let strange = Descriptor::new("text/plain", Digest::of("elsewhere"), 9);
        let mut index: Index = serde_json::from_str(&index).unwrap();
        index.manifests.push(strange);
        fs::write(folder.path().join("index.json"), index.to_bytes()).unwrap();
        layout
            .put("a", &artifact(&blobs, "{2}", &["new"]), &blobs)
            .unwrap();
        assert_eq!(there(folder.path()), 6);
        let text = fs::read_to_string(folder.path().join("index.json")).unwrap();
        assert!(
            text.contains(&Digest::of("elsewhere").to_string()),
            "{text}"
        );
    }

    #[test]
    fn of_several_writers_none_loses_what_the_others_put() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path());
        let blobs = MemoryBlobs::new();
        let names: Vec<String> = (0..8).map(|n| format!("n{n}")).collect();
        std::thread::scope(|scope| {
            for name in &names {
                let (layout, blobs) = (&layout, &blobs);
                scope.spawn(move || {
                    let digest = artifact(blobs, &format!("{{{name}}}"), &["shared"]);
                    layout.put(name, &digest, blobs).unwrap();
                });
            }
        });
        for name in &names {
            let (_, config) = layout.artifact(name, KIND, 9).unwrap();
            assert_eq!(config, format!("{{{name}}}").as_bytes());
        }
        assert_eq!(there(folder.path()), 17);
    }
}
