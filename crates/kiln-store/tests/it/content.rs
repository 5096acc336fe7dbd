use std::io::{self, Read};
use std::process::Command;

use kiln_model::Digest;
use kiln_oci::{BlobRead, BlobWrite, BlobWriteError, Expected};
use kiln_store::{OpenError, PutError, RefError, Store};

use crate::support::*;

/// Gives some bytes, then fails.
struct Breaks(usize);

impl Read for Breaks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::Error::other("cable pulled"));
        }
        let n = buffer.len().min(self.0);
        buffer[..n].fill(1);
        self.0 -= n;
        Ok(n)
    }
}

#[test]
fn objects_are_named_by_content_and_kept_once() {
    let (dir, store) = store();
    let large = vec![7; 3 << 20];
    for content in [&b""[..], b"clay", &large] {
        let (digest, size) = store.put_object(&mut &*content).unwrap();
        assert_eq!((digest, size), (Digest::of(content), content.len() as u64));
        assert_eq!(store.put_object(&mut &*content).unwrap().0, digest);
        let mut back = Vec::new();
        let mut file = store.open_object(&digest).unwrap().unwrap();
        file.read_to_end(&mut back).unwrap();
        assert!(back == content);
    }
    assert_eq!(files_below(&dir.path().join("store/objects")).len(), 3);
    assert_eq!(files_below(&dir.path().join("store/tmp")).len(), 0);
    assert!(store.open_object(&Digest::of("absent")).unwrap().is_none());
}

#[test]
fn a_source_that_breaks_leaves_nothing() {
    let (dir, store) = store();
    for length in [10, 5 << 20] {
        let error = store.put_object(&mut Breaks(length)).unwrap_err();
        assert!(matches!(error, PutError::Source(_)), "{error}");
        let error = store.write(None, &mut Breaks(length)).unwrap_err();
        assert!(matches!(error, BlobWriteError::Source(_)), "{error}");
    }
    for folder in ["objects", "blobs", "tmp"] {
        let left = files_below(&dir.path().join("store").join(folder));
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn blobs_are_verified_before_they_get_their_name() {
    let (dir, store) = store();
    let expected = Expected {
        digest: Digest::of("clay"),
        size: 4,
    };
    for wrong in ["cla", "clayy", "kiln"] {
        let error = store.write(Some(expected), &mut wrong.as_bytes());
        assert!(error.is_err(), "{wrong}");
        assert!(!store.contains(&expected.digest).unwrap());
    }
    assert!(files_below(&dir.path().join("store/blobs")).is_empty());
    store.write(Some(expected), &mut &b"clay"[..]).unwrap();
    assert!(store.contains(&expected.digest).unwrap());
    assert_eq!(store.size(&expected.digest).unwrap(), Some(4));
    let blob = BlobRead::open(&store, &expected.digest).unwrap().unwrap();
    assert_eq!(text(blob), "clay");
}

#[test]
fn what_a_power_cut_truncated_is_written_again() {
    let (_dir, store) = store();
    let digest = put(&store, "whole");
    let path = store.object_path(&digest);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    put(&store, "whole");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole");
}

#[test]
fn many_writers_at_once_agree() {
    let (dir, first) = store();
    let second = Store::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        for store in [&first, &second, &first, &second] {
            scope.spawn(move || {
                for n in 0..200 {
                    put(store, format!("content {}", n % 50));
                    put_blob(store, format!("blob {}", n % 50));
                }
            });
        }
    });
    assert_eq!(files_below(&dir.path().join("store/objects")).len(), 50);
    assert_eq!(files_below(&dir.path().join("store/blobs")).len(), 50);
    assert_eq!(files_below(&dir.path().join("store/tmp")).len(), 0);
    assert_eq!(first.fsck(false).unwrap().bad, vec![]);
}

#[test]
fn a_full_disk_leaves_nothing_half_done() {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root (to mount a small tmpfs)");
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "none"])
        .arg(dir.path())
        .status();
    assert!(mount.unwrap().success());
    let result = std::panic::catch_unwind(|| {
        let store = Store::open(dir.path()).unwrap();
        let kept = put(&store, "small");
        let big = vec![3; 16 << 20];
        let error = store.put_object(&mut &*big).unwrap_err();
        assert!(error.to_string().contains("No space left"), "{error}");
        let error = store.write(None, &mut &*big).unwrap_err();
        match error {
            BlobWriteError::Store(error) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
            other => panic!("{other}"),
        }
        assert!(files_below(&dir.path().join("store/tmp")).is_empty());
        assert_eq!(files_below(&dir.path().join("store/objects")).len(), 1);
        assert_eq!(store.fsck(false).unwrap().bad, vec![]);
        // And there is room again for what fits.
        put(&store, vec![4; 1 << 20]);
        assert!(store.open_object(&kept).unwrap().is_some());
    });
    assert!(
        Command::new("umount")
            .arg("-l")
            .arg(dir.path())
            .status()
            .unwrap()
            .success()
    );
    result.unwrap();
}

#[test]
fn refs_are_names_for_what_is_there() {
    let (_dir, store) = store();
    let (a, b) = (put_blob(&store, "a"), put_blob(&store, "b"));
    let long = format!("image/{}", "x".repeat(600));
    for name in [
        "release/prod/1",
        "release/prod/10",
        "release",
        &long,
        "image/a:b@c",
    ] {
        store.set_ref(name, &a).unwrap();
    }
    store.set_ref("release/prod/1", &b).unwrap();
    assert_eq!(store.get_ref("release/prod/1").unwrap(), Some(b));
    assert_eq!(
        store.refs("release/").unwrap(),
        [("release/prod/1".into(), b), ("release/prod/10".into(), a)]
    );
    assert_eq!(store.refs("").unwrap().len(), 5);
    assert!(store.remove_ref("release").unwrap());
    assert!(!store.remove_ref("release").unwrap());
    assert_eq!(store.get_ref("release").unwrap(), None);
    let absent = store.set_ref("x", &Digest::of("absent")).unwrap_err();
    assert!(matches!(absent, RefError::NoTarget { .. }), "{absent}");
    for bad in ["", "two\nlines", &"x".repeat(2000)] {
        let error = store.set_ref(bad, &a).unwrap_err();
        assert!(matches!(error, RefError::Name { .. }), "{error}");
    }
}

#[test]
fn a_store_of_another_version_is_refused() {
    let (dir, store) = store();
    drop(store);
    std::fs::write(dir.path().join("store/version"), "kiln-store 9\n").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, OpenError::Format { .. }), "{error}");
    assert!(error.to_string().contains("kiln-store 9"));
}

#[test]
fn usage_counts_what_is_there() {
    let (_dir, store) = store();
    put(&store, vec![1; 10_000]);
    put_blob(&store, "b");
    let usage = store.usage().unwrap();
    assert_eq!((usage.objects.count, usage.blobs.count), (1, 1));
    assert!(usage.objects.bytes >= 10_000 && usage.bytes() > usage.objects.bytes);
}
