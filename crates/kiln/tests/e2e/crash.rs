//! kill -9, here and there, at bad moments.

use kiln_testkit::load::Mode;
use rustix::process::Signal;

use crate::common::{Kiln, Page, Project, alive, get, kill, leftovers, wait_until};
use crate::load::under_load;

const THREE: &str = "    restart: always\n    deploy: {replicas: 3}";

/// Only copies of this release, all of them serving.
fn settled(project: &Project, release: u64, count: usize) -> bool {
    let all = project.instances_if_known();
    all.len() == count && all.iter().all(|i| i.serving && i.release == release)
}

#[test]
fn the_daemon_killed_in_mid_rollout_drops_nothing_and_the_next_one_goes_on() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: THREE,
        before: "sleep 2",
        ..Page::default()
    };
    let project = kiln.page("mid", &page);
    project.up().ok();
    project.write("www/index.html", "two");
    let (report, ()) = under_load(project.port, Mode::NewConnection, 200, || {
        let up = project.start("up", &[]);
        wait_until("an instance of release 2", || {
            project.instances(None).iter().any(|i| i.release == 2)
        });
        kiln.kill_daemon();
        // The command finds or starts another daemon and sees it through.
        up.end().ok();
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.page(), "two");
    wait_until("three copies of release 2 alone", || {
        settled(&project, 2, 3)
    });
    assert_eq!(
        project.releases(),
        [(1, "proven".into()), (2, "proven".into())]
    );
}

#[test]
fn the_daemon_and_the_command_killed_in_mid_rollout() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: THREE,
        before: "sleep 2",
        ..Page::default()
    };
    let project = kiln.page("both", &page);
    project.up().ok();
    // Killed again and again, each time a little later: it must converge all the same.
    for round in 0..4_u64 {
        let text = format!("round {round}");
        project.write("www/index.html", &text);
        let (report, _daemon) = under_load(project.port, Mode::NewConnection, 100, || {
            let up = project.start("up", &[]);
            let wanted = round + 2;
            wait_until("the release to begin", || {
                project
                    .instances_if_known()
                    .iter()
                    .any(|i| i.release == wanted)
            });
            std::thread::sleep(std::time::Duration::from_millis(900 * round));
            drop(up);
            if kiln.daemon().is_some() {
                kiln.kill_daemon();
            }
            let daemon = kiln.start_daemon();
            wait_until("the new release alone", || settled(&project, wanted, 3));
            daemon
        });
        assert_eq!(report.failed(), 0, "{report}");
        assert_eq!(project.page(), text);
    }
}

#[test]
fn services_outlive_the_daemon_and_the_next_one_adopts_them() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "adopt",
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let before = project.instances(None);
    let (report, _daemon) = under_load(project.port, Mode::NewConnection, 100, || {
        kiln.kill_daemon();
        assert_eq!(project.page(), "one");
        assert!(
            before.iter().all(|i| i.pid.is_some_and(alive)),
            "{before:?}"
        );
        let daemon = kiln.start_daemon();
        wait_until("all known again", || project.instances_if_known() == before);
        daemon
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.releases().len(), 1);
}

#[test]
fn a_stopped_daemon_leaves_services_alone() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("stop", &Page::default());
    project.up().ok();
    let before = project.instances(None);
    kiln.run(&["daemon", "stop"]).ok();
    wait_until("the daemon's end", || kiln.daemon().is_none());
    assert_eq!(project.page(), "one");
    // `up` starts it again, and nothing has changed.
    project.up().ok();
    assert_eq!(project.instances(None), before);
}

#[test]
fn the_proxy_killed_comes_back_with_the_same_ports() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "proxy",
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let before = project.instances(None);
    let proxy = kiln.proxy().expect("no proxy");
    kill(proxy, Signal::KILL);
    wait_until("another proxy", || {
        kiln.proxy().is_some_and(|pid| pid != proxy)
    });
    project.wait_for_page("one");
    assert_eq!(project.instances(None), before);
}

#[test]
fn a_killed_shim_means_another_instance() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "shim",
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let before = project.instances(None);
    let lost = before[0].clone();
    let shims: Vec<u32> = leftovers(&kiln.root, false)
        .iter()
        .filter(|l| l.starts_with("process ") && l.contains(" shim") && l.contains(&lost.id))
        .filter_map(|l| l.split([' ', ':']).nth(1)?.parse().ok())
        .collect();
    assert_eq!(
        shims.len(),
        1,
        "whose shim? {:?}",
        leftovers(&kiln.root, false)
    );
    kill(shims[0], Signal::KILL);
    wait_until("another instance in its place", || {
        let now = project.instances_if_known();
        settled(&project, 1, 3) && now.iter().all(|i| i.id != lost.id)
    });
    assert!(
        !lost.pid.is_some_and(alive),
        "the program runs on without its shim"
    );
    let now = project.instances(None);
    assert!(
        before[1..].iter().all(|b| now.contains(b)),
        "others were touched: {now:?}"
    );
    assert_eq!(project.page(), "one");
}

#[test]
fn a_killed_program_means_another_instance() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "killed",
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let lost = project.instances(None)[0].clone();
    kill(lost.pid.expect("it has a process"), Signal::KILL);
    wait_until("another instance in its place", || {
        let now = project.instances_if_known();
        settled(&project, 1, 3) && now.iter().all(|i| i.id != lost.id)
    });
    assert_eq!(project.page(), "one");
}

#[test]
fn after_a_reboot_all_serves_again() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: "    restart: always\n    volumes: [\"data:/data\"]",
        before: "echo start >> /data/starts",
        more: "  plain:\n    build: .\nvolumes: {data: {}}",
        ..Page::default()
    };
    let project = kiln.page("reboot", &page);
    project.up().ok();
    kiln.lose_power();
    assert!(get(project.port, "/").is_err(), "something survived");
    let daemon = kiln.start_daemon();
    project.wait_for_page("one");
    wait_until("all services again", || {
        let all = project.instances_if_known();
        let count = |name: &str| {
            all.iter()
                .filter(|i| i.service == name && i.pid.is_some_and(alive))
                .count()
        };
        count("web") == 1 && count("plain") == 1 && all.len() == 2
    });
    assert_eq!(project.releases().len(), 1, "a reboot is no release");
    // It is as good as before: another release goes through.
    project.write("www/index.html", "two");
    project.up().ok();
    assert_eq!(project.page(), "two");
    drop(daemon);
}

#[test]
fn a_reboot_in_mid_rollout_converges() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "midboot",
        &Page {
            keys: THREE,
            before: "sleep 2",
            ..Page::default()
        },
    );
    project.up().ok();
    project.write("www/index.html", "two");
    let up = project.start("up", &[]);
    wait_until("an instance of release 2", || {
        project.instances_if_known().iter().any(|i| i.release == 2)
    });
    drop(up);
    kiln.lose_power();
    let daemon = kiln.start_daemon();
    wait_until("one release alone", || {
        settled(&project, 2, 3) || settled(&project, 1, 3)
    });
    let status = project.status();
    let wanted = if status["proven"] == 2 { "two" } else { "one" };
    assert_eq!(project.page(), wanted, "{status}");
    drop(daemon);
}
