//! What the tests call and a plain Debian 12 or 13 may lack.

use std::path::Path;
use std::process::Command;

use crate::cargo::{answers, program};

/// `(program or file, package)`: present means not asked for.
const NEEDED: &[(&str, &str)] = &[
    ("mkfs.erofs", "erofs-utils"),
    ("gpgv", "gpgv"),
    ("gpg", "gpg"),
    ("nft", "nftables"),
    ("iptables-nft", "iptables"),
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("mount", "mount"),
    ("unshare", "util-linux"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("git", "git"),
    ("python3", "python3-minimal"),
    ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
];

/// Installs what is missing. Tests whose programs can't be had say so themselves.
pub fn install() -> Result<(), String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(name, _)| !present(name, &path))
        .map(|(_, package)| *package)
        .collect();
    if !Path::new("/usr/bin/apt-get").exists() {
        return if missing.is_empty() {
            Ok(())
        } else {
            Err(format!(
                "not a Debian; the tests need {}",
                missing.join(", ")
            ))
        };
    }
    // Some tests download packages with apt-get, so the lists must be there too.
    let lists = answers(program("apt-get").args(["download", "--print-uris", "busybox-static"]));
    if missing.is_empty() && lists {
        return Ok(());
    }
    if !is_root() {
        return Err(format!(
            "not root, so that nothing can be installed; the tests need {}",
            if missing.is_empty() {
                "apt-get update".into()
            } else {
                missing.join(", ")
            }
        ));
    }
    apt(&["update"])?;
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    let mut words = vec!["install", "--yes", "--no-install-recommends"];
    words.extend(&missing);
    apt(&words)
}

/// Is a program in `path` (or where only root looks), or a file at its place?
fn present(name: &str, path: &str) -> bool {
    if name.starts_with('/') {
        return Path::new(name).exists();
    }
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| Path::new(folder).join(name).is_file())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn apt(words: &[&str]) -> Result<(), String> {
    let mut command = program("apt-get");
    command
        .args([
            "-qq",
            "-o",
            "DPkg::Lock::Timeout=300",
            "-o",
            "Acquire::Retries=3",
        ])
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("apt-get {}: {status}", words.join(" "))),
        Err(error) => Err(format!("apt-get: {error}")),
    }
}
