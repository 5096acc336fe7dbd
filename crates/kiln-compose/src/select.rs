//! Parts of a resolved project, as the selectors of `kiln config` print them. Lists are
//! sorted: docker compose prints most of them in another order each time.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::Digest;
use serde_json::Value as Json;

use crate::node::{Node, Value};
use crate::output;
use crate::project::Project;
use crate::template::{self, Variable};
use crate::values;

/// The active services' names.
pub fn services(project: &Project) -> Vec<String> {
    let mut names: Vec<String> = project.services().map(|(name, _)| name.into()).collect();
    names.sort();
    names
}

/// The keys of a top-level section (`volumes`, `networks`, `models`) that services use.
pub fn keys(project: &Project, section: &str) -> Vec<String> {
    let entries = project.section(section);
    let mut keys: Vec<String> = entries.map(|(key, _)| key.to_owned()).collect();
    keys.sort();
    keys
}

/// Every service's image by the service's name; what is built without a name for it is
/// called after project and service.
pub fn images(project: &Project) -> BTreeMap<String, String> {
    project
        .services()
        .map(|(name, service)| {
            let said = service.get("image").and_then(Node::text);
            let image = said.filter(|image| !image.is_empty());
            let image = image.unwrap_or_else(|| format!("{}-{name}", project.name));
            (name.to_owned(), image)
        })
        .collect()
}

/// All profiles that services say, active or not.
pub fn profiles(project: &Project) -> BTreeSet<String> {
    let disabled = project.disabled.values();
    project
        .services()
        .map(|(_, service)| service)
        .chain(disabled)
        .filter_map(|service| values::texts(service.get("profiles")?))
        .flatten()
        .collect()
}

/// A digest of all that is said of a service, once resolved; it changes when that does and
/// not when it is only written otherwise. It is kiln's own, not docker compose's.
/// `None`: there is no such service.
pub fn hash(project: &Project, service: &str) -> Option<Digest> {
    let model = output::sorted(project.model(true));
    let model: &Json = model.get("services")?.get(service)?;
    Some(Digest::of(model.to_string()))
}

/// Every variable that a project read without interpolation asks for. One that is asked for
/// in several ways is required if one of them says so; of defaults, the first counts.
pub fn variables(project: &Project) -> Vec<Variable> {
    let mut found: BTreeMap<String, Variable> = BTreeMap::new();
    walk(&project.tree, &mut |text| {
        for variable in template::variables(text) {
            match found.get_mut(&variable.name) {
                None => {
                    found.insert(variable.name.clone(), variable);
                }
                Some(known) => {
                    known.required |= variable.required;
                    if known.default.is_empty() {
                        known.default = variable.default;
                    }
                    if known.alternate.is_empty() {
                        known.alternate = variable.alternate;
                    }
                }
            }
        }
    });
    found.into_values().collect()
}

fn walk(node: &Node, each: &mut dyn FnMut(&str)) {
    match &node.value {
        Value::Str(text) => each(text),
        Value::Seq(seq) => seq.iter().for_each(|item| walk(item, each)),
        Value::Map(map) => map.values().for_each(|item| walk(item, each)),
        _ => {}
    }
}
