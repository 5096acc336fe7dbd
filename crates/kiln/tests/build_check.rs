//! `kiln build --check`, the program itself: places, exit codes, and what the project knows
//! of its bases.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::Command;

const COMPOSE: &str = "services:\n  web: {build: .}\n  job: {build: {context: ., dockerfile: Other}}\n\
                       x-kiln: {bases: {own: {suite: bookworm, packages: [apt]}}}\n";
const FILE: &str = "FROM own\nRUN apt-get update \\\n && curl https://h/x | sh\nCMD run it\n";

/// Exit code, standard output, standard error.
fn kiln(folder: &Path, words: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(words)
        .current_dir(folder)
        .env_clear()
        .env("KILN_ROOT", folder.join("root"))
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (code, text(output.stdout), text(output.stderr))
}

fn project(file: &str, other: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let files = [
        ("compose.yaml", COMPOSE),
        ("Dockerfile", file),
        ("Other", other),
    ];
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn findings_have_places_and_decide_the_exit_code() {
    let folder = project(FILE, "FROM scratch\nCOPY a b\n");
    let (code, out, err) = kiln(folder.path(), &["build", "--check"]);
    assert_eq!(code, 3, "{err}");
    let heads: Vec<&str> = out.lines().filter(|l| l.contains("warning")).collect();
    assert_eq!(heads.len(), 2, "{out}");
    assert!(
        heads[0].starts_with("Dockerfile:2: warning: PipeToShell: "),
        "{out}"
    );
    assert!(
        heads[1].starts_with("Dockerfile:4: warning: JSONArgsRecommended: "),
        "{out}"
    );
    assert!(out.contains("\n    CMD run it\n"), "{out}");
    assert!(err.contains("0 errors, 2 warnings, 0 notes"), "{err}");
    let (code, out, _) = kiln(folder.path(), &["build", "--check", "--json"]);
    let problems: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, problems.as_array().unwrap().len()), (3, 2));
    assert_eq!(problems[0]["rule"], "PipeToShell");
    assert_eq!(problems[0]["at"]["line"], 2);
    assert_eq!(problems[0]["at"]["end_line"], 4);
    let lenient = ["build", "--check", "--fail-on", "error"];
    assert_eq!(kiln(folder.path(), &lenient).0, 0);
    assert!(!folder.path().join("root").exists(), "it only looks");
}

#[test]
fn a_file_that_cannot_be_read_is_an_error_with_its_line() {
    let folder = project("FROM scratch\nCPY a b\n", "FROM scratch\n");
    let (code, out, _) = kiln(folder.path(), &["build", "--check", "--fail-on", "error"]);
    assert_eq!(code, 3);
    assert!(out.contains("Dockerfile:2: error: syntax: "), "{out}");
}

#[test]
fn what_the_lock_pins_needs_no_digest() {
    let folder = project("FROM debian:12\nADD https://h/x /\n", "FROM scratch\n");
    let rules = || {
        let (_, out, _) = kiln(folder.path(), &["build", "--check", "--json"]);
        let problems: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
        let rule = |p: &serde_json::Value| p["rule"].as_str().unwrap().to_owned();
        problems.iter().map(rule).collect::<Vec<_>>()
    };
    assert_eq!(rules(), ["UnpinnedBase", "UncheckedAdd"]);
    let digest = format!("sha256:{}", "0".repeat(64));
    let mut lock = kiln_build::lock::Lock::default();
    let image: kiln_oci::Reference = "debian:12".parse().unwrap();
    let image = image.with_default_tag().to_string();
    lock.images.insert(image, digest.parse().unwrap());
    let urls = &mut lock.remote.urls;
    urls.insert("https://h/x".into(), digest.parse().unwrap());
    lock.save(&folder.path().join("kiln.lock")).unwrap();
    assert_eq!(rules(), [""; 0]);
}
