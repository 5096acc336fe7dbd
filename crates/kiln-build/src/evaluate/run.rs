//! RUN: its command, its mounts and what surrounds it.

use super::{Action, EvaluateCause, PROXIES, RunAction, State};
use crate::containerfile::mount;
use crate::containerfile::{CommandLine, Run, chomp};
use crate::context::ignore::clean;

impl State<'_> {
    pub(super) fn run(&self, run: &Run) -> Result<(Action, String), EvaluateCause> {
        let unsupported = |what: &str| Err(EvaluateCause::Unsupported(format!("RUN {what}")));
        if run.insecure {
            return Err(EvaluateCause::Insecure);
        }
        if !run.devices.is_empty() {
            return unsupported("--device");
        }
        let mut mounts = Vec::new();
        for text in &run.mounts {
            let mut mount = mount::parse(text, &self.lexer, &self.variables).map_err(|cause| {
                EvaluateCause::Mount {
                    text: text.clone(),
                    cause,
                }
            })?;
            let named = matches!(mount.kind, mount::MountKind::Secret | mount::MountKind::Ssh);
            if !named || !mount.target.is_empty() {
                mount.target = clean(&self.absolute(&mount.target));
            }
            if mount.target == "/" {
                return Err(EvaluateCause::Mount {
                    text: text.clone(),
                    cause: "the target can't be `/`".into(),
                });
            }
            mounts.push(mount);
        }
        let (command, script) = with_heredocs(run);
        let argv = match &script {
            Some((name, _)) => {
                let mut argv = self.shell();
                argv.push(format!("/dev/pipes/{name}"));
                argv
            }
            None => self.command(&command),
        };
        // Programs differ in which of the two they look at.
        let both = |name: &str, value: &String| {
            [name.to_owned(), name.to_ascii_lowercase()].map(|name| (name, value.clone()))
        };
        let given = |name: &str| {
            let other = name.to_ascii_lowercase();
            self.given.get(name).or_else(|| self.given.get(&other))
        };
        let proxies = PROXIES
            .iter()
            .filter_map(|name| Some(both(name, given(name)?)))
            .flatten()
            .collect();
        let history = format!("RUN {}", argv.join(" "));
        let cwd = match self.config.working_dir.as_str() {
            "" => "/".to_owned(),
            path => clean(&format!("/{path}")),
        };
        let action = RunAction {
            argv,
            env: self.variables.clone(),
            proxies,
            cwd,
            user: self.config.user.clone(),
            network: run.network,
            mounts,
            script,
        };
        Ok((Action::Run(Box::new(action)), history))
    }
}

/// A command with its heredocs: one that is nothing but a heredoc runs its body; others
/// are given to the shell as they are written.
fn with_heredocs(run: &Run) -> (CommandLine, Option<(String, String)>) {
    let (CommandLine::Shell(text), [first, ..]) = (&run.command, run.heredocs.as_slice()) else {
        return (run.command.clone(), None);
    };
    let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = rest
        .strip_prefix("<<")
        .unwrap_or(rest)
        .trim_start_matches('-');
    let word = rest.trim();
    let quoted = [
        first.name.clone(),
        format!("\"{}\"", first.name),
        format!("'{}'", first.name),
    ];
    let alone = text.contains("<<") && run.heredocs.len() == 1 && quoted.iter().any(|q| q == word);
    if alone {
        let body = match first.chomp {
            true => chomp(&first.content),
            false => first.content.clone(),
        };
        return match body.starts_with("#!") {
            true => (run.command.clone(), Some((first.name.clone(), body))),
            false => (CommandLine::Shell(body), None),
        };
    }
    let mut whole = text.clone();
    for doc in &run.heredocs {
        whole.push('\n');
        whole.push_str(&doc.content);
        whole.push_str(&doc.name);
    }
    (CommandLine::Shell(whole), None)
}
