//! What the Dockerfile language has beyond the common: triggers, remote sources, linked
//! copies, mounts of every kind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kiln_build::remote::Pins;
use kiln_model::Digest;
use world::{busybox, context, sandboxes, world};

/// Answers every request with what `content` holds at the time; counts them.
fn server(content: &Arc<Mutex<Vec<u8>>>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let (content, count) = (content.clone(), asked.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer);
            count.fetch_add(1, Ordering::SeqCst);
            let body = content.lock().unwrap().clone();
            let status = if body.is_empty() { "404 No" } else { "200 OK" };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
    (url, asked)
}

#[test]
fn a_url_is_fetched_once_pinned_and_checked() {
    let content = Arc::new(Mutex::new(b"one".to_vec()));
    let (url, asked) = server(&content);
    let folder = context(&[("a", "1")]);
    let one = world();
    let pins: Arc<Mutex<Pins>> = Arc::default();
    let text = format!("FROM scratch\nARG N=tool\nADD {url}/dir/$N?x=1 /opt/\nADD {url}/f /g");
    let build =
        |text: &str| one.build_with(folder.path(), text, |request| request.pins = pins.clone());
    let digest = build(&text).unwrap();
    assert_eq!(one.text(&digest, "opt/tool"), "one");
    let tree = one.tree(&digest);
    let meta = &tree.get("g").unwrap().meta;
    assert_eq!((meta.mode, meta.uid, meta.mtime.seconds), (0o600, 0, 0));
    let pinned = pins.lock().unwrap().urls.clone();
    assert_eq!(pinned[&format!("{url}/f")], Digest::of("one"));
    assert_eq!(asked.load(Ordering::SeqCst), 2);

    // What is pinned and here is not asked for again.
    *content.lock().unwrap() = b"two".to_vec();
    assert_eq!(build(&text).unwrap(), digest);
    assert_eq!(asked.load(Ordering::SeqCst), 2);

    // On another machine what is pinned must come again, or nothing.
    let other = world();
    let told = other
        .build_with(folder.path(), &text, |request| request.pins = pins.clone())
        .unwrap_err();
    assert!(
        told.contains("is not what it was") && told.contains("line 3"),
        "{told}"
    );

    let right = Digest::of("two");
    let sum = format!("FROM scratch\nADD --checksum={right} {url}/s /s");
    build(&sum).unwrap();
    let wrong = format!(
        "FROM scratch\nADD --checksum={} {url}/t /t",
        Digest::of("x")
    );
    assert!(build(&wrong).unwrap_err().contains("is not what it was"));
    content.lock().unwrap().clear();
    let told = build(&format!("FROM scratch\nADD {url}/gone /t")).unwrap_err();
    assert!(told.contains("the server says 404"), "{told}");
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let out = Command::new("git")
        .args(["-c", "user.name=n", "-c", "user.email=e"])
        .args(arguments)
        .current_dir(folder)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(out.status.success(), "{arguments:?}: {out:?}");
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// `git daemon` over a folder of repositories; ends with it.
struct Daemon(std::process::Child, String);

impl Drop for Daemon {
    fn drop(&mut self) {
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill").args(["--", &group]).status();
        let _ = self.0.wait();
    }
}

fn daemon(folder: &Path) -> Daemon {
    use std::os::unix::process::CommandExt;
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let child = Command::new("git")
        .args([
            "daemon",
            "--export-all",
            "--reuseaddr",
            "--listen=127.0.0.1",
        ])
        .arg(format!("--port={port}"))
        .arg(format!("--base-path={}", folder.display()))
        .process_group(0)
        .spawn()
        .unwrap();
    for _ in 0..200 {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Daemon(child, format!("git://127.0.0.1:{port}"))
}

#[test]
fn a_repository_is_taken_at_a_pinned_commit() {
    let served = tempfile::tempdir().unwrap();
    let repository = served.path().join("x.git");
    fs::create_dir_all(repository.join("sub")).unwrap();
    fs::write(repository.join("a"), "first").unwrap();
    fs::write(repository.join("sub/b"), "below").unwrap();
    git(&repository, &["init", "--quiet", "-b", "main", "."]);
    git(&repository, &["add", "."]);
    git(&repository, &["commit", "--quiet", "-m", "one"]);
    git(&repository, &["tag", "-a", "v1", "-m", "one"]);
    let first = git(&repository, &["rev-parse", "HEAD"]);
    let daemon = daemon(served.path());
    let url = format!("{}/x.git", daemon.1);
    let folder = context(&[("f", "1")]);
    let one = world();
    let pins: Arc<Mutex<Pins>> = Arc::default();
    let build =
        |text: &str| one.build_with(folder.path(), text, |request| request.pins = pins.clone());
    let text = format!("FROM scratch\nADD {url} /all\nADD {url}#v1:sub /sub");
    let digest = build(&text).unwrap();
    assert_eq!(one.text(&digest, "all/a"), "first");
    assert_eq!(one.text(&digest, "sub/b"), "below");
    assert!(one.tree(&digest).get("all/.git").is_none());
    let git_pins = pins.lock().unwrap().git.clone();
    assert_eq!(git_pins[&url], first);
    assert_eq!(
        git_pins[&format!("{url}#v1")],
        first,
        "a tag's commit, not the tag"
    );

    // It moves only when the lock is updated.
    fs::write(repository.join("a"), "second").unwrap();
    git(&repository, &["commit", "--quiet", "-am", "two"]);
    assert_eq!(build(&text).unwrap(), digest);
    pins.lock().unwrap().git.clear();
    assert_eq!(one.text(&build(&text).unwrap(), "all/a"), "second");

    let kept = format!("FROM scratch\nADD --keep-git-dir --checksum={first} {url}#v1 /r");
    let digest = build(&kept).unwrap();
    assert_eq!(one.text(&digest, "r/.git/HEAD").trim(), first);
    let elsewhere = world().build(folder.path(), &kept).unwrap();
    assert_eq!(elsewhere, digest, "also .git is the same everywhere");
    for (text, expected) in [
        (
            format!("ADD {url}#nope /r"),
            "no branch, tag or commit `nope`",
        ),
        (format!("ADD {url}#v1:nope /r"), "no folder `nope`"),
        (
            format!("ADD --checksum=0123456789 {url}#v1 /r"),
            "but --checksum says",
        ),
    ] {
        let told = build(&format!("FROM scratch\n{text}")).unwrap_err();
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn triggers_of_images_and_stages_come_first() {
    let folder = context(&[("a", "1"), ("b", "2")]);
    let one = world();
    let base = "FROM scratch AS tools\nCOPY b /tool\nFROM scratch\nENV K=v\nWORKDIR /app\n\
                ONBUILD ARG V=x\nONBUILD COPY a $K/$V\nONBUILD COPY --from=tools tool ./t";
    let digest = one.build(folder.path(), base).unwrap();
    assert!(one.tree(&digest).get("app/v").is_none());
    one.images.lock().unwrap().insert("base".into(), digest);
    let built = one.build(
        folder.path(),
        "FROM scratch AS tools\nCOPY a /tool\nFROM base\nCOPY b ./",
    );
    let built = built.unwrap();
    assert_eq!(one.text(&built, "app/v/x"), "1");
    assert_eq!(
        one.text(&built, "app/t"),
        "1",
        "the stage of the file that is built"
    );
    assert_eq!(one.text(&built, "app/b"), "2");
    // They are carried out once.
    one.images.lock().unwrap().insert("child".into(), built);
    let grandchild = one.build(folder.path(), "FROM child\nCOPY a /a").unwrap();
    let layers = |digest| {
        one.builder
            .store
            .image(digest)
            .unwrap()
            .unwrap()
            .layers
            .len()
    };
    assert_eq!(layers(&grandchild), layers(&built) + 1);
    let needs = "FROM scratch\nONBUILD COPY --from=third /x /y";
    let needs = one.build(folder.path(), needs).unwrap();
    one.images.lock().unwrap().insert("needs".into(), needs);
    let told = one.build(folder.path(), "FROM needs").unwrap_err();
    assert!(
        told.contains("the image third"),
        "what a trigger needs is asked for: {told}"
    );
}

#[test]
fn linked_copies_know_nothing_of_what_is_below() {
    let folder = context(&[("a", "1"), ("d/x", "2"), ("other/y", "3")]);
    symlink("other", folder.path().join("l")).unwrap();
    let one = world();
    let base = "FROM scratch\nCOPY other /other/\nCOPY --parents ./l /\n";
    let plain = one
        .build(folder.path(), &format!("{base}COPY d /l/"))
        .unwrap();
    assert_eq!(one.text(&plain, "other/x"), "2", "the link is followed");
    let linked = one.build(
        folder.path(),
        &format!("{base}COPY --link --chmod=700 d /l/"),
    );
    let linked = linked.unwrap();
    let tree = one.tree(&linked);
    assert!(tree.get("l").unwrap().is_dir() && tree.get("other/x").is_none());
    assert_eq!(one.text(&linked, "other/y"), "3");
}

#[test]
fn a_folder_can_stand_for_a_base_or_a_stage() {
    let folder = context(&[("a", "1")]);
    let root = context(&[("etc/x", "2")]);
    let one = world();
    let text = "FROM nowhere AS s\nFROM root\nCOPY --from=s etc/x /y\nCOPY a /a";
    let digest = one.build_with(folder.path(), text, |request| {
        let path = root.path().display().to_string();
        let contexts = &mut request.build.additional_contexts;
        contexts.insert("root".into(), path.clone());
        contexts.insert("s".into(), path);
    });
    let digest = digest.unwrap();
    assert_eq!(one.text(&digest, "etc/x"), "2");
    assert_eq!(one.text(&digest, "y"), "2");
}

#[test]
fn mounts_may_be_written_to_and_caches_begin_with_a_stages_files() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    fs::create_dir(folder.path().join("dir")).unwrap();
    fs::write(folder.path().join("dir/f"), "kept").unwrap();
    let text = format!(
        "{base}COPY f /seed/one\nFROM base\n\
         RUN --mount=type=bind,source=dir,target=/m,rw echo more >> /m/f && cp /m/f /copy\n\
         RUN --mount=type=bind,source=f,target=/g,rw echo more >> /g && cp /g /g2\n\
         RUN --mount=type=cache,from=base,source=/seed,target=/c cat /c/one > /seen; echo 2 > /c/two\n\
         RUN --mount=type=cache,from=base,source=/seed,target=/c cp /c/two /two\n"
    );
    let one = world();
    let digest = one.build(folder.path(), &text).unwrap();
    assert_eq!(one.text(&digest, "copy"), "keptmore\n");
    assert_eq!(one.text(&digest, "g2"), "from contextmore\n");
    assert_eq!(one.text(&digest, "seen"), "from context");
    assert_eq!(one.text(&digest, "two"), "2\n");
    assert_eq!(
        fs::read_to_string(folder.path().join("dir/f")).unwrap(),
        "kept"
    );
    assert!(one.tree(&digest).get("m").is_none());
}

/// Every file below, whose bytes hold `what`.
fn holding(folder: &Path, what: &[u8], found: &mut Vec<String>) {
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            holding(&path, what, found);
        } else if meta.is_file() {
            let mut bytes = fs::read(&path).unwrap();
            if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
                bytes = zstd::decode_all(bytes.as_slice()).unwrap();
            }
            if bytes.windows(what.len()).any(|w| w == what) {
                found.push(path.display().to_string());
            }
        }
    }
}

#[test]
fn secrets_and_agents_are_used_and_stay_nowhere() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let sockets = tempfile::tempdir().unwrap();
    let path = sockets.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream: UnixStream = stream.unwrap();
            stream.write_all(b"Kq9-agent-answer\n").unwrap();
        }
    });
    let text = format!(
        "{base}RUN --mount=type=ssh test -S $SSH_AUTH_SOCK && echo $SSH_AUTH_SOCK > /where && \
         test \"$(nc local:$SSH_AUTH_SOCK < /dev/null)\" = Kq9-agent-answer || test -w $SSH_AUTH_SOCK\n\
         RUN --mount=type=secret,id=key,env=TOKEN --mount=type=secret,id=key \
         test $(cat /run/secrets/key) = \"$TOKEN\" && echo -n $TOKEN | wc -c > /length\n"
    );
    let one = world();
    let secret = b"Zx7-very-hush-3311".to_vec();
    let given = secret.clone();
    let digest = one.build_with(folder.path(), &text, |request| {
        request.secrets.insert("key".into(), given);
        request.ssh.insert("default".into(), path);
    });
    let digest = digest.unwrap();
    assert_eq!(
        one.text(&digest, "where").trim(),
        "/run/buildkit/ssh_agent.0"
    );
    assert_eq!(one.text(&digest, "length").trim(), "18");
    assert!(one.tree(&digest).get("run").is_none());
    let mut found = Vec::new();
    holding(one.root.path(), b"hush-3311", &mut found);
    holding(one.root.path(), b"Kq9-agent-answer\n", &mut found);

    assert_eq!(found, Vec::<String>::new());
    // The search itself finds what is there.
    holding(one.root.path(), b"/run/buildkit/ssh_agent.0", &mut found);
    assert!(!found.is_empty());
    let told = one
        .build(
            folder.path(),
            &format!("{base}RUN --mount=type=ssh,required true"),
        )
        .unwrap_err();
    assert!(told.contains("ssh agent `default` is required"), "{told}");
}

#[test]
fn independent_stages_are_built_at_the_same_time() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let text = format!(
        "{base}FROM base AS a\nRUN sleep 2; echo a > /a\nFROM base AS b\nRUN sleep 2; echo b > /b\n\
         FROM base AS unused\nRUN false\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n"
    );
    let one = world();
    one.build(folder.path(), &base).unwrap();
    let begun = std::time::Instant::now();
    let digest = one.build(folder.path(), &text).unwrap();
    let took = begun.elapsed();
    assert_eq!(one.text(&digest, "a"), "a\n");
    assert!(took.as_millis() < 3900, "one after the other: {took:?}");
    let failing = format!("{base}FROM base AS a\nRUN exit 7\nFROM base\nCOPY --from=a /a /\n");
    let told = one.build(folder.path(), &failing).unwrap_err();
    assert!(told.contains("exited with code 7"), "{told}");
}

#[test]
fn a_file_may_ask_that_its_check_stops_the_build() {
    let (world, folder) = (world(), context(&[("a", "1")]));
    let text = |check: &str| format!("# check={check}\nFROM scratch AS Upper\nCOPY a /a\nCMD a");
    let told = world.build(folder.path(), &text("error=true")).unwrap_err();
    for part in ["line 2: StageNameCasing: ", "line 4: JSONArgsRecommended: "] {
        assert!(told.contains(part), "{told}");
    }
    let skipped = "error=true;skip=StageNameCasing,JSONArgsRecommended";
    world.build(folder.path(), &text(skipped)).unwrap();
    world.build(folder.path(), &text("error=false")).unwrap();
    let told = world.build(folder.path(), &text("error=perhaps"));
    assert!(told.unwrap_err().contains("takes true or false"));
}
