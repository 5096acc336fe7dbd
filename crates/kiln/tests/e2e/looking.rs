//! Looking at what runs and at what is kept: status, exec, audit, gc, fsck, and the
//! instance's own view of itself.

use std::fs;

use serde_json::Value;

use crate::common::{Kiln, Page, Project};

fn first_instance(status: &Value) -> &Value {
    &status["services"][0]["instances"][0]
}

#[test]
fn status_tells_health_seal_and_release() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: "    healthcheck: {test: [CMD, /bin/true], interval: 1s}",
        more: "  loose:\n    build: .\n    x-kiln: {root: scratch}\n",
        ..Page::default()
    };
    let project = kiln.page("status", &page);
    project.up().ok();
    let status = project.status();
    assert_eq!(status["environment"], "status");
    assert_eq!(status["proven"], 1);
    assert_eq!(status["goal"], 1);
    assert!(status["rollout"].is_null(), "{status}");
    let service = |name: &str| {
        let all = status["services"].as_array().unwrap();
        all.iter().find(|s| s["service"] == name).unwrap()
    };
    let web = &service("web")["instances"][0];
    assert_eq!(service("web")["state"], "serving");
    assert!(
        service("web")["ports"][0]
            .as_str()
            .unwrap()
            .contains(&project.port.to_string())
    );
    assert_eq!(web["health"], "healthy", "{web}");
    assert_eq!(web["sealed"], true, "{web}");
    assert_eq!(web["tainted"], false, "{web}");
    assert_eq!(web["drift"], serde_json::json!([]), "{web}");
    assert_eq!(web["serving"], true, "{web}");
    assert!(
        web["since"]
            .as_u64()
            .is_some_and(|ms| ms > 1_600_000_000_000),
        "{web}"
    );
    assert_eq!(
        service("loose")["instances"][0]["sealed"],
        false,
        "{status}"
    );
    let text = project.run("status", &[]).ok().stdout;
    assert!(text.contains("unsealed"), "{text}");
    let id = web["id"].as_str().unwrap();
    let why = project.kiln(&["explain", "-e", "@", id]).ok().stdout;
    for word in ["sealed", "sha256", "scratch", "/run.sh"] {
        assert!(why.contains(word), "no {word} in {why}");
    }
}

#[test]
fn exec_is_allowed_recorded_and_shown() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("exec", &Page::default());
    project.up().ok();
    let ran = project.inside("web", "echo hello; echo sorry >&2; exit 3");
    assert_eq!(ran.stdout, "hello\n", "{ran}");
    assert!(ran.stderr.contains("sorry"), "{ran}");
    assert_eq!(ran.code, Some(3), "{ran}");
    let status = project.status();
    assert_eq!(first_instance(&status)["tainted"], true, "{status}");
    let text = project.run("status", &[]).ok().stdout;
    assert!(text.contains("tainted"), "{text}");
    let audit = project.kiln(&["audit", "--json"]).ok().json();
    let entry = audit.as_array().unwrap().last().unwrap().to_string();
    assert!(
        entry.contains("exec") && entry.contains("tester"),
        "{entry}"
    );
    // The next release's instances are clean.
    project.write("www/index.html", "two");
    project.up().ok();
    project.settled(None);
    assert_eq!(first_instance(&project.status())["tainted"], false);
}

#[test]
fn from_inside_nothing_of_the_image_can_be_changed() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: "    volumes: [\"data:/data\"]\n    secrets: [key]\n    x-kiln: {scratch: [/work]}",
        more: "volumes: {data: {}}\nsecrets: {key: {file: key.txt}}",
        ..Page::default()
    };
    let project = kiln.page("inside", &page);
    project.write("key.txt", "hazelnut");
    project.edit("Containerfile", "COPY www", "COPY www /work\nCOPY www");
    project.up().ok();
    let fails = |line: &str| {
        let ran = project.inside("web", line);
        assert_ne!(ran.code, Some(0), "`{line}` worked: {ran}");
    };
    let works = |line: &str| project.inside("web", line).ok().stdout;
    fails("echo x > /www/index.html");
    fails("rm /run.sh");
    fails("mkdir /new");
    fails("chmod 777 /www");
    fails("mount -o remount,rw /");
    fails("echo x > /run/secrets/key");
    fails("echo x > /proc/sys/kernel/hostname");
    assert_eq!(works("cat /run/secrets/key"), "hazelnut");
    // Scratch and volumes take writes, but nothing written can be run.
    for place in ["/tmp", "/work", "/data", "/dev/shm"] {
        works(&format!(
            "cp /bin/busybox {place}/program && rm {place}/program"
        ));
        fails(&format!(
            "cp /bin/busybox {place}/program && {place}/program true"
        ));
    }
    // Scratch shows what the image has there.
    assert_eq!(works("cat /work/index.html"), "one");
    // Nothing of the host is in sight: its files, its processes.
    fails(&format!("ls {}", kiln.root.display()));
    let processes = works("ls /proc | grep -c '^[0-9]'");
    assert!(processes.trim().parse::<u32>().unwrap() < 8, "{processes}");
    assert_eq!(
        works("cat /proc/self/status | grep NoNewPrivs").trim(),
        "NoNewPrivs:\t1"
    );
    assert_eq!(
        works("grep Seccomp: /proc/self/status").trim(),
        "Seccomp:\t2"
    );
    // CAP_SYS_ADMIN is bit 21.
    let caps = works("grep CapEff /proc/self/status");
    let caps = u64::from_str_radix(caps.trim().trim_start_matches("CapEff:").trim(), 16).unwrap();
    assert_eq!(caps & (1 << 21), 0, "{caps:x}");
    // What was written is gone with the instance, but for the volume.
    works("echo kept > /data/kept; echo lost > /work/lost");
    project.write("www/index.html", "two");
    project.up().ok();
    assert_eq!(works("cat /data/kept; ls /work"), "kept\nindex.html\n");
}

#[test]
fn what_the_program_writes_is_learned_and_becomes_scratch() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        before: "echo x > /state/file || exit 9",
        ..Page::default()
    };
    let project = kiln.page("learn", &page);
    project.write("state/.keep", "");
    project.edit("Containerfile", "COPY www", "COPY state /state\nCOPY www");
    project.up().ok();
    assert_eq!(project.page(), "one");
    let ran = project.inside("web", "mount").ok();
    assert!(ran.stdout.lines().any(|l| l.contains(" /state ")), "{ran}");
    let id = project.instances(None)[0].id.clone();
    let why = project.kiln(&["explain", "-e", "@", &id]).ok().stdout;
    assert!(why.contains("/state"), "{why}");
}

#[test]
fn logs_show_what_instances_print() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "logs",
        &Page {
            before: "echo to out; echo to err >&2",
            ..Page::default()
        },
    );
    project.up().ok();
    let ran = project.run("logs", &[]).ok();
    assert!(
        ran.stdout.contains("to out") && ran.stdout.contains("to err"),
        "{ran}"
    );
    let lines = project
        .run("logs", &["-n", "1"])
        .ok()
        .stdout
        .lines()
        .count();
    assert_eq!(lines, 1);
    let json = project.run("logs", &["--json"]).ok().stdout;
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert!(first.to_string().contains("to out"), "{first}");
}

#[test]
fn the_audit_log_shows_all_and_shows_tampering() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("audit", &Page::default());
    project.up().ok();
    project.write("www/index.html", "two");
    project.up().ok();
    project.kiln(&["rollback", "-e", "@"]).ok();
    project.run("down", &[]).ok();
    let audit = project.kiln(&["audit", "--json"]).ok().json();
    let text = audit.to_string();
    for word in ["build", "test", "release", "rollback", "down"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    let entries = audit.as_array().unwrap().len();
    let verified = project.kiln(&["audit", "verify", "--json"]).ok().json();
    assert_eq!(
        verified["entries"].as_u64(),
        Some(entries as u64),
        "{verified}"
    );
    // One letter changed in the middle.
    let mut changed = 0;
    for file in fs::read_dir(kiln.root.join("audit")).unwrap().flatten() {
        let text = fs::read_to_string(file.path()).unwrap_or_default();
        if text.contains("tester") {
            fs::write(file.path(), text.replacen("tester", "jester", 1)).unwrap();
            changed += 1;
        }
    }
    assert!(changed > 0, "nobody is named in the log");
    project.kiln(&["audit", "verify"]).code(&[8]);
}

fn texts(project: &Project, texts: &[&str]) {
    for text in texts {
        project.write("www/index.html", text);
        project.up().ok();
    }
}

#[test]
fn gc_removes_what_nobody_needs_and_keeps_what_can_be_gone_back_to() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("gc", &Page::default());
    texts(&project, &["one", "two", "three", "four"]);
    let size = || -> u64 { folder_size(&kiln.root.join("store")) };
    let before = size();
    kiln.run(&["gc", "--dry-run"]).ok();
    assert_eq!(size(), before, "a dry run removed something");
    kiln.run(&["gc", "--keep", "1"]).ok();
    assert_eq!(project.page(), "four");
    // The one before is still whole.
    project.kiln(&["rollback", "-e", "@"]).ok();
    assert_eq!(project.page(), "three");
    let ran = project.kiln(&["rollback", "1", "-e", "@"]);
    assert!(ran.code == Some(7) || ran.code == Some(0), "{ran}");
    if ran.code == Some(0) {
        assert_eq!(project.page(), "one", "it said it went back");
    } else {
        assert_eq!(
            project.page(),
            "three",
            "it refused, but something happened"
        );
    }
    kiln.run(&["fsck"]).ok();
}

fn folder_size(folder: &std::path::Path) -> u64 {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| match e.file_type() {
            Ok(kind) if kind.is_dir() => folder_size(&e.path()),
            _ => e.metadata().map(|m| m.len()).unwrap_or_default(),
        })
        .sum()
}

#[test]
fn build_says_why_an_instruction_was_not_cached() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("explain", &Page::default());
    let plain = ["--explain", "--progress", "plain"];
    project.run("build", &plain).ok();
    project.write("www/index.html", "changed");
    let ran = project.run("build", &plain).ok();
    let why = "not from the cache: changed: www/index.html";
    assert_eq!(ran.stderr.matches(why).count(), 1, "{ran}");
    let ran = project.run("build", &["--progress", "json"]).ok();
    let events = ran.stderr.lines();
    let events: Vec<serde_json::Value> = events
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let steps = events.iter().filter(|e| e["how"] == "cached");
    assert!(steps.clone().count() > 0, "{ran}");
    assert!(steps.clone().all(|e| e["took"].is_number()), "{ran}");
    assert!(events.iter().all(|e| e["event"] != "explained"), "{ran}");
}

#[test]
fn build_takes_arguments_and_can_leave_the_cache_alone() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("arguments", &Page::default());
    let file = fs::read_to_string(project.folder.join("Containerfile")).unwrap();
    let asked = "ARG WORD=own\nRUN echo \"it says $WORD\"\n";
    project.write("Containerfile", &format!("{file}{asked}"));
    let build = |words: &[&str]| {
        let plain = ["--progress", "plain"];
        project
            .run("build", &[&plain[..], words].concat())
            .ok()
            .stderr
    };
    assert!(build(&[]).contains("| it says own\n"));
    let given = ["--build-arg", "WORD=given"];
    assert!(build(&given).contains("| it says given\n"));
    let again = build(&given);
    assert!(!again.contains("it says given\n"), "{again}");
    let anew = build(&["--build-arg=WORD=given", "--no-cache", "--explain"]);
    assert!(anew.contains("| it says given\n"), "{anew}");
    assert!(anew.contains("no_cache asks for it"), "{anew}");
    let refused = project.run("build", &["--build-arg", "=x"]).code(&[2]);
    assert!(
        refused.stderr.contains("a name must stand before `=`"),
        "{refused}"
    );
}

#[test]
fn verify_names_the_file_that_differs() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("verify", &Page::default());
    let ran = project.run("build", &["--verify"]).ok();
    assert_eq!(ran.stdout, "web: the same again, bit for bit\n", "{ran}");
    let file = fs::read_to_string(project.folder.join("Containerfile")).unwrap();
    project.write(
        "Containerfile",
        &format!("{file}RUN date +%s%N > /www/time\n"),
    );
    let ran = project.run("build", &["--verify"]).code(&[4]);
    assert!(
        ran.stdout.starts_with("web: /www/time: content from byte "),
        "{ran}"
    );
    assert!(ran.stdout.contains("date +%s%N > /www/time"), "{ran}");
    let found = project
        .run("build", &["--verify", "--json"])
        .code(&[4])
        .json();
    assert_eq!(found["web"].as_array().unwrap().len(), 1);
    assert_eq!(found["web"][0]["path"], "/www/time");
}

#[test]
fn gc_while_it_builds_takes_nothing_away() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("gcbuild", &Page::default());
    project.up().ok();
    // As a build that was killed leaves it.
    let left = kiln.root.join("cache/run/build-abcdef");
    fs::create_dir(&left).unwrap();
    kiln.run(&["gc", "--dry-run"]).ok();
    assert!(left.exists());
    kiln.run(&["gc"]).ok();
    assert!(!left.exists());
    for round in 0..3 {
        project.write("www/index.html", &format!("round {round}"));
        let mut up = project.start("up", &[]);
        while !up.is_over() {
            kiln.run(&["gc", "--keep", "0"]).ok();
        }
        up.end().ok();
        assert_eq!(project.page(), format!("round {round}"));
    }
    kiln.run(&["fsck"]).ok();
}

#[test]
fn fsck_finds_a_changed_byte_and_repair_lets_it_be_built_anew() {
    let Some(kiln) = Kiln::new() else { return };
    let text = "a text that is long enough to be an object of its own\n".repeat(400);
    let project = kiln.page(
        "fsck",
        &Page {
            text: &text,
            ..Page::default()
        },
    );
    project.up().ok();
    kiln.run(&["fsck"]).ok();
    let object = find(&kiln.root.join("store/objects"), text.as_bytes()).expect("no object");
    let mut bytes = text.clone().into_bytes();
    bytes[5] ^= 1;
    let _ = fs::remove_file(&object);
    fs::write(&object, &bytes).unwrap();
    let name = object.file_name().unwrap().to_string_lossy().into_owned();
    let ran = kiln.run(&["fsck"]).code(&[8]);
    assert!(
        format!("{}{}", ran.stdout, ran.stderr).contains(&name),
        "{ran}"
    );
    kiln.run(&["fsck", "--repair"]);
    project.run("down", &[]).ok();
    project.up().ok();
    assert_eq!(project.page(), text.trim());
    kiln.run(&["fsck"]).ok();
}

fn find(folder: &std::path::Path, content: &[u8]) -> Option<std::path::PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, content) {
                return Some(found);
            }
        } else if fs::read(&path).is_ok_and(|bytes| bytes == content) {
            return Some(path);
        }
    }
    None
}

#[test]
fn a_process_that_is_not_from_the_image_is_drift() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    volumes: [{type: volume, source: data, target: /data, x-kiln: {exec: true}}]";
    let more = "volumes: {data: {}}";
    let project = kiln.page(
        "drift",
        &Page {
            keys,
            more,
            ..Page::default()
        },
    );
    project.up().ok();
    let line = "cp /bin/busybox /data/sleep; /data/sleep 1000 >/dev/null 2>&1 &";
    project.inside("web", line).ok();
    let status = project.status();
    let drift = first_instance(&status)["drift"].to_string();
    assert!(drift.contains("/data/sleep"), "{status}");
}

#[test]
fn a_terminal_shows_old_and_new_side_by_side() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("live", &Page::default());
    project.up().ok();
    let slow = Page {
        before: "sleep 3",
        ..Page::default()
    };
    project.write("run", &slow.program());
    let shown = project.run_on_a_terminal("up").ok().stdout;
    let both = shown
        .lines()
        .find(|l| l.contains("live-web-1 ready") && l.contains("live-web-2 "));
    assert!(both.is_some_and(|l| l.starts_with("web")), "{shown}");
    assert!(shown.contains("RELEASE 1"), "{shown}");
    // What was drawn is taken away; what it led to stays.
    let end = shown.rsplit("\u{1b}[J").next().unwrap_or_default();
    assert!(end.contains("release 2 is proven and serves"), "{shown}");
    assert!(!end.contains("SERVICE"), "{shown}");
}
