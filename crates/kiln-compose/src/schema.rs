//! Checks a tree against the compose specification's JSON schema (`schema/compose-spec.json`,
//! Apache-2.0, github.com/compose-spec/compose-spec), with the place of every mistake.
//!
//! Only the words that the schema uses are understood; a test fails when a new schema
//! brings another.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use indexmap::IndexMap;
use serde_json::Value as Json;
use serde_json::value::RawValue;

use crate::diag::{Code, Diagnostic, Diagnostics, did_you_mean};
use crate::node::{Node, Value};

/// The schema's text without its prose, which takes longer to read than the rest: every
/// command does so. A test holds that it is the schema.
const SCHEMA_JSON: &str = include_str!("../schema/compose-spec.min.json");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Null,
    Boolean,
    Integer,
    Number,
    String,
    Array,
    Object,
}

/// The regular expressions of the schema, by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    /// `^x-`
    Extension,
    /// `^[a-zA-Z0-9._-]+$`
    Name,
    /// `.+`
    Any,
    /// `^[a-z]+$`
    Lower,
    /// `[a-zA-Z0-9][a-zA-Z0-9_.-]+`, anywhere
    ContainerName,
    /// `always|never|…|every_([0-9]+[wdhms])+`, anywhere
    PullPolicy,
}

#[derive(Clone, Debug, Default)]
enum Additional {
    #[default]
    Allowed,
    Refused,
    Is(Box<Schema>),
}

#[derive(Clone, Debug, Default)]
struct Schema {
    reference: Option<String>,
    types: Vec<Type>,
    properties: IndexMap<String, Schema>,
    patterns: Vec<(Pattern, Schema)>,
    additional: Additional,
    items: Option<Box<Schema>>,
    one_of: Vec<Schema>,
    values: Vec<String>,
    pattern: Option<Pattern>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    unique: bool,
    required: Vec<String>,
}

/// The schema, read once.
#[derive(Debug)]
pub struct ComposeSchema {
    root: Schema,
    definitions: BTreeMap<String, Definition>,
}

/// Understood when it is first needed: few files use half of them.
#[derive(Debug)]
struct Definition {
    json: &'static RawValue,
    schema: OnceLock<Schema>,
}

impl Definition {
    fn new(json: &'static RawValue) -> Self {
        Self {
            json,
            schema: OnceLock::new(),
        }
    }

    fn read(&self) -> Result<Schema, String> {
        let json: Json = serde_json::from_str(self.json.get()).map_err(|e| e.to_string())?;
        Schema::read(&json)
    }

    /// A test holds that each can be read; one that can't would allow everything.
    fn schema(&self) -> &Schema {
        self.schema.get_or_init(|| self.read().unwrap_or_default())
    }
}

/// The compiled schema. A schema that cannot be read gives an error text, never a panic; a
/// test holds that the built-in one can.
fn compiled() -> Result<&'static ComposeSchema, &'static str> {
    static SCHEMA: OnceLock<Result<ComposeSchema, String>> = OnceLock::new();
    SCHEMA
        .get_or_init(|| ComposeSchema::read(SCHEMA_JSON))
        .as_ref()
        .map_err(String::as_str)
}

/// Reports everything in `root` that the schema refuses.
pub fn validate(root: &Node, diagnostics: &mut Diagnostics) {
    match compiled() {
        Ok(schema) => schema.check(&schema.root, root, &mut vec![], diagnostics),
        Err(what) => diagnostics.error(Code::Schema, root.span, what),
    }
}

/// The keys that a mapping at this key pattern (`services.*`) may have.
pub fn keys_at(pattern: &str) -> Vec<String> {
    let prefix = if pattern.is_empty() {
        String::new()
    } else {
        format!("{pattern}.")
    };
    all_keys()
        .into_iter()
        .filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned()))
        .filter(|key| !key.contains('.'))
        .collect()
}

/// Every key of the schema as a pattern: `services.*.ports.[].target`. `*` stands for a
/// name, `[]` for an item.
pub fn all_keys() -> Vec<String> {
    let mut out = vec![];
    if let Ok(schema) = compiled() {
        schema.collect(&schema.root, String::new(), &mut out);
    }
    out
}

fn raw_object(text: &'static str) -> Result<BTreeMap<String, &'static RawValue>, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

impl ComposeSchema {
    fn read(text: &'static str) -> Result<ComposeSchema, String> {
        let mut root = raw_object(text)?;
        let definitions = match root.remove("definitions") {
            Some(definitions) => raw_object(definitions.get())?,
            None => BTreeMap::new(),
        };
        let mut schema = Schema::default();
        for (word, value) in root {
            let value: Json = serde_json::from_str(value.get()).map_err(|e| e.to_string())?;
            schema.read_word(&word, &value)?;
        }
        Ok(ComposeSchema {
            root: schema,
            definitions: definitions
                .into_iter()
                .map(|(name, json)| (name, Definition::new(json)))
                .collect(),
        })
    }

    fn follow<'a>(&'a self, mut schema: &'a Schema) -> &'a Schema {
        while let Some(next) = schema
            .reference
            .as_ref()
            .and_then(|name| self.definitions.get(name))
        {
            schema = next.schema();
        }
        schema
    }

    fn collect(&self, schema: &Schema, path: String, out: &mut Vec<String>) {
        let schema = self.follow(schema);
        for option in &schema.one_of {
            self.collect(option, path.clone(), out);
        }
        for (key, inner) in &schema.properties {
            let next = join(&path, key);
            if !out.contains(&next) {
                out.push(next.clone());
            }
            self.collect(inner, next, out);
        }
        for (pattern, inner) in &schema.patterns {
            if *pattern != Pattern::Extension {
                self.collect(inner, join(&path, "*"), out);
            }
        }
        if let Additional::Is(inner) = &schema.additional {
            self.collect(inner, join(&path, "*"), out);
        }
        if let Some(inner) = &schema.items {
            self.collect(inner, join(&path, "[]"), out);
        }
    }

    /// Is the value of a type that the schema accepts?
    fn accepts(&self, schema: &Schema, node: &Node) -> bool {
        let schema = self.follow(schema);
        if schema.types.is_empty() && schema.one_of.is_empty() {
            return true;
        }
        schema.types.iter().any(|t| t.fits(node))
            || schema
                .one_of
                .iter()
                .any(|option| self.accepts(option, node))
    }

    /// The types that a schema accepts; empty: all.
    fn types(&self, schema: &Schema) -> Vec<Type> {
        let schema = self.follow(schema);
        let mut types = schema.types.clone();
        for option in &schema.one_of {
            types.extend(self.types(option));
        }
        types
    }

    fn check(
        &self,
        schema: &Schema,
        node: &Node,
        path: &mut Vec<String>,
        diagnostics: &mut Diagnostics,
    ) {
        if diagnostics.full() {
            return;
        }
        let schema = self.follow(schema);
        if !self.accepts(schema, node) {
            diagnostics.push(wrong_type(node, path, &self.types(schema)));
            return;
        }
        let chosen = schema
            .one_of
            .iter()
            .find(|option| self.accepts(option, node));
        if let Some(option) = chosen {
            self.check(option, node, path, diagnostics);
        }
        match &node.value {
            Value::Str(text) => check_text(schema, text, node, path, diagnostics),
            Value::Int(_) | Value::Float(_) => check_number(schema, node, path, diagnostics),
            Value::Seq(items) => {
                if schema.unique {
                    check_unique(items, path, diagnostics);
                }
                if let Some(inner) = &schema.items {
                    for (at, item) in items.iter().enumerate() {
                        path.push(format!("[{at}]"));
                        self.check(inner, item, path, diagnostics);
                        path.pop();
                    }
                }
            }
            Value::Map(_) => self.check_map(schema, node, path, diagnostics),
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn check_map(
        &self,
        schema: &Schema,
        node: &Node,
        path: &mut Vec<String>,
        diagnostics: &mut Diagnostics,
    ) {
        let Some(map) = node.as_map() else { return };
        for (key, inner) in map {
            let by_pattern = || {
                schema
                    .patterns
                    .iter()
                    .find(|(pattern, _)| pattern.fits(key))
                    .map(|(_, schema)| schema)
            };
            let found = schema.properties.get(key).or_else(by_pattern);
            let next = match (found, &schema.additional) {
                (Some(next), _) => next,
                (None, Additional::Is(next)) => next,
                (None, Additional::Allowed) => continue,
                (None, Additional::Refused) => {
                    diagnostics.push(unknown_key(schema, key, inner, path));
                    continue;
                }
            };
            path.push(key.clone());
            self.check(next, inner, path, diagnostics);
            path.pop();
        }
        for key in &schema.required {
            if !map.contains_key(key) {
                diagnostics.push(Diagnostic::error(
                    Code::Schema,
                    node.key,
                    format!("{}: the key `{key}` is missing", show(path)),
                ));
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn show(path: &[String]) -> String {
    if path.is_empty() {
        return "the file".into();
    }
    path.join(".").replace(".[", "[")
}

fn wrong_type(node: &Node, path: &[String], types: &[Type]) -> Diagnostic {
    let mut names: Vec<&str> = vec![];
    for t in types {
        if !names.contains(&t.name()) {
            names.push(t.name());
        }
    }
    Diagnostic::error(
        Code::Schema,
        node.span,
        format!(
            "{} must be {}, not {}",
            show(path),
            names.join(" or "),
            node.kind()
        ),
    )
}

fn unknown_key(schema: &Schema, key: &str, node: &Node, path: &[String]) -> Diagnostic {
    let message = if path.is_empty() {
        format!("unknown key `{key}`")
    } else {
        format!("unknown key `{key}` in {}", show(path))
    };
    let known: Vec<&str> = schema.properties.keys().map(String::as_str).collect();
    let hint = did_you_mean(key, known.iter().copied()).unwrap_or_else(|| {
        if known.is_empty() {
            "names have letters, digits, `.`, `_` and `-` only".to_owned()
        } else if path.is_empty() {
            format!("known here: {}", known.join(", "))
        } else {
            "keys of your own begin with `x-`".to_owned()
        }
    });
    Diagnostic::error(Code::Schema, node.key, message)
        .label("not a compose key")
        .hint(hint)
}

fn check_text(
    schema: &Schema,
    text: &str,
    node: &Node,
    path: &[String],
    diagnostics: &mut Diagnostics,
) {
    if !schema.values.is_empty() && !schema.values.iter().any(|v| v == text) {
        let known = schema.values.iter().map(String::as_str);
        let hint = did_you_mean(text, known)
            .unwrap_or_else(|| format!("one of: {}", schema.values.join(", ")));
        diagnostics.push(
            Diagnostic::error(
                Code::Schema,
                node.span,
                format!("{}: `{text}` is not a possible value", show(path)),
            )
            .hint(hint),
        );
    }
    if let Some(pattern) = schema.pattern
        && !pattern.fits(text)
    {
        diagnostics.push(
            Diagnostic::error(
                Code::Schema,
                node.span,
                format!("{}: `{text}` has not the right form", show(path)),
            )
            .hint(pattern.rule()),
        );
    }
}

fn check_number(schema: &Schema, node: &Node, path: &[String], diagnostics: &mut Diagnostics) {
    #[allow(clippy::cast_precision_loss)]
    let value = match node.value {
        Value::Int(value) => value as f64,
        Value::Float(value) => value,
        _ => return,
    };
    let low = schema.minimum.filter(|least| value < *least);
    let high = schema.maximum.filter(|most| value > *most);
    if let Some(bound) = low.or(high) {
        let word = if low.is_some() { "least" } else { "most" };
        diagnostics.error(
            Code::Schema,
            node.span,
            format!("{} must be at {word} {bound}", show(path)),
        );
    }
}

fn check_unique(items: &[Node], path: &[String], diagnostics: &mut Diagnostics) {
    let mut seen: BTreeMap<String, &Node> = BTreeMap::new();
    for item in items {
        let Some(text) = item.text() else { continue };
        let typed = format!("{}:{text}", item.kind());
        if let Some(first) = seen.insert(typed, item) {
            diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    item.span,
                    format!("{}: `{text}` stands here a second time", show(path)),
                )
                .also(first.span, "first here"),
            );
        }
    }
}

impl Type {
    fn read(name: &str) -> Result<Type, String> {
        Ok(match name {
            "null" => Type::Null,
            "boolean" => Type::Boolean,
            "integer" => Type::Integer,
            "number" => Type::Number,
            "string" => Type::String,
            "array" => Type::Array,
            "object" => Type::Object,
            other => return Err(format!("unknown type `{other}` in the schema")),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Type::Null => "empty",
            Type::Boolean => "a boolean",
            Type::Integer => "a whole number",
            Type::Number => "a number",
            Type::String => "a text",
            Type::Array => "a list",
            Type::Object => "a mapping",
        }
    }

    fn fits(self, node: &Node) -> bool {
        match (self, &node.value) {
            (Type::Null, Value::Null)
            | (Type::Boolean, Value::Bool(_))
            | (Type::Integer | Type::Number, Value::Int(_))
            | (Type::Number, Value::Float(_))
            | (Type::String, Value::Str(_))
            | (Type::Array, Value::Seq(_))
            | (Type::Object, Value::Map(_)) => true,
            (Type::Integer, Value::Float(value)) => value.fract() == 0.0,
            _ => false,
        }
    }
}

impl Pattern {
    fn read(text: &str) -> Result<Pattern, String> {
        Ok(match text {
            "^x-" => Pattern::Extension,
            "^[a-zA-Z0-9._-]+$" => Pattern::Name,
            ".+" | "^.+$" => Pattern::Any,
            "^[a-z]+$" => Pattern::Lower,
            "[a-zA-Z0-9][a-zA-Z0-9_.-]+" => Pattern::ContainerName,
            text if text.starts_with("always|never|") => Pattern::PullPolicy,
            other => return Err(format!("unknown pattern `{other}` in the schema")),
        })
    }

    fn fits(self, text: &str) -> bool {
        let name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let bytes = text.as_bytes();
        match self {
            Pattern::Extension => text.starts_with("x-"),
            Pattern::Name => !bytes.is_empty() && bytes.iter().all(name),
            Pattern::Any => !bytes.is_empty(),
            Pattern::Lower => !bytes.is_empty() && bytes.iter().all(u8::is_ascii_lowercase),
            Pattern::ContainerName => bytes
                .windows(2)
                .any(|pair| pair[0].is_ascii_alphanumeric() && name(&pair[1])),
            Pattern::PullPolicy => {
                const WORDS: [&str; 8] = [
                    "always",
                    "never",
                    "build",
                    "if_not_present",
                    "missing",
                    "refresh",
                    "daily",
                    "weekly",
                ];
                WORDS.iter().any(|word| text.contains(word))
                    || text.split("every_").skip(1).any(|after| {
                        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
                        digits > 0 && after[digits..].starts_with(['w', 'd', 'h', 'm', 's'])
                    })
            }
        }
    }

    fn rule(self) -> &'static str {
        match self {
            Pattern::ContainerName | Pattern::Name => {
                "letters, digits, `.`, `_` and `-`; the first a letter or digit"
            }
            Pattern::PullPolicy => {
                "one of: always, never, missing, if_not_present, build, daily, weekly, every_<time>"
            }
            Pattern::Extension => "it must begin with x-",
            Pattern::Any => "it must not be empty",
            Pattern::Lower => "small letters only",
        }
    }
}

/// Words of JSON schema that say nothing about validity.
const COMMENTS: [&str; 9] = [
    "description",
    "title",
    "default",
    "deprecated",
    "$schema",
    "$id",
    "definitions",
    "$comment",
    "examples",
];

impl Schema {
    fn read(json: &Json) -> Result<Schema, String> {
        let mut schema = Schema::default();
        let Json::Object(map) = json else {
            return Ok(schema);
        };
        for (word, value) in map {
            schema.read_word(word, value)?;
        }
        Ok(schema)
    }

    fn read_word(&mut self, word: &str, value: &Json) -> Result<(), String> {
        let texts = |value: &Json| -> Vec<String> {
            match value {
                Json::String(text) => vec![text.clone()],
                Json::Array(list) => list
                    .iter()
                    .filter_map(|v| v.as_str().map(str::to_owned))
                    .collect(),
                _ => vec![],
            }
        };
        match (word, value) {
            ("$ref", Json::String(text)) => {
                self.reference = text.rsplit('/').next().map(str::to_owned);
            }
            ("type", value) => {
                self.types = texts(value)
                    .iter()
                    .map(|name| Type::read(name))
                    .collect::<Result<_, _>>()?;
            }
            ("properties", Json::Object(map)) => {
                self.properties.reserve(map.len());
                for (key, inner) in map {
                    self.properties.insert(key.clone(), Schema::read(inner)?);
                }
            }
            ("patternProperties", Json::Object(map)) => {
                for (pattern, inner) in map {
                    self.patterns
                        .push((Pattern::read(pattern)?, Schema::read(inner)?));
                }
            }
            ("additionalProperties", Json::Bool(false)) => self.additional = Additional::Refused,
            ("additionalProperties", Json::Bool(true)) => {}
            ("additionalProperties", inner) => {
                self.additional = Additional::Is(Box::new(Schema::read(inner)?));
            }
            ("items", inner) => self.items = Some(Box::new(Schema::read(inner)?)),
            ("oneOf", Json::Array(list)) => {
                self.one_of = list.iter().map(Schema::read).collect::<Result<_, _>>()?;
            }
            ("enum", value) => self.values = texts(value),
            ("pattern", Json::String(text)) => self.pattern = Some(Pattern::read(text)?),
            ("minimum", value) => self.minimum = value.as_f64(),
            ("maximum", value) => self.maximum = value.as_f64(),
            ("uniqueItems", value) => self.unique = value.as_bool().unwrap_or(false),
            ("required", value) => self.required = texts(value),
            (word, _) if COMMENTS.contains(&word) => {}
            (other, _) => return Err(format!("unknown word `{other}` in the schema")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn check(text: &str) -> Vec<Diagnostic> {
        let node = crate::yaml::parse(text, 0).unwrap().remove(0);
        let mut diagnostics = Diagnostics::default();
        validate(&node, &mut diagnostics);
        diagnostics.into_list()
    }

    #[test]
    fn the_built_in_schema_is_understood() {
        let schema = compiled().expect("schema");
        for (name, definition) in &schema.definitions {
            definition
                .read()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert!(all_keys().len() > 300);
        assert!(keys_at("services.*.healthcheck").contains(&"start_period".to_owned()));
    }

    /// `names`: the keys are those of compose files, not of the schema.
    fn without_prose(value: &Json, names: bool) -> Json {
        match value {
            Json::Object(map) => {
                let said = map
                    .iter()
                    .filter(|(key, _)| names || !PROSE.contains(&&***key));
                let inner = |key: &str| !names && NAMES.contains(&key);
                said.map(|(key, value)| (key.clone(), without_prose(value, inner(key))))
                    .collect()
            }
            Json::Array(list) => list.iter().map(|v| without_prose(v, false)).collect(),
            other => other.clone(),
        }
    }

    const PROSE: [&str; 4] = ["description", "title", "$comment", "deprecated"];
    const NAMES: [&str; 3] = ["properties", "definitions", "patternProperties"];

    #[test]
    fn the_built_in_schema_is_the_specifications() {
        let whole: Json =
            serde_json::from_str(include_str!("../schema/compose-spec.json")).unwrap();
        let lean = without_prose(&whole, false).to_string();
        assert!(
            lean == SCHEMA_JSON.trim_end(),
            "schema/compose-spec.min.json is to be:\n{lean}"
        );
    }

    #[test]
    fn all_mistakes_are_found_at_once() {
        let found = check(
            "services:\n  web:\n    imagee: x\n    ports: 80\n    cgroup: hst\n    ulimits: {nofile: {soft: 1}}\n    cap_add: [A, A]\n    oom_score_adj: 2000\n    container_name: ''\nsevices: {}\n",
        );
        let messages: Vec<_> = found.iter().map(|d| d.message.as_str()).collect();
        assert_eq!(found.len(), 8, "{messages:#?}");
        assert_eq!(found[0].hint.as_deref(), Some("did you mean `image`?"));
        assert!(found[2].hint.as_deref().unwrap().contains("host"));
        assert_eq!(found[7].hint.as_deref(), Some("did you mean `services`?"));
    }

    #[test]
    fn short_and_long_forms_pass() {
        let found = check(
            "services:\n  a:\n    image: x\n    ports: [80, '1:2', {target: 3}]\n    environment: {A: 1, B: null, C: true}\n    env_file: [a, {path: b}]\n    x-own: 1\n    depends_on: {b: {condition: service_started}}\n    networks: {n: null}\n    pull_policy: every_1h\n",
        );
        assert_eq!(found, vec![]);
    }
}
