//! A new kiln comes in while the old one serves.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_testkit::load::{Load, Mode};

use crate::common::{App, Kiln, Page, Running, alive, wait_until};
use crate::load::under_load;
use crate::matrix::{GOING_AWAY, at, under};

const THREE: &str = "    deploy: {replicas: 3}";

/// Another program, though with the same code.
fn another(kiln: &Kiln, name: &str) -> PathBuf {
    let path = kiln.folder().join(name);
    fs::copy(env!("CARGO_BIN_EXE_kiln"), &path).unwrap();
    path
}

fn runs(pid: u32, program: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap() == program
}

fn replaced_by_another_program(mode: Mode) {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: THREE,
        ..Page::default()
    };
    let project = kiln.page("upgrade", &page);
    project.up().ok();
    let before = project.settled(None);
    let (daemon, proxy) = (kiln.daemon().unwrap(), kiln.proxy().unwrap());
    let new = another(&kiln, "kiln-next");
    let with_new = |words: &[&str]| {
        let mut command = kiln.command_of(&new, words);
        command.env("PORT", project.port.to_string());
        Running::start(command).end()
    };
    let folder = project.folder.to_string_lossy().into_owned();
    let (report, ()) = under_load(project.port, mode, 300, || {
        with_new(&["up", &folder])
            .ok()
            .says(&["kiln daemon restart"]);
        with_new(&["daemon", "restart"]).ok();
        let now = kiln.proxy().unwrap();
        assert!(runs(now, &new) && now != proxy);
        assert!(runs(kiln.daemon().unwrap(), &new));
        // The new proxy is told what the daemon decides: a release goes through it.
        assert_eq!(project.settled(None), before);
        project.write("www/index.html", "two");
        with_new(&["up", &folder]).ok();
        assert_eq!(project.page(), "two");
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert!(report.requests() > 300, "hardly any load: {report}");
    assert!(!alive(daemon));
    wait_until("the end of the old proxy", || !alive(proxy));
    // The same program again: there is nothing to take over.
    let proxy = kiln.proxy();
    with_new(&["daemon", "restart"]).ok();
    assert_eq!(kiln.proxy(), proxy);
}

#[test]
fn a_new_kiln_fails_no_new_connection() {
    replaced_by_another_program(Mode::NewConnection);
}

#[test]
fn a_new_kiln_fails_no_kept_connection() {
    replaced_by_another_program(Mode::KeepAlive { connections: 8 });
}

/// They stay with the retired proxy, which is led on: a release drains them as ever.
#[test]
fn a_new_kiln_keeps_websockets() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        keys: "    x-kiln: {drain: 1s}",
        ..App::default()
    };
    let mut project = kiln.app("kept", &app);
    project.up().ok();
    let old = kiln.proxy().unwrap();
    let new = another(&kiln, "kiln-next");
    let sockets = Mode::Websocket { connections: 10 };
    let load = Load::new(at(project.port), 100, sockets);
    let reports = under(vec![load.clone()], || {
        Running::start(kiln.command_of(&new, &["daemon", "restart"]))
            .end()
            .ok();
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert!(alive(old) && kiln.proxy() != Some(old));
    });
    assert_eq!(reports[0].failed(), 0, "{}", reports[0]);
    assert!(reports[0].closed_websockets.is_empty(), "{}", reports[0]);
    wait_until("the end of the old proxy", || !alive(old));
    let next = another(&kiln, "kiln-after");
    let reports = under(vec![load], || {
        Running::start(kiln.command_of(&next, &["daemon", "restart"]))
            .end()
            .ok();
        project.set("VERSION", 2);
        project.up().ok();
        let old = || project.instances(None).iter().any(|i| i.release == 1);
        wait_until("the end of the old copy", || !old());
    });
    assert_eq!(reports[0].failed(), 0, "{}", reports[0]);
    let closed: Vec<_> = reports[0].closed_websockets.iter().collect();
    assert_eq!(closed, [(&Some(GOING_AWAY), &10)], "{}", reports[0]);
}

#[test]
fn a_proxy_that_can_not_come_in_leaves_the_old_one_serving() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("stays", &Page::default());
    project.up().ok();
    let proxy = kiln.proxy().unwrap();
    // Tables that can't be read end the new one before it has begun, and nobody can write
    // others in a folder's place.
    let tables = kiln.root.join("run/proxy.json");
    fs::remove_file(&tables).unwrap();
    fs::create_dir(&tables).unwrap();
    let new = another(&kiln, "kiln-next");
    Running::start(kiln.command_of(&new, &["daemon", "restart"]))
        .end()
        .code(&[6])
        .says(&["of the earlier kiln goes on", "daemon.log"]);
    assert_eq!(kiln.proxy(), Some(proxy));
    assert_eq!(project.page(), "one");
    let log = fs::read_to_string(kiln.root.join("run/daemon.log")).unwrap();
    assert!(
        log.contains("the proxy of an earlier kiln goes on"),
        "{log}"
    );
}
