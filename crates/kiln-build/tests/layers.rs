//! What an instruction's layers hold, and how many they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use kiln_model::Digest;
use kiln_oci::blob::BlobWrite;
use kiln_oci::layer::{LayerItem, LayerReader, Limits, Whiteouts};
use kiln_store::Store;
use world::{World, busybox, context, sandboxes, world};

fn layers(world: &World, manifest: &Digest) -> Vec<Digest> {
    let image = world.builder.store.image(manifest).unwrap().unwrap();
    image.layers.iter().map(|layer| layer.digest).collect()
}

/// What a store makes of the image that has nothing but its blobs.
fn tree_of_blobs(world: &World, manifest: &Digest) -> Digest {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Store::open(folder.path()).unwrap();
    let image = world.builder.store.image(manifest).unwrap().unwrap();
    for blob in image.blobs().chain([*manifest]) {
        let mut file = File::open(world.builder.store.blob_path(&blob)).unwrap();
        store.write(None, &mut file).unwrap();
    }
    store.add_image(manifest).unwrap().tree
}

fn tree_of_build(world: &World, manifest: &Digest) -> Digest {
    world.builder.store.image(manifest).unwrap().unwrap().tree
}

/// 48 files of 1 MiB that don't shrink much, in as many folders.
fn much(folder: &Path) {
    let mut state = 1_u64;
    for number in 0..48 {
        let bytes: Vec<u8> = (0..1 << 17)
            .flat_map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_be_bytes()
            })
            .collect();
        let path = folder.join(format!("data/{number}/file"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn much_becomes_several_layers_of_which_a_change_makes_one_anew() {
    let folder = context(&[("small", "1")]);
    much(folder.path());
    let text = "FROM scratch\nCOPY small /small\nCOPY data /data/";
    let one = world();
    let first = one.build(folder.path(), text).unwrap();
    let before = layers(&one, &first);
    assert_eq!(
        before.len(),
        1 + 8,
        "48 MiB in parts of about 8, a power of two"
    );

    fs::write(folder.path().join("data/7/file"), "changed").unwrap();
    let second = one.build(folder.path(), text).unwrap();
    let after = layers(&one, &second);
    let (old, new): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), after.iter().collect());
    assert_eq!(new.difference(&old).count(), 1, "one file, one layer");
    assert_eq!(one.text(&second, "data/7/file"), "changed");

    for image in [&first, &second] {
        assert_eq!(tree_of_blobs(&one, image), tree_of_build(&one, image));
    }
    assert_eq!(
        world().build(folder.path(), text).unwrap(),
        second,
        "follows from the content"
    );
}

/// Of files that have not changed the digests are remembered, but a collection may have taken
/// their content away since.
#[test]
fn content_that_has_left_the_store_is_read_again() {
    let folder = context(&[("files/a", "one"), ("files/b", "two")]);
    // Of younger files nothing is remembered.
    std::thread::sleep(std::time::Duration::from_millis(1_100));
    let text = "FROM scratch\nCOPY files /files";
    let world = world();
    world.build(folder.path(), text).unwrap();
    let store = &world.builder.store;
    store.gc(&[], false).unwrap();
    assert!(!store.object_path(&Digest::of("one")).exists());

    fs::write(folder.path().join("files/b"), "other").unwrap();
    let second = world.build(folder.path(), text).unwrap();
    assert_eq!(world.text(&second, "files/a"), "one");
    assert_eq!(world.text(&second, "files/b"), "other");
    assert_eq!(
        tree_of_blobs(&world, &second),
        tree_of_build(&world, &second)
    );
}

/// So that what follows it in a later build does not unpack it.
#[test]
fn the_tree_of_a_large_step_is_remembered_and_of_a_small_one_it_is_not() {
    let folder = context(&[("small", "1"), ("last", "2")]);
    much(folder.path());
    let text = "FROM scratch\nCOPY data /data/\nCOPY small /small\nCOPY last /last";
    let world = world();
    let store = &world.builder.store;
    let first = world.build(folder.path(), text).unwrap();
    let image = store.image(&first).unwrap().unwrap();
    let diff_ids: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id).collect();
    let known = |layers: usize| {
        let chain = kiln_store::chain_id(&diff_ids[..layers]).unwrap();
        store.known_chain(&chain).unwrap()
    };
    let large = diff_ids.len() - 2;
    assert!(known(large + 1).is_none() && known(large + 2).is_some());
    let (_, tree) = known(large).expect("the tree below the small files");
    assert!(tree.get("data/7/file").is_some() && tree.get("small").is_none());
}

#[test]
fn a_layer_holds_the_folders_above_what_it_holds() {
    let folder = context(&[("a", "1")]);
    let world = world();
    let text = "FROM scratch\nCOPY --chmod=0711 --chown=7:8 a /srv/a\nCOPY a /srv/deep/er/b";
    let image = world.build(folder.path(), text).unwrap();
    let last = *layers(&world, &image).last().unwrap();
    let file = File::open(world.builder.store.blob_path(&last)).unwrap();
    let mut reader = LayerReader::new(file, Limits::IMAGE, Whiteouts::Interpret).unwrap();
    let mut paths = Vec::new();
    while let Some(LayerItem::Entry(entry)) = reader.next_entry().unwrap() {
        paths.push((String::from_utf8(entry.path).unwrap(), entry.mode));
    }
    let wanted = [
        ("srv", 0o711),
        ("srv/deep", 0o755),
        ("srv/deep/er", 0o755),
        ("srv/deep/er/b", 0o644),
    ];
    assert_eq!(paths, wanted.map(|(path, mode)| (path.to_owned(), mode)));
}

/// Hard links, also of a file of a lower layer, and folders that become files: what
/// the build says the tree is, is what anyone makes of the layers.
#[test]
fn the_layers_make_the_tree_that_the_build_went_on_with() {
    if !sandboxes() {
        return;
    }
    let (folder, head) = busybox();
    let text = format!(
        "{head}RUN mkdir -p /d/sub && echo x > /d/sub/a && ln /d/sub/a /d/sub/b\n\
         RUN ln /d/sub/a /d/c && mkfifo /d/pipe\n\
         RUN rm -r /d/sub && echo file > /d/sub\n\
         RUN mkdir /e && echo y > /e/1 && ln /e/1 /e/2\n\
         RUN ln /e/1 /e/3"
    );
    let world = world();
    let image = world.build(folder.path(), &text).unwrap();
    assert_eq!(world.text(&image, "d/sub"), "file\n");
    assert_eq!(world.text(&image, "d/c"), "x\n");
    assert_eq!(tree_of_blobs(&world, &image), tree_of_build(&world, &image));
}
