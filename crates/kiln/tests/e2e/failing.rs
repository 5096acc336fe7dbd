//! Releases that are no good: what served goes on serving, and the exit code says so.

use std::net::TcpListener;
use std::path::Path;

use kiln_testkit::load::Mode;
use rustix::process::Signal;

use crate::common::{Kiln, Page, Project, leftovers, lend_packages, wait_until};
use crate::load::under_load;

/// The isolated test's host name: programs can be good there and bad in earnest.
const ONLY_IN_EARNEST: &str = "test \"$(hostname)\" = kiln-test || ";

/// `up` of a bad change: fails with one of the codes, and touches nothing that serves.
#[track_caller]
fn stays(project: &Project, codes: &[i32], says: &[&str]) {
    let before = project.instances(None);
    assert!(before.iter().all(|i| i.serving), "{before:?}");
    let (report, ran) = under_load(project.port, Mode::NewConnection, 50, || {
        project.run("up", &[])
    });
    ran.code(codes).says(says);
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.page(), "one");
    wait_until("only the old instances", || {
        project.instances(None) == before
    });
}

#[test]
fn a_program_that_crashes_at_once_never_takes_over() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("crash", &Page::default());
    project.up().ok();
    let bad = Page {
        before: "echo broken on purpose; exit 7",
        ..Page::default()
    };
    project.write("run", &bad.program());
    stays(&project, &[5], &["broken on purpose", "web"]);
    // Nothing of it is in the history, or it says that it failed.
    assert!(
        project
            .releases()
            .iter()
            .skip(1)
            .all(|(_, how)| how == "failed")
    );
    // And mending it works.
    project.write("run", &Page::default().program());
    project.write("www/index.html", "two");
    project.up().ok();
    assert_eq!(project.page(), "two");
}

#[test]
fn a_program_that_crashes_in_earnest_never_takes_over() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("earnest", &Page::default());
    project.up().ok();
    let before = format!("{ONLY_IN_EARNEST}{{ echo broken on purpose; exit 7; }}");
    project.write(
        "run",
        &Page {
            before: &before,
            ..Page::default()
        }
        .program(),
    );
    stays(&project, &[1], &["broken on purpose", "web"]);
    assert_eq!(
        project.releases(),
        [(1, "proven".into()), (2, "failed".into())]
    );
}

#[test]
fn a_program_that_never_gets_ready_never_takes_over() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("unready", &Page::default());
    project.up().ok();
    let before = format!("{ONLY_IN_EARNEST} {{ echo waiting for godot; exec sleep 1000; }}");
    project.write(
        "run",
        &Page {
            before: &before,
            ..Page::default()
        }
        .program(),
    );
    stays(&project, &[1], &["web", "waiting for godot"]);
}

#[test]
fn a_healthcheck_that_fails_stops_the_release() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    healthcheck: {test: [CMD, grep, -q, good, /www/health], interval: 1s, \
                retries: 2, timeout: 5s}";
    let page = Page {
        keys,
        ..Page::default()
    };
    let project = kiln.page("health", &page);
    project.write("www/health", "good");
    project.up().ok();
    project.write("www/health", "bad");
    stays(&project, &[5], &["web", "healthcheck"]);
}

#[test]
fn a_check_that_fails_stops_the_release() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {test: [{http: {port: 8000, path: /, body: one}}, \
                {exec: {command: [cat, /www/index.html], output: one}}]}";
    let project = kiln.page(
        "check",
        &Page {
            keys,
            ..Page::default()
        },
    );
    project.up().ok();
    let tested = |all: &serde_json::Value| {
        let web = &all["tests"]["web"];
        let cases = web["cases"].as_array().unwrap().iter();
        let names: Vec<&str> = cases.filter_map(|case| case["name"].as_str()).collect();
        let passed = web["checks"]["passed"].as_u64().unwrap();
        assert_eq!(
            (web["verdict"].as_str(), names.len() as u64),
            (Some("passed"), passed)
        );
        let checks = [
            "x-kiln.test[0] (http :8000/)",
            "x-kiln.test[1] (exec cat /www/index.html)",
        ];
        assert!(
            checks.iter().all(|check| names.contains(check)),
            "{names:?}"
        );
        (web["when"].as_u64().unwrap(), passed)
    };
    let (when, passed) = tested(&project.status());
    let releases = project.run("releases", &["--json"]).ok().json();
    assert_eq!(tested(&releases[0]), (when, passed));
    assert!(
        when <= releases[0]["created"].as_u64().unwrap(),
        "{releases}"
    );
    let text = project.run("status", &[]).ok().stdout;
    assert!(text.contains(&format!("{passed} passed (start")), "{text}");
    let text = project.run("releases", &[]).ok().stdout;
    assert!(text.contains("all 1"), "{text}");
    // Without the cache, what the audit log has.
    std::fs::remove_dir_all(kiln.root.join("cache/tests")).unwrap();
    let web = project.status()["tests"]["web"].clone();
    assert_eq!(
        (&web["cases"], web["when"].as_u64()),
        (&serde_json::Value::Null, Some(when))
    );
    assert_eq!(web["checks"]["passed"].as_u64(), Some(passed));

    project.write("www/index.html", "two");
    stays(&project, &[5], &["x-kiln.test[0]", "web"]);
    let entries = project.kiln(&["audit", "--json"]).ok().stdout;
    assert!(
        entries.contains("test"),
        "no word of the test in the audit log: {entries}"
    );
}

#[test]
fn a_first_release_that_fails_leaves_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let before = format!("{ONLY_IN_EARNEST}exit 7");
    let project = kiln.page(
        "firstbad",
        &Page {
            before: &before,
            ..Page::default()
        },
    );
    project.run("up", &[]).code(&[1]).says(&["web"]);
    wait_until("no instances", || project.instances_if_known().is_empty());
}

#[test]
fn a_port_of_another_program_is_named() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("taken", &Page::default());
    let _other = TcpListener::bind(("0.0.0.0", project.port)).unwrap();
    let port = project.port.to_string();
    project
        .run("up", &[])
        .code(&[1, 6, 7])
        .says(&[&port, "in use"]);
    wait_until("no instances", || project.instances_if_known().is_empty());
}

#[test]
fn a_new_port_that_is_taken_leaves_the_old_serving() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("moved", &Page::default());
    project.up().ok();
    let other = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let taken = other.local_addr().unwrap().port().to_string();
    let second = format!("ports: [\"${{PORT}}:8000\", \"{taken}:8000\"]");
    project.edit("compose.yaml", "ports: [\"${PORT}:8000\"]", &second);
    stays(&project, &[1, 6, 7], &[&taken, "in use"]);
}

#[test]
fn two_ups_at_once_make_one_release_of_one_content() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "twice",
        &Page {
            before: "sleep 1",
            ..Page::default()
        },
    );
    let (a, b) = (project.start("up", &[]), project.start("up", &[]));
    let (a, b) = (a.end(), b.end());
    for ran in [&a, &b] {
        // Both see it through, or one is told that another is at it.
        assert!(matches!(ran.code, Some(0 | 7)), "{ran}");
    }
    assert!(a.code == Some(0) || b.code == Some(0), "{a}\n{b}");
    assert_eq!(project.page(), "one");
    assert_eq!(project.releases(), [(1, "proven".into())]);
    let instances = project.instances(None);
    assert_eq!(instances.len(), 1, "{instances:?}");
}

#[test]
fn ctrl_c_while_it_rolls_out_leaves_the_old_and_says_so() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("interrupt", &Page::default());
    project.up().ok();
    let before = project.instances(None);
    let slow = Page {
        before: "sleep 8",
        text: "two",
        ..Page::default()
    };
    project.write("run", &slow.program());
    project.write("www/index.html", "two");
    let up = project.start("up", &[]);
    wait_until("an instance of release 2", || {
        project.instances(None).iter().any(|i| i.release == 2)
    });
    up.signal(Signal::INT);
    up.end()
        .code(&[130])
        .says_one_of(&["release 1", "1 serves"]);
    assert_eq!(project.page(), "one");
    wait_until("only the old instances", || {
        project.instances(None) == before
    });
    let status = project.status();
    assert_eq!(status["proven"], 1, "{status}");
}

#[test]
fn ctrl_c_while_it_builds_leaves_nothing_half_done() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("interruptbuild", &Page::default());
    project.up().ok();
    project.edit(
        "Containerfile",
        "COPY www",
        "RUN [\"/bin/sleep\", \"300\"]\nCOPY www",
    );
    let up = project.start("up", &[]);
    let sleeps = || {
        leftovers(&kiln.root, false)
            .iter()
            .any(|l| l.contains("sleep 300"))
    };
    wait_until("the build's step", sleeps);
    up.signal(Signal::INT);
    up.end().code(&[130]);
    wait_until("the end of the build's step", || !sleeps());
    assert_eq!(project.page(), "one");
    assert_eq!(project.releases().len(), 1);
}

#[test]
fn a_full_disk_stops_the_build_and_nothing_else() {
    let Some(kiln) = Kiln::new() else { return };
    let disk = SmallDisk::mount(&kiln.root);
    let project = kiln.page("full", &Page::default());
    project.up().ok();
    let before = project.instances(None);

    let filler = kiln.root.join("filler");
    disk.fill(&filler);
    let big = "RUN [\"/bin/busybox\", \"dd\", \"if=/dev/urandom\", \"of=/big\", \"bs=1M\", \"count=8\"]\n";
    let containerfile = std::fs::read_to_string(project.folder.join("Containerfile")).unwrap();
    project.write("Containerfile", &format!("{containerfile}{big}"));
    project
        .run("up", &[])
        .code(&[4])
        .says(&["o space left on device", "kiln gc"]);
    assert_eq!(project.instances(None), before);
    assert_eq!(project.page(), "one");

    std::fs::remove_file(&filler).unwrap();
    project.run("up", &[]).ok();
    assert_eq!(project.page(), "one");
}

/// A file system for one root, small enough to be filled.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    const OPTIONS: &'static std::ffi::CStr = c"size=160m";

    fn mount(root: &'a Path) -> Self {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", root, "tmpfs", flags, Self::OPTIONS).unwrap();
        lend_packages(root);
        Self(root)
    }

    /// Leaves room for records, not for what a build makes.
    fn fill(&self, filler: &Path) {
        let space = rustix::fs::statvfs(self.0).unwrap();
        let free = space.f_bavail * space.f_frsize;
        let file = std::fs::File::create(filler).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, free - (2 << 20)).unwrap();
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}
