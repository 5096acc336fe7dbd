//! Whether a value is what it must be. Types are converted as goss converts them.

use kiln_model::suite::{Comparison, Line, LinePattern, Matcher};
use serde_json::Value;

use crate::test::matching::{compiled, shown};

pub(super) fn check(matcher: &Matcher, value: &Value) -> Result<(), String> {
    match matches(matcher, value)? {
        true => Ok(()),
        false => Err(match matcher {
            Matcher::HavePatterns(patterns) => {
                let missing = missing(patterns, &text(value))?.join("`, `");
                format!("no line is as `{missing}` says: {}", shown(&text(value)))
            }
            _ => format!("it is {}, not {}", shown(&json(value)), wanted(matcher)),
        }),
    }
}

fn json(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", text.trim_end()),
        other => other.to_string(),
    }
}

/// For people.
fn wanted(matcher: &Matcher) -> String {
    match matcher {
        Matcher::Text(text) => format!("`{text}`"),
        Matcher::Number(number) => number.to_string(),
        Matcher::Bool(value) => value.to_string(),
        other => serde_json::to_string(other).unwrap_or_default(),
    }
}

/// `Err`: the value is of a kind that can't be asked so.
fn matches(matcher: &Matcher, value: &Value) -> Result<bool, String> {
    Ok(match matcher {
        Matcher::Text(wanted) => text(value) == *wanted,
        Matcher::Number(wanted) => number(value)? == *wanted,
        Matcher::Bool(wanted) => *value == Value::Bool(*wanted),
        Matcher::Equal(wanted) => equal(value, wanted),
        Matcher::HavePrefix(wanted) => text(value).starts_with(wanted.as_str()),
        Matcher::HaveSuffix(wanted) => text(value).ends_with(wanted.as_str()),
        Matcher::MatchRegexp(pattern) => compiled(pattern)?.is_match(&text(value)),
        Matcher::ContainSubstring(wanted) => text(value).contains(wanted.as_str()),
        Matcher::HaveLen(wanted) => length(value)? == *wanted,
        Matcher::HavePatterns(patterns) => missing(patterns, &text(value))?.is_empty(),
        Matcher::HaveKey(key) => {
            let Value::Object(map) = value else {
                return Err(format!("{} has no keys", shown(&json(value))));
            };
            let mut keys = map.keys().map(|key| Value::String(key.clone()));
            keys.any(|found| matches(key, &found) == Ok(true))
        }
        Matcher::ContainElement(one) => {
            let elements = elements(value)?;
            elements.iter().any(|found| matches(one, found) == Ok(true))
        }
        Matcher::ContainElements(all) => paired(all, &elements(value)?) == all.len(),
        Matcher::ConsistOf(all) => {
            let elements = elements(value)?;
            elements.len() == all.len() && paired(all, &elements) == all.len()
        }
        Matcher::Not(inner) => !matches(inner, value)?,
        Matcher::And(all) => {
            for one in all {
                if !matches(one, value)? {
                    return Ok(false);
                }
            }
            true
        }
        Matcher::Or(all) => {
            for one in all {
                if matches(one, value)? {
                    return Ok(true);
                }
            }
            false
        }
        Matcher::Compare {
            than,
            number: limit,
        } => {
            let found = number(value)?;
            match than {
                Comparison::Gt => found > *limit,
                Comparison::Ge => found >= *limit,
                Comparison::Lt => found < *limit,
                Comparison::Le => found <= *limit,
            }
        }
        Matcher::Json(paths) => {
            let parsed: Value = serde_json::from_str(&text(value))
                .map_err(|e| format!("it is no JSON ({e}): {}", shown(&text(value))))?;
            for (path, inner) in paths {
                if !matches(inner, at(&parsed, path)?)? {
                    return Ok(false);
                }
            }
            true
        }
    })
}

/// Names and positions with dots between; `@this`: the whole.
fn at<'v>(value: &'v Value, path: &str) -> Result<&'v Value, String> {
    if path == "@this" {
        return Ok(value);
    }
    let mut steps = path.split('.');
    steps
        .try_fold(value, |value, step| match value {
            Value::Array(items) => items.get(step.parse::<usize>().ok()?),
            other => other.get(step),
        })
        .ok_or_else(|| format!("there is no {path}"))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join("\n"),
        Value::Number(number) => match number.as_f64().filter(|n| n.fract() == 0.0) {
            // 1.0 is printed as 1.
            Some(whole) if number.is_f64() => whole.to_string(),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

fn number(value: &Value) -> Result<f64, String> {
    let parsed = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(_) | Value::Array(_) => text(value).trim().parse().ok(),
        _ => None,
    };
    parsed.ok_or_else(|| format!("{} is no number", shown(&json(value))))
}

fn length(value: &Value) -> Result<u64, String> {
    Ok(match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        other => return Err(format!("{other} has no length")),
    } as u64)
}

fn elements(value: &Value) -> Result<Vec<Value>, String> {
    Ok(match value {
        Value::Array(items) => items.clone(),
        Value::String(text) => text.split('\n').map(Value::from).collect(),
        Value::Object(map) => map.values().cloned().collect(),
        other => return Err(format!("{other} has no elements")),
    })
}

/// The same value; 1 and 1.0 are.
fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            let same =
                |(key, value): (&String, &Value)| b.get(key).is_some_and(|v| equal(value, v));
            a.len() == b.len() && a.iter().all(same)
        }
        _ => one == other,
    }
}

/// How many of `wanted` can be given an element of their own.
fn paired(wanted: &[Matcher], elements: &[Value]) -> usize {
    let fits: Vec<Vec<bool>> = wanted
        .iter()
        .map(|one| {
            elements
                .iter()
                .map(|e| matches(one, e) == Ok(true))
                .collect()
        })
        .collect();
    let mut owner: Vec<Option<usize>> = vec![None; elements.len()];
    (0..wanted.len())
        .filter(|one| find_place(*one, &fits, &mut owner, &mut vec![false; elements.len()]))
        .count()
}

/// Gives `one` an element, if need be by giving its owner another (augmenting paths).
fn find_place(
    one: usize,
    fits: &[Vec<bool>],
    owner: &mut [Option<usize>],
    tried: &mut [bool],
) -> bool {
    for element in 0..owner.len() {
        if !fits[one][element] || std::mem::replace(&mut tried[element], true) {
            continue;
        }
        let free = match owner[element] {
            None => true,
            Some(other) => find_place(other, fits, owner, tried),
        };
        if free {
            owner[element] = Some(one);
            return true;
        }
    }
    false
}

/// Of these patterns, those that the lines of `text` don't keep to.
fn missing(patterns: &[LinePattern], text: &str) -> Result<Vec<String>, String> {
    let mut missing = Vec::new();
    for pattern in patterns {
        let found = match &pattern.line {
            // Also of a text without any line.
            Line::Contains(part) if part.is_empty() && !pattern.inverse => true,
            Line::Contains(part) => text.lines().any(|line| line.contains(part.as_str())),
            Line::Matches(regex) => {
                let regex = compiled(regex)?;
                text.lines().any(|line| regex.is_match(line))
            }
        };
        if found == pattern.inverse {
            missing.push(pattern.written.clone());
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::suite::Pattern;
    use serde_json::json;

    fn t(text: &str) -> Matcher {
        Matcher::Text(text.into())
    }

    fn gt(number: f64) -> Matcher {
        compare(Comparison::Gt, number)
    }

    fn compare(than: Comparison, number: f64) -> Matcher {
        Matcher::Compare { than, number }
    }

    #[test]
    fn values_are_converted_and_compared_as_goss_does() {
        let b = Box::new;
        let list = json!(["foo", "bar", "moo"]);
        let cases = [
            (t("42"), json!(42), true),
            (t("42"), json!(42.0), true),
            (Matcher::Number(42.0), json!("42\n"), true),
            (Matcher::Bool(true), json!(true), true),
            (Matcher::Bool(true), json!("true"), false),
            (
                Matcher::Equal(json!(["foo", "bar", "moo"])),
                list.clone(),
                true,
            ),
            (
                Matcher::Equal(json!(["bar", "foo", "moo"])),
                list.clone(),
                false,
            ),
            (Matcher::Equal(json!({"a": [1]})), json!({"a": [1.0]}), true),
            (Matcher::HavePrefix("4".into()), json!(42), true),
            (Matcher::HaveSuffix("4".into()), json!(42), false),
            (
                Matcher::MatchRegexp(Pattern(r"^\d{2}$".into())),
                json!(42),
                true,
            ),
            (Matcher::ContainSubstring("o\nb".into()), list.clone(), true),
            (Matcher::HaveLen(3), list.clone(), true),
            (Matcher::HaveLen(2), json!("foo"), false),
            (Matcher::HaveKey(b(t("a"))), json!({"a": 1}), true),
            (
                Matcher::ContainElement(b(Matcher::HavePrefix("b".into()))),
                list.clone(),
                true,
            ),
            (Matcher::ContainElement(b(t("b"))), json!("a\nb"), true),
            (
                Matcher::ContainElements(vec![t("moo"), t("foo")]),
                list.clone(),
                true,
            ),
            (
                Matcher::ContainElements(vec![t("foo"), t("foo")]),
                list.clone(),
                false,
            ),
            // `m…` must not take the element that only `moo` fits.
            (
                Matcher::ConsistOf(vec![Matcher::HaveSuffix("oo".into()), t("foo"), t("bar")]),
                list.clone(),
                true,
            ),
            (
                Matcher::ConsistOf(vec![t("foo"), t("bar")]),
                list.clone(),
                false,
            ),
            (Matcher::Not(b(t("x"))), json!("y"), true),
            (Matcher::Not(b(t("y"))), json!("y"), false),
            (compare(Comparison::Gt, 42.0), json!(42), false),
            (compare(Comparison::Ge, 42.0), json!(42), true),
            (compare(Comparison::Ge, 42.5), json!(42), false),
            (compare(Comparison::Lt, 42.0), json!(42), false),
            (compare(Comparison::Le, 42.0), json!(42), true),
            (compare(Comparison::Le, 41.5), json!(42), false),
            (Matcher::And(vec![t("x"), t("y")]), json!("y"), false),
            (Matcher::Or(vec![t("x"), t("z")]), json!("y"), false),
            (
                Matcher::And(vec![gt(40.0), Matcher::Not(b(gt(42.0)))]),
                json!("42"),
                true,
            ),
            (Matcher::Or(vec![t("x"), t("y")]), json!("y"), true),
            (
                Matcher::Json([("a.1".to_owned(), Matcher::Number(2.0))].into()),
                json!(r#"{"a": [1, 2]}"#),
                true,
            ),
        ];
        for (matcher, value, wanted) in cases {
            let found = matches(&matcher, &value);
            assert_eq!(found, Ok(wanted), "{matcher:?} of {value}");
        }
        let path = Matcher::Json([("b".to_owned(), t("1"))].into());
        // What can't be asked is wrong, also behind a `not`.
        for (matcher, value) in [
            (Matcher::Not(b(path.clone())), json!("{}")),
            (path, json!("no json")),
            (gt(1.0), json!("one")),
            (Matcher::HaveLen(1), json!(1)),
        ] {
            assert!(matches(&matcher, &value).is_err(), "{matcher:?} of {value}");
        }
    }

    #[test]
    fn lines_have_patterns_or_have_them_not() {
        let of = |all: &[&str]| {
            let patterns = all.iter().map(|p| LinePattern::new(p)).collect();
            check(&Matcher::HavePatterns(patterns), &json!("one\ntwo 2\n"))
        };
        assert_eq!(
            of(&["one", "/^two \\d$/", "!three", "!/^2/", "", "/ONE/i"]),
            Ok(())
        );
        let told = of(&["one", "three", "!/tw/"]).unwrap_err();
        assert_eq!(told, "no line is as `three`, `!/tw/` says: one\ntwo 2");
        assert_eq!(of(&[]), Ok(()));
    }
}
