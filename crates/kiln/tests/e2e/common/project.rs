//! A compose project in a temporary folder, and what kiln says of it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::fixture;
use super::http::{Answer, get};
use super::machine::{Kiln, free_port};
use super::process::{Ran, Running, wait_until};

pub struct Project<'k> {
    pub kiln: &'k Kiln,
    pub folder: PathBuf,
    pub name: String,
    /// For `${PORT}` in the compose file.
    pub port: u16,
    variables: Vec<(String, String)>,
}

/// What `kiln status` says of one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance {
    pub id: String,
    pub service: String,
    pub release: u64,
    pub pid: Option<u32>,
    pub serving: bool,
    pub phase: String,
}

impl<'k> Project<'k> {
    pub fn new(kiln: &'k Kiln, name: &str, files: &[(&str, &str)]) -> Self {
        let folder = kiln.folder().join(name);
        let project = Self {
            kiln,
            folder,
            name: name.into(),
            port: free_port(),
            variables: vec![],
        };
        fs::create_dir_all(&project.folder).unwrap();
        for (path, text) in files {
            project.write(path, text);
        }
        fixture::pin(&project.folder);
        project
    }

    /// A variable for interpolation, from now on.
    pub fn set(&mut self, key: &str, value: impl ToString) {
        self.variables.retain(|(k, _)| k != key);
        self.variables.push((key.into(), value.to_string()));
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Replaces a text in a file; it must be there.
    #[track_caller]
    pub fn edit(&self, path: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.folder.join(path)).unwrap();
        assert!(text.contains(from), "{path} has no `{from}`");
        self.write(path, &text.replace(from, to));
    }

    /// `kiln <word> <more> <folder>`.
    pub fn command(&self, word: &str, more: &[&str]) -> Command {
        let folder = self.folder.to_string_lossy().into_owned();
        let mut words = vec![word];
        words.extend(more);
        words.push(&folder);
        self.with_variables(&words)
    }

    /// `kiln <words>`, with the environment named where the words have `@`.
    #[track_caller]
    pub fn kiln(&self, words: &[&str]) -> Ran {
        let words: Vec<&str> = words
            .iter()
            .map(|w| if *w == "@" { self.name.as_str() } else { *w })
            .collect();
        Running::start(self.with_variables(&words)).end()
    }

    /// Runs a shell line in a service's first instance.
    #[track_caller]
    pub fn inside(&self, service: &str, line: &str) -> Ran {
        self.kiln(&["exec", "-T", "-e", "@", service, "/bin/sh", "-c", line])
    }

    fn with_variables(&self, words: &[&str]) -> Command {
        let mut command = self.kiln.command(words);
        command.env("PORT", self.port.to_string());
        command.envs(self.variables.iter().map(|(k, v)| (k, v)));
        command
    }

    #[track_caller]
    pub fn run(&self, word: &str, more: &[&str]) -> Ran {
        Running::start(self.command(word, more)).end()
    }

    /// As in a terminal, whose whole output is the answer's `stdout`.
    pub fn run_on_a_terminal(&self, word: &str) -> Ran {
        let inner = self.command(word, &[]);
        let words: Vec<String> = std::iter::once(inner.get_program())
            .chain(inner.get_args())
            .map(|w| format!("'{}'", w.to_string_lossy()))
            .collect();
        let mut outer = Command::new("script");
        outer.args(["-qec", &words.join(" "), "/dev/null"]);
        for (key, value) in inner.get_envs() {
            match value {
                Some(value) => outer.env(key, value),
                None => outer.env_remove(key),
            };
        }
        Running::start(outer).end()
    }

    pub fn start(&self, word: &str, more: &[&str]) -> Running {
        Running::start(self.command(word, more))
    }

    #[track_caller]
    pub fn up(&self) -> Ran {
        let ran = self.run("up", &[]);
        if ran.code == Some(0) {
            fixture::keep_pins(&self.folder);
        }
        ran
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.run("status", &["--json"]).ok().json()
    }

    /// All instances of the environment, of one service if it is named; sorted.
    #[track_caller]
    pub fn instances(&self, service: Option<&str>) -> Vec<Instance> {
        instances_in(&self.status(), service)
    }

    /// Like [`Project::instances`], once nobody is on the way in or out: `up` returns when
    /// the new ones serve, the old ones may still drain.
    #[track_caller]
    pub fn settled(&self, service: Option<&str>) -> Vec<Instance> {
        wait_until("instances that are all ready", || {
            let all = self.instances_if_known();
            !all.is_empty() && all.iter().all(|i| i.phase == "ready")
        });
        self.instances(service)
    }

    /// Like [`Project::instances`], but nothing while the daemon does not answer.
    pub fn instances_if_known(&self) -> Vec<Instance> {
        let ran = self.run("status", &["--json"]);
        match serde_json::from_str(&ran.stdout) {
            Ok(status) if ran.code == Some(0) => instances_in(&status, None),
            _ => vec![],
        }
    }

    /// Numbers of all releases so far, and how each of them went.
    #[track_caller]
    pub fn releases(&self) -> Vec<(u64, String)> {
        let releases = self.run("releases", &["--json"]).ok().json();
        let list = releases.as_array().expect("a list of releases");
        let outcome = |r: &Value| {
            r["outcome"]["outcome"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        list.iter()
            .map(|r| (r["number"].as_u64().unwrap_or_default(), outcome(r)))
            .collect()
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        match get(self.port, path) {
            Ok(answer) => answer,
            Err(why) => panic!("no answer: {why}"),
        }
    }

    /// The body of `/`, which must be served.
    #[track_caller]
    pub fn page(&self) -> String {
        let answer = self.get("/");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body.trim().to_owned()
    }

    #[track_caller]
    pub fn wait_for_page(&self, text: &str) {
        wait_until(&format!("a page with `{text}`"), || {
            get(self.port, "/").is_ok_and(|a| a.status == 200 && a.body.trim() == text)
        });
    }
}

fn instances_in(status: &Value, service: Option<&str>) -> Vec<Instance> {
    let mut found = vec![];
    for one in status["services"].as_array().into_iter().flatten() {
        let name = one["service"].as_str().unwrap_or_default();
        if service.is_some_and(|s| s != name) {
            continue;
        }
        for instance in one["instances"].as_array().into_iter().flatten() {
            found.push(Instance {
                id: instance["id"].as_str().unwrap_or_default().into(),
                service: name.into(),
                release: instance["release"].as_u64().unwrap_or_default(),
                pid: instance["pid"].as_u64().and_then(|p| u32::try_from(p).ok()),
                serving: instance["serving"].as_bool().unwrap_or_default(),
                phase: instance["phase"].as_str().unwrap_or_default().into(),
            });
        }
    }
    found.sort();
    found
}
