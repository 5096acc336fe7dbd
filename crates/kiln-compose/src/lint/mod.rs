//! What a valid project says that hurts immutability, safety or a replacement without a gap.
//! Rules are pure functions over one service of a resolved project; each finding stands
//! where the value stands, and some bring the change that mends it.

mod fix;
mod rules;
mod service;

use crate::diag::Diagnostic;
use crate::node::Node;
use crate::project::Project;
use crate::span::Sources;

pub use fix::{Fix, apply};
pub use rules::{RULES, Rule};
use service::Lint;

/// A rule that struck.
#[derive(Clone, Debug)]
pub struct Finding {
    pub rule: &'static Rule,
    pub diagnostic: Diagnostic,
    pub fix: Option<Fix>,
    /// The image as the file says it, where the finding is about one.
    pub image: Option<String>,
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

/// Its image is made here: `image` is only what it is called.
pub fn is_built(service: &Node) -> bool {
    service.get("build").is_some() || service.at(&["x-kiln", "image"]).is_some()
}

/// Bases that kiln composes, layouts and archives: no registry has them.
pub fn is_local(project: &Project, image: &str) -> bool {
    image.starts_with("oci:")
        || image.starts_with("docker-archive:")
        || project.tree.at(&["x-kiln", "bases", image]).is_some()
}

#[cfg(test)]
mod tests;
