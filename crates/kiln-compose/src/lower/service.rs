//! One service: what it runs, its names, health, restarts, roll-outs.

use std::collections::BTreeMap;

use kiln_model::spec::{
    Condition, Dependency, FailureAction, HealthTest, Healthcheck, HealthcheckSetting, Hook,
    ImageSource, Logging, Names, Order, Process, PullPolicy, RestartPolicy, Service, ServiceMode,
    UpdateConfig,
};
use kiln_model::{Millis, ServiceName};

use super::{Lowering, flag, integer, items, millis, text, texts};
use crate::node::Node;
use crate::span::Span;
use crate::units;
use crate::values;

impl Lowering<'_> {
    pub(super) fn service(&mut self, name: &ServiceName, node: &Node) -> Option<Service> {
        let image = match (self.declared(name, node), node.get("build")) {
            (Some(declared), _) => declared,
            (None, Some(build)) => ImageSource::Build {
                build: Box::new(self.build(build)),
                tag: text(node, "image"),
            },
            (None, None) => ImageSource::Reference(text(node, "image").unwrap_or_default()),
        };
        let mut labels = self.pairs(node.at(&["deploy", "labels"]));
        labels.extend(self.pairs(node.get("labels")));
        let network = self.network_mode(node)?;
        let mounts = self.mounts(node);
        let (kiln, rollout) = self.service_extension(name, node.get("x-kiln"), &mounts);
        let mut service = Service {
            image,
            pull_policy: self.pull_policy(node),
            platform: text(node, "platform"),
            process: self.process(node),
            mounts,
            files: self.file_mounts(node),
            ports: self.ports(node),
            expose: self.expose(node),
            network,
            names: self.names(node),
            depends_on: self.depends_on(node),
            health: self.health(node),
            restart: self.restart(node),
            security: self.security(node),
            limits: self.limits(node),
            namespaces: self.namespaces(node),
            logging: self.logging(node),
            replicas: self.replicas(node),
            mode: self.mode(node),
            update: self
                .update(node.at(&["deploy", "update_config"]))
                .unwrap_or_default(),
            rollback: self.update(node.at(&["deploy", "rollback_config"])),
            post_start: self.hooks(node, "post_start"),
            pre_stop: self.hooks(node, "pre_stop"),
            labels,
            annotations: self.pairs(node.get("annotations")),
            kiln,
        };
        self.set_rollout(&mut service, rollout, node);
        Some(service)
    }

    fn pull_policy(&mut self, node: &Node) -> PullPolicy {
        const DAY: u64 = 86_400;
        let Some(policy) = node.get("pull_policy") else {
            return PullPolicy::Missing;
        };
        let said = policy.as_str().unwrap_or_default();
        match said {
            "missing" | "if_not_present" | "" => PullPolicy::Missing,
            "always" => PullPolicy::Always,
            "never" => PullPolicy::Never,
            "build" => PullPolicy::Build,
            "daily" => PullPolicy::Every(Millis::from_secs(DAY)),
            "weekly" => PullPolicy::Every(Millis::from_secs(7 * DAY)),
            other => {
                let time = other.strip_prefix("every_").map(units::parse_duration);
                if let Some(Ok(nanos)) = time {
                    return PullPolicy::Every(to_millis(nanos));
                }
                self.refuse_value(
                    "services.*.pull_policy",
                    policy,
                    "use always, never, missing, build, daily, weekly or every_<time>",
                );
                PullPolicy::Missing
            }
        }
    }

    fn process(&mut self, node: &Node) -> Process {
        let command = |key: &str| {
            let node = node.get(key).filter(|node| !node.is_null())?;
            values::command(node).ok()
        };
        Process {
            entrypoint: command("entrypoint"),
            command: command("command"),
            environment: variables(node),
            working_dir: text(node, "working_dir"),
            user: text(node, "user"),
            group_add: texts(node, "group_add"),
            stop_signal: text(node, "stop_signal"),
            stop_grace: millis(node, "stop_grace_period"),
            init: flag(node, "init"),
            tty: flag(node, "tty"),
            stdin_open: flag(node, "stdin_open"),
        }
    }

    fn names(&mut self, node: &Node) -> Names {
        let mut dns = vec![];
        for item in items(node, "dns") {
            let said = item.text().unwrap_or_default();
            let parsed = said
                .parse::<std::net::IpAddr>()
                .map_err(|_| format!("dns: `{said}` is not an IP address"));
            dns.extend(self.take(parsed, item.span));
        }
        let mut links = vec![];
        for link in items(node, "links") {
            let said = link.as_str().unwrap_or_default();
            let (service, alias) = said.split_once(':').unwrap_or((said, said));
            if let Some(service) = self.service_ref(service, link.span) {
                links.push((service, alias.to_owned()));
            }
        }
        let hosts = node.get("extra_hosts").map(values::hosts);
        Names {
            container_name: text(node, "container_name"),
            hostname: text(node, "hostname"),
            domainname: text(node, "domainname"),
            extra_hosts: hosts.and_then(Result::ok).unwrap_or_default(),
            dns,
            dns_search: texts(node, "dns_search"),
            dns_opt: texts(node, "dns_opt"),
            links,
        }
    }

    fn depends_on(&mut self, node: &Node) -> BTreeMap<ServiceName, Dependency> {
        let mut out = BTreeMap::new();
        let map = node.get("depends_on").and_then(Node::as_map);
        for (name, said) in map.into_iter().flatten() {
            // Not required and not active: there is nothing to wait for.
            if self.project.disabled.contains_key(name) {
                continue;
            }
            let Some(name) = self.service_ref(name, said.key) else {
                continue;
            };
            let condition = match said.get("condition").and_then(Node::as_str) {
                Some("service_healthy") => Condition::Healthy,
                Some("service_completed_successfully") => Condition::CompletedSuccessfully,
                _ => Condition::Started,
            };
            let required = said
                .get("required")
                .is_none_or(|n| values::boolean(n).unwrap_or(true));
            let dependency = Dependency {
                condition,
                // Where `links` imply it nothing needs it: addresses of services stay.
                restart: said.get("restart").is_some_and(|node| !node.span.is_none())
                    && flag(said, "restart"),
                required,
            };
            out.insert(name, dependency);
        }
        out
    }

    fn health(&mut self, node: &Node) -> HealthcheckSetting {
        let Some(said) = node.get("healthcheck").filter(|node| !node.is_null()) else {
            return HealthcheckSetting::Inherit;
        };
        if flag(said, "disable") {
            return HealthcheckSetting::Disabled;
        }
        let test = match said.get("test").filter(|node| !node.is_null()) {
            None => None,
            Some(test) if test.as_seq().is_none() => test.text().map(HealthTest::Shell),
            Some(test) => {
                let words = values::texts(test).unwrap_or_default();
                match words.split_first() {
                    Some((first, _)) if first == "NONE" => return HealthcheckSetting::Disabled,
                    Some((first, [])) => {
                        self.wrong(
                            test.span,
                            format!("healthcheck.test: `{first}` needs a command"),
                        );
                        None
                    }
                    Some((first, rest)) if first == "CMD" => Some(HealthTest::Exec(rest.to_vec())),
                    Some((_, rest)) => Some(HealthTest::Shell(rest.join(" "))),
                    None => None,
                }
            }
        };
        HealthcheckSetting::Set(Healthcheck {
            test,
            interval: millis(said, "interval"),
            timeout: millis(said, "timeout"),
            start_period: millis(said, "start_period"),
            start_interval: millis(said, "start_interval"),
            retries: integer(said, "retries").and_then(|n| u32::try_from(n).ok()),
        })
    }

    /// `restart`, and over it deploy.restart_policy. Where nothing is said, what fails is
    /// replaced: a release is what should run, not what was once started. `no` is heard.
    fn restart(&mut self, node: &Node) -> RestartPolicy {
        let mut policy = RestartPolicy::OnFailure { max_retries: None };
        if let Some(said) = node.get("restart") {
            let text = said.as_str().unwrap_or_default();
            policy = match text.split_once(':').unwrap_or((text, "")) {
                ("no" | "", _) => RestartPolicy::No,
                ("always", _) => RestartPolicy::Always,
                ("unless-stopped", _) => RestartPolicy::UnlessStopped,
                ("on-failure", "") => RestartPolicy::OnFailure { max_retries: None },
                ("on-failure", count) => {
                    let count = count
                        .parse()
                        .map_err(|_| format!("restart: `{count}` is not a number of attempts"));
                    RestartPolicy::OnFailure {
                        max_retries: self.take(count, said.span),
                    }
                }
                _ => {
                    self.wrong(
                        said.span,
                        format!("restart: `{text}` is none of no, always, unless-stopped, on-failure[:N]"),
                    );
                    RestartPolicy::No
                }
            };
        }
        let Some(said) = node
            .at(&["deploy", "restart_policy"])
            .filter(|n| !n.is_null())
        else {
            return policy;
        };
        let max_retries = integer(said, "max_attempts").and_then(|n| u32::try_from(n).ok());
        match text(said, "condition").as_deref() {
            None | Some("any") => RestartPolicy::Always,
            Some("none") => RestartPolicy::No,
            Some("on-failure") => RestartPolicy::OnFailure { max_retries },
            Some(other) => {
                let message = format!(
                    "deploy.restart_policy.condition: `{other}` is none of none, on-failure, any"
                );
                let span = said.get("condition").map_or(Span::NONE, |node| node.span);
                self.wrong(span, message);
                policy
            }
        }
    }

    fn logging(&mut self, node: &Node) -> Logging {
        let mut logging = Logging::default();
        let Some(said) = node.get("logging") else {
            return logging;
        };
        match said.get("driver").and_then(Node::as_str) {
            None | Some("" | "json-file" | "local") => {}
            Some("none") => logging.discard = true,
            Some(_) => {
                if let Some(driver) = said.get("driver") {
                    self.refuse_value(
                        "services.*.logging.driver",
                        driver,
                        "kiln keeps bounded log files itself: use json-file, local or none",
                    );
                }
                return logging;
            }
        }
        for (key, value) in said
            .get("options")
            .and_then(Node::as_map)
            .into_iter()
            .flatten()
        {
            self.log_option(&mut logging, key, value);
        }
        logging
    }

    fn log_option(&mut self, logging: &mut Logging, key: &str, value: &Node) {
        match key {
            "max-size" => {
                let size = values::bytes(value)
                    .and_then(|n| u64::try_from(n).map_err(|_| "max-size must be positive".into()));
                if let Some(size) = self.take(size, value.span).filter(|n| *n > 0) {
                    logging.max_size = size;
                }
            }
            "max-file" => {
                let count = values::integer(value)
                    .and_then(|n| u32::try_from(n).map_err(|_| "max-file must be positive".into()));
                if let Some(count) = self.take(count, value.span) {
                    logging.max_files = count.max(1);
                }
            }
            "compress" | "mode" | "max-buffer-size" | "tag" | "labels" | "labels-regex" | "env"
            | "env-regex" => self.diagnostics.push(
                crate::diag::Diagnostic::note(
                    value.key,
                    format!("the log option `{key}` has no effect: kiln writes its own log format"),
                )
                .key("services.*.logging.options"),
            ),
            _ => self.refuse(
                "services.*.logging.options",
                &format!("logging option {key}"),
                value.key,
                "kiln knows max-size and max-file",
            ),
        }
    }

    fn replicas(&mut self, node: &Node) -> u32 {
        let said = integer(node, "scale").or_else(|| integer(node.get("deploy")?, "replicas"));
        said.map_or(1, |count| u32::try_from(count).unwrap_or(0))
    }

    fn mode(&mut self, node: &Node) -> ServiceMode {
        if let Some(endpoint) = node.at(&["deploy", "endpoint_mode"])
            && !matches!(endpoint.as_str(), Some("vip" | ""))
        {
            self.refuse_value(
                "services.*.deploy.endpoint_mode",
                endpoint,
                "each service has one stable address that spreads the load (vip)",
            );
        }
        let mode = node.at(&["deploy", "mode"]);
        match mode.and_then(Node::as_str) {
            None | Some("replicated" | "") => ServiceMode::Replicated,
            Some("global") => ServiceMode::Global,
            Some("replicated-job" | "global-job") => ServiceMode::Job,
            Some(other) => {
                let message = format!(
                    "deploy.mode: `{other}` is none of replicated, global, replicated-job, global-job"
                );
                self.wrong(mode.map_or(Span::NONE, |node| node.span), message);
                ServiceMode::Replicated
            }
        }
    }

    fn update(&mut self, node: Option<&Node>) -> Option<UpdateConfig> {
        let node = node.filter(|node| !node.is_null())?;
        let failure_action = match text(node, "failure_action").as_deref() {
            None => None,
            Some("continue") => Some(FailureAction::Continue),
            Some("rollback") => Some(FailureAction::Rollback),
            Some("pause") => Some(FailureAction::Pause),
            Some(other) => {
                let span = node.get("failure_action").map_or(Span::NONE, |n| n.span);
                let message =
                    format!("failure_action: `{other}` is none of continue, rollback, pause");
                self.wrong(span, message);
                None
            }
        };
        let order = match text(node, "order").as_deref() {
            Some("start-first") => Some(Order::StartFirst),
            Some("stop-first") => Some(Order::StopFirst),
            _ => None,
        };
        let ratio = node
            .get("max_failure_ratio")
            .and_then(|n| values::number(n).ok());
        Some(UpdateConfig {
            parallelism: integer(node, "parallelism").and_then(|n| u32::try_from(n).ok()),
            delay: millis(node, "delay"),
            order,
            monitor: millis(node, "monitor"),
            failure_action,
            // Clamped to 0..=1000, so the cast loses nothing.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            max_failure_ratio: ratio.map(|r| (r * 1000.0).round().clamp(0.0, 1000.0) as u32),
        })
    }

    fn hooks(&mut self, node: &Node, key: &str) -> Vec<Hook> {
        items(node, key).iter().map(hook).collect()
    }
}

pub(super) fn hook(node: &Node) -> Hook {
    Hook {
        command: node
            .get("command")
            .and_then(|node| values::command(node).ok())
            .unwrap_or_default(),
        user: text(node, "user"),
        privileged: flag(node, "privileged"),
        working_dir: text(node, "working_dir"),
        environment: variables(node),
    }
}

/// The variables that have a value; the others are not set in the instance.
fn variables(node: &Node) -> BTreeMap<String, String> {
    node.get("environment")
        .and_then(|node| values::key_values(node).ok())
        .unwrap_or_default()
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

pub(super) fn to_millis(nanos: i64) -> Millis {
    Millis(u64::try_from(nanos / 1_000_000).unwrap_or(0))
}
