//! # Format, version 1
//! An OCI image manifest whose `artifactType` and configuration's media type are
//! [`MEDIA_TYPE`]. Its layers are the layers of all results, each once, by digest. The
//! configuration is JSON:
//! ```text
//! {"format":3,"steps":{"sha256:<key>":{"layers":[{"digest","size","diff_id"}…],
//!   "findings":[{"place","kind","made_anew"}…],"took":milliseconds}…}}
//! ```
//! A result's layers are in their order; none: the instruction changed nothing.

use std::collections::BTreeMap;

use kiln_model::Digest;
use kiln_oci::manifest::{Descriptor, MAX_LAYERS, Manifest, media_type};
use serde::{Deserialize, Serialize};

use crate::exec::state::Made;

pub(super) const MEDIA_TYPE: &str = "application/vnd.kiln.build-cache.v1+json";
/// Longest configuration, in bytes: some ten thousand results.
pub(super) const MAX_BYTES: u64 = 8 << 20;
/// As in [`crate::exec::state`], another one also where other secrets are looked for.
const FORMAT: u32 = 3;

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    steps: BTreeMap<Digest, Made>,
}

/// Why a cache can't be understood.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error("it can't be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has format {0}, which this kiln does not know")]
    Format(u32),
}

pub(super) fn write(steps: BTreeMap<Digest, Made>) -> Result<Vec<u8>, DocumentError> {
    let format = FORMAT;
    Ok(serde_json::to_vec(&Document { format, steps })?)
}

pub(super) fn read(bytes: &[u8]) -> Result<BTreeMap<Digest, Made>, DocumentError> {
    let document: Document = serde_json::from_slice(bytes)?;
    match document.format {
        FORMAT => Ok(document.steps),
        other => Err(DocumentError::Format(other)),
    }
}

pub(super) fn manifest(config: &[u8], layers: Vec<Descriptor>) -> Manifest {
    let (digest, size) = (Digest::of(config), config.len() as u64);
    let mut manifest = Manifest::new(Descriptor::new(MEDIA_TYPE, digest, size), layers);
    manifest.artifact_type = Some(MEDIA_TYPE.into());
    manifest
}

/// Every layer once, in the order of the keys. Results beyond what a manifest holds are
/// taken out of `steps`, those that took the least time first.
pub(super) fn layers(steps: &mut BTreeMap<Digest, Made>) -> Vec<Descriptor> {
    let mut dearest: Vec<(Digest, Made)> = std::mem::take(steps).into_iter().collect();
    dearest.sort_by_key(|(key, made)| (std::cmp::Reverse(made.took), *key));
    let mut layers: BTreeMap<Digest, Descriptor> = BTreeMap::new();
    for (key, made) in dearest {
        let new = made
            .layers
            .iter()
            .filter(|l| !layers.contains_key(&l.digest));
        if layers.len() + new.count() > MAX_LAYERS {
            continue;
        }
        for layer in &made.layers {
            let descriptor = Descriptor::new(media_type::OCI_LAYER_ZSTD, layer.digest, layer.size);
            layers.insert(layer.digest, descriptor);
        }
        steps.insert(key, made);
    }
    layers.into_values().collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kiln_model::Millis;

    use super::*;
    use crate::exec::layer::LayerRef;

    fn made(took: u64, names: &[&str]) -> Made {
        let layer = |name: &&str| LayerRef {
            digest: Digest::of(name),
            size: name.len() as u64,
            diff_id: Digest::of(format!("{name} tar")),
        };
        Made {
            layers: names.iter().map(layer).collect(),
            findings: Vec::new(),
            took: Millis(took),
        }
    }

    #[test]
    fn a_document_is_read_as_it_was_written_and_other_formats_are_refused() {
        let steps = BTreeMap::from([(Digest::of("a"), made(7, &["x", "y"]))]);
        let text = write(steps).unwrap();
        let read_again = read(&text).unwrap();
        assert_eq!(read_again[&Digest::of("a")].layers.len(), 2);
        let text = String::from_utf8(text).unwrap();
        let newer = text.replace(&format!("\"format\":{FORMAT}"), "\"format\":99");
        let error = read(newer.as_bytes()).err().unwrap();
        assert_eq!(
            error.to_string(),
            "it has format 99, which this kiln does not know"
        );
    }

    #[test]
    fn what_took_longest_is_exported_where_a_manifest_has_no_room_for_all() {
        let names: Vec<String> = (0..=MAX_LAYERS).map(|n| n.to_string()).collect();
        let mut steps = BTreeMap::new();
        for (took, name) in names.iter().enumerate() {
            steps.insert(
                Digest::of(format!("key {name}")),
                made(took as u64, &[name]),
            );
        }
        // The same layer again takes no room.
        steps.insert(Digest::of("twin"), made(0, &[names[MAX_LAYERS].as_str()]));
        assert_eq!(layers(&mut steps).len(), MAX_LAYERS);
        assert_eq!(steps.len(), MAX_LAYERS + 1);
        assert!(!steps.contains_key(&Digest::of("key 0")));
        assert!(steps.contains_key(&Digest::of("twin")));
    }
}
