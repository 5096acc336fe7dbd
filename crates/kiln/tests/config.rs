//! `kiln config`, the program itself: what it prints is what `docker compose config` of the
//! same version as the corpus prints, but for order, which is always the same here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const FILE: &str = r#"
name: t
services:
  web:
    build: .
    image: me/web:${TAG:-1}
    ports: ["${PORT}:80"]
    environment: {A: "${A?x}", B: "$$x"}
    volumes: [data:/d, ./src:/src]
    depends_on: [db]
    post_start: [{command: "true"}]
  db:
    image: registry.example/db
    networks: [back]
  job: {build: {context: ./job}}
  off: {image: x, profiles: [p, q]}
networks: {back: }
volumes: {data: , unused: }
"#;

struct Project(tempfile::TempDir);

impl Project {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("compose.yaml"), text).unwrap();
        Self(folder)
    }

    /// Exit code, standard output, standard error.
    fn config(&self, words: &[&str]) -> (i32, String, String) {
        let output = self.command(&[&["config", "."], words].concat()).output();
        let output = output.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let code = output.status.code().unwrap();
        (code, text(output.stdout), text(output.stderr))
    }

    /// The program with these words, in the project's folder.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(words).current_dir(self.0.path()).env_clear();
        command.envs([("A", "1"), ("PORT", "8080"), ("HOME", "/nonexistent")]);
        command.env("KILN_ROOT", self.0.path().join("root"));
        command
    }

    fn says(&self, words: &[&str]) -> String {
        let (code, out, err) = self.config(words);
        assert_eq!(code, 0, "{words:?}: {err}");
        out
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

#[test]
fn selectors_print_one_thing_each() {
    let project = Project::new(FILE);
    for (words, expected) in [
        (["--services"].as_slice(), "db\njob\nweb\n"),
        (&["--services", "--profile", "p"], "db\njob\noff\nweb\n"),
        (&["--images"], "registry.example/db\nt-job\nme/web:1\n"),
        (&["--images", "job"], "t-job\n"),
        (&["--volumes"], "data\n"),
        (&["--networks"], "back\ndefault\n"),
        (&["--profiles"], "p\nq\n"),
        (&["--models"], ""),
        (&["--quiet"], ""),
        (
            &["--variables"],
            "NAME                REQUIRED            DEFAULT VALUE       ALTERNATE VALUE\n\
             A                   true                                    \n\
             PORT                false                                   \n\
             TAG                 false               1                   ",
        ),
    ] {
        let said = project.says(words);
        assert_eq!(said.trim_end(), expected.trim_end(), "{words:?}");
    }
    let environment = project.says(&["--environment"]);
    assert!(environment.contains("COMPOSE_PROJECT_NAME=t\n"));
    let json: serde_json::Value =
        serde_json::from_str(&project.says(&["--variables", "--format", "json"])).unwrap();
    assert_eq!(json["TAG"]["DefaultValue"], "1");
    let (code, _, err) = project.config(&["--services", "--images"]);
    assert_eq!(code, 2, "{err}");
}

#[test]
fn a_hash_changes_when_the_service_does_and_only_then() {
    let hash = |text: &str, service: &str| {
        let said = Project::new(text).says(&["--hash", service]);
        said.trim_end().to_owned()
    };
    // Not the folder, which is another each time.
    let plain = FILE.replace("    build: .\n", "").replace("./src", "/src");
    let before = hash(&plain, "web");
    assert!(before.starts_with("web ") && before.len() == "web ".len() + 64);
    let otherwise = plain.replace("image: me/web:${TAG:-1}", "image: \"me/web:1\" # same");
    assert_eq!(before, hash(&otherwise, "web"));
    let other_service = plain.replace("registry.example/db", "registry.example/db:2");
    assert_eq!(before, hash(&other_service, "web"));
    for changed in [
        plain.replace("TAG:-1", "TAG:-2"),
        plain.replace("B: \"$$x\"", "B: \"$$y\""),
        plain.replace("depends_on: [db]", "depends_on: [job]"),
        plain.replace(
            "image: me/web",
            "x-kiln: {exclusive: true}\n    image: me/web",
        ),
    ] {
        assert_ne!(changed, plain);
        assert_ne!(before, hash(&changed, "web"), "{changed}");
    }
    let project = Project::new(&plain);
    assert_eq!(project.says(&["--hash", "*"]).lines().count(), 3);
    let (code, _, err) = project.config(&["--hash", "nobody"]);
    assert_eq!(code, 3);
    assert!(err.contains("nobody"), "{err}");
}

#[test]
fn steps_may_be_left_out() {
    let project = Project::new(FILE);
    let raw = project.says(&["--no-interpolate"]);
    for kept in [
        "me/web:${TAG:-1}",
        "\"${PORT}:80\"",
        "$$x",
        "\"off\":",
        "unused:",
    ] {
        assert!(raw.contains(kept), "{kept}: {raw}");
    }
    let plain = project.says(&["--no-normalize"]);
    assert!(
        !plain.contains("t_default") && !plain.contains("Dockerfile"),
        "{plain}"
    );
    let paths = project.says(&["--no-path-resolution"]);
    assert!(paths.contains("source: \"./src\""), "{paths}");
    let broken = Project::new("services: {a: {image: x, networks: [nowhere]}}");
    assert_eq!(broken.config(&["-q"]).0, 3);
    assert!(broken.says(&["--no-consistency"]).contains("nowhere"));
}

#[test]
fn what_kiln_refuses_to_run_is_printed_all_the_same() {
    let project = Project::new(FILE);
    assert!(project.says(&[]).contains("post_start:"));
    let only = project.says(&["db"]);
    assert!(
        only.contains("registry.example/db") && !only.contains("me/web"),
        "{only}"
    );
    project.says(&["-o", "out.yaml"]);
    let written = std::fs::read_to_string(project.path().join("out.yaml")).unwrap();
    assert_eq!(written, project.says(&[]));
}

#[test]
fn digests_come_from_the_lock() {
    let project = Project::new("services: {db: {image: registry.example/db}}");
    let (code, _, err) = project.config(&["--lock-image-digests"]);
    assert_eq!(code, 3);
    assert!(err.contains("kiln lock"), "{err}");
    let digest = format!("sha256:{}", "a".repeat(64));
    let lock = serde_json::json!({
        "format": 1, "bases": {}, "images": {"registry.example/db:latest": digest}
    });
    std::fs::write(project.path().join("kiln.lock"), lock.to_string()).unwrap();
    let pinned = format!("registry.example/db:latest@{digest}");
    let said = project.says(&["--lock-image-digests"]);
    assert_eq!(said, format!("services:\n  db:\n    image: {pinned}\n"));
    assert!(project.says(&["--resolve-image-digests"]).contains(&pinned));
}

#[test]
fn options_may_stand_before_the_command_as_with_docker_compose() {
    let project = Project::new(FILE);
    let file = "services: {other: {image: 'x:1'}}";
    std::fs::write(project.path().join("other.yaml"), file).unwrap();
    let said = |words: &[&str]| {
        let output = project.command(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let before = said(&["-f", "other.yaml", "-p", "named", "config"]);
    assert!(
        before.contains("name: named") && before.contains("other:"),
        "{before}"
    );
    assert_eq!(said(&["config", "-f", "other.yaml", "-p", "named"]), before);
    let folder = said(&["--project-directory=/srv/app", "config"]);
    assert!(folder.contains("context: /srv/app/job"), "{folder}");
}

#[test]
fn standard_input_is_a_file_like_others() {
    let project = Project::new(FILE);
    let mut child = project
        .command(&["config", "-f", "-", "-f", "compose.yaml", "--services"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"services: {piped: {image: x}}").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "db\njob\npiped\nweb\n"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let project = Project::new(FILE);
    let mut child = project
        .command(&["config"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(141));
}

#[test]
fn a_service_in_the_place_of_the_folder_is_told_where_it_belongs() {
    let project = Project::new(FILE);
    let output = project.command(&["config", "web"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("kiln config . web"), "{told}");
}
