//! Takes out of a configured root what differs from one build to the next: logs,
//! caches, locks, backups, identities. What is left depends on the packages only.

use std::io;

use kiln_model::identity;

use super::edit::Edit;
use crate::keystore;

/// Removed with all that is in them.
const REMOVED: [&str; 27] = [
    "usr/sbin/policy-rc.d",
    "var/cache/ldconfig/aux-cache",
    "var/cache/apt/pkgcache.bin",
    "var/cache/apt/srcpkgcache.bin",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/passwords.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/cache/man",
    "var/lib/apt/periodic",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/urandom/random-seed",
    "etc/.pwd.lock",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
];

/// Emptied; the folders stay.
const EMPTIED: [&str; 8] = [
    "tmp",
    "var/tmp",
    "run",
    "var/cache/apt/archives",
    "var/lib/apt/lists",
    "var/lib/dpkg/updates",
    "var/log/apt",
    "dev",
];

/// Files of this machine's identity: there, so that they can be mounted over.
const BLANK: [&str; 4] = [
    "etc/machine-id",
    "etc/hostname",
    "etc/hosts",
    "etc/resolv.conf",
];

/// Of ca-certificates-java: with the time at which each certificate was put in.
const KEY_STORE: &str = "etc/ssl/certs/java/cacerts";

/// Cleans the root; `configured`: maintainer scripts have run in it.
pub fn clean(edit: &Edit, configured: bool) -> io::Result<()> {
    for path in REMOVED {
        edit.remove(path)?;
    }
    for path in EMPTIED {
        edit.empty(path)?;
    }
    if configured {
        edit.folder("run/lock", 0o1777)?;
    }
    // Each instance is given its own; an empty file says where.
    for (path, _) in identity::PLACES {
        if edit.read(path)?.is_some_and(|content| !content.is_empty()) {
            edit.overwrite(path, b"")?;
        }
    }
    if let Some(store) = edit.read(KEY_STORE)? {
        let settled = keystore::settled(store.clone(), |_| 0);
        if settled != store {
            edit.overwrite(KEY_STORE, &settled)?;
        }
    }
    // Log files stay where a package made them (with their owners), without content.
    truncate_logs(edit, "var/log", 0)?;
    edit.remove("var/log/bootstrap.log")?;
    for name in ["alternatives.log", "dpkg.log", "fontconfig.log"] {
        edit.remove(&format!("var/log/{name}"))?;
    }
    if configured {
        for path in BLANK {
            edit.put(path, "", 0o644)?;
        }
    }
    Ok(())
}

/// Folders below `/var/log` are few and flat.
const MAX_LOG_DEPTH: usize = 8;

fn truncate_logs(edit: &Edit, folder: &str, depth: usize) -> io::Result<()> {
    if depth > MAX_LOG_DEPTH {
        return edit.empty(folder);
    }
    for name in edit.names(folder)? {
        let path = format!("{folder}/{name}");
        match edit.read(&path)? {
            Some(content) if !content.is_empty() => edit.overwrite(&path, b"")?,
            Some(_) => {}
            None => truncate_logs(edit, &path, depth + 1)?,
        }
    }
    Ok(())
}
