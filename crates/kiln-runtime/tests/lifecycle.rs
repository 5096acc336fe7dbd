//! Starting, ending, observing and removing real instances.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Fixture, can_run, until};
use kiln_model::Millis;
use kiln_model::instance::*;

#[test]
fn a_program_runs_to_its_end_with_its_output_and_exit_code() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.layered(), "echo $GREETING; echo oops >&2; exit 3");
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(3), "{out}");
    assert!(out.contains("hello\n") && out.contains("E:oops\n"), "{out}");
    assert!(f.runtime.observe(&spec.id).is_none());
}

#[test]
fn a_sealed_instance_is_observed_stopped_and_removed() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(
        f.sealed(&[]),
        "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done",
    );
    let began = std::time::Instant::now();
    let started = f.runtime.start(&spec).unwrap();
    eprintln!("started in {:?}", began.elapsed());
    assert_eq!(
        f.runtime.start(&spec).unwrap(),
        started,
        "the same spec again"
    );
    let observed = f.runtime.observe(&spec.id).unwrap();
    assert_eq!(
        observed.state,
        ObservedState::Running {
            pid: started.pid,
            since: started.since
        }
    );
    until("output", || f.log_text(&spec.id).contains("up"));
    assert!(f.runtime.seal_state(&spec.id).unwrap().read_only);
    assert_eq!(
        f.runtime.stop(&spec.id, "TERM", Millis(5000)).unwrap(),
        ExitStatus::Code(7)
    );
    assert!(f.log_text(&spec.id).contains("bye"));
    f.runtime.remove(&spec.id).unwrap();
    f.runtime.remove(&spec.id).unwrap();
    assert!(f.runtime.observe(&spec.id).is_none());
}

#[test]
fn a_program_that_ignores_the_signal_is_killed_after_the_grace() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.sealed(&[]), "trap '' TERM; echo up; (while :; do sleep 0.1; done) & while :; do sleep 0.1; done");
    f.runtime.start(&spec).unwrap();
    let began = std::time::Instant::now();
    assert_eq!(f.runtime.stop(&spec.id, "SIGTERM", Millis(300)).unwrap(), ExitStatus::Signal(9));
    assert!(began.elapsed() >= std::time::Duration::from_millis(300));
    let mut spec = f.spec(f.sealed(&[]), "kill -SEGV $$");
    assert_eq!(f.run(&spec).0, ExitStatus::Code(139).min_signal());
    spec = f.spec(f.sealed(&[]), "trap 'exit 5' USR2; echo up; while :; do sleep 0.05; done");
    spec.init = true;
    f.runtime.start(&spec).unwrap();
    until("output", || f.log_text(&spec.id).contains("up"));
    f.runtime.signal(&spec.id, "usr2").unwrap();
    assert_eq!(f.runtime.wait(&spec.id).unwrap(), ExitStatus::Code(5));
}

trait MinSignal {
    fn min_signal(self) -> Self;
}

impl MinSignal for ExitStatus {
    /// A first process can't end itself by a signal it doesn't handle: nothing happens,
    /// and the shell ends well.
    fn min_signal(self) -> Self {
        ExitStatus::Code(0)
    }
}

#[test]
fn the_small_init_reaps_and_passes_codes_on() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(
        f.sealed(&[]),
        "echo $$; (sleep 0.01 &) ; sleep 0.2; ps; grep -E 'CapEff|Seccomp:' /proc/1/status /proc/self/status; ls /proc/1/fd 2>&1; kill -KILL $$",
    );
    spec.init = true;
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(137), "{out}");
    assert!(!out.starts_with("1\n"), "{out}");
    assert_eq!(out.matches("CapEff:\t00000000a80425fb").count(), 2, "{out}");
    assert!(!out.contains(" Z "), "{out}");
}

#[test]
fn a_killed_shim_takes_its_instance_along_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.sealed(&[("/tmp", false)]), "while :; do sleep 0.05; done");
    let started = f.runtime.start(&spec).unwrap();
    let shim = std::fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    let shim: i32 = shim.lines().find_map(|l| l.strip_prefix("PPid:\t")).unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).unwrap();
    until("end", || !std::path::Path::new(&format!("/proc/{}/root/bin", started.pid)).exists());
    until("unknown", || {
        matches!(f.runtime.observe(&spec.id).unwrap().state, ObservedState::Exited { status: ExitStatus::Unknown, .. })
    });
    f.runtime.remove(&spec.id).unwrap();
    assert!(common::mounts_below(&f.root).is_empty());
    assert!(f.runtime.list().is_empty());
    let tag = spec.id.as_str();
    for controller in ["pids", "memory", "cpu", "devices", "unified"] {
        let found = std::process::Command::new("find").args([&format!("/sys/fs/cgroup/{controller}"), "-name", tag]).output().unwrap();
        assert!(found.stdout.is_empty() || tag.len() < 4, "{:?}", String::from_utf8_lossy(&found.stdout));
    }
}

#[test]
fn a_half_made_instance_is_dead_and_can_be_removed_or_started() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.sealed(&[]), "echo up");
    let dir = f.root.join("instances").join(spec.id.as_str());
    std::fs::create_dir_all(dir.join("stage/root")).unwrap();
    std::fs::write(dir.join("netns"), "").unwrap();
    std::fs::write(dir.join("spec.json"), "{half").unwrap();
    assert_eq!(f.runtime.observe(&spec.id).unwrap().state, ObservedState::Dead);
    f.runtime.start(&spec).unwrap();
    assert_eq!(f.runtime.wait(&spec.id).unwrap(), ExitStatus::Code(0));
    let again = f.runtime.start(&spec).unwrap_err().to_string();
    assert!(again.contains("ended already"), "{again}");
    f.runtime.remove(&spec.id).unwrap();
    assert!(!dir.exists());
}

#[test]
fn limits_hold_where_the_machine_has_them_and_warn_where_not() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(f.sealed(&[("/tmp", false)]), "dd if=/dev/zero of=/dev/shm/fill bs=1M count=60; echo survived");
    spec.limits.memory = Some(24 << 20);
    spec.limits.memory_swap = Some(24 << 20);
    spec.limits.nano_cpus = Some(500_000_000);
    spec.limits.pids = Some(50);
    spec.limits.oom_score_adj = Some(-900);
    spec.limits.ulimits = std::collections::BTreeMap::from([("nofile".into(), (100_000_000, 100_000_000)), ("core".into(), (0, 0))]);
    f.runtime.start(&spec).unwrap();
    let status = f.runtime.wait(&spec.id).unwrap();
    let warnings = f.runtime.observe(&spec.id).unwrap().warnings;
    eprintln!("{status:?} {warnings:?}");
    let enforced = !warnings.iter().any(|w| w.contains("memory"));
    if enforced {
        assert_eq!(status, ExitStatus::OutOfMemory, "{}", f.log_text(&spec.id));
    }
    assert!(!f.log_text(&spec.id).contains("survived") || !enforced);
}

#[test]
fn listening_ports_are_seen_and_reached() {
    if !can_run() {
        return;
    }
    use std::io::{Read, Write};
    let f = Fixture::new();
    let mut spec = f.spec(f.sealed(&[]), "httpd -f -p 80 -h /data");
    spec.user = "web".into();
    f.runtime.start(&spec).unwrap();
    until("listening", || f.runtime.listening(&spec.id).unwrap() == [80]);
    let mut stream = f.runtime.dial(&spec.id, 80).unwrap();
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("from the image"), "{answer}");
    assert!(f.runtime.dial(&spec.id, 81).is_err());
}

#[test]
fn a_terminal_and_an_open_stdin() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(f.sealed(&[]), "tty; echo $TERM; test -t 0 && echo terminal");
    spec.tty = true;
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(0), "{out}");
    assert!(out.contains("/dev/pts/0\nxterm\nterminal"), "{out}");
    let mut spec = f.spec(f.sealed(&[]), "cat");
    spec.stdin_open = true;
    f.runtime.start(&spec).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(matches!(f.runtime.observe(&spec.id).unwrap().state, ObservedState::Running { .. }));
    assert_eq!(f.run(&f.spec(f.sealed(&[]), "cat")).0, ExitStatus::Code(0));
}

#[test]
fn a_layer_is_written_and_scanned() {
    if !can_run() {
        return;
    }
    use kiln_runtime::{ChangeKind, scan_upper};
    let f = Fixture::new();
    let (upper, work) = (f.root.join("up/upper"), f.root.join("up/work"));
    let root = Root::Layered { tree: Some(f.tree()), upper: upper.clone(), work };
    let mut spec = f.spec(root, "echo new > /data/file; rm -r /data/sub; mkdir /data/sub; chmod 700 /bin/busybox; mv /etc/group /etc/g; mkdir /made; echo x > /made/x; cat /etc/resolv.conf");
    spec.cwd = "/work/dir".into();
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(0), "{out}");
    let changes: Vec<(String, ChangeKind)> = scan_upper(&upper).unwrap().into_iter().map(|c| (c.path.display().to_string(), c.kind)).collect();
    let dir = ChangeKind::Dir { opaque: false };
    let expected = [
        ("bin", dir),
        ("bin/busybox", ChangeKind::File),
        ("data", dir),
        ("data/file", ChangeKind::File),
        ("data/sub", ChangeKind::Dir { opaque: true }),
        ("etc", dir),
        ("etc/g", ChangeKind::File),
        ("etc/group", ChangeKind::Deleted),
        ("made", dir),
        ("made/x", ChangeKind::File),
        ("work", dir),
        ("work/dir", dir),
    ];
    assert_eq!(changes, expected.map(|(p, k)| (p.to_owned(), k)));
    assert!(std::fs::metadata(upper.join("bin/busybox")).unwrap().len() > 100_000);
}

#[test]
fn an_unsealed_instance_writes_into_a_layer_that_goes_with_it() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(Root::Unsealed { tree: f.tree() }, "echo x > /etc/x; echo up; while :; do sleep 0.05; done");
    f.runtime.start(&spec).unwrap();
    until("write", || f.runtime.write_set(&spec.id).unwrap().iter().any(|c| c.path.ends_with("etc/x")));
    let seal = f.runtime.seal_state(&spec.id).unwrap();
    assert!(!seal.read_only);
    assert!(seal.foreign.is_empty(), "{:?}", seal.foreign);
    f.runtime.remove(&spec.id).unwrap();
}

#[test]
fn a_cancelled_run_is_killed() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.sealed(&[]), "echo up; while :; do sleep 0.05; done");
    let cancel = std::sync::atomic::AtomicBool::new(false);
    let result = f.runtime.run_to_end(&spec, &mut |_, _| cancel.store(true, std::sync::atomic::Ordering::Relaxed), &cancel);
    assert!(matches!(result, Err(kiln_runtime::StartError::Cancelled)));
    assert!(f.runtime.list().is_empty());
}
