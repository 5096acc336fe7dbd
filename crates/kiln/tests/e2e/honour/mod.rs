//! What a compose file says is what a running instance shows: tables of services, and for
//! each key a look from inside (`/proc`, the mount table, addresses, files) or at its
//! control group. Every honoured key is looked at here, or [`listed`] says why not.

mod lifecycle;
mod listed;
mod network;
mod process;
mod storage;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use serde_json::Value;

use crate::common::{BUSYBOX, Kiln, Project, leftovers, wait_until};

/// A service, and what is to be seen of it.
pub struct Case {
    pub name: &'static str,
    /// Its keys beside `build`, as in the file, without indentation.
    pub keys: &'static str,
    pub looks: &'static [Look],
}

pub struct Look {
    /// What of the schema is looked at, below `services.*.`; from the top with a `/` before.
    pub of: &'static str,
    /// A shell line run in the instance.
    pub line: &'static str,
    pub shows: Shows,
}

/// What the line prints; `{host:…}` stands for what the same file shows out here, and
/// `{pid:SERVICE}` for the other service's process.
pub enum Shows {
    /// Just this.
    Is(&'static str),
    Has(&'static str),
    HasNot(&'static str),
}

pub use Shows::{Has, HasNot, Is};

pub const fn look(of: &'static str, line: &'static str, shows: Shows) -> Look {
    Look { of, line, shows }
}

/// A limit: its file under v1 and v2, and the words of the warning where it can't be.
pub struct Group {
    pub service: &'static str,
    pub of: &'static str,
    pub v1: (&'static str, &'static str, &'static str),
    pub v2: (&'static str, &'static str),
    pub what: &'static str,
}

const CONTAINERFILE: &str = "FROM busybox AS packages
FROM scratch AS page
COPY --from=packages /bin/busybox /bin/busybox
RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]
COPY passwd group /etc/
COPY www /www
COPY --chmod=0755 run /run.sh
STOPSIGNAL SIGKILL
CMD [\"/bin/httpd\", \"-f\", \"-p\", \"8000\", \"-h\", \"/www\"]
";

/// Stays as the first process, so that its arguments can be seen.
const RUN: &str = "#!/bin/sh
trap 'kill $!; exit 0' TERM
httpd -f -p 8000 -h /www &
wait
";

/// A project of these services. Its image has neither `/tmp` nor any other empty folder.
pub fn project<'k>(
    kiln: &'k Kiln,
    name: &str,
    cases: &[Case],
    top: &str,
    files: &[(&str, &str)],
) -> Project<'k> {
    let mut text = format!("{BUSYBOX}services:\n");
    for case in cases {
        let _ = writeln!(text, "  {}:", case.name);
        text.push_str("    build: .\n");
        for line in case.keys.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text.push_str(top);
    let base = [
        ("compose.yaml", text.as_str()),
        ("Containerfile", CONTAINERFILE),
        ("run", RUN),
        ("www/index.html", name),
        (
            "passwd",
            "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/www:/bin/sh\n",
        ),
        ("group", "root:x:0:\napp:x:1000:\nextra:x:2000:\n"),
    ];
    let all: Vec<(&str, &str)> = base.into_iter().chain(files.iter().copied()).collect();
    kiln.project(name, &all)
}

/// Takes every look; all that is wrong is told at once.
#[track_caller]
pub fn check(project: &Project, cases: &[Case]) {
    let pids = pids(project);
    let mut wrong = vec![];
    for case in cases.iter().filter(|case| !case.looks.is_empty()) {
        let mut script = String::new();
        for look in case.looks {
            let _ = writeln!(script, "( {} ) 2>&1; echo; echo =next=", look.line);
        }
        let ran = project.inside(case.name, &script);
        let mut shown = ran.stdout.split("\n=next=\n");
        for look in case.looks {
            let text = shown.next().unwrap_or("").trim();
            let fits = match look.shows {
                Is(wanted) => text == fill(wanted, &pids),
                Has(wanted) => text.contains(&fill(wanted, &pids)),
                HasNot(other) => !text.contains(&fill(other, &pids)),
            };
            if !fits {
                let wanted = match look.shows {
                    Is(t) => format!("is {t}"),
                    Has(t) => format!("has {t}"),
                    HasNot(t) => format!("has not {t}"),
                };
                let (of, line) = (look.of, look.line);
                wrong.push(format!(
                    "{}: {of}: `{line}` shows `{text}`; it {wanted}",
                    case.name
                ));
            }
        }
        if ran.code != Some(0) {
            wrong.push(format!("{}: {ran}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Limits, seen from out here: enforced, or told.
#[track_caller]
pub fn check_groups(project: &Project, groups: &[Group]) {
    let pids = pids(project);
    let status = project.status();
    let mut wrong = vec![];
    for group in groups {
        let told = warnings(&status, group.service)
            .iter()
            .any(|warning| warning.contains(group.what));
        let own = fs::read_to_string(format!("/proc/{}/cgroup", pids[group.service])).unwrap();
        let path = |controllers: &str| {
            let mut lines = own
                .lines()
                .filter_map(|line| line.split_once(':')?.1.split_once(':'));
            lines
                .find(|(c, _)| *c == controllers)
                .map(|(_, path)| path.to_owned())
        };
        let (controller, file, v1) = group.v1;
        let (text, wanted) = match path(controller).filter(|path| path.contains("kiln-")) {
            Some(path) => (
                fs::read_to_string(format!("/sys/fs/cgroup/{controller}{path}/{file}")),
                v1,
            ),
            None => (
                fs::read_to_string(format!(
                    "/sys/fs/cgroup{}/{}",
                    path("").unwrap_or_default(),
                    group.v2.0
                )),
                group.v2.1,
            ),
        };
        let fits = text
            .as_ref()
            .is_ok_and(|text| text.lines().any(|line| line.trim() == wanted));
        if !fits && !told {
            wrong.push(format!(
                "{}: {}: {text:?} is not {wanted}, and no warning of {}",
                group.service, group.of, group.what
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn warnings(status: &Value, service: &str) -> Vec<String> {
    let services = status["services"].as_array().into_iter().flatten();
    services
        .filter(|s| s["service"] == service)
        .flat_map(|s| s["instances"].as_array().into_iter().flatten())
        .flat_map(|i| i["warnings"].as_array().into_iter().flatten())
        .filter_map(|w| w.as_str().map(str::to_owned))
        .collect()
}

/// The first process of each service's first instance.
pub fn pids(project: &Project) -> BTreeMap<String, u32> {
    let mut pids = BTreeMap::new();
    for instance in project.instances(None) {
        if let Some(pid) = instance.pid {
            pids.entry(instance.service).or_insert(pid);
        }
    }
    pids
}

fn fill(text: &str, pids: &BTreeMap<String, u32>) -> String {
    let mut out = text.to_owned();
    while let Some((before, rest)) = out.split_once('{') {
        let (name, after) = rest.split_once('}').expect("a closing brace");
        let value = match name.split_once(':') {
            Some(("host", "caps")) => {
                let status = fs::read_to_string("/proc/self/status").unwrap();
                let line = status.lines().find_map(|l| l.strip_prefix("CapPrm:\t"));
                line.unwrap_or_default().to_owned()
            }
            Some(("host", path)) => link(&format!("/proc/self/{path}")),
            Some((service, path)) => link(&format!("/proc/{}/{path}", pids[service])),
            None => panic!("what is {{{name}}}?"),
        };
        out = format!("{before}{value}{after}");
    }
    out
}

/// But for the proxy, which serves whoever comes next. Networks and volumes in memory go
/// just after `down` has said so.
pub fn nothing_is_left(kiln: &Kiln) {
    wait_until("nothing that is left", || {
        let left = leftovers(&kiln.root, false);
        left.iter().all(|l| l.ends_with(" proxy "))
    });
}

fn link(path: &str) -> String {
    let target = fs::read_link(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    target.to_string_lossy().into_owned()
}
