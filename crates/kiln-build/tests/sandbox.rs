//! What a RUN can't do, and how much of the machine it can have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_build::build::BuildRequest;
use kiln_model::{Digest, Millis};
use world::{busybox, sandboxes, working, world};

/// The namespaces of this process, as links name them.
fn namespaces() -> Vec<String> {
    let kinds = ["mnt", "pid", "ipc", "uts", "cgroup", "net"];
    let of = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}"));
    let all = kinds.map(|kind| of(kind).unwrap().display().to_string());
    all.into()
}

#[test]
fn a_run_has_namespaces_of_its_own_and_nothing_of_the_hosts() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    // A file of this process's that a command would inherit were it left open for it.
    let told = "RUN cd /proc/self/ns && for k in mnt pid ipc uts cgroup net; do readlink $k; done > /ns\n\
         RUN ls /proc/self/fd | sort -n | tr '\\n' ' ' > /fds; env | sort > /env; ls / > /root\n\
         RUN grep -E 'Cap(Prm|Eff|Bnd)|Seccomp:' /proc/self/status > /status; ps | wc -l > /ps\n";
    let image = one.build(folder.path(), &format!("{base}{told}")).unwrap();
    let own = one.text(&image, "ns");
    let (own, host): (Vec<&str>, _) = (own.lines().collect(), namespaces());
    assert_eq!(own.len(), host.len());
    for (own, host) in own.iter().zip(&host) {
        assert!(own.ends_with(']') && own != host, "{own} is the host's");
    }
    // The folder that `ls` itself has open is the fourth.
    assert_eq!(one.text(&image, "fds"), "0 1 2 3 ");
    let env = one.text(&image, "env");
    let names: Vec<&str> = env.lines().filter_map(|l| l.split('=').next()).collect();
    assert_eq!(
        names,
        [
            "HOME",
            "HOSTNAME",
            "PATH",
            "PWD",
            "SHLVL",
            "SOURCE_DATE_EPOCH"
        ],
        "{env}"
    );
    let root = one.text(&image, "root");
    for name in root.lines() {
        let known = [
            "bin", "dev", "etc", "proc", "sys", "fds", "env", "root", "ns", "tmp",
        ];
        assert!(known.contains(&name), "{name} in {root}");
    }
    let status = one.text(&image, "status");
    for line in [
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    let processes: u32 = one.text(&image, "ps").trim().parse().unwrap();
    assert!(processes <= 5, "{processes} processes");
}

/// Calls that docker's profile lets nobody make who has only the default capabilities; what
/// each is asked with does nothing where it is allowed. Named are those that were not refused.
#[cfg(target_arch = "x86_64")]
const CALLS: &str = r#"
my %calls = (unshare => [272, 0x10000000], mount => [165, 0, 0, 0, 0, 0], umount2 => [166, 0, 0],
  keyctl => [250, 0, 0, 0], add_key => [248, 0, 0, 0, 0], request_key => [249, 0, 0, 0],
  bpf => [321, 0, 0, 0], perf_event_open => [298, 0, 0, 0, 0], userfaultfd => [323, 0],
  setns => [308, 0, 0], pivot_root => [155, 0, 0], swapon => [167, 0, 0],
  reboot => [169, 0, 0, 0], init_module => [175, 0, 0, 0], finit_module => [313, 0, 0, 0],
  delete_module => [176, 0, 0], kexec_load => [246, 0, 0, 0, 0], acct => [163, 0],
  open_by_handle_at => [304, 0, 0, 0], quotactl => [179, 0, 0, 0], clock_settime => [227, 0, 0],
  settimeofday => [164, 0, 0], syslog => [103, 10, 0, 0], iopl => [172, 3],
  ioperm => [173, 0, 0, 0], fsopen => [430, 0, 0], move_mount => [429, 0, 0, 0, 0],
  io_uring_setup => [425, 0, 0]);
foreach my $name (sort keys %calls) {
  my @words = @{$calls{$name}};
  my $result = syscall($words[0], map { $_ + 0 } @words[1 .. $#words]);
  my $error = $! + 0;
  print "$name gives $result, $error\n" unless $result == -1 && ($error == 1 || $error == 38);
}
my $allowed = syscall(39);
print "getpid gives $allowed\n" if $allowed < 1;
"#;

#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_docker_refuses_are_refused() {
    if !sandboxes() {
        return;
    }
    let one = world();
    // Of Debian's essential packages: it has perl.
    let base = kiln_model::spec::DebianBase {
        suite: "bookworm".into(),
        packages: vec!["apt".into()],
        essential: true,
        ..Default::default()
    };
    world::compose(&one, &base).await;
    let folder = world::context(&[("calls.pl", CALLS)]);
    let text = "FROM root\nRUN --mount=type=bind,target=/in perl /in/calls.pl > /allowed\n";
    let image = one.build(folder.path(), text).unwrap();
    assert_eq!(one.text(&image, "allowed"), "");
}

/// What of this machine a process without CAP_SYS_RESOURCE may ask for, and whether this is one.
fn most_files() -> (i64, bool) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let held = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let held = u64::from_str_radix(held.unwrap().trim(), 16).unwrap();
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max open files"));
    let hard = line.unwrap().split_whitespace().nth(4);
    (hard.unwrap().parse().unwrap(), held >> 24 & 1 == 0)
}

#[test]
fn a_run_has_the_ulimits_that_are_given_and_what_it_came_to_is_theirs() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!("{base}RUN ulimit -n > /soft; ulimit -Hn > /hard; ulimit -c > /core\n");
    let with = |soft: i64, hard: i64| {
        one.build_with(folder.path(), &text, |request| {
            let all = [("nofile", (soft, hard)), ("core", (0, 0))];
            request.build.ulimits = all.map(|(n, l)| (n.into(), l)).into();
        })
    };
    let told =
        |image: &Digest| ["soft", "hard", "core"].map(|f| one.text(image, f).trim().to_owned());
    let image = with(100, 200).unwrap();
    assert_eq!(told(&image), ["100", "200", "0"]);
    // Other limits: another result, and the first is still there for the first.
    assert_eq!(told(&with(100, 300).unwrap()), ["100", "300", "0"]);
    assert_eq!(with(100, 200), Ok(image));

    let (most, held_down) = most_files();
    match with(100, most + 1) {
        Ok(image) => {
            assert!(!held_down);
            assert_eq!(told(&image)[1], (most + 1).to_string());
        }
        Err(error) => {
            let expected = [
                "line 3: RUN [\"/bin/busybox\"".to_owned(),
                format!("the ulimit nofile can't be {} here", most + 1),
                format!("at most {most}, "),
                "CAP_SYS_RESOURCE is missing".to_owned(),
            ];
            assert!(held_down, "{error}");
            for expected in expected {
                assert!(error.contains(&expected), "{expected}: {error}");
            }
        }
    }
}

#[test]
fn a_run_that_hangs_is_ended_and_says_what_it_did_last() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!("{base}RUN echo begun; sleep 600\n");
    let begun = Instant::now();
    let limited = |request: &mut BuildRequest| request.build.time_limit = Some(Millis(1500));
    let error = one.build_with(folder.path(), &text, limited).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(300), "{error}");
    for expected in [
        "not ended within 1.5s",
        "--run-timeout",
        "begun",
        "line 8: RUN echo begun",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert!(working(one.root.path()).is_empty());
}

#[test]
fn processes_and_memory_of_a_run_are_bounded() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let files = "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null > /pids; \
         cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null > /memory; \
         cat /proc/self/oom_score_adj > /score; true";
    let image = one.build(folder.path(), &format!("{base}RUN {files}\n"));
    let image = image.unwrap();
    let number = |path: &str| one.text(&image, path).trim().parse::<u64>();
    assert_eq!(number("score"), Ok(500));
    // A machine without these controllers bounds nothing; kiln doctor says so.
    if one.text(&image, "pids").is_empty() || one.text(&image, "memory").is_empty() {
        eprintln!("SKIPPED: the pids or memory controller is not there");
        return;
    }
    assert_eq!(number("pids"), Ok(16_384));
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let total = info.lines().next().unwrap().split_whitespace().nth(1);
    let total: u64 = total.unwrap().parse::<u64>().unwrap() * 1024;
    let limit = number("memory").unwrap();
    assert!(limit < total && limit > total / 2, "{limit} of {total}");
}

/// Processes in the control groups of what this root runs, and what a RUN has left of itself.
fn left(root: &Path) -> Vec<String> {
    let group = format!("/kiln-{}/", kiln_runtime::net::root_tag(root));
    let mut left = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let groups = fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
        if groups.lines().any(|line| line.contains(&group)) {
            left.push(process.path().display().to_string());
        }
    }
    let entries = fs::read_dir(root.join("instances")).unwrap().flatten();
    let paths = entries.map(|entry| entry.path()).chain(working(root));
    left.extend(paths.map(|path| path.display().to_string()));
    left
}

/// Is the limit on processes there? kiln doctor says so.
fn processes_are_limited() -> bool {
    let groups = fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let there = groups.lines().any(|line| line.starts_with("pids\t"));
    if !there {
        eprintln!("SKIPPED: the pids controller is not there");
    }
    there
}

#[test]
fn a_run_that_makes_processes_without_end_comes_to_its_limit_and_says_so() {
    if !sandboxes() || !processes_are_limited() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!(
        "{base}RUN mkfifo /f; trap 'echo made $n' EXIT; \
         while :; do read x < /f & n=$((n+1)); done\n"
    );
    let error = one.build(folder.path(), &text).unwrap_err();
    let made = error.split("\n  made ").nth(1).unwrap_or_default();
    let made = made.split_whitespace().next().unwrap_or_default();
    // With the one that makes them, as many as there may be.
    assert_eq!(made, "16383", "{error}");
    for expected in ["it had as many as it may have", "line 8: RUN mkfifo"] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert_eq!(left(one.root.path()), [""; 0]);
}

#[test]
fn a_fork_bomb_is_ended_with_all_that_it_has_made() {
    if !sandboxes() || !processes_are_limited() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!("{base}RUN bomb() {{ bomb & bomb & wait; }}; bomb; wait; sleep 600\n");
    let limited = |request: &mut BuildRequest| request.build.time_limit = Some(Millis(3000));
    let error = one.build_with(folder.path(), &text, limited).unwrap_err();
    for expected in ["not ended within 3s", "line 8: RUN bomb()"] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert_eq!(left(one.root.path()), [""; 0]);
    // The machine goes on, and so does this root.
    one.build(folder.path(), &format!("{base}RUN true\n"))
        .unwrap();
}
