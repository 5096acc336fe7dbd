//! Turns every short form into its long form, so that what follows knows only one.
//! The tree has passed the schema before; what is still wrong is reported.

use crate::diag::{Code, Diagnostic, Diagnostics};
use crate::node::{Map, Node, Value, insert};
use crate::short;

/// Makes the whole file's tree canonical.
pub fn canonical(root: &mut Node, diagnostics: &mut Diagnostics) {
    let Some(map) = root.as_map_mut() else { return };
    if let Some(Value::Map(services)) = map.get_mut("services").map(|n| &mut n.value) {
        for service in services.values_mut() {
            if let Value::Map(service) = &mut service.value {
                canonical_service(service, diagnostics);
            }
        }
    }
    for kind in ["volumes", "networks", "secrets", "configs"] {
        if let Some(Value::Map(resources)) = map.get_mut(kind).map(|n| &mut n.value) {
            for (name, resource) in resources {
                if let Value::Map(resource) = &mut resource.value {
                    external(kind, name, resource, diagnostics);
                }
            }
        }
    }
}

fn canonical_service(service: &mut Map, diagnostics: &mut Diagnostics) {
    if let Some(build) = service.get_mut("build") {
        canonical_build(build, diagnostics);
    }
    each(service, "depends_on", depends_on);
    each(service, "env_file", env_file);
    each(service, "label_file", list);
    each(service, "dns", |node| {
        list(node);
        if let Some(seq) = node.as_seq_mut() {
            seq.retain(|item| !item.is_null() && item.as_str() != Some(""));
        }
    });
    each(service, "networks", names);
    each(service, "models", names);
    each(service, "extends", |node| {
        if let Value::Str(name) = &node.value {
            let name = Node::str(name.clone(), node.span);
            node.value = Value::Map(Map::from_iter([("service".into(), name)]));
        }
    });
    each(service, "gpus", |node| {
        if node.as_str().is_some() {
            let count = Node::str("all", node.span);
            let request = Node::map(Map::from_iter([("count".into(), count)]), node.span);
            node.value = Value::Seq(vec![request]);
        }
    });
    for key in ["secrets", "configs"] {
        each(service, key, file_mounts);
    }
    warn_of_options(service, diagnostics);
    items(service, "volumes", diagnostics, volume);
    items(service, "devices", diagnostics, device);
    if let Some(node) = service.get_mut("ports") {
        ports(node, diagnostics);
    }
    if let Some(Value::Seq(watch)) = service
        .get_mut("develop")
        .and_then(Node::as_map_mut)
        .and_then(|develop| develop.get_mut("watch"))
        .map(|node| &mut node.value)
    {
        for rule in watch.iter_mut().filter_map(Node::as_map_mut) {
            each(rule, "ignore", list);
            each(rule, "include", list);
        }
    }
}

fn each(map: &mut Map, key: &str, change: impl FnOnce(&mut Node)) {
    if let Some(node) = map.get_mut(key) {
        change(node);
    }
}

/// Changes each item; a mistake names the item.
fn items(
    map: &mut Map,
    key: &str,
    diagnostics: &mut Diagnostics,
    change: fn(&mut Node) -> Result<(), String>,
) {
    let Some(Value::Seq(seq)) = map.get_mut(key).map(|node| &mut node.value) else {
        return;
    };
    for item in seq {
        if let Err(what) = change(item) {
            diagnostics.error(Code::Schema, item.span, format!("{key}: {what}"));
        }
    }
}

fn canonical_build(build: &mut Node, diagnostics: &mut Diagnostics) {
    if let Value::Str(context) = &build.value {
        let context = Node::str(context.clone(), build.span);
        build.value = Value::Map(Map::from_iter([("context".into(), context)]));
    }
    let Some(map) = build.as_map_mut() else {
        return;
    };
    each(map, "secrets", file_mounts);
    for key in ["provenance", "sbom"] {
        each(map, key, |node| {
            if let Some(text) = node.text() {
                node.value = Value::Str(text);
            }
        });
    }
    if let Some(node) = map.get_mut("additional_contexts") {
        key_values(node, diagnostics);
    }
    if let Some(node) = map.get_mut("ssh") {
        ssh(node, diagnostics);
    }
}

fn list(node: &mut Node) {
    if node.as_str().is_some() {
        let item = Node::new(std::mem::replace(&mut node.value, Value::Null), node.span);
        node.value = Value::Seq(vec![item]);
    }
}

fn names(node: &mut Node) {
    if let Value::Seq(seq) = &node.value {
        node.value = Value::Map(
            seq.iter()
                .filter_map(|item| Some((item.as_str()?.to_owned(), Node::null(item.span))))
                .collect(),
        );
    }
}

fn depends_on(node: &mut Node) {
    let span = node.span;
    match &mut node.value {
        Value::Seq(seq) => {
            node.value = Value::Map(
                seq.iter()
                    .filter_map(|item| {
                        Some((item.as_str()?.to_owned(), short::dependency(item.span)))
                    })
                    .collect(),
            );
        }
        Value::Map(map) => {
            for dependency in map.values_mut().filter_map(Node::as_map_mut) {
                dependency
                    .entry("condition".into())
                    .or_insert_with(|| Node::str("service_started", span));
                dependency
                    .entry("required".into())
                    .or_insert_with(|| Node::bool(true, span));
            }
        }
        _ => {}
    }
}

fn env_file(node: &mut Node) {
    list(node);
    for item in node.as_seq_mut().into_iter().flatten() {
        let span = item.span;
        if let Value::Str(path) = &item.value {
            let path = Node::str(path.clone(), span);
            item.value = Value::Map(Map::from_iter([("path".into(), path)]));
        }
        if let Some(map) = item.as_map_mut() {
            map.entry("required".into())
                .or_insert_with(|| Node::bool(true, span));
        }
    }
}

fn file_mounts(node: &mut Node) {
    for item in node.as_seq_mut().into_iter().flatten() {
        if let Value::Str(source) = &item.value {
            let source = Node::str(source.clone(), item.span);
            item.value = Value::Map(Map::from_iter([("source".into(), source)]));
        }
    }
}

fn key_values(node: &mut Node, diagnostics: &mut Diagnostics) {
    let Value::Seq(seq) = &node.value else { return };
    let mut map = Map::default();
    for item in seq {
        match item.as_str().and_then(|text| text.split_once('=')) {
            Some((key, value)) => {
                map.insert(key.to_owned(), Node::str(value, item.span));
            }
            None => diagnostics.push(Diagnostic::error(
                Code::Schema,
                item.span,
                format!(
                    "additional_contexts: `{}`: expected name=value",
                    item.text().unwrap_or_default()
                ),
            )),
        }
    }
    node.value = Value::Map(map);
}

fn ssh(node: &mut Node, diagnostics: &mut Diagnostics) {
    let Value::Seq(seq) = &node.value else { return };
    let mut map = Map::default();
    for item in seq {
        let text = item.as_str().unwrap_or_default();
        match text.split_once('=') {
            Some((id, path)) => {
                map.insert(id.to_owned(), Node::str(path, item.span));
            }
            None if text == "default" => {
                map.insert(text.to_owned(), Node::null(item.span));
            }
            None => diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    item.span,
                    format!("ssh: `{text}` is not an ssh key"),
                )
                .hint("write `default` or `id=path`"),
            ),
        }
    }
    node.value = Value::Map(map);
}

/// Compose drops what it doesn't know in a short form; kiln says so.
fn warn_of_options(service: &Map, diagnostics: &mut Diagnostics) {
    let volumes = service.get("volumes").and_then(Node::as_seq);
    for node in volumes.unwrap_or_default() {
        for option in short::unknown_volume_options(node.as_str().unwrap_or_default()) {
            diagnostics.push(Diagnostic::warning(
                node.span,
                format!("the volume option `{option}` has no effect"),
            ));
        }
    }
}

fn volume(node: &mut Node) -> Result<(), String> {
    let Value::Str(text) = &node.value else {
        return Ok(());
    };
    let span = node.span;
    let short = short::volume(text)?;
    let mut map = Map::default();
    let mut put = |key: &str, value: Node| {
        map.insert(key.to_owned(), value);
    };
    put("type", Node::str(short.kind, span));
    if !short.source.is_empty() {
        put("source", Node::str(short.source, span));
    }
    put("target", Node::str(clean_path(&short.target), span));
    if short.read_only {
        put("read_only", Node::bool(true, span));
    }
    let mut bind = Map::default();
    for (key, value) in [
        ("selinux", short.selinux),
        ("propagation", short.propagation),
    ] {
        if let Some(value) = value {
            bind.insert(key.into(), Node::str(value, span));
        }
    }
    if short.kind == "bind" {
        bind.insert("create_host_path".into(), Node::bool(true, span));
    }
    if !bind.is_empty() {
        put("bind", Node::map(bind, span));
    }
    if short.nocopy || (short.kind == "volume" && !short.tiny) {
        let mut options = Map::default();
        if short.nocopy {
            options.insert("nocopy".into(), Node::bool(true, span));
        }
        put("volume", Node::map(options, span));
    }
    node.value = Value::Map(map);
    Ok(())
}

/// Go's `path.Clean`: no `.`, no `..` that can go, no double or trailing slash.
pub fn clean_path(path: &str) -> String {
    if path.is_empty() {
        return String::new();
    }
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(".."),
            },
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".into(),
        (false, false) => joined,
    }
}

fn device(node: &mut Node) -> Result<(), String> {
    let Value::Str(text) = &node.value else {
        return Ok(());
    };
    let (source, target, permissions) = short::device(text)?;
    let span = node.span;
    node.value = Value::Map(Map::from_iter([
        ("source".into(), Node::str(source, span)),
        ("target".into(), Node::str(target, span)),
        ("permissions".into(), Node::str(permissions, span)),
    ]));
    Ok(())
}

fn ports(node: &mut Node, diagnostics: &mut Diagnostics) {
    let Value::Seq(seq) = &mut node.value else {
        return;
    };
    let mut out = Vec::with_capacity(seq.len());
    for item in seq.drain(..) {
        if item.as_map().is_some() {
            out.push(item);
            continue;
        }
        let text = item.text().unwrap_or_default();
        match short::ports(&text) {
            Ok(ports) => out.extend(ports.into_iter().map(|port| long_port(port, &item))),
            Err(what) => {
                diagnostics.error(Code::Schema, item.span, format!("ports: {what}"));
                out.push(item);
            }
        }
    }
    *seq = out;
}

fn long_port(port: short::ShortPort, item: &Node) -> Node {
    let span = item.span;
    let mut map = Map::from_iter([("mode".into(), Node::str("ingress", span))]);
    if !port.host_ip.is_empty() {
        map.insert("host_ip".into(), Node::str(port.host_ip, span));
    }
    let target = Value::Int(i64::from(port.target));
    map.insert("target".into(), Node::new(target, span));
    if !port.published.is_empty() {
        map.insert("published".into(), Node::str(port.published, span));
    }
    map.insert("protocol".into(), Node::str(port.protocol, span));
    Node::map(map, span)
}

/// `external: {name: x}` is the old form of `external: true` with `name: x`.
fn external(kind: &str, key: &str, resource: &mut Map, diagnostics: &mut Diagnostics) {
    let Some(node) = resource.get("external") else {
        return;
    };
    let Value::Map(old) = &node.value else { return };
    let (span, old_name) = (node.span, old.get("name").cloned());
    insert(resource, "external", Node::bool(true, span));
    let Some(old_name) = old_name else { return };
    diagnostics.push(Diagnostic::warning(
        span,
        format!("{kind}.{key}: external.name is deprecated; use `name` and `external: true`"),
    ));
    match resource.get("name") {
        Some(name) if name.value != old_name.value => diagnostics.push(
            Diagnostic::error(
                Code::Conflict,
                old_name.span,
                format!("{kind}.{key}: name and external.name differ; use only name"),
            )
            .also(name.span, "name is here"),
        ),
        Some(_) => {}
        None => {
            resource.insert("name".into(), old_name);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn paths_are_cleaned() {
        for (path, clean) in [
            ("/a/../b//c/.", "/b/c"),
            ("/../a/", "/a"),
            ("a/..", "."),
            ("../x", "../x"),
            ("/", "/"),
        ] {
            assert_eq!(clean_path(path), clean);
        }
    }

    #[test]
    fn a_service_in_long_form() {
        let text = "services: {a: {build: ., depends_on: [b], env_file: e, networks: [n], secrets: [s], ports: [80], volumes: ['d1:/x/'], devices: [/dev/a], extends: o, gpus: all}}";
        let mut node = crate::yaml::parse(text, 0).unwrap().remove(0);
        let mut diagnostics = Diagnostics::default();
        canonical(&mut node, &mut diagnostics);
        assert!(!diagnostics.has_errors());
        let json = crate::output::to_json(node.at(&["services", "a"]).unwrap());
        assert_eq!(
            json,
            serde_json::json!({
                "build": {"context": "."},
                "depends_on": {"b": {"condition": "service_started", "required": true}},
                "env_file": [{"path": "e", "required": true}],
                "networks": {"n": null},
                "secrets": [{"source": "s"}],
                "ports": [{"mode": "ingress", "target": 80, "protocol": "tcp"}],
                "volumes": [{"type": "volume", "source": "d1", "target": "/x", "volume": {}}],
                "devices": [{"source": "/dev/a", "target": "/dev/a", "permissions": "rwm"}],
                "extends": {"service": "o"},
                "gpus": [{"count": "all"}],
            })
        );
    }
}
