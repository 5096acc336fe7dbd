//! An OCI image layout.

use kiln_model::Digest;
use serde::Deserialize;

use super::{ArchiveError, Importer, same_name};
use crate::blob::Expected;
use crate::manifest::{
    self, Descriptor, Document, Index, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest, check_image,
};

/// Most indexes inside one another.
const MAX_INDEX_DEPTH: usize = 4;
/// How layouts name their images (annotations.md); containerd has its own way.
pub(super) const NAME_ANNOTATIONS: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutVersion {
    image_layout_version: String,
}

pub(super) fn import(importer: &Importer<'_>) -> Result<Digest, ArchiveError> {
    check_version(importer)?;
    let bytes = importer.read_small("index.json", MAX_MANIFEST_BYTES)?;
    let document = manifest::parse(&bytes, None)
        .map_err(|source| importer.manifest_error("index.json", source))?;
    let Document::Index(index) = document else {
        return Err(importer.unusable("index.json", "it is a manifest, not an index"));
    };
    let mut descriptor = choose(importer, &index)?.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        let member = blob_member(&descriptor.digest);
        let bytes = read_blob(importer, &descriptor, MAX_MANIFEST_BYTES)?;
        let document = manifest::parse(&bytes, Some(&descriptor.media_type))
            .map_err(|source| importer.manifest_error(&member, source))?;
        match document {
            Document::Manifest(manifest) => {
                take_image(importer, &manifest)?;
                let expected = Some(Expected {
                    digest: descriptor.digest,
                    size: descriptor.size,
                });
                importer.write(&member, expected, &mut bytes.as_slice())?;
                return Ok(descriptor.digest);
            }
            Document::Index(index) => {
                descriptor = for_platform(importer, &index)?.clone();
            }
        }
    }
    Err(importer.unusable("index.json", "its indexes lie too deep in one another"))
}

fn check_version(importer: &Importer<'_>) -> Result<(), ArchiveError> {
    let bytes = importer.read_small("oci-layout", 4096)?;
    let version: LayoutVersion =
        serde_json::from_slice(&bytes).map_err(|e| importer.unusable("oci-layout", e))?;
    match version.image_layout_version.as_str() {
        "1.0.0" => Ok(()),
        other => {
            let problem = format!("layout version `{other}` is not supported, only 1.0.0 is");
            Err(importer.unusable("oci-layout", problem))
        }
    }
}

/// The entry that was asked for: by name if one was given, then by platform.
fn choose<'i>(importer: &Importer<'_>, index: &'i Index) -> Result<&'i Descriptor, ArchiveError> {
    let wanted = importer.what.name;
    let fits = |entry: &&Descriptor| {
        wanted.is_none_or(|name| {
            NAME_ANNOTATIONS
                .iter()
                .filter_map(|key| entry.annotations.get(*key))
                .any(|found| same_name(found, name))
        })
    };
    let entries: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
    let names = || names(index);
    match (entries.as_slice(), wanted) {
        ([], Some(name)) => Err(importer.no_such_name(name, &names())),
        ([], None) => Err(importer.unusable("index.json", "it lists no image")),
        ([only], _) => Ok(only),
        (several, _) if several.iter().all(|e| e.platform.is_some()) => {
            let best: Vec<_> = best_entries(importer, several);
            match best.as_slice() {
                [] => for_platform(importer, index),
                [only] => Ok(only),
                [first, rest @ ..] if rest.iter().all(|e| e.digest == first.digest) => Ok(first),
                _ => Err(importer.ambiguous(&names())),
            }
        }
        ([first, rest @ ..], _) if rest.iter().all(|e| e.digest == first.digest) => Ok(first),
        _ => Err(importer.ambiguous(&names())),
    }
}

fn best_entries<'i>(importer: &Importer<'_>, entries: &[&'i Descriptor]) -> Vec<&'i Descriptor> {
    let fitness = |entry: &Descriptor| {
        let platform = entry.platform.as_ref();
        platform.and_then(|p| p.fitness(importer.what.platform))
    };
    let best = entries.iter().filter_map(|e| fitness(e)).max();
    let among = entries.iter().copied();
    among
        .filter(|e| best.is_some() && fitness(e) == best)
        .collect()
}

fn for_platform<'i>(
    importer: &Importer<'_>,
    index: &'i Index,
) -> Result<&'i Descriptor, ArchiveError> {
    let platform = importer.what.platform;
    index
        .select(platform)
        .ok_or_else(|| ArchiveError::NoPlatform {
            path: importer.path(),
            wanted: platform.to_string(),
            found: index.platforms(),
        })
}

fn names(index: &Index) -> Vec<String> {
    let name = |entry: &Descriptor| {
        let mut keys = NAME_ANNOTATIONS.iter();
        keys.find_map(|key| entry.annotations.get(*key)).cloned()
    };
    index.manifests.iter().filter_map(name).collect()
}

fn take_image(importer: &Importer<'_>, manifest: &Manifest) -> Result<(), ArchiveError> {
    let config = read_blob(importer, &manifest.config, MAX_CONFIG_BYTES)?;
    check_image(manifest, &config, importer.what.platform)
        .map_err(|source| importer.image_error(source))?;
    for descriptor in manifest.layers.iter().chain([&manifest.config]) {
        take_blob(importer, descriptor)?;
    }
    Ok(())
}

fn take_blob(importer: &Importer<'_>, descriptor: &Descriptor) -> Result<(), ArchiveError> {
    let member = blob_member(&descriptor.digest);
    let expected = Expected {
        digest: descriptor.digest,
        size: descriptor.size,
    };
    let (mut content, _) = importer.open(&member)?;
    importer.write(&member, Some(expected), &mut content)?;
    Ok(())
}

/// A small blob, its digest and size verified.
fn read_blob(
    importer: &Importer<'_>,
    descriptor: &Descriptor,
    limit: u64,
) -> Result<Vec<u8>, ArchiveError> {
    let member = blob_member(&descriptor.digest);
    let bytes = importer.read_small(&member, limit)?;
    let found = Digest::of(&bytes);
    if found != descriptor.digest || bytes.len() as u64 != descriptor.size {
        let problem = format!(
            "it should have digest {} and {} bytes, but has {found} and {} bytes",
            descriptor.digest,
            descriptor.size,
            bytes.len()
        );
        return Err(importer.unusable(&member, problem));
    }
    Ok(bytes)
}

pub(super) fn blob_member(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
