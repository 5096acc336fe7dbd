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

/// Keys of a service whose text becomes a number or a boolean. `*`: any key, `[]`: any item.
const SERVICE_CASTS: &[(&[&str], Cast)] = &[
    (&["cpu_count"], Cast::Int),
    (&["cpu_percent"], Cast::Float),
    (&["cpu_period"], Cast::Int),
    (&["cpu_quota"], Cast::Int),
    (&["cpu_rt_period"], Cast::Int),
    (&["cpu_rt_runtime"], Cast::Int),
    (&["cpus"], Cast::Float),
    (&["cpu_shares"], Cast::Int),
    (&["init"], Cast::Bool),
    (&["depends_on", "*", "required"], Cast::Bool),
    (&["depends_on", "*", "restart"], Cast::Bool),
    (&["deploy", "replicas"], Cast::Int),
    (&["deploy", "update_config", "parallelism"], Cast::Int),
    (
        &["deploy", "update_config", "max_failure_ratio"],
        Cast::Float,
    ),
    (&["deploy", "rollback_config", "parallelism"], Cast::Int),
    (
        &["deploy", "rollback_config", "max_failure_ratio"],
        Cast::Float,
    ),
    (&["deploy", "restart_policy", "max_attempts"], Cast::Int),
    (&["deploy", "placement", "max_replicas_per_node"], Cast::Int),
    (&["healthcheck", "retries"], Cast::Int),
    (&["healthcheck", "disable"], Cast::Bool),
    (&["oom_kill_disable"], Cast::Bool),
    (&["oom_score_adj"], Cast::Int),
    (&["pids_limit"], Cast::Int),
    (&["ports", "[]", "target"], Cast::Int),
    (&["privileged"], Cast::Bool),
    (&["read_only"], Cast::Bool),
    (&["scale"], Cast::Int),
    (&["stdin_open"], Cast::Bool),
    (&["tty"], Cast::Bool),
    (&["ulimits", "*"], Cast::Int),
    (&["ulimits", "*", "hard"], Cast::Int),
    (&["ulimits", "*", "soft"], Cast::Int),
    (&["volumes", "[]", "read_only"], Cast::Bool),
    (&["volumes", "[]", "volume", "nocopy"], Cast::Bool),
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
    let [section, _, rest @ ..] = path else {
        return None;
    };
    match (section.as_str(), rest) {
        ("services", rest) => SERVICE_CASTS
            .iter()
            .find(|(pattern, _)| fits(pattern, rest))
            .map(|(_, cast)| *cast),
        ("networks" | "volumes" | "secrets" | "configs", [key]) if key == "external" => {
            Some(Cast::Bool)
        }
        ("networks", [key]) => ["internal", "attachable", "enable_ipv4", "enable_ipv6"]
            .contains(&key.as_str())
            .then_some(Cast::Bool),
        _ => None,
    }
}

fn fits(pattern: &[&str], path: &[String]) -> bool {
    pattern.len() == path.len()
        && pattern
            .iter()
            .zip(path)
            .all(|(part, key)| *part == "*" || part == key)
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

/// A path for messages: `services.web.ports[]`.
pub fn show(path: &[String]) -> String {
    path.join(".").replace(".[]", "[]")
}
