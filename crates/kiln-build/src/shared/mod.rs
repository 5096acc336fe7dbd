//! Results of instructions in a registry, where other machines take them from: `cache_from`
//! and `cache_to` of a build, `--cache-from` and `--cache-to`.
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

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use kiln_oci::Reference;
use kiln_oci::reference::ReferenceError;

use crate::exec::state::Made;
pub use export::{ExportError, Exported};
pub use import::Import;

/// Why an entry of `cache_from` or `cache_to` can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error("`{text}`: the type {kind} is not supported; use type=registry,ref=…")]
    Type { text: String, kind: String },
    #[error("`{text}`: {key}={value} is not supported")]
    Option {
        text: String,
        key: String,
        value: String,
    },
    #[error("`{text}`: ref=… is missing")]
    NoReference { text: String },
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
    pub reference: Reference,
    /// `mode=min`: only what the image's own layers came of.
    pub least: bool,
    /// `ignore-error=true`: a failed export fails nothing.
    pub forgiving: bool,
}

/// Reads an entry of `cache_from`: a reference, or `type=registry,ref=…`.
pub fn source(text: &str) -> Result<Reference, PlaceError> {
    let (reference, options) = read(text)?;
    match options.into_iter().next() {
        None => Ok(reference),
        Some((key, value)) => Err(refused(text, key, value)),
    }
}

/// Reads an entry of `cache_to`: the same, with BuildKit's options as far as they say what
/// kiln does.
pub fn target(text: &str) -> Result<Target, PlaceError> {
    let (reference, options) = read(text)?;
    let mut target = Target {
        reference,
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

/// The reference, and what else there is.
fn read(text: &str) -> Result<(Reference, BTreeMap<String, String>), PlaceError> {
    let text_of = || text.to_owned();
    let mut options = BTreeMap::new();
    let name = if text.contains(['=', ',']) {
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| PlaceError::Part {
                text: text_of(),
                part: part.to_owned(),
            })?;
            options.insert(key.trim().to_owned(), value.trim().to_owned());
        }
        let kind = options.remove("type").unwrap_or_default();
        if kind != "registry" {
            return Err(PlaceError::Type {
                text: text_of(),
                kind,
            });
        }
        let name = options.remove("ref");
        name.ok_or_else(|| PlaceError::NoReference { text: text_of() })?
    } else {
        text.trim().to_owned()
    };
    let reference = name
        .parse::<Reference>()
        .map_err(|source| PlaceError::Reference {
            text: text_of(),
            source,
        })?;
    Ok((reference.with_default_tag(), options))
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
        let said = |text: &str| target(text).map(|t| (t.reference.to_string(), t.least));
        let full = "reg.example:5000/a/b:c".to_owned();
        assert_eq!(said("reg.example:5000/a/b:c"), Ok((full.clone(), false)));
        for (mode, least) in [("", false), (",mode=max", false), (",mode=min", true)] {
            let text = format!("type=registry,ref=reg.example:5000/a/b:c{mode}");
            assert_eq!(said(&text), Ok((full.clone(), least)));
        }
        let forgiving = target("type=registry,ref=a/b,ignore-error=true").unwrap();
        assert!(forgiving.forgiving);
        assert_eq!(forgiving.reference.to_string(), "docker.io/a/b:latest");
        for (text, why) in [
            ("type=gha", "the type gha is not supported"),
            ("type=local,dest=x", "the type local is not supported"),
            ("ref=a/b", "the type  is not supported"),
            ("type=registry", "ref=… is missing"),
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
    }
}
