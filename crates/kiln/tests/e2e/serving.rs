//! What a user does on a good day.

use std::fs;

use kiln_testkit::load::Mode;

use crate::common::{Kiln, Page, Project};
use crate::load::under_load;

#[test]
fn first_up_builds_and_serves() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("first", &Page::default());
    let ran = project.up().ok();
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(
        said.contains(&format!(":{}", project.port)),
        "the address is not told: {said}"
    );
    assert_eq!(project.page(), "one");
    let instances = project.settled(None);
    assert_eq!(instances.len(), 1, "{instances:?}");
    assert!(
        instances[0].serving && instances[0].release == 1,
        "{instances:?}"
    );
    assert_eq!(project.releases(), [(1, "proven".to_owned())]);
    assert!(
        project.folder.join("kiln.lock").exists(),
        "no lock was written"
    );
}

#[test]
fn up_without_a_change_does_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("same", &Page::default());
    project.up().ok();
    let before = project.settled(None);
    let audited = project
        .kiln(&["audit", "--json"])
        .ok()
        .json()
        .as_array()
        .unwrap()
        .len();
    project.up().ok();
    // Touched, but with the same content.
    project.write("www/index.html", "one");
    project.up().ok();
    assert_eq!(project.settled(None), before);
    assert_eq!(project.releases().len(), 1);
    let now = project
        .kiln(&["audit", "--json"])
        .ok()
        .json()
        .as_array()
        .unwrap()
        .len();
    assert_eq!(
        now, audited,
        "something was recorded although nothing was done"
    );
}

#[test]
fn a_dry_run_and_a_plan_change_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("dry", &Page::default());
    project.up().ok();
    let before = project.settled(None);
    project.write("www/index.html", "two");
    let planned = project.run("plan", &[]).ok();
    assert!(planned.stdout.contains("web"), "{planned}");
    project.run("up", &["--dry-run"]).ok();
    assert_eq!(project.page(), "one");
    assert_eq!(project.settled(None), before);
    assert_eq!(project.releases().len(), 1);
}

const CONFIGURED: Page = Page {
    text: "unused",
    before: "mkdir -p /tmp/www; cp /etc/motd.html /tmp/www/index.html; cd /tmp/www\n\
             exec httpd -f -p 8000 -h /tmp/www",
    keys: "    configs: [{source: motd, target: /etc/motd.html}]",
    more: "configs:\n  motd: {content: \"first words\"}",
};

#[test]
fn a_configs_content_alone_makes_a_release() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("config", &CONFIGURED);
    project.up().ok();
    assert_eq!(project.page(), "first words");
    let before = project.settled(None);
    project.edit("compose.yaml", "first words", "other words");
    project.up().ok();
    assert_eq!(project.page(), "other words");
    assert_eq!(project.releases().len(), 2);
    let after = project.settled(None);
    assert_eq!(after.len(), 1, "{after:?}");
    assert_ne!(after[0].id, before[0].id);
    let diff = project.kiln(&["diff", "1", "2", "-e", "@"]).ok();
    assert!(diff.stdout.contains("motd"), "{diff}");
}

#[test]
fn environment_and_secret_make_releases_and_are_never_shown() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        before: "mkdir -p /tmp/www; echo \"$WORD-$(cat /run/secrets/key)\" > /tmp/www/index.html\n\
                 exec httpd -f -p 8000 -h /tmp/www",
        keys: "    environment: {WORD: apricot}\n    env_file: more.env\n    secrets: [key]",
        more: "secrets:\n  key: {file: key.txt}",
        ..Page::default()
    };
    let files = page.files();
    let mut files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (*p, t.as_str())).collect();
    files.extend([("more.env", "OTHER=1\n"), ("key.txt", "hazelnut")]);
    let project = kiln.project("secret", &files);
    project.up().ok();
    assert_eq!(project.page(), "apricot-hazelnut");
    project.write("key.txt", "chestnut");
    project.up().ok();
    assert_eq!(project.page(), "apricot-chestnut");
    project.write("more.env", "OTHER=2\n");
    project.up().ok();
    assert_eq!(project.releases().len(), 3);
    project.edit("compose.yaml", "apricot", "cherry");
    project.up().ok();
    assert_eq!(project.page(), "cherry-chestnut");
    for (a, b) in [("1", "2"), ("2", "3"), ("3", "4")] {
        let diff = project.kiln(&["diff", a, b, "-e", "@"]).ok();
        assert!(diff.stdout.contains("web"), "no difference told: {diff}");
        for word in ["hazelnut", "chestnut", "apricot", "cherry"] {
            assert!(!diff.stdout.contains(word), "{word} is shown: {diff}");
        }
    }
    // The content of a secret is nowhere that others may read.
    for file in ["audit/log", "state.db", "state.db-wal"] {
        let bytes = fs::read(kiln.root.join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            !text.contains("hazelnut") && !text.contains("chestnut"),
            "{file}"
        );
    }
    // And it comes back with its release.
    project.kiln(&["rollback", "1", "-e", "@"]).ok();
    assert_eq!(project.page(), "apricot-hazelnut");
}

#[test]
fn rollback_needs_neither_project_nor_network_nor_cache() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("back", &CONFIGURED);
    project.up().ok();
    project.edit("compose.yaml", "first words", "other words");
    project.up().ok();
    project.edit("compose.yaml", "other words", "last words");
    project.up().ok();
    fs::rename(&project.folder, kiln.folder().join("away")).unwrap();
    fs::remove_file(kiln.root.join("cache/debian")).unwrap();
    fs::remove_dir_all(kiln.root.join("cache")).unwrap();
    let back = |words: &[&str]| {
        let mut command = kiln.command(&[&["rollback"], words, &["-e", "back"]].concat());
        for key in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            command.env(key, "http://127.0.0.1:1");
        }
        crate::common::Running::start(command).end()
    };
    back(&[]).ok();
    assert_eq!(project.page(), "other words");
    back(&["1"]).ok();
    assert_eq!(project.page(), "first words");
    // History is only added to.
    let releases = project.kiln(&["releases", "--json", "-e", "@"]).ok().json();
    let numbers: Vec<u64> = releases
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|r| r["number"].as_u64())
        .collect();
    assert_eq!(numbers.len(), 5, "{releases}");
    assert!(
        numbers.is_sorted() || numbers.iter().rev().is_sorted(),
        "{numbers:?}"
    );
    // What is not there can't be gone back to, and nothing changes.
    back(&["77"]).code(&[7]).says(&["77"]);
    assert_eq!(project.page(), "first words");
}

/// The program takes a lock on its volume and writes down when someone else has it.
const WRITER: &str = "mkdir /data/lock || echo overlap >> /data/overlaps
echo start >> /data/starts
trap 'kill $!; wait $!; echo stop >> /data/starts; rmdir /data/lock; exit 0' TERM
httpd -f -p 8000 -h /www & wait $!; exit 3";

#[test]
fn a_single_writer_is_handed_over_without_overlap_or_failed_request() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        before: WRITER,
        keys: "    volumes: [\"data:/data\"]",
        more: "volumes: {data: {}}",
        ..Page::default()
    };
    let project = kiln.page("writer", &page);
    project.up().ok();
    let (report, ()) = under_load(project.port, Mode::NewConnection, 100, || {
        for text in ["two", "three", "four"] {
            project.write("www/index.html", text);
            project.up().ok();
            assert_eq!(project.page(), text);
        }
    });
    assert_eq!(report.failed(), 0, "{report}");
    let data = volume(&project, "writer_data");
    let starts = fs::read_to_string(data.join("starts")).unwrap();
    assert_eq!(starts, "start\nstop\nstart\nstop\nstart\nstop\nstart\n");
    let overlaps = fs::read_to_string(data.join("overlaps")).unwrap_or_default();
    assert_eq!(overlaps, "", "two copies had the volume at once");
}

#[test]
fn volumes_outlive_down_and_up() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        before: "echo once >> /data/count",
        keys: "    volumes: [\"data:/data\"]",
        more: "volumes: {data: {}}",
        ..Page::default()
    };
    let project = kiln.page("keep", &page);
    project.up().ok();
    project.run("down", &[]).ok();
    project.up().ok();
    let count = fs::read_to_string(volume(&project, "keep_data").join("count")).unwrap();
    assert_eq!(
        count, "once\nonce\n",
        "the isolated test must not write to the volume either"
    );
}

fn volume(project: &Project, name: &str) -> std::path::PathBuf {
    project.kiln.root.join("volumes").join(name).join("data")
}

#[test]
fn services_that_did_not_change_are_not_touched() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        more: "  other:\n    build: .\n    environment: {A: \"1\"}\n",
        ..Page::default()
    };
    let project = kiln.page("partly", &page);
    project.up().ok();
    let web = project.settled(Some("web"));
    let other = project.settled(Some("other"));
    project.edit("compose.yaml", "A: \"1\"", "A: \"2\"");
    project.up().ok();
    assert_eq!(project.settled(Some("web")), web);
    assert_ne!(project.settled(Some("other"))[0].id, other[0].id);
}

#[test]
fn jobs_run_to_their_end_before_those_who_wait() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        before: "test \"$HOSTNAME\" = kiln-test || test \"$(hostname)\" = kiln-test || \
                 grep -q migrated /data/state || { echo 'not migrated' ; exit 5; }",
        keys: "    volumes: [\"data:/data:ro\"]\n    depends_on: {migrate: {condition: \
               service_completed_successfully}}",
        more: "  migrate:\n    build: .\n    command: [/bin/sh, -c, \"sleep 1; echo migrated >> \
               /data/state\"]\n    volumes: [\"data:/data\"]\nvolumes: {data: {}}",
        ..Page::default()
    };
    let project = kiln.page("jobs", &page);
    project.up().ok();
    assert_eq!(project.page(), "one");
    let state = fs::read_to_string(volume(&project, "jobs_data").join("state")).unwrap();
    assert_eq!(state, "migrated\n", "a job runs once for a release");
    let status = project.status();
    let services = status["services"].as_array().unwrap();
    let job = services.iter().find(|s| s["service"] == "migrate").unwrap();
    assert_eq!(job["state"], "completed", "{status}");
}
