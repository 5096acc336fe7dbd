//! Images, references, collection and checking, over real files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;

use kiln_model::{Digest, ImageConfig};
use kiln_oci::BlobRead;
use kiln_oci::layer::{Entry, EntryKind, LayerWriter, WrittenLayer};
use kiln_oci::manifest::{self, ConfigDocument, Descriptor, Manifest, media_type};
use kiln_store::{Store, StoreError};

fn entry(path: &str, kind: EntryKind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 1,
        xattrs: BTreeMap::new(),
    }
}

enum Item<'a> {
    File(&'a str, &'a str),
    Gone(&'a str),
    Emptied(&'a str),
}

fn layer(store: &Store, items: &[Item<'_>]) -> WrittenLayer {
    let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
    for item in items {
        match item {
            Item::File(path, text) => {
                let kind = EntryKind::File {
                    size: text.len() as u64,
                };
                writer
                    .entry(&entry(path, kind), &mut text.as_bytes())
                    .unwrap();
            }
            Item::Gone(path) => writer.whiteout(path.as_bytes()).unwrap(),
            Item::Emptied(path) => writer.opaque(path.as_bytes()).unwrap(),
        }
    }
    let (written, bytes) = writer.finish().unwrap();
    assert_eq!(store.put_blob(&bytes).unwrap(), written.digest);
    written
}

fn image(store: &Store, layers: &[&WrittenLayer]) -> Digest {
    let document = ConfigDocument {
        config: ImageConfig {
            platform: "linux/amd64".into(),
            ..ImageConfig::default()
        },
        created: None,
        author: None,
        diff_ids: layers.iter().map(|l| l.diff_id).collect(),
        history: vec![],
        on_build: vec![],
    };
    let config = manifest::write_config(&document);
    let descriptor = Descriptor::new(
        media_type::OCI_CONFIG,
        store.put_blob(&config).unwrap(),
        config.len() as u64,
    );
    let manifest = Manifest::new(descriptor, layers.iter().map(|l| l.descriptor()).collect());
    store.put_blob(&manifest.to_bytes()).unwrap()
}

fn names(store: &Store, tree: &Digest) -> Vec<String> {
    let tree = store.load_tree(tree).unwrap();
    tree.walk()
        .skip(1)
        .map(|s| String::from_utf8(s.path).unwrap())
        .collect()
}

#[test]
fn layers_stack_with_deletions_that_spare_their_own_entries() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let base = layer(
        &store,
        &[
            Item::File("a/1", "1"),
            Item::File("a/2", "2"),
            Item::File("b/x", "x"),
            Item::File("c", "c"),
        ],
    );
    let top = layer(
        &store,
        &[
            Item::File("b/new", "n"),
            Item::Gone("a/1"),
            Item::Emptied("b"),
            Item::Gone("c"),
            Item::File("c", "again"),
        ],
    );
    let manifest = image(&store, &[&base, &top]);
    let added = store.add_image(&manifest).unwrap();
    assert_eq!(names(&store, &added.tree), ["a", "a/2", "b", "b/new", "c"]);
    assert_eq!(store.image(&manifest).unwrap().unwrap(), added);
    assert_eq!(
        store.add_image(&manifest).unwrap(),
        added,
        "a second time changes nothing"
    );
}

#[test]
fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let one = layer(&store, &[Item::File("a", "1")]);
    let other = layer(&store, &[Item::File("a", "2")]);
    let lie = WrittenLayer {
        diff_id: other.diff_id,
        ..one
    };
    let manifest = image(&store, &[&lie]);
    let error = store.add_image(&manifest).unwrap_err();
    assert!(matches!(error, StoreError::BadLayer { .. }), "{error}");
    assert!(store.image(&manifest).unwrap().is_none());
}

#[test]
fn gc_keeps_what_is_referenced_whole_and_removes_the_rest() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let shared = layer(&store, &[Item::File("shared", "s")]);
    let own = layer(&store, &[Item::File("kept", "k")]);
    let other = layer(&store, &[Item::File("lost", "l")]);
    let kept = image(&store, &[&shared, &own]);
    let lost = image(&store, &[&shared, &other]);
    let kept_image = store.add_image(&kept).unwrap();
    store.add_image(&lost).unwrap();
    let config = store.put_blob(b"a config's content").unwrap();
    store.set_ref("release/shop/1/web/image", &kept).unwrap();
    store
        .set_ref("release/shop/1/web/config-c", &config)
        .unwrap();

    let lease = store.lease().unwrap();
    assert!(matches!(store.gc(&[], false), Err(StoreError::InUse)));
    drop(lease);
    let would = store.gc(&[], true).unwrap();
    assert!(
        store.image(&lost).unwrap().is_some(),
        "a dry run removes nothing"
    );
    assert_eq!(store.gc(&[], false).unwrap(), would);
    assert_eq!(store.images().unwrap(), [kept_image.clone()]);
    assert_eq!(names(&store, &kept_image.tree), ["kept", "shared"]);
    assert!(!store.has_object(&Digest::of("l")) && store.has_object(&Digest::of("s")));
    assert!(store.size(&config).unwrap().is_some());
    assert!(store.size(&other.digest).unwrap().is_none());
    assert!(store.fsck(false).unwrap().bad.is_empty());
    // What was collected can come back.
    let again = layer(&store, &[Item::File("lost", "l")]);
    let manifest = image(&store, &[&shared, &again]);
    store.add_image(&manifest).unwrap();
}

#[test]
fn fsck_finds_every_damaged_byte_and_moves_it_aside() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let only = layer(&store, &[Item::File("a", "content")]);
    let manifest = image(&store, &[&only]);
    let image = store.add_image(&manifest).unwrap();
    assert!(store.fsck(false).unwrap().bad.is_empty());
    fs::write(store.object_path(&Digest::of("content")), "c0ntent").unwrap();
    fs::write(store.blob_path(&only.digest), "x").unwrap();
    let report = store.fsck(false).unwrap();
    assert_eq!(report.bad.len(), 2, "{report:?}");
    let repaired = store.fsck(true).unwrap();
    assert!(repaired.bad.len() >= 2 && repaired.bad.iter().all(|d| d.moved));
    assert!(
        store.image(&image.manifest).unwrap().is_none(),
        "it lacks a file now"
    );
    assert!(store.fsck(false).unwrap().bad.is_empty());
}

#[test]
fn references_stay_in_their_folder() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    for bad in ["", "../x", "a//b", "a/../b", "/a", "a/", ".hidden", "a b"] {
        assert!(
            matches!(
                store.set_ref(bad, &Digest::of("x")),
                Err(StoreError::BadRef(_))
            ),
            "{bad}"
        );
    }
    store.set_ref("a/b", &Digest::of("1")).unwrap();
    store.set_ref("a/b", &Digest::of("2")).unwrap();
    assert_eq!(
        store.refs("a/").unwrap(),
        [("a/b".to_owned(), Digest::of("2"))]
    );
    assert!(store.remove_ref("a/b").unwrap() && !store.remove_ref("a/b").unwrap());
}
