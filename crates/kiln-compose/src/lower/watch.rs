//! `develop.watch`.

use std::path::PathBuf;

use kiln_model::spec::{WatchAction, WatchRule};

use super::service::hook;
use super::{Lowering, flag, items, text, texts};
use crate::diag::Diagnostic;
use crate::node::Node;

impl Lowering<'_> {
    pub(super) fn watch(&mut self, service: &Node) -> Vec<WatchRule> {
        let develop = service.get("develop");
        let rules = develop.map(|node| items(node, "watch")).unwrap_or_default();
        rules.iter().map(|rule| self.watch_rule(rule)).collect()
    }

    fn watch_rule(&mut self, rule: &Node) -> WatchRule {
        let said = text(rule, "action").unwrap_or_default();
        let action = match said.as_str() {
            "rebuild" => WatchAction::Rebuild,
            "restart" => WatchAction::Restart,
            // The schema knows no others.
            _ => WatchAction::Sync {
                target: text(rule, "target").unwrap_or_default(),
                initial: flag(rule, "initial_sync"),
                exec: (said == "sync+exec").then(|| rule.get("exec").map(hook).unwrap_or_default()),
            },
        };
        for key in without_effect(&said) {
            if let Some(node) = rule.get(key).filter(|node| !super::is_empty(node)) {
                let text = format!("`{key}` has no effect with the action `{said}`");
                self.diagnostics.push(Diagnostic::note(node.key, text));
            }
        }
        WatchRule {
            path: PathBuf::from(text(rule, "path").unwrap_or_default()),
            action,
            ignore: texts(rule, "ignore"),
            include: texts(rule, "include"),
        }
    }
}

fn without_effect(action: &str) -> &'static [&'static str] {
    match action {
        "rebuild" | "restart" => &["target", "exec", "initial_sync"],
        "sync" | "sync+restart" => &["exec"],
        _ => &[],
    }
}
