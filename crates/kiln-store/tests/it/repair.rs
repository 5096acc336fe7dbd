use std::path::Path;

use kiln_store::{Found, Store};

use crate::support::*;

fn spoil(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[0] ^= 1;
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn image(store: &Store) -> kiln_store::Image {
    let layer = layer(
        store,
        &[file("a", "content of a"), file("b", "content of b")],
    );
    let image = store.add_image(&manifest(store, &[layer])).unwrap();
    store.set_ref("image", &image.manifest).unwrap();
    image
}

#[test]
fn a_good_store_has_nothing_bad() {
    let (_dir, store) = store();
    image(&store);
    let report = store.fsck(false).unwrap();
    assert_eq!(report.bad, vec![]);
    // Two objects, three blobs, one tree.
    assert_eq!(report.checked, 6);
}

#[test]
fn damage_is_found_moved_aside_and_healed_from_the_layers() {
    let (dir, store) = store();
    let image = image(&store);
    let tree = store.load_tree(&image.tree).unwrap();
    let object = store.object_path(&kiln_model::Digest::of("content of a"));
    let metadata = store.tree_paths(&image.tree).metadata;
    let record = dir
        .path()
        .join(format!("store/images/{}.json", image.manifest.hex()));
    for path in [&object, &metadata] {
        spoil(path);
        let report = store.fsck(false).unwrap();
        assert_eq!(report.bad.len(), 1, "{report:?}");
        assert_eq!(&report.bad[0].path, path);
        assert!(matches!(report.bad[0].found, Found::Digest(_)));
        let report = store.fsck(true).unwrap();
        assert_eq!(report.healed, [image.manifest], "{report:?}");
        assert!(report.bad[0].quarantine.as_ref().unwrap().exists());
        assert_eq!(store.fsck(false).unwrap().bad, vec![]);
    }
    for path in [&object, &metadata, &record] {
        std::fs::remove_file(path).unwrap();
        if path != &record {
            assert_eq!(store.fsck(false).unwrap().bad[0].found, Found::Missing);
        } else {
            std::fs::write(path, "{}").unwrap();
        }
        let report = store.fsck(true).unwrap();
        assert_eq!(report.healed, [image.manifest], "{report:?}");
        assert_eq!(store.load_tree(&image.tree).unwrap(), tree);
        assert_eq!(store.image(&image.manifest).unwrap().unwrap(), image);
        assert_eq!(store.fsck(false).unwrap().bad, vec![]);
    }
}

#[test]
fn what_cannot_be_healed_is_told_and_kept() {
    let (dir, store) = store();
    let image = image(&store);
    let hex = image.layers[0].digest.hex();
    spoil(
        &dir.path()
            .join("store/blobs")
            .join(&hex[..2])
            .join(&hex[2..]),
    );
    let report = store.fsck(true).unwrap();
    assert_eq!(report.healed, []);
    assert_eq!(report.lost.len(), 1);
    assert!(
        report.lost[0].reason.contains("is not in the store"),
        "{report:?}"
    );
    // It can still run: its tree and objects are good.
    assert_eq!(store.image(&image.manifest).unwrap(), Some(image.clone()));
    store.gc(&[], false).unwrap();
    store.load_tree(&image.tree).unwrap();
}
