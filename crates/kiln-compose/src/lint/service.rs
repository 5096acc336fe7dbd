//! The rules, applied to one service.

use std::collections::BTreeSet;
use std::path::Path;

use kiln_model::secrets::{self, Finder};

use super::fix::{Fix, read_only_fix};
use super::rules::by_id;
use super::{Finding, is_built, is_local};
use crate::diag::{Code, Diagnostic};
use crate::node::{Map, Node};
use crate::project::Project;
use crate::span::{Sources, Span};
use crate::values;

pub(super) struct Lint<'a> {
    pub project: &'a Project,
    pub sources: &'a Sources,
    pub name: &'a str,
    pub node: &'a Node,
    pub findings: &'a mut Vec<Finding>,
}

impl Lint<'_> {
    fn find(&mut self, id: &str, span: Span, what: &str, hint: &str, fix: Option<Fix>) {
        let Some(rule) = by_id(id) else {
            debug_assert!(false, "{id} is no rule");
            return;
        };
        let message = format!("{}: {what}", self.name);
        let diagnostic = Diagnostic::new(rule.severity, Code::Advice, span, message)
            .hint(hint)
            .key(rule.id);
        let finding = Finding {
            rule,
            diagnostic,
            fix,
            image: None,
        };
        self.findings.push(finding);
    }

    pub(super) fn image(&mut self) {
        let Some(node) = self.node.get("image") else {
            return;
        };
        let image = node.text().unwrap_or_default();
        if is_built(self.node) || is_local(self.project, &image) || image.is_empty() {
            return;
        }
        let name = image.rsplit('/').next().unwrap_or_default();
        let tag = name.split_once(':').map(|(_, tag)| tag);
        if image.contains('@') || !matches!(tag, None | Some("" | "latest")) {
            return;
        }
        self.find(
            "unpinned-image",
            node.span,
            &format!("`{image}` says no release of the image"),
            "write the tag that is meant, as `name:1.2`; kiln.lock then pins its digest",
            None,
        );
        if self.is_verbatim(node.span, &image)
            && let Some(found) = self.findings.last_mut()
        {
            found.image = Some(image);
        }
    }

    pub(super) fn mounts(&mut self) {
        let mounts = self.node.get("volumes").and_then(Node::as_seq);
        for mount in mounts.unwrap_or_default() {
            if mount.get("type").and_then(Node::as_str) != Some("bind") {
                continue;
            }
            let source = mount.get("source").and_then(Node::text).unwrap_or_default();
            if is_docker_socket(&source) {
                self.find(
                    "docker-socket",
                    mount.span,
                    &format!("`{source}` is mounted"),
                    "take it out; kiln logs, status and events say what such tools show",
                    None,
                );
                continue;
            }
            self.bind(mount, &source);
        }
    }

    fn bind(&mut self, mount: &Node, source: &str) {
        let read_only = mount
            .get("read_only")
            .is_some_and(|node| values::boolean(node).unwrap_or(false));
        let own = Path::new(source).starts_with(&self.project.folder);
        match (own, read_only) {
            (_, true) => self.find(
                "bind-mount",
                mount.span,
                &format!("`{source}` is not part of the release"),
                "copy it into the image, or make it a config: `configs:` with `file:`",
                None,
            ),
            (true, false) => {
                let fix = read_only_fix(mount, self.sources);
                self.find(
                    "code-bind",
                    mount.span,
                    &format!("`{source}` can be changed while it runs"),
                    "copy it into the image and take the mount out; mount it read-only (`:ro`); or \
                     use a named volume, if it is data",
                    fix,
                );
            }
            (false, false) => self.find(
                "host-bind",
                mount.span,
                &format!("`{source}` is a file or folder of this host"),
                "use a named volume, or mount it read-only (`:ro`)",
                None,
            ),
        }
    }

    pub(super) fn powers(&mut self) {
        let on = |key: &str| {
            let node = self.node.get(key)?;
            values::boolean(node).unwrap_or(false).then_some(node.span)
        };
        if let Some(span) = on("privileged") {
            let fix = Fix {
                span,
                text: "false".into(),
            };
            self.find(
                "privileged",
                span,
                "it is privileged",
                "name what it needs: `cap_add`, `devices`",
                self.is_verbatim(span, "true").then_some(fix),
            );
        }
        let items = |key: &str| {
            self.node
                .get(key)
                .and_then(Node::as_seq)
                .unwrap_or_default()
        };
        let strong: Vec<(Span, String)> = items("cap_add")
            .iter()
            .chain(items("security_opt"))
            .filter_map(|node| Some((node.span, node.text()?)))
            .filter(|(_, text)| takes_protection(text))
            .collect();
        for (span, text) in strong {
            self.find(
                "extra-powers",
                span,
                &format!("`{text}` takes protection away"),
                "take it out, or name only what is needed",
                None,
            );
        }
        for key in ["network_mode", "pid", "ipc", "uts"] {
            let shared = self.node.get(key).filter(|n| n.as_str() == Some("host"));
            if let Some(span) = shared.map(|node| node.span) {
                self.find(
                    "host-namespace",
                    span,
                    &format!("`{key}: host` shares it with the host"),
                    "take it out unless the service is about the host itself",
                    None,
                );
            }
        }
        let root = self.node.at(&["x-kiln", "root"]);
        if let Some(node) = root.filter(|node| node.as_str() == Some("scratch")) {
            self.find(
                "unsealed-root",
                node.span,
                "its root can be written to",
                "take it out; kiln learns in the isolated test what must be writable",
                None,
            );
        }
    }

    /// The conditions on which others depend on this service, and where they say so.
    fn waited_for(&self, condition: &str) -> Option<Span> {
        self.project.services().find_map(|(_, other)| {
            let said = other.at(&["depends_on", self.name])?.get("condition")?;
            (said.as_str() == Some(condition)).then_some(said.span)
        })
    }

    pub(super) fn health(&mut self) {
        let Some(waits) = self.waited_for("service_healthy") else {
            return;
        };
        let said = self.node.get("healthcheck").filter(|node| !node.is_null());
        let (span, what) = match said {
            None => (self.node.key, "others wait for it to be healthy"),
            Some(node) if is_disabled(node) => {
                (node.key, "others wait for a health check that is disabled")
            }
            Some(_) => return,
        };
        let hint = "write a `healthcheck:` with a `test:`";
        self.find("no-healthcheck", span, what, hint, None);
        if let Some(found) = self.findings.last_mut() {
            found.diagnostic = found.diagnostic.clone().also(waits, "waits for it here");
        }
    }

    pub(super) fn restart(&mut self) {
        let Some(node) = self.node.get("restart") else {
            return;
        };
        let policy = node.as_str().unwrap_or_default();
        let job = self.waited_for("service_completed_successfully");
        match (policy, job) {
            ("always" | "unless-stopped", Some(waits)) => {
                let fix = Fix {
                    span: node.span,
                    text: "on-failure".into(),
                };
                let verbatim = self.is_verbatim(node.span, policy);
                self.find(
                    "job-restart",
                    node.span,
                    &format!("`restart: {policy}`, but others wait for it to complete"),
                    "use `on-failure`",
                    verbatim.then_some(fix),
                );
                if let Some(found) = self.findings.last_mut() {
                    found.diagnostic = found.diagnostic.clone().also(waits, "waits for it here");
                }
            }
            ("no", None) if self.node.get("ports").is_some() => self.find(
                "no-restart",
                node.span,
                "it serves, but stays down when it fails",
                "take `restart` out: kiln then replaces what fails",
                None,
            ),
            _ => {}
        }
    }

    pub(super) fn environment(&mut self) {
        let build = self.node.at(&["build", "args"]);
        let own = self.node.get("environment");
        let mut seen = BTreeSet::new();
        let finder = Finder::default();
        for (node, place) in own
            .map(|node| (node, "environment"))
            .into_iter()
            .chain(build.map(|node| (node, "build.args")))
        {
            for (key, value, span) in pairs(node) {
                if let Some(kind) = secrets::in_variable(&finder, &key, &value)
                    && seen.insert((place, key.clone()))
                {
                    self.find(
                        "secret-in-environment",
                        span,
                        &format!("{place}: `{key}` looks like a secret ({kind})"),
                        "make it a file: `secrets:`, and `…_FILE` where the program knows it",
                        None,
                    );
                }
            }
        }
    }

    /// Does the file say just this there, unquoted and not by a variable?
    fn is_verbatim(&self, span: Span, text: &str) -> bool {
        self.sources.text(span).is_some_and(|said| said == text)
    }
}

fn is_docker_socket(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    matches!(name, "docker.sock" | "podman.sock" | "containerd.sock")
}

fn takes_protection(text: &str) -> bool {
    let plain = text.to_ascii_uppercase().replace(['=', ' '], ":");
    let name = plain.strip_prefix("CAP_").unwrap_or(&plain);
    matches!(
        name,
        "ALL"
            | "SYS_ADMIN"
            | "SYS_MODULE"
            | "SYS_PTRACE"
            | "SYS_RAWIO"
            | "DAC_READ_SEARCH"
            | "SECCOMP:UNCONFINED"
            | "APPARMOR:UNCONFINED"
            | "NO-NEW-PRIVILEGES:FALSE"
    )
}

fn is_disabled(healthcheck: &Node) -> bool {
    let disabled = healthcheck
        .get("disable")
        .is_some_and(|node| values::boolean(node).unwrap_or(false));
    let none = healthcheck
        .get("test")
        .and_then(|test| test.as_seq()?.first()?.as_str());
    disabled || none == Some("NONE")
}

/// Names, values and places of a mapping or of `NAME=value` items.
fn pairs(node: &Node) -> Vec<(String, String, Span)> {
    let from_map = |map: &Map| {
        map.iter()
            .map(|(key, node)| {
                let span = if node.key.is_none() {
                    node.span
                } else {
                    node.key
                };
                (key.clone(), node.text().unwrap_or_default(), span)
            })
            .collect()
    };
    match (node.as_map(), node.as_seq()) {
        (Some(map), _) => from_map(map),
        (_, Some(seq)) => seq
            .iter()
            .filter_map(|item| {
                let (key, value) = item.as_str()?.split_once('=')?;
                Some((key.to_owned(), value.to_owned(), item.span))
            })
            .collect(),
        _ => vec![],
    }
}
