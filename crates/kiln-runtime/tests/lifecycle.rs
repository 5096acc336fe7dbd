//! Starting, ending, observing and removing real instances.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Fixture, can_run, until};
use kiln_model::instance::*;
use kiln_model::{InstanceSpec, Millis};

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
    let spec = f.spec(
        f.sealed(&[]),
        "trap '' TERM; echo up; (while :; do sleep 0.1; done) & while :; do sleep 0.1; done",
    );
    f.runtime.start(&spec).unwrap();
    let began = std::time::Instant::now();
    assert_eq!(
        f.runtime.stop(&spec.id, "SIGTERM", Millis(300)).unwrap(),
        ExitStatus::Signal(9)
    );
    assert!(began.elapsed() >= std::time::Duration::from_millis(300));
    let mut spec = f.spec(f.sealed(&[]), "kill -SEGV $$");
    assert_eq!(f.run(&spec).0, ExitStatus::Code(139).min_signal());
    spec = f.spec(
        f.sealed(&[]),
        "trap 'exit 5' USR2; echo up; while :; do sleep 0.05; done",
    );
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
    let shim: i32 = shim
        .lines()
        .find_map(|l| l.strip_prefix("PPid:\t"))
        .unwrap()
        .parse()
        .unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(shim),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    until("end", || {
        !std::path::Path::new(&format!("/proc/{}/root/bin", started.pid)).exists()
    });
    until("unknown", || {
        matches!(
            f.runtime.observe(&spec.id).unwrap().state,
            ObservedState::Exited {
                status: ExitStatus::Unknown,
                ..
            }
        )
    });
    f.runtime.remove(&spec.id).unwrap();
    assert!(common::mounts_below(&f.root).is_empty());
    assert!(f.runtime.list().is_empty());
    let tag = spec.id.as_str();
    for controller in ["pids", "memory", "cpu", "devices", "unified"] {
        let found = std::process::Command::new("find")
            .args([&format!("/sys/fs/cgroup/{controller}"), "-name", tag])
            .output()
            .unwrap();
        assert!(
            found.stdout.is_empty() || tag.len() < 4,
            "{:?}",
            String::from_utf8_lossy(&found.stdout)
        );
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
    assert_eq!(
        f.runtime.observe(&spec.id).unwrap().state,
        ObservedState::Dead
    );
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
    let mut spec = f.spec(
        f.sealed(&[("/tmp", false)]),
        "exec dd if=/dev/zero of=/dev/shm/fill bs=1M count=60",
    );
    spec.limits.memory = Some(24 << 20);
    spec.limits.memory_swap = Some(24 << 20);
    spec.limits.nano_cpus = Some(500_000_000);
    spec.limits.pids = Some(50);
    spec.limits.oom_score_adj = Some(-900);
    spec.limits.ulimits = std::collections::BTreeMap::from([
        ("nofile".into(), (100_000_000, 100_000_000)),
        ("core".into(), (0, 0)),
    ]);
    f.runtime.start(&spec).unwrap();
    let status = f.runtime.wait(&spec.id).unwrap();
    let warnings = f.runtime.observe(&spec.id).unwrap().warnings;
    eprintln!("{status:?} {warnings:?}");
    let enforced = !warnings.iter().any(|w| w.contains("memory"));
    if enforced {
        assert_eq!(status, ExitStatus::OutOfMemory, "{}", f.log_text(&spec.id));
    }
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
    until("listening", || {
        f.runtime.listening(&spec.id).unwrap() == [80]
    });
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
    assert!(matches!(
        f.runtime.observe(&spec.id).unwrap().state,
        ObservedState::Running { .. }
    ));
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
    let root = Root::Layered {
        tree: Some(f.tree()),
        upper: upper.clone(),
        work,
    };
    let mut spec = f.spec(root, "echo new > /data/file; rm -r /data/sub; mkdir /data/sub; chmod 700 /bin/busybox; mv /etc/group /etc/g; mkdir /made; echo x > /made/x; cat /etc/resolv.conf");
    spec.cwd = "/work/dir".into();
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(0), "{out}");
    let changes: Vec<(String, ChangeKind)> = scan_upper(&upper)
        .unwrap()
        .into_iter()
        .map(|c| (c.path.display().to_string(), c.kind))
        .collect();
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
    let spec = f.spec(
        Root::Unsealed { tree: f.tree() },
        "echo x > /etc/x; echo up; while :; do sleep 0.05; done",
    );
    f.runtime.start(&spec).unwrap();
    until("write", || {
        f.runtime
            .write_set(&spec.id)
            .unwrap()
            .iter()
            .any(|c| c.path.ends_with("etc/x"))
    });
    let seal = f.runtime.seal_state(&spec.id).unwrap();
    assert!(!seal.read_only);
    assert!(seal.foreign.is_empty(), "{:?}", seal.foreign);
    f.runtime.remove(&spec.id).unwrap();
    let spec = f.spec(
        Root::Unsealed { tree: f.tree() },
        "mkdir /own; cp /bin/busybox /own/sh; exec /own/sh -c 'while :; do sleep 0.05; done'",
    );
    f.runtime.start(&spec).unwrap();
    until("foreign", || {
        f.runtime
            .seal_state(&spec.id)
            .unwrap()
            .foreign
            .iter()
            .any(|p| p.program == "/own/sh")
    });
    f.runtime.remove(&spec.id).unwrap();
    let mut spec = f.spec(
        f.sealed(&[("/tmp", true)]),
        "cp /bin/busybox /tmp/sh; exec /tmp/sh -c 'while :; do :; done'",
    );
    spec.init = true;
    f.runtime.start(&spec).unwrap();
    until("foreign", || {
        let seal = f.runtime.seal_state(&spec.id).unwrap();
        seal.read_only && seal.foreign.len() == 1 && seal.foreign[0].program == "/tmp/sh"
    });
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
    let result = f.runtime.run_to_end(
        &spec,
        &mut |_, _| cancel.store(true, std::sync::atomic::Ordering::Relaxed),
        &cancel,
    );
    assert!(matches!(result, Err(kiln_runtime::StartError::Cancelled)));
    assert!(f.runtime.list().is_empty());
}

/// The shim is killed at any moment of a start; removing then leaves nothing.
#[test]
fn a_start_cut_off_at_any_moment_leaves_nothing() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let tree = f.tree();
    for n in 0..24u64 {
        let root = if n % 2 == 0 {
            Root::Sealed {
                tree: tree.clone(),
                scratch: vec![],
            }
        } else {
            Root::Unsealed { tree: tree.clone() }
        };
        let spec = f.spec(root, "while :; do sleep 0.05; done");
        let runtime = f.runtime.clone();
        let starting = std::thread::spawn({
            let spec = spec.clone();
            move || runtime.start(&spec).map(|s| s.pid)
        });
        until("a shim", || {
            !shims_of(&f, &spec).is_empty() || starting.is_finished()
        });
        std::thread::sleep(std::time::Duration::from_millis(n * 3));
        for pid in shims_of(&f, &spec) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        let result = starting.join().unwrap();
        f.runtime.remove(&spec.id).unwrap();
        assert!(f.runtime.observe(&spec.id).is_none());
        until("everything gone", || shims_of(&f, &spec).is_empty());
        if let Ok(pid) = result {
            assert!(!std::path::Path::new(&format!("/proc/{pid}/root/bin")).exists());
        }
    }
    assert!(common::groups_of(&f.root).is_empty());
    assert!(common::mounts_below(&f.root).is_empty());
}

#[test]
fn a_signal_that_the_first_process_has_no_handler_for_is_not_heeded() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    for (script, heeds) in [
        ("while :; do sleep 0.05; done", false),
        ("trap 'exit 0' TERM; while :; do sleep 0.05; done", true),
    ] {
        let spec = f.spec(f.layered(), script);
        f.runtime.start(&spec).unwrap();
        // The shell sets its handler after its start.
        let asked = || f.runtime.heeds(&spec.id, "TERM") == heeds;
        until("the answer", asked);
        assert!(f.runtime.heeds(&spec.id, "SIGKILL"));
        f.runtime.remove(&spec.id).unwrap();
    }
}

fn shims_of(f: &Fixture, spec: &InstanceSpec) -> Vec<i32> {
    let dir = f.root.join("instances").join(spec.id.as_str());
    let dir = dir.display().to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| {
            let line = std::fs::read(e.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let pid: i32 = e.file_name().to_str()?.parse().ok()?;
            line.split('\0').any(|a| a == dir).then_some(pid)
        })
        .collect()
}

/// Not a test: what the one below runs in a process that it kills.
#[test]
fn starter() {
    if let Some(root) = std::env::var_os("KILN_TEST_STARTER") {
        let root = std::path::PathBuf::from(root);
        let spec = std::fs::read(root.join("spec.json")).unwrap();
        let shim = format!("sleep 1; exec {} \"$@\"", env!("CARGO_BIN_EXE_kiln-shim"));
        let argv = ["/bin/sh", "-c", &shim, "sh"];
        let runtime = kiln_runtime::Runtime::open(kiln_runtime::RuntimeConfig {
            root,
            shim: argv.map(Into::into).to_vec(),
        })
        .unwrap();
        let _ = runtime.start(&serde_json::from_slice(&spec).unwrap());
    }
}

/// The shim it leaves behind has not begun, and no lock of its own tells of it yet.
fn start_and_die(f: &Fixture) -> InstanceSpec {
    let spec = f.spec(f.layered(), "while :; do sleep 0.05; done");
    std::fs::write(f.root.join("spec.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
    let mut starter = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "starter"])
        .env("KILN_TEST_STARTER", &f.root)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("a shim", || !shims_of(f, &spec).is_empty());
    starter.kill().unwrap();
    starter.wait().unwrap();
    let state = f.runtime.observe(&spec.id).unwrap().state;
    assert_eq!(state, ObservedState::Starting);
    spec
}

#[test]
fn a_shim_whose_starter_died_is_never_overlooked() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let stop = |spec: &InstanceSpec| f.runtime.stop(&spec.id, "KILL", Millis(100));
    let stopped = start_and_die(&f);
    // "It does not run" would be true, and no longer so a moment later.
    let _ = stop(&stopped);
    assert_eq!(shims_of(&f, &stopped), Vec::<i32>::new());
    let again = start_and_die(&f);
    f.runtime.start(&again).unwrap();
    assert_eq!(shims_of(&f, &again).len(), 1);
    stop(&again).unwrap();
    assert_eq!(shims_of(&f, &again), Vec::<i32>::new());
}

#[test]
fn namespaces_are_shared_when_asked_for() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let first = f.spec(f.sealed(&[]), "httpd -f -p 80 -h /data");
    f.runtime.start(&first).unwrap();
    until("listening", || {
        f.runtime.listening(&first.id).unwrap() == [80]
    });
    let mut second = f.spec(
        f.sealed(&[]),
        "printf 'GET /file HTTP/1.0\\r\\n\\r\\n' | nc 127.0.0.1 80; ps; hostname; (sleep 77 &); sleep 0.1",
    );
    second.network = InstanceNetwork::Join(first.id.clone());
    second.namespaces.pid = SharedNamespace::Of(first.id.clone());
    second.namespaces.uts = SharedNamespace::Of(first.id.clone());
    second.hostname = "other".into();
    let (status, out) = f.run(&second);
    assert_eq!(status, ExitStatus::Code(0), "{out}");
    assert!(
        out.contains("from the image") && out.contains("httpd") && out.ends_with("pot\n"),
        "{out}"
    );
    // What it left in the other's pid namespace is gone with it.
    assert!(!f.exec(&first.id, &common::sh("ps")).1.contains("sleep 77"));
    let mut third = f.spec(f.sealed(&[]), "true");
    third.network = InstanceNetwork::Join(second.id.clone());
    let error = f.runtime.start(&third).unwrap_err().to_string();
    assert!(error.contains("is not running"), "{error}");
}

#[test]
fn instances_on_one_bridge_reach_each_other_and_leave_no_interface() {
    if !can_run() {
        return;
    }
    use kiln_model::network::BridgeNetwork;
    use kiln_runtime::net;
    let f = Fixture::new();
    let bridge = format!("krt{}", std::process::id());
    let network = BridgeNetwork {
        name: "test_default".into(),
        bridge: bridge.clone(),
        subnet: net::free_subnet(&[]).unwrap(),
        internal: true,
        mtu: None,
    };
    net::ensure_bridge(&network).unwrap();
    let address = |n: u32| network.subnet.nth(n);
    let bridged = |n: u32, script: &str| {
        let mut spec = f.spec(f.sealed(&[]), script);
        spec.network = InstanceNetwork::Bridged(vec![Interface {
            name: "eth0".into(),
            bridge: bridge.clone(),
            address: address(n),
            prefix: network.subnet.prefix(),
            gateway: None,
            mtu: None,
            mac: None,
        }]);
        spec
    };
    let server = bridged(2, "httpd -f -p 80 -h /data");
    f.runtime.start(&server).unwrap();
    until("listening", || {
        f.runtime.listening(&server.id).unwrap() == [80]
    });
    let fetch = format!(
        "printf 'GET /file HTTP/1.0\\r\\n\\r\\n' | nc {} 80; cat /etc/hosts",
        address(2)
    );
    let (_, out) = f.run(&bridged(3, &fetch));
    f.runtime.remove(&server.id).unwrap();
    let ports = std::fs::read_dir(format!("/sys/class/net/{bridge}/brif"))
        .unwrap()
        .count();
    net::remove_bridge(&bridge).unwrap();
    assert!(out.contains("from the image"), "{out}");
    assert!(out.contains(&format!("{}\tpot", address(3))), "{out}");
    assert_eq!(ports, 0);
}
