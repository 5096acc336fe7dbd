//! What is in the repository must mean the same on every machine: no path of the machine
//! it was written on, no host name of a mirror that only this machine knows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Hosts that everyone knows, which configurations may name and so may we.
const PUBLIC: &[&str] = &[
    "security.debian.org",
    "ftp.debian.org",
    "archive.debian.org",
    "debian.org",
    "crates.io",
    "index.crates.io",
    "static.crates.io",
    "github.com",
    "docker.io",
    "registry-1.docker.io",
    "localhost",
    "127.0.0.1",
    "::1",
];

/// Files larger than this are fixtures made elsewhere.
const LARGEST: u64 = 8 << 20;

fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap().parent().unwrap().to_owned()
}

/// Tracked files and those that would be; everything but `target` where git is not there.
fn files() -> Vec<PathBuf> {
    let root = repository();
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(&root)
        .output();
    let mut files: Vec<PathBuf> = match listed {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split('\0')
            .filter(|name| !name.is_empty())
            .map(|name| root.join(name))
            .collect(),
        _ => walk(&root),
    };
    files.retain(|path| {
        path.symlink_metadata()
            .is_ok_and(|m| m.is_file() && m.len() <= LARGEST)
    });
    assert!(files.len() > 100, "only {} files found", files.len());
    files
}

fn walk(root: &Path) -> Vec<PathBuf> {
    let mut folders = vec![root.to_owned()];
    let mut files = vec![];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() && name != "target" && name != ".git" => {
                    folders.push(entry.path());
                }
                kind if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}

/// Where this checkout lies, and where kiln was first written.
fn machine_paths() -> BTreeSet<String> {
    let root = repository().canonicalize().unwrap();
    let first = ["main", "wt", "shared"].map(|name| ["/", "work", "/", name, "/"].concat());
    let mut found = BTreeSet::from(first);
    // A checkout at the top of the file system has a name that may mean anything.
    if root.components().count() > 2 {
        found.insert(format!("{}/", root.display()));
    }
    found
}

/// Every host that this machine's package tools are configured with, and that is nobody
/// else's.
fn mirrors() -> BTreeSet<String> {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let mut files = vec![
        PathBuf::from("/etc/apt/sources.list"),
        "/etc/pip.conf".into(),
        home.join(".cargo/config.toml"),
        home.join(".cargo/config"),
        home.join(".config/pip/pip.conf"),
        home.join(".npmrc"),
    ];
    for folder in ["/etc/apt/sources.list.d", "/etc/apt/apt.conf.d"] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    let mut texts: Vec<String> = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .collect();
    let told = std::env::vars().filter(|(key, _)| {
        let key = key.to_ascii_lowercase();
        ["proxy", "mirror", "registry", "registries", "index_url"]
            .iter()
            .any(|word| key.contains(word))
    });
    texts.extend(told.map(|(_, value)| value));
    let hosts = texts.iter().flat_map(|text| hosts(text));
    hosts
        .filter(|host| !PUBLIC.contains(&host.as_str()) && host.contains('.'))
        .filter(|host| host.parse::<std::net::IpAddr>().is_err())
        .collect()
}

/// The hosts of all `scheme://host…` in a text.
fn hosts(text: &str) -> Vec<String> {
    text.match_indices("://")
        .map(|(at, _)| {
            let rest = &text[at + 3..];
            let end = rest.find(|c: char| c == '/' || c == '"' || c.is_whitespace());
            let authority = &rest[..end.unwrap_or(rest.len())];
            let host = authority.rsplit('@').next().unwrap_or(authority);
            host.split(':').next().unwrap_or(host).to_ascii_lowercase()
        })
        .collect()
}

/// Where any of `words` occurs in the repository.
fn occurrences(words: impl Iterator<Item = String>) -> Vec<String> {
    let words: Vec<String> = words.collect();
    let mut found = vec![];
    for file in files() {
        let content = std::fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&content);
        for word in words.iter().filter(|word| text.contains(word.as_str())) {
            found.push(format!("{}: {word}", file.display()));
        }
    }
    found
}

#[test]
fn no_file_names_a_path_of_the_machine_it_was_written_on() {
    let found = occurrences(machine_paths().into_iter());
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_file_names_a_mirror_that_only_this_machine_knows() {
    let found = occurrences(mirrors().into_iter());
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn hosts_are_found_in_both_forms_of_configuration() {
    let text = "deb http://one.example/debian bookworm main\n\
                registry = \"sparse+https://two.example:8443/index/\"\n\
                proxy = http://user:secret@three.example:3128\n";
    let expected = ["one.example", "two.example", "three.example"];
    assert_eq!(hosts(text), expected);
}
