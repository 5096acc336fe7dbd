#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use kiln_model::Digest;
use proptest::prelude::*;

use super::*;
use crate::tree::{Kind, Metadata, Mtime, Node, Tree};

fn file(content: &str) -> Kind {
    Kind::File {
        digest: Digest::of(content),
        size: content.len() as u64,
    }
}

/// Everything that the format treats in its own way.
pub(crate) fn rich_tree() -> Tree {
    let mut tree = Tree::new();
    let mut put = |path: &str, mode, kind| {
        let mut node = Node::plain(mode, kind);
        node.meta.mtime = Mtime::seconds(1_700_000_000);
        tree.insert(path, node).unwrap();
    };
    put("", 0o755, Kind::Dir);
    put("usr", 0o755, Kind::Dir);
    put("usr/bin", 0o755, Kind::Dir);
    put("usr/bin/tool", 0o4755, file("tool"));
    put("usr/empty", 0o600, file(""));
    put(
        "bin",
        0o777,
        Kind::Symlink {
            target: b"usr/bin".into(),
        },
    );
    put(
        "long",
        0o777,
        Kind::Symlink {
            target: vec![b'x'; 4000],
        },
    );
    put(
        "middling",
        0o777,
        Kind::Symlink {
            target: vec![b'y'; 2048],
        },
    );
    put("null", 0o666, Kind::Char { major: 1, minor: 3 });
    put(
        "disk",
        0o660,
        Kind::Block {
            major: 259,
            minor: 70_000,
        },
    );
    put("pipe", 0o644, Kind::Fifo);
    put("sock", 0o644, Kind::Socket);
    put("ab", 0o711, Kind::Dir);
    put("ab/inside", 0o644, file("inside"));
    put("cd", 0o644, file("shadowed"));
    put(
        "big",
        0o644,
        Kind::File {
            digest: Digest::of("big"),
            size: 5 << 30,
        },
    );
    put("!before-dot", 0o644, file("!"));
    for i in 0..700 {
        put(
            &format!("many/entry-number-{i:04}"),
            0o644,
            file(&i.to_string()),
        );
    }
    let mut odd = Node::plain(0o640, file("odd"));
    odd.meta = Metadata {
        mode: 0o2640,
        uid: 100_000,
        gid: 70_000,
        mtime: Mtime {
            seconds: -5,
            nanos: 123_456_789,
        },
        xattrs: [
            (b"user.note".to_vec(), b"hello".to_vec()),
            (
                b"security.capability".to_vec(),
                vec![1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
            (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
            (b"trusted.plain".to_vec(), Vec::new()),
        ]
        .into(),
    };
    tree.insert("odd", odd).unwrap();
    let mut wide = Node::dir(0o755);
    wide.meta.xattrs.insert(b"user.wide".into(), vec![7; 9000]);
    tree.insert("wide", wide).unwrap();
    tree.link("usr/bin/tool-too", "usr/bin/tool").unwrap();
    tree.link("many/pipe", "pipe").unwrap();
    tree
}

#[test]
fn a_rich_tree_survives_writing_and_reading() {
    let tree = rich_tree();
    let image = write(&tree).unwrap();
    assert_eq!(image.len() % BLOCK, 0);
    let back = read(&image).unwrap();
    assert_eq!(crate::tree::diff(&tree, &back), vec![]);
    assert_eq!(back, tree);
    assert_eq!(write(&back).unwrap(), image, "one tree, one image");
}

#[test]
fn the_bytes_of_a_tree_never_change() {
    // Changes only together with FORMAT.
    assert_eq!(
        Digest::of(write(&rich_tree()).unwrap()).hex(),
        "8704ec99d5bec3a5968838dece42fbcdbd8a92d521b658a3d901ebf120819da9"
    );
}

#[test]
fn the_order_of_insertion_does_not_matter() {
    let names = ["b", "a", "c/d", "c/a"];
    let tree = |names: &mut dyn Iterator<Item = &&str>| {
        let mut tree = Tree::new();
        for name in names {
            tree.insert(name, Node::plain(0o644, file(name))).unwrap();
        }
        tree.insert("gone", Node::dir(0o700)).unwrap();
        tree.remove("gone").unwrap();
        tree
    };
    let forth = write(&tree(&mut names.iter())).unwrap();
    let back = write(&tree(&mut names.iter().rev())).unwrap();
    assert!(forth == back);
}

#[test]
fn erofs_utils_find_nothing_wrong() {
    if Command::new("fsck.erofs").arg("-V").output().is_err() {
        crate::testing::skip("needs fsck.erofs of Debian's erofs-utils");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tree.erofs");
    std::fs::write(&path, write(&rich_tree()).unwrap()).unwrap();
    let fsck = Command::new("fsck.erofs").arg(&path).output().unwrap();
    assert!(fsck.status.success(), "{fsck:?}");
    let dump = |args: &[&str]| {
        let output = Command::new("dump.erofs")
            .args(args)
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let shown = dump(&["--path=/odd"]);
    assert!(
        shown.contains("100000") && shown.contains("70000"),
        "{shown}"
    );
    let shown = dump(&["--ls", "--path=/many"]);
    assert!(shown.contains("entry-number-0699"), "{shown}");
}

#[test]
fn damage_is_refused_or_gives_some_tree_but_never_a_panic() {
    let mut small = Tree::new();
    for name in ["a/b", "c", "d"] {
        small.insert(name, Node::plain(0o644, file(name))).unwrap();
    }
    small.link("e", "c").unwrap();
    let image = write(&small).unwrap();
    for length in 0..image.len().min(9000) {
        let _ = read(&image[..length]);
    }
    assert!(read(&image[..image.len() - 1]).is_err() || image.ends_with(&[0]));
    // Every byte of the superblock, the inodes and the names, at its extremes.
    let used = image.iter().rposition(|b| *b != 0).unwrap();
    for at in 0..=used {
        for value in [0, 1, 0x7f, 0xff] {
            let mut broken = image.clone();
            broken[at] = value;
            let _ = read(&broken);
        }
    }
    assert_eq!(read(b""), Err(ErofsReadError::NotATree));
    let mut newer = image;
    newer[8] = 9;
    assert_eq!(read(&newer), Err(ErofsReadError::Format { found: 9 }));
}

#[test]
fn device_numbers_survive() {
    for device in [(0, 1), (1, 0), (0xfff, 0xf_ffff), (259, 256)] {
        assert_eq!(decode_device(encode_device(device.0, device.1)), device);
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => any::<u32>().prop_map(|n| Kind::File { digest: Digest::of(n.to_le_bytes()), size: u64::from(n) + 1 }),
        1 => Just(file("")),
        2 => Just(Kind::Dir),
        2 => prop::collection::vec(1u8.., 1..4000).prop_map(|target| Kind::Symlink { target }),
        1 => (0..0x1000u32, 0..0x10_0000u32).prop_map(|(major, minor)| Kind::Block { major, minor }),
        1 => (1..0x1000u32, 0..0x10_0000u32).prop_map(|(major, minor)| Kind::Char { major, minor }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
    ]
}

fn nodes() -> impl Strategy<Value = Node> {
    let names = prop::sample::select(vec!["user.", "trusted.", "trusted.overlay.", "security."]);
    let xattr = (
        names,
        prop::collection::vec(1u8.., 1..40),
        prop::collection::vec(any::<u8>(), 0..3000),
    )
        .prop_map(|(prefix, name, value)| ([prefix.as_bytes(), &name].concat(), value));
    let ids = || prop_oneof![0..70_000u32, any::<u32>()];
    let times = prop_oneof![
        Just(Mtime::default()),
        (any::<i64>(), 0..1_000_000_000u32).prop_map(|(seconds, nanos)| Mtime { seconds, nanos }),
    ];
    let xattrs = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(xattr, 0..4)];
    (0..0o10000u32, ids(), ids(), times, xattrs, kinds()).prop_map(
        |(mode, uid, gid, mtime, xattrs, kind)| Node {
            meta: Metadata {
                mode,
                uid,
                gid,
                mtime,
                xattrs: xattrs.into_iter().collect(),
            },
            kind,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_survives_writing_and_reading(
        entries in prop::collection::vec(
            (prop::collection::vec("[a-f0-9]{1,3}|[!-.0-~]{1,255}", 1..4), nodes(), any::<bool>()),
            0..60,
        )
    ) {
        let mut tree = Tree::new();
        let mut files: Vec<String> = Vec::new();
        for (names, node, link) in entries {
            let path = names.join("/");
            // Names like `..`, and ways through files, are refused: that is their test.
            let done = match files.last() {
                Some(target) if link => tree.link(&path, target),
                _ => tree.insert(&path, node),
            };
            if done.is_ok() && tree.get(&path).is_some_and(|node| !node.is_dir()) {
                files.push(path);
            }
        }
        let image = write(&tree).unwrap();
        let back = read(&image).unwrap();
        prop_assert_eq!(crate::tree::diff(&tree, &back), vec![]);
        prop_assert!(back == tree);
        prop_assert!(write(&back).unwrap() == image);
    }
}
