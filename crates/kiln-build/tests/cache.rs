//! The build cache is kept to its cap, and what is needed stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use kiln_build::cache::{CacheError, Pruned, Pruning, in_use, is_overfull, prune};
use kiln_build::network::host_resolver;
use kiln_model::Digest;
use kiln_store::GcError;
use kiln_store::tree::Kind;
use world::{Seen, World, builder, context, world};

const SIZE: u64 = 1 << 20;
const DAY: Duration = Duration::from_secs(86_400);

/// Bytes that no compression makes smaller, as text.
fn noise(seed: &str) -> String {
    let mut text = String::new();
    while text.len() < SIZE as usize {
        text.push_str(&Digest::of(format!("{seed}{}", text.len())).hex());
    }
    text
}

fn cache(world: &World) -> PathBuf {
    world.builder.cache.clone()
}

fn try_to_cut(world: &World, cap: u64) -> Result<Option<Pruned>, CacheError> {
    prune(&Pruning {
        store: &world.builder.store,
        cache: &cache(world),
        running: &[],
        cap,
        dry_run: false,
    })
}

fn cut(world: &World, cap: u64) -> Option<Pruned> {
    try_to_cut(world, cap).unwrap()
}

/// The results that are remembered, and when each was used last.
fn steps(world: &World) -> Vec<PathBuf> {
    let steps = fs::read_dir(cache(world).join("steps")).unwrap();
    steps.map(|entry| entry.unwrap().path()).collect()
}

fn age(path: &Path, days: u32) {
    let file = fs::File::open(path).unwrap();
    file.set_modified(SystemTime::now() - DAY * days).unwrap();
}

/// Is everything there that starting it needs?
fn is_whole(world: &World, manifest: &Digest) -> bool {
    let store = &world.builder.store;
    let Some(image) = store.image(manifest).unwrap() else {
        return false;
    };
    let tree = store.load_tree(&image.tree).unwrap();
    tree.walk().all(|item| match item.node.kind {
        Kind::File { digest, .. } => store.object_path(&digest).is_file(),
        _ => true,
    })
}

#[test]
fn what_a_release_needs_stays_and_the_rest_goes_when_the_cap_is_nothing() {
    let one = world();
    let folder = context(&[("a", &noise("a")), ("b", &noise("b"))]);
    let kept = one
        .build(folder.path(), "FROM scratch\nCOPY a /\n")
        .unwrap();
    let other = one
        .build(folder.path(), "FROM scratch\nCOPY b /\n")
        .unwrap();
    one.builder.store.set_ref("release/e/1/web", &kept).unwrap();
    for folder in ["reasons", "tests", "mounts/one", "debian"] {
        let folder = cache(&one).join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("x"), noise(folder.to_str().unwrap())).unwrap();
    }
    let whole = cut(&one, u64::MAX).unwrap();
    // Four files of the cache; of the other image its content, and its layer of about half.
    assert!(
        whole.before > 5 * SIZE && whole.before < 7 * SIZE,
        "{whole:?}"
    );
    assert_eq!((whole.kept, whole.entries), (whole.before, 0));
    let pruned = cut(&one, 0).unwrap();
    assert_eq!((pruned.before, pruned.kept), (whole.before, 0));
    assert!(is_whole(&one, &kept) && !is_whole(&one, &other));
    assert_eq!(steps(&one).len(), 0);
    for gone in ["reasons", "tests", "mounts", "debian"] {
        let left = fs::read_dir(cache(&one).join(gone)).unwrap();
        assert_eq!(left.count(), 0, "{gone}");
    }
    assert_eq!(cut(&one, 0).unwrap().before, 0);
}

#[test]
fn contents_go_before_layers_and_are_made_again_from_them() {
    let one = world();
    let folder = context(&[("a", &noise("a")), ("b", "b")]);
    let text = "FROM scratch\nCOPY a /\n";
    let first = one.build(folder.path(), text).unwrap();
    let before = cut(&one, u64::MAX).unwrap().before;
    let pruned = cut(&one, before - 1).unwrap();
    assert_eq!(pruned.entries, 0, "{pruned:?}");
    assert!(pruned.kept < before - SIZE && !is_whole(&one, &first));
    one.seen.counts();
    // The layer is taken from the cache; what comes after it sees its files.
    let more = format!("{text}COPY b /\n");
    let second = one.build(folder.path(), &more).unwrap();
    assert_eq!(one.seen.counts(), (1, 1));
    assert!(is_whole(&one, &second));
    assert_eq!(one.text(&second, "a"), noise("a"));
    assert_eq!(one.build(folder.path(), text).unwrap(), first);
}

#[test]
fn the_cap_is_kept_by_what_was_not_used_for_longest() {
    let one = world();
    let folder = context(&[("a", &noise("a")), ("b", &noise("b"))]);
    let text = |file: &str| format!("FROM scratch\nCOPY {file} /\n");
    one.build(folder.path(), &text("a")).unwrap();
    let a = steps(&one);
    one.build(folder.path(), &text("b")).unwrap();
    steps(&one).iter().for_each(|step| age(step, 300));
    // Using it makes it young again.
    one.build(folder.path(), &text("a")).unwrap();
    let pruned = cut(&one, SIZE).unwrap();
    assert!(pruned.kept <= SIZE, "{pruned:?}");
    assert_eq!(steps(&one), a);
    one.seen.counts();
    one.build(folder.path(), &text("a")).unwrap();
    one.build(folder.path(), &text("b")).unwrap();
    assert_eq!(one.seen.counts(), (1, 1));
}

#[test]
fn what_a_running_build_uses_or_a_lease_protects_stays() {
    let one = world();
    let folder = context(&[("a", &noise("a"))]);
    let lease = one.builder.store.lease().unwrap();
    let built = one
        .build(folder.path(), "FROM scratch\nCOPY a /\n")
        .unwrap();
    let using = in_use(&cache(&one)).unwrap();
    assert!(cut(&one, 0).is_none());
    assert_eq!(steps(&one).len(), 1);
    drop(using);
    assert!(cut(&one, 0).is_some());
    assert!(is_whole(&one, &built));
    drop(lease);
    let running = Pruning {
        store: &one.builder.store,
        cache: &cache(&one),
        running: &[built],
        cap: 0,
        dry_run: false,
    };
    prune(&running).unwrap();
    assert!(is_whole(&one, &built));
    cut(&one, 0);
    assert!(!is_whole(&one, &built));
}

#[test]
fn what_killed_tests_and_bases_have_left_is_taken_away() {
    let one = world();
    let scratch = cache(&one).join("run");
    let left = ["test-abc123", "base-abc123"].map(|name| scratch.join(name));
    let others = scratch.join("someone");
    for folder in left.iter().chain([&others]) {
        fs::create_dir_all(folder.join("upper")).unwrap();
    }
    kiln_build::exec::sweep(&cache(&one), &one.builder.runtime).unwrap();
    assert_eq!(left.map(|folder| folder.exists()), [false, false]);
    assert!(others.exists());
}

/// Bytes on disk of the files in a folder; what is removed meanwhile takes none.
fn on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => on_disk(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Cuts as a command does: somebody else may be at it.
fn cut_if_free(world: &World, cap: u64) -> bool {
    match try_to_cut(world, cap) {
        Err(CacheError::Gc(GcError::Busy)) => false,
        other => other.unwrap().is_some(),
    }
}

/// A handle of its own on the same folders, as another process has it.
fn beside(one: &World) -> World {
    let seen = Arc::new(Seen::default());
    World {
        root: tempfile::tempdir().unwrap(),
        builder: builder(one.root.path(), seen.clone(), host_resolver()),
        seen,
        images: Default::default(),
    }
}

const BUILDERS: usize = 4;
const ROUNDS: usize = 12;
const CAP: u64 = 6 * SIZE;
/// What a build holds at most: its file as content, as layer, and unfinished.
const HELD: u64 = 4 * SIZE;

/// Builds what no other builds, as a command does: with room made before and after.
fn build_all(one: &World, number: usize) {
    let own = beside(one);
    for round in 0..ROUNDS {
        let seed = format!("{number} {round}");
        let folder = context(&[("a", &noise(&seed)), ("b", &noise("all have it"))]);
        while is_overfull(&cache(&own)) && !cut_if_free(&own, CAP) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let lease = own.builder.store.lease().unwrap();
        let file = "FROM scratch\nCOPY b /\nCOPY a /\n";
        let built = own.build(folder.path(), file).unwrap();
        assert!(is_whole(&own, &built), "{seed}");
        assert_eq!(own.text(&built, "a"), noise(&seed));
        drop(lease);
        cut_if_free(&own, CAP);
    }
}

/// The most bytes that all of them took on disk, while `beside` was done again and again.
fn most_while_building(one: &World, beside: impl Fn()) -> u64 {
    std::thread::scope(|scope| {
        let builders: Vec<_> = (0..BUILDERS)
            .map(|number| scope.spawn(move || build_all(one, number)))
            .collect();
        let mut most = 0;
        while builders.iter().any(|builder| !builder.is_finished()) {
            beside();
            most = most.max(on_disk(one.root.path()));
            std::thread::sleep(Duration::from_millis(5));
        }
        for builder in builders {
            builder.join().unwrap();
        }
        most
    })
}

#[test]
fn builds_that_overlap_without_end_keep_the_cache_below_twice_its_cap_and_what_they_hold() {
    let one = world();
    let most = most_while_building(&one, || {});
    assert!(most <= 2 * CAP + BUILDERS as u64 * HELD, "{most} bytes");
    assert!(cut_if_free(&one, CAP));
    let kept = on_disk(one.root.path());
    assert!(kept <= CAP, "{kept} bytes");
    let report = one.builder.store.fsck(false).unwrap();
    assert!(report.checked > 0 && report.bad.is_empty(), "{report:?}");
}

#[test]
fn builds_are_whole_while_others_empty_the_cache() {
    let one = world();
    let other = beside(&one);
    let emptied = AtomicUsize::new(0);
    most_while_building(&one, || {
        emptied.fetch_add(usize::from(cut_if_free(&other, 0)), Ordering::Relaxed);
    });
    assert!(emptied.load(Ordering::Relaxed) > 0);
    let report = one.builder.store.fsck(false).unwrap();
    assert!(
        report.bad.is_empty() && report.lost.is_empty(),
        "{report:?}"
    );
}

#[test]
fn a_cache_at_twice_its_cap_that_others_use_is_marked_until_it_is_cut() {
    let one = world();
    let folder = context(&[("a", &noise("a")), ("b", &noise("b"))]);
    one.build(folder.path(), "FROM scratch\nCOPY a b /\n")
        .unwrap();
    let held = cut(&one, u64::MAX).unwrap().before;
    let using = in_use(&cache(&one)).unwrap();
    assert!(!cut_if_free(&one, held / 2 + 1) && !is_overfull(&cache(&one)));
    assert!(!cut_if_free(&one, held / 2 - 1) && is_overfull(&cache(&one)));
    drop(using);
    assert!(cut_if_free(&one, held) && !is_overfull(&cache(&one)));
}
