//! What is tested before a release: files of tests, the whole stack, and what is told of it.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Kiln, Page, Project, leftovers, wait_until};

/// A service whose end is the verdict, out of the release by its profile.
const STACK: &str = "  check:
    build: .
    profiles: [test]
    command: [/bin/sh, -c, \"sh /www/check\"]
    depends_on: [web]
    volumes: [data:/data]
volumes: {data: }
";

fn page(more: &str) -> Page<'_> {
    Page {
        keys: "    volumes: [data:/data]\n",
        more,
        ..Page::default()
    }
}

/// Entries of the audit log that say how a whole stack did.
fn verdicts(project: &Project<'_>) -> Vec<Value> {
    let entries = project.kiln(&["audit", "--json"]).ok().json();
    let entries = entries.as_array().cloned().unwrap_or_default();
    let of_stack = |entry: &Value| entry["details"]["stack"].is_string();
    entries.into_iter().filter(of_stack).collect()
}

/// Nothing of a throw-away environment is there but what the audit log says.
#[track_caller]
fn nothing_of_tests_is_left(project: &Project<'_>) {
    let root = &project.kiln.root;
    let of_tests = |folder: &str, word: &str| -> Vec<String> {
        let entries = fs::read_dir(root.join(folder))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains(word)).collect()
    };
    assert_eq!(of_tests("volumes", "-test-"), Vec::<String>::new());
    assert_eq!(of_tests("cache/run", "stack-"), Vec::<String>::new());
    let daemon = project.kiln(&["status", "--all", "--json"]).ok().stdout;
    assert!(!daemon.contains("-test-"), "{daemon}");
}

#[test]
fn a_whole_stack_proves_itself_before_anything_that_serves_is_touched() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("stack", &page(STACK));
    // The project's own `x-kiln` is in the fixture: the test is named beside the bases.
    project.edit(
        "compose.yaml",
        "x-kiln:\n",
        "x-kiln:\n  test: {service: check, timeout: 60s}\n",
    );
    // It sees the candidate by its name, a new volume, and nothing outside.
    project.write(
        "www/check",
        "set -e\nwget -qO- http://web:8000/ | grep one\ntest -z \"$(ls /data)\"\n\
         touch /data/x\necho wrote > /written\n! wget -T 2 -qO- http://192.0.2.1/\n",
    );
    let ran = project.up().ok();
    ran.says(&["test check: the whole stack", "test check: passed"]);
    assert_eq!(project.page(), "one");
    let served: Vec<String> = project
        .instances(None)
        .into_iter()
        .map(|i| i.service)
        .collect();
    assert_eq!(served, ["web"], "the test is no part of the release");
    nothing_of_tests_is_left(&project);
    assert_eq!(verdicts(&project).len(), 1);
    let status = project.status();
    assert_eq!(status["stack"]["service"], "check");
    assert_eq!(status["stack"]["verdict"], "passed");
    let releases = project.run("releases", &[]).ok().stdout;
    assert!(releases.contains("all 1, and as a whole"), "{releases}");

    // The same again is not tested again, by whichever command.
    let report = project.folder.join("report.xml");
    let report = report.to_string_lossy().into_owned();
    project.run("test", &["--junit", &report]).ok();
    project.up().ok();
    assert_eq!(verdicts(&project).len(), 1);
    let xml = fs::read_to_string(&report).unwrap();
    assert!(
        xml.contains("<testsuite name=\"check (whole stack)\" tests=\"1\" failures=\"0\""),
        "{xml}"
    );
    assert!(
        xml.contains("<testcase name=\"start\" classname=\"web\""),
        "{xml}"
    );

    // A stack that is no good stays where it is.
    project.write("www/index.html", "two");
    let before = project.instances(None);
    let ran = project.run("up", &["--junit", &report]);
    ran.code(&[5])
        .says(&["whole-stack test `check` failed", "exited with code 1"]);
    assert_eq!(project.page(), "one");
    assert_eq!(project.instances(None), before);
    assert_eq!(project.releases().len(), 1);
    nothing_of_tests_is_left(&project);
    let xml = fs::read_to_string(&report).unwrap();
    assert!(
        xml.contains("<failure message=\"the whole-stack test"),
        "{xml}"
    );

    // Killed in the middle, it is swept by the next.
    project.write("www/check", "echo waiting; sleep 1000");
    let running = project.start("up", &[]);
    wait_until("the test to run", || of_test(&project, "-check-"));
    running.signal(Signal::KILL);
    running.end();
    project.write("www/check", "true");
    let ran = project.up().ok();
    ran.says(&["which an earlier test has left"]);
    assert_eq!(project.page(), "two");
    nothing_of_tests_is_left(&project);
}

/// Is there an instance with this in its name?
fn of_test(project: &Project<'_>, name: &str) -> bool {
    let instances = fs::read_dir(project.kiln.root.join("instances"));
    let mut instances = instances.into_iter().flatten().flatten();
    instances.any(|entry| entry.file_name().to_string_lossy().contains(name))
}

#[test]
fn ctrl_c_in_a_whole_stack_test_takes_the_stack_away_and_touches_nothing_else() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("broken", &page(STACK));
    project.edit(
        "compose.yaml",
        "x-kiln:\n",
        "x-kiln:\n  test: {service: check, timeout: 600s}\n",
    );
    project.write("www/check", "true");
    project.up().ok();
    let (before, verdicts_before) = (project.instances(None), verdicts(&project).len());
    // Of httpd there is one more for each that asks.
    let all_left = || {
        let mut left = leftovers(&kiln.root, true);
        left.retain(|line| !line.contains("httpd"));
        left
    };
    let left_before = all_left();
    project.write("www/check", "echo waiting; sleep 1000");
    for word in ["up", "test"] {
        let running = project.start(word, &[]);
        wait_until("the test to run", || of_test(&project, "-check-"));
        wait_until("the program of the test", || {
            let left = leftovers(&kiln.root, false);
            left.iter().any(|line| line.contains("sleep 1000"))
        });
        running.signal(Signal::INT);
        let ran = running.end().code(&[130]);
        ran.says(&["nothing that serves was touched"]);
        nothing_of_tests_is_left(&project);
        assert!(!of_test(&project, "-check-"));
        assert_eq!(project.instances(None), before);
        assert_eq!(project.page(), "one");
        // Neither processes nor mounts, bridges or groups.
        assert_eq!(all_left(), left_before);
    }
    assert_eq!(project.releases(), [(1, "proven".into())]);
    assert_eq!(verdicts(&project).len(), verdicts_before);
    // Nothing is there that the next would have to sweep, and no verdict was remembered.
    project.write("www/check", "echo not well; exit 3");
    let ran = project.run("up", &[]).code(&[5]);
    assert!(!ran.stderr.contains("an earlier test has left"), "{ran}");
    ran.says(&["not well", "exited with code 3"]);
}

#[test]
fn files_of_tests_decide_and_are_told_case_by_case() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {test: [{structure: tests/image.yaml}, {goss: tests/goss.yaml}]}\n";
    let project = kiln.page(
        "suites",
        &Page {
            keys,
            ..Page::default()
        },
    );
    project.write(
        "tests/image.yaml",
        "schemaVersion: 2.0.0\nfileExistenceTests: [{name: page, path: /www/index.html}]\n\
         commandTests: [{name: lists, command: ls, args: [/www], expectedOutput: [index]}]\n",
    );
    project.write(
        "tests/goss.yaml",
        "http: {'http://localhost:8000/': {status: 200, body: [one]}}\n\
         port: {'tcp6:8000': {listening: true}}\n",
    );
    let report = project.folder.join("report.xml");
    let report = report.to_string_lossy().into_owned();
    project.run("test", &["--junit", &report]).ok();
    let xml = fs::read_to_string(&report).unwrap();
    assert!(xml.contains("tests=\"6\" failures=\"0\""), "{xml}");
    // A changed file is tested again, although the image is the same.
    project.edit("tests/goss.yaml", "[one]", "['!one', '/<two> &/']");
    let ran = project.run("up", &["--junit", &report]);
    ran.code(&[5])
        .says(&["tests/goss.yaml: http http://localhost:8000/: body", "!one"]);
    let xml = fs::read_to_string(&report).unwrap();
    assert!(xml.contains("tests=\"6\" failures=\"1\""), "{xml}");
    assert!(xml.contains("&lt;two&gt; &amp;"), "{xml}");
    project.edit(
        "tests/goss.yaml",
        "port:",
        "service: {web: {running: true}}\nport:",
    );
    let ran = project.run("up", &[]);
    ran.code(&[3])
        .says(&["goss.yaml:2:1", "kiln does not support `service`"]);
}
