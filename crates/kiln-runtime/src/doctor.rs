//! Facts about this machine that instances depend on: what is there, what is not,
//! and what that costs. Nothing is changed by looking, and nothing is loaded.

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::cgroup::Layout;
use crate::{capabilities, seccomp, sys};

/// How good a fact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Good,
    /// Works with less.
    Degraded,
    /// Instances can't run.
    Missing,
}

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub what: String,
    pub state: State,
    /// What is lost; empty when nothing is.
    pub cost: String,
    /// What to do about it; empty when there is nothing to do.
    pub hint: String,
}

fn good(what: impl Into<String>) -> Finding {
    Finding {
        what: what.into(),
        state: State::Good,
        cost: String::new(),
        hint: String::new(),
    }
}

fn lacking(state: State, what: impl Into<String>, cost: &str, hint: &str) -> Finding {
    Finding {
        what: what.into(),
        state,
        cost: cost.into(),
        hint: hint.into(),
    }
}

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let kernel = seccomp::kernel_version();
    let mut findings = vec![rights(), kernel_age(kernel)];
    findings.extend(file_systems(
        &fs::read_to_string("/proc/filesystems").unwrap_or_default(),
        kernel,
    ));
    findings.extend(control_groups(&Layout::detect()));
    findings.extend(capability_findings(
        sys::permitted_capabilities().unwrap_or_default(),
    ));
    findings.push(if Path::new("/proc/sys/kernel/seccomp").exists() {
        good("seccomp")
    } else {
        lacking(
            State::Missing,
            "the kernel has no seccomp",
            "instances can only be started with seccomp=unconfined",
            "use a kernel with CONFIG_SECCOMP_FILTER (Debian's has it)",
        )
    });
    findings
}

fn rights() -> Finding {
    if rustix::process::geteuid().is_root() {
        return good("running as root");
    }
    lacking(
        State::Missing,
        "not running as root",
        "no instance can be started",
        "run the daemon as root",
    )
}

fn kernel_age(kernel: (u32, u32)) -> Finding {
    let (major, minor) = kernel;
    let name = format!("kernel {major}.{minor}");
    if kernel < (5, 14) {
        return lacking(
            State::Missing,
            name,
            "mounts are made with calls this kernel lacks",
            "use Debian 12 or later (kernel 6.1)",
        );
    }
    if kernel < (6, 12) {
        return lacking(
            State::Degraded,
            name,
            "image trees are mounted through loop devices (from 6.12 they need none)",
            "",
        );
    }
    good(name)
}

fn file_systems(known: &str, kernel: (u32, u32)) -> Vec<Finding> {
    let modules = {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        Path::new("/lib/modules").join(release)
    };
    let mut list = Vec::new();
    let mut wanted = vec!["overlay", "erofs"];
    if kernel < (6, 12) {
        wanted.push("loop");
    }
    for name in wanted {
        let there = match name {
            "loop" => Path::new("/dev/loop-control").exists(),
            name => known.split_whitespace().any(|known| known == name),
        };
        list.push(if there {
            good(name)
        } else if has_module(&modules, name) {
            good(format!("{name} (a module, loaded when it is needed)"))
        } else {
            lacking(
                State::Missing,
                format!("the kernel has no {name}"),
                "images cannot be mounted",
                "use a kernel that has it as a module or built in (Debian's has)",
            )
        });
    }
    list
}

fn has_module(modules: &Path, name: &str) -> bool {
    ["modules.dep", "modules.builtin"].iter().any(|file| {
        fs::read_to_string(modules.join(file)).is_ok_and(|text| {
            text.lines().any(|line| {
                let path = line.split(':').next().unwrap_or_default();
                path.rsplit('/')
                    .next()
                    .is_some_and(|file| file.split('.').next() == Some(name))
            })
        })
    })
}

fn control_groups(layout: &Layout) -> Vec<Finding> {
    let mut list = vec![match layout {
        Layout::V2(_) => good("control groups v2"),
        Layout::V1(_) => good("control groups v1"),
        Layout::None => lacking(
            State::Missing,
            "no control groups are mounted",
            "instances cannot be made",
            "mount cgroup2 on /sys/fs/cgroup",
        ),
    }];
    let v2 = matches!(layout, Layout::V2(_));
    for (controller, cost) in [
        ("memory", "memory limits are not enforced"),
        ("cpu", "CPU limits are not enforced"),
        ("pids", "process limits are not enforced"),
        (
            if v2 { "io" } else { "blkio" },
            "I/O limits are not enforced",
        ),
    ] {
        list.push(if layout.has(controller) {
            good(format!("control group `{controller}`"))
        } else {
            lacking(
                State::Degraded,
                format!("no control group `{controller}`"),
                cost,
                "enable it (kernel command line: cgroup_enable=…)",
            )
        });
    }
    list
}

fn capability_findings(held: u64) -> Vec<Finding> {
    [
        ("SYS_ADMIN", State::Missing, "instances cannot be made"),
        ("NET_ADMIN", State::Missing, "networks cannot be made"),
        (
            "SYS_RESOURCE",
            State::Degraded,
            "ulimits cannot be raised, nor instances be protected from the out-of-memory killer",
        ),
        (
            "MKNOD",
            State::Degraded,
            "device nodes in build steps cannot be made",
        ),
    ]
    .into_iter()
    .map(|(name, state, cost)| {
        let there = capabilities::parse(name).is_ok_and(|bit| held & bit != 0);
        if there {
            return good(format!("capability {name}"));
        }
        let what = format!("the capability {name} is missing");
        lacking(
            state,
            what,
            cost,
            "run kiln outside of a container, or give it the capability",
        )
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_has_a_cost() {
        let findings = [
            file_systems("nodev tmpfs\n", (1, 0)),
            control_groups(&Layout::None),
            capability_findings(0),
            vec![kernel_age((4, 19)), kernel_age((6, 1)), kernel_age((6, 18))],
        ]
        .concat();
        assert!(
            findings
                .iter()
                .all(|f| (f.state == State::Good) == f.cost.is_empty())
        );
        let state = |n: usize| findings.iter().rev().nth(n).map(|f| f.state);
        assert_eq!(state(0), Some(State::Good));
        assert_eq!(state(1), Some(State::Degraded));
        assert_eq!(state(2), Some(State::Missing));
    }
}
