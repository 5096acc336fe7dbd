//! goss's matchers (`resource/gomega.go`).

use std::collections::BTreeMap;

use kiln_model::suite::{Comparison, Line, LinePattern, Matcher};
use serde_json::Value as Json;

use crate::lower::Lowering;
use crate::node::{Node, Value};
use crate::values;

const KNOWN: [&str; 21] = [
    "equal",
    "have-prefix",
    "have-suffix",
    "match-regexp",
    "contain-substring",
    "have-len",
    "have-patterns",
    "have-key",
    "contain-element",
    "contain-elements",
    "consist-of",
    "not",
    "and",
    "or",
    "gt",
    "ge",
    "lt",
    "le",
    "gjson",
    "semver-constraint",
    "xml",
];

impl Lowering<'_> {
    pub(super) fn matcher(&mut self, node: &Node, path: &str) -> Option<Matcher> {
        match &node.value {
            Value::Str(text) => Some(Matcher::Text(text.clone())),
            Value::Bool(value) => Some(Matcher::Bool(*value)),
            Value::Int(_) | Value::Float(_) => self.real(node, path).map(Matcher::Number),
            Value::Seq(_) => Some(Matcher::ContainElements(self.matchers(node, path)?)),
            Value::Null => {
                self.wrong(node.span, format!("{path} says nothing"));
                None
            }
            Value::Map(_) => {
                let (key, value) = self.choice(node, path, &KNOWN)?;
                self.advanced(key, value, &format!("{path}.{key}"))
            }
        }
    }

    fn advanced(&mut self, key: &str, value: &Node, path: &str) -> Option<Matcher> {
        Some(match key {
            "equal" => Matcher::Equal(self.json(value, path)?),
            "have-prefix" => Matcher::HavePrefix(self.plain_text(value, path)?),
            "have-suffix" => Matcher::HaveSuffix(self.plain_text(value, path)?),
            "match-regexp" => {
                self.plain_text(value, path)?;
                Matcher::MatchRegexp(self.pattern(value, path)?)
            }
            "contain-substring" => Matcher::ContainSubstring(self.plain_text(value, path)?),
            "have-len" => Matcher::HaveLen(self.number(value, path).and_then(|n: i64| {
                self.take(
                    u64::try_from(n).map_err(|_| format!("{path} is negative")),
                    value.span,
                )
            })?),
            "have-patterns" => Matcher::HavePatterns(self.line_patterns(value, path)?),
            "have-key" => Matcher::HaveKey(Box::new(self.matcher(value, path)?)),
            "contain-element" => Matcher::ContainElement(Box::new(self.matcher(value, path)?)),
            "contain-elements" => Matcher::ContainElements(self.matchers(value, path)?),
            "consist-of" => Matcher::ConsistOf(self.matchers(value, path)?),
            "not" => Matcher::Not(Box::new(self.matcher(value, path)?)),
            "and" => Matcher::And(self.matchers(value, path)?),
            "or" => Matcher::Or(self.matchers(value, path)?),
            "gjson" => Matcher::Json(self.json_paths(value, path)?),
            "gt" => self.compare(Comparison::Gt, value, path)?,
            "ge" => self.compare(Comparison::Ge, value, path)?,
            "lt" => self.compare(Comparison::Lt, value, path)?,
            "le" => self.compare(Comparison::Le, value, path)?,
            other => {
                let why = "say it with `match-regexp`, or with a command";
                self.refused(value.key, other, why);
                return None;
            }
        })
    }

    fn compare(&mut self, than: Comparison, node: &Node, path: &str) -> Option<Matcher> {
        let number = self.real(node, path)?;
        Some(Matcher::Compare { than, number })
    }

    fn real(&mut self, node: &Node, path: &str) -> Option<f64> {
        let number = values::number(node).map_err(|what| format!("{path}: {what}"));
        self.take(number, node.span)
    }

    /// A text that is one: goss takes no number for it.
    fn plain_text(&mut self, node: &Node, path: &str) -> Option<String> {
        if node.as_str().is_none() {
            let what = format!(
                "{path} must be a text, not {}; put it in quotes",
                node.kind()
            );
            self.wrong(node.span, what);
        }
        node.as_str().map(str::to_owned)
    }

    fn matchers(&mut self, node: &Node, path: &str) -> Option<Vec<Matcher>> {
        let items = self.list(node, path).iter().enumerate();
        let found: Vec<_> = items
            .map(|(at, item)| self.matcher(item, &format!("{path}[{at}]")))
            .collect();
        found.into_iter().collect()
    }

    pub(super) fn line_patterns(&mut self, node: &Node, path: &str) -> Option<Vec<LinePattern>> {
        let items = self.list(node, path).iter().enumerate();
        let found: Vec<_> = items
            .map(|(at, item)| {
                let here = format!("{path}[{at}]");
                let pattern = LinePattern::new(&self.string(item, &here)?);
                match &pattern.line {
                    Line::Matches(regex) if !self.compiles(regex, item.span, &here) => None,
                    _ => Some(pattern),
                }
            })
            .collect();
        found.into_iter().collect()
    }

    fn json_paths(&mut self, node: &Node, path: &str) -> Option<BTreeMap<String, Matcher>> {
        let Some(map) = node.as_map() else {
            let what = format!("{path} must be a mapping, not {}", node.kind());
            self.wrong(node.span, what);
            return None;
        };
        let mut found = BTreeMap::new();
        for (at, value) in map {
            let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ' ' | '/');
            if at != "@this" && !at.chars().all(plain) {
                let why = "paths of gjson are names and positions with dots between";
                self.refused(value.key, at, why);
                continue;
            }
            let matcher = self.matcher(value, &format!("{path}.{at}"));
            found.extend(matcher.map(|matcher| (at.clone(), matcher)));
        }
        Some(found)
    }

    /// The value as JSON has it.
    pub(super) fn json(&mut self, node: &Node, path: &str) -> Option<Json> {
        Some(match &node.value {
            Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Int(number) => Json::from(*number),
            Value::Float(number) => {
                let finite = serde_json::Number::from_f64(*number);
                let finite = finite.ok_or_else(|| format!("{path} is no number"));
                Json::Number(self.take(finite, node.span)?)
            }
            Value::Str(text) => Json::String(text.clone()),
            Value::Seq(seq) => {
                let items: Option<_> = seq.iter().map(|item| self.json(item, path)).collect();
                Json::Array(items?)
            }
            Value::Map(map) => {
                let entries = map.iter();
                let entries =
                    entries.map(|(key, value)| Some((key.clone(), self.json(value, path)?)));
                Json::Object(entries.collect::<Option<_>>()?)
            }
        })
    }
}
