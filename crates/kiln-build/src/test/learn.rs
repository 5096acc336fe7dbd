//! From what a program wrote to which directories are scratch in its release.
//!
//! Scratch shows the image's content underneath, so it is put on the nearest folder that
//! the image has. It is never put where programs and their configuration live as a whole:
//! such writes are named in a warning, and the service either does without them or says
//! `x-kiln.scratch` or `x-kiln.root: scratch` itself.

use std::collections::BTreeMap;

use kiln_model::instance::Scratch;

/// A scratch directory's bound in bytes, where little was written.
pub const SCRATCH_BYTES: u64 = 64 << 20;

/// Bounds grow to this many times of what the test wrote.
const GROWTH: u64 = 4;

/// Always scratch, whether the image has them or not.
pub const ALWAYS: [&str; 3] = ["/run", "/tmp", "/var/tmp"];

/// Scratch too when the program ended before it had shown all it writes.
pub const LIKELY: [&str; 4] = ["/var/cache", "/var/lib", "/var/log", "/var/spool"];

/// Never scratch as a whole.
const WHOLE: [&str; 12] = [
    "/",
    "/boot",
    "/etc",
    "/home",
    "/media",
    "/mnt",
    "/opt",
    "/srv",
    "/usr",
    "/usr/local",
    "/var",
    "/usr/share",
];

/// Nothing below is ever scratch: programs and libraries.
const PROGRAMS: [&str; 13] = [
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/include",
];

/// Made by the runtime.
const SANDBOX: [&str; 8] = [
    "/dev",
    "/proc",
    "/sys",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/mtab",
    "/.dockerenv",
];

/// One path a program wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Absolute.
    pub path: String,
    /// The nearest folder that was written into and that the image has.
    pub folder: String,
    /// Bytes.
    pub size: u64,
}

/// What follows from the writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    pub scratch: Vec<Scratch>,
    /// Written files that no scratch directory covers.
    pub uncovered: Vec<String>,
}

fn within(path: &str, folder: &str) -> bool {
    folder == "/"
        || path == folder
        || path
            .strip_prefix(folder)
            .is_some_and(|r| r.starts_with('/'))
}

/// `volumes`: the image's VOLUMEs; `mounted`: where the service mounts something;
/// `always`: those of [`ALWAYS`] that are no links in the image.
pub fn learn(
    writes: &[Write],
    volumes: &[String],
    mounted: &[String],
    always: &[String],
) -> Learned {
    let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
    for path in always.iter().chain(volumes) {
        if !mounted.iter().any(|m| within(path, m)) {
            sizes.insert(path, 0);
        }
    }
    let mut uncovered = Vec::new();
    for write in writes {
        let path = write.path.as_str();
        let ignored = SANDBOX.iter().any(|s| within(path, s))
            || mounted.iter().any(|m| within(path, m) || within(m, path))
            || is_bytecode(path)
            // On the way to what was made for the test.
            || always.iter().any(|a| a != path && within(a, path));
        if ignored {
            continue;
        }
        let known = always.iter().find(|a| within(path, a));
        let folder = known.map_or(write.folder.as_str(), String::as_str);
        let refused = WHOLE.contains(&folder) || PROGRAMS.iter().any(|p| within(folder, p));
        match refused && !sizes.contains_key(folder) {
            true => uncovered.push(write.path.clone()),
            false => *sizes.entry(folder).or_default() += write.size,
        }
    }
    Learned {
        scratch: collapse(&sizes),
        uncovered,
    }
}

/// Python's caches: a program does without them on a read-only root.
fn is_bytecode(path: &str) -> bool {
    path.ends_with("/__pycache__") || path.contains("/__pycache__/") || path.ends_with(".pyc")
}

/// Drops what lies within another; the outer one's bound holds for both.
fn collapse(sizes: &BTreeMap<&str, u64>) -> Vec<Scratch> {
    let mut kept: Vec<(&str, u64)> = Vec::new();
    let mut paths: Vec<(&str, u64)> = sizes.iter().map(|(p, s)| (*p, *s)).collect();
    paths.sort_by_key(|(path, _)| (path.matches('/').count(), *path));
    for (path, size) in paths {
        match kept.iter_mut().find(|(outer, _)| within(path, outer)) {
            Some((_, total)) => *total += size,
            None => kept.push((path, size)),
        }
    }
    kept.sort();
    kept.into_iter()
        .map(|(path, size)| Scratch {
            path: path.to_owned(),
            size: SCRATCH_BYTES.max(size.saturating_mul(GROWTH)),
            exec: false,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &str, folder: &str, size: u64) -> Write {
        Write {
            path: path.into(),
            folder: folder.into(),
            size,
        }
    }

    fn learned(writes: &[Write]) -> (Vec<String>, Vec<String>) {
        let learned = learn(
            writes,
            &["/data".into()],
            &["/var/lib/db".into()],
            &["/run".into(), "/tmp".into()],
        );
        (
            learned.scratch.into_iter().map(|s| s.path).collect(),
            learned.uncovered,
        )
    }

    #[test]
    fn folders_that_were_written_become_scratch_once() {
        let (scratch, uncovered) = learned(&[
            write("/var/cache/nginx/client_temp", "/var/cache/nginx", 0),
            write("/var/cache/nginx/proxy/x", "/var/cache/nginx/proxy", 1),
            write("/run/nginx.pid", "/run", 3),
            write("/tmp/a/b", "/tmp/a", 3),
            write("/var/lib/db/table", "/var/lib/db", 9),
            write(
                "/usr/lib/python3/x/__pycache__/m.pyc",
                "/usr/lib/python3/x",
                9,
            ),
            write("/etc/resolv.conf", "/etc", 1),
        ]);
        assert_eq!(scratch, ["/data", "/run", "/tmp", "/var/cache/nginx"]);
        assert!(uncovered.is_empty(), "{uncovered:?}");
    }

    #[test]
    fn the_system_never_becomes_scratch_as_a_whole() {
        let all = [
            write("/x", "/", 1),
            write("/etc/app.conf", "/etc", 1),
            write("/usr/bin/evil", "/usr/bin", 1),
            write("/usr/lib/app/state/x", "/usr/lib/app/state", 1),
            write("/etc/app/generated.conf", "/etc/app", 1),
        ];
        let (scratch, uncovered) = learned(&all);
        assert_eq!(scratch, ["/data", "/etc/app", "/run", "/tmp"]);
        assert_eq!(
            uncovered,
            [
                "/x",
                "/etc/app.conf",
                "/usr/bin/evil",
                "/usr/lib/app/state/x"
            ]
        );
    }

    #[test]
    fn bounds_grow_with_what_was_written() {
        let big = 100 << 20;
        let learned = learn(&[write("/app/db", "/app", big)], &[], &[], &[]);
        assert_eq!(learned.scratch[0].size, big * GROWTH);
    }
}
