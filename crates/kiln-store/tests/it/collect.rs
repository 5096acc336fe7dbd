use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_model::Digest;
use kiln_oci::manifest::{Descriptor, Index, media_type};
use kiln_oci::{BlobRead, BlobWrite};
use kiln_store::{GcError, Store};

use crate::support::*;

fn image(store: &Store, name: &str) -> Digest {
    let files = [file("shared", "shared"), file("own", name)];
    let manifest = manifest(store, &[layer(store, &files)]);
    store.add_image(&manifest).unwrap();
    manifest
}

fn whole(store: &Store, manifest: &Digest) -> bool {
    let Some(image) = store.image(manifest).unwrap() else {
        return false;
    };
    let tree = store.load_tree(&image.tree).unwrap();
    store.write_tree(&tree).unwrap();
    image
        .blobs()
        .all(|blob| store.size(&blob).unwrap().is_some())
}

#[test]
fn what_no_root_needs_is_removed_and_nothing_else() {
    let (dir, store) = store();
    let [kept, extra, gone] = ["kept", "extra", "gone"].map(|name| image(&store, name));
    let loose = put(&store, "loose object");
    let blob = put_blob(&store, "blob of a ref");
    store.set_ref("image/kept", &kept).unwrap();
    store.set_ref("lock/x", &blob).unwrap();

    let trial = store.gc(&[extra], true).unwrap();
    assert!(trial.dry_run && whole(&store, &gone));
    let report = store.gc(&[extra], false).unwrap();
    assert_eq!((report.images, report.trees, report.objects), (1, 1, 2));
    assert_eq!(report.blobs, 3, "manifest, configuration, layer");
    assert_eq!(
        (
            trial.images,
            trial.trees,
            trial.objects,
            trial.blobs,
            trial.bytes
        ),
        (
            report.images,
            report.trees,
            report.objects,
            report.blobs,
            report.bytes
        )
    );
    assert!(whole(&store, &kept) && whole(&store, &extra));
    assert!(store.contains(&blob).unwrap());
    assert!(store.image(&gone).unwrap().is_none());
    assert!(store.open_object(&loose).unwrap().is_none());
    assert_eq!(files_below(&dir.path().join("store/chains")).len(), 2);
    assert_eq!(store.fsck(false).unwrap().bad, vec![]);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.gc(&[extra], false).unwrap().objects, 0);
    store.gc(&[], false).unwrap();
    assert!(whole(&store, &kept) && store.image(&extra).unwrap().is_none());
}

#[test]
fn an_index_keeps_its_images_and_a_tree_its_objects() {
    let (_dir, store) = store();
    let one = image(&store, "one");
    let size = store.size(&one).unwrap().unwrap();
    let entry = Descriptor::new(media_type::OCI_MANIFEST, one, size);
    let absent = Descriptor::new(media_type::OCI_MANIFEST, Digest::of("absent"), 1);
    let index = put_blob(&store, Index::new(vec![entry, absent]).to_bytes());
    store.set_ref("index", &index).unwrap();
    let tree = store.image(&image(&store, "two")).unwrap().unwrap().tree;
    store.set_ref("cache/tree", &tree).unwrap();
    let nothing = Digest::of("nothing");
    let report = store.gc(&[nothing], false).unwrap();
    assert_eq!(report.dangling, [nothing.to_string()]);
    assert_eq!(
        report.images, 1,
        "that of the tree, which was not asked for"
    );
    assert!(whole(&store, &one));
    store.write_tree(&store.load_tree(&tree).unwrap()).unwrap();
}

#[test]
fn an_image_naming_another_as_its_layer_does_not_unprotect_it() {
    let (_dir, store) = store();
    // Pulled, not yet added: nothing but its manifest tells what it needs.
    let needed = layer(&store, &[file("needed", "needed")]);
    let victim = manifest(&store, &[needed]);
    let mut fake = layer(&store, &[file("x", "x")]);
    fake.digest = victim;
    let attacker = manifest(&store, &[fake]);
    store.gc(&[attacker, victim], false).unwrap();
    assert!(store.contains(&needed.digest).unwrap());
    store.add_image(&victim).unwrap();
}

#[test]
fn a_lease_keeps_what_is_written_and_what_is_found_again() {
    let (dir, store) = store();
    let old = image(&store, "old");
    let found = put(&store, "found again");
    let unused = put(&store, "unused");
    // Of another handle, as another process has it.
    let other = Store::open(dir.path()).unwrap();
    let lease = other.lease().unwrap();
    let new = image(&store, "new");
    put(&store, "found again");
    assert!(store.contains(&old).unwrap());
    store.gc(&[], false).unwrap();
    assert!(whole(&store, &new) && whole(&store, &old));
    assert!(store.open_object(&found).unwrap().is_some());
    assert!(store.open_object(&unused).unwrap().is_none());
    // A second collection sees the same lease.
    store.gc(&[], false).unwrap();
    assert!(whole(&store, &new));
    drop(lease);
    store.gc(&[], false).unwrap();
    assert!(store.image(&new).unwrap().is_none());
    assert_eq!(store.usage().unwrap().objects.count, 0);
    assert_eq!(
        std::fs::metadata(dir.path().join("store/journal"))
            .unwrap()
            .len(),
        0
    );
}

#[test]
fn leases_and_files_of_the_dead_protect_nothing() {
    let (dir, store) = store();
    put(&store, "x");
    let lease = dir.path().join("store/leases/dead");
    std::fs::write(&lease, "0").unwrap();
    let session = dir.path().join("store/tmp/session-dead");
    std::fs::create_dir(&session).unwrap();
    // A hole takes no room.
    let unfinished = std::fs::File::create(session.join("0")).unwrap();
    unfinished.set_len(1 << 30).unwrap();
    let object = store.usage().unwrap().objects.bytes;
    let report = store.gc(&[], false).unwrap();
    assert_eq!((report.objects, report.bytes), (1, object));
    assert!(!lease.exists() && !session.exists());
    put(&store, "our own session is still there");
}

#[test]
fn a_damaged_record_or_tree_stops_collection() {
    let (dir, store) = store();
    let kept = image(&store, "kept");
    store.set_ref("kept", &kept).unwrap();
    let loose = put(&store, "loose");
    let tree = store
        .tree_paths(&store.image(&kept).unwrap().unwrap().tree)
        .metadata;
    let record = dir.path().join(format!("store/images/{}.json", kept.hex()));
    for path in [tree, record] {
        let good = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"rubbish").unwrap();
        let error = store.gc(&[], false).unwrap_err();
        assert!(
            matches!(error, GcError::Tree(_) | GcError::Image(_)),
            "{error}"
        );
        assert!(store.open_object(&loose).unwrap().is_some());
        std::fs::write(&path, good).unwrap();
    }
    store.gc(&[], false).unwrap();
    assert!(whole(&store, &kept));
}

/// The other process of the test below: adds images, each under a lease until its ref.
#[test]
fn child_adds_images() {
    let Some(root) = std::env::var_os("KILN_STORE_TEST_CHILD") else {
        return;
    };
    let store = Store::open(Path::new(&root)).unwrap();
    for n in 0..30 {
        let _lease = store.lease().unwrap();
        let manifest = image(&store, &format!("image {}", n % 7));
        store.set_ref(&format!("image/{n}"), &manifest).unwrap();
        if n >= 3 {
            store.remove_ref(&format!("image/{}", n - 3)).unwrap();
        }
    }
}

#[test]
fn collecting_while_others_import_loses_nothing() {
    let (dir, store) = store();
    let child = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "collect::child_adds_images"])
            .env("KILN_STORE_TEST_CHILD", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut children = [child(), child()];
    put(&store, "for the collector");
    // Says so whatever happens, or the collector would never end.
    let done = AtomicBool::new(false);
    let removed = std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut removed = 0;
            loop {
                removed += store.gc(&[], false).unwrap().objects;
                if done.load(Ordering::Relaxed) {
                    return removed;
                }
            }
        });
        let imported = std::panic::catch_unwind(|| {
            let writer = Store::open(dir.path()).unwrap();
            for n in 0..30 {
                let _lease = writer.lease().unwrap();
                let manifest = image(&writer, &format!("image {}", n % 5));
                writer.set_ref("mine", &manifest).unwrap();
                assert!(whole(&writer, &manifest), "{n}");
            }
        });
        let ended = children.each_mut().map(|child| child.wait().unwrap());
        done.store(true, Ordering::Relaxed);
        imported.unwrap();
        assert!(ended.iter().all(|status| status.success()), "{ended:?}");
        collector.join().unwrap()
    });
    assert!(removed > 0);
    for (name, manifest) in store.refs("").unwrap() {
        assert!(whole(&store, &manifest), "{name}");
    }
    assert_eq!(store.fsck(false).unwrap().bad, vec![]);
}
