//! Everything of a root that can be found on the machine: processes, mounts, network
//! namespaces, interfaces, cgroups, firewall tables. Empty means: nothing is left.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_runtime::net;

/// What belongs to instances and the proxy. The daemon itself counts only with `daemon`.
pub fn leftovers(root: &Path, daemon: bool) -> Vec<String> {
    let mut found: Vec<String> = processes(root)
        .into_iter()
        .filter(|(_, line)| daemon || !line.contains("daemon run"))
        .map(|(pid, line)| format!("process {pid}: {line}"))
        .collect();
    found.extend(
        mounts(root)
            .into_iter()
            .map(|m| format!("mount {}", m.display())),
    );
    found.extend(bridges(root).into_iter().map(|b| format!("bridge {b}")));
    found.extend(
        cgroups(root)
            .into_iter()
            .map(|c| format!("cgroup {}", c.display())),
    );
    found.extend(
        instances(root)
            .into_iter()
            .map(|i| format!("instance folder {i}")),
    );
    found
}

/// Processes whose command line names the root (daemon, proxy, shims), those in its
/// control groups, and all that these have started.
pub fn processes(root: &Path) -> Vec<(u32, String)> {
    let name = root.to_string_lossy().into_owned();
    let group = format!("/kiln-{}/", net::root_tag(root));
    let me = std::process::id();
    let mut found = vec![];
    let mut others = vec![];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok());
        let Some(pid) = pid.filter(|pid| *pid != me && super::alive(*pid)) else {
            continue;
        };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        match line.contains(&name) || groups.contains(&group) {
            true => found.push((pid, line)),
            false => others.push((pid, line)),
        }
    }
    // Where there are no control groups, descent has to do.
    let shims: Vec<u32> = found
        .iter()
        .filter(|(_, line)| line.contains(" shim "))
        .map(|(pid, _)| *pid)
        .collect();
    found.extend(others.into_iter().filter(|(pid, _)| descends(*pid, &shims)));
    found
}

fn descends(mut pid: u32, from: &[u32]) -> bool {
    // As deep as a process tree sensibly gets.
    for _ in 0..32 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1));
        match parent.and_then(|p| p.parse().ok()) {
            Some(parent) if from.contains(&parent) => return true,
            Some(parent) if parent > 1 => pid = parent,
            _ => return false,
        }
    }
    false
}

/// Mount points below the root, the newest first.
pub fn mounts(root: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let mut points: Vec<PathBuf> = points
        .map(PathBuf::from)
        .filter(|p| p.starts_with(root))
        .collect();
    points.reverse();
    points
}

pub fn bridges(root: &Path) -> Vec<String> {
    let prefix = format!("kn{}", net::root_tag(root));
    net::bridges(&prefix)
        .unwrap()
        .into_iter()
        .map(|b| b.name)
        .collect()
}

/// Groups of instances; the common parent may stay while shims end.
pub fn cgroups(root: &Path) -> Vec<PathBuf> {
    let name = format!("kiln-{}", net::root_tag(root));
    let mut found = vec![];
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    for parent in hierarchies.chain([top.to_owned()]).map(|h| h.join(&name)) {
        for group in fs::read_dir(parent).into_iter().flatten().flatten() {
            let is_group = group.file_type().is_ok_and(|t| t.is_dir());
            if is_group && group.file_name() != ".shims" {
                found.push(group.path());
            }
        }
    }
    found
}

pub fn instances(root: &Path) -> Vec<String> {
    let folder = fs::read_dir(root.join("instances"))
        .into_iter()
        .flatten()
        .flatten();
    folder
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect()
}
