//! Order, health, hooks, counts, and ends.

use std::fs;

use super::{Case, Is, check, look, pids, project};
use crate::common::{Kiln, Project, kill, wait_until};

const CASES: &[Case] = &[
    Case {
        name: "seed",
        keys: "command: [/bin/sh, -c, 'echo seeded > /data/x']\nvolumes: ['data:/data']",
        looks: &[],
    },
    Case {
        name: "reader",
        keys: "command: [/bin/sh, -c, 'cat /data/x > /tmp/found; exec httpd -f -p 8000']
volumes: ['data:/data:ro']
depends_on:
  seed: {condition: service_completed_successfully}
  absent: {condition: service_started, required: false}",
        looks: &[look("depends_on depends_on.*.condition depends_on.*.required", "cat /tmp/found", Is("seeded"))],
    },
    Case {
        name: "absent",
        keys: "profiles: [never]",
        looks: &[],
    },
    Case {
        name: "slow",
        keys: "command: [/bin/sh, -c, 'sleep 1; touch /tmp/up; exec httpd -f -p 8000']
healthcheck: {test: 'echo x >> /tmp/asked; test -e /tmp/up', interval: 1s, timeout: 5s, retries: 5, start_period: 20s, start_interval: 1s}",
        looks: &[look("healthcheck healthcheck.test", "test -s /tmp/asked && echo asked", Is("asked"))],
    },
    Case {
        name: "after",
        keys: "depends_on: {slow: {condition: service_healthy, restart: true}}\nhealthcheck: {disable: true}",
        looks: &[],
    },
    Case {
        name: "hooked",
        keys: "environment: {VERSION: '${VERSION}'}
volumes: ['./out:/out']
command: [/bin/sh, -c, 'trap \"echo caught > /out/signal; exit\" USR1; while :; do sleep 0.1; done']
stop_signal: SIGUSR1
restart: 'no'
post_start:
  - {command: [/bin/sh, -c, 'echo $$A $$(id -u) $$(pwd) > /tmp/hook'], user: app, working_dir: /www, environment: {A: b}}
  - {command: [/bin/sh, -c, 'grep CapEff /proc/self/status > /tmp/caps; test $$VERSION != bad'], privileged: true}
pre_stop:
  - {command: [/bin/sh, -c, 'echo $$A $$(id -u) $$(pwd) > /out/stopping'], user: '0', working_dir: /www, environment: {A: c}, privileged: false}",
        looks: &[
            look("post_start post_start.[].command post_start.[].user post_start.[].working_dir post_start.[].environment", "cat /tmp/hook", Is("b 1000 /www")),
            look("post_start.[].privileged", "cat /tmp/caps", super::Has("{host:caps}")),
        ],
    },
    Case {
        name: "late",
        keys: "volumes: ['./out:/out']
command: [/bin/sh, -c, 'trap \"sleep 4; echo x > /out/late\" TERM; while :; do sleep 0.1; done']
stop_grace_period: 1s
stop_signal: SIGTERM",
        looks: &[],
    },
    Case { name: "three", keys: "scale: 3", looks: &[] },
    Case { name: "two", keys: "deploy: {replicas: 2, mode: replicated, endpoint_mode: vip}", looks: &[] },
    Case { name: "everywhere", keys: "deploy: {mode: global, restart_policy: {condition: any}}\nrestart: 'no'", looks: &[] },
    Case { name: "once", keys: "restart: 'no'\ncommand: [/bin/true]", looks: &[] },
    Case { name: "task", keys: "deploy: {mode: replicated-job}\ncommand: [/bin/true]", looks: &[] },
];

const TOP: &str = "volumes: {data: {}}\n";

pub const OTHER: &[&str] = &[
    "scale",
    "deploy.replicas",
    "deploy.mode",
    "deploy.restart_policy",
    "deploy.restart_policy.condition",
    "depends_on.*.restart",
    "healthcheck.interval",
    "healthcheck.disable",
    "restart",
    "stop_signal",
    "stop_grace_period",
    "pre_stop",
    "pre_stop.[].command",
    "pre_stop.[].user",
    "pre_stop.[].working_dir",
    "pre_stop.[].environment",
    "pre_stop.[].privileged",
];

pub fn keys() -> impl Iterator<Item = &'static str> {
    let looks = CASES.iter().flat_map(|c| c.looks).map(|l| l.of);
    looks.chain(OTHER.iter().copied())
}

fn ids(project: &Project, service: &str) -> Vec<String> {
    let instances = project.instances(Some(service)).into_iter();
    instances.map(|i| i.id).collect()
}

/// When a process began, in ticks since the boot (proc(5)).
fn began(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1;
    fields.split_whitespace().nth(19).unwrap().parse().unwrap()
}

#[test]
fn services_begin_prove_themselves_and_end_as_said() {
    let Some(kiln) = Kiln::new() else { return };
    let mut project = project(&kiln, "lifecycle", CASES, TOP, &[]);
    project.set("VERSION", "one");
    project.up().ok();
    let folder = project.folder.join("out");
    let out = |name: &str| fs::read_to_string(folder.join(name));
    check(&project, CASES);
    let count = |project: &Project, service| ids(project, service).len();
    let counts = ["three", "two", "everywhere", "once", "task"].map(|s| count(&project, s));
    assert_eq!(counts, [3, 2, 1, 0, 0]);
    let pids = pids(&project);
    // 100 ticks a second: the one that others wait for takes a second to be healthy.
    assert!(began(pids["after"]) >= began(pids["slow"]) + 100);
    let asked = || {
        let line = "wc -l < /tmp/asked";
        project
            .inside("slow", line)
            .ok()
            .stdout
            .trim()
            .parse::<u32>()
            .unwrap()
    };
    let before = asked();
    wait_until("more health checks", || asked() >= before + 2);

    // It has said `any` where `restart` says `no`.
    let old = ids(&project, "everywhere");
    kill(pids["everywhere"], rustix::process::Signal::KILL);
    wait_until("another copy", || {
        let new = project.settled(Some("everywhere"));
        new.len() == 1 && new[0].id != old[0]
    });

    // A hook that fails fails its replacement, and the old one stays.
    let (hooked, after) = (ids(&project, "hooked"), ids(&project, "after"));
    assert!(out("stopping").is_err() && out("signal").is_err());
    project.set("VERSION", "bad");
    project.up().code(&[1, 5]).says(&["post_start"]);
    project.settled(None);
    project.set("VERSION", "two");
    project.edit("compose.yaml", "retries: 5", "retries: 6");
    project.up().ok();
    project.settled(None);
    assert_ne!(ids(&project, "hooked"), hooked);
    assert_ne!(ids(&project, "after"), after, "it restarts with the other");
    assert_eq!(count(&project, "reader"), 1);
    assert_eq!(out("stopping").unwrap().trim(), "c 0 /www");
    assert_eq!(out("signal").unwrap().trim(), "caught");
    project.run("down", &[]).ok();
    assert!(out("late").is_err(), "its grace is a second");
}
