//! The program, its rights, its limits, its namespaces.

use std::fs;

use super::{Case, Group, Has, HasNot, Is, check, check_groups, look, pids, project};
use crate::common::Kiln;

const CASES: &[Case] = &[
    Case {
        name: "arguments",
        keys: "entrypoint: [/bin/sh, /run.sh]\ncommand: [first, second word]\nworking_dir: /www\nuser: app\ngroup_add: [extra, '4242']\nenvironment: {A: one, B: '${OUTER}'}\nenv_file: [a.env, {path: none.env, required: false}, {path: raw.env, format: raw}]\nhostname: box\ndomainname: example.test\nextra_hosts: ['far:192.0.2.1', 'out=host-gateway']\nannotations: {a: b}\nlabels: {a: b}",
        looks: &[
            look(
                "entrypoint command",
                "tr '\\0' '|' </proc/1/cmdline",
                Is("/bin/sh|/run.sh|first|second word|"),
            ),
            look("working_dir", "readlink /proc/1/cwd", Is("/www")),
            look(
                "user",
                "grep ^Uid: /proc/1/status | tr '\\t' ' '",
                Is("Uid: 1000 1000 1000 1000"),
            ),
            look(
                "group_add",
                "grep ^Groups: /proc/1/status",
                Has("2000 4242"),
            ),
            look(
                "environment environment",
                "tr '\\0' '\\n' </proc/1/environ | grep '^[AB]=' | tr '\\n' ' '",
                Is("A=one B=outer"),
            ),
            look(
                "env_file env_file.[].path env_file.[].required",
                "tr '\\0' '\\n' </proc/1/environ | grep ^FROM_FILE=",
                Is("FROM_FILE=yes and more"),
            ),
            look(
                "env_file.[].format",
                "tr '\\0' '\\n' </proc/1/environ | grep ^RAW=",
                Is("RAW='kept'"),
            ),
            look("hostname", "hostname", Is("box")),
            look(
                "domainname",
                "cat /proc/sys/kernel/domainname",
                Is("example.test"),
            ),
            look("domainname", "cat /etc/hosts", Has("box.example.test box")),
            look("extra_hosts", "cat /etc/hosts", Has("192.0.2.1\tfar")),
            look(
                "extra_hosts",
                "grep out$ /etc/hosts | grep -c '^[0-9]*\\.[0-9]*\\.[0-9]*\\.1\\b'",
                Is("1"),
            ),
        ],
    },
    Case {
        name: "plain",
        keys: "",
        looks: &[
            look(
                "security_opt",
                "grep -E '^(NoNewPrivs|Seccomp):' /proc/1/status | tr '\\t\\n' '  '",
                Is("NoNewPrivs: 1 Seccomp: 2"),
            ),
            look(
                "cap_add",
                "grep CapBnd /proc/1/status",
                Has("00000000a80425fb"),
            ),
            look(
                "pid",
                "[ $(readlink /proc/1/ns/pid) != {host:ns/pid} ] && cat /proc/1/comm",
                Is("httpd"),
            ),
            look("read_only", "touch /www/x", Has("Read-only file system")),
            // The image has none of them.
            look(
                "read_only",
                "for d in /tmp /var/tmp /run /dev/shm; do touch $d/x && echo $d; done | tr '\\n' ' '",
                Is("/tmp /var/tmp /run /dev/shm"),
            ),
            look(
                "read_only",
                "stat -c %a /tmp /var/tmp /run /dev/shm | tr '\\n' ' '",
                Is("1777 1777 755 1777"),
            ),
            look("tty", "readlink /proc/1/fd/0", Is("/dev/null")),
            look(
                "privileged",
                "ls /dev | grep -c -E '^(kmsg|loop-control)$'",
                Is("0"),
            ),
        ],
    },
    Case {
        name: "rights",
        keys: "cap_add: [SYS_TIME]\ncap_drop: [CHOWN, CAP_NET_RAW]\nsecurity_opt: ['no-new-privileges:false', 'seccomp:unconfined']\nread_only: true\nsysctls: {net.ipv4.tcp_keepalive_time: 77, kernel.msgmax: 4096}\nshm_size: 8m\nulimits: {nofile: {soft: 900, hard: 1900}, nproc: 500}\noom_score_adj: 300\ninit: true\nstdin_open: true\nstop_signal: SIGTERM",
        looks: &[
            look(
                "cap_add cap_drop",
                "grep CapBnd /proc/1/status",
                Has("00000000aa0405fa"),
            ),
            look(
                "security_opt",
                "grep -E '^(NoNewPrivs|Seccomp):' /proc/$(pidof httpd)/status | tr '\\t\\n' '  '",
                Is("NoNewPrivs: 0 Seccomp: 0"),
            ),
            look("read_only", "touch /tmp/x", Has("/tmp/x")),
            look(
                "sysctls",
                "cat /proc/sys/net/ipv4/tcp_keepalive_time /proc/sys/kernel/msgmax | tr '\\n' ' '",
                Is("77 4096"),
            ),
            look(
                "shm_size",
                "df -k /dev/shm | tail -n 1 | awk '{print $2}'",
                Is("8192"),
            ),
            look(
                "ulimits ulimits.*.soft ulimits.*.hard",
                "grep 'open files' /proc/$(pidof httpd)/limits | awk '{print $4, $5}'",
                Is("900 1900"),
            ),
            look(
                "ulimits",
                "grep 'Max processes' /proc/$(pidof httpd)/limits | awk '{print $3, $4}'",
                Is("500 500"),
            ),
            look(
                "oom_score_adj",
                "cat /proc/$(pidof httpd)/oom_score_adj",
                Is("300"),
            ),
            look("init", "[ $(pidof httpd) != 1 ] && echo below", Is("below")),
            look(
                "stdin_open",
                "readlink /proc/$(pidof httpd)/fd/0",
                Has("pipe:"),
            ),
        ],
    },
    Case {
        name: "profile",
        keys: "security_opt: ['seccomp:seccomp.json', 'apparmor:unconfined']\ntty: true",
        looks: &[
            look(
                "security_opt",
                "mkdir /tmp/x",
                Has("Operation not permitted"),
            ),
            look("tty", "readlink /proc/1/fd/0", Has("/dev/pts/")),
        ],
    },
    Case {
        name: "everything",
        keys: "privileged: true",
        looks: &[
            look(
                "privileged",
                "grep CapEff /proc/1/status",
                Has("{host:caps}"),
            ),
            look(
                "privileged",
                "ls /dev | grep -c -E '^(kmsg|loop-control)$'",
                Is("2"),
            ),
            look("privileged", "grep ^Seccomp: /proc/1/status", Has("0")),
            look(
                "privileged",
                "cat /proc/mounts | grep ' /sys sysfs'",
                Has("rw"),
            ),
        ],
    },
    Case {
        name: "devices",
        keys: "devices:\n  - /dev/loop-control:/dev/readable:r\n  - {source: /dev/full, target: /dev/brim, permissions: rw}\ndevice_cgroup_rules: ['c 1:11 rw']",
        looks: &[
            look(
                "devices devices.[].source devices.[].target",
                "stat -c '%t %T' /dev/brim",
                Is("1 7"),
            ),
            look("devices", "echo x > /dev/brim", Has("No space left")),
            look(
                "devices.[].permissions",
                ": < /dev/readable && echo opened",
                Is("opened"),
            ),
            look(
                "devices.[].permissions",
                ": > /dev/readable",
                Has("Operation not permitted"),
            ),
            look(
                "device_cgroup_rules",
                "mknod /dev/log c 1 11 && : >> /dev/log && echo opened",
                Is("opened"),
            ),
            look(
                "device_cgroup_rules",
                "mknod /dev/port c 1 4; : >> /dev/port",
                Has("Operation not permitted"),
            ),
        ],
    },
    Case {
        name: "host",
        keys: "pid: host\nipc: host\nuts: host\ncgroup: host\nuserns_mode: host",
        looks: &[
            look("pid", "readlink /proc/self/ns/pid", Is("{host:ns/pid}")),
            look("ipc", "readlink /proc/self/ns/ipc", Is("{host:ns/ipc}")),
            look("uts", "readlink /proc/self/ns/uts", Is("{host:ns/uts}")),
            look(
                "cgroup",
                "readlink /proc/self/ns/cgroup",
                Is("{host:ns/cgroup}"),
            ),
            look(
                "userns_mode",
                "readlink /proc/self/ns/user",
                Is("{host:ns/user}"),
            ),
        ],
    },
    Case {
        name: "joined",
        keys: "pid: service:plain\nipc: service:plain\ncgroup: private",
        looks: &[
            look("pid", "readlink /proc/self/ns/pid", Is("{plain:ns/pid}")),
            look("pid", "cat /proc/1/comm", Is("httpd")),
            look("ipc", "readlink /proc/self/ns/ipc", Is("{plain:ns/ipc}")),
            look("ipc", "ls /dev/shm", Is("x")),
            look("uts", "readlink /proc/self/ns/uts", HasNot("{host:ns/uts}")),
            look(
                "cgroup",
                "readlink /proc/self/ns/cgroup",
                HasNot("{host:ns/cgroup}"),
            ),
        ],
    },
    Case {
        name: "limits",
        keys: "mem_limit: 64m\nmem_reservation: 32m\nmemswap_limit: 96m\nmem_swappiness: 10\noom_kill_disable: true\ncpus: 0.5\ncpu_shares: 512\ncpuset: '0'\npids_limit: 50\nblkio_config:\n  weight: 300\n  weight_device: [{path: /dev/loop0, weight: 400}]\n  device_read_bps: [{path: /dev/loop0, rate: 1mb}]\n  device_read_iops: [{path: /dev/loop0, rate: 100}]\n  device_write_bps: [{path: /dev/loop0, rate: 2mb}]\n  device_write_iops: [{path: /dev/loop0, rate: 200}]",
        looks: &[],
    },
    Case {
        name: "more_limits",
        keys: "cpu_quota: 20000\ncpu_period: 50000\ndeploy: {resources: {limits: {memory: 48m, pids: 60}, reservations: {memory: 24m}}}",
        looks: &[],
    },
    Case {
        name: "most_limits",
        keys: "deploy: {resources: {limits: {cpus: '0.25'}}}\nlogging: {driver: json-file, options: {max-size: 10k, max-file: '2'}}\ncommand: [/bin/sh, -c, 'i=0; while [ $$i -lt 3000 ]; do echo a line that fills the log $$i; i=$$((i+1)); done; exec httpd -f -p 8000 -h /www']",
        looks: &[],
    },
    Case {
        name: "silent",
        keys: "logging: {driver: none}\ncommand: [/bin/sh, -c, 'echo heard; exec httpd -f -p 8000 -h /www']",
        looks: &[],
    },
];

const fn group(
    service: &'static str,
    of: &'static str,
    v1: (&'static str, &'static str, &'static str),
    v2: (&'static str, &'static str),
    what: &'static str,
) -> Group {
    Group {
        service,
        of,
        v1,
        v2,
        what,
    }
}

const GROUPS: &[Group] = &[
    group(
        "limits",
        "mem_limit",
        ("memory", "memory.limit_in_bytes", "67108864"),
        ("memory.max", "67108864"),
        "memory limit",
    ),
    group(
        "limits",
        "mem_reservation",
        ("memory", "memory.soft_limit_in_bytes", "33554432"),
        ("memory.low", "33554432"),
        "memory reservation",
    ),
    group(
        "limits",
        "memswap_limit",
        ("memory", "memory.memsw.limit_in_bytes", "100663296"),
        ("memory.swap.max", "33554432"),
        "swap limit",
    ),
    group(
        "limits",
        "mem_swappiness",
        ("memory", "memory.swappiness", "10"),
        ("-", ""),
        "swappiness",
    ),
    group(
        "limits",
        "oom_kill_disable",
        ("memory", "memory.oom_control", "oom_kill_disable 1"),
        ("-", ""),
        "oom_kill_disable",
    ),
    group(
        "limits",
        "cpus",
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("cpu.max", "50000 100000"),
        "CPU limit",
    ),
    group(
        "limits",
        "cpu_shares",
        ("cpu", "cpu.shares", "512"),
        ("cpu.weight", "20"),
        "CPU weight",
    ),
    group(
        "limits",
        "cpuset",
        ("cpuset", "cpuset.cpus", "0"),
        ("cpuset.cpus", "0"),
        "CPU set",
    ),
    group(
        "limits",
        "pids_limit",
        ("pids", "pids.max", "50"),
        ("pids.max", "50"),
        "process limit",
    ),
    group(
        "limits",
        "blkio_config blkio_config.weight",
        ("blkio", "blkio.bfq.weight", "300"),
        ("io.bfq.weight", "default 300"),
        "weight",
    ),
    group(
        "limits",
        "blkio_config.weight_device blkio_config.weight_device.[].path blkio_config.weight_device.[].weight",
        ("blkio", "blkio.bfq.weight_device", "7:0 400"),
        ("io.bfq.weight", "7:0 400"),
        "weight",
    ),
    group(
        "limits",
        "blkio_config.device_read_bps blkio_config.device_read_bps.[].path blkio_config.device_read_bps.[].rate",
        ("blkio", "blkio.throttle.read_bps_device", "7:0 1048576"),
        (
            "io.max",
            "7:0 rbps=1048576 wbps=2097152 riops=100 wiops=200",
        ),
        "read",
    ),
    group(
        "limits",
        "blkio_config.device_read_iops blkio_config.device_read_iops.[].path blkio_config.device_read_iops.[].rate",
        ("blkio", "blkio.throttle.read_iops_device", "7:0 100"),
        (
            "io.max",
            "7:0 rbps=1048576 wbps=2097152 riops=100 wiops=200",
        ),
        "read",
    ),
    group(
        "limits",
        "blkio_config.device_write_bps blkio_config.device_write_bps.[].path blkio_config.device_write_bps.[].rate",
        ("blkio", "blkio.throttle.write_bps_device", "7:0 2097152"),
        (
            "io.max",
            "7:0 rbps=1048576 wbps=2097152 riops=100 wiops=200",
        ),
        "write",
    ),
    group(
        "limits",
        "blkio_config.device_write_iops blkio_config.device_write_iops.[].path blkio_config.device_write_iops.[].rate",
        ("blkio", "blkio.throttle.write_iops_device", "7:0 200"),
        (
            "io.max",
            "7:0 rbps=1048576 wbps=2097152 riops=100 wiops=200",
        ),
        "write",
    ),
    group(
        "more_limits",
        "cpu_quota cpu_period",
        ("cpu", "cpu.cfs_quota_us", "20000"),
        ("cpu.max", "20000 50000"),
        "CPU limit",
    ),
    group(
        "more_limits",
        "cpu_period",
        ("cpu", "cpu.cfs_period_us", "50000"),
        ("cpu.max", "20000 50000"),
        "CPU limit",
    ),
    group(
        "more_limits",
        "deploy deploy.resources deploy.resources.limits deploy.resources.limits.memory",
        ("memory", "memory.limit_in_bytes", "50331648"),
        ("memory.max", "50331648"),
        "memory limit",
    ),
    group(
        "more_limits",
        "deploy.resources.limits.pids",
        ("pids", "pids.max", "60"),
        ("pids.max", "60"),
        "process limit",
    ),
    group(
        "more_limits",
        "deploy.resources.reservations deploy.resources.reservations.memory",
        ("memory", "memory.soft_limit_in_bytes", "25165824"),
        ("memory.low", "25165824"),
        "memory reservation",
    ),
    group(
        "most_limits",
        "deploy.resources.limits.cpus",
        ("cpu", "cpu.cfs_quota_us", "25000"),
        ("cpu.max", "25000 100000"),
        "CPU limit",
    ),
];

pub const OTHER: &[&str] = &["logging", "logging.driver", "logging.options"];

const SECCOMP: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
  [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#;

pub fn keys() -> impl Iterator<Item = &'static str> {
    let looks = CASES.iter().flat_map(|c| c.looks).map(|l| l.of);
    looks
        .chain(GROUPS.iter().map(|g| g.of))
        .chain(OTHER.iter().copied())
}

#[test]
fn a_program_is_run_and_confined_as_said() {
    let Some(kiln) = Kiln::new() else { return };
    let files = [
        ("a.env", "FROM_FILE=\"yes and more\"\n"),
        ("raw.env", "RAW='kept'\n"),
        ("seccomp.json", SECCOMP),
    ];
    let mut project = project(&kiln, "process", CASES, "", &files);
    project.set("OUTER", "outer");
    project.up().ok();
    check(&project, CASES);
    check_groups(&project, GROUPS);
    let logs = |service| project.run("logs", &["-s", service]).ok().stdout;
    assert!(!logs("silent").contains("heard"));
    let kept = logs("most_limits");
    let (first, last) = (" log 0\n", " log 2999\n");
    assert!(
        kept.contains(last) && !kept.contains(first),
        "{}",
        kept.len()
    );
    let mut id = project.instances(Some("most_limits"));
    let folder = kiln.root.join("instances").join(id.remove(0).id);
    let sizes = fs::read_dir(folder).unwrap().flatten();
    let sizes = sizes.filter(|e| e.file_name().to_string_lossy().starts_with("log"));
    let size: u64 = sizes.map(|e| e.metadata().unwrap().len()).sum();
    assert!((1..30 << 10).contains(&size), "{size} bytes of log");
    assert!(pids(&project).len() >= CASES.len() - 1);
}
