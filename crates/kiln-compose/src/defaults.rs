//! Values that compose gives to keys which are not said.

use crate::interpolate::Environment;
use crate::node::{Map, Node, Value, insert};
use crate::span::Span;

/// Defaults of a file list's tree, before paths are made absolute.
pub fn set(root: &mut Node) {
    for service in services(root) {
        if let Some(build) = map_at(service, "build") {
            build
                .entry("context".into())
                .or_insert_with(|| Node::str(".", Span::NONE));
        }
        for secret in maps_at(service, "secrets") {
            let source = secret.get("source").and_then(Node::text);
            if let Some(source) = source {
                secret
                    .entry("target".into())
                    .or_insert_with(|| Node::str(format!("/run/secrets/{source}"), Span::NONE));
            }
        }
        for port in maps_at(service, "ports") {
            for (key, value) in [("protocol", "tcp"), ("mode", "ingress")] {
                port.entry(key.into())
                    .or_insert_with(|| Node::str(value, Span::NONE));
            }
        }
        for request in maps_at(service, "gpus") {
            device_count(request);
        }
        let reservations = map_at(service, "deploy")
            .and_then(|deploy| map_at(deploy, "resources"))
            .and_then(|resources| map_at(resources, "reservations"));
        if let Some(reservations) = reservations {
            maps_at(reservations, "devices").for_each(device_count);
        }
    }
}

fn device_count(request: &mut Map) {
    if !request.contains_key("count") && !request.contains_key("device_ids") {
        request.insert("count".into(), Node::str("all", Span::NONE));
    }
}

fn services(root: &mut Node) -> impl Iterator<Item = &mut Map> {
    root.as_map_mut()
        .and_then(|map| map.get_mut("services"))
        .and_then(Node::as_map_mut)
        .into_iter()
        .flat_map(|map| map.values_mut())
        .filter_map(Node::as_map_mut)
}

fn map_at<'a>(map: &'a mut Map, key: &str) -> Option<&'a mut Map> {
    map.get_mut(key).and_then(Node::as_map_mut)
}

fn maps_at<'a>(map: &'a mut Map, key: &str) -> impl Iterator<Item = &'a mut Map> {
    map.get_mut(key)
        .and_then(Node::as_seq_mut)
        .into_iter()
        .flatten()
        .filter_map(Node::as_map_mut)
}

/// Gives `- NAME` entries of an environment list the value that this model's environment
/// has: an included project has its own.
pub fn list_environment(root: &mut Node, environment: &Environment) {
    for service in services(root) {
        let entries = service.get_mut("environment").and_then(Node::as_seq_mut);
        for entry in entries.into_iter().flatten() {
            if let Value::Str(name) = &entry.value
                && let Some(value) = environment.get(name)
            {
                entry.value = Value::Str(format!("{name}={value}"));
            }
        }
    }
}

/// Implicit networks, names, dependencies and such, on the whole project's tree.
pub fn normalize(root: &mut Node, project: &str, environment: &Environment) {
    implicit_networks(root);
    for service in services(root) {
        normalize_service(service, environment);
    }
    resource_names(root, project);
}

fn implicit_networks(root: &mut Node) {
    let mut uses_default = false;
    for service in services(root) {
        if service.contains_key("provider") || service.contains_key("network_mode") {
            continue;
        }
        let joins_none = match service.get("networks") {
            None => true,
            Some(node) => node.as_map().is_some_and(Map::is_empty),
        };
        if joins_none {
            let default = Map::from_iter([("default".into(), Node::null(Span::NONE))]);
            insert(service, "networks", Node::map(default, Span::NONE));
        }
        uses_default |= service
            .get("networks")
            .is_some_and(|node| node.get("default").is_some());
    }
    let Some(map) = root.as_map_mut() else { return };
    if !uses_default {
        return;
    }
    let networks = map
        .entry("networks".into())
        .or_insert_with(|| Node::map(Map::default(), Span::NONE));
    if let Some(networks) = networks.as_map_mut() {
        networks
            .entry("default".into())
            .or_insert_with(|| Node::null(Span::NONE));
    }
}

fn normalize_service(service: &mut Map, environment: &Environment) {
    if let Some(policy) = service.get_mut("pull_policy")
        && policy.as_str() == Some("if_not_present")
    {
        policy.value = Value::Str("missing".into());
    }
    if let Some(build) = map_at(service, "build") {
        if !build.contains_key("dockerfile") && !build.contains_key("dockerfile_inline") {
            build.insert("dockerfile".into(), Node::str("Dockerfile", Span::NONE));
        }
        if let Some(args) = build.get_mut("args") {
            fill(args, environment, false);
        }
    }
    if let Some(variables) = service.get_mut("environment") {
        fill(variables, environment, true);
    }
    implicit_dependencies(service);
    for volume in maps_at(service, "volumes") {
        if let Some(Value::Str(target)) = volume.get_mut("target").map(|n| &mut n.value) {
            *target = crate::canonical::clean_path(target);
        }
    }
}

/// Names without a value take it from the environment.
fn fill(node: &mut Node, environment: &Environment, keep_empty: bool) {
    match &mut node.value {
        Value::Map(map) => {
            map.retain(|name, value| {
                if !value.is_null() {
                    return true;
                }
                match environment.get(name) {
                    Some(found) => {
                        value.value = Value::Str(found.clone());
                        true
                    }
                    None => keep_empty,
                }
            });
        }
        Value::Seq(seq) => {
            seq.retain_mut(|entry| {
                let Value::Str(text) = &mut entry.value else {
                    return true;
                };
                if text.contains('=') {
                    return true;
                }
                match environment.get(text) {
                    Some(found) => {
                        *text = format!("{text}={found}");
                        true
                    }
                    None => keep_empty,
                }
            });
        }
        _ => {}
    }
}

/// `links`, `volumes_from` and `service:` namespaces imply `depends_on`.
fn implicit_dependencies(service: &mut Map) {
    let mut implied: Vec<(String, bool, Span)> = vec![];
    let texts = |key: &str| {
        service
            .get(key)
            .and_then(Node::as_seq)
            .unwrap_or_default()
            .iter()
            .filter_map(|node| Some((node.as_str()?.to_owned(), node.span)))
            .collect::<Vec<_>>()
    };
    for (link, span) in texts("links") {
        let name = match link.split(':').collect::<Vec<_>>().as_slice() {
            [name, _] => (*name).to_owned(),
            _ => link,
        };
        implied.push((name, true, span));
    }
    for key in ["network_mode", "ipc", "pid", "uts", "cgroup"] {
        if let Some(node) = service.get(key)
            && let Some(name) = node.as_str().and_then(|text| text.strip_prefix("service:"))
        {
            implied.push((name.to_owned(), true, node.span));
        }
    }
    for (from, span) in texts("volumes_from") {
        if !from.starts_with("container:") {
            let name = from.split(':').next().unwrap_or_default().to_owned();
            implied.push((name, false, span));
        }
    }
    if implied.is_empty() {
        return;
    }
    let depends_on = service
        .entry("depends_on".into())
        .or_insert_with(|| Node::map(Map::default(), Span::NONE));
    let Some(depends_on) = depends_on.as_map_mut() else {
        return;
    };
    for (name, restart, span) in implied {
        depends_on.entry(name).or_insert_with(|| {
            Node::map(
                Map::from_iter([
                    ("condition".into(), Node::str("service_started", span)),
                    ("restart".into(), Node::bool(restart, Span::NONE)),
                    ("required".into(), Node::bool(true, span)),
                ]),
                span,
            )
        });
    }
}

/// Resources without a name have the project's and their key, external ones their key.
fn resource_names(root: &mut Node, project: &str) {
    let Some(map) = root.as_map_mut() else { return };
    for section in ["networks", "volumes", "configs", "secrets"] {
        let Some(resources) = map_at(map, section) else {
            continue;
        };
        for (key, node) in resources {
            if node.is_null() {
                node.value = Value::Map(Map::default());
            }
            let Some(resource) = node.as_map_mut() else {
                continue;
            };
            let named = resource.get("name").is_some_and(|name| !name.is_null());
            if !named {
                let external = resource.get("external").and_then(Node::as_bool) == Some(true);
                let name = if external {
                    key.clone()
                } else {
                    format!("{project}_{key}")
                };
                resource.insert("name".into(), Node::str(name, Span::NONE));
            }
        }
    }
}
