//! Secret values, one file a version: `secrets/<id>`, mode 0600 in a 0700 folder.
//!
//! A version's id is HMAC-SHA256 (RFC 2104) of its value under a random key of this
//! root (`secrets/key`): equal values have equal ids here, and an id that is seen
//! elsewhere (in a release, a log) tells nothing about the value.
//!
//! A version may have names, for compose's `external` secrets: `secrets/names/<sha256 of the
//! name, hex>` holds two lines, the id and the name.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use kiln_model::Digest;
use sha2::Sha256;
use zeroize::Zeroizing;

/// Longest name of a secret, in bytes.
pub const LONGEST_NAME: usize = 255;

/// The largest secret, as in Docker and Kubernetes' order of size.
pub const LARGEST: u64 = 512 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("the secret store {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the secret has {0} bytes; at most {LARGEST} are kept")]
    TooLarge(usize),
    #[error("{0} is damaged: it must hold 32 bytes")]
    BadKey(PathBuf),
    #[error("`{}` is no name for a secret (1 to {LONGEST_NAME} bytes, no control characters)", .0.escape_debug())]
    Name(String),
    #[error("{0} is damaged: it must hold a version and a name")]
    BadName(PathBuf),
}

/// The secrets of one kiln root.
pub struct SecretStore {
    folder: PathBuf,
    key: Zeroizing<Vec<u8>>,
}

impl SecretStore {
    /// Makes the folder and the key when they are missing.
    pub fn open(root: &Path) -> Result<Self, SecretError> {
        let folder = root.join("secrets");
        let io = |source| SecretError::Io {
            path: folder.clone(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(io)?;
        let path = folder.join("key");
        if !path.exists() {
            let mut fresh = Zeroizing::new(vec![0; 32]);
            getrandom::fill(&mut fresh).map_err(|e| io(io::Error::other(e.to_string())))?;
            place(&folder, &path, &fresh).map_err(io)?;
        }
        let key = Zeroizing::new(fs::read(&path).map_err(io)?);
        if key.len() != 32 {
            return Err(SecretError::BadKey(path));
        }
        Ok(Self { folder, key })
    }

    /// Keeps a value; the same value again is the same version.
    pub fn put(&self, value: &[u8]) -> Result<Digest, SecretError> {
        if value.len() as u64 > LARGEST {
            return Err(SecretError::TooLarge(value.len()));
        }
        let id = self.id_of(value)?;
        let path = self.path(&id);
        if !path.exists() {
            place(&self.folder, &path, value).map_err(|source| SecretError::Io { path, source })?;
        }
        Ok(id)
    }

    /// Keeps a value under a name, which then stands for it and no longer for another.
    pub fn set(&self, name: &str, value: &[u8]) -> Result<Digest, SecretError> {
        let path = self.name_path(name)?;
        let id = self.put(value)?;
        let folder = self.folder.join("names");
        let io = |source| SecretError::Io {
            path: path.clone(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(io)?;
        let text = format!("{id}\n{name}\n");
        let temporary = write_new(&folder, text.as_bytes()).map_err(io)?;
        fs::rename(&temporary, &path).map_err(io)?;
        Ok(id)
    }

    /// The version that a name stands for; `None`: there is no such name.
    pub fn get(&self, name: &str) -> Result<Option<Digest>, SecretError> {
        Ok(read_name(&self.name_path(name)?)?.map(|(_, id)| id))
    }

    /// Takes a name away; releases keep the version. `false`: there was none.
    pub fn remove(&self, name: &str) -> Result<bool, SecretError> {
        let path = self.name_path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(SecretError::Io { path, source }),
        }
    }

    /// Every name with its version, sorted by name.
    pub fn names(&self) -> Result<Vec<(String, Digest)>, SecretError> {
        let folder = self.folder.join("names");
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(SecretError::Io {
                    path: folder,
                    source,
                });
            }
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| SecretError::Io {
                path: folder.clone(),
                source,
            })?;
            // What a crash left half-written begins with a dot.
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                names.extend(read_name(&entry.path())?);
            }
        }
        names.sort();
        Ok(names)
    }

    fn name_path(&self, name: &str) -> Result<PathBuf, SecretError> {
        if name.is_empty() || name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
            return Err(SecretError::Name(name.to_owned()));
        }
        Ok(self.folder.join("names").join(Digest::of(name).hex()))
    }

    /// The file that holds a version's value.
    pub fn path(&self, id: &Digest) -> PathBuf {
        self.folder.join(id.hex())
    }

    fn id_of(&self, value: &[u8]) -> Result<Digest, SecretError> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key)
            .map_err(|_| SecretError::BadKey(self.folder.join("key")))?;
        mac.update(value);
        Ok(Digest::from_bytes(mac.finalize().into_bytes().into()))
    }
}

fn read_name(path: &Path) -> Result<Option<(String, Digest)>, SecretError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(SecretError::Io {
                path: path.to_owned(),
                source,
            });
        }
    };
    let mut lines = text.lines();
    let id = lines.next().and_then(|id| id.parse().ok());
    match (id, lines.next()) {
        (Some(id), Some(name)) => Ok(Some((name.to_owned(), id))),
        _ => Err(SecretError::BadName(path.to_owned())),
    }
}

/// Writes a file whole or not at all; whoever comes second finds the first one's.
fn place(folder: &Path, path: &Path, value: &[u8]) -> io::Result<()> {
    let temporary = write_new(folder, value)?;
    let linked = match fs::hard_link(&temporary, path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    fs::remove_file(&temporary)?;
    linked
}

/// Writes a durable file under a name that nobody reads.
fn write_new(folder: &Path, value: &[u8]) -> io::Result<PathBuf> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
    let temporary = folder.join(format!(".new-{}", hex::encode(random)));
    let mut file = fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(value)?;
    file.sync_all()?;
    Ok(temporary)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn equal_values_share_a_version_that_is_not_their_plain_digest() {
        let root = tempfile::tempdir().unwrap();
        let store = SecretStore::open(root.path()).unwrap();
        let id = store.put(b"hunter2").unwrap();
        assert_eq!(
            id,
            SecretStore::open(root.path())
                .unwrap()
                .put(b"hunter2")
                .unwrap()
        );
        assert_ne!(id, store.put(b"hunter3").unwrap());
        assert_ne!(id, Digest::of("hunter2"));
        assert_eq!(fs::read(store.path(&id)).unwrap(), b"hunter2");
        let mode = fs::metadata(store.path(&id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(
            id,
            SecretStore::open(other.path())
                .unwrap()
                .put(b"hunter2")
                .unwrap()
        );
    }

    #[test]
    fn a_name_stands_for_the_value_it_was_set_to_last() {
        let root = tempfile::tempdir().unwrap();
        let store = SecretStore::open(root.path()).unwrap();
        assert_eq!(store.get("db/password").unwrap(), None);
        assert_eq!(store.names().unwrap(), []);
        let first = store.set("db/password", b"one").unwrap();
        let second = store.set("db/password", b"two").unwrap();
        store.set("..", b"one").unwrap();
        assert_eq!(store.get("db/password").unwrap(), Some(second));
        let names = [("..".to_owned(), first), ("db/password".to_owned(), second)];
        assert_eq!(store.names().unwrap(), names);
        assert!(store.remove("..").unwrap() && !store.remove("..").unwrap());
        // What a release may still need stays.
        assert_eq!(fs::read(store.path(&first)).unwrap(), b"one");
        for bad in ["", "a\nb", &"x".repeat(256)] {
            assert!(matches!(store.set(bad, b"x"), Err(SecretError::Name(_))));
        }
    }

    #[test]
    fn too_large_a_secret_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = SecretStore::open(root.path()).unwrap();
        let value = vec![0; LARGEST as usize + 1];
        assert!(matches!(store.put(&value), Err(SecretError::TooLarge(_))));
    }
}
