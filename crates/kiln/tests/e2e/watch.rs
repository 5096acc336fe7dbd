//! `kiln watch`: real files change, and what serves is another release each time.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Kiln, Page, Project, Running, free_port, get, wait_until};
use crate::honour::nothing_is_left;

const RULES: &str = "    develop:
      watch:
        - {path: www, action: sync, target: /www, ignore: [\"*.tmp\"]}
        - path: conf
          action: sync+exec
          target: /conf
          exec: {command: [/bin/sh, -c, \"tr a-z A-Z < /conf/word > /tmp/said\"]}
        - {path: conf/again, action: restart}
        - {path: run, action: rebuild}
        - {path: Containerfile, action: rebuild}
";

/// A project that is being watched, in an environment of its own.
struct Watched<'p, 'k> {
    project: &'p Project<'k>,
    environment: String,
    running: Option<Running>,
}

impl<'p, 'k> Watched<'p, 'k> {
    fn start(project: &'p Project<'k>) -> Self {
        Self {
            environment: format!("{}-watch", project.name),
            running: Some(project.start("watch", &[])),
            project,
        }
    }

    fn status(&self) -> Value {
        let words = ["status", "--json", "-e", &self.environment];
        self.project.kiln(&words).ok().json()
    }

    /// The number of the proven release, and the instances of `web` that are ready.
    fn serving(&self) -> (u64, Vec<String>) {
        let status = self.status();
        let instances = status["services"][0]["instances"].as_array();
        let ready = instances
            .into_iter()
            .flatten()
            .filter(|i| i["phase"] == "ready");
        let ids = ready.filter_map(|i| i["id"].as_str().map(str::to_owned));
        (status["proven"].as_u64().unwrap_or(0), ids.collect())
    }

    fn inside(&self, line: &str) -> String {
        let words = [
            "exec",
            "-T",
            "-e",
            &self.environment,
            "web",
            "/bin/sh",
            "-c",
            line,
        ];
        self.project.kiln(&words).stdout
    }

    /// How often a build of `web` came to its end.
    fn builds(&self) -> usize {
        let said = self.said();
        let ended = said.lines().filter(|line| {
            line.starts_with("build web: done") || line.starts_with("build web: unchanged")
        });
        ended.count()
    }

    fn wait_for_word(&self, word: &str) {
        wait_until(word, || self.said().contains(word));
    }

    fn said(&self) -> String {
        self.running.as_ref().map(Running::said).unwrap_or_default()
    }

    /// As Ctrl-C in a terminal does.
    fn end(mut self) {
        let running = self.running.take().unwrap();
        running.signal(Signal::INT);
        running.end().ok();
    }
}

impl Drop for Watched<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("`kiln watch` said:\n{}", self.said());
        }
    }
}

#[test]
fn each_change_is_a_release_and_a_failure_ends_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: RULES,
        ..Page::default()
    };
    let project = kiln.page("dev", &page);
    project.write("conf/word", "first");
    // What comes from Debian is there then, however long it takes.
    project.run("build", &[]).ok();
    let watched = Watched::start(&project);
    project.wait_for_page("one");
    wait_until("release 1", || watched.serving().0 == 1);
    let (_, first) = watched.serving();

    // sync: other files, another instance, no build; nobody ran anything in it.
    let built = watched.builds();
    assert_eq!(built, 1);
    project.write("www/left-out.tmp", "no");
    project.write("www/more/page.html", "more");
    project.write("www/index.html", "two");
    project.wait_for_page("two");
    wait_until("release 2", || watched.serving().0 == 2);
    assert_eq!(project.get("/more/page.html").body, "more");
    assert_eq!(project.get("/left-out.tmp").status, 404);
    let (_, second) = watched.serving();
    assert_eq!((first.len(), second.len()), (1, 1));
    assert_ne!(first, second);
    assert_eq!(
        watched.status()["services"][0]["instances"][0]["tainted"],
        false
    );

    // What goes out here goes in there; what is synced already stays.
    fs::remove_dir_all(project.folder.join("www/more")).unwrap();
    wait_until("a page that is gone", || {
        get(project.port, "/more/page.html").is_ok_and(|a| a.status == 404)
    });
    assert_eq!(project.page(), "two");

    // sync+exec: in each new instance, after its start.
    project.write("conf/word", "spoken");
    wait_until("what was executed", || {
        watched.inside("cat /tmp/said") == "SPOKEN"
    });
    // restart: other instances of the same image, in which the command runs again.
    let (release, before) = watched.serving();
    project.write("conf/again", "1");
    wait_until("other instances", || {
        let (now, instances) = watched.serving();
        now > release && instances.len() == 1 && instances != before
    });
    assert_eq!(watched.inside("cat /tmp/said"), "SPOKEN");
    assert_eq!(project.page(), "two");

    assert_eq!(watched.builds(), built, "none of these needs a build");
    failures(&project, &watched);
    let last = watched.serving().0;
    let releases = project.kiln(&["releases", "--json", "-e", "dev-watch"]);
    let count = releases.ok().json().as_array().map(Vec::len);
    assert_eq!(
        count,
        usize::try_from(last).ok(),
        "one for each that was proven"
    );
    watched.end();
    nothing_is_left(&kiln);
}

/// A build that fails, a test that fails, and what is right all the same.
fn failures(project: &Project, watched: &Watched) {
    let good = fs::read_to_string(project.folder.join("Containerfile")).unwrap();
    project.write("Containerfile", "FROM busybox\nRUNN no\n");
    watched.wait_for_word("RUNN");
    project.write("www/index.html", "three");
    project.wait_for_page("three");
    let builds = watched.builds();
    project.write("Containerfile", &good);
    wait_until("a build", || watched.builds() > builds);
    project.write("run", "#!/bin/sh\necho last words; exit 7\n");
    watched.wait_for_word("last words");
    assert_eq!(project.page(), "three");
    let program = Page::default().program();
    project.write("run", &program.replace("exec", "echo new > /tmp/new; exec"));
    wait_until("what was built", || {
        watched.inside("cat /tmp/new") == "new\n"
    });
    assert_eq!(project.page(), "three");
}

/// Beside an environment that serves: that one notices nothing.
#[test]
fn what_is_synced_at_the_beginning_is_thrown_away_at_the_end() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        keys: "    volumes: [\"data:/data\"]
    develop:
      watch:
        - path: extra
          action: sync+restart
          target: /www/extra
          include: \"**/*.html\"
          initial_sync: true
        - {path: one.txt, action: sync, target: /www/sub/one.txt}
",
        more: "volumes: {data: {}}",
        ..Page::default()
    };
    let mut project = kiln.page("beside", &page);
    project.up().ok();
    let (port, before) = (project.port, project.settled(None));
    project.port = free_port();
    project.write("extra/deep/a.html", "a");
    project.write("extra/deep/b.txt", "b");
    let watched = Watched::start(&project);
    project.wait_for_page("one");
    assert_eq!(project.get("/extra/deep/a.html").body, "a");
    assert_eq!(project.get("/extra/deep/b.txt").status, 404);
    // A file that was not there, and one that an editor puts in place of it.
    project.write("one.txt", "1");
    let served = |text: &str| get(project.port, "/sub/one.txt").is_ok_and(|a| a.body == text);
    wait_until("a file that came", || served("1"));
    project.write("one.txt.new", "2");
    fs::rename(
        project.folder.join("one.txt.new"),
        project.folder.join("one.txt"),
    )
    .unwrap();
    wait_until("a file that was put in its place", || served("2"));
    assert_eq!(project.settled(None), before);
    assert_eq!(get(port, "/").unwrap().body, "one");
    assert_eq!(get(port, "/sub/one.txt").unwrap().status, 404);
    watched.end();
    assert!(get(project.port, "/").is_err());
    assert_eq!(project.settled(None), before);
    assert_eq!(get(port, "/").unwrap().body, "one");
}

#[test]
fn what_can_not_be_watched_is_told_and_nothing_begun() {
    let Some(kiln) = Kiln::new() else { return };
    for (rules, says) in [
        ("", "develop.watch"),
        ("[{path: ., action: sync+exec, target: /x}]", "exec.command"),
        ("[{path: no/where, action: restart}]", "no/where"),
        ("[{path: ., action: restart, ignore: [\"[\"]}]", "`[`"),
    ] {
        let keys = match rules {
            "" => String::new(),
            rules => format!("    develop: {{watch: {rules}}}"),
        };
        let page = Page {
            keys: &keys,
            ..Page::default()
        };
        let project = kiln.page("wrong", &page);
        project.run("watch", &[]).code(&[3]).says(&[says]);
    }
    let image = "services:\n  web: {image: x, develop: {watch: [{path: ., action: rebuild}]}}\n";
    let project = kiln.project("image", &[("compose.yaml", image)]);
    project.run("watch", &[]).code(&[3]).says(&["build:"]);
    assert!(kiln.daemon().is_none());
}
