//! A second build in other conditions, and what it tells of the first.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kiln_build::build::{Difference, prepare};
use world::{World, busybox, sandboxes, working, world};

/// Builds as usual and verifies.
fn verify(world: &World, folder: &Path, text: &str) -> Vec<Difference> {
    let first = world.build(folder, text).unwrap();
    let prepared = prepare(world.request(folder, text)).unwrap();
    let verified = world
        .builder
        .build_again(&prepared, &BTreeMap::new(), &first);
    let left = working(world.root.path());
    assert!(
        left.is_empty(),
        "nothing of the second build stays: {left:?}"
    );
    verified.unwrap()
}

#[test]
fn an_image_that_is_the_same_again_has_no_differences() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}RUN date > /dev/null && mkdir /d && touch /d/a && ln /d/a /d/b && hostname > /h\n\
         FROM base AS one\nRUN echo 1 > /one\nFROM base AS two\nRUN umask > /two\n\
         FROM base\nCOPY --from=one /one /\nCOPY --from=two /two /"
    );
    let one = world();
    assert_eq!(verify(&one, folder.path(), &text), []);
    let (_, done) = one.seen.counts();
    assert_eq!(done, 16, "the second time nothing is from the cache");
}

#[test]
fn what_differs_is_told_with_its_instruction_and_how() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}RUN echo same > /same; echo time $(date +%s%N) > /time; touch /made.$(date +%s%N)\n\
         RUN cat /proc/self/status | grep Cpus_allowed_list > /cpus\n\
         RUN echo more >> /time\n\
         FROM base AS last\nCOPY f /f"
    );
    let one = world();
    let told = verify(&one, folder.path(), &text);
    let of = |path: &str| {
        let mut found = told.iter().filter(|d| d.path == path);
        let only = found.next().unwrap_or_else(|| panic!("{path}: {told:?}"));
        assert_eq!(found.count(), 0, "once, where it began: {told:?}");
        only
    };
    let time = of("/time");
    assert!(time.instruction.contains("echo same"), "{time:?}");
    assert!(time.how.starts_with("content from byte "), "{time:?}");
    assert!(told.iter().all(|d| d.path != "/same"), "{told:?}");
    let made: Vec<&str> = told
        .iter()
        .filter(|d| d.path.starts_with("/made."))
        .map(|d| d.how.as_str())
        .collect();
    let only = |time| format!("is there only the {time} time");
    assert_eq!(made, [only("first"), only("second")]);
    if std::thread::available_parallelism().unwrap().get() > 1 {
        assert!(of("/cpus").instruction.contains("Cpus_allowed_list"));
    }
}

#[test]
fn why_a_file_differs_is_told_where_its_content_shows_it() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}FROM base AS maker\nRUN mkdir /out && cd /out && date > date && \
         cat /proc/sys/kernel/random/uuid > uuid && seq 99 | shuf > lines && \
         seq 99 | shuf | tr '\\n' ' ' > words && date +%s%N > x && \
         tar -cf archive.tar date && rm date && date > date && \
         head -c 99 /dev/urandom > bytes && touch -d @$(date +1%s) set && touch made.$(date +%s)\n\
         FROM base\nCOPY --from=maker /out /out\nRUN true\n"
    );
    let told = verify(&world(), folder.path(), &text);
    let of = |path: &str| {
        let path = format!("/out/{path}");
        let mut found = told.iter().filter(|d| d.path == path);
        let first = found.next().unwrap_or_else(|| panic!("{path}: {told:?}"));
        assert_eq!(first.stage.as_deref(), Some("maker"), "{first:?}");
        assert!(first.instruction.starts_with("RUN"), "{first:?}");
        // What took it from there is named, too.
        let second = found.next().unwrap();
        assert!(second.instruction.starts_with("COPY"), "{second:?}");
        first.why
    };
    for (path, expected) in [
        ("date", Some("the time of the build")),
        ("uuid", Some("random")),
        ("lines", Some("the same lines in another order")),
        ("words", Some("the same words in another order")),
        ("x", Some("the time of the build")),
        ("archive.tar", Some("times within a tar archive")),
        ("bytes", None),
        ("set", Some("a time that the command gave it")),
    ] {
        let why = of(path);
        let fits = match expected {
            Some(expected) => why.is_some_and(|why| why.starts_with(expected)),
            None => why.is_none(),
        };
        assert!(fits, "{path}: {why:?}");
    }
    let made = told.iter().find(|d| d.path.starts_with("/out/made."));
    let why = made.unwrap().why.unwrap();
    assert!(why.starts_with("the time of the build"), "{why}");
}

#[test]
fn what_a_killed_second_build_left_goes_with_the_next() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let run = one.root.path().join("cache/run/verify-abcdef/run");
    for left in ["build-abcdef/upper", "apart-3/build-abcdef/upper"] {
        fs::create_dir_all(run.join(left)).unwrap();
    }
    one.build(folder.path(), &base).unwrap();
    assert!(working(one.root.path()).is_empty());
}
