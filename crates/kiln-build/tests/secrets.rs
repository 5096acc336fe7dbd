//! Nothing secret, and nothing of one machine, in an image.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod server;
mod world;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kiln_build::build::BuildRequest;
use kiln_build::network::record::Recordings;
use kiln_build::secrets::Allowed;
use kiln_model::Digest;
use kiln_store::tree::Kind;
use world::{World, busybox, context, sandboxes, world};

/// Put together here, so that no scanner takes this file for a leak.
fn key() -> String {
    let line = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n";
    let frame = |word: &str| format!("-----{word} PRIVATE KEY-----\n");
    format!("{}{}{}", frame("BEGIN"), line.repeat(3), frame("END"))
}

fn allowing(patterns: &[&str]) -> impl FnOnce(&mut BuildRequest) {
    let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
    let allowed = Arc::new(Allowed::new(&patterns).unwrap());
    move |request| request.allowed = allowed
}

/// Owner, mode and size of a file.
fn file(world: &World, manifest: &Digest, path: &str) -> Option<(u32, u32, u64)> {
    let tree = world.tree(manifest);
    let node = tree.get(path)?;
    match node.kind {
        Kind::File { size, .. } => Some((node.meta.uid, node.meta.mode, size)),
        _ => None,
    }
}

#[test]
fn what_is_secret_refuses_the_image_by_name_and_never_shows_itself() {
    let one = world();
    let folder = context(&[("key.pem", &key()), ("app/.env", "DB_PASSWORD=p4ss-word")]);
    let token = format!("ghp_{}", "a1B2".repeat(9));
    let text = format!(
        "FROM scratch\nARG API_TOKEN=t0ken-value\nENV DB_PASSWORD=p4ss-word A=b\n\
         COPY key.pem /etc/\nCOPY app /app\nLABEL x=https://me:p4ss-word@h/\nCMD [\"x\", \"{token}\"]\n"
    );
    let error = one.build(folder.path(), &text).unwrap_err();
    for expected in [
        "dockerfile_inline: line 2: ARG: API_TOKEN: secret by its name",
        "line 3: ENV: DB_PASSWORD: secret by its name",
        "line 4: COPY: /etc/key.pem: private key",
        "line 5: COPY: /app/.env: file with a login",
        "line 6: LABEL: instruction:",
        "line 7: CMD: instruction:",
    ] {
        assert!(error.contains(expected), "{expected}:\n{error}");
    }
    assert_eq!(error.lines().count(), 7, "{error}");
    for secret in ["p4ss", "t0ken", "ghp_", "MIIE"] {
        assert!(!error.contains(secret), "{error}");
    }
    // What is remembered of the instructions is remembered with what they brought.
    assert_eq!(one.build(folder.path(), &text).unwrap_err(), error);
    let (cached, _) = one.seen.counts();
    assert_eq!(cached, 2);
}

#[test]
fn what_the_file_allows_is_let_through() {
    let one = world();
    let folder = context(&[("key.pem", &key())]);
    let text = "FROM scratch\nENV API_TOKEN=x1y2\nCOPY key.pem /app/tests/key.pem\n";
    for (patterns, missing) in [
        (&["/app/tests/*.pem"][..], "API_TOKEN"),
        (&["API_TOKEN", "/app/*.pem"], "/app/tests/key.pem"),
    ] {
        let error = one.build_with(folder.path(), text, allowing(patterns));
        let error = error.unwrap_err();
        assert!(
            error.contains(missing) && error.lines().count() == 2,
            "{error}"
        );
    }
    let patterns = ["API_TOKEN", "/app/**/*.pem", "/never"].map(str::to_owned);
    let allowed = Arc::new(Allowed::new(&patterns).unwrap());
    let given = allowed.clone();
    let built = one.build_with(folder.path(), text, |request| request.allowed = given);
    assert!(file(&one, &built.unwrap(), "app/tests/key.pem").is_some());
    let used = (vec!["API_TOKEN", "/app/**/*.pem"], vec!["/never"]);
    assert_eq!(allowed.used(), used);
}

#[test]
fn a_stage_that_is_not_part_of_the_image_may_use_a_key() {
    let one = world();
    let folder = context(&[("key.pem", &key()), ("f", "x")]);
    let text = "FROM scratch AS sign\nARG API_TOKEN=x1y2\nCOPY key.pem f /\n\
                FROM scratch\nCOPY --from=sign /f /f\n";
    one.build(folder.path(), text).unwrap();
    // One that the image is built on is part of it, whatever is removed later.
    let text = "FROM scratch AS sign\nCOPY key.pem f /\nFROM sign\nCOPY f /key.pem\n";
    let error = one.build(folder.path(), text).unwrap_err();
    assert!(
        error.contains("line 2: COPY: /key.pem: private key"),
        "{error}"
    );
}

#[test]
fn a_builds_own_secret_is_found_wherever_a_command_leaves_it() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text =
        format!("{base}RUN --mount=type=secret,id=npm mkdir /c && cat /run/secrets/npm > /c/log");
    let secret = b"Zx7-very-hush-3311\n".to_vec();
    let give = |request: &mut BuildRequest| {
        request.secrets.insert("npm".into(), secret.clone());
    };
    let error = one.build_with(folder.path(), &text, give).unwrap_err();
    assert!(
        error.contains("RUN: /c/log: the build's secret `npm`"),
        "{error}"
    );
    assert!(!error.contains("hush"));
    // Its layer is no result that a later build is given.
    one.seen.counts();
    one.build_with(folder.path(), &text, give).unwrap_err();
    assert_eq!(one.seen.counts(), (3, 1));
}

#[test]
fn parts_of_a_large_layer_that_are_known_are_still_looked_through_for_a_builds_own_secret() {
    let one = world();
    let hidden = format!("{}Zx7-very-hush-3311", "x".repeat(7 << 20));
    let large = "y".repeat(8 << 20);
    let folder = context(&[
        ("d/a", &hidden),
        ("d/b", &large),
        ("d/c", &large),
        ("d/d", &large),
        ("d/e", &large),
        ("f", "x"),
    ]);
    let first = one
        .build(folder.path(), "FROM scratch\nCOPY d /d\n")
        .unwrap();
    let image = one.builder.store.image(&first).unwrap().unwrap();
    assert!(image.layers.len() > 1, "{} parts", image.layers.len());
    let text = "FROM scratch\nWORKDIR /w\nCOPY d /d\n";
    let error = one.build_with(folder.path(), text, |request| {
        request
            .secrets
            .insert("npm".into(), b"Zx7-very-hush-3311".to_vec());
    });
    let error = error.unwrap_err();
    assert!(
        error.contains("COPY: /d/a: the build's secret `npm`"),
        "{error}"
    );
}

/// Every file below a folder, and every path, that has this text: in it, or in what it has
/// compressed.
fn holding(folder: &Path, text: &str, found: &mut Vec<String>) {
    let has = |bytes: &[u8]| {
        bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut holds = has(path.as_os_str().as_bytes());
        if meta.is_dir() {
            holding(&path, text, found);
        } else if meta.is_file() {
            let content = fs::read(&path).unwrap();
            holds |= has(&content);
            if let Ok(content) = zstd::decode_all(content.as_slice()) {
                holds |= has(&content);
            }
        }
        if holds {
            found.push(path.display().to_string());
        }
    }
}

const FROM_FILE: &str = "Zx7-from-a-file-3311";
const FROM_ENV: &str = "Zx8-from-a-variable-4422";

#[test]
fn what_a_run_was_given_in_secret_is_nowhere_afterwards() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let at = server::Address::new();
    let server = server::Server::http(&at);
    let query = format!("/query?token={FROM_FILE}");
    for page in ["/bearer", "/basic", &query] {
        server.set(page, &[server::Answer::of(200, "a page")]);
    }
    let url = server.url("");
    let (_, host) = url.split_once("//").unwrap();
    let mounts = "--mount=type=secret,id=file --mount=type=secret,id=env,env=GIVEN";
    let used = format!(
        "RUN {mounts} f=$(cat /run/secrets/file); echo file $f; echo variable $GIVEN >&2; \
         printf 'machine h login me password %s\\n' $GIVEN > /dev/shm/.netrc; \
         wget --header \"Authorization: Bearer $f\" -qO /a {url}/bearer && \
         wget -qO /b http://me:$GIVEN@{host}/basic && wget -qO /c \"{url}/query?token=$f\"\n"
    );
    let failing = format!("{used}RUN {mounts} set -x; test -z $GIVEN$(cat /run/secrets/file)\n");
    let give = |request: &mut BuildRequest| {
        request.build.network = "default".into();
        for (id, value) in [("file", FROM_FILE), ("env", FROM_ENV)] {
            request.secrets.insert(id.into(), value.into());
        }
    };
    let recordings = Arc::new(Recordings::default());
    let kept = recordings.clone();
    let built = one.build_with(folder.path(), &format!("{base}{used}"), |request| {
        give(request);
        request.recordings = kept;
    });
    let image = built.unwrap();
    assert_eq!(one.text(&image, "b"), "a page");
    let sent = server.pages.seen.lock().unwrap().join("\n");
    assert!(sent.contains(FROM_FILE), "it was used: {sent}");
    let told = one.seen.all();
    assert!(
        told.contains("file ***") && told.contains("variable ***"),
        "{told}"
    );
    let error = one.build_with(folder.path(), &format!("{base}{failing}"), give);
    let error = error.unwrap_err();
    assert!(error.contains("test -z ******"), "{error}");
    let lock = format!("{:?}", recordings.settled(None));
    assert!(lock.contains("/query"), "{lock}");
    let told = format!("{told}{}", one.seen.all());
    for secret in [FROM_FILE, FROM_ENV] {
        let mut found = Vec::new();
        holding(one.root.path(), secret, &mut found);
        assert_eq!(found, [""; 0], "{secret}");
        for text in [&told, &error, &lock] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

/// As openssh-server and dbus do when they are installed.
const INSTALL: &str = "RUN mkdir -p /etc/ssh /var/lib/dbus && cd /etc/ssh && umask 077 \
    && echo made-here > ssh_host_ed25519_key && echo made-here > ssh_host_rsa_key \
    && umask 022 && echo made-here > ssh_host_ed25519_key.pub \
    && echo 0123456789abcdef0123456789abcdef > /var/lib/dbus/machine-id\n";

#[test]
fn what_a_command_makes_of_this_machine_is_empty_in_the_image_and_fresh_in_the_next_command() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!(
        "{base}{INSTALL}RUN cd /etc/ssh && grep -q 'OPENSSH PRIVATE KEY' ssh_host_ed25519_key \
         && ! grep -q made-here * && test ! -s ssh_host_rsa_key && test ! -s /etc/machine-id\n"
    );
    let built = one.build(folder.path(), &text).unwrap();
    for (path, mode) in [
        ("etc/ssh/ssh_host_ed25519_key", 0o600),
        ("etc/ssh/ssh_host_rsa_key", 0o600),
        ("etc/ssh/ssh_host_ed25519_key.pub", 0o644),
        ("etc/machine-id", 0o444),
    ] {
        assert_eq!(file(&one, &built, path), Some((0, mode, 0)), "{path}");
    }
    assert_eq!(file(&one, &built, "var/lib/dbus/machine-id"), None);
    let image = one.builder.store.image(&built).unwrap().unwrap();
    let first = one
        .build(folder.path(), &format!("{base}{INSTALL}"))
        .unwrap();
    let first = one.builder.store.image(&first).unwrap().unwrap();
    assert_eq!(
        image.layers.len(),
        first.layers.len(),
        "no trace of the keys made anew"
    );
    // Nowhere in the store or the cache.
    let objects = one.root.path().join("store/objects");
    let mut grep = std::process::Command::new("grep");
    let found = grep.args(["-rlF", "made-here"]).arg(objects).output();
    assert_eq!(String::from_utf8_lossy(&found.unwrap().stdout), "");
    let removed = format!("{base}{INSTALL}RUN rm /etc/ssh/ssh_host_*\n");
    let built = one.build(folder.path(), &removed).unwrap();
    assert_eq!(file(&one, &built, "etc/ssh/ssh_host_ed25519_key"), None);
}

#[test]
fn what_is_put_there_on_purpose_is_refused() {
    let one = world();
    let folder = context(&[
        ("ssh_host_rsa_key", &key()),
        ("machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("empty", ""),
    ]);
    let text = "FROM scratch\nCOPY ssh_host_rsa_key /etc/ssh/\nCOPY machine-id /etc/machine-id\n";
    let error = one.build(folder.path(), text).unwrap_err();
    assert!(
        error.contains("/etc/ssh/ssh_host_rsa_key: private key"),
        "{error}"
    );
    assert!(error.contains("/etc/machine-id: machine id"), "{error}");
    one.build(folder.path(), "FROM scratch\nCOPY empty /etc/machine-id\n")
        .unwrap();
}
