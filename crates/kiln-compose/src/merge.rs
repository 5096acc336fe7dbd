//! How one compose file acts over another: mappings merge, lists append, with the
//! specification's exceptions, `!reset` and `!override`; then what may stand in a list only
//! once (by target, by name) is made unique, the later winning.

use std::collections::HashMap;

use crate::diag::{Code, Diagnostic, Diagnostics};
use crate::node::{Map, Node, Tag, Value};
use crate::short;

/// Takes out of `base` what `over` marks with `!reset` or `!override`.
pub fn apply_tags(base: &mut Node, over: &Node) {
    let (Value::Map(base), Value::Map(over)) = (&mut base.value, &over.value) else {
        return;
    };
    for (key, node) in over {
        if node.tag != Tag::None {
            base.shift_remove(key);
        } else if let Some(inner) = base.get_mut(key) {
            apply_tags(inner, node);
        }
    }
}

/// Ends the work of the tags: `!reset` keys go, the others become ordinary.
pub fn strip_tags(node: &mut Node) {
    node.tag = Tag::None;
    match &mut node.value {
        Value::Map(map) => {
            map.retain(|_, inner| inner.tag != Tag::Reset);
            map.values_mut().for_each(strip_tags);
        }
        Value::Seq(seq) => {
            seq.retain(|inner| inner.tag != Tag::Reset);
            seq.iter_mut().for_each(strip_tags);
        }
        _ => {}
    }
}

/// Merges `over` into `base`, which stands at `path`. What cannot be merged is reported and
/// `base` kept.
pub fn merge(base: &mut Node, over: Node, path: &mut Vec<String>, diagnostics: &mut Diagnostics) {
    if let Some(rule) = rule_for(path) {
        return apply_rule(rule, base, over, path, diagnostics);
    }
    if over.is_null() {
        return;
    }
    match (&mut base.value, over.value) {
        (Value::Map(into), Value::Map(from)) => merge_maps(into, from, path, diagnostics),
        (Value::Seq(into), Value::Seq(from)) => into.extend(from),
        (Value::Map(_) | Value::Seq(_), other) => {
            let over = Node {
                value: other,
                ..over
            };
            diagnostics.push(cannot_merge(base, &over, path));
        }
        (_, value) => *base = Node { value, ..over },
    }
}

fn cannot_merge(base: &Node, over: &Node, path: &[String]) -> Diagnostic {
    Diagnostic::error(
        Code::Schema,
        over.span,
        format!(
            "cannot override {}: it is {} here and {} before",
            path.join("."),
            over.kind(),
            base.kind()
        ),
    )
    .also(base.span, "before")
    .hint("use the same form in both, or mark this one with !override")
}

fn merge_maps(into: &mut Map, from: Map, path: &mut Vec<String>, diagnostics: &mut Diagnostics) {
    for (key, node) in from {
        match into.get_mut(&key) {
            None => {
                into.insert(key, node);
            }
            Some(base) => {
                path.push(key);
                merge(base, node, path, diagnostics);
                path.pop();
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `KEY=value` lists and mappings: both become lists.
    Sequence,
    ExtraHosts,
    Build,
    /// Lists of names become mappings to nothing.
    Names,
    DependsOn,
    Replace,
    Logging,
    Ipam,
}

fn rule_for(path: &[String]) -> Option<Rule> {
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let rule = match parts.as_slice() {
        ["networks", _, "ipam", "config"] => Rule::Ipam,
        ["networks" | "volumes", _, "labels"] => Rule::Sequence,
        ["services", _, rest @ ..] => match rest {
            ["build"] => Rule::Build,
            ["build", "args" | "additional_contexts" | "labels"] => Rule::Sequence,
            ["extra_hosts"] | ["build", "extra_hosts"] => Rule::ExtraHosts,
            ["command" | "entrypoint"] | ["healthcheck", "test"] | ["ulimits", _] => Rule::Replace,
            ["depends_on"] => Rule::DependsOn,
            ["networks" | "models"] => Rule::Names,
            ["logging"] => Rule::Logging,
            ["deploy", "labels"] => Rule::Sequence,
            [
                "annotations" | "dns" | "dns_opt" | "dns_search" | "env_file" | "label_file"
                | "environment" | "labels" | "sysctls" | "tmpfs",
            ] => Rule::Sequence,
            _ => return None,
        },
        _ => return None,
    };
    Some(rule)
}

fn apply_rule(
    rule: Rule,
    base: &mut Node,
    over: Node,
    path: &mut Vec<String>,
    diagnostics: &mut Diagnostics,
) {
    match rule {
        Rule::Replace => *base = over,
        Rule::Sequence | Rule::ExtraHosts => {
            let mut list = to_sequence(base);
            let more = to_sequence(&over);
            let known: Vec<Value> = list.iter().map(|node| node.value.clone()).collect();
            list.extend(
                more.into_iter()
                    .filter(|node| rule == Rule::Sequence || !known.contains(&node.value)),
            );
            base.value = Value::Seq(list);
        }
        Rule::Build | Rule::Names | Rule::DependsOn => {
            let mut into = to_mapping(rule, base);
            let from = to_mapping(rule, &over);
            merge_maps(&mut into, from, path, diagnostics);
            base.value = Value::Map(into);
        }
        Rule::Logging => merge_logging(base, over, path, diagnostics),
        Rule::Ipam => merge_ipam(base, &over, path, diagnostics),
    }
}

/// A mapping as a sorted list of `key=value`, a text as a list of one.
fn to_sequence(node: &Node) -> Vec<Node> {
    match &node.value {
        Value::Seq(seq) => seq.clone(),
        Value::Str(_) => vec![node.clone()],
        Value::Map(map) => {
            let mut list: Vec<Node> = map
                .iter()
                .flat_map(|(key, value)| pairs(key, value))
                .collect();
            list.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            list
        }
        _ => vec![],
    }
}

fn pairs(key: &str, value: &Node) -> Vec<Node> {
    let make = |text: String, from: &Node| Node {
        value: Value::Str(text),
        span: from.span,
        key: from.key,
        tag: Tag::None,
    };
    match &value.value {
        Value::Null => vec![make(key.to_owned(), value)],
        Value::Seq(seq) => seq
            .iter()
            .map(|item| make(format!("{key}={}", item.text().unwrap_or_default()), item))
            .collect(),
        _ => vec![make(
            format!("{key}={}", value.text().unwrap_or_default()),
            value,
        )],
    }
}

fn to_mapping(rule: Rule, node: &Node) -> Map {
    match &node.value {
        Value::Map(map) => map.clone(),
        Value::Str(text) if rule == Rule::Build => {
            Map::from_iter([("context".into(), Node::str(text.clone(), node.span))])
        }
        Value::Seq(seq) => seq
            .iter()
            .filter_map(|item| {
                let value = if rule == Rule::DependsOn {
                    short::dependency(item.span)
                } else {
                    Node::null(item.span)
                };
                Some((item.as_str()?.to_owned(), value))
            })
            .collect(),
        _ => Map::default(),
    }
}

/// Options merge only between the same drivers.
fn merge_logging(
    base: &mut Node,
    over: Node,
    path: &mut Vec<String>,
    diagnostics: &mut Diagnostics,
) {
    if over.is_null() {
        return;
    }
    let driver = |node: &Node| node.get("driver").and_then(Node::text);
    let (ours, theirs) = (driver(base), driver(&over));
    let same = ours.is_none() || theirs.is_none() || ours == theirs;
    match (&mut base.value, over.value) {
        (Value::Map(into), Value::Map(from)) if same => {
            merge_maps(into, from, path, diagnostics);
        }
        (_, value) => *base = Node { value, ..over },
    }
}

/// Pools merge by subnet.
fn merge_ipam(base: &mut Node, over: &Node, path: &mut Vec<String>, diagnostics: &mut Diagnostics) {
    let (Some(ours), Some(theirs)) = (base.as_seq_mut(), over.as_seq()) else {
        diagnostics.push(cannot_merge(base, over, path));
        return;
    };
    let subnet = |node: &Node| node.get("subnet").and_then(Node::text);
    for pool in theirs {
        let same = ours.iter_mut().find(|our| subnet(our) == subnet(pool));
        match (same, &pool.value) {
            (
                Some(Node {
                    value: Value::Map(into),
                    ..
                }),
                Value::Map(from),
            ) => {
                merge_maps(into, from.clone(), path, diagnostics);
            }
            _ => ours.push(pool.clone()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Identity {
    KeyValue,
    Volume,
    Device,
    Expose,
    Mount(&'static str),
    Port,
    EnvFile,
}

fn identity_for(path: &[&str]) -> Option<Identity> {
    let identity = match path {
        ["networks", _, "labels"] | ["networks", _, "ipam", "options"] => Identity::KeyValue,
        ["services", _, rest @ ..] => match rest {
            [
                "build",
                "args" | "additional_contexts" | "platform" | "tags" | "labels",
            ] => Identity::KeyValue,
            ["networks", _, "aliases" | "link_local_ips"] | ["deploy", "labels"] => {
                Identity::KeyValue
            }
            ["configs"] => Identity::Mount(""),
            ["secrets"] => Identity::Mount("/run/secrets"),
            ["devices"] => Identity::Device,
            ["volumes"] => Identity::Volume,
            ["expose"] => Identity::Expose,
            ["ports"] => Identity::Port,
            ["env_file"] => Identity::EnvFile,
            [
                "annotations" | "cap_add" | "cap_drop" | "dns" | "dns_opt" | "dns_search"
                | "environment" | "labels" | "links" | "profiles" | "sysctls" | "tmpfs",
            ] => Identity::KeyValue,
            _ => return None,
        },
        _ => return None,
    };
    Some(identity)
}

/// Leaves of each item only the last, at the place of the first.
pub fn unique(node: &mut Node) {
    unique_at(node, &mut vec![]);
}

fn unique_at<'n>(node: &'n mut Node, path: &mut Vec<&'n str>) {
    match &mut node.value {
        Value::Map(map) => {
            for (key, inner) in map {
                path.push(key);
                unique_at(inner, path);
                path.pop();
            }
        }
        Value::Seq(seq) => {
            let Some(identity) = identity_for(path) else {
                return;
            };
            let mut at: HashMap<String, usize> = HashMap::new();
            let mut kept: Vec<Node> = Vec::with_capacity(seq.len());
            for item in seq.drain(..) {
                // What has no identity is of a wrong form, which the schema reports.
                let Some(key) = identify(identity, &item) else {
                    kept.push(item);
                    continue;
                };
                match at.get(&key) {
                    Some(first) => kept[*first] = item,
                    None => {
                        at.insert(key, kept.len());
                        kept.push(item);
                    }
                }
            }
            *seq = kept;
        }
        _ => {}
    }
}

fn identify(identity: Identity, item: &Node) -> Option<String> {
    let field = |key: &str| item.get(key).and_then(Node::text);
    let text = item.as_str();
    match identity {
        Identity::KeyValue => {
            let text = text?;
            Some(text.split_once('=').map_or(text, |(key, _)| key).to_owned())
        }
        Identity::Volume => match text {
            Some(text) => short::volume(text).ok().map(|volume| volume.target),
            None => field("target"),
        },
        Identity::Device => match text {
            Some(text) => {
                let mut parts = text.split(':');
                let source = parts.next()?;
                Some(parts.next().unwrap_or(source).to_owned())
            }
            None => field("target").or_else(|| field("source")),
        },
        Identity::Expose => item.text(),
        Identity::Mount(folder) => match text {
            Some(text) => Some(format!("{folder}/{text}")),
            None => field("target").or_else(|| Some(format!("{folder}/{}", field("source")?))),
        },
        Identity::Port => match item.as_map() {
            Some(_) => Some(format!(
                "{}:{}:{}/{}",
                field("host_ip").unwrap_or_else(|| "0.0.0.0".into()),
                field("published").unwrap_or_default(),
                field("target")?,
                field("protocol").unwrap_or_else(|| "tcp".into()),
            )),
            None => item.text(),
        },
        Identity::EnvFile => text.map(str::to_owned).or_else(|| field("path")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn node(text: &str) -> Node {
        crate::yaml::parse(text, 0).unwrap().remove(0)
    }

    fn merged(base: &str, over: &str) -> String {
        let (mut base, mut over) = (node(base), node(over));
        let mut diagnostics = Diagnostics::default();
        apply_tags(&mut base, &over);
        strip_tags(&mut over);
        merge(&mut base, over, &mut vec![], &mut diagnostics);
        unique(&mut base);
        let problems: Vec<_> = diagnostics.into_list();
        assert_eq!(problems, vec![]);
        crate::output::to_json(&base).to_string()
    }

    fn service(base: &str, over: &str) -> String {
        let wrap = |text: &str| format!("services: {{a: {{{text}}}}}");
        let out = merged(&wrap(base), &wrap(over));
        out.strip_prefix(r#"{"services":{"a":{"#)
            .and_then(|rest| rest.strip_suffix("}}}"))
            .unwrap()
            .to_owned()
    }

    #[test]
    fn each_rule() {
        for (base, over, result) in [
            ("command: [a]", "command: [b]", r#""command":["b"]"#),
            (
                "environment: {A: 1, B: 2}",
                "environment: [A=3]",
                r#""environment":["A=3","B=2"]"#,
            ),
            (
                "ports: ['1:1']",
                "ports: ['1:1', '2:2']",
                r#""ports":["1:1","2:2"]"#,
            ),
            (
                "volumes: ['./x:/a', '/b']",
                "volumes: ['v1:/a']",
                r#""volumes":["v1:/a","/b"]"#,
            ),
            (
                "build: .",
                "build: {target: t}",
                r#""build":{"context":".","target":"t"}"#,
            ),
            (
                "networks: [n]",
                "networks: {m: {priority: 1}}",
                r#""networks":{"n":null,"m":{"priority":1}}"#,
            ),
            (
                "logging: {driver: a, options: {x: 1}}",
                "logging: {driver: b}",
                r#""logging":{"driver":"b"}"#,
            ),
            (
                "logging: {driver: a, options: {x: 1}}",
                "logging: {options: {y: 2}}",
                r#""logging":{"driver":"a","options":{"x":1,"y":2}}"#,
            ),
            ("tmpfs: /a", "tmpfs: [/b, /a]", r#""tmpfs":["/a","/b"]"#),
            (
                "extra_hosts: ['a:1', 'b:2']",
                "extra_hosts: ['a:1', 'a:3']",
                r#""extra_hosts":["a:1","b:2","a:3"]"#,
            ),
            ("ports: ['1:1']", "ports: !reset []", ""),
            (
                "ports: ['1:1']",
                "ports: !override ['3:3']",
                r#""ports":["3:3"]"#,
            ),
            (
                "environment: {A: 1, B: 2}",
                "environment: {A: !reset null}",
                r#""environment":["B=2"]"#,
            ),
            ("image: a", "image: null", r#""image":"a""#),
            (
                "ulimits: {nofile: {soft: 1, hard: 2}}",
                "ulimits: {nofile: 5}",
                r#""ulimits":{"nofile":5}"#,
            ),
        ] {
            assert_eq!(service(base, over), result, "{base} / {over}");
        }
    }

    #[test]
    fn different_forms_are_refused_with_both_places() {
        let mut base = node("services: {a: {cap_add: [X]}}");
        let mut diagnostics = Diagnostics::default();
        merge(
            &mut base,
            node("services: {a: {cap_add: X}}"),
            &mut vec![],
            &mut diagnostics,
        );
        let found = diagnostics.into_list();
        assert_eq!(found.len(), 1);
        assert!(found[0].message.contains("services.a.cap_add"));
        assert_eq!(found[0].related.len(), 1);
    }
}
