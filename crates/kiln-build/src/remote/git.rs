//! Git repositories as ADD names them, and checking one out with the `git` program.
//!
//! Only the wanted commit is fetched. Nothing of the machine's git configuration is
//! read and no hook is run, so that the same commit gives the same files everywhere.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::RemoteError;

/// How much of git's own words is told.
const MAX_TOLD: u64 = 4 << 10;
/// What a listing of refs may take.
const MAX_REFS: u64 = 64 << 20;
/// How often a running git is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// `repository[#ref[:folder]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitAddress {
    pub repository: String,
    /// Branch, tag or commit; empty: the repository's HEAD.
    pub reference: String,
    /// Below the repository's root; empty: all of it.
    pub folder: String,
}

impl GitAddress {
    /// `None`: no git address in BuildKit's sense (http needs a path that ends in `.git`).
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, fragment) = text.split_once('#').unwrap_or((text, ""));
        let (scheme, rest) = match repository.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            // git@host:path
            None => {
                let (user, rest) = repository.split_once('@')?;
                let plain = !user.is_empty() && user.bytes().all(|b| b.is_ascii_alphanumeric());
                if !plain || !rest.contains(':') {
                    return None;
                }
                ("ssh", rest)
            }
        };
        let is = match scheme {
            "git" | "ssh" | "git+ssh" => true,
            "http" | "https" => rest.trim_end_matches('/').ends_with(".git"),
            _ => false,
        };
        if !is || rest.is_empty() || rest.starts_with('-') {
            return None;
        }
        let (reference, folder) = fragment.split_once(':').unwrap_or((fragment, ""));
        Some(Self {
            repository: repository.to_owned(),
            reference: reference.to_owned(),
            folder: crate::context::ignore::clean(&format!("/{folder}"))
                .trim_matches('/')
                .to_owned(),
        })
    }

    /// What is pinned: the folder doesn't matter.
    pub fn pin(&self) -> String {
        match self.reference.as_str() {
            "" => self.repository.clone(),
            reference => format!("{}#{reference}", self.repository),
        }
    }

    pub fn shown(&self) -> String {
        match self.folder.as_str() {
            "" => self.pin(),
            folder => format!("{}#{}:{folder}", self.repository, self.reference),
        }
    }

    fn is_commit(&self) -> bool {
        is_commit(&self.reference)
    }
}

pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The git program in one folder.
pub(super) struct Git<'a> {
    pub folder: &'a Path,
    pub address: &'a GitAddress,
    pub cancel: &'a AtomicBool,
}

impl Git<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        // The mode of what is checked out follows the umask.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "umask 022; exec git \"$@\"", "git"])
            .args(["-c", "core.hooksPath=/dev/null"])
            .args(["-c", "core.autocrlf=false", "-c", "gc.auto=0"])
            .args([
                "-c",
                "init.defaultBranch=main",
                "-c",
                "advice.detachedHead=false",
            ])
            .args([
                "-c",
                "protocol.file.allow=never",
                "-c",
                "fetch.unpackLimit=10000000",
            ])
            .args(arguments)
            .current_dir(self.folder)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .env_remove("GIT_DIR")
            .env_remove("GIT_WORK_TREE")
            .env_remove("GIT_INDEX_FILE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        command
    }

    /// Runs git to its end; gives what it printed.
    fn run(&self, what: &'static str, arguments: &[&str]) -> Result<String, RemoteError> {
        let child = self
            .command(arguments)
            .spawn()
            .map_err(RemoteError::NoGit)?;
        let (code, out, told) = self.wait(child)?;
        match code {
            Some(0) => Ok(out),
            Some(127) => Err(RemoteError::NoGit(std::io::ErrorKind::NotFound.into())),
            _ => Err(RemoteError::Git {
                what,
                address: self.address.shown(),
                told: told.trim().replace('\n', "\n  "),
            }),
        }
    }

    fn wait(&self, mut child: Child) -> Result<(Option<i32>, String, String), RemoteError> {
        let fail = |cause| RemoteError::Scratch {
            path: self.folder.to_owned(),
            cause,
        };
        let read = |pipe: Option<Box<dyn Read + Send>>, limit: u64| {
            std::thread::spawn(move || {
                let Some(mut pipe) = pipe else {
                    return Vec::new();
                };
                let mut bytes = Vec::new();
                let _ = pipe.by_ref().take(limit).read_to_end(&mut bytes);
                // Whatever is more is read and dropped: the writer must not wait.
                let _ = std::io::copy(&mut pipe, &mut std::io::sink());
                bytes
            })
        };
        let out = child
            .stdout
            .take()
            .map(|p| Box::new(p) as Box<dyn Read + Send>);
        let err = child
            .stderr
            .take()
            .map(|p| Box::new(p) as Box<dyn Read + Send>);
        let (out, err) = (read(out, MAX_REFS), read(err, MAX_TOLD));
        let status = loop {
            if let Some(status) = child.try_wait().map_err(fail)? {
                break status;
            }
            if self.cancel.load(Ordering::Relaxed) {
                if let Some(group) = i32::try_from(child.id())
                    .ok()
                    .and_then(rustix::process::Pid::from_raw)
                {
                    let _ =
                        rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                }
                let _ = child.wait();
                return Err(RemoteError::Cancelled);
            }
            std::thread::sleep(LOOK);
        };
        let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
        };
        Ok((status.code(), text(out), text(err)))
    }

    /// The commit that the address means now.
    pub fn commit(&self) -> Result<String, RemoteError> {
        if self.address.is_commit() {
            return Ok(self.address.reference.to_ascii_lowercase());
        }
        let wanted = match self.address.reference.as_str() {
            "" => "HEAD",
            name => name,
        };
        let peeled = format!("{wanted}^{{}}");
        let listed = self.run(
            "ls-remote",
            &["ls-remote", "--", &self.address.repository, wanted, &peeled],
        )?;
        let refs: Vec<(&str, &str)> = listed
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .collect();
        // Of a tag object the commit that it names; a branch before a tag, as git has it.
        let names = [
            wanted.to_owned(),
            format!("refs/heads/{wanted}"),
            format!("refs/tags/{wanted}^{{}}"),
            format!("refs/tags/{wanted}"),
        ];
        names
            .iter()
            .find_map(|name| refs.iter().find(|(_, n)| n == name))
            .map(|(commit, _)| (*commit).to_owned())
            .filter(|commit| is_commit(commit))
            .ok_or_else(|| RemoteError::NoRef {
                address: self.address.shown(),
                wanted: wanted.to_owned(),
            })
    }

    /// Fetches one commit and checks it out, with its submodules.
    pub fn check_out(&self, commit: &str) -> Result<(), RemoteError> {
        self.run("init", &["init", "--quiet", "."])?;
        let repository = &self.address.repository;
        self.run("remote", &["remote", "add", "origin", repository])?;
        let shallow = [
            "fetch",
            "--quiet",
            "--no-tags",
            "--depth=1",
            "origin",
            commit,
        ];
        if self.run("fetch", &shallow).is_err() {
            // Not every server gives any commit by its name: then everything is asked for.
            let all = [
                "fetch",
                "--quiet",
                "--tags",
                "origin",
                "+refs/heads/*:refs/remotes/origin/*",
            ];
            self.run("fetch", &all)?;
        }
        self.run(
            "checkout",
            &["checkout", "--quiet", "--force", "--detach", commit],
        )?;
        if self.folder.join(".gitmodules").exists() {
            let update = [
                "submodule",
                "update",
                "--init",
                "--recursive",
                "--depth=1",
                "--quiet",
            ];
            self.run("submodule", &update)?;
        }
        self.settle(commit)
    }

    /// Takes out of `.git` what differs each time: logs, the time of the fetch, what stat
    /// says of the checked out files.
    fn settle(&self, commit: &str) -> Result<(), RemoteError> {
        let git = self.folder.join(".git");
        for name in ["FETCH_HEAD", "ORIG_HEAD", "index", "description"] {
            remove(&git.join(name), false)?;
        }
        for name in ["logs", "hooks", "branches"] {
            remove(&git.join(name), true)?;
        }
        self.run("read-tree", &["read-tree", commit]).map(|_| ())
    }
}

fn remove(path: &PathBuf, folder: bool) -> Result<(), RemoteError> {
    let done = match folder {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    match done {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(RemoteError::Scratch {
            path: path.clone(),
            cause,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn repositories_are_told_from_files_and_paths() {
        let parse =
            |text: &str| GitAddress::parse(text).map(|a| (a.repository, a.reference, a.folder));
        let all = |a: &str, b: &str, c: &str| Some((a.to_owned(), b.to_owned(), c.to_owned()));
        assert_eq!(
            parse("https://h/x.git#v1:a/../b/"),
            all("https://h/x.git", "v1", "b")
        );
        assert_eq!(
            parse("git@h:x/y.git#main"),
            all("git@h:x/y.git", "main", "")
        );
        assert_eq!(parse("git://h/x#:f"), all("git://h/x", "", "f"));
        for other in [
            "https://h/x.tar.gz",
            "a@b",
            "./x.git",
            "ftp://h/x.git",
            "ssh://",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
