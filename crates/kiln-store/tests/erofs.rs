//! The EROFS writer against the kernel, fsck.erofs and its own reader.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_store::Store;
use kiln_store::tree::{Kind, Metadata, Mtime, Node, Tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

fn node(kind: Kind) -> Node {
    let mtime = Mtime::seconds(1_700_000_000);
    Node {
        meta: Metadata {
            mode: 0o640,
            uid: 1000,
            gid: 70_000,
            mtime,
            xattrs: BTreeMap::new(),
        },
        kind,
    }
}

fn file(store: &Store, content: &[u8]) -> Node {
    let (digest, size) = store.put_object(&mut &content[..]).unwrap();
    node(Kind::File { digest, size })
}

/// One of everything, and the sizes at which layouts change.
fn sample(store: &Store) -> Tree {
    let mut tree = Tree::new();
    let mut put = |path: &str, node: Node| tree.insert(path.as_bytes(), node).unwrap();
    put("", Node::dir(0o751));
    put("etc/empty", file(store, b""));
    put("etc/small", file(store, b"hello"));
    put("usr/lib/large", file(store, &vec![7; 3 << 20]));
    let mut setuid = file(store, b"#!");
    setuid.meta.mode = 0o4755;
    put("usr/bin/setuid", setuid);
    put("dev/null", node(Kind::Char { major: 1, minor: 3 }));
    put(
        "dev/disk",
        node(Kind::Block {
            major: 259,
            minor: 70_000,
        }),
    );
    put("run/fifo", node(Kind::Fifo));
    put("run/socket", node(Kind::Socket));
    let mut tmp = Node::dir(0o1777);
    tmp.meta.mtime = Mtime {
        seconds: -5,
        nanos: 7,
    };
    put("tmp", tmp);
    for n in [1, 4000, 4032, 4033, 4095] {
        put(
            &format!("links/{n}"),
            node(Kind::Symlink {
                target: vec![b'x'; n],
            }),
        );
    }
    for n in 0..3000 {
        put(&format!("many/entry-{n}"), file(store, b"same"));
    }
    for n in 1..120 {
        put(
            &format!("names/{}", "n".repeat(n * 2)),
            file(store, b"name"),
        );
    }
    put("many/-dash", file(store, b"before the dots"));
    let mut marked = file(store, b"caps");
    marked
        .meta
        .xattrs
        .insert(b"user.note".to_vec(), b"kept".to_vec());
    marked
        .meta
        .xattrs
        .insert(b"security.capability".to_vec(), CAPABILITY.to_vec());
    put("usr/bin/marked", marked);
    tree.link(b"etc/hard", b"etc/small").unwrap();
    tree
}

/// `cap_net_bind_service=ep`, revision 2 (linux/capability.h).
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn what_is_written_is_read_back_and_equal_trees_are_equal_bytes() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let tree = sample(&store);
    let digest = store.write_tree(&tree).unwrap();
    assert!(store.load_tree(&digest).unwrap() == tree);
    assert_eq!(store.write_tree(&sample(&store)).unwrap(), digest);
}

#[test]
fn fsck_erofs_finds_nothing_wrong() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let digest = store.write_tree(&sample(&store)).unwrap();
    let image = store.tree_paths(&digest).metadata;
    match Command::new("fsck.erofs").arg(&image).output() {
        Ok(output) => assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(_) => skip("fsck.erofs (package erofs-utils)"),
    }
}

struct Mounted(Vec<PathBuf>);

impl Drop for Mounted {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
    }
}

#[test]
fn the_kernel_shows_exactly_the_tree() {
    if !rustix::process::geteuid().is_root() {
        return skip("root");
    }
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let tree = sample(&store);
    let digest = store.write_tree(&tree).unwrap();
    let paths = store.tree_paths(&digest);
    let (meta, merged) = (root.path().join("meta"), root.path().join("merged"));
    fs::create_dir_all(&meta).unwrap();
    fs::create_dir_all(&merged).unwrap();
    let mut mounted = Mounted(vec![]);
    mount(&paths.metadata, &meta, "erofs", MountFlags::RDONLY, None).expect("erofs from a file");
    mounted.0.push(meta.clone());
    let options = format!(
        "lowerdir={}::{},metacopy=on,redirect_dir=on",
        meta.display(),
        paths.objects.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::RDONLY,
        Some(options.as_c_str()),
    )
    .expect("overlay with a data-only lower");
    mounted.0.push(merged.clone());

    let mut seen = 0;
    for step in tree.walk() {
        let path = merged.join(std::ffi::OsStr::from_bytes(&step.path));
        compare(&store, &path, step.node);
        seen += 1;
    }
    assert_eq!(count(&merged) + 1, seen, "nothing more is there");
    let hard = fs::metadata(merged.join("etc/hard")).unwrap();
    assert_eq!(hard.nlink(), 2);
    assert_eq!(
        hard.ino(),
        fs::metadata(merged.join("etc/small")).unwrap().ino()
    );
    assert_eq!(
        xattr::get(merged.join("usr/bin/marked"), "user.note")
            .unwrap()
            .as_deref(),
        Some(&b"kept"[..])
    );
    assert_eq!(
        xattr::get(merged.join("usr/bin/marked"), "security.capability")
            .unwrap()
            .as_deref(),
        Some(CAPABILITY)
    );
}

fn compare(store: &Store, path: &Path, node: &Node) {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kind = meta.file_type();
    match &node.kind {
        Kind::Dir => assert!(kind.is_dir(), "{}", path.display()),
        Kind::File { digest, size } => {
            assert_eq!(meta.len(), *size, "{}", path.display());
            let content = fs::read(path).unwrap();
            assert_eq!(
                kiln_model::Digest::of(&content),
                *digest,
                "{}",
                path.display()
            );
            assert!(*size == 0 || store.has_object(digest));
        }
        Kind::Symlink { target } => {
            assert_eq!(fs::read_link(path).unwrap().as_os_str().as_bytes(), target);
        }
        Kind::Char { major, minor } => {
            assert!(kind.is_char_device());
            assert_eq!(meta.rdev(), rustix::fs::makedev(*major, *minor));
        }
        Kind::Block { major, minor } => {
            assert!(kind.is_block_device());
            assert_eq!(meta.rdev(), rustix::fs::makedev(*major, *minor));
        }
        Kind::Fifo => assert!(kind.is_fifo()),
        Kind::Socket => assert!(kind.is_socket()),
    }
    assert_eq!(
        (meta.uid(), meta.gid()),
        (node.meta.uid, node.meta.gid),
        "{}",
        path.display()
    );
    assert_eq!(meta.mtime(), node.meta.mtime.seconds, "{}", path.display());
    if !kind.is_symlink() {
        assert_eq!(meta.mode() & 0o7777, node.meta.mode, "{}", path.display());
    }
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let inside = fs::symlink_metadata(&path).unwrap().is_dir();
            1 + if inside { count(&path) } else { 0 }
        })
        .sum()
}

fn skip(what: &str) {
    assert!(
        std::env::var_os("KILN_TEST_STRICT").is_none(),
        "needs {what}"
    );
    eprintln!("SKIPPED: needs {what}");
}
