//! The daemon dies right before and right after everything that it does. The next one goes
//! on: nothing fails, nothing is left, nothing runs twice.

use std::fs;

use kiln_testkit::load::{Load, Mode};

use crate::canary::prometheus;
use crate::common::{App, Instance, Kiln, Project, Running, wait_until};
use crate::honour::nothing_is_left;
use crate::matrix::{at, under};

/// `kiln_daemon::crash` says what they mean.
const EFFECTS: [&str; 9] = [
    "networks", "start", "route", "drain", "stop", "remove", "conclude", "save", "release",
];
/// Where the first passing is that of the daemon's own beginning, a later one is in the
/// midst of the rollout.
const LATER: [&str; 7] = [
    "before-start:3",
    "after-start:2",
    "after-route:2",
    "after-save:5",
    "before-save:9",
    "after-stop:2",
    "after-remove:3",
];

/// Two services: copies that are replaced side by side, and one that is handed over.
const WRITER: &str = "  writer:
    build: .
    environment:
      APP_VERSION: \"${VERSION}\"
      APP_LOCK: /data/lock
    volumes: [\"./data:/data\"]";

fn dies_at(project: &mut Project, point: &str, version: u32) {
    let kiln = project.kiln;
    kiln.run(&["daemon", "stop"]).ok();
    let mut command = kiln.command(&["daemon", "run"]);
    command.env("KILN_CRASH_AT", point);
    let mut daemon = Running::start(command);
    let pid = daemon.pid();
    wait_until("a daemon that answers or is dead", || {
        kiln.daemon() == Some(pid) || daemon.is_over()
    });
    project.set("VERSION", version);
    let up = project.run("up", &[]);
    // What goes is gone a moment after that.
    wait_until(&format!("a death {point}"), || daemon.is_over());
    if up.code != Some(0) {
        // It could not know whether its request was heard.
        up.code(&[6, 7]);
        project.up().ok();
    }
    let done = |all: &[Instance]| {
        let one = |s: &str| all.iter().filter(|i| i.service == s).count();
        all.iter().all(|i| i.phase == "ready") && one("web") == 2 && one("writer") == 1
    };
    wait_until(&format!("the right copies after {point}"), || {
        done(&project.instances_if_known())
    });
    assert_eq!(project.page(), version.to_string(), "{point}");
    let overlaps = fs::read_to_string(project.folder.join("data/lock.overlaps"));
    assert!(overlaps.is_err(), "two writers {point}: {overlaps:?}");
    let unfinished: Vec<_> = project
        .releases()
        .into_iter()
        .filter(|(_, outcome)| outcome != "proven")
        .collect();
    assert!(
        unfinished.iter().all(|(_, outcome)| outcome == "failed"),
        "{point}: {unfinished:?}"
    );
}

fn all_points(name: &str, points: &[String]) {
    with_rollout(name, "", points);
}

/// `rollout` is the service's `x-kiln` block, if it has one.
fn with_rollout(name: &str, rollout: &str, points: &[String]) {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        keys: &format!("    restart: always\n    deploy: {{replicas: 2}}\n{rollout}"),
        more: WRITER,
        ..App::default()
    };
    let mut project = kiln.app(name, &app);
    fs::create_dir(project.folder.join("data")).unwrap();
    project.up().ok();
    let load = Load::new(at(project.port), 100, Mode::NewConnection);
    let reports = under(vec![load], || {
        for (point, version) in points.iter().zip(2..) {
            dies_at(&mut project, point, version);
        }
    });
    assert_eq!(reports[0].failed(), 0, "{}", reports[0]);
    project.run("down", &[]).ok();
    nothing_is_left(&kiln);
}

fn around(when: &str) -> Vec<String> {
    EFFECTS.iter().map(|e| format!("{when}-{e}")).collect()
}

#[test]
fn the_daemon_dies_before_each_effect() {
    all_points("before", &around("before"));
}

#[test]
fn the_daemon_dies_after_each_effect() {
    all_points("after", &around("after"));
}

/// What is asked of the proxy, and of Prometheus, while a release is judged.
#[test]
fn the_daemon_dies_while_a_canary_is_judged() {
    let (address, _server) = prometheus("0");
    let rollout = format!(
        "    x-kiln: {{rollout: {{strategy: canary, steps: [{{weight: 20, duration: 1s}}], \
         analysis: {{prometheus: {{url: 'http://{address}', query: errors, max: 1}}}}}}}}"
    );
    let points = [
        "before-measure",
        "after-measure",
        "after-measure:3",
        "before-query",
        "after-query",
    ];
    with_rollout("judged", &rollout, &points.map(str::to_owned));
}

#[test]
fn the_daemon_dies_in_mid_rollout() {
    all_points("later", &LATER.map(str::to_owned));
}
