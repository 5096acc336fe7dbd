//! `x-kiln`: what kiln can be told beyond compose. Unknown keys are errors.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::spec::{
    Check, DebianBase, KilnOptions, Mount, MountSource, Ready, RootSetting, ScratchDir, StackTest,
};
use kiln_model::suite::SuiteKind;
use kiln_model::{Millis, ServiceName};

use super::Lowering;
use super::rollout::Rollout;
use super::service::to_millis;
use crate::diag::{Code, Diagnostic, did_you_mean};
use crate::node::{Node, Value};
use crate::units;
use crate::values;

/// For a moment two copies run, and the new one has to get ready.
const SHORTEST_AGE: Millis = Millis(10_000);

/// How long a whole-stack test may take, where nothing is said.
const STACK_LIMIT: Millis = Millis(600_000);

/// The project's `x-kiln`.
#[derive(Debug, Default)]
pub(super) struct ProjectExtension {
    pub bases: BTreeMap<String, DebianBase>,
    pub mirror: Option<String>,
    pub allow_secrets: Vec<String>,
    pub stack: Option<StackTest>,
    /// For services that say nothing themselves.
    pub rollout: Option<Rollout>,
}

impl Lowering<'_> {
    /// The entries of a mapping whose keys are known; others are errors.
    pub(super) fn known<'n>(
        &mut self,
        node: &'n Node,
        path: &str,
        known: &[&str],
    ) -> Vec<(&'n str, &'n Node)> {
        let Some(map) = node.as_map() else {
            if !node.is_null() {
                let what = format!("{path} must be a mapping, not {}", node.kind());
                self.wrong(node.span, what);
            }
            return vec![];
        };
        let mut out = vec![];
        for (key, value) in map {
            if known.contains(&key.as_str()) {
                out.push((key.as_str(), value));
                continue;
            }
            let hint = did_you_mean(key, known.iter().copied())
                .unwrap_or_else(|| format!("known here: {}", known.join(", ")));
            self.diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    value.key,
                    format!("unknown key `{key}` in {path}"),
                )
                .label("not known here")
                .hint(hint),
            );
        }
        out
    }

    pub(super) fn project_extension(&mut self) -> ProjectExtension {
        let mut out = ProjectExtension::default();
        let Some(node) = self.project.tree.get("x-kiln") else {
            return out;
        };
        let known = ["bases", "debian", "allow_secrets", "rollout", "test"];
        for (key, value) in self.known(node, "x-kiln", &known) {
            match key {
                "bases" => {
                    for (name, base) in value.as_map().into_iter().flatten() {
                        let base = self.base(&format!("x-kiln.bases.{name}"), base);
                        out.bases.insert(name.clone(), base);
                    }
                }
                "test" => out.stack = self.stack_test(value),
                "rollout" => out.rollout = Some(self.rollout(value, "x-kiln.rollout")),
                "allow_secrets" => {
                    out.allow_secrets = self.strings(value, "x-kiln.allow_secrets");
                }
                _ => {
                    for (_, mirror) in self.known(value, "x-kiln.debian", &["mirror"]) {
                        out.mirror = self.string(mirror, "x-kiln.debian.mirror");
                    }
                }
            }
        }
        out
    }

    /// `{service: NAME, timeout: 10m}`. The service is out of releases by a profile.
    fn stack_test(&mut self, node: &Node) -> Option<StackTest> {
        let mut timeout = Some(STACK_LIMIT);
        let mut named = None;
        for (key, value) in self.known(node, "x-kiln.test", &["service", "timeout"]) {
            let here = format!("x-kiln.test.{key}");
            match key {
                "service" => named = self.string(value, &here).map(|name| (name, value.span)),
                _ => timeout = self.span_of_time(value, &here),
            }
        }
        if node.get("service").is_none() {
            self.wrong(node.span, "x-kiln.test: the key `service` is missing");
        }
        let (name, span) = named?;
        let project = self.project;
        let disabled = project
            .disabled
            .iter()
            .map(|(name, node)| (name.as_str(), node));
        let all: Vec<(&str, &Node)> = project.services().chain(disabled).collect();
        let Some((_, service)) = all.iter().find(|(known, _)| *known == name) else {
            let what = format!("x-kiln.test.service: there is no service `{name}`");
            let mut wrong = Diagnostic::error(Code::Schema, span, what);
            wrong.hint = did_you_mean(&name, all.iter().map(|(known, _)| *known));
            self.diagnostics.push(wrong);
            return None;
        };
        if super::texts(service, "profiles").is_empty() {
            let what = format!("x-kiln.test.service: `{name}` would be part of every release");
            self.diagnostics.push(
                Diagnostic::error(Code::Schema, span, what)
                    .hint("give the service `profiles: [test]`: it is run all the same"),
            );
        }
        Some(StackTest {
            service: self.id(&name, span)?,
            timeout: timeout?,
        })
    }

    pub(super) fn base(&mut self, path: &str, node: &Node) -> DebianBase {
        let mut base = DebianBase {
            components: vec!["main".into()],
            essential: true,
            ..DebianBase::default()
        };
        let known = [
            "suite",
            "packages",
            "components",
            "essential",
            "distroless",
            "env",
        ];
        let mut essential = None;
        for (key, value) in self.known(node, path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "suite" => base.suite = self.string(value, &here).unwrap_or_default(),
                "packages" => base.packages = self.strings(value, &here),
                "components" => base.components = self.strings(value, &here),
                "essential" => essential = self.boolean(value, &here),
                "distroless" => base.distroless = self.boolean(value, &here).unwrap_or(false),
                _ => base.env = self.pairs(Some(value)),
            }
        }
        base.essential = essential.unwrap_or(!base.distroless);
        if base.suite.is_empty() {
            self.diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    node.key,
                    format!("{path}: the key `suite` is missing"),
                )
                .hint("for example `suite: bookworm`"),
            );
        }
        base
    }

    pub(super) fn string(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = node.text();
        if text.is_none() {
            self.wrong(
                node.span,
                format!("{path} must be a text, not {}", node.kind()),
            );
        }
        text
    }

    pub(super) fn strings(&mut self, node: &Node, path: &str) -> Vec<String> {
        match values::texts(node) {
            Some(texts) => texts,
            None => {
                self.wrong(
                    node.span,
                    format!("{path} must be a list, not {}", node.kind()),
                );
                vec![]
            }
        }
    }

    pub(super) fn boolean(&mut self, node: &Node, path: &str) -> Option<bool> {
        self.take(
            values::boolean(node).map_err(|what| format!("{path}: {what}")),
            node.span,
        )
    }

    pub(super) fn span_of_time(&mut self, node: &Node, path: &str) -> Option<Millis> {
        let nanos = units::parse_duration(&node.text().unwrap_or_default());
        let positive = nanos.and_then(|n| {
            if n < 0 {
                return Err("a duration must not be negative".into());
            }
            Ok(to_millis(n))
        });
        self.take(
            positive.map_err(|what| format!("{path}: {what}")),
            node.span,
        )
    }

    pub(super) fn number<T: TryFrom<i64>>(&mut self, node: &Node, path: &str) -> Option<T> {
        let number = values::integer(node)
            .and_then(|n| T::try_from(n).map_err(|_| format!("{n} is out of range")));
        self.take(number.map_err(|what| format!("{path}: {what}")), node.span)
    }

    pub(super) fn absolute(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.string(node, path)?;
        if text.starts_with('/') {
            return Some(crate::canonical::clean_path(&text));
        }
        self.wrong(
            node.span,
            format!("{path}: `{text}` is not an absolute path"),
        );
        None
    }

    pub(super) fn service_extension(
        &mut self,
        service: &ServiceName,
        node: Option<&Node>,
        mounts: &[Mount],
    ) -> (KilnOptions, Option<Rollout>) {
        let (mut out, mut rollout) = (KilnOptions::default(), None);
        let Some(node) = node else {
            return (out, rollout);
        };
        let path = format!("services.{service}.x-kiln");
        let known = [
            "root",
            "scratch",
            "ready",
            "test",
            "drain",
            "exclusive",
            "rollout",
            "max_age",
            "snapshot",
            "image",
        ];
        for (key, value) in self.known(node, &path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "root" => match value.as_str() {
                    Some("sealed") => out.root = RootSetting::Sealed,
                    Some("scratch") => out.root = RootSetting::Scratch,
                    _ => self.wrong(value.span, format!("{here} is `sealed` or `scratch`")),
                },
                "scratch" => out.scratch = self.scratch(value, &here),
                "ready" => out.ready = self.ready(value, &here),
                "test" => out.test = self.checks(value, &here),
                "drain" => out.drain = self.span_of_time(value, &here),
                "max_age" => out.max_age = self.max_age(value, &here),
                "snapshot" => out.snapshot = self.snapshot(value, &here, mounts),
                "rollout" => rollout = Some(self.rollout(value, &here)),
                // Read with what else says where the image comes from.
                "image" => {}
                _ => out.exclusive = self.boolean(value, &here),
            }
        }
        (out, rollout)
    }

    /// `true` for all named volumes that the service may write to, or some of them.
    fn snapshot(&mut self, node: &Node, path: &str, mounts: &[Mount]) -> BTreeSet<String> {
        let own: BTreeSet<String> = mounts
            .iter()
            .filter(|mount| !mount.read_only)
            .filter_map(|mount| match &mount.source {
                MountSource::Volume { volume, .. } => Some(volume.clone()),
                _ => None,
            })
            .collect();
        if !matches!(node.value, Value::Seq(_)) {
            let all = self.boolean(node, path) == Some(true);
            if all && own.is_empty() {
                let what = format!("{path}: the service mounts no named volume read-write");
                self.wrong(node.span, what);
            }
            return if all { own } else { BTreeSet::new() };
        }
        let mut chosen = BTreeSet::new();
        for item in self.list(node, path) {
            let Some(name) = self.string(item, path) else {
                continue;
            };
            if own.contains(&name) {
                chosen.insert(name);
                continue;
            }
            let what = format!("{path}: the service mounts no volume `{name}` read-write");
            let mut wrong = Diagnostic::error(Code::Schema, item.span, what);
            wrong.hint = did_you_mean(&name, own.iter().map(String::as_str));
            self.diagnostics.push(wrong);
        }
        chosen
    }

    /// At least [`SHORTEST_AGE`]: a copy has to get ready before it is replaced again.
    fn max_age(&mut self, node: &Node, path: &str) -> Option<Millis> {
        let age = self.span_of_time(node, path)?;
        if age < SHORTEST_AGE {
            let what = format!("{path} is too short: an instance must live for 10 s at least");
            self.wrong(node.span, what);
            return None;
        }
        Some(age)
    }

    /// `x-kiln` of a mount: may its files be run?
    pub(super) fn mount_extension(&mut self, node: Option<&Node>) -> bool {
        let Some(node) = node else { return false };
        let mut exec = false;
        for (_, value) in self.known(node, "volumes[].x-kiln", &["exec"]) {
            exec = self
                .boolean(value, "volumes[].x-kiln.exec")
                .unwrap_or(false);
        }
        exec
    }

    pub(super) fn list<'n>(&mut self, node: &'n Node, path: &str) -> &'n [Node] {
        match &node.value {
            Value::Seq(seq) => seq,
            _ => {
                self.wrong(
                    node.span,
                    format!("{path} must be a list, not {}", node.kind()),
                );
                &[]
            }
        }
    }

    fn scratch(&mut self, node: &Node, path: &str) -> Vec<ScratchDir> {
        let mut out = vec![];
        for item in self.list(node, path) {
            if item.as_str().is_some() {
                out.extend(self.absolute(item, path).map(|path| ScratchDir {
                    path,
                    size: None,
                    exec: false,
                }));
                continue;
            }
            let mut dir = ScratchDir {
                path: String::new(),
                size: None,
                exec: false,
            };
            for (key, value) in self.known(item, path, &["path", "size", "exec"]) {
                let here = format!("{path}.{key}");
                match key {
                    "path" => dir.path = self.absolute(value, &here).unwrap_or_default(),
                    "size" => {
                        let size = values::bytes(value).and_then(|n| {
                            u64::try_from(n).map_err(|_| "a size must not be negative".to_owned())
                        });
                        dir.size = self.take(size.map_err(|w| format!("{here}: {w}")), value.span);
                    }
                    _ => dir.exec = self.boolean(value, &here).unwrap_or(false),
                }
            }
            if item.get("path").is_none() {
                self.wrong(item.span, format!("{path}: the key `path` is missing"));
            }
            out.push(dir);
        }
        out
    }

    /// A mapping with exactly one of the known keys.
    pub(super) fn choice<'n>(
        &mut self,
        node: &'n Node,
        path: &str,
        known: &[&str],
    ) -> Option<(&'n str, &'n Node)> {
        let before = self.diagnostics.errors();
        let entries = self.known(node, path, known);
        match entries.as_slice() {
            [one] => Some(*one),
            _ => {
                if self.diagnostics.errors() == before {
                    self.wrong(
                        node.span,
                        format!("{path} needs exactly one of {}", known.join(", ")),
                    );
                }
                None
            }
        }
    }

    fn ready(&mut self, node: &Node, path: &str) -> Option<Ready> {
        let (key, value) = self.choice(node, path, &["http", "tcp", "settled"])?;
        let here = format!("{path}.{key}");
        match key {
            "http" => {
                let http = self.http(value, &here, &["port", "path", "status"])?;
                Some(Ready::Http {
                    port: http.port,
                    path: http.path,
                    status: http.status,
                })
            }
            "tcp" => Some(Ready::Tcp {
                port: self.tcp(value, &here)?,
            }),
            _ => self.span_of_time(value, &here).map(Ready::Settled),
        }
    }

    /// A port, or a mapping with one.
    fn tcp(&mut self, node: &Node, path: &str) -> Option<u16> {
        if node.as_map().is_none() {
            return self.port_number(node, path);
        }
        let entries = self.known(node, path, &["port"]);
        match entries.first() {
            Some((_, port)) => self.port_number(port, &format!("{path}.port")),
            None => {
                self.wrong(node.span, format!("{path}: the key `port` is missing"));
                None
            }
        }
    }

    fn port_number(&mut self, node: &Node, path: &str) -> Option<u16> {
        let port: u16 = self.number(node, path)?;
        if port == 0 {
            self.wrong(node.span, format!("{path}: 0 is not a port"));
            return None;
        }
        Some(port)
    }

    fn http(&mut self, node: &Node, path: &str, known: &[&str]) -> Option<Http> {
        let mut http = Http {
            port: 0,
            path: "/".into(),
            status: None,
            body: None,
        };
        for (key, value) in self.known(node, path, known) {
            let here = format!("{path}.{key}");
            match key {
                "port" => http.port = self.port_number(value, &here)?,
                "path" => http.path = self.absolute_url(value, &here)?,
                "status" => http.status = self.number(value, &here),
                _ => http.body = self.string(value, &here),
            }
        }
        if http.port == 0 {
            self.wrong(node.span, format!("{path}: the key `port` is missing"));
            return None;
        }
        Some(http)
    }

    fn absolute_url(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.string(node, path)?;
        if text.starts_with('/') {
            return Some(text);
        }
        self.wrong(node.span, format!("{path}: `{text}` must begin with /"));
        None
    }

    fn checks(&mut self, node: &Node, path: &str) -> Vec<Check> {
        let mut out = vec![];
        for (at, item) in self.list(node, path).iter().enumerate() {
            let here = format!("{path}[{at}]");
            let chosen = self.choice(
                item,
                &here,
                &["http", "tcp", "exec", "file", "structure", "goss"],
            );
            let Some((key, value)) = chosen else { continue };
            let here = format!("{here}.{key}");
            out.extend(match key {
                "http" => self.http_check(value, &here),
                "tcp" => self.tcp(value, &here).map(|port| Check::Tcp { port }),
                "exec" => self.exec_check(value, &here),
                "structure" => self.suite(SuiteKind::Structure, value, &here),
                "goss" => self.suite(SuiteKind::Goss, value, &here),
                _ => self.file_check(value, &here),
            });
        }
        out
    }

    fn http_check(&mut self, node: &Node, path: &str) -> Option<Check> {
        let http = self.http(node, path, &["port", "path", "status", "body"])?;
        Some(Check::Http {
            port: http.port,
            path: http.path,
            status: http.status.unwrap_or(200),
            body: http.body,
        })
    }

    fn exec_check(&mut self, node: &Node, path: &str) -> Option<Check> {
        let (mut command, mut exit, mut output) = (vec![], 0, None);
        for (key, value) in self.known(node, path, &["command", "exit", "output"]) {
            let here = format!("{path}.{key}");
            match key {
                "command" => command = self.take(values::command(value), value.span)?,
                "exit" => exit = self.number(value, &here)?,
                _ => output = self.string(value, &here),
            }
        }
        if command.is_empty() {
            self.wrong(node.span, format!("{path}: the key `command` is missing"));
            return None;
        }
        Some(Check::Exec {
            command,
            exit,
            output,
        })
    }

    fn file_check(&mut self, node: &Node, path: &str) -> Option<Check> {
        let (mut file, mut exists, mut contains, mut mode) = (None, true, None, None);
        for (key, value) in self.known(node, path, &["path", "exists", "contains", "mode"]) {
            let here = format!("{path}.{key}");
            match key {
                "path" => file = self.absolute(value, &here),
                "exists" => exists = self.boolean(value, &here)?,
                "contains" => contains = self.string(value, &here),
                _ => {
                    let bits = values::mode(value).and_then(|n| {
                        u32::try_from(n).map_err(|_| "a mode is not negative".into())
                    });
                    mode = self.take(bits, value.span);
                }
            }
        }
        if node.get("path").is_none() {
            self.wrong(node.span, format!("{path}: the key `path` is missing"));
        }
        Some(Check::File {
            path: file?,
            exists,
            contains,
            mode,
        })
    }
}

struct Http {
    port: u16,
    path: String,
    status: Option<u16>,
    body: Option<String>,
}
