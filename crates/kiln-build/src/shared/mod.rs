//! Results of instructions in a registry or a folder, where other machines take them from:
//! `cache_from` and `cache_to` of a build, `--cache-from` and `--cache-to`.
//!
//! What is exported is what a build has used or made, also in stages that are not in the
//! image: an [artifact](document) with the key of each instruction and its layers. Who
//! imports it looks there for what its own cache lacks, and takes what it needs and no more.
//!
//! Invariants: a layer that is taken has the digest, the size and the uncompressed digest
//! that the cache says, or it is not taken; a cache that is missing, damaged or of another
//! kind is told, and the build goes on without it; a result in which a secret was found is
//! not exported.
//!
//! What can't be checked is whether a result is what its instruction makes: **whoever may
//! write to a cache decides what is built from it.** Every instruction that is taken from one
//! is told.

mod document;
mod export;
mod import;
mod place;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use kiln_oci::reference::ReferenceError;

use crate::exec::state::Made;
pub use export::{ExportError, Exported};
pub use import::Import;
pub use place::{Place, PutError, TakeError, rooted};

/// Why an entry of `cache_from` or `cache_to` can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error(
        "`{text}`: the type {kind} is not supported; use type=registry,ref=… or type=local,{folder}=…"
    )]
    Type {
        text: String,
        kind: String,
        folder: &'static str,
    },
    #[error("`{text}`: {key}={value} is not supported")]
    Option {
        text: String,
        key: String,
        value: String,
    },
    #[error("`{text}`: {key}=… is missing")]
    Missing { text: String, key: &'static str },
    #[error("`{text}`: `{part}` is not key=value")]
    Part { text: String, part: String },
    #[error("`{text}`: {source}")]
    Reference {
        text: String,
        source: ReferenceError,
    },
}

/// Where a build's results are exported to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub place: Place,
    /// `mode=min`: only what the image's own layers came of.
    pub least: bool,
    /// `ignore-error=true`: a failed export fails nothing.
    pub forgiving: bool,
}

/// Reads an entry of `cache_from`: a reference, `type=registry,ref=…` or `type=local,src=…`.
pub fn source(text: &str) -> Result<Place, PlaceError> {
    let (place, options) = read(text, "src")?;
    match options.into_iter().next() {
        None => Ok(place),
        Some((key, value)) => Err(refused(text, key, value)),
    }
}

/// Reads an entry of `cache_to`: the same (`type=local,dest=…`), with BuildKit's options as far
/// as they say what kiln does.
pub fn target(text: &str) -> Result<Target, PlaceError> {
    let (place, options) = read(text, "dest")?;
    let mut target = Target {
        place,
        least: false,
        forgiving: false,
    };
    for (key, value) in options {
        match (key.as_str(), value.as_str()) {
            ("mode", "max" | "min") => target.least = value == "min",
            ("ignore-error", "true" | "false") => target.forgiving = value == "true",
            // Both are what it is anyway.
            ("oci-mediatypes" | "image-manifest", "true") => {}
            _ => return Err(refused(text, key, value)),
        }
    }
    Ok(target)
}

fn refused(text: &str, key: String, value: String) -> PlaceError {
    PlaceError::Option {
        text: text.to_owned(),
        key,
        value,
    }
}

/// The type that an entry states.
fn kind(text: &str) -> Option<&str> {
    let mut parts = text.split(',').filter_map(|part| part.split_once('='));
    parts.find_map(|(key, value)| (key.trim() == "type").then_some(value.trim()))
}

/// The place, and what else there is. `folder` is the option that names a folder.
fn read(text: &str, folder: &'static str) -> Result<(Place, BTreeMap<String, String>), PlaceError> {
    let owned = || text.to_owned();
    let registry = |name: &str| {
        Place::registry(name).map_err(|source| PlaceError::Reference {
            text: owned(),
            source,
        })
    };
    if !text.contains(['=', ',']) {
        return Ok((registry(text.trim())?, BTreeMap::new()));
    }
    let mut options = BTreeMap::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| PlaceError::Part {
            text: owned(),
            part: part.to_owned(),
        })?;
        options.insert(key.trim().to_owned(), value.trim().to_owned());
    }
    let kind = options.remove("type").unwrap_or_default();
    let mut stated = |key: &'static str| {
        let value = options.remove(key).filter(|value| !value.is_empty());
        value.ok_or_else(|| PlaceError::Missing { text: owned(), key })
    };
    let place = match kind.as_str() {
        "registry" => registry(&stated("ref")?)?,
        "local" => {
            let path = stated(folder)?;
            Place::folder(&path, stated("tag").ok())
        }
        _ => {
            return Err(PlaceError::Type {
                text: owned(),
                kind,
                folder,
            });
        }
    };
    Ok((place, options))
}

/// What a build has used or made; learns.
#[derive(Debug, Default)]
pub struct Results(Mutex<Learned>);

#[derive(Debug, Default)]
struct Learned {
    steps: BTreeMap<Digest, Made>,
    /// The image's layers.
    image: Vec<Digest>,
}

impl Results {
    pub(crate) fn add(&self, key: Digest, made: &Made) {
        let mut learned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        learned.steps.insert(key, made.clone());
    }

    pub(crate) fn image(&self, layers: impl Iterator<Item = Digest>) {
        let mut learned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        learned.image.extend(layers);
    }

    fn steps(&self, least: bool) -> BTreeMap<Digest, Made> {
        let learned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut steps = learned.steps.clone();
        if least {
            let image = |layer: &Digest| learned.image.contains(layer);
            steps.retain(|_, made| made.layers.iter().all(|layer| image(&layer.digest)));
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn places_are_read_as_buildkit_writes_them_and_others_are_refused_by_name() {
        let said = |text: &str| target(text).map(|t| (t.place.to_string(), t.least));
        let full = "reg.example:5000/a/b:c".to_owned();
        assert_eq!(said("reg.example:5000/a/b:c"), Ok((full.clone(), false)));
        for (mode, least) in [("", false), (",mode=max", false), (",mode=min", true)] {
            let text = format!("type=registry,ref=reg.example:5000/a/b:c{mode}");
            assert_eq!(said(&text), Ok((full.clone(), least)));
            let text = format!("type=local,dest=/x/y{mode}");
            assert_eq!(said(&text), Ok(("/x/y".to_owned(), least)));
        }
        let forgiving = target("type=registry,ref=a/b,ignore-error=true").unwrap();
        assert!(forgiving.forgiving);
        assert_eq!(forgiving.place.to_string(), "a/b:latest");
        let folder = Place::Folder {
            path: "x".into(),
            tag: "main".into(),
        };
        assert_eq!(source("type=local, src=x, tag=main"), Ok(folder.clone()));
        assert_eq!(target("type=local,dest=x,tag=main").unwrap().place, folder);
        for (text, why) in [
            ("type=gha", "the type gha is not supported"),
            ("type=inline", "the type inline is not supported"),
            ("type=s3,region=x", "the type s3 is not supported"),
            ("type=azblob,name=x", "the type azblob is not supported"),
            ("type=local", "dest=… is missing"),
            ("type=local,src=x", "dest=… is missing"),
            ("type=local,dest=", "dest=… is missing"),
            (
                "type=local,dest=x,compression=gzip",
                "compression=gzip is not",
            ),
            ("type=local,dest=x,ref=a/b", "ref=a/b is not supported"),
            ("ref=a/b", "the type  is not supported"),
            ("type=registry", "ref=… is missing"),
            ("type=registry,ref=a/b,tag=x", "tag=x is not supported"),
            (
                "type=registry,ref=a/b,compression=gzip",
                "compression=gzip is not supported",
            ),
            ("type=registry,a", "`a` is not key=value"),
            ("A B", "is not an image reference"),
        ] {
            let error = target(text).unwrap_err().to_string();
            assert!(
                error.contains(why) && error.starts_with(&format!("`{text}`: ")),
                "{error}"
            );
        }
        assert!(source("type=registry,ref=a/b,mode=max").is_err());
        assert!(source("type=local,dest=x").is_err());
    }

    #[test]
    fn a_folders_path_is_counted_from_where_it_was_written() {
        let base = std::path::Path::new("/p");
        for (entry, meant) in [
            (
                "type=local,dest=../c,mode=max",
                "type=local,dest=/p/../c,mode=max",
            ),
            ("src=c,type=local", "src=/p/c,type=local"),
            ("type=local,src=/c", "type=local,src=/c"),
            ("type=local", "type=local"),
            ("type=registry,ref=c,src=d", "type=registry,ref=c,src=d"),
            ("a/b:c", "a/b:c"),
        ] {
            assert_eq!(rooted(entry, base), meant);
        }
    }
}
