//! An OCI image layout.

use kiln_model::Digest;
use serde::Deserialize;

use super::{ArchiveError, Importer, Opened, same_name};
use crate::blob::{BlobWrite, Expected};
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
    let index = index(&importer.opened)?;
    let mut descriptor = choose(importer, &index)?.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        let member = blob_member(&descriptor.digest);
        let bytes = read_blob(&importer.opened, &descriptor, MAX_MANIFEST_BYTES)?;
        let document = manifest::parse(&bytes, Some(&descriptor.media_type))
            .map_err(|source| importer.opened.manifest_error(&member, source))?;
        match document {
            Document::Manifest(manifest) => {
                take_image(importer, &manifest)?;
                let expected = Some(expected(&descriptor));
                let content = &mut bytes.as_slice();
                let opened = &importer.opened;
                opened.write((&member, content), expected, importer.blobs)?;
                return Ok(descriptor.digest);
            }
            Document::Index(index) => {
                descriptor = for_platform(importer, &index)?.clone();
            }
        }
    }
    Err(importer
        .opened
        .unusable("index.json", "its indexes lie too deep in one another"))
}

/// What the layout lists, if it is of a version that is known.
pub(super) fn index(opened: &Opened<'_>) -> Result<Index, ArchiveError> {
    check_version(opened)?;
    let bytes = opened.read_small("index.json", MAX_MANIFEST_BYTES)?;
    let document = manifest::parse(&bytes, None)
        .map_err(|source| opened.manifest_error("index.json", source))?;
    match document {
        Document::Index(index) => Ok(index),
        Document::Manifest(_) => {
            Err(opened.unusable("index.json", "it is a manifest, not an index"))
        }
    }
}

fn check_version(opened: &Opened<'_>) -> Result<(), ArchiveError> {
    let bytes = opened.read_small("oci-layout", 4096)?;
    let version: LayoutVersion =
        serde_json::from_slice(&bytes).map_err(|e| opened.unusable("oci-layout", e))?;
    match version.image_layout_version.as_str() {
        "1.0.0" => Ok(()),
        other => {
            let problem = format!("layout version `{other}` is not supported, only 1.0.0 is");
            Err(opened.unusable("oci-layout", problem))
        }
    }
}

/// The entry that was asked for: by name if one was given, then by platform.
fn choose<'i>(importer: &Importer<'_>, index: &'i Index) -> Result<&'i Descriptor, ArchiveError> {
    let wanted = importer.what.name;
    let fits = |entry: &&Descriptor| wanted.is_none_or(|name| is_named(entry, name));
    let entries: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
    let names = || names(index);
    match (entries.as_slice(), wanted) {
        ([], Some(name)) => Err(importer.opened.no_such_name(name, &names())),
        ([], None) => Err(importer.opened.unusable("index.json", "it lists no image")),
        ([only], _) => Ok(only),
        (several, _) if several.iter().all(|e| e.platform.is_some()) => {
            let best: Vec<_> = best_entries(importer, several);
            match best.as_slice() {
                [] => for_platform(importer, index),
                [only] => Ok(only),
                [first, rest @ ..] if rest.iter().all(|e| e.digest == first.digest) => Ok(first),
                _ => Err(importer.opened.ambiguous(&names())),
            }
        }
        ([first, rest @ ..], _) if rest.iter().all(|e| e.digest == first.digest) => Ok(first),
        _ => Err(importer.opened.ambiguous(&names())),
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
            path: importer.what.path.into(),
            wanted: platform.to_string(),
            found: index.platforms(),
        })
}

pub(super) fn is_named(entry: &Descriptor, name: &str) -> bool {
    let named = NAME_ANNOTATIONS.iter();
    let mut named = named.filter_map(|key| entry.annotations.get(*key));
    named.any(|found| same_name(found, name))
}

pub(super) fn names(index: &Index) -> Vec<String> {
    let name = |entry: &Descriptor| {
        let mut keys = NAME_ANNOTATIONS.iter();
        keys.find_map(|key| entry.annotations.get(*key)).cloned()
    };
    index.manifests.iter().filter_map(name).collect()
}

fn take_image(importer: &Importer<'_>, manifest: &Manifest) -> Result<(), ArchiveError> {
    let config = read_blob(&importer.opened, &manifest.config, MAX_CONFIG_BYTES)?;
    check_image(manifest, &config, importer.what.platform)
        .map_err(|source| importer.image_error(source))?;
    for descriptor in manifest.layers.iter().chain([&manifest.config]) {
        take_blob(&importer.opened, descriptor, importer.blobs)?;
    }
    Ok(())
}

pub(super) fn take_blob(
    opened: &Opened<'_>,
    descriptor: &Descriptor,
    blobs: &dyn BlobWrite,
) -> Result<(), ArchiveError> {
    let member = blob_member(&descriptor.digest);
    let (mut content, _) = opened.open(&member)?;
    opened.write((&member, &mut content), Some(expected(descriptor)), blobs)?;
    Ok(())
}

fn expected(descriptor: &Descriptor) -> Expected {
    Expected {
        digest: descriptor.digest,
        size: descriptor.size,
    }
}

/// A small blob, its digest and size verified.
pub(super) fn read_blob(
    opened: &Opened<'_>,
    descriptor: &Descriptor,
    limit: u64,
) -> Result<Vec<u8>, ArchiveError> {
    let member = blob_member(&descriptor.digest);
    let bytes = opened.read_small(&member, limit)?;
    let found = Digest::of(&bytes);
    if found != descriptor.digest || bytes.len() as u64 != descriptor.size {
        let problem = format!(
            "it should have digest {} and {} bytes, but has {found} and {} bytes",
            descriptor.digest,
            descriptor.size,
            bytes.len()
        );
        return Err(opened.unusable(&member, problem));
    }
    Ok(bytes)
}

pub(super) fn blob_member(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
