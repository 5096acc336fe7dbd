//! Values of a canonical tree, read as the types the specification gives them.

use serde_json::{Map as JsonMap, Number, Value as Json};

use crate::node::{Node, Value};
use crate::short;
use crate::units;

/// What is printed; `None`: left out.
pub type Bound = Result<Option<Json>, String>;

/// A boolean, also as the text that compose casts.
pub fn boolean(node: &Node) -> Result<bool, String> {
    let text = || node.text().unwrap_or_default();
    node.as_bool()
        .or_else(|| units::parse_bool(node.as_str()?))
        .ok_or_else(|| format!("`{}` is not a boolean; write `true` or `false`", text()))
}

/// A whole number, also as text.
pub fn integer(node: &Node) -> Result<i64, String> {
    let text = || node.text().unwrap_or_default();
    let number = match &node.value {
        Value::Int(number) => Some(*number),
        Value::Str(text) => text.trim().parse().ok(),
        #[allow(clippy::cast_possible_truncation)]
        Value::Float(number) if number.fract() == 0.0 && number.abs() < 9e15 => {
            Some(*number as i64)
        }
        _ => None,
    };
    number.ok_or_else(|| format!("`{}` is not a whole number", text()))
}

/// A number, also as text.
pub fn number(node: &Node) -> Result<f64, String> {
    let text = node.text().unwrap_or_default();
    text.parse()
        .map_err(|_| format!("`{text}` is not a number"))
}

pub fn float(node: &Node) -> Bound {
    // Single precision, as compose holds it.
    #[allow(clippy::cast_possible_truncation)]
    let single = number(node)? as f32;
    let value = units::go_float32(single).parse::<f64>().unwrap_or(0.0);
    #[allow(clippy::cast_possible_truncation)]
    let whole = (value.fract() == 0.0 && value.abs() < 9e15).then_some(value as i64);
    Ok(match whole {
        Some(0) => None,
        Some(whole) => Some(Json::from(whole)),
        None => Number::from_f64(value).map(Json::Number),
    })
}

/// A size in bytes.
pub fn bytes(node: &Node) -> Result<i64, String> {
    match &node.value {
        Value::Int(number) => Ok(*number),
        _ => units::parse_bytes(&node.text().unwrap_or_default()),
    }
}

/// A duration in nanoseconds.
pub fn duration(node: &Node) -> Result<i64, String> {
    units::parse_duration(&node.text().unwrap_or_default())
}

/// A text or a list of texts.
pub fn texts(node: &Node) -> Option<Vec<String>> {
    match &node.value {
        Value::Seq(seq) => Some(seq.iter().filter_map(Node::text).collect()),
        _ => node.text().map(|text| vec![text]),
    }
}

/// A command: a list, or a text split as a shell does.
pub fn command(node: &Node) -> Result<Vec<String>, String> {
    match &node.value {
        Value::Str(text) => Ok(short::words(text)?.words),
        _ => Ok(texts(node).unwrap_or_default()),
    }
}

pub fn health_test(node: &Node) -> Option<Vec<String>> {
    match &node.value {
        Value::Str(text) => Some(vec!["CMD-SHELL".into(), text.clone()]),
        _ => texts(node),
    }
}

/// `KEY=value` lists and mappings, sorted; a name without a value has none.
pub fn key_values(node: &Node) -> Result<Vec<(String, Option<String>)>, String> {
    let mut out: Vec<(String, Option<String>)> = match &node.value {
        Value::Map(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), value.text()))
            .collect(),
        Value::Seq(seq) => seq
            .iter()
            .filter_map(Node::text)
            .map(|text| match text.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (text, None),
            })
            .collect(),
        _ => vec![],
    };
    if let Some((key, _)) = out
        .iter()
        .find(|(key, _)| key.ends_with(char::is_whitespace))
    {
        return Err(format!("the name `{key}` ends with a space"));
    }
    // The last of equal names wins; a stable sort keeps the order among them.
    out.reverse();
    out.sort_by(|a, b| a.0.cmp(&b.0));
    out.dedup_by(|a, b| a.0 == b.0);
    Ok(out)
}

pub fn object(pairs: Vec<(String, Option<String>)>, empty: fn() -> Json) -> Option<Json> {
    let map: JsonMap<String, Json> = pairs
        .into_iter()
        .map(|(key, value)| (key, value.map_or_else(empty, Json::String)))
        .collect();
    (!map.is_empty()).then_some(Json::Object(map))
}

pub fn multi_options(node: &Node) -> Option<Json> {
    let mut map = JsonMap::new();
    for (key, value) in node.as_map()? {
        map.insert(key.clone(), Json::from(texts(value).unwrap_or_default()));
    }
    (!map.is_empty()).then_some(Json::Object(map))
}

/// `extra_hosts`: (name, address), sorted as compose prints them.
pub fn hosts(node: &Node) -> Result<Vec<(String, String)>, String> {
    let mut out: Vec<(String, String)> = vec![];
    match &node.value {
        Value::Map(map) => {
            for (host, value) in map {
                let addresses = texts(value).unwrap_or_else(|| vec![String::new()]);
                out.extend(addresses.into_iter().map(|ip| (host.clone(), ip)));
            }
        }
        _ => {
            for text in texts(node).unwrap_or_default() {
                let (host, ips) = text
                    .split_once('=')
                    .or_else(|| text.split_once(':'))
                    .ok_or_else(|| format!("`{text}` has no address; write `host=ip`"))?;
                out.extend(ips.split(',').map(|ip| (host.to_owned(), ip.to_owned())));
            }
        }
    }
    for (host, ip) in &mut out {
        if host.is_empty() || host.contains([':', '=']) {
            return Err(format!("`{host}` is not a host name"));
        }
        if ip.len() > 2 && ip.starts_with('[') && ip.ends_with(']') {
            *ip = ip[1..ip.len() - 1].to_owned();
        }
    }
    out.sort_by_key(|(host, ip)| format!("{host}={ip}"));
    Ok(out)
}

/// Permission bits: texts are octal, numbers as they are.
pub fn mode(node: &Node) -> Result<i64, String> {
    match &node.value {
        Value::Str(text) => i64::from_str_radix(text, 8)
            .map_err(|_| format!("`{text}` is not a file mode; write for example `0440`")),
        _ => integer(node),
    }
}

pub fn ssh(node: &Node) -> Option<Json> {
    let list: Vec<String> = node
        .as_map()?
        .iter()
        .map(|(id, path)| match path.text() {
            Some(path) if !path.is_empty() => format!("{id}={path}"),
            _ => id.clone(),
        })
        .collect();
    (!list.is_empty()).then_some(Json::from(list))
}

pub fn device_count(node: &Node) -> Result<i64, String> {
    match node.as_str() {
        Some(text) if text.eq_ignore_ascii_case("all") => Ok(-1),
        _ => integer(node).map_err(|_| {
            format!(
                "`{}` is neither `all` nor a number",
                node.text().unwrap_or_default()
            )
        }),
    }
}

pub fn ulimits(node: &Node) -> Bound {
    let mut out = JsonMap::new();
    let mut keys: Vec<(&String, &Node)> = node.as_map().into_iter().flatten().collect();
    keys.sort_by_key(|(key, _)| *key);
    for (name, limit) in keys {
        let value = match limit.as_map() {
            // Go prints a limit of nothing as an empty pair.
            None => match integer(limit)? {
                0 => Json::Object(JsonMap::new()),
                number => Json::from(number),
            },
            Some(map) => {
                let mut pair = JsonMap::new();
                for key in ["soft", "hard"] {
                    let number = map.get(key).map_or(Ok(0), integer)?;
                    if number != 0 {
                        pair.insert(key.to_owned(), Json::from(number));
                    }
                }
                Json::Object(pair)
            }
        };
        out.insert(name.clone(), value);
    }
    Ok((!out.is_empty()).then_some(Json::Object(out)))
}
