//! What a valid project says that hurts immutability, safety or a replacement without a gap.
//! Rules are pure functions over one service of a resolved project; each finding stands
//! where the value stands, and some bring the change that mends it.

use std::collections::BTreeSet;
use std::path::Path;

use crate::diag::{Code, Diagnostic, Severity};
use crate::node::{Map, Node};
use crate::project::Project;
use crate::span::{Sources, Span};
use crate::units;
use crate::values;

/// One thing that is looked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Stable: people write it after `--skip`, and other programs keep it.
    pub id: &'static str,
    pub severity: Severity,
    /// What it finds, in a few words.
    pub title: &'static str,
    /// Why it matters.
    pub why: &'static str,
}

/// A rule that struck.
#[derive(Clone, Debug)]
pub struct Finding {
    pub rule: &'static Rule,
    pub diagnostic: Diagnostic,
    pub fix: Option<Fix>,
    /// The image as the file says it, where the finding is about one.
    pub image: Option<String>,
}

/// A change of one place of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fix {
    pub span: Span,
    pub text: String,
}

const fn rule(
    id: &'static str,
    severity: Severity,
    title: &'static str,
    why: &'static str,
) -> Rule {
    Rule {
        id,
        severity,
        title,
        why,
    }
}

/// Every rule, by its id's order.
pub const RULES: &[Rule] = &[
    rule(
        "bind-mount",
        Severity::Note,
        "A read-only bind mount",
        "What is mounted is not part of the release: it changes without one, and a rollback does not bring it back.",
    ),
    rule(
        "code-bind",
        Severity::Warning,
        "A read-write bind mount of the project's own files",
        "Whatever runs can be edited while it runs, and what it writes ends up in the project.",
    ),
    rule(
        "docker-socket",
        Severity::Error,
        "The Docker socket is mounted",
        "Whoever can speak to it is root on the host; and where kiln runs, nothing may answer there.",
    ),
    rule(
        "extra-powers",
        Severity::Warning,
        "Protection is taken away",
        "The defaults keep a broken-into program from breaking out.",
    ),
    rule(
        "host-bind",
        Severity::Note,
        "A read-write bind mount of the host's files",
        "The service depends on one machine's files, which no release holds.",
    ),
    rule(
        "host-namespace",
        Severity::Note,
        "The host's network or processes are shared",
        "Two copies would meet on the same ports: such a service is replaced with a short pause.",
    ),
    rule(
        "job-restart",
        Severity::Warning,
        "A job that is started again for ever",
        "Others wait for it to complete, which it never does.",
    ),
    rule(
        "no-healthcheck",
        Severity::Warning,
        "Others wait for it to be healthy, and nothing says when it is",
        "Unless its image brings a health check, they wait for ever.",
    ),
    rule(
        "no-restart",
        Severity::Note,
        "A service that stays down when it fails",
        "`restart: \"no\"` is heard: a copy that ends is not replaced.",
    ),
    rule(
        "privileged",
        Severity::Warning,
        "A privileged service",
        "It can change the host, and what it changes there no release knows.",
    ),
    rule(
        "secret-in-environment",
        Severity::Warning,
        "A secret among the environment variables",
        "Variables are shown by `explain`, inherited by every child process and printed by crash reports; secrets are files.",
    ),
    rule(
        "unpinned-image",
        Severity::Warning,
        "An image without a tag, or with `latest`",
        "kiln.lock pins its digest, but nobody can tell which release of the program it was meant to be.",
    ),
    rule(
        "unsealed-root",
        Severity::Note,
        "A root that can be written to",
        "An instance can change its own programs until it is replaced.",
    ),
];

fn by_id(id: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.id == id)
}

/// Everything the rules find, in the order of the services' names.
pub fn lint(project: &Project, sources: &Sources) -> Vec<Finding> {
    let mut services: Vec<(&str, &Node)> = project.services().collect();
    services.sort_by_key(|(name, _)| *name);
    let mut findings = vec![];
    for (name, node) in services {
        let mut lint = Lint {
            project,
            sources,
            name,
            node,
            findings: &mut findings,
        };
        lint.image();
        lint.mounts();
        lint.powers();
        lint.health();
        lint.restart();
        lint.environment();
    }
    findings
}

struct Lint<'a> {
    project: &'a Project,
    sources: &'a Sources,
    name: &'a str,
    node: &'a Node,
    findings: &'a mut Vec<Finding>,
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

    fn image(&mut self) {
        let Some(node) = self.node.get("image") else {
            return;
        };
        let image = node.text().unwrap_or_default();
        // With `build`, the name is what the result is called.
        if self.node.get("build").is_some() || is_local(self.project, &image) || image.is_empty() {
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

    fn mounts(&mut self) {
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

    fn powers(&mut self) {
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

    fn health(&mut self) {
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

    fn restart(&mut self) {
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

    fn environment(&mut self) {
        let build = self.node.at(&["build", "args"]);
        let own = self.node.get("environment");
        let mut seen = BTreeSet::new();
        for (node, place) in own
            .map(|node| (node, "environment"))
            .into_iter()
            .chain(build.map(|node| (node, "build.args")))
        {
            for (key, value, span) in pairs(node) {
                if is_secret(&key, &value) && seen.insert((place, key.clone())) {
                    self.find(
                        "secret-in-environment",
                        span,
                        &format!("{place}: `{key}` looks like a secret"),
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

/// Bases that kiln composes, layouts and archives: no registry has them.
pub fn is_local(project: &Project, image: &str) -> bool {
    image.starts_with("oci:")
        || image.starts_with("docker-archive:")
        || project.tree.at(&["x-kiln", "bases", image]).is_some()
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

/// By its name; a path to a file, a switch or a number is none.
fn is_secret(key: &str, value: &str) -> bool {
    const WORDS: [&str; 9] = [
        "PASSWORD",
        "PASSWD",
        "SECRET",
        "TOKEN",
        "API_KEY",
        "APIKEY",
        "PRIVATE_KEY",
        "ACCESS_KEY",
        "CREDENTIALS",
    ];
    let key = key.to_ascii_uppercase();
    let harmless = value.is_empty()
        || value.starts_with('/')
        || units::parse_bool(value).is_some()
        || matches!(value, "yes" | "no")
        || value.parse::<u16>().is_ok_and(|_| key.ends_with("LENGTH"))
        || key.ends_with("_FILE")
        || key.ends_with("_PATH")
        || key.ends_with("_URL");
    !harmless && WORDS.iter().any(|word| key.contains(word))
}

/// `./src:/app` → `./src:/app:ro`, where the file says it in the short form.
fn read_only_fix(mount: &Node, sources: &Sources) -> Option<Fix> {
    let said = sources.text(mount.span)?;
    let (inner, quote) = match said.as_bytes().first()? {
        b'"' | b'\'' if said.len() > 1 => (&said[1..said.len() - 1], &said[..1]),
        _ => (said, ""),
    };
    let short = !inner.contains(['\n', '$', '{', '\\', ' ']);
    let text = match inner.matches(':').count() {
        1 => format!("{quote}{inner}:ro{quote}"),
        2 => format!("{quote}{}:ro{quote}", inner.strip_suffix(":rw")?),
        _ => return None,
    };
    short.then_some(Fix {
        span: mount.span,
        text,
    })
}

/// A file's text with the fixes that are about it; of two that overlap, the first.
pub fn apply(text: &str, file: u32, fixes: &[Fix]) -> String {
    let mut own: Vec<&Fix> = fixes.iter().filter(|fix| fix.span.file == file).collect();
    own.sort_by_key(|fix| (fix.span.start, fix.span.end));
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    for fix in own {
        let (start, end) = (fix.span.start as usize, fix.span.end as usize);
        if start < at || end < start {
            continue;
        }
        let Some(before) = text.get(at..start).filter(|_| end <= text.len()) else {
            continue;
        };
        out.push_str(before);
        out.push_str(&fix.text);
        at = end;
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::project::{LoadOptions, resolve};

    fn found(text: &str) -> (Vec<(&'static str, usize)>, String) {
        let options = LoadOptions {
            files: vec!["/p/compose.yaml".into()],
            folder: "/p".into(),
            ..LoadOptions::default()
        };
        let reader = |_: &Path| -> std::io::Result<Vec<u8>> { Ok(text.as_bytes().to_vec()) };
        let resolved = resolve(&options, &reader).expect("valid");
        let findings = lint(&resolved.project, &resolved.sources);
        let shown = findings
            .iter()
            .map(|finding| {
                let place = resolved.sources.place(finding.diagnostic.span).unwrap();
                assert!(finding.diagnostic.hint.is_some());
                (finding.rule.id, place.line)
            })
            .collect();
        let fixes: Vec<Fix> = findings.into_iter().filter_map(|f| f.fix).collect();
        (shown, apply(text, 0, &fixes))
    }

    #[test]
    fn each_rule_strikes_where_it_should() {
        let service = |lines: &str| format!("services:\n  a:\n    image: x:1\n    {lines}\n");
        for (lines, expected) in [
            ("volumes: [./src:/app]", vec![("code-bind", 4)]),
            ("volumes: [./src:/app:ro]", vec![("bind-mount", 4)]),
            ("volumes: [/srv/x:/x]", vec![("host-bind", 4)]),
            ("volumes: [/srv/x:/x:ro]", vec![("bind-mount", 4)]),
            (
                "volumes: [/var/run/docker.sock:/var/run/docker.sock:ro]",
                vec![("docker-socket", 4)],
            ),
            ("volumes: [data]", vec![]),
            ("privileged: true", vec![("privileged", 4)]),
            ("privileged: false", vec![]),
            (
                "cap_add: [CAP_SYS_ADMIN, NET_ADMIN]",
                vec![("extra-powers", 4)],
            ),
            (
                "security_opt: [\"seccomp:unconfined\"]",
                vec![("extra-powers", 4)],
            ),
            ("security_opt: [\"no-new-privileges:true\"]", vec![]),
            ("network_mode: host", vec![("host-namespace", 4)]),
            ("x-kiln: {root: scratch}", vec![("unsealed-root", 4)]),
            ("restart: \"no\"", vec![]),
            ("ports: [80]\n    restart: \"no\"", vec![("no-restart", 5)]),
            (
                "environment: {DB_PASSWORD: hunter2}",
                vec![("secret-in-environment", 4)],
            ),
            (
                "environment: [API_TOKEN=abc]",
                vec![("secret-in-environment", 4)],
            ),
            (
                "environment: {DB_PASSWORD_FILE: /run/secrets/x, ALLOW_EMPTY_PASSWORD: yes, TOKEN: }",
                vec![],
            ),
        ] {
            assert_eq!(found(&service(lines)).0, expected, "{lines}");
        }
        for (image, count) in [
            ("x", 1),
            ("x:latest", 1),
            ("h:5000/x", 1),
            ("h:5000/x:2", 0),
            (
                "x@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                0,
            ),
            ("oci:./x", 0),
            ("python", 0),
        ] {
            let text = format!(
                "services: {{a: {{image: \"{image}\"}}}}\nx-kiln: {{bases: {{python: {{suite: trixie}}}}}}"
            );
            assert_eq!(found(&text).0.len(), count, "{image}");
        }
    }

    #[test]
    fn what_others_wait_for_must_come() {
        let text = |b: &str, condition: &str| {
            format!(
                "services:\n  a: {{image: x:1, depends_on: {{b: {{condition: {condition}}}}}}}\n  b: {{image: y:1{b}}}\n"
            )
        };
        let healthy = |b| found(&text(b, "service_healthy")).0;
        assert_eq!(healthy(""), [("no-healthcheck", 3)]);
        assert_eq!(
            healthy(", healthcheck: {disable: true}"),
            [("no-healthcheck", 3)]
        );
        assert_eq!(
            healthy(", healthcheck: {test: [NONE]}"),
            [("no-healthcheck", 3)]
        );
        assert_eq!(healthy(", healthcheck: {test: x}"), []);
        let done = |b| found(&text(b, "service_completed_successfully"));
        let (ids, mended) = done(", restart: always");
        assert_eq!(ids, [("job-restart", 3)]);
        assert!(mended.contains("restart: on-failure"), "{mended}");
        assert_eq!(done(", restart: on-failure").0, []);
    }

    #[test]
    fn mended_files_are_found_good() {
        let text = "services:\n  a:\n    image: x:1\n    privileged: true\n    volumes:\n      - ./a:/a\n      - \"./b:/b\" # ü\n      - './c:/c:rw'\n      - {type: bind, source: ./d, target: /d}\n      - ./$$e:/e\n";
        let (ids, mended) = found(text);
        assert_eq!(ids.len(), 6);
        assert_eq!(
            mended,
            text.replace("privileged: true", "privileged: false")
                .replace("./a:/a", "./a:/a:ro")
                .replace("./b:/b", "./b:/b:ro")
                .replace("/c:rw", "/c:ro")
        );
        let left = found(&mended).0;
        let worse: Vec<_> = left.iter().filter(|(id, _)| *id != "bind-mount").collect();
        assert_eq!(worse.len(), 2, "{worse:?}");
    }

    #[test]
    fn rules_are_in_order_and_explained() {
        let ids: Vec<_> = RULES.iter().map(|rule| rule.id).collect();
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        assert_eq!(ids, sorted);
        assert!(RULES.iter().all(|rule| rule.why.ends_with('.')));
    }
}
