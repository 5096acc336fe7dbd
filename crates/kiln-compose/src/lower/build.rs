//! `build`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kiln_model::spec::Build;

use super::{Lowering, flag, items, text, texts, unsigned_bytes};
use crate::node::Node;
use crate::paths;
use crate::values;

impl Lowering<'_> {
    pub(super) fn build(&mut self, node: &Node) -> Build {
        let context = text(node, "context").unwrap_or_default();
        if let Some(said) = node.get("context")
            && paths::is_remote_context(&context)
        {
            self.refuse_value(
                "services.*.build.context",
                said,
                "kiln builds from a folder; fetch the repository first",
            );
        }
        if context.is_empty() {
            self.wrong(
                node.span,
                "build: the context is empty; write `.` for the project's folder",
            );
        }
        let context = PathBuf::from(context);
        Build {
            containerfile: containerfile(node, &context),
            inline: text(node, "dockerfile_inline"),
            declared: None,
            args: self.build_args(node),
            target: text(node, "target"),
            labels: self.pairs(node.get("labels")),
            additional_contexts: self.pairs(node.get("additional_contexts")),
            network: self.build_network(node),
            no_cache: flag(node, "no_cache"),
            pull: flag(node, "pull"),
            extra_hosts: node
                .get("extra_hosts")
                .and_then(|node| values::hosts(node).ok())
                .unwrap_or_default(),
            shm_size: unsigned_bytes(node, "shm_size"),
            ulimits: self.ulimits(node),
            time_limit: None,
            secrets: build_secrets(node),
            ssh: ssh(node),
            cache_from: texts(node, "cache_from"),
            cache_to: texts(node, "cache_to"),
            platforms: texts(node, "platforms"),
            tags: texts(node, "tags"),
            context,
        }
    }

    fn build_network(&mut self, node: &Node) -> String {
        let network = text(node, "network").unwrap_or_default();
        match network.as_str() {
            "none" | "host" => network,
            "" | "default" => String::new(),
            _ => {
                if let Some(said) = node.get("network") {
                    let hint = "a build has the network `host`, `none` or the default one";
                    self.refuse_value("services.*.build.network", said, hint);
                }
                String::new()
            }
        }
    }

    /// Arguments that have a value; the others are the Containerfile's own.
    fn build_args(&mut self, node: &Node) -> BTreeMap<String, String> {
        node.get("args")
            .and_then(|node| values::key_values(node).ok())
            .unwrap_or_default()
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)))
            .collect()
    }
}

/// Only what the file itself says; the default that compose fills in stands nowhere.
fn containerfile(node: &Node, context: &std::path::Path) -> Option<PathBuf> {
    let said = node.get("dockerfile").filter(|node| !node.span.is_none())?;
    Some(paths::join(
        context,
        said.as_str().filter(|text| !text.is_empty())?,
    ))
}

/// The id that `RUN --mount=type=secret` says → the secret's key.
fn build_secrets(node: &Node) -> BTreeMap<String, String> {
    items(node, "secrets")
        .iter()
        .filter_map(|secret| {
            let source = text(secret, "source")?;
            Some((
                text(secret, "target").unwrap_or_else(|| source.clone()),
                source,
            ))
        })
        .collect()
}

fn ssh(node: &Node) -> Vec<String> {
    let keys = node.get("ssh").and_then(Node::as_map);
    keys.into_iter()
        .flatten()
        .map(|(id, path)| match path.text() {
            Some(path) if !path.is_empty() => format!("{id}={path}"),
            _ => id.clone(),
        })
        .collect()
}
