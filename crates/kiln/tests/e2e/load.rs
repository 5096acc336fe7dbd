//! Replacements while requests come in at a steady rate: none may fail.

use std::net::SocketAddr;
use std::time::Duration;

use kiln_testkit::load::{Load, Mode, Report};
use tokio::sync::oneshot;

use crate::common::{Kiln, Page, Project, get, wait_until};

/// Requests a second.
const RATE: u32 = 500;

/// How long load goes on before and after.
const AROUND: Duration = Duration::from_millis(700);

/// Works while requests come in; the requests are counted until after it is done.
pub fn under_load<T>(port: u16, mode: Mode, rate: u32, work: impl FnOnce() -> T) -> (Report, T) {
    let (stop, stopped) = oneshot::channel::<()>();
    let target = SocketAddr::from(([127, 0, 0, 1], port));
    let load = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(Load::new(target, rate, mode).run(async {
            // Sent, or dropped by a failed test: both end the load.
            let _ = stopped.await;
        }))
    });
    std::thread::sleep(AROUND);
    let result = work();
    std::thread::sleep(AROUND);
    drop(stop);
    (load.join().unwrap(), result)
}

const THREE: &str = "    deploy: {replicas: 3}";

fn replace_under(name: &str, mode: Mode) {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        name,
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let before = project.settled(Some("web"));
    assert_eq!(before.len(), 3, "{before:?}");
    project.write("www/index.html", "two");
    let (report, ran) = under_load(project.port, mode, RATE, || project.up());
    ran.ok();
    assert_eq!(report.failed(), 0, "{report}");
    assert!(
        report.requests() > u64::from(RATE) / 2,
        "hardly any load: {report}"
    );
    assert_eq!(project.page(), "two");
    let after = project.settled(Some("web"));
    assert_eq!(after.len(), 3, "{after:?}");
    assert!(
        after.iter().all(|i| i.serving && i.release == 2),
        "{after:?}"
    );
    assert!(
        before.iter().all(|b| after.iter().all(|a| a.id != b.id)),
        "{before:?} {after:?}"
    );
}

#[test]
fn three_replicas_are_replaced_and_no_new_connection_fails() {
    replace_under("fresh", Mode::NewConnection);
}

#[test]
fn three_replicas_are_replaced_and_no_kept_connection_fails() {
    replace_under("kept", Mode::KeepAlive { connections: 16 });
}

#[test]
fn scaling_up_and_down_loses_nothing_and_keeps_who_stays() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page(
        "scale",
        &Page {
            keys: THREE,
            ..Page::default()
        },
    );
    project.up().ok();
    let before = ids(&project);
    let (report, ()) = under_load(project.port, Mode::NewConnection, 100, || {
        project.edit("compose.yaml", "replicas: 3", "replicas: 1");
        project.up().ok();
        wait_until("one copy", || ids(&project).len() == 1);
        let one = ids(&project);
        assert!(before.contains(&one[0]), "{one:?} is not of {before:?}");
        project.edit("compose.yaml", "replicas: 1", "replicas: 2");
        project.up().ok();
        wait_until("two copies", || ids(&project).len() == 2);
        let two = ids(&project);
        assert!(two.contains(&one[0]), "{one:?} is not in {two:?}");
    });
    assert_eq!(report.failed(), 0, "{report}");
}

/// The port is the project's only promise: whatever holds it goes on answering.
#[test]
fn a_single_copy_is_replaced_and_rolled_back_without_a_failed_request() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    container_name: only-one";
    let project = kiln.page(
        "single",
        &Page {
            keys,
            ..Page::default()
        },
    );
    project.up().ok();
    project.write("www/index.html", "two");
    let (report, ()) = under_load(project.port, Mode::NewConnection, 200, || {
        project.up().ok();
        assert_eq!(project.page(), "two");
        project.kiln(&["rollback", "-e", "@"]).ok();
        assert_eq!(get(project.port, "/").unwrap().body, "one");
    });
    assert_eq!(report.failed(), 0, "{report}");
}

fn ids(project: &Project) -> Vec<String> {
    project
        .settled(Some("web"))
        .into_iter()
        .map(|i| i.id)
        .collect()
}
