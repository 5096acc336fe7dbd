//! What the kernel shows of a tree must be the tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_model::Digest;
use kiln_store::Store;
use kiln_store::tree::{Kind, Metadata, Mtime, Node, Tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::support::*;

/// Everything a tree can hold, with its content in the store.
fn rich_tree(store: &Store) -> Tree {
    let mut tree = Tree::new();
    let mut add = |path: &str, mode, kind| {
        let mut node = Node::plain(mode, kind);
        node.meta.mtime = Mtime::seconds(1_700_000_000);
        tree.insert(path, node).unwrap();
    };
    let content = |text: &str| Kind::File {
        digest: put(store, text),
        size: text.len() as u64,
    };
    let link = |target: &str| Kind::Symlink {
        target: target.into(),
    };
    add("", 0o755, Kind::Dir);
    add("usr/bin", 0o755, Kind::Dir);
    add("usr/bin/tool", 0o4755, content("#!/bin/sh\n"));
    add("usr/empty", 0o600, content(""));
    add(
        "usr/big",
        0o644,
        content(&"0123456789abcdef".repeat(100_000)),
    );
    add("bin", 0o777, link("usr/bin"));
    add("short", 0o777, link("x"));
    add("middling", 0o777, link(&"y/".repeat(1024)));
    add("long", 0o777, link(&"z/".repeat(2000)));
    add("dev/null", 0o666, Kind::Char { major: 1, minor: 3 });
    add(
        "dev/disk",
        0o660,
        Kind::Block {
            major: 259,
            minor: 70_000,
        },
    );
    add("pipe", 0o644, Kind::Fifo);
    add("sock", 0o644, Kind::Socket);
    add("tmp", 0o1777, Kind::Dir);
    // Names of object folders, one of a folder that certainly has something.
    let fan_out = put(store, "in the way").hex()[..2].to_owned();
    add(&format!("{fan_out}/inside"), 0o644, content("inside"));
    add("cd", 0o644, content("a file where folders are"));
    add("!before-dot", 0o644, content("!"));
    add(&"n".repeat(255), 0o644, content("long name"));
    for i in 0..700 {
        add(
            &format!("many/entry-number-{i:04}"),
            0o644,
            content(&format!("{}", i % 9)),
        );
    }
    for i in 0..150 {
        // Just around the largest tail of a directory.
        add(&format!("tails/{i:03}"), 0o755, Kind::Dir);
        for n in 0..i {
            add(&format!("tails/{i:03}/{n:02x}"), 0o644, content(""));
        }
    }
    let mut odd = Node::plain(0, content("odd"));
    odd.meta = Metadata {
        mode: 0o2640,
        uid: 100_000,
        gid: 4_000_000_000,
        mtime: Mtime {
            seconds: -5,
            nanos: 123_456_789,
        },
        xattrs: BTreeMap::from([
            (b"user.note".to_vec(), b"hello".to_vec()),
            (b"user.empty".to_vec(), Vec::new()),
            (b"trusted.plain".to_vec(), vec![0, 255]),
            (b"trusted.overlay.mine".to_vec(), b"kept".to_vec()),
            // cap_net_bind_service=ep, revision 2
            (
                b"security.capability".to_vec(),
                [&[1, 0, 0, 2, 0, 4], &[0; 14][..]].concat(),
            ),
        ]),
    };
    tree.insert("odd", odd).unwrap();
    let mut wide = Node::dir(0o755);
    wide.meta.xattrs.insert(b"user.wide".into(), vec![7; 9000]);
    tree.insert("wide", wide).unwrap();
    tree.link("usr/bin/tool-too", "usr/bin/tool").unwrap();
    tree.link("pipe-too", "pipe").unwrap();
    tree
}

/// The kernel's view of a folder as a tree; content as digests.
fn scan(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let stat = full.symlink_metadata().unwrap();
        let bytes = path.as_os_str().as_bytes();
        if !stat.is_dir() && stat.nlink() > 1 {
            if let Some(first) = inodes.get(&stat.ino()) {
                tree.link(bytes, first.as_os_str().as_bytes()).unwrap();
                continue;
            }
            inodes.insert(stat.ino(), path.clone());
        }
        tree.insert(bytes, node(&full, &stat)).unwrap();
        if stat.is_dir() {
            let mut names: Vec<_> = std::fs::read_dir(&full).unwrap().collect();
            names.sort_by_key(|entry| std::cmp::Reverse(entry.as_ref().unwrap().file_name()));
            todo.extend(
                names
                    .into_iter()
                    .map(|entry| path.join(entry.unwrap().file_name())),
            );
        }
    }
    tree
}

fn node(path: &Path, stat: &std::fs::Metadata) -> Node {
    let kind = stat.file_type();
    let (major, minor) = (
        rustix::fs::major(stat.rdev()),
        rustix::fs::minor(stat.rdev()),
    );
    let kind = if kind.is_dir() {
        Kind::Dir
    } else if kind.is_file() {
        let content = std::fs::read(path).unwrap();
        assert_eq!(stat.len(), content.len() as u64, "{path:?}");
        Kind::File {
            digest: Digest::of(&content),
            size: stat.len(),
        }
    } else if kind.is_symlink() {
        let target = std::fs::read_link(path).unwrap();
        Kind::Symlink {
            target: target.as_os_str().as_bytes().into(),
        }
    } else if kind.is_char_device() {
        Kind::Char { major, minor }
    } else if kind.is_block_device() {
        Kind::Block { major, minor }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    };
    Node {
        meta: Metadata {
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            mtime: Mtime {
                seconds: stat.mtime(),
                nanos: u32::try_from(stat.mtime_nsec()).unwrap(),
            },
            xattrs: xattrs(path),
        },
        kind,
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, list.as_mut_slice()).unwrap();
    let names = list[..length]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 65536];
            let length =
                rustix::fs::lgetxattr(path, OsStr::from_bytes(name), value.as_mut_slice()).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

/// Unmounts what it mounted.
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn add(&mut self, what: &Path, to: &Path, kind: &str, options: &str) -> rustix::io::Result<()> {
        std::fs::create_dir_all(to).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        mount(what, to, kind, MountFlags::RDONLY, options.as_c_str())?;
        self.0.push(to.into());
        Ok(())
    }

    fn add_loop(&mut self, what: &Path, to: &Path) {
        let mut mount = Command::new("mount");
        mount.args(["-t", "erofs", "-o", "ro,loop"]);
        let output = mount.arg(what).arg(to).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        self.0.push(to.into());
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
    }
}

/// A tree on disk, its EROFS mounted; `None` (and said so) where that can't be.
fn mounted() -> Option<(TempDir, Store, Tree, Mounts, PathBuf)> {
    if !rustix::process::geteuid().is_root() {
        skip("needs root (to mount)");
        return None;
    }
    let (dir, store) = store();
    let tree = rich_tree(&store);
    let paths = store.tree_paths(&store.write_tree(&tree).unwrap());
    let mut mounts = Mounts(Vec::new());
    let erofs = dir.path().join("erofs");
    match mounts.add(&paths.metadata, &erofs, "erofs", "") {
        Ok(()) => {}
        // Before 6.12, EROFS needs a block device.
        Err(rustix::io::Errno::NOTBLK) => mounts.add_loop(&paths.metadata, &erofs),
        Err(error) => panic!("{error}: {}", kernel_log()),
    }
    Some((dir, store, tree, mounts, erofs))
}

/// Version of the running kernel: major, minor.
fn kernel() -> (u32, u32) {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn kernel_log() -> String {
    let log = Command::new("dmesg").output().unwrap().stdout;
    let log = String::from_utf8_lossy(&log).into_owned();
    log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
}

fn compare(tree: &Tree, shown: &Tree) {
    let mut tree = tree.clone();
    if kernel() < (6, 7) {
        // It hides the escaped attributes instead of showing them.
        let mut odd = tree.get("odd").unwrap().clone();
        odd.meta.xattrs.remove(&b"trusted.overlay.mine"[..]);
        tree.insert("odd", odd).unwrap();
    }
    let tree = &tree;
    for change in Store::diff(tree, shown).iter().take(5) {
        println!(
            "{:?}: {:?}",
            String::from_utf8_lossy(&change.path),
            change.kind
        );
    }
    assert_eq!(Store::diff(tree, shown).len(), 0);
    assert!(tree == shown, "names are linked otherwise");
}

#[test]
fn data_only_layers_show_the_tree() {
    if kernel() < (6, 5) {
        // Not a skip: there are none, and the test below is what counts.
        return;
    }
    let Some((dir, store, tree, mut mounts, erofs)) = mounted() else {
        return;
    };
    let objects = store.path().join("objects");
    let root = dir.path().join("root");
    let options = format!(
        "metacopy=on,redirect_dir=on,lowerdir={}::{}",
        erofs.display(),
        objects.display()
    );
    mounts
        .add(Path::new("kiln"), &root, "overlay", &options)
        .unwrap();
    compare(&tree, &scan(&root));
}

/// As kernels before 6.5 need it; newer ones still take it.
#[test]
fn plain_layers_show_the_tree_too() {
    let Some((dir, store, tree, mut mounts, erofs)) = mounted() else {
        return;
    };
    let objects = store.path().join("objects");
    let root = dir.path().join("root");
    let options = format!(
        "metacopy=on,redirect_dir=on,lowerdir={}:{}",
        erofs.display(),
        objects.display()
    );
    mounts
        .add(Path::new("kiln"), &root, "overlay", &options)
        .unwrap();
    compare(&tree, &scan(&root));
}

/// Overlayfs counts for itself, so this is seen only below it.
#[test]
fn directories_count_their_directories() {
    let Some((_dir, _store, _tree, _mounts, erofs)) = mounted() else {
        return;
    };
    let links = |path: &str| erofs.join(path).metadata().unwrap().nlink();
    assert_eq!(
        (links("usr"), links("usr/bin"), links("tails")),
        (3, 2, 152)
    );
    assert_eq!(links("usr/bin/tool"), 2);
}
