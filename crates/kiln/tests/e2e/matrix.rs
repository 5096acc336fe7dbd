//! Programs of all kinds, replaced while they are under the load that hurts them.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use kiln_testkit::load::{Load, Method, Mode, Report};
use tokio::sync::watch;

use crate::common::{App, Kiln, Project, free_port, get, wait_until};

/// How long load goes on before and after.
const AROUND: Duration = Duration::from_millis(700);
const THREE: &str = "    deploy: {replicas: 3}";
/// The status of a close frame from a server that goes away (RFC 6455, 7.4.1).
pub const GOING_AWAY: u16 = 1001;

pub fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Works under all these loads; each one's report.
pub fn under(loads: Vec<Load>, work: impl FnOnce()) -> Vec<Report> {
    let (stop, stopped) = watch::channel(());
    let running = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let loads = loads.into_iter().map(|load| {
                let mut stopped = stopped.clone();
                tokio::spawn(load.run(async move {
                    // Sent, or dropped by a failed test: both end the load.
                    let _ = stopped.changed().await;
                }))
            });
            let loads: Vec<_> = loads.collect();
            let mut reports = vec![];
            for load in loads {
                reports.push(load.await.unwrap());
            }
            reports
        })
    });
    std::thread::sleep(AROUND);
    work();
    std::thread::sleep(AROUND);
    drop(stop);
    running.join().unwrap()
}

/// Every way to send something that the proxy has to carry whole.
pub fn every_way(port: u16, rate: u32) -> Vec<Load> {
    let kept = Mode::KeepAlive { connections: 8 };
    let post = |mode, bytes: usize| {
        Load::new(at(port), rate, mode)
            .send(Method::POST, "/echo", vec![b'x'; bytes])
            .echoed()
    };
    vec![
        post(Mode::NewConnection, 300),
        post(kept, 20_000),
        post(kept, 50_000).chunked(4_000),
        post(Mode::Http2 { connections: 4 }, 20_000),
        Load::new(at(port), rate, Mode::Websocket { connections: 10 }),
    ]
}

fn release(project: &mut Project, version: u32) {
    project.set("VERSION", version);
    project.up().ok();
    assert_eq!(project.page(), version.to_string());
}

#[track_caller]
fn nothing_failed(reports: &[Report]) {
    for report in reports {
        assert_eq!(report.failed(), 0, "{report}");
        assert!(report.requests() > 20, "hardly any load: {report}");
    }
}

#[test]
fn uploads_and_websockets_live_through_replacements() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        keys: THREE,
        ..App::default()
    };
    let mut project = kiln.app("ways", &app);
    project.up().ok();
    let reports = under(every_way(project.port, 60), || {
        release(&mut project, 2);
        release(&mut project, 3);
    });
    nothing_failed(&reports);
    // Their old instances are given a minute.
    let sockets = reports.last().unwrap();
    assert!(sockets.closed_websockets.is_empty(), "{sockets}");
}

#[test]
fn at_the_drain_limit_websockets_are_closed_by_a_frame() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        keys: "    x-kiln: {drain: 1s}",
        ..App::default()
    };
    let mut project = kiln.app("frames", &app);
    project.up().ok();
    let sockets = Mode::Websocket { connections: 10 };
    let reports = under(vec![Load::new(at(project.port), 100, sockets)], || {
        release(&mut project, 2);
        let old = || project.instances(None).iter().any(|i| i.release == 1);
        wait_until("the end of the old one", || !old());
    });
    nothing_failed(&reports);
    let closed: Vec<_> = reports[0].closed_websockets.iter().collect();
    assert_eq!(closed, [(&Some(GOING_AWAY), &10)], "{}", reports[0]);
}

#[test]
fn raw_connections_keep_their_instance_to_the_end() {
    let Some(kiln) = Kiln::new() else { return };
    let port = free_port();
    let keys = format!("{THREE}\n    expose: [8001]");
    let app = App {
        environment: "      APP_TCP_PORT: 8001",
        keys: &keys,
        ..App::default()
    };
    let mut project = kiln.app("raw", &app);
    let published = format!("\"${{PORT}}:8000\", \"{port}:8001\"");
    project.edit("compose.yaml", "\"${PORT}:8000\"", &published);
    project.up().ok();
    let mut load = Load::new(at(port), 100, Mode::Tcp);
    load.body = vec![7; 100_000];
    let reports = under(vec![load], || release(&mut project, 2));
    nothing_failed(&reports);
}

#[test]
fn slow_answers_are_waited_for() {
    let Some(kiln) = Kiln::new() else { return };
    let mut project = kiln.app("slow", &App::default());
    project.up().ok();
    let slow = |mode| {
        let mut load = Load::new(at(project.port), 20, mode);
        load.path = "/slow?ms=4000".into();
        load
    };
    let kept = Mode::KeepAlive { connections: 100 };
    let loads = vec![slow(Mode::NewConnection), slow(kept)];
    let reports = under(loads, || release(&mut project, 2));
    nothing_failed(&reports);
}

#[test]
fn who_ignores_sigterm_or_boots_for_long_is_replaced_like_others() {
    for (name, environment, keys) in [
        (
            "deaf",
            "      APP_IGNORE_TERM: 1",
            "    stop_grace_period: 1s",
        ),
        ("boots", "      APP_BOOT_MS: 2000", ""),
        (
            "checked",
            "      APP_BOOT_MS: 1000",
            "    x-kiln: {ready: {http: {port: 8000, path: /health}}}",
        ),
    ] {
        let Some(kiln) = Kiln::new() else { return };
        let app = App {
            environment,
            keys,
            ..App::default()
        };
        let mut project = kiln.app(name, &app);
        project.up().ok();
        let load = Load::new(at(project.port), 200, Mode::NewConnection);
        let reports = under(vec![load], || release(&mut project, 2));
        nothing_failed(&reports);
        assert_eq!(project.settled(None).len(), 1);
    }
}

#[test]
fn a_single_writer_is_handed_over_without_a_failure_or_a_second_writer() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        environment: "      APP_LOCK: /data/lock",
        keys: "    volumes: [\"./data:/data\"]",
        ..App::default()
    };
    let mut project = kiln.app("writer", &app);
    fs::create_dir(project.folder.join("data")).unwrap();
    project.up().ok();
    let mut loads = every_way(project.port, 50);
    // Websockets are cut by a handoff: there is no second one to drain beside.
    loads.pop();
    let reports = under(loads, || {
        release(&mut project, 2);
        release(&mut project, 3);
        project.kiln(&["rollback", "-e", "@"]).ok();
        assert_eq!(project.page(), "2");
    });
    nothing_failed(&reports);
    let lines = |name: &str| {
        let text = fs::read_to_string(project.folder.join("data").join(name));
        text.unwrap_or_default().lines().count()
    };
    assert_eq!(lines("lock.starts"), 4);
    assert_eq!(lines("lock.overlaps"), 0);
}

/// It serves well in its test, and is sick or gone when it matters. Another that nobody has
/// said how to ask fails every request.
#[test]
fn a_release_that_is_never_ready_takes_nothing_away() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        environment: "      APP_SICK: \"${SICK}\"\n      APP_CRASH_AFTER_MS: \"${CRASH}\"",
        keys: "    x-kiln: {ready: {http: {port: 8000, path: /health}}}",
        ..App::default()
    };
    let mut project = kiln.app("sick", &app);
    project.set("SICK", "");
    project.set("CRASH", "");
    project.up().ok();
    let failing = App {
        environment: "      APP_FAIL_PERCENT: \"${FAIL}\"",
        ..App::default()
    };
    let mut failing = kiln.app("failing", &failing);
    failing.set("FAIL", 0);
    failing.up().ok();
    let load = |port| Load::new(at(port), 100, Mode::NewConnection);
    let loads = vec![load(project.port), load(failing.port)];
    let reports = under(loads, || {
        failing.set("VERSION", 2);
        failing.set("FAIL", 100);
        let up = failing.start("up", &[]);
        for (key, value) in [("SICK", "1"), ("CRASH", "1")] {
            project.set(key, value);
            project.set("VERSION", 2);
            project.up().code(&[1, 5]);
            project.set(key, "");
            assert_eq!(get(project.port, "/").unwrap().body, "1");
        }
        up.end()
            .code(&[1])
            .says(&["answered GET / with 500", "release 1 serves"]);
        assert_eq!(failing.page(), "1");
    });
    nothing_failed(&reports);
}
