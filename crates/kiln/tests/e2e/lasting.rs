//! What outlasts a rollout: instances that get old, and data that has moved on.

use std::fs;

use kiln_testkit::load::{Load, Mode};

use crate::common::{App, Kiln, wait_until};
use crate::matrix::{at, under};

#[test]
fn instances_live_no_longer_than_max_age_and_nobody_notices() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        keys: "    deploy: {replicas: 2}\n    x-kiln: {max_age: 10s, drain: 1s}",
        ..App::default()
    };
    let project = kiln.app("aging", &app);
    project.up().ok();
    let ids = || {
        let all = project.settled(None);
        all.into_iter().map(|i| i.id).collect::<Vec<_>>()
    };
    let before = ids();
    let load = Load::new(at(project.port), 50, Mode::KeepAlive { connections: 4 });
    let reports = under(vec![load], || {
        wait_until("other instances", || {
            let now = project.instances_if_known();
            let ready = now.iter().filter(|i| i.phase == "ready").count();
            ready == 2 && now.iter().all(|i| !before.contains(&i.id))
        });
    });
    assert_eq!(reports[0].failed(), 0, "{}", reports[0]);
    // No new release: the same one, by other instances.
    assert_eq!(project.releases().len(), 1);
}

#[test]
fn data_that_has_moved_on_can_be_brought_back() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        environment: "      APP_LOCK: /data/lock",
        keys: "    volumes: [\"data:/data\"]\n    x-kiln: {snapshot: true}",
        more: "volumes: {data: {}}",
    };
    let mut project = kiln.app("moved", &app);
    project.up().ok();
    let data = kiln.root.join("volumes/moved_data/data");
    let starts = || fs::read_to_string(data.join("lock.starts")).unwrap();
    assert_eq!(starts().lines().count(), 1);
    let list = || {
        let listed = kiln.run(&["snapshots", "list", "--json"]).ok().json();
        listed.as_array().unwrap().clone()
    };
    assert!(list().is_empty(), "a first release has nothing to lose");
    project.set("VERSION", 2);
    project
        .up()
        .ok()
        .says(&["snapshot 1 of volume moved_data is taken before release 2"]);
    assert_eq!((starts().lines().count(), list().len()), (2, 1));
    let shown = kiln.run(&["snapshots", "list"]).ok().stdout;
    assert!(shown.contains("before web of moved's release 2"), "{shown}");
    // Nothing has changed: nothing is copied.
    project.up().ok();
    assert_eq!(list().len(), 1);
    project.kiln(&["rollback", "-e", "moved"]).ok().says(&[
        "has moved past release 1",
        "kiln snapshots restore moved_data 1",
    ]);
    let restore = || kiln.run(&["snapshots", "restore", "moved_data", "1"]);
    restore().code(&[7]).says(&["is in use by moved-web-"]);
    project.run("down", &[]).ok();
    let last = starts();
    let said = restore().ok().stdout;
    assert!(said.contains("is as it was in snapshot 1"), "{said}");
    assert_eq!(starts().lines().count(), 1);
    let newest = list().len().to_string();
    let kept = data.with_file_name("snapshots").join(newest);
    assert_eq!(
        fs::read_to_string(kept.join("data/lock.starts")).unwrap(),
        last
    );
    let audit = kiln.run(&["audit"]).ok().stdout;
    assert!(audit.contains("restore"), "{audit}");
    kiln.run(&["snapshots", "restore", "moved_data", "99"])
        .code(&[7])
        .says(&["no snapshot 99", "kiln snapshots list"]);
}
