//! The rooms' walls: which crate may depend on which, and what may not be imported.
//!
//! The dependency tables below are allowlists on purpose: whoever adds a line here has
//! thought about the room's purpose (ARCHITECTURE.md) first.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which of kiln's own crates each may use.
const ROOMS: &[(&str, &[&str])] = &[
    ("kiln-model", &[]),
    ("kiln-compose", &["kiln-model"]),
    ("kiln-plan", &["kiln-model"]),
    ("kiln-oci", &["kiln-model"]),
    ("kiln-runtime", &["kiln-model"]),
    ("kiln-proxy", &["kiln-model"]),
    ("kiln-trust", &["kiln-model"]),
    ("kiln-store", &["kiln-model", "kiln-oci"]),
    (
        "kiln-build",
        &["kiln-model", "kiln-oci", "kiln-store", "kiln-runtime"],
    ),
    (
        "kiln-daemon",
        &[
            "kiln-model",
            "kiln-plan",
            "kiln-store",
            "kiln-runtime",
            "kiln-proxy",
            "kiln-trust",
        ],
    ),
    (
        "kiln",
        &[
            "kiln-model",
            "kiln-compose",
            "kiln-plan",
            "kiln-oci",
            "kiln-store",
            "kiln-build",
            "kiln-runtime",
            "kiln-proxy",
            "kiln-trust",
            "kiln-daemon",
        ],
    ),
    ("kiln-testkit", &["kiln-model", "kiln-plan"]),
    (
        "xtask",
        &[
            "kiln-build",
            "kiln-compose",
            "kiln-model",
            "kiln-plan",
            "kiln-runtime",
            "kiln-store",
            "kiln-testkit",
        ],
    ),
];

/// All that the pure rooms may use from outside.
const PURE: &[(&str, &[&str])] = &[
    (
        "kiln-model",
        &["aho-corasick", "serde", "serde_json", "sha2", "thiserror"],
    ),
    (
        "kiln-compose",
        &[
            "serde_json",
            "granit-parser",
            "strsim",
            "miette",
            "regex",
            "foldhash",
            "indexmap",
            "thiserror",
        ],
    ),
    ("kiln-plan", &["serde", "serde_json", "thiserror"]),
];

/// Heavy or dangerous libraries, and the only rooms that may hold them.
const HELD_BY: &[(&str, &[&str])] = &[
    ("libcontainer", &["kiln-runtime"]),
    ("nix", &["kiln-runtime"]),
    ("libc", &["kiln-runtime"]),
    ("seccompiler", &["kiln-runtime"]),
    ("ring", &["kiln-runtime", "kiln-build"]),
    ("rusqlite", &["kiln-daemon"]),
    ("axum", &["kiln-daemon"]),
    ("clap", &["kiln"]),
    ("hickory-proto", &["kiln-proxy"]),
    ("reqwest", &["kiln-oci", "kiln-build"]),
];

/// Paths which the pure rooms may not name.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "std::io::stdin",
    "std::io::stdout",
    "std::io::stderr",
    "std::os",
    "std::time::SystemTime",
    "std::time::Instant",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
    "std::net::ToSocketAddrs",
    "tokio",
    "rand",
];

/// `(file, path)`: the named exceptions.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("crates/kiln-compose/src/disk.rs", "std::fs"),
    ("crates/kiln-compose/src/disk.rs", "std::env"),
];

fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap().parent().unwrap().to_owned()
}

fn name_of(value: &serde_json::Value) -> String {
    value["name"].as_str().unwrap().to_owned()
}

/// Each package's direct dependencies without those of its tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(repository())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let normal = all.filter(|d| d["kind"].as_str() != Some("dev"));
            (name_of(package), normal.map(name_of).collect())
        })
        .collect()
}

#[test]
fn crates_depend_only_downwards() {
    let found = dependencies();
    let ours: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    let listed: BTreeSet<&str> = ROOMS.iter().map(|(name, _)| *name).collect();
    assert_eq!(ours, listed, "ROOMS names every crate");
    let mut wrong = vec![];
    for (name, allowed) in ROOMS {
        let own = found[*name].iter().filter(|d| ours.contains(d.as_str()));
        wrong.extend(
            own.filter(|d| !allowed.contains(&d.as_str()))
                .map(|d| format!("{name} may not depend on {d}")),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn libraries_stay_in_their_rooms() {
    let found = dependencies();
    let mut wrong = vec![];
    for (name, allowed) in PURE {
        let outside = found[*name].iter().filter(|d| !d.starts_with("kiln-"));
        wrong.extend(
            outside
                .filter(|d| !allowed.contains(&d.as_str()))
                .map(|d| format!("{name} is pure and may not depend on {d}")),
        );
    }
    for (library, rooms) in HELD_BY {
        let holders = found.iter().filter(|(_, all)| all.contains(*library));
        wrong.extend(
            holders
                .filter(|(name, _)| !rooms.contains(&name.as_str()))
                .map(|(name, _)| format!("{library} belongs to {rooms:?}, not to {name}")),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A library that nothing names is only waited for.
#[test]
fn every_dependency_is_used() {
    let mut unused = vec![];
    for (name, all) in dependencies() {
        if name == "xtask" {
            continue;
        }
        // `testing` modules are part of the library, behind a feature.
        let files = sources_without(&name, &["tests"]);
        let codes: Vec<String> = files.iter().map(|file| code(file)).collect();
        for dependency in all {
            let path = format!("{}::", dependency.replace('-', "_"));
            if !codes.iter().any(|code| names(code, &path)) {
                unused.push(format!("{name}: {dependency}"));
            }
        }
    }
    assert!(unused.is_empty(), "{unused:#?}");
}

/// Does a path begin like this?
fn names(code: &str, path: &str) -> bool {
    code.match_indices(path).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == ':'))
    })
}

/// Every dependency costs build time and trust: the budget of the lock file.
#[test]
fn the_lock_file_stays_within_its_budget() {
    let lock = std::fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let packages = lock.lines().filter(|l| *l == "[[package]]").count();
    assert!(packages <= 350, "{packages} locked packages");
}

/// A crate's source files, without those that hold only tests.
fn sources(name: &str) -> Vec<PathBuf> {
    sources_without(name, &["tests", "testing"])
}

fn sources_without(name: &str, left_out: &[&str]) -> Vec<PathBuf> {
    let mut folders = vec![repository().join("crates").join(name).join("src")];
    let mut files = vec![];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !left_out.contains(&stem.as_str()) {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs")
                && !left_out.contains(&stem.as_str())
            {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "{name} has no sources");
    files
}

fn relative(path: &Path) -> String {
    let path = path.strip_prefix(repository()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The code of a file: without comments, without the contents of literals, and without
/// its test modules.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    without_comments_and_literals(&without_tests(&text))
}

/// Leaves out `#[cfg(test)] mod … { … }` at the left margin, which (as rustfmt writes it)
/// ends with the next brace there.
fn without_tests(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("\n#[cfg(test)]\n") {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let end = rest.find(['{', ';']).unwrap_or(rest.len());
        let module = rest[..end].contains("mod ") && rest[end..].starts_with('{');
        let skipped = module.then(|| rest.find("\n}\n").map_or(rest.len(), |at| at + 2));
        let skipped = skipped.unwrap_or(end);
        if !module {
            out.push_str(&rest[..skipped]);
        }
        rest = &rest[skipped..];
    }
    out + rest
}

fn without_comments_and_literals(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("/*") {
            rest = &rest[rest.find("*/").map_or(rest.len(), |at| at + 2)..];
        } else if let Some(end) = raw_string(rest).or_else(|| string(rest)) {
            out.push_str("\"\"");
            rest = &rest[end..];
        } else if let Some(end) = character(rest) {
            out.push_str("' '");
            rest = &rest[end..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// The length of the raw string that `text` begins with.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?;
    let count = hashes.len() - hashes.trim_start_matches('#').len();
    hashes[count..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(count));
    let start = 2 + count;
    Some(text[start..].find(&close)? + start + close.len())
}

fn string(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.strip_prefix('"')?.char_indices() {
        match c {
            '"' if !escaped => return Some(at + 2),
            _ => escaped = c == '\\' && !escaped,
        }
    }
    None
}

/// A character literal, and not a lifetime.
fn character(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('\'')?;
    if inner.starts_with('\\') {
        return Some(inner[2..].find('\'')? + 4);
    }
    let c = inner.chars().next()?;
    inner[c.len_utf8()..]
        .starts_with('\'')
        .then_some(c.len_utf8() + 2)
}

/// Every path that the code names: use trees spelled out, and paths with two or more
/// parts as they stand.
fn paths(code: &str) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let statements = code.split(';').filter_map(|statement| {
        let line = statement.rfind("use ")?;
        let before = statement[..line].trim_end();
        let begins = before.is_empty() || before.ends_with(['}', '{', ']', ')', '\n', 'b']);
        begins.then(|| &statement[line + 4..])
    });
    for tree in statements {
        let tree: String = tree.chars().filter(|c| !c.is_whitespace()).collect();
        spell_out("", &tree, &mut out);
    }
    let separators = |c: char| !(c.is_alphanumeric() || c == '_' || c == ':');
    out.extend(
        code.split(separators)
            .map(|path| path.trim_matches(':'))
            .filter(|path| path.contains("::"))
            .map(ToOwned::to_owned),
    );
    out
}

/// `a::{b, c::{d, e}}` → `a::b`, `a::c::d`, `a::c::e`.
fn spell_out(prefix: &str, tree: &str, out: &mut BTreeSet<String>) {
    let Some(open) = tree.find('{') else {
        out.insert(format!("{prefix}{tree}"));
        return;
    };
    let inner = tree[open + 1..].strip_suffix('}');
    let Some(inner) = inner else {
        return;
    };
    let prefix = format!("{prefix}{}", &tree[..open]);
    let (mut depth, mut start) = (0_usize, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                spell_out(&prefix, &inner[start..at], out);
                start = at + 1;
            }
            _ => {}
        }
    }
    spell_out(&prefix, &inner[start..], out);
}

fn is_within(path: &str, forbidden: &str) -> bool {
    path.strip_prefix(forbidden)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[test]
fn pure_crates_touch_neither_files_nor_clocks_nor_the_network() {
    let mut wrong = vec![];
    let mut excused = BTreeSet::new();
    for (name, _) in PURE {
        for file in sources(name) {
            let at = relative(&file);
            for path in paths(&code(&file)) {
                let Some(forbidden) = IMPURE.iter().find(|f| is_within(&path, f)) else {
                    continue;
                };
                if EXCEPTIONS.contains(&(at.as_str(), *forbidden)) {
                    excused.insert((at.clone(), *forbidden));
                } else {
                    wrong.push(format!("{at}: {path}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(excused.len(), EXCEPTIONS.len(), "an exception nobody needs");
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
}

#[test]
fn unsafe_is_said_only_in_the_runtime() {
    let manifest = std::fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""));
    let mut wrong = vec![];
    for (name, _) in ROOMS.iter().filter(|(name, _)| *name != "xtask") {
        let own = repository().join("crates").join(name).join("Cargo.toml");
        let own = std::fs::read_to_string(own).unwrap();
        assert!(own.contains("[lints]\nworkspace = true"), "{name}: lints");
        for file in sources(name) {
            let code = code(&file);
            let says = words(&code).any(|word| ["unsafe", "unsafe_code"].contains(&word));
            if says && *name != "kiln-runtime" {
                wrong.push(relative(&file));
            }
            if says && !std::fs::read_to_string(&file).unwrap().contains("SAFETY") {
                wrong.push(format!("{} (no SAFETY comment)", relative(&file)));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Output is the CLI's: everything else tells through `Progress` and `tracing`.
#[test]
fn library_crates_do_not_print() {
    let mut wrong = vec![];
    let libraries = ROOMS.iter().map(|(name, _)| *name);
    for name in libraries.filter(|name| !["kiln", "xtask"].contains(name)) {
        for file in sources(name) {
            if relative(&file).contains("/src/bin/") {
                continue;
            }
            let code = code(&file);
            let macros = ["println!", "eprintln!", "print!", "eprint!", "dbg!"];
            if macros.iter().any(|m| code.contains(m)) {
                wrong.push(relative(&file));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_scanner_sees_what_it_should() {
    let text = "use std::{fmt, fs::{self, File}};\n// std::env\nfn f() { let s = \"std::env\"; \
                let r = r#\"std::\"env\"#; let c = '\"'; tokio::spawn(x); }\n";
    let found = paths(&without_comments_and_literals(text));
    for path in ["std::fmt", "std::fs::self", "std::fs::File", "tokio::spawn"] {
        assert!(found.contains(path), "{path} in {found:?}");
    }
    assert!(
        !found.iter().any(|p| p.starts_with("std::env")),
        "{found:?}"
    );
    let tested = "mod a;\n#[cfg(test)]\nmod b;\nfn f() {}\n#[cfg(test)]\npub(crate) mod c {\n    \
                  fn g() {}\n}\nfn h() {}\n";
    let left = without_tests(tested);
    assert!(left.contains("fn f") && left.contains("fn h"), "{left}");
    assert!(!left.contains("fn g"), "{left}");
    assert!(is_within("std::fs::File", "std::fs"));
    assert!(!is_within("std::fsx", "std::fs"));
}
