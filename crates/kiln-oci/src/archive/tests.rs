#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::Write;

use serde_json::json;

use super::*;
use crate::layer::{Entry, EntryKind, LayerWriter};
use crate::manifest::{Descriptor, Index, Manifest, media_type};
use crate::testing::{MemoryBlobs, SampleImage};

const AMD64: &str = "linux/amd64";

/// Members of an archive, by name.
type Members = Vec<(String, Vec<u8>)>;

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// An OCI layout of these images; `name` empty: no annotation.
fn layout(images: &[(&str, &SampleImage)]) -> Members {
    let mut members = vec![(
        "oci-layout".into(),
        br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
    )];
    let mut entries = Vec::new();
    for (name, image) in images {
        for bytes in image.blobs() {
            members.push((blob_name(&Digest::of(&bytes)), bytes));
        }
        let mut entry = image.descriptor();
        if !name.is_empty() {
            let key = "org.opencontainers.image.ref.name";
            entry.annotations.insert(key.into(), (*name).into());
        }
        entries.push(entry);
    }
    members.push(("index.json".into(), Index::new(entries).to_bytes()));
    members
}

/// As `docker save` wrote it until 2023.
fn docker_archive(image: &SampleImage, tags: &[&str]) -> Members {
    let config = format!("{}.json", Digest::of(&image.config).hex());
    let saved = json!([{
        "Config": config, "RepoTags": tags, "Layers": ["aa/layer.tar", "bb/layer.tar"],
    }]);
    vec![
        ("aa/layer.tar".into(), image.tar.clone()),
        (config, image.config.clone()),
        ("manifest.json".into(), saved.to_string().into_bytes()),
    ]
}

fn folder(members: &Members) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in members {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    folder
}

/// A tar, as [`LayerWriter`] compresses it, or uncompressed.
fn tar(members: &Members, links: &[(&str, &str)], compressed: bool) -> tempfile::NamedTempFile {
    let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
    let entry = |path: &str, kind| Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        xattrs: std::collections::BTreeMap::new(),
    };
    for (name, content) in members {
        let size = content.len() as u64;
        let entry = entry(name, EntryKind::File { size });
        writer.entry(&entry, &mut content.as_slice()).unwrap();
    }
    for (name, target) in links {
        let target = target.as_bytes().to_vec();
        let entry = entry(name, EntryKind::Symlink { target });
        writer.entry(&entry, &mut io::empty()).unwrap();
    }
    let mut bytes = writer.finish().unwrap().1;
    if !compressed {
        bytes = zstd::decode_all(&bytes[..]).unwrap();
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn try_import(path: &Path, name: Option<&str>) -> Result<(Digest, MemoryBlobs), ArchiveError> {
    let scratch = tempfile::tempdir().unwrap();
    let blobs = MemoryBlobs::new();
    let import = Import {
        path,
        name,
        platform: &AMD64.parse().unwrap(),
        scratch: scratch.path(),
    };
    let digest = super::import(&import, &blobs)?;
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    Ok((digest, blobs))
}

fn expect_error(path: &Path, name: Option<&str>, causes: &[&str]) {
    let text = match try_import(path, name) {
        Ok((digest, _)) => panic!("{digest} was taken; expected {causes:?}"),
        Err(error) => error.to_string(),
    };
    for cause in causes.iter().chain([&path.to_str().unwrap()]) {
        assert!(text.contains(cause), "`{text}` does not say `{cause}`");
    }
}

fn assert_whole(blobs: &MemoryBlobs, image: &SampleImage) {
    for bytes in image.blobs() {
        let digest = Digest::of(&bytes);
        assert!(blobs.get(&digest).is_some(), "{digest} is missing");
    }
}

#[test]
fn a_layout_is_taken_whole_from_a_folder_and_from_tars() {
    let image = SampleImage::new(AMD64, "hello");
    let members = layout(&[("", &image)]);
    let folder = folder(&members);
    let plain = tar(&members, &[], false);
    let compressed = tar(&members, &[], true);
    for path in [folder.path(), plain.path(), compressed.path()] {
        let (digest, blobs) = try_import(path, None).unwrap();
        assert_eq!(digest, image.digest());
        assert_whole(&blobs, &image);
    }
}

#[test]
fn images_are_chosen_by_name_and_platform() {
    let one = SampleImage::new(AMD64, "one");
    let two = SampleImage::new(AMD64, "two");
    let arm = SampleImage::new("linux/arm64", "one");

    let named = folder(&layout(&[
        ("one", &one),
        ("docker.io/library/two:latest", &two),
    ]));
    assert_eq!(
        try_import(named.path(), Some("one")).unwrap().0,
        one.digest()
    );
    assert_eq!(
        try_import(named.path(), Some("two")).unwrap().0,
        two.digest()
    );
    expect_error(
        named.path(),
        None,
        &["several", "one, docker.io/library/two:latest"],
    );
    expect_error(
        named.path(),
        Some("three"),
        &["no image `three`", "one, docker"],
    );

    let platforms = folder(&layout(&[("", &arm), ("", &one)]));
    assert_eq!(try_import(platforms.path(), None).unwrap().0, one.digest());
    let foreign = folder(&layout(&[("", &arm), ("", &arm)]));
    expect_error(
        foreign.path(),
        None,
        &["no image for linux/amd64", "linux/arm64"],
    );
    let lonely = folder(&layout(&[("", &arm)]));
    expect_error(lonely.path(), None, &["linux/arm64", "linux/amd64"]);

    // An index inside the index, as buildx writes it.
    let mut members = layout(&[("", &arm), ("", &one)]);
    let inner = members.pop().unwrap().1;
    let entry = Descriptor::new(
        media_type::OCI_INDEX,
        Digest::of(&inner),
        inner.len() as u64,
    );
    members.push((blob_name(&entry.digest), inner));
    members.push(("index.json".into(), Index::new(vec![entry]).to_bytes()));
    assert_eq!(
        try_import(folder(&members).path(), None).unwrap().0,
        one.digest()
    );
}

#[test]
fn a_layout_that_is_not_whole_or_not_true_is_refused() {
    let image = SampleImage::new(AMD64, "hello");
    let members = layout(&[("", &image)]);
    for (at, (name, content)) in members.iter().enumerate().skip(1) {
        let hex = name.rsplit('/').next().unwrap();
        let without: Members = members.iter().filter(|m| m.0 != *name).cloned().collect();
        let causes: &[&str] = match name.as_str() {
            "index.json" => &["neither"],
            _ => &[hex, "missing"],
        };
        expect_error(folder(&without).path(), None, causes);
        if name == "index.json" {
            continue;
        }
        let mut damaged = members.clone();
        damaged[at].1[content.len() / 2] ^= 1;
        let found = Digest::of(&damaged[at].1).to_string();
        expect_error(folder(&damaged).path(), None, &[hex, &found]);
        let mut short = members.clone();
        short[at].1.pop();
        expect_error(folder(&short).path(), None, &[hex, "bytes"]);
        let mut long = members.clone();
        long[at].1.push(0);
        expect_error(folder(&long).path(), None, &[hex, "bytes"]);
    }
    let mut future = members.clone();
    future[0].1 = br#"{"imageLayoutVersion":"2.0.0"}"#.to_vec();
    expect_error(folder(&future).path(), None, &["2.0.0"]);
    let mut broken = members;
    broken.last_mut().unwrap().1 = b"{".to_vec();
    expect_error(folder(&broken).path(), None, &["index.json"]);
}

#[test]
fn indexes_that_lie_in_one_another_end() {
    let mut members = layout(&[]);
    let mut inner = Index::new(vec![]).to_bytes();
    for _ in 0..10 {
        let digest = Digest::of(&inner);
        let mut entry = Descriptor::new(media_type::OCI_INDEX, digest, inner.len() as u64);
        entry.platform = Some(AMD64.parse().unwrap());
        members.push((blob_name(&digest), inner));
        inner = Index::new(vec![entry]).to_bytes();
    }
    members.retain(|m| m.0 != "index.json");
    members.push(("index.json".into(), inner));
    expect_error(folder(&members).path(), None, &["too deep"]);
}

#[test]
fn a_docker_archive_gets_the_same_manifest_each_time() {
    let image = SampleImage::new(AMD64, "saved");
    let mut members = docker_archive(&image, &["shop/web:1", "nginx:latest"]);
    // Both layers of the sample are the same; old archives then link the second.
    let links = [("bb/layer.tar", "../aa/layer.tar")];
    let linked = tar(&members, &links, false);
    members.push(("bb/layer.tar".into(), image.tar.clone()));
    let twice = tar(&members, &[], true);
    let mut digests = Vec::new();
    for (path, name) in [
        (linked.path(), None),
        (linked.path(), Some("nginx")),
        (twice.path(), Some("docker.io/shop/web:1")),
    ] {
        let (digest, blobs) = try_import(path, name).unwrap();
        let manifest: Manifest = serde_json::from_slice(&blobs.get(&digest).unwrap()).unwrap();
        assert_eq!(manifest.config.digest, Digest::of(&image.config));
        assert_eq!(manifest.layers[0].digest, Digest::of(&image.tar));
        assert_eq!(manifest.layers[1].media_type, media_type::OCI_LAYER);
        assert!(blobs.get(&manifest.layers[1].digest).is_some());
        digests.push(digest);
    }
    assert!(digests.iter().all(|d| *d == digests[0]));
    expect_error(
        linked.path(),
        Some("nginx:2"),
        &["no image `nginx:2`", "shop/web:1"],
    );

    members[0].1[0] ^= 1;
    expect_error(
        tar(&members, &[], false).path(),
        None,
        &["aa/layer.tar", "expected sha256"],
    );
}

#[test]
fn a_hostile_archive_reads_nothing_outside_and_ends() {
    let image = SampleImage::new(AMD64, "saved");
    let members = docker_archive(&image, &[]);
    let circle = tar(&members, &[("bb/layer.tar", "../bb/layer.tar")], false);
    expect_error(circle.path(), None, &["circle"]);
    let out = tar(
        &members,
        &[("bb/layer.tar", "../../../etc/hostname")],
        false,
    );
    expect_error(out.path(), None, &["bb/layer.tar", "missing"]);
    let absolute = tar(&members, &[("bb/layer.tar", "/etc/hostname")], false);
    expect_error(absolute.path(), None, &["bb/layer.tar", "missing"]);

    let outside = tempfile::NamedTempFile::new().unwrap();
    for config in [
        outside.path().to_str().unwrap().to_owned(),
        format!(
            "../{}",
            outside.path().file_name().unwrap().to_str().unwrap()
        ),
    ] {
        let saved = json!([{"Config": config, "Layers": []}]);
        let folder = folder(&vec![(
            "manifest.json".into(),
            saved.to_string().into_bytes(),
        )]);
        expect_error(folder.path(), None, &["leads out"]);
    }
}

#[test]
fn what_is_no_image_is_said_to_be_none() {
    let missing = Path::new("/nonexistent/image.tar");
    expect_error(missing, None, &["could not be read"]);
    let empty = tempfile::tempdir().unwrap();
    expect_error(empty.path(), None, &["docker export"]);
    let rootfs = tar(&vec![("etc/hostname".into(), vec![])], &[], false);
    expect_error(rootfs.path(), None, &["docker export"]);
    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(&[b'x'; 5000]).unwrap();
    expect_error(text.path(), None, &["tar"]);
    let mut cut = tempfile::NamedTempFile::new().unwrap();
    let whole = tar(&layout(&[("", &SampleImage::new(AMD64, "x"))]), &[], true);
    let bytes = fs::read(whole.path()).unwrap();
    cut.write_all(&bytes[..bytes.len() / 2]).unwrap();
    expect_error(cut.path(), None, &["unpacked"]);
    expect_error(
        Path::new("/dev/null"),
        None,
        &["neither a file nor a folder"],
    );
    let none = folder(&vec![("manifest.json".into(), b"[]".to_vec())]);
    expect_error(none.path(), None, &["lists no image"]);
}
