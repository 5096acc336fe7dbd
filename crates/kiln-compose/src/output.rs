//! Prints trees: as JSON, and as YAML that both kiln and compose read back the same.

use serde_json::{Map as JsonMap, Number, Value as Json};

use crate::node::{Node, Value};

/// A tree as it is, without any typing.
pub fn to_json(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(value) => Json::Bool(*value),
        Value::Int(value) => Json::from(*value),
        Value::Float(value) => Number::from_f64(*value).map_or(Json::Null, Json::Number),
        Value::Str(text) => Json::String(text.clone()),
        Value::Seq(seq) => Json::Array(seq.iter().map(to_json).collect()),
        Value::Map(map) => Json::Object(
            map.iter()
                .map(|(key, node)| (key.clone(), to_json(node)))
                .collect(),
        ),
    }
}

/// With the keys of every mapping in order.
pub fn sorted(json: Json) -> Json {
    match json {
        Json::Object(map) => {
            let mut entries: Vec<(String, Json)> = map.into_iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Json::Object(entries.into_iter().map(|(k, v)| (k, sorted(v))).collect())
        }
        Json::Array(list) => Json::Array(list.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Doubles every dollar sign, so that what is printed can be read as a compose file again.
pub fn escape_dollars(json: &mut Json) {
    match json {
        Json::String(text) => *text = text.replace('$', "$$"),
        Json::Array(list) => list.iter_mut().for_each(escape_dollars),
        Json::Object(map) => {
            let old = std::mem::take(map);
            *map = old
                .into_iter()
                .map(|(key, mut value)| {
                    escape_dollars(&mut value);
                    (key.replace('$', "$$"), value)
                })
                .collect::<JsonMap<_, _>>();
        }
        _ => {}
    }
}

/// Block YAML. Texts that any YAML reader could take for something else are quoted.
pub fn to_yaml(json: &Json) -> String {
    let mut out = String::new();
    block(json, 0, &mut out);
    out
}

fn block(json: &Json, indent: usize, out: &mut String) {
    match json {
        Json::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                out.push_str(&" ".repeat(indent));
                out.push_str(&text(key));
                out.push(':');
                after(value, indent + 2, out);
            }
        }
        Json::Array(list) if !list.is_empty() => {
            for value in list {
                out.push_str(&" ".repeat(indent));
                out.push('-');
                item(value, indent + 2, out);
            }
        }
        other => {
            out.push_str(&flat(other));
            out.push('\n');
        }
    }
}

fn is_block(json: &Json) -> bool {
    match json {
        Json::Object(map) => !map.is_empty(),
        Json::Array(list) => !list.is_empty(),
        _ => false,
    }
}

fn after(value: &Json, indent: usize, out: &mut String) {
    if is_block(value) {
        out.push('\n');
        block(value, indent, out);
    } else {
        out.push(' ');
        out.push_str(&flat(value));
        out.push('\n');
    }
}

/// The first line of a nested block stands beside the dash.
fn item(value: &Json, indent: usize, out: &mut String) {
    let mut inner = String::new();
    if is_block(value) {
        block(value, indent, &mut inner);
        out.push(' ');
        out.push_str(inner.trim_start());
    } else {
        after(value, indent, out);
    }
}

fn flat(json: &Json) -> String {
    match json {
        Json::Null => "null".into(),
        Json::String(value) => text(value),
        Json::Array(_) => "[]".into(),
        Json::Object(_) => "{}".into(),
        other => other.to_string(),
    }
}

fn text(value: &str) -> String {
    const WORDS: [&str; 11] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf",
    ];
    let first_ok = value
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || matches!(b, b'/' | b'_'));
    let rest_ok = value
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'_' | b'.' | b'-' | b'+' | b'@'));
    let word = WORDS.iter().any(|word| value.eq_ignore_ascii_case(word));
    if first_ok && rest_ok && !word {
        return value.to_owned();
    }
    // A JSON text is a YAML text in double quotes.
    Json::String(value.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn yaml_reads_back_as_what_was_printed() {
        let json = serde_json::json!({
            "a": {"b": [1, 2.5, "x: y", "no", "0777", "", "a\nb", "é", "~", "-", "#c"]},
            "list": [{"k": "v", "l": [["n"]]}, [], {}],
            "n": null, "t": true, "y": "y", "1": "one", "multi line": "<<"
        });
        let yaml = to_yaml(&json);
        let back = crate::yaml::parse(&yaml, 0).expect("valid YAML").remove(0);
        assert_eq!(to_json(&back), json, "{yaml}");
    }

    #[test]
    fn dollars_are_doubled() {
        let mut json = serde_json::json!({"$a": ["$x", 1]});
        escape_dollars(&mut json);
        assert_eq!(json, serde_json::json!({"$$a": ["$$x", 1]}));
    }
}
