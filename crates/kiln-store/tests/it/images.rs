use std::time::Instant;

use kiln_model::Digest;
use kiln_oci::layer::EntryKind;
use kiln_oci::manifest::{Descriptor, Index, media_type};
use kiln_store::tree::{ChangeKind, Kind};
use kiln_store::{AddImageError, LayerError, Store, Tree};

use crate::support::*;

fn paths(tree: &Tree) -> Vec<String> {
    let paths = tree.walk().skip(1);
    paths
        .map(|item| String::from_utf8(item.path).unwrap())
        .collect()
}

fn applied(store: &Store, layers: &[&[Item]]) -> Tree {
    let mut tree = Tree::new();
    for items in layers {
        let layer = layer(store, items);
        tree = store
            .layer_tree(&tree, &layer.digest, Some(&layer.diff_id))
            .unwrap();
    }
    tree
}

#[test]
fn an_image_is_added_read_and_listed() {
    let (_dir, store) = store();
    let base = layer(
        &store,
        &[dir("bin"), file("bin/sh", "shell"), file("motd", "hello")],
    );
    let top = layer(
        &store,
        &[file("motd", "bye"), whiteout("bin/sh"), file("app", "app")],
    );
    let manifest = manifest(&store, &[base, top]);
    assert_eq!(store.image(&manifest).unwrap(), None);
    let image = store.add_image(&manifest).unwrap();
    assert_eq!(store.image(&manifest).unwrap().as_ref(), Some(&image));
    assert_eq!(store.add_image(&manifest).unwrap(), image);
    assert_eq!(image.config.platform, "linux/amd64");
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[1].diff_id, top.diff_id);
    let tree = store.load_tree(&image.tree).unwrap();
    assert_eq!(paths(&tree), ["app", "bin", "motd"]);
    let Kind::File { digest, size: 3 } = tree.get("motd").unwrap().kind else {
        panic!();
    };
    assert_eq!(text(store.open_object(&digest).unwrap().unwrap()), "bye");
    let images = store.images().unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!((images[0].manifest, images[0].layers), (manifest, 2));
    assert!(images[0].size > base.size + top.size);
}

#[test]
fn known_layers_are_not_read_again() {
    let (dir, store) = store();
    let base = layer(&store, &[file("base", "base")]);
    let base_image = manifest(&store, &[base]);
    let top = layer(&store, &[file("top", "top")]);
    let both = manifest(&store, &[base, top]);
    store.add_image(&base_image).unwrap();
    // Content of the same length, so that only reading it tells.
    let hex = base.digest.hex();
    let blob = dir
        .path()
        .join("store/blobs")
        .join(&hex[..2])
        .join(&hex[2..]);
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, vec![0; base.size as usize]).unwrap();
    let image = store.add_image(&both).unwrap();
    assert_eq!(
        paths(&store.load_tree(&image.tree).unwrap()),
        ["base", "top"]
    );
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let (_dir, store) = store();
    let image = store.add_image(&manifest(&store, &[])).unwrap();
    assert_eq!(store.load_tree(&image.tree).unwrap(), Tree::new());
}

#[test]
fn what_is_no_complete_image_is_refused() {
    let (dir, store) = store();
    let good = layer(&store, &[file("a", "a")]);
    let whole = manifest(&store, &[good]);
    let refused = |digest: &Digest| store.add_image(digest).unwrap_err();

    assert!(matches!(
        refused(&Digest::of("absent")),
        AddImageError::Blob(_)
    ));
    let text = put_blob(&store, "hello");
    assert!(matches!(refused(&text), AddImageError::Manifest { .. }));
    let entry = Descriptor::new(media_type::OCI_MANIFEST, whole, 1);
    let index = put_blob(&store, Index::new(vec![entry]).to_bytes());
    assert!(matches!(refused(&index), AddImageError::Index { .. }));

    let mut lying = good;
    lying.diff_id = Digest::of("something else");
    let error = refused(&manifest(&store, &[lying]));
    assert!(
        matches!(error, AddImageError::Layer(LayerError::Read { .. })),
        "{error}"
    );
    let mut longer = good;
    longer.size += 1;
    let error = refused(&manifest(&store, &[longer]));
    assert!(matches!(error, AddImageError::BlobSize { .. }), "{error}");

    let hex = good.digest.hex();
    std::fs::remove_file(
        dir.path()
            .join("store/blobs")
            .join(&hex[..2])
            .join(&hex[2..]),
    )
    .unwrap();
    let error = refused(&whole);
    assert!(
        matches!(error, AddImageError::MissingBlob { .. }),
        "{error}"
    );
    assert_eq!(store.images().unwrap(), []);
}

#[test]
fn deletions_are_about_lower_layers_whatever_their_order() {
    let (_dir, store) = store();
    let tree = applied(
        &store,
        &[
            &[
                dir("a"),
                file("a/old", "1"),
                file("a/same", "1"),
                dir("b"),
                file("b/old", "1"),
                file("c", "1"),
            ],
            &[
                file("a/same", "2"),
                whiteout("a/same"),
                whiteout("a/old"),
                dir("b"),
                file("b/new", "2"),
                Item::Opaque(b"b".to_vec()),
                whiteout("c"),
                dir("c"),
                whiteout("never/there"),
            ],
        ],
    );
    assert_eq!(paths(&tree), ["a", "a/same", "b", "b/new", "c"]);
    assert!(tree.get("c").unwrap().is_dir());
}

#[test]
fn links_keep_and_lose_names_as_files_do() {
    let (_dir, store) = store();
    let tree = applied(
        &store,
        &[
            &[
                file("one", "1"),
                hardlink("two", "one"),
                hardlink("sub/three", "two"),
            ],
            &[
                file("one", "changed"),
                hardlink("four", "two"),
                hardlink("two", "two"),
            ],
        ],
    );
    let links = |path: &str| tree.walk().find(|i| i.path == path.as_bytes()).unwrap();
    assert_eq!(links("one").links, 1);
    assert_eq!(links("two").links, 3);
    assert_eq!(links("four").inode, links("sub/three").inode);
}

#[test]
fn parents_that_are_links_lead_inside_the_tree() {
    let (_dir, store) = store();
    let tree = applied(
        &store,
        &[
            &[
                dir("usr"),
                dir("usr/lib"),
                symlink("lib", "usr/lib"),
                symlink("abs", "/usr"),
                symlink("out", "../../../../etc"),
                symlink("usr/up", ".."),
                symlink("dangling", "made/here"),
            ],
            &[
                file("lib/a", "1"),
                file("abs/b", "1"),
                file("out/passwd", "evil"),
                file("usr/up/c", "1"),
                file("dangling/d", "1"),
                hardlink("e", "lib/a"),
                whiteout("lib/../usr/none"),
            ][..6],
            &[whiteout("abs/b"), dir("lib")],
        ],
    );
    let expected = [
        "abs",
        "c",
        "dangling",
        "e",
        "etc",
        "etc/passwd",
        "lib",
        "made",
        "made/here",
        "made/here/d",
        "out",
        "usr",
        "usr/lib",
        "usr/lib/a",
        "usr/up",
    ];
    assert_eq!(paths(&tree), expected);
    assert!(
        tree.get("lib").unwrap().is_dir(),
        "an entry at a link replaces it"
    );
}

#[test]
fn hostile_layers_are_refused_with_their_path() {
    let (_dir, store) = store();
    let refuse = |items: &[Item]| {
        let layer = layer(&store, items);
        let error = store.layer_tree(&Tree::new(), &layer.digest, None);
        error.unwrap_err().to_string()
    };
    let error = refuse(&[hardlink("a", "missing")]);
    assert!(
        error.contains("`a` is a hard link to `missing`, which does not exist"),
        "{error}"
    );
    let error = refuse(&[dir("d"), hardlink("a", "d")]);
    assert!(error.contains("which is a directory"), "{error}");
    let error = refuse(&[symlink("loop", "loop"), file("loop/x", "")]);
    assert!(error.contains("symbolic links"), "{error}");
    let error = refuse(&[file("f", ""), file("f/x", "")]);
    assert!(
        error.contains("`f/x` leads through something that is not a directory"),
        "{error}"
    );
    // Links that double a path at each step would lead to one of any length.
    let deep = vec!["d".repeat(200); 15].join("/");
    let error = refuse(&[
        dir(&deep),
        symlink("l", &deep),
        file(&format!("l/{deep}"), ""),
    ]);
    assert!(error.contains("4095"), "{error}");
    // Without looking at the kernel's own names.
    let major = 0x1000;
    let error = refuse(&[entry("dev", 0o600, EntryKind::Block { major, minor: 0 })]);
    assert!(error.contains("`dev` can't be in an image"), "{error}");
}

#[test]
fn what_linux_cannot_hold_is_left_out() {
    let (_dir, store) = store();
    let mut mac = bare("mac", 0o644, EntryKind::File { size: 0 });
    mac.xattrs.insert(b"com.apple.provenance".to_vec(), vec![1]);
    mac.xattrs.insert(b"user.kept".to_vec(), vec![2]);
    let marks = [(0, 0), (1, 3)].map(|(major, minor)| EntryKind::Char { major, minor });
    let [mark, null] = marks;
    let tree = applied(
        &store,
        &[
            &[file("gone", "1"), Item::Entry(mac, Vec::new())],
            &[entry("gone", 0, mark), entry("null", 0o666, null)],
        ],
    );
    assert_eq!(paths(&tree), ["mac", "null"]);
    let xattrs = &tree.get("mac").unwrap().meta.xattrs;
    assert_eq!(xattrs.keys().collect::<Vec<_>>(), [b"user.kept"]);
}

#[test]
fn a_tree_needs_its_objects() {
    let (_dir, store) = store();
    let mut tree = applied(&store, &[&[file("a", "content of a")]]);
    let digest = store.write_tree(&tree).unwrap();
    assert_eq!(store.load_tree(&digest).unwrap(), tree);
    assert_eq!(store.write_tree(&tree).unwrap(), digest);
    let mut node = tree.get("a").unwrap().clone();
    node.kind = Kind::File {
        digest: Digest::of("absent"),
        size: 6,
    };
    tree.insert("b", node).unwrap();
    let error = store.write_tree(&tree).unwrap_err();
    assert!(
        error.to_string().starts_with("`b` has the content"),
        "{error}"
    );
}

#[test]
fn trees_are_compared_by_path() {
    let (_dir, store) = store();
    let base = [
        dir("d"),
        file("d/same", "1"),
        file("d/was", "1"),
        file("d-c", "1"),
        file("m", "1"),
    ];
    let before = applied(&store, &[&base]);
    let mut executable = bare("m", 0o755, EntryKind::File { size: 1 });
    executable.mtime += 1;
    let top = [
        whiteout("d/was"),
        file("d-d", "1"),
        Item::Entry(executable, b"2".into()),
    ];
    let after = applied(&store, &[&base, &top]);
    let changes = Store::diff(&before, &after);
    let shown: Vec<String> = (changes.iter())
        .map(|change| {
            let path = String::from_utf8_lossy(&change.path);
            match &change.kind {
                ChangeKind::Added(_) => format!("+{path}"),
                ChangeKind::Removed(_) => format!("-{path}"),
                ChangeKind::Modified { what, .. } => format!("{path} {what:?}"),
            }
        })
        .collect();
    assert_eq!(shown, ["-d/was", "+d-d", "m [Content, Mode, Mtime]"]);
    assert_eq!(Store::diff(&after, &after), vec![]);
}

/// Not a bound on time (the machine is shared): says what it took.
#[test]
fn five_thousand_files_are_taken_in() {
    let (_dir, store) = store();
    let items: Vec<Item> = (0..5000)
        .map(|n| {
            file(
                &format!("usr/share/{}/file-{n}", n % 100),
                &format!("{n}").repeat(300),
            )
        })
        .collect();
    let layer = layer(&store, &items);
    let start = Instant::now();
    let tree = store.layer_tree(&Tree::new(), &layer.digest, None).unwrap();
    let imported = start.elapsed();
    let start = Instant::now();
    let digest = store.write_tree(&tree).unwrap();
    let written = start.elapsed();
    let start = Instant::now();
    assert_eq!(store.load_tree(&digest).unwrap().len(), 5102);
    let loaded = start.elapsed();
    println!("5,000 files: import {imported:?}, tree written {written:?}, read {loaded:?}");
}
