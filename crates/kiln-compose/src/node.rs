//! The tree a compose file becomes: every value knows where it stands.

use indexmap::IndexMap;

use crate::span::Span;

/// A value of the tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub value: Value,
    /// The value's own place.
    pub span: Span,
    /// The place of its key; the value's own place where it has none.
    pub key: Span,
    pub tag: Tag,
}

/// Compose's two tags, which act when a file is merged over another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tag {
    #[default]
    None,
    /// Take the key away.
    Reset,
    /// Replace instead of merging.
    Override,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Seq(Vec<Node>),
    Map(Map),
}

/// Many small maps with short keys: hashing them is much of what resolving a project costs.
pub type Map = IndexMap<String, Node, foldhash::fast::RandomState>;

impl Node {
    pub fn new(value: Value, span: Span) -> Self {
        Self {
            value,
            span,
            key: span,
            tag: Tag::None,
        }
    }

    pub fn str(text: impl Into<String>, span: Span) -> Self {
        Self::new(Value::Str(text.into()), span)
    }

    pub fn bool(value: bool, span: Span) -> Self {
        Self::new(Value::Bool(value), span)
    }

    pub fn map(map: Map, span: Span) -> Self {
        Self::new(Value::Map(map), span)
    }

    pub fn seq(seq: Vec<Node>, span: Span) -> Self {
        Self::new(Value::Seq(seq), span)
    }

    pub fn null(span: Span) -> Self {
        Self::new(Value::Null, span)
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_map(&self) -> Option<&Map> {
        match &self.value {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    pub fn as_map_mut(&mut self) -> Option<&mut Map> {
        match &mut self.value {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    pub fn as_seq(&self) -> Option<&[Node]> {
        match &self.value {
            Value::Seq(seq) => Some(seq),
            _ => None,
        }
    }

    pub fn as_seq_mut(&mut self) -> Option<&mut Vec<Node>> {
        match &mut self.value {
            Value::Seq(seq) => Some(seq),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self.value {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub fn as_int(&self) -> Option<i64> {
        match self.value {
            Value::Int(value) => Some(value),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// A key's value, when this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.as_map()?.get(key)
    }

    /// Follows keys from here.
    pub fn at(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |node, key| node.get(key))
    }

    /// The text of a scalar, as compose prints it; `None` for null, lists and mappings.
    pub fn text(&self) -> Option<String> {
        match &self.value {
            Value::Str(text) => Some(text.clone()),
            Value::Int(value) => Some(value.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            Value::Float(value) => Some(crate::units::go_float(*value)),
            Value::Null | Value::Seq(_) | Value::Map(_) => None,
        }
    }

    /// For messages.
    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Int(_) => "a number",
            Value::Float(_) => "a number",
            Value::Str(_) => "a text",
            Value::Seq(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// Puts `node` at `key`, keeping the place of the key that was there.
pub fn insert(map: &mut Map, key: &str, mut node: Node) {
    if let Some(old) = map.get(key) {
        node.key = old.key;
    }
    map.insert(key.to_owned(), node);
}
