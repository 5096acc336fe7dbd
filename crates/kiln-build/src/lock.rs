//! `kiln.lock`: every outside input of a project, pinned, beside its compose file.
//!
//! The file is JSON in a fixed order (maps sorted, packages by name), with one line
//! per pinned thing, so that a version that moves is one changed line in a diff:
//!
//! ```json
//! {
//!   "format": 1,
//!   "bases": {
//!     "web": {
//!       "suite": "bookworm",
//!       "components": ["main"],
//!       "essential": true,
//!       "distroless": false,
//!       "request": ["nginx-light"],
//!       "architectures": {
//!         "amd64": [
//!           {"name": "adduser", "version": "3.134", "arch": "all", "sha256": "…", "size": 116000, "archive": "debian", "path": "pool/main/a/…"}
//!         ]
//!       }
//!     }
//!   },
//!   "images": {
//!     "docker.io/library/busybox:1.36": "sha256:…"
//!   },
//!   "urls": {
//!     "https://example.org/tool.tar.gz": "sha256:…"
//!   },
//!   "git": {
//!     "https://example.org/tool.git#v1": "<commit>"
//!   },
//!   "network": {
//!     "web": {"…": "what its RUNs fetched: see `network::record`"}
//!   }
//! }
//! ```
//!
//! `request` is what the compose file asked for when the entry was made: if that has
//! changed, the entry no longer answers it and is made anew. Sections this kiln does
//! not know are kept as they are; another `format` number is refused.
//!
//! Invariants: equal locks render to equal bytes; saving replaces the file in one
//! step. What must not enter: network, resolution, anything about when or by whom.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use kiln_model::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::network::record::{Kept, Recording};
use crate::remote::Pins;

/// A lock file larger than this is not one of ours.
const MAX_LOCK_BYTES: u64 = 64 << 20;

/// Why `kiln.lock` could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is larger than {MAX_LOCK_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error(
        "{path} is not a valid lock file (if it holds merge conflict marks, resolve them, or remove the file and run `kiln lock`)"
    )]
    Syntax {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "{path} has format {found}, and this kiln knows format {}: use the kiln that wrote it, or newer",
        Lock::FORMAT
    )]
    Format { path: PathBuf, found: u64 },
}

/// The content of `kiln.lock`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lock {
    /// [`Lock::FORMAT`].
    pub format: u32,
    /// `x-kiln.bases`, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bases: BTreeMap<String, LockedBase>,
    /// Canonical reference → digest of its manifest or index.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, Digest>,
    /// What RUNs fetched, by service ([`crate::network::record`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub network: BTreeMap<String, BTreeMap<String, Recording>>,
    /// What ADD took from elsewhere: sections `urls` and `git`.
    #[serde(flatten)]
    pub remote: Pins,
    /// Sections of later kilns, kept unread.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for Lock {
    fn default() -> Self {
        Self {
            format: Self::FORMAT,
            bases: BTreeMap::new(),
            images: BTreeMap::new(),
            network: BTreeMap::new(),
            remote: Pins::default(),
            other: BTreeMap::new(),
        }
    }
}

/// One Debian base: what was asked for, and what that came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedBase {
    pub suite: String,
    pub components: Vec<String>,
    /// With the suite's required packages.
    pub essential: bool,
    pub distroless: bool,
    /// The asked-for packages, sorted.
    pub request: Vec<String>,
    /// Debian architecture → every package of the base, sorted by name.
    pub architectures: BTreeMap<String, Vec<LockedPackage>>,
}

/// One Debian package file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    pub name: String,
    pub version: String,
    /// The package's own: the base's, or `all`.
    pub arch: String,
    /// Of the `.deb` file.
    #[serde(with = "bare_hex")]
    pub sha256: Digest,
    /// Bytes.
    pub size: u64,
    pub archive: ArchiveKind,
    /// Below the archive's address: `pool/…`.
    pub path: String,
}

/// Which of Debian's archives a package file is in. Their addresses come from the
/// machine, so that a lock means the same on machines with different mirrors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveKind {
    /// The suite itself and its `-updates`.
    Debian,
    /// The suite's `-security`.
    Security,
}

pub(crate) mod bare_hex {
    use kiln_model::Digest;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digest.hex())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        Digest::from_hex(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl Lock {
    /// The file's version.
    pub const FORMAT: u32 = 1;

    /// Reads the lock at `path`; a missing file is an empty lock.
    pub fn load(path: &Path) -> Result<Self, LockError> {
        let read = |source| LockError::Read {
            path: path.into(),
            source,
        };
        match std::fs::metadata(path) {
            Ok(meta) if meta.len() > MAX_LOCK_BYTES => {
                return Err(LockError::TooLarge { path: path.into() });
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(read(error)),
        }
        Self::parse(&std::fs::read_to_string(path).map_err(read)?, path)
    }

    /// The lock that `text` says; `path` is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, LockError> {
        let syntax = |source| LockError::Syntax {
            path: path.into(),
            source,
        };
        #[derive(Deserialize)]
        struct Header {
            format: u64,
        }
        let header: Header = serde_json::from_str(text).map_err(syntax)?;
        if header.format != u64::from(Self::FORMAT) {
            return Err(LockError::Format {
                path: path.into(),
                found: header.format,
            });
        }
        serde_json::from_str(text).map_err(syntax)
    }

    /// The file's text. Equal locks give equal text.
    pub fn render(&self) -> Result<String, serde_json::Error> {
        let mut sorted = self.clone();
        for base in sorted.bases.values_mut() {
            base.request.sort();
            base.architectures.values_mut().for_each(|p| p.sort());
        }
        let mut text = String::new();
        print(&serde_json::to_value(&sorted)?, 0, &mut text)?;
        text.push('\n');
        Ok(text)
    }

    /// Replaces the file at `path` in one step; says whether it had to be written.
    pub fn save(&self, path: &Path) -> Result<bool, LockError> {
        let write = |source| LockError::Write {
            path: path.into(),
            source,
        };
        let text = self.render().map_err(|e| write(e.into()))?;
        if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
            return Ok(false);
        }
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let permissions = std::fs::metadata(path).map_or_else(
            |_| std::os::unix::fs::PermissionsExt::from_mode(0o644),
            |meta| meta.permissions(),
        );
        let mut file = tempfile::Builder::new()
            .prefix(".kiln.lock-")
            .permissions(permissions)
            .tempfile_in(folder)
            .map_err(write)?;
        file.write_all(text.as_bytes()).map_err(write)?;
        file.as_file().sync_all().map_err(write)?;
        file.persist(path).map_err(|e| write(e.error))?;
        // What the lock names is there before it; what it does not name goes after it.
        let recordings = self.network.values().flat_map(BTreeMap::values);
        let made = recordings.flat_map(|recording| recording.made.values());
        let wanted = made.map(|made| made.sha256).collect();
        Kept::beside(path).sweep(&wanted).map_err(write)?;
        Ok(true)
    }

    /// Forgets everything that may move, for `kiln lock --update`.
    pub fn update(&mut self) {
        self.bases.clear();
        self.images.clear();
        self.network.clear();
        self.remote = Pins::default();
    }
}

/// JSON with objects spread over lines, except those inside a list (one line each)
/// and lists of plain values (one line).
fn print(value: &Value, depth: usize, out: &mut String) -> Result<(), serde_json::Error> {
    let indent = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (key, value)) in map.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                indent(out, depth + 1);
                out.push_str(&serde_json::to_string(key)?);
                out.push_str(": ");
                print(value, depth + 1, out)?;
            }
            indent(out, depth);
            out.push('}');
        }
        Value::Array(list) if list.iter().any(|v| v.is_object() || v.is_array()) => {
            out.push('[');
            for (i, value) in list.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                indent(out, depth + 1);
                one_line(value, out)?;
            }
            indent(out, depth);
            out.push(']');
        }
        other => one_line(other, out)?,
    }
    Ok(())
}

fn one_line(value: &Value, out: &mut String) -> Result<(), serde_json::Error> {
    let mut separator = "";
    match value {
        Value::Object(map) => {
            out.push('{');
            for (key, value) in map {
                out.push_str(separator);
                separator = ", ";
                out.push_str(&serde_json::to_string(key)?);
                out.push_str(": ");
                one_line(value, out)?;
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for value in list {
                out.push_str(separator);
                separator = ", ";
                one_line(value, out)?;
            }
            out.push(']');
        }
        plain => out.push_str(&serde_json::to_string(plain)?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn package(name: &str) -> LockedPackage {
        LockedPackage {
            name: name.into(),
            version: "1:2.0-1".into(),
            arch: "amd64".into(),
            sha256: Digest::of(name),
            size: 7,
            archive: ArchiveKind::Debian,
            path: format!("pool/main/{name}.deb"),
        }
    }

    fn sample() -> Lock {
        let mut lock = Lock::default();
        lock.bases.insert(
            "web".into(),
            LockedBase {
                suite: "bookworm".into(),
                components: vec!["main".into()],
                essential: true,
                distroless: false,
                request: vec!["nginx-light".into()],
                architectures: [("amd64".into(), vec![package("b"), package("a")])].into(),
            },
        );
        lock.images
            .insert("r.example/x:1".into(), Digest::of("image"));
        lock
    }

    #[test]
    fn one_line_per_pinned_thing_whatever_order_they_came_in() {
        let text = sample().render().unwrap();
        let lines: Vec<&str> = text
            .lines()
            .filter(|l| l.trim().starts_with("{\"name\""))
            .collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("\"a\""), "{text}");
        assert!(text.contains("      \"components\": [\"main\"],"), "{text}");
        let mut other = sample();
        other
            .bases
            .get_mut("web")
            .unwrap()
            .architectures
            .get_mut("amd64")
            .unwrap()
            .reverse();
        assert_eq!(other.render().unwrap(), text);
    }

    #[test]
    fn saved_and_loaded_again_it_is_the_same_and_unchanged_is_not_rewritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kiln.lock");
        assert_eq!(Lock::load(&path).unwrap(), Lock::default());
        assert!(sample().save(&path).unwrap());
        assert!(!sample().save(&path).unwrap());
        let loaded = Lock::load(&path).unwrap();
        assert_eq!(loaded.render().unwrap(), sample().render().unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o644);
    }

    #[test]
    fn later_sections_are_kept_and_later_formats_refused() {
        let path = Path::new("kiln.lock");
        let lock = Lock::parse(r#"{"format": 1, "later": {"a": "b"}}"#, path).unwrap();
        assert!(lock.render().unwrap().contains("\"later\""));
        let error = Lock::parse(r#"{"format": 2}"#, path).unwrap_err();
        assert!(error.to_string().contains("format 2"), "{error}");
        for bad in [
            "",
            "{}",
            "<<<<<<< HEAD",
            r#"{"format":1,"bases":{"x":{"suite":1}}}"#,
            r#"{"format":1,"images":{"x":"sha256:0"}}"#,
        ] {
            assert!(matches!(
                Lock::parse(bad, path),
                Err(LockError::Syntax { .. })
            ));
        }
    }
}
