//! What the schema cannot say: keys that exclude each other, names that nothing defines,
//! circles, targets mounted twice. Reports everything it finds.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::cycles;
use crate::diag::{Code, Diagnostic, Diagnostics, did_you_mean};
use crate::lint;
use crate::node::{Map, Node};
use crate::short;
use crate::span::Span;
use crate::units;

/// Checks of a file list's tree, also of included ones.
pub fn tree(root: &Node, diagnostics: &mut Diagnostics) {
    for (key, volume) in entries(root, "volumes") {
        external(&format!("volumes.{key}"), volume, diagnostics);
    }
    let configs: &[&str] = &["file", "environment", "content"];
    let secrets: &[&str] = &["file", "environment"];
    for (section, sources) in [("configs", configs), ("secrets", secrets)] {
        for (key, node) in entries(root, section) {
            file_object(&format!("{section}.{key}"), node, sources, diagnostics);
        }
    }
    for (name, service) in entries(root, "services") {
        for port in items(service, "ports") {
            if let Some(ip) = port.get("host_ip")
                && ip.text().is_none_or(|text| text.parse::<IpAddr>().is_err())
            {
                let text = ip.text().unwrap_or_default();
                diagnostics.error(
                    Code::Schema,
                    ip.span,
                    format!("services.{name}.ports: `{text}` is not an IP address"),
                );
            }
        }
        let bind = |volume: &&Node| volume.get("type").and_then(Node::as_str) == Some("bind");
        for volume in items(service, "volumes").iter().filter(bind) {
            if volume.get("source").is_none() {
                diagnostics.error(
                    Code::Schema,
                    volume.span,
                    format!("services.{name}.volumes: a bind mount needs a `source`"),
                );
            }
        }
        device_requests(name, service, diagnostics);
    }
}

fn device_requests(name: &str, service: &Node, diagnostics: &mut Diagnostics) {
    let reserved = service
        .at(&["deploy", "resources", "reservations", "devices"])
        .and_then(Node::as_seq)
        .unwrap_or_default();
    for request in items(service, "gpus").iter().chain(reserved) {
        if let (Some(_), Some(ids)) = (request.get("count"), request.get("device_ids")) {
            diagnostics.error(
                Code::Conflict,
                ids.key,
                format!("services.{name}: `count` and `device_ids` exclude each other"),
            );
        }
    }
}

fn external(path: &str, node: &Node, diagnostics: &mut Diagnostics) {
    if node.get("external").and_then(Node::as_bool) != Some(true) {
        return;
    }
    for (key, value) in node.as_map().into_iter().flatten() {
        if key != "name" && key != "external" && !key.starts_with("x-") {
            diagnostics.push(
                Diagnostic::error(
                    Code::Conflict,
                    value.key,
                    format!("{path}: `external` and `{key}` exclude each other"),
                )
                .hint("an external volume exists already; take the key out"),
            );
        }
    }
}

fn file_object(path: &str, node: &Node, sources: &[&str], diagnostics: &mut Diagnostics) {
    let said: Vec<&Node> = sources.iter().filter_map(|key| node.get(key)).collect();
    if let [first, second, ..] = said.as_slice() {
        diagnostics.push(
            Diagnostic::error(
                Code::Conflict,
                second.key,
                format!("{path}: {} exclude each other", sources.join(", ")),
            )
            .also(first.key, "first here"),
        );
    }
    if said.is_empty() && node.get("driver").is_none() && node.get("external").is_none() {
        diagnostics.error(
            Code::Schema,
            node.key,
            format!("{path}: one of {} is needed", sources.join(", ")),
        );
    }
}

fn entries<'a>(root: &'a Node, section: &str) -> impl Iterator<Item = (&'a str, &'a Node)> {
    root.get(section)
        .and_then(Node::as_map)
        .into_iter()
        .flatten()
        .map(|(key, node)| (key.as_str(), node))
}

fn items<'a>(node: &'a Node, key: &str) -> &'a [Node] {
    node.get(key).and_then(Node::as_seq).unwrap_or_default()
}

/// Checks of the whole project: `root` with the active services; `disabled` are those
/// whose profile is not active.
pub fn project(root: &Node, disabled: &Map, diagnostics: &mut Diagnostics) {
    for (name, service) in entries(root, "services") {
        let checker = Checker {
            root,
            disabled,
            name,
            service,
        };
        checker.run(diagnostics);
    }
    for (key, secret) in entries(root, "secrets") {
        let external = secret.get("external").and_then(Node::as_bool) == Some(true);
        let empty = |key: &str| {
            secret
                .get(key)
                .and_then(Node::text)
                .is_none_or(|t| t.is_empty())
        };
        if !external && empty("file") && empty("environment") && secret.get("driver").is_none() {
            diagnostics.error(
                Code::Schema,
                secret.key,
                format!("the secret `{key}` needs `file` or `environment`"),
            );
        }
    }
    cycles::find(root, diagnostics);
    container_names(root, diagnostics);
}

struct Checker<'a> {
    root: &'a Node,
    disabled: &'a Map,
    name: &'a str,
    service: &'a Node,
}

impl Checker<'_> {
    fn run(&self, diagnostics: &mut Diagnostics) {
        self.image(diagnostics);
        self.build(diagnostics);
        self.networks(diagnostics);
        self.health(diagnostics);
        self.dependencies(diagnostics);
        self.references(diagnostics);
        self.scale(diagnostics);
        self.limits(diagnostics);
        self.watch(diagnostics);
        self.mounts(diagnostics);
        self.commands(diagnostics);
    }

    /// Compose drops what follows an operator; a reader may think that a shell runs it.
    fn commands(&self, diagnostics: &mut Diagnostics) {
        for key in ["command", "entrypoint"] {
            let Some(node) = self.service.get(key) else {
                continue;
            };
            let split = node.as_str().map(short::words);
            if let Some(Ok(short::Words {
                dropped: Some(dropped),
                ..
            })) = split
            {
                diagnostics.push(
                    Diagnostic::warning(
                        node.span,
                        format!(
                            "services.{}.{key}: `{dropped}` is left out: no shell runs this",
                            self.name
                        ),
                    )
                    .hint("write it as a list, or begin with `sh -c`"),
                );
            }
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.service.get(key).and_then(Node::as_str)
    }

    fn image(&self, diagnostics: &mut Diagnostics) {
        let image = self.text("image").is_some_and(|text| !text.is_empty());
        // A misspelt `image` is told already.
        let told = diagnostics.error_touches(self.service.span);
        if !image
            && !told
            && !lint::is_built(self.service)
            && self.service.get("provider").is_none()
        {
            diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    self.service.key,
                    format!(
                        "the service `{}` has neither `image` nor `build`",
                        self.name
                    ),
                )
                .hint("say where its image comes from"),
            );
        }
    }

    fn build(&self, diagnostics: &mut Diagnostics) {
        let Some(build) = self.service.get("build") else {
            return;
        };
        if let (Some(inline), Some(file)) =
            (build.get("dockerfile_inline"), build.get("dockerfile"))
        {
            diagnostics.push(
                Diagnostic::error(
                    Code::Conflict,
                    inline.key,
                    format!(
                        "services.{}.build: `dockerfile` and `dockerfile_inline` exclude each other",
                        self.name
                    ),
                )
                .also(file.key, "the other"),
            );
        }
        for (context, node) in build
            .get("additional_contexts")
            .and_then(Node::as_map)
            .into_iter()
            .flatten()
        {
            if let Some(target) = node.as_str().and_then(|text| text.strip_prefix("service:")) {
                self.context_service(context, target, node.span, diagnostics);
            }
        }
        let platform = self.text("platform").unwrap_or_default();
        let platforms = items(build, "platforms");
        if !platform.is_empty()
            && !platforms.is_empty()
            && !platforms.iter().any(|node| node.as_str() == Some(platform))
        {
            diagnostics.error(
                Code::Conflict,
                build.get("platforms").map_or(build.span, |node| node.span),
                format!(
                    "services.{}: build.platforms must include the service's platform `{platform}`",
                    self.name
                ),
            );
        }
    }

    fn context_service(
        &self,
        context: &str,
        target: &str,
        span: Span,
        diagnostics: &mut Diagnostics,
    ) {
        let found = self
            .root
            .at(&["services", target])
            .or_else(|| self.disabled.get(target));
        let problem = match found {
            None => "is not defined",
            Some(service) if service.get("build").is_none() => "has no `build`",
            Some(_) => return,
        };
        diagnostics.error(
            Code::Reference,
            span,
            format!(
                "services.{}.build.additional_contexts.{context}: the service `{target}` {problem}",
                self.name
            ),
        );
    }

    fn networks(&self, diagnostics: &mut Diagnostics) {
        let networks = self.service.get("networks");
        if let (Some(mode), Some(networks)) = (self.service.get("network_mode"), networks)
            && networks.as_map().is_some_and(|map| !map.is_empty())
        {
            diagnostics.push(
                Diagnostic::error(
                    Code::Conflict,
                    mode.key,
                    format!(
                        "services.{}: `network_mode` and `networks` exclude each other",
                        self.name
                    ),
                )
                .also(networks.key, "the other"),
            );
        }
        for (name, node) in networks.and_then(Node::as_map).into_iter().flatten() {
            self.defined("networks", "network", name, node.key, diagnostics);
        }
        if let Some(target) = self
            .text("network_mode")
            .and_then(|t| t.strip_prefix("service:"))
            && self.root.at(&["services", target]).is_none()
        {
            let span = self
                .service
                .get("network_mode")
                .map_or(Span::NONE, |n| n.span);
            let known = entries(self.root, "services").map(|(name, _)| name);
            diagnostics.push(
                Diagnostic::error(
                    Code::Reference,
                    span,
                    format!(
                        "services.{}.network_mode: the service `{target}` is not defined",
                        self.name
                    ),
                )
                .maybe_hint(did_you_mean(target, known)),
            );
        }
    }

    /// `section` must have `name`.
    fn defined(
        &self,
        section: &str,
        what: &str,
        name: &str,
        span: Span,
        diagnostics: &mut Diagnostics,
    ) {
        let broken = self
            .root
            .get(section)
            .is_some_and(|node| node.as_map().is_none());
        if broken || self.root.at(&[section, name]).is_some() {
            return;
        }
        let known = entries(self.root, section).map(|(name, _)| name);
        let hint = did_you_mean(name, known)
            .unwrap_or_else(|| format!("define it at the top level, under `{section}:`"));
        diagnostics.push(
            Diagnostic::error(
                Code::Reference,
                span,
                format!("services.{}: the {what} `{name}` is not defined", self.name),
            )
            .hint(hint),
        );
    }

    fn health(&self, diagnostics: &mut Diagnostics) {
        let Some(first) = self
            .service
            .at(&["healthcheck", "test"])
            .and_then(|test| test.as_seq()?.first())
        else {
            return;
        };
        if !matches!(first.as_str(), Some("CMD" | "CMD-SHELL" | "NONE")) {
            diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    first.span,
                    format!(
                        "services.{}.healthcheck.test: a list must begin with CMD, CMD-SHELL or NONE",
                        self.name
                    ),
                )
                .hint("write a plain text to run it in a shell"),
            );
        }
    }

    fn dependencies(&self, diagnostics: &mut Diagnostics) {
        let map = self.service.get("depends_on").and_then(Node::as_map);
        for (target, node) in map.into_iter().flatten() {
            if self.root.at(&["services", target]).is_some() {
                continue;
            }
            let disabled = self.disabled.get(target.as_str());
            if disabled.is_some() && node.get("required").and_then(Node::as_bool) == Some(false) {
                continue;
            }
            let hint = match disabled {
                Some(_) => Some(
                    "its profile is not active; choose it with --profile, or say `required: false`"
                        .to_owned(),
                ),
                None => did_you_mean(target, entries(self.root, "services").map(|(n, _)| n)),
            };
            let state = if disabled.is_some() {
                "active"
            } else {
                "defined"
            };
            diagnostics.push(
                Diagnostic::error(
                    Code::Reference,
                    node.key,
                    format!(
                        "services.{}: depends on the service `{target}`, which is not {state}",
                        self.name
                    ),
                )
                .maybe_hint(hint),
            );
        }
    }

    fn references(&self, diagnostics: &mut Diagnostics) {
        for volume in items(self.service, "volumes") {
            let source = volume
                .get("source")
                .and_then(Node::as_str)
                .unwrap_or_default();
            if volume.get("type").and_then(Node::as_str) == Some("volume") && !source.is_empty() {
                let span = volume.get("source").map_or(volume.span, |node| node.span);
                self.defined("volumes", "volume", source, span, diagnostics);
            }
        }
        let build_secrets = self
            .service
            .get("build")
            .map_or(&[] as &[Node], |b| items(b, "secrets"));
        for (section, what, list) in [
            ("configs", "config", items(self.service, "configs")),
            ("secrets", "secret", items(self.service, "secrets")),
            ("secrets", "build secret", build_secrets),
        ] {
            for node in list {
                if let Some(source) = node.get("source") {
                    let name = source.text().unwrap_or_default();
                    self.defined(section, what, &name, source.span, diagnostics);
                }
            }
        }
        for (name, node) in self
            .service
            .get("models")
            .and_then(Node::as_map)
            .into_iter()
            .flatten()
        {
            self.defined("models", "model", name, node.key, diagnostics);
        }
    }

    fn scale(&self, diagnostics: &mut Diagnostics) {
        let scale = self.service.get("scale");
        let replicas = self.service.at(&["deploy", "replicas"]);
        let number = |node: Option<&Node>| node.and_then(Node::as_int);
        if let (Some(a), Some(b)) = (number(scale), number(replicas))
            && a != b
        {
            self.differ("scale", scale, "deploy.replicas", replicas, diagnostics);
        }
        let said = scale.or(replicas);
        let Some(count) = number(said) else { return };
        let span = said.map_or(Span::NONE, |node| node.span);
        if count < 0 {
            diagnostics.error(
                Code::Schema,
                span,
                format!(
                    "services.{}: the number of replicas must not be negative",
                    self.name
                ),
            );
        }
        if count > 1
            && let Some(container) = self.service.get("container_name")
        {
            diagnostics.push(
                Diagnostic::error(
                    Code::Conflict,
                    container.key,
                    format!(
                        "services.{}: a service with `container_name` can have one replica only",
                        self.name
                    ),
                )
                .also(span, "replicas are asked for here"),
            );
        }
    }

    fn differ(
        &self,
        key: &str,
        node: Option<&Node>,
        other_key: &str,
        other: Option<&Node>,
        diagnostics: &mut Diagnostics,
    ) {
        diagnostics.push(
            Diagnostic::error(
                Code::Conflict,
                node.map_or(Span::NONE, |n| n.span),
                format!(
                    "services.{}: `{key}` and `{other_key}` say different things",
                    self.name
                ),
            )
            .also(other.map_or(Span::NONE, |n| n.span), "the other")
            .hint("keep one of them"),
        );
    }

    fn limits(&self, diagnostics: &mut Diagnostics) {
        const PAIRS: [(&str, [&str; 2]); 4] = [
            ("mem_limit", ["limits", "memory"]),
            ("mem_reservation", ["reservations", "memory"]),
            ("pids_limit", ["limits", "pids"]),
            ("cpus", ["limits", "cpus"]),
        ];
        let amount = |node: &Node| -> Option<f64> {
            let text = node.text()?;
            #[allow(clippy::cast_precision_loss)]
            let bytes = || units::parse_bytes(&text).ok().map(|bytes| bytes as f64);
            text.parse().ok().or_else(bytes)
        };
        for (key, [group, inner]) in PAIRS {
            let own = self.service.get(key);
            let Some(resources) = self.service.at(&["deploy", "resources", group]) else {
                continue;
            };
            let (Some(a), other) = (own.and_then(amount), resources.get(inner)) else {
                continue;
            };
            #[allow(clippy::float_cmp)]
            if a != 0.0 && other.and_then(amount).unwrap_or(0.0) != a {
                let path = format!("deploy.resources.{group}.{inner}");
                self.differ(key, own, &path, other.or(Some(resources)), diagnostics);
            }
        }
    }

    fn watch(&self, diagnostics: &mut Diagnostics) {
        let rules = self
            .service
            .get("develop")
            .map_or(&[] as &[Node], |d| items(d, "watch"));
        for rule in rules {
            if rule.get("path").and_then(Node::as_str) == Some("") {
                diagnostics.error(
                    Code::Schema,
                    rule.span,
                    format!(
                        "services.{}.develop.watch: `path` must not be empty",
                        self.name
                    ),
                );
            }
            let action = rule
                .get("action")
                .and_then(Node::as_str)
                .unwrap_or_default();
            let target = rule
                .get("target")
                .and_then(Node::as_str)
                .unwrap_or_default();
            if target.is_empty() && action != "rebuild" && action != "restart" {
                diagnostics.error(
                    Code::Schema,
                    rule.span,
                    format!(
                        "services.{}.develop.watch: the action `{action}` needs a `target`",
                        self.name
                    ),
                );
            }
        }
    }

    fn mounts(&self, diagnostics: &mut Diagnostics) {
        let mut seen: BTreeMap<String, Span> = BTreeMap::new();
        let tmpfs = self.service.get("tmpfs");
        let tmpfs = match tmpfs.and_then(Node::as_seq) {
            Some(list) => list,
            None => tmpfs.map(std::slice::from_ref).unwrap_or_default(),
        };
        let from_tmpfs = tmpfs.iter().filter_map(|node| {
            let text = node.as_str()?;
            Some((text.split(':').next().unwrap_or(text).to_owned(), node.span))
        });
        let from_volumes = items(self.service, "volumes").iter().filter_map(|node| {
            let target = node.get("target")?;
            Some((target.text()?, target.span))
        });
        for (target, span) in from_tmpfs.chain(from_volumes) {
            if let Some(first) = seen.get(&target) {
                diagnostics.push(
                    Diagnostic::error(
                        Code::Conflict,
                        span,
                        format!(
                            "services.{}: something is mounted on {target} already",
                            self.name
                        ),
                    )
                    .also(*first, "first here"),
                );
            }
            seen.insert(target, span);
        }
    }
}

fn container_names(root: &Node, diagnostics: &mut Diagnostics) {
    let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
    for (name, service) in entries(root, "services") {
        let Some(node) = service.get("container_name") else {
            continue;
        };
        let Some(text) = node.as_str().filter(|text| !text.is_empty()) else {
            continue;
        };
        if let Some(first) = seen.insert(text, node.span) {
            diagnostics.push(
                Diagnostic::error(
                    Code::Conflict,
                    node.span,
                    format!("services.{name}: the container name `{text}` is taken"),
                )
                .also(first, "by this service"),
            );
        }
    }
}
