//! `kiln check` and `kiln init`, the program itself: exit codes, formats, and what becomes
//! of files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self(folder)
    }

    /// Exit code, standard output, standard error.
    fn kiln(&self, words: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(words)
            .current_dir(self.0.path())
            .env_clear()
            .env("KILN_ROOT", self.0.path().join("root"))
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let code = output.status.code().unwrap();
        (code, text(output.stdout), text(output.stderr))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

const BAD: &str = r#"version: "3.8"
services:
  web:
    image: registry.example/web
    privileged: true
    volumes:
      - ./src:/app
    credential_spec: {file: cred.json}
"#;
const GOOD: &str = "services: {web: {image: \"registry.example/web:1\"}}\n";

#[test]
fn the_exit_code_follows_the_worst_finding() {
    let good = Folder::new(&[("compose.yaml", GOOD)]);
    assert_eq!(good.kiln(&["check"]).0, 0);
    let bind = GOOD.replace(":1\"", ":1\", volumes: [\"./x:/x:ro\"]");
    let noted = Folder::new(&[("compose.yaml", &bind)]);
    assert_eq!(noted.kiln(&["check"]).0, 0);
    assert_eq!(noted.kiln(&["check", "--fail-on", "note"]).0, 3);
    let strict = ["check", "--fail-on", "note", "--skip", "bind-mount"];
    assert_eq!(noted.kiln(&strict).0, 0);
    let (code, _, err) = noted.kiln(&["check", "--skip", "bind-mout"]);
    assert_eq!(code, 3);
    assert!(err.contains("bind-mount"), "{err}");
    let warned = Folder::new(&[("compose.yaml", &GOOD.replace(":1", ":latest"))]);
    assert_eq!(warned.kiln(&["check"]).0, 3);
    assert_eq!(warned.kiln(&["check", "--fail-on", "error"]).0, 0);
    let broken = Folder::new(&[("compose.yaml", "services: [")]);
    assert_eq!(broken.kiln(&["check", "--fail-on", "error"]).0, 3);
}

#[test]
fn every_format_says_the_same() {
    let folder = Folder::new(&[("compose.yaml", BAD)]);
    let rules = ["unpinned-image", "privileged", "code-bind"];
    let (code, text, err) = folder.kiln(&["check"]);
    assert_eq!(code, 3);
    // What kiln refuses to run counts as well, and hides nothing.
    assert!(err.contains("1 errors, 3 warnings, 1 notes"), "{err}");
    let (_, github, _) = folder.kiln(&["check", "--format", "github"]);
    assert!(
        github.contains("::error file=compose.yaml,line=8,endLine=8,col=5,"),
        "{github}"
    );
    let (_, sarif, _) = folder.kiln(&["check", "--format", "sarif"]);
    let sarif: serde_json::Value = serde_json::from_str(&sarif).unwrap();
    assert_eq!(sarif["version"], "2.1.0");
    let results = sarif["runs"][0]["results"].as_array().unwrap();
    assert_eq!(results.len(), 5);
    for rule in rules {
        assert!(text.contains(&format!("rule: {rule}")), "{text}");
        assert!(github.contains(&format!("title={rule}::")), "{github}");
        assert!(results.iter().any(|r| r["ruleId"] == rule));
    }
    let privileged = results
        .iter()
        .find(|r| r["ruleId"] == "privileged")
        .unwrap();
    let place = &privileged["locations"][0]["physicalLocation"];
    assert_eq!(place["artifactLocation"]["uri"], "compose.yaml");
    assert_eq!(
        place["region"],
        serde_json::json!({"startLine": 5, "startColumn": 17, "endLine": 5, "endColumn": 21})
    );
}

#[test]
fn init_offers_changes_and_makes_them_only_when_told() {
    let digest = format!("sha256:{}", "b".repeat(64));
    let lock = serde_json::json!({
        "format": 1, "bases": {}, "images": {"registry.example/web:latest": digest}
    });
    let folder = Folder::new(&[("compose.yaml", BAD), ("kiln.lock", &lock.to_string())]);
    let (code, diff, err) = folder.kiln(&["init"]);
    assert_eq!(
        (code, folder.read("compose.yaml").as_str()),
        (0, BAD),
        "{err}"
    );
    for line in [
        "--- a/compose.yaml",
        "-version: \"3.8\"",
        "+    privileged: false",
        "+      - ./src:/app:ro",
    ] {
        assert!(diff.lines().any(|l| l == line), "{line}: {diff}");
    }
    assert!(err.contains("rule: code-bind"), "{err}");
    assert_eq!(folder.kiln(&["init", "--write"]).0, 0);
    let after = folder.read("compose.yaml");
    let pinned = format!("    image: registry.example/web@{digest}\n");
    let expected = BAD
        .replace("version: \"3.8\"\n", "")
        .replace("    image: registry.example/web\n", &pinned)
        .replace("true\n    volumes", "false\n    volumes")
        .replace("/app", "/app:ro");
    assert_eq!(after, expected);
    let (code, again, err) = folder.kiln(&["init", "--write"]);
    assert_eq!((code, again.as_str()), (0, ""), "{err}");
}

#[test]
fn init_writes_what_is_missing_and_overwrites_nothing() {
    let folder = Folder::new(&[
        ("package.json", "{\"main\": \"a.js\"}"),
        (".dockerignore", "mine"),
    ]);
    let (code, out, err) = folder.kiln(&["init"]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("compose.yaml") && out.contains("Containerfile"),
        "{out}"
    );
    assert_eq!(folder.read(".dockerignore"), "mine");
    let (code, _, err) = folder.kiln(&["check", "--fail-on", "note"]);
    assert_eq!(code, 0, "{err}");
    // Now there is a compose file: nothing is generated any more.
    let before = folder.read("compose.yaml");
    assert_eq!(folder.kiln(&["init"]).0, 0);
    assert_eq!(folder.read("compose.yaml"), before);

    let dangling = Folder::new(&[("index.html", "")]);
    std::os::unix::fs::symlink("/nonexistent/x", dangling.path("compose.yaml")).unwrap();
    let (_, _, err) = dangling.kiln(&["init"]);
    assert!(err.contains("stays as it is"), "{err}");

    let empty = Folder::new(&[]);
    let (code, _, err) = empty.kiln(&["init"]);
    assert_eq!(code, 3);
    assert!(err.contains("package.json"), "{err}");
}
