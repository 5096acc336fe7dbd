#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kiln_model::Digest;
use proptest::prelude::*;

use super::*;

fn file(content: &str) -> Node {
    Node::plain(
        0o644,
        Kind::File {
            digest: Digest::of(content),
            size: content.len() as u64,
        },
    )
}

fn symlink(target: &str) -> Node {
    let target = target.into();
    Node::plain(0o777, Kind::Symlink { target })
}

/// What the counters must be, counted anew.
fn recount(tree: &Tree) -> (usize, usize) {
    let mut seen = std::collections::BTreeSet::new();
    let mut names = 0;
    let mut bytes = 0;
    for item in tree.walk() {
        let name = item.path.rsplit(|b| *b == b'/').next().unwrap();
        names += usize::from(!item.path.is_empty());
        bytes += name.len();
        if seen.insert(item.inode) {
            bytes += item
                .node
                .meta
                .xattrs
                .iter()
                .map(|(k, v)| k.len() + v.len())
                .sum::<usize>();
            if let Kind::Symlink { target } = &item.node.kind {
                bytes += target.len();
            }
        }
    }
    (names, bytes)
}

#[test]
fn a_name_is_replaced_whole_but_a_directory_keeps_its_content() {
    let mut tree = Tree::new();
    tree.insert("/a//b/./c/", file("c")).unwrap();
    assert_eq!(tree.get("a/b/c"), Some(&file("c")));
    tree.insert("a", Node::dir(0o700)).unwrap();
    assert_eq!((tree.get("a").unwrap().meta.mode, tree.len()), (0o700, 3));
    tree.insert("a", file("a")).unwrap();
    assert_eq!((tree.get("a"), tree.len()), (Some(&file("a")), 1));
    assert!(tree.get("a/b").is_none());
    tree.insert("", Node::dir(0o711)).unwrap();
    assert_eq!(tree.root().meta.mode, 0o711);
    assert!(tree.insert("/", file("")).is_err());
}

#[test]
fn lookups_follow_links_inside_only() {
    let mut tree = Tree::new();
    tree.insert("etc/passwd", file("p")).unwrap();
    tree.insert("usr/lib", Node::dir(0o755)).unwrap();
    for (path, target) in [
        ("up", "../../.."),
        ("abs", "/etc"),
        ("usr/rel", "../etc"),
        ("chain", "usr/rel"),
        ("loop", "loop2"),
        ("loop2", "loop"),
        ("file", "etc/passwd"),
        ("dangling", "none"),
    ] {
        tree.insert(path, symlink(target)).unwrap();
    }
    for path in [
        "up/etc/passwd",
        "abs/passwd",
        "usr/rel/passwd",
        "chain/passwd",
        "file",
    ] {
        let (canonical, node) = tree.resolve(path).unwrap();
        assert_eq!(
            (&*canonical, node),
            (&b"etc/passwd"[..], &file("p")),
            "{path}"
        );
    }
    assert_eq!(tree.get("file"), Some(&symlink("etc/passwd")));
    assert_eq!(tree.resolve("../../usr/lib/..").unwrap().0, b"usr");
    let error = |path: &str| tree.resolve(path).unwrap_err();
    assert!(matches!(error("loop"), LookupError::TooManyLinks { .. }));
    assert!(matches!(error("loop/x"), LookupError::TooManyLinks { .. }));
    assert!(matches!(error("dangling"), LookupError::NotFound { .. }));
    assert!(matches!(error("file/x"), LookupError::NotADirectory { .. }));
    let names: Vec<&[u8]> = tree
        .children("usr")
        .unwrap()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, [&b"lib"[..], b"rel"]);
}

#[test]
fn mount_points_are_made_where_nothing_is() {
    let mut tree = Tree::new();
    tree.insert("usr/lib", Node::dir(0o700)).unwrap();
    tree.insert("lib", symlink("usr/lib")).unwrap();
    tree.insert("var", symlink("not/yet")).unwrap();
    tree.insert("file", file("")).unwrap();
    for path in ["/lib", "/lib/a/b", "/var", "/", "x"] {
        tree.make_dirs(path).unwrap();
        assert!(tree.resolve(path).unwrap().1.is_dir(), "{path}");
    }
    assert_eq!(tree.get("usr/lib").unwrap().meta.mode, 0o700);
    assert!(tree.get("usr/lib/a/b").is_some() && tree.get("not/yet").is_some());
    assert_eq!(tree.get("lib"), Some(&symlink("usr/lib")));
    let error = tree.make_dirs("file").unwrap_err();
    let expected = LookupError::NotADirectory {
        path: b"file".into(),
    };
    assert_eq!(error, expected.into());
}

#[test]
fn a_long_way_round_is_bounded() {
    let mut tree = Tree::new();
    tree.insert("d", Node::dir(0o755)).unwrap();
    let round = "d/../".repeat(800);
    for n in 0..30 {
        let target = format!("{round}l{}", n + 1);
        tree.insert(format!("l{n}"), symlink(&target)).unwrap();
    }
    let error = tree.resolve("l0").unwrap_err();
    assert!(matches!(error, LookupError::TooManyLinks { .. }), "{error}");
}

#[test]
fn what_no_image_can_hold_is_refused() {
    let mut tree = Tree::new();
    let long = "x".repeat(256);
    let deep = "x/".repeat(2048);
    for path in ["a/../b", "nul\0", &long, &deep] {
        let error = tree.insert(path, file("")).unwrap_err();
        assert!(matches!(error, TreeEditError::Path { .. }), "{error}");
    }
    let mut bad = vec![
        Node::plain(0o10000, Kind::Fifo),
        Node::plain(0, Kind::Char { major: 0, minor: 0 }),
        Node::plain(
            0,
            Kind::Block {
                major: 0,
                minor: 0x10_0000,
            },
        ),
        symlink(""),
        symlink(&"x".repeat(4096)),
        Node::plain(
            0,
            Kind::File {
                digest: Digest::of(""),
                size: MAX_FILE_BYTES + 1,
            },
        ),
    ];
    for (name, length) in [
        ("user.x", 65536),
        ("other.x", 1),
        ("user.", 1),
        ("system.x", 1),
    ] {
        let mut node = file("");
        node.meta.xattrs.insert(name.into(), vec![0; length]);
        bad.push(node);
    }
    let mut many = file("");
    for name in ["user.a", "user.b", "user.c"] {
        many.meta.xattrs.insert(name.into(), vec![0; 60_000]);
    }
    bad.push(many);
    for node in bad {
        let error = tree.insert("node", node).unwrap_err();
        assert!(matches!(error, TreeEditError::Node { .. }), "{error}");
    }
    assert_eq!(tree, Tree::new());
}

#[test]
fn counts_are_bounded() {
    let mut tree = Tree::new();
    tree.insert("there", file("")).unwrap();
    tree.entries = MAX_ENTRIES;
    assert_eq!(
        tree.insert("more", file("")),
        Err(TreeEditError::TooManyEntries)
    );
    assert_eq!(
        tree.link("more", "there"),
        Err(TreeEditError::TooManyEntries)
    );
    tree.entries = 1;
    tree.metadata_bytes = MAX_METADATA_BYTES - 3;
    assert_eq!(
        tree.insert("more", file("")),
        Err(TreeEditError::TooMuchMetadata)
    );
    let mut root = Node::dir(0o755);
    root.meta.xattrs.insert(b"user.x".into(), vec![1]);
    assert_eq!(tree.insert("", root), Err(TreeEditError::TooMuchMetadata));
    tree.insert("mor", file("")).unwrap();
}

proptest! {
    /// Whatever is done, in whatever order, the counters agree with the tree, and
    /// nothing panics.
    #[test]
    fn counters_follow_every_change(
        changes in prop::collection::vec(
            (0..5u8, "[ab]{1,2}(/[abl]{1,2}){0,3}", "[ab]{1,2}(/[ab]{1,2}){0,2}|\\.\\./l|/"),
            0..80,
        )
    ) {
        let mut tree = Tree::new();
        for (what, path, other) in changes {
            let _ = match what {
                0 => tree.insert(&path, file(&other)),
                1 => tree.insert(&path, Node::dir(0o755)),
                2 => tree.insert(&path, symlink(&other)),
                3 => tree.link(&path, &other),
                _ => tree.remove(&path).map(drop),
            };
            prop_assert_eq!((tree.entries, tree.metadata_bytes), recount(&tree));
            for item in tree.walk() {
                prop_assert!(item.links > 0);
                prop_assert!(tree.get(&item.path) == Some(item.node));
            }
        }
        tree.remove("").unwrap();
        prop_assert_eq!((tree.entries, tree.metadata_bytes), (0, 0));
        prop_assert_eq!(tree.free.len() + 1, tree.inodes.len());
    }
}
