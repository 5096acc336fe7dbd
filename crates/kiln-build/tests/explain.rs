//! Why instructions were not taken from the cache, as it is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;

use kiln_build::build::BuildRequest;
use world::{busybox, context, sandboxes, world};

const NEW: &str = "the instruction is new here, or written otherwise";
const BEFORE: &str = "changed: what stands before it";

#[test]
fn changed_limits_of_a_command_are_named() {
    if !sandboxes() {
        return;
    }
    let (folder, text) = busybox();
    let world = world();
    let built = |files: i64| {
        let change = |request: &mut BuildRequest| {
            let ulimits = &mut request.build.ulimits;
            ulimits.insert("nofile".into(), (files, files));
        };
        world.build_with(folder.path(), &text, change).unwrap();
        world.seen.reasons()
    };
    built(100);
    let told = ["changed: the ulimit nofile", BEFORE];
    assert_eq!(built(101), told);
}

#[test]
fn what_changed_of_a_copy_is_named() {
    let folder = context(&[("d/a", "1"), ("d/b", "1"), ("d/c", "1"), ("e", "1")]);
    let world = world();
    let text = "FROM scratch\nCOPY d /d\nCOPY e /e\nCOPY e /e";
    let built = |text: &str| {
        world.build(folder.path(), text).unwrap();
        world.seen.reasons()
    };
    assert_eq!(built(text), [NEW; 3]);
    assert_eq!(built(text), [""; 0]);
    fs::write(folder.path().join("d/a"), "2").unwrap();
    fs::remove_file(folder.path().join("d/c")).unwrap();
    fs::write(folder.path().join("d/new"), "1").unwrap();
    let told = built(text);
    assert_eq!(told[0], "changed: d/a; new: d/new; gone: d/c");
    assert_eq!(told[1..], [BEFORE; 2]);
    let moved = text.replace("COPY e /e\nCOPY e /e", "COPY e /f");
    assert_eq!(built(&moved), [NEW]);
    // One instruction's words, to which a variable gives another meaning.
    let owned = |id: &str| {
        let text = "FROM scratch\nARG ID\nCOPY --chown=$ID e /e";
        let given = |request: &mut BuildRequest| {
            request.build.args.insert("ID".into(), id.into());
        };
        world.build_with(folder.path(), text, given).unwrap();
        world.seen.reasons()
    };
    assert_eq!(owned("1"), [NEW]);
    assert_eq!(owned("2"), ["changed: the owner"]);
    // Twins are told apart, also when the first is now another's.
    fs::write(folder.path().join("e"), "2").unwrap();
    assert_eq!(
        built(text),
        ["changed: e", "changed: e, what stands before it"]
    );
}

#[test]
fn what_changed_of_a_command_is_named() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let world = world();
    let text = format!("{base}ARG V\nENV W=1\nRUN --mount=type=bind,source=f,target=/in true");
    let built = |change: &dyn Fn(&mut BuildRequest)| {
        let change = |request: &mut BuildRequest| change(request);
        world.build_with(folder.path(), &text, change).unwrap();
        world.seen.reasons()
    };
    assert_eq!(built(&|_| {}).len(), 4);
    let given = |request: &mut BuildRequest| {
        request.build.args.insert("V".into(), "2".into());
    };
    assert_eq!(built(&given), ["new: $V"]);
    fs::write(folder.path().join("f"), "other").unwrap();
    assert_eq!(built(&given), ["changed: the mount /in"]);
    let outside = |request: &mut BuildRequest| {
        given(request);
        request.build.network = "host".into();
    };
    let told = built(&outside);
    assert_eq!(
        told.last().unwrap(),
        "changed: the network, what stands before it"
    );
    // The same words, under another shell and as somebody else.
    let other = |before: &str| {
        let text = text.replace("ARG V", &format!("ARG V\n{before}"));
        world.build_with(folder.path(), &text, outside).unwrap();
        world.seen.reasons()
    };
    let shell = "SHELL [\"/bin/busybox\", \"sh\", \"-ec\"]";
    assert_eq!(other(shell), ["changed: the command"]);
    assert_eq!(other("USER web"), ["changed: the command, the user"]);
    let never = |request: &mut BuildRequest| request.build.no_cache = true;
    assert_eq!(built(&never), ["no_cache asks for it"; 4]);
}

#[test]
fn a_result_that_is_gone_is_told_as_such() {
    let folder = context(&[("a", "1")]);
    let world = world();
    let text = "FROM scratch\nCOPY a /a";
    world.build(folder.path(), text).unwrap();
    fs::remove_dir_all(world.root.path().join("cache/steps")).unwrap();
    world.seen.reasons();
    world.build(folder.path(), text).unwrap();
    assert_eq!(world.seen.reasons(), ["its result has left the cache"]);
}
