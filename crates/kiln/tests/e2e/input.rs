//! Bad input: a clear error that names the place, and nothing begun.

use std::process::Command;

use crate::common::{BUSYBOX, Kiln, Page, Running, leftovers};

const GOOD_IMAGE: &str = "FROM busybox\nCMD [\"/bin/busybox\", \"sleep\", \"1000\"]\n";

struct Bad {
    what: &'static str,
    compose: &'static str,
    containerfile: &'static str,
    codes: &'static [i32],
    /// Each must be in what is said.
    says: &'static [&'static str],
}

const INPUT: &[i32] = &[3];
const BUILD: &[i32] = &[3, 4];

const BAD: &[Bad] = &[
    Bad {
        what: "invalid YAML",
        compose: "services:\n  web: {build: .\n  other: [\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["compose.yaml"],
    },
    Bad {
        what: "unknown key",
        compose: "services:\n  web:\n    build: .\n    replica: 3\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["replica", "compose.yaml", "4:5"],
    },
    Bad {
        what: "unknown key of x-kiln",
        compose: "services:\n  web:\n    build: .\n    x-kiln:\n      redy: {tcp: 1}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["redy", "compose.yaml", "5:7", "ready"],
    },
    Bad {
        what: "missing env_file",
        compose: "services:\n  web:\n    build: .\n    env_file: nowhere.env\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["nowhere.env"],
    },
    Bad {
        what: "missing config file",
        compose: "services:\n  web:\n    build: .\n    configs: [c]\nconfigs:\n  c: {file: nowhere.conf}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["nowhere.conf"],
    },
    Bad {
        what: "missing secret file",
        compose: "services:\n  web:\n    build: .\n    secrets: [s]\nsecrets:\n  s: {file: nowhere.key}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["nowhere.key"],
    },
    Bad {
        what: "undefined variable",
        compose: "services:\n  web:\n    build: .\n    hostname: ${KLN_NOT_SET:?say who}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["KLN_NOT_SET", "say who", "compose.yaml", "4:"],
    },
    Bad {
        what: "cyclic depends_on",
        compose: "services:\n  a: {build: ., depends_on: [b]}\n  b: {build: ., depends_on: [c]}\n  c: {build: ., depends_on: [a]}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["depends_on", "a", "b", "c", "compose.yaml"],
    },
    Bad {
        what: "depends_on nobody",
        compose: "services:\n  a: {build: ., depends_on: [nobody]}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["nobody", "compose.yaml", "2:"],
    },
    Bad {
        what: "undeclared volume",
        compose: "services:\n  a: {build: ., volumes: [\"data:/data\"]}\n",
        containerfile: GOOD_IMAGE,
        codes: INPUT,
        says: &["data", "compose.yaml", "2:"],
    },
    Bad {
        what: "unknown instruction",
        compose: "services:\n  web: {build: .}\n",
        containerfile: "FROM busybox\nRUNN echo\n",
        codes: BUILD,
        says: &["RUNN", "Containerfile", "line 2"],
    },
    Bad {
        what: "unknown stage",
        compose: "services:\n  web: {build: .}\n",
        containerfile: "FROM busybox\nCOPY --from=7 /a /b\n",
        codes: BUILD,
        says: &["Containerfile", "line 2"],
    },
    Bad {
        what: "copying what is not there",
        compose: "services:\n  web: {build: .}\n",
        containerfile: "FROM busybox\nCOPY nowhere /there\n",
        codes: BUILD,
        says: &["nowhere", "Containerfile", "line 2"],
    },
    Bad {
        what: "failing RUN",
        compose: "services:\n  web: {build: .}\n",
        containerfile: "FROM busybox\nENV A=1\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo last words; exit 9\"]\n",
        codes: &[4],
        says: &["last words", "Containerfile", "line 3", "9"],
    },
    Bad {
        what: "a RUN whose program is not there",
        compose: "services:\n  web: {build: .}\n",
        containerfile: "FROM busybox\nRUN [\"/bin/nothing\"]\n",
        codes: &[4],
        says: &["/bin/nothing", "Containerfile", "line 2"],
    },
    Bad {
        what: "no Containerfile",
        compose: "services:\n  web: {build: {context: ., dockerfile: Nowhere}}\n",
        containerfile: GOOD_IMAGE,
        codes: BUILD,
        says: &["Nowhere"],
    },
    Bad {
        what: "a registry that can't be reached",
        compose: "services:\n  web: {image: \"localhost:1/none:1\"}\n",
        containerfile: GOOD_IMAGE,
        codes: &[4],
        says: &["localhost:1"],
    },
    Bad {
        what: "a program that is not in the image",
        compose: "services:\n  web: {build: ., command: [/bin/nothing]}\n",
        containerfile: GOOD_IMAGE,
        codes: &[5],
        says: &["/bin/nothing", "web"],
    },
];

/// All of them in a project that already serves, which goes on as if nothing had been.
#[test]
fn bad_input_names_the_place_and_touches_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let good = kiln.page("good", &Page::default());
    good.up().ok();
    let before = good.instances(None);
    let mut wrong = vec![];
    for (number, bad) in BAD.iter().enumerate() {
        let compose = format!("{}{BUSYBOX}", bad.compose);
        let name = format!("bad{number}");
        let files = [
            ("compose.yaml", compose.as_str()),
            ("Containerfile", bad.containerfile),
        ];
        let project = kiln.project(&name, &files);
        let _ = std::fs::copy(
            good.folder.join("kiln.lock"),
            project.folder.join("kiln.lock"),
        );
        let ran = project.run("up", &[]);
        let missing: Vec<&&str> = bad
            .says
            .iter()
            .filter(|s| !ran.stderr.contains(**s))
            .collect();
        let code_fits = ran.code.is_some_and(|c| bad.codes.contains(&c));
        if !missing.is_empty() || !code_fits {
            wrong.push(format!(
                "== {}: expected {:?}, missing {missing:?}\n{ran}",
                bad.what, bad.codes
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        BAD.len(),
        wrong.join("\n")
    );
    assert_eq!(good.instances(None), before);
    assert_eq!(good.page(), "one");
    let strange: Vec<String> = leftovers(&kiln.root, false)
        .into_iter()
        .filter(|l| l.contains("/bad") || l.contains("test-") || l.contains("sleep 1000"))
        .collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn without_a_project_it_says_where_it_looked() {
    let Some(kiln) = Kiln::new() else { return };
    let folder = kiln.folder().join("empty");
    std::fs::create_dir(&folder).unwrap();
    kiln.run(&["up", folder.to_str().unwrap()])
        .code(&[3])
        .says(&["empty", "compose.yaml"]);
    kiln.run(&["up", "/var/tmp/kiln/is/not/here"])
        .code(&[3])
        .says(&["/var/tmp/kiln/is/not/here"]);
}

#[test]
fn who_is_not_root_is_told_so() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("nobody", &Page::default());
    // The binary where nobody can reach it, too.
    let binary = kiln.folder().join("kiln");
    std::fs::copy(env!("CARGO_BIN_EXE_kiln"), &binary).unwrap();
    let open = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    open(kiln.folder());
    open(&binary);
    let mut command = Command::new(&binary);
    {
        use std::os::unix::process::CommandExt;
        command.uid(65534).gid(65534);
    }
    command
        .arg("--root")
        .arg(kiln.folder().join("other"))
        .arg("up")
        .arg(&project.folder);
    command.env("PORT", "1").current_dir("/");
    Running::start(command)
        .end()
        .code(&[6])
        .says(&["root", "sudo"]);
    // What needs no root works without.
    let mut command = Command::new(&binary);
    {
        use std::os::unix::process::CommandExt;
        command.uid(65534).gid(65534);
    }
    command
        .arg("config")
        .arg(&project.folder)
        .env("PORT", "1")
        .current_dir("/");
    let ran = Running::start(command).end().ok();
    assert!(ran.stdout.contains("web"), "{ran}");
}

#[test]
fn words_it_does_not_know_are_2() {
    let Some(kiln) = Kiln::new() else { return };
    kiln.run(&["upp"]).code(&[2]).says(&["upp"]);
    kiln.run(&["up", "--nothing"])
        .code(&[2])
        .says(&["--nothing"]);
}

#[test]
fn an_environment_that_is_not_there_is_named() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("there", &Page::default());
    project.up().ok();
    kiln.run(&["status", "-e", "elsewhere"])
        .code(&[7])
        .says(&["elsewhere"]);
    kiln.run(&["rollback", "-e", "elsewhere"])
        .code(&[7])
        .says(&["elsewhere"]);
    kiln.run(&["exec", "-e", "there", "nobody", "true"])
        .code(&[7])
        .says(&["nobody"]);
}
