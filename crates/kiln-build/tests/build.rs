//! Whole builds: real folders, a real store, and (as root) real sandboxes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use kiln_build::build::{BuildRequest, Synced};
use kiln_build::context::Context;
use kiln_build::context::changes::changes;
use kiln_build::test::{Outcome, TestRequest};
use kiln_model::Digest;
use kiln_model::spec::{Check, HealthTest, Healthcheck};
use kiln_store::tree::Kind;
use world::{busybox, context, request, sandboxes, working, world};

const FILES: [(&str, &str); 4] = [("a", "1"), ("d/b", "2"), ("d/c/e", "3"), ("x.log", "no")];

#[test]
fn the_same_content_gives_the_same_image_wherever_and_whenever() {
    let text = "FROM scratch AS one\nCOPY d /d/\nFROM one\nCOPY --chmod=0600 a /etc/a\n\
                WORKDIR /srv/app\nENV A=b\nCMD [\"/x\"]\nADD --chown=5:6 d ./";
    let first = context(&FILES);
    let one = world();
    let digest = one.build(first.path(), text).unwrap();
    assert_eq!(one.text(&digest, "srv/app/c/e"), "3");
    let tree = one.tree(&digest);
    let meta = &tree.get("etc/a").unwrap().meta;
    assert_eq!((meta.mode, meta.mtime.seconds), (0o600, 0));
    assert_eq!(tree.get("srv/app/b").unwrap().meta.uid, 5);
    assert_eq!(one.seen.counts(), (0, 4));
    assert_eq!(one.build(first.path(), text).unwrap(), digest);
    assert_eq!(
        one.seen.counts(),
        (4, 0),
        "nothing changed, so nothing is done"
    );

    // Another folder, another order, other times, another root.
    let mut files = FILES;
    files.reverse();
    let second = context(&files);
    Command::new("touch")
        .args(["-d", "2001-02-03"])
        .arg(second.path().join("a"))
        .status()
        .unwrap();
    assert_eq!(world().build(second.path(), text).unwrap(), digest);
    assert_eq!(one.build(second.path(), text).unwrap(), digest);
    assert_eq!(
        one.seen.counts(),
        (4, 0),
        "by content, not by place and time"
    );

    fs::write(first.path().join("a"), "changed").unwrap();
    assert_ne!(one.build(first.path(), text).unwrap(), digest);
    assert_eq!(
        one.seen.counts(),
        (1, 3),
        "what stands before the change is kept"
    );
    fs::write(first.path().join("a"), "1").unwrap();
    assert_eq!(one.build(first.path(), text).unwrap(), digest);
}

#[test]
fn only_what_is_needed_is_built_and_read() {
    let folder = context(&FILES);
    fs::write(folder.path().join(".dockerignore"), "*.log\n").unwrap();
    let world = world();
    let text = "FROM scratch AS unused\nCOPY missing /\nFROM scratch\nCOPY . /all/";
    let digest = world.build(folder.path(), text).unwrap();
    let tree = world.tree(&digest);
    assert!(tree.get("all/a").is_some() && tree.get("all/x.log").is_none());
    let target = |r: &mut BuildRequest| r.build.target = Some("unused".into());
    let told = world.build_with(folder.path(), text, target).unwrap_err();
    assert_eq!(
        told,
        "dockerfile_inline: line 2: COPY missing /: /missing: not found"
    );
    let told = world
        .build(folder.path(), "FROM scratch\nCOPY x.log /")
        .unwrap_err();
    assert!(told.contains("/x.log: not found"), "{told}");
    let told = world.build(folder.path(), "FROM nope\nRUN x").unwrap_err();
    assert!(told.contains("image nope is not there"), "{told}");
}

#[test]
fn a_containerfile_that_is_a_fifo_is_not_waited_for() {
    let folder = context(&FILES);
    let path = folder.path().join("Containerfile");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let told = world()
        .build_with(folder.path(), "", |request| request.build.inline = None)
        .unwrap_err();
    assert!(told.contains("it is no plain file"), "{told}");
}

/// The paths that `sync` puts over an image made of `COPY src /app`.
const SRC: [(&str, &str); 4] = [
    ("src/kept", "1"),
    ("src/edited", "1"),
    ("src/gone/x", "1"),
    ("src/turns/y", "1"),
];

fn look(folder: &Path) -> Context {
    let seen = Context::look(folder, &|path| path.ends_with('~'), false).unwrap();
    seen.unwrap()
}

/// A base, its tree with the changes of a developer's minute over it, and what syncing the
/// same again gives.
fn synced(world: &world::World, folder: &Path) -> (Digest, Digest, Digest) {
    let base = world.build(
        folder,
        "FROM scratch\nCOPY src /app\nCOPY src/kept /app/own/made",
    );
    let (base, src) = (base.unwrap(), folder.join("src"));
    let before = look(&src);
    fs::write(src.join("edited"), "2").unwrap();
    fs::remove_dir_all(src.join("gone")).unwrap();
    fs::remove_dir_all(src.join("turns")).unwrap();
    fs::write(src.join("turns"), "a file now").unwrap();
    fs::create_dir_all(src.join("new/empty")).unwrap();
    fs::write(src.join("edited~"), "an editor's").unwrap();
    std::os::unix::fs::symlink("kept", src.join("link")).unwrap();
    let after = look(&src);
    let paths = changes(Some(&before), Some(&after));
    let part = Synced {
        context: Some(&after),
        paths: &paths,
        target: "/app",
    };
    let once = world.builder.sync("app", &base, &[part], 0).unwrap();
    let again = world.builder.sync("app", &once, &[part], 0).unwrap();
    (base, once, again)
}

#[test]
fn synced_files_are_one_more_layer_over_an_image_that_is_not_built_again() {
    let (one, two) = (world(), world());
    let folders = [context(&SRC), context(&SRC)];
    let (base, digest, again) = synced(&one, folders[0].path());
    assert_eq!(again, digest, "what is there already is no layer");
    assert_eq!(synced(&two, folders[1].path()).1, digest, "another root");
    let image = |digest| one.builder.store.image(digest).unwrap().unwrap();
    assert_eq!(
        image(&digest).layers[..image(&base).layers.len()],
        image(&base).layers[..]
    );
    assert_eq!(image(&digest).layers.len(), image(&base).layers.len() + 1);
    let tree = one.tree(&digest);
    for (path, text) in [
        ("app/edited", "2"),
        ("app/turns", "a file now"),
        ("app/kept", "1"),
    ] {
        assert_eq!(one.text(&digest, path), text);
    }
    assert_eq!(
        one.text(&digest, "app/own/made"),
        "1",
        "what only the image has stays"
    );
    assert!(tree.get("app/new/empty").is_some_and(|node| node.is_dir()));
    assert!(matches!(
        &tree.get("app/link").unwrap().kind,
        Kind::Symlink { .. }
    ));
    for gone in ["app/gone", "app/gone/x", "app/turns/y", "app/edited~"] {
        assert!(tree.get(gone).is_none(), "{gone}");
    }
    let meta = &tree.get("app/edited").unwrap().meta;
    assert_eq!((meta.uid, meta.mtime.seconds), (0, 0));
}

#[test]
fn a_synced_file_may_be_any_path_of_the_image_and_its_digest_is_of_its_content() {
    let (world, folder) = (world(), context(&[("a", "1")]));
    let base = world
        .build(folder.path(), "FROM scratch\nCOPY a /a")
        .unwrap();
    let file = folder.path().join("a");
    let (seen, paths) = (look(&file), look(&file).paths());
    let part = |target| Synced {
        context: Some(&seen),
        paths: &paths,
        target,
    };
    let digest = world
        .builder
        .sync("app", &base, &[part("/etc/deep/name")], 0);
    assert_eq!(world.text(&digest.unwrap(), "etc/deep/name"), "1");
    let before = world.builder.digest_of(&[part("/a")]).unwrap();
    fs::write(&file, "1").unwrap();
    let (touched, gone) = (look(&file), None);
    let of = |context| {
        let part = Synced {
            context,
            ..part("/a")
        };
        world.builder.digest_of(&[part]).unwrap()
    };
    assert_eq!(of(Some(&touched)), before, "only touched");
    assert_ne!(of(gone), before);
    let part = Synced {
        context: gone,
        ..part("/a")
    };
    let without = world.builder.sync("app", &base, &[part], 0).unwrap();
    assert!(world.tree(&without).get("a").is_none());
}

#[test]
fn commands_run_in_a_sandbox_and_leave_only_what_they_wrote() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}RUN mkdir -m 1777 /tmp\nFROM base\nARG WHO=me\nWORKDIR /w\nUSER web\n\
         RUN --mount=type=bind,source=f,target=/in/f cat /in/f > /tmp/o 2>&1; cp /tmp/o /w/ 2>/dev/null; \
         id -u > /tmp/id; echo $HOME $WHO >> /tmp/id\nUSER root\n\
         RUN --mount=type=secret,id=key --mount=type=cache,target=/cache --mount=type=tmpfs,target=/t <<E\n\
         set -e\ncp /run/secrets/key /t/k\nwc -c < /run/secrets/key > /size\necho x >> /cache/n\n\
         mkdir -p /var/log && date > /now && ln /now /also && rm /etc/passwd && hostname > /host\nE\n"
    );
    let one = world();
    let digest = one.build(folder.path(), &text).unwrap();
    assert_eq!(one.text(&digest, "tmp/o"), "from context");
    assert_eq!(one.text(&digest, "tmp/id"), "33\n/home/web me\n");
    assert_eq!(one.text(&digest, "size").trim(), "4");
    assert_eq!(one.text(&digest, "host").trim(), "kiln-build");
    let tree = one.tree(&digest);
    for gone in [
        "etc/passwd",
        "cache",
        "t",
        "in",
        "run/secrets",
        "dev",
        "proc",
        "etc/resolv.conf",
    ] {
        assert!(tree.get(gone).is_none(), "{gone}");
    }
    assert_eq!(tree.get("now").unwrap().meta.mtime.seconds, 0);
    let names: Vec<_> = tree
        .walk()
        .filter(|i| i.links == 2)
        .map(|i| i.path)
        .collect();
    assert_eq!(
        names,
        [b"also".to_vec(), b"now".to_vec()],
        "hard links stay"
    );
    assert_eq!(one.build(folder.path(), &text).unwrap(), digest);
    assert_eq!(one.seen.counts().1, 7, "the second time from the cache");
    let left = working(one.root.path()).len();
    assert_eq!(left, 0, "nothing of the sandboxes stays");
}

#[test]
fn the_same_commands_give_the_same_image_in_another_root() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}RUN mkdir /a && echo 1 > /a/f && touch /a/g && ln -s f /a/l && chown -R 33 /a"
    );
    let digest = world().build(folder.path(), &text).unwrap();
    let (again, _) = busybox();
    assert_eq!(world().build(again.path(), &text).unwrap(), digest);
}

#[test]
fn a_failed_command_tells_its_last_lines_and_leaves_nothing() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let text = format!("{base}RUN for i in $(seq 50); do echo line $i; done; exit 3");
    let told = one.build(folder.path(), &text).unwrap_err();
    assert!(
        told.contains("exited with code 3") && told.contains("line 50"),
        "{told}"
    );
    assert!(
        told.contains("line 21") && !told.contains("line 20\n"),
        "{told}"
    );
    let alone = "RUN --network=none test $(grep -c : /proc/net/dev) = 1";
    one.build(folder.path(), &format!("{base}{alone}")).unwrap();
    let told = one.build(folder.path(), "FROM scratch\nRUN x").unwrap_err();
    assert!(told.contains("line 2: RUN x"), "{told}");
}

#[test]
fn an_image_proves_itself_and_its_write_set_is_learned() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let text = format!(
        "{base}RUN mkdir -p /www /data /tmp /run /var/cache/app && echo hello > /www/index.html"
    );
    let image = one.build(folder.path(), &text).unwrap();
    let tester = one.tester();
    let cancel = AtomicBool::new(false);
    let mut web = request(
        image,
        "mkdir /var/cache/app/t; echo x > /oops; echo up; exec httpd -f -p 8080 -h /www",
    );
    web.healthcheck = Some(Healthcheck {
        test: Some(HealthTest::Shell("test -d /var/cache/app/t".into())),
        ..Healthcheck::default()
    });
    let status = 200;
    web.checks = vec![
        Check::Tcp { port: 8080 },
        Check::Http {
            port: 8080,
            path: "/".into(),
            status,
            body: Some("hello".into()),
        },
        Check::Exec {
            command: vec!["echo".into(), "hi".into()],
            exit: 0,
            output: Some("hi".into()),
        },
        Check::File {
            path: "/bin/../www/index.html".into(),
            exists: true,
            contains: Some("hell".into()),
            mode: Some(0o644),
        },
        Check::File {
            path: "/nope".into(),
            exists: false,
            contains: None,
            mode: None,
        },
    ];
    let verdict = tester.test_image(&web, &cancel).unwrap();
    assert_eq!(verdict.outcome, Outcome::Passed);
    assert_eq!(verdict.listens, [8080]);
    assert_eq!(verdict.log, ["up"]);
    let scratch: Vec<_> = verdict.scratch.iter().map(|s| s.path.as_str()).collect();
    assert_eq!(
        scratch,
        ["/data", "/run", "/tmp", "/var/cache/app", "/var/tmp"]
    );
    assert!(
        verdict.warnings[0].contains("/oops"),
        "{:?}",
        verdict.warnings
    );
    assert_eq!(
        tester.test_image(&web, &cancel).unwrap(),
        verdict,
        "remembered"
    );

    web.checks = vec![Check::File {
        path: "/nope".into(),
        exists: true,
        contains: None,
        mode: None,
    }];
    let early = request(image, "echo no redis; exit 7");
    let told = tester.test_image(&early, &cancel).unwrap_err().to_string();
    assert!(
        told.contains("code 7") && told.contains("no redis"),
        "{told}"
    );
    let peers = TestRequest {
        peers: true,
        hosts: Vec::new(),
        ..early.clone()
    };
    let verdict = tester.test_image(&peers, &cancel).unwrap();
    assert!(
        matches!(verdict.outcome, Outcome::Inconclusive(_)),
        "{verdict:?}"
    );
    let job = TestRequest {
        completes: true,
        ..request(image, "echo done > /data/x")
    };
    assert_eq!(
        tester.test_image(&job, &cancel).unwrap().outcome,
        Outcome::Passed
    );
    let endless = TestRequest {
        completes: true,
        ..request(image, "sleep 60")
    };
    assert!(
        tester
            .test_image(&endless, &cancel)
            .unwrap_err()
            .to_string()
            .contains("still running")
    );
}
