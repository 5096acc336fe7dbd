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

/// Processes whose command line or whose own mounts name the root.
pub fn processes(root: &Path) -> Vec<(u32, String)> {
    let name = root.to_string_lossy().into_owned();
    let me = std::process::id();
    let own_mounts = fs::read_link("/proc/self/ns/mnt").ok();
    let mut found = vec![];
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
        let namespace = fs::read_link(entry.path().join("ns/mnt")).ok();
        let inside = namespace.is_some() && namespace != own_mounts && {
            let mounts = fs::read_to_string(entry.path().join("mountinfo"));
            mounts.is_ok_and(|m| m.contains(&name))
        };
        if line.contains(&name) || inside {
            found.push((pid, line));
        }
    }
    found
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
