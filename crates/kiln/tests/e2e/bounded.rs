//! Several builds at once on one root whose cache is small, and somebody who empties it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crate::common::{Kiln, Page, Project, leftovers};

const MIB: u64 = 1 << 20;
const CAP: &str = "24m";
const CAPPED: u64 = 24 * MIB;
const ROUNDS: usize = 6;
/// What each build adds and no other has: as a file's content, and as a layer.
const ADDED: u64 = 4 * MIB;
/// What one build may hold beyond the cap: what it adds, twice, once more while it is
/// written, and its base with its files and layers.
const HELD: u64 = 3 * ADDED + 12 * MIB;

/// Bytes on disk of the files below a folder; what goes meanwhile takes none.
fn on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => on_disk(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// What no compression makes smaller.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..ADDED / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// Builds what no build before has built, so many times.
fn build(project: &Project<'_>, first: usize, rounds: usize) {
    for seed in first..first + rounds {
        fs::write(project.folder.join("www/noise"), noise(seed as u64)).unwrap();
        project.run("build", &["--cache-size", CAP]).ok();
    }
}

/// The most bytes on disk while all projects are built so many times and `beside` is done
/// again and again.
fn most_while_building(
    kiln: &Kiln,
    projects: &[Project<'_>],
    (seed, rounds): (usize, usize),
    mut beside: impl FnMut(),
) -> u64 {
    std::thread::scope(|scope| {
        let numbered = projects.iter().enumerate();
        let builders: Vec<_> = numbered
            .map(|(number, project)| {
                scope.spawn(move || build(project, seed + number * rounds, rounds))
            })
            .collect();
        let mut most = 0;
        while builders.iter().any(|builder| !builder.is_finished()) {
            most = most.max(on_disk(&kiln.root));
            beside();
            std::thread::sleep(Duration::from_millis(20));
        }
        for builder in builders {
            builder.join().unwrap();
        }
        most
    })
}

#[test]
fn builds_at_once_keep_a_small_cache_small_and_their_images_whole() {
    let Some(kiln) = Kiln::new() else { return };
    let names = ["one", "two", "three"];
    let projects: Vec<Project<'_>> = names
        .iter()
        .map(|text| {
            let page = Page {
                text,
                ..Page::default()
            };
            kiln.page(text, &page)
        })
        .collect();
    // Those that overlap may take it to twice the cap before it is cut.
    let most = most_while_building(&kiln, &projects, (1, ROUNDS), || {});
    let bound = 2 * CAPPED + projects.len() as u64 * HELD;
    assert!(most <= bound, "{most} bytes");
    // Nor does it harm them that somebody empties it.
    let mut emptied = 0;
    most_while_building(&kiln, &projects, (1000, 3), || {
        let ran = kiln.run(&["build", "--prune"]).code(&[0, 7]);
        emptied += usize::from(ran.code == Some(0));
    });
    assert!(emptied > 0);

    kiln.run(&["fsck"]).ok();
    for (project, name) in projects.iter().zip(names) {
        project.up().ok();
        assert_eq!(project.page(), name);
        let served = project.inside("web", "wc -c < /www/noise").ok();
        assert_eq!(served.stdout.trim(), ADDED.to_string());
    }
    kiln.run(&["fsck"]).ok();
    // Once nobody builds, it is what releases need, and no more than the cap beyond it.
    kiln.run(&["build", "--prune"]).ok();
    let needed = on_disk(&kiln.root);
    projects[0].run("build", &["--cache-size", CAP]).ok();
    kiln.run(&["build", "--prune", "--cache-size", CAP]).ok();
    assert!(on_disk(&kiln.root) <= needed + CAPPED);
    let left: Vec<String> = leftovers(&kiln.root, false)
        .into_iter()
        .filter(|left| left.contains("build-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
