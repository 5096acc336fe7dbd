//! Fills variables into every text of a tree, and casts the texts of keys that are numbers
//! or booleans. Runs before anything else looks at the tree.

use std::collections::{BTreeMap, BTreeSet};

use crate::diag::{Code, Diagnostic, Diagnostics};
use crate::node::{Node, Value};
use crate::span::Span;
use crate::template::{self, TemplateError};
use crate::units;

pub type Environment = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cast {
    Int,
    Float,
    Bool,
}

/// Keys whose text becomes a number or a boolean. `*`: any key, `[]`: any item.
const CASTS: &[(&str, Cast)] = &[
    ("services.*.cpu_count", Cast::Int),
    ("services.*.cpu_percent", Cast::Float),
    ("services.*.cpu_period", Cast::Int),
    ("services.*.cpu_quota", Cast::Int),
    ("services.*.cpu_rt_period", Cast::Int),
    ("services.*.cpu_rt_runtime", Cast::Int),
    ("services.*.cpus", Cast::Float),
    ("services.*.cpu_shares", Cast::Int),
    ("services.*.init", Cast::Bool),
    ("services.*.depends_on.*.required", Cast::Bool),
    ("services.*.depends_on.*.restart", Cast::Bool),
    ("services.*.deploy.replicas", Cast::Int),
    ("services.*.deploy.update_config.parallelism", Cast::Int),
    (
        "services.*.deploy.update_config.max_failure_ratio",
        Cast::Float,
    ),
    ("services.*.deploy.rollback_config.parallelism", Cast::Int),
    (
        "services.*.deploy.rollback_config.max_failure_ratio",
        Cast::Float,
    ),
    ("services.*.deploy.restart_policy.max_attempts", Cast::Int),
    (
        "services.*.deploy.placement.max_replicas_per_node",
        Cast::Int,
    ),
    ("services.*.healthcheck.retries", Cast::Int),
    ("services.*.healthcheck.disable", Cast::Bool),
    ("services.*.oom_kill_disable", Cast::Bool),
    ("services.*.oom_score_adj", Cast::Int),
    ("services.*.pids_limit", Cast::Int),
    ("services.*.ports.[].target", Cast::Int),
    ("services.*.privileged", Cast::Bool),
    ("services.*.read_only", Cast::Bool),
    ("services.*.scale", Cast::Int),
    ("services.*.stdin_open", Cast::Bool),
    ("services.*.tty", Cast::Bool),
    ("services.*.ulimits.*", Cast::Int),
    ("services.*.ulimits.*.hard", Cast::Int),
    ("services.*.ulimits.*.soft", Cast::Int),
    ("services.*.volumes.[].read_only", Cast::Bool),
    ("services.*.volumes.[].volume.nocopy", Cast::Bool),
    ("networks.*.external", Cast::Bool),
    ("networks.*.internal", Cast::Bool),
    ("networks.*.attachable", Cast::Bool),
    ("networks.*.enable_ipv4", Cast::Bool),
    ("networks.*.enable_ipv6", Cast::Bool),
    ("volumes.*.external", Cast::Bool),
    ("secrets.*.external", Cast::Bool),
    ("configs.*.external", Cast::Bool),
];

/// What interpolation needs beside the tree.
pub struct Interpolation<'a> {
    pub environment: &'a Environment,
    pub diagnostics: &'a mut Diagnostics,
    /// Variables already warned about.
    pub warned: &'a mut BTreeSet<String>,
}

impl Interpolation<'_> {
    pub fn run(&mut self, root: &mut Node) {
        let mut path = vec![];
        self.node(root, &mut path);
    }

    fn node(&mut self, node: &mut Node, path: &mut Vec<String>) {
        let span = node.span;
        match &mut node.value {
            Value::Str(text) => {
                if text.contains('$') {
                    let Some(filled) = self.fill(text, span, path) else {
                        return;
                    };
                    *text = filled;
                }
                if let Some(cast) = cast_for(path) {
                    match cast_text(text, cast) {
                        Ok(value) => node.value = value,
                        Err(what) => self.diagnostics.push(Diagnostic::error(
                            Code::Schema,
                            span,
                            format!("{}: `{text}` is not {what}", show(path)),
                        )),
                    }
                }
            }
            Value::Seq(seq) => {
                path.push("[]".into());
                for item in seq {
                    self.node(item, path);
                }
                path.pop();
            }
            Value::Map(map) => {
                for (key, item) in map {
                    path.push(key.clone());
                    self.node(item, path);
                    path.pop();
                }
            }
            _ => {}
        }
    }

    fn fill(&mut self, text: &str, span: Span, path: &[String]) -> Option<String> {
        let lookup = |name: &str| self.environment.get(name).cloned();
        let mut unset = vec![];
        let result = template::substitute(text, &lookup, &mut unset);
        for name in unset {
            if self.warned.insert(name.clone()) {
                self.diagnostics.push(
                    Diagnostic::warning(
                        span,
                        format!("the variable {name} is not set; it counts as empty"),
                    )
                    .hint(format!(
                        "set {name} in the environment or in .env, or write a default: ${{{name}:-…}}"
                    )),
                );
            }
        }
        match result {
            Ok(filled) => Some(filled),
            Err(error) => {
                self.diagnostics.push(explain(&error, span, path));
                None
            }
        }
    }
}

fn explain(error: &TemplateError, span: Span, path: &[String]) -> Diagnostic {
    let hint = match error {
        TemplateError::Invalid { .. } => "write $$ where a dollar sign is meant".to_owned(),
        TemplateError::Required { name, .. } => {
            format!("set {name} in the environment or in .env")
        }
        TemplateError::TooDeep | TemplateError::TooLong => "make the text simpler".to_owned(),
    };
    Diagnostic::error(
        Code::Interpolation,
        span,
        format!("{}: {error}", show(path)),
    )
    .hint(hint)
}

fn cast_for(path: &[String]) -> Option<Cast> {
    if path.len() < 3 {
        return None;
    }
    CASTS
        .iter()
        .find(|(pattern, _)| matches(pattern, path))
        .map(|(_, cast)| *cast)
}

fn cast_text(text: &str, cast: Cast) -> Result<Value, &'static str> {
    match cast {
        Cast::Int => text.parse().map(Value::Int).map_err(|_| "a whole number"),
        Cast::Float => text.parse().map(Value::Float).map_err(|_| "a number"),
        Cast::Bool => units::parse_bool(text)
            .map(Value::Bool)
            .ok_or("a boolean; write `true` or `false`"),
    }
}

/// Does a dotted pattern fit the path? `*` fits any key.
pub fn matches(pattern: &str, path: &[String]) -> bool {
    let mut parts = pattern.split('.');
    for key in path {
        match parts.next() {
            Some(part) if part == "*" || part == key => {}
            _ => return false,
        }
    }
    parts.next().is_none()
}

/// A path for messages: `services.web.ports[]`.
pub fn show(path: &[String]) -> String {
    path.join(".").replace(".[]", "[]")
}
