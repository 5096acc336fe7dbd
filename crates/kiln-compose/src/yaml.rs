//! YAML text in, spanned trees out: one per document. Anchors, aliases and `<<` are
//! expanded here, within bounds, so that nothing after this needs to know them.

use std::collections::HashMap;

use granit_parser::{Event, Options, Parser, ScalarStyle, Tag as YamlTag};

use crate::diag::{Code, Diagnostic};
use crate::node::{Map, Node, Tag, Value};
use crate::span::Span;

/// A compose file longer than this is refused. The largest real ones have some 100 KiB.
pub const MAX_FILE_BYTES: usize = 4 << 20;
/// Nested lists and mappings; real files have some 10.
pub const MAX_DEPTH: usize = 64;
/// Values of one file after aliases are expanded: a "billion laughs" ends here.
pub const MAX_NODES: usize = 200_000;

/// The documents of one file. An error ends the file: what follows has no sure meaning.
pub fn parse(text: &str, file: u32) -> Result<Vec<Node>, Diagnostic> {
    if text.len() > MAX_FILE_BYTES {
        return Err(Diagnostic::error(
            Code::Limit,
            Span {
                file,
                start: 0,
                end: 0,
            },
            format!(
                "the file has {} bytes; a compose file may have {MAX_FILE_BYTES}",
                text.len()
            ),
        ));
    }
    let mut options = Options::default();
    options.set_emit_comments(false);
    options.block_scalar_eof_without_line_feed = true;
    let mut builder = Builder {
        file,
        text,
        nodes: 0,
        stack: vec![],
        anchors: HashMap::new(),
        documents: vec![],
    };
    for next in Parser::new_from_str_with_options(text, options) {
        let (event, span) = next.map_err(|error| {
            let at = error.marker().byte_offset().unwrap_or(0);
            Diagnostic::error(Code::Syntax, builder.clip(at, at + 1), error.info())
        })?;
        let (start, end) = match span.byte_range() {
            Some(range) => (range.start, range.end),
            None => (0, 0),
        };
        builder.event(event, builder.clip(start, end))?;
    }
    Ok(builder.documents)
}

/// A list or mapping that is still open.
struct Frame {
    span: Span,
    anchor: usize,
    tag: Tag,
    items: Items,
}

enum Items {
    Seq(Vec<Node>),
    Map {
        map: Map,
        /// The values of `<<`, first wins.
        merges: Vec<Node>,
        /// A key whose value is still to come.
        key: Option<(String, Span)>,
    },
}

struct Builder<'a> {
    file: u32,
    text: &'a str,
    nodes: usize,
    stack: Vec<Frame>,
    /// Finished anchors with the number of values in them.
    anchors: HashMap<usize, (Node, usize)>,
    documents: Vec<Node>,
}

impl Builder<'_> {
    fn clip(&self, start: usize, end: usize) -> Span {
        let length = self.text.len();
        let narrow = |at: usize| u32::try_from(at.min(length)).unwrap_or(u32::MAX);
        Span {
            file: self.file,
            start: narrow(start),
            end: narrow(end.max(start)),
        }
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Diagnostic> {
        match event {
            Event::DocumentStart(..) => self.anchors.clear(),
            Event::Alias(id) => {
                let node = self.alias(id, span)?;
                self.add(node, span)?;
            }
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.as_deref();
                let value = scalar(&text, style, tag, span)?;
                let mut node = Node::new(value, span);
                node.tag = compose_tag(tag);
                self.count(1, span)?;
                if anchor > 0 {
                    self.anchors.insert(anchor, (node.clone(), 1));
                }
                self.add(node, span)?;
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.open(Items::Seq(vec![]), anchor, tag.as_deref(), span)?;
            }
            Event::MappingStart(_, anchor, tag) => {
                let items = Items::Map {
                    map: Map::default(),
                    merges: vec![],
                    key: None,
                };
                self.open(items, anchor, tag.as_deref(), span)?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
            _ => {}
        }
        Ok(())
    }

    fn count(&mut self, more: usize, span: Span) -> Result<(), Diagnostic> {
        self.nodes = self.nodes.saturating_add(more);
        if self.nodes > MAX_NODES {
            return Err(Diagnostic::error(
                Code::Limit,
                span,
                format!("the file has more than {MAX_NODES} values once its aliases are expanded"),
            ));
        }
        Ok(())
    }

    fn open(
        &mut self,
        items: Items,
        anchor: usize,
        tag: Option<&YamlTag>,
        span: Span,
    ) -> Result<(), Diagnostic> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(Diagnostic::error(
                Code::Limit,
                span,
                format!("the file is nested deeper than {MAX_DEPTH} levels"),
            ));
        }
        if let (Some(frame), true) = (self.stack.last(), true)
            && let Items::Map { key: None, .. } = frame.items
        {
            return Err(Diagnostic::error(
                Code::Syntax,
                span,
                "a key must be a text, not a list or a mapping",
            ));
        }
        self.count(1, span)?;
        self.stack.push(Frame {
            span,
            anchor,
            tag: compose_tag(tag),
            items,
        });
        Ok(())
    }

    fn close(&mut self, end: Span) -> Result<(), Diagnostic> {
        let Some(frame) = self.stack.pop() else {
            return Ok(());
        };
        let value = match frame.items {
            Items::Seq(seq) => Value::Seq(seq),
            Items::Map {
                mut map, merges, ..
            } => {
                for merge in merges {
                    self.merge_in(&mut map, merge)?;
                }
                Value::Map(map)
            }
        };
        let mut span = frame.span;
        span.end = self.trimmed_end(span.start, end.end.max(span.end));
        let mut node = Node::new(value, span);
        node.tag = frame.tag;
        if frame.anchor > 0 {
            let size = count(&node);
            self.anchors.insert(frame.anchor, (node.clone(), size));
        }
        self.add(node, span)
    }

    /// A block ends where the next begins: leave out the blank between.
    fn trimmed_end(&self, start: u32, end: u32) -> u32 {
        let range = self.text.get(start as usize..end as usize).unwrap_or("");
        start + u32::try_from(range.trim_end().len()).unwrap_or(0)
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<Node, Diagnostic> {
        let Some((node, size)) = self.anchors.get(&id) else {
            return Err(Diagnostic::error(
                Code::Cycle,
                span,
                "this alias stands inside the value it refers to",
            ));
        };
        let (node, size) = (node.clone(), *size);
        self.count(size, span)?;
        Ok(node)
    }

    /// Adds a finished value to what is open, or ends the document with it.
    fn add(&mut self, mut node: Node, span: Span) -> Result<(), Diagnostic> {
        let Some(frame) = self.stack.last_mut() else {
            self.documents.push(node);
            return Ok(());
        };
        match &mut frame.items {
            Items::Seq(seq) => seq.push(node),
            Items::Map { map, merges, key } => match key.take() {
                None => *key = Some(key_text(node, span)?),
                Some((name, place)) if name == "<<" => {
                    node.key = place;
                    merges.push(node);
                }
                Some((name, place)) => {
                    node.key = place;
                    if let Some(first) = map.get(&name) {
                        return Err(duplicate(&name, place, first.key));
                    }
                    map.insert(name, node);
                }
            },
        }
        Ok(())
    }

    /// `<<`: the keys of another mapping, or of several, that this one doesn't have.
    fn merge_in(&mut self, map: &mut Map, from: Node) -> Result<(), Diagnostic> {
        match from.value {
            Value::Map(other) => {
                for (key, node) in other {
                    map.entry(key).or_insert(node);
                }
                Ok(())
            }
            Value::Seq(list) if list.iter().all(|node| node.as_map().is_some()) => {
                for node in list {
                    self.merge_in(map, node)?;
                }
                Ok(())
            }
            _ => Err(Diagnostic::error(
                Code::Syntax,
                from.key,
                "`<<` needs a mapping, or a list of mappings",
            )
            .hint("write `<<: *name` where `&name` marks a mapping")),
        }
    }
}

fn duplicate(name: &str, again: Span, first: Span) -> Diagnostic {
    Diagnostic::error(
        Code::Syntax,
        again,
        format!("the key `{name}` stands here a second time"),
    )
    .label("again")
    .also(first, "first here")
    .hint("keep one of the two")
}

fn key_text(node: Node, span: Span) -> Result<(String, Span), Diagnostic> {
    match node.value {
        Value::Str(text) => Ok((text, span)),
        _ => Err(Diagnostic::error(
            Code::Syntax,
            span,
            format!("a key must be a text, not {}", node.kind()),
        )
        .hint("put the key in quotes")),
    }
}

fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::Seq(seq) => seq.iter().map(count).sum(),
        Value::Map(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

fn compose_tag(tag: Option<&YamlTag>) -> Tag {
    match tag.map(|tag| (tag.handle(), tag.suffix())) {
        Some(("!", "reset")) => Tag::Reset,
        Some(("!", "override")) => Tag::Override,
        _ => Tag::None,
    }
}

fn scalar(
    text: &str,
    style: ScalarStyle,
    tag: Option<&YamlTag>,
    span: Span,
) -> Result<Value, Diagnostic> {
    let Some(suffix) = tag.and_then(YamlTag::core_suffix) else {
        if let Some(tag) = tag.filter(|tag| tag.handle() == "tag:yaml.org,2002:") {
            let message = format!("values of the type !!{} are not supported", tag.suffix());
            return Err(Diagnostic::error(Code::Syntax, span, message));
        }
        let own = matches!(compose_tag(tag), Tag::Reset | Tag::Override);
        let typed = tag.is_none() || own;
        return Ok(match style {
            ScalarStyle::Plain if typed => plain(text),
            _ => Value::Str(text.to_owned()),
        });
    };
    let value = plain(text);
    let fits = match (suffix, &value) {
        ("str", _) => return Ok(Value::Str(text.to_owned())),
        ("null", Value::Null) | ("bool", Value::Bool(_)) => true,
        ("int", Value::Int(_)) | ("float", Value::Float(_)) => true,
        #[allow(clippy::cast_precision_loss)]
        ("float", Value::Int(number)) => return Ok(Value::Float(*number as f64)),
        _ => false,
    };
    if fits {
        return Ok(value);
    }
    Err(Diagnostic::error(
        Code::Syntax,
        span,
        format!("`{text}` is not a value of the type !!{suffix}"),
    ))
}

/// The type of a plain scalar, as Go's YAML library takes it: YAML 1.2 with `0o17`,
/// `017`, `0b1`, `0x1f` and `1_000`.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => {
            return Value::Float(f64::INFINITY);
        }
        "-.inf" | "-.Inf" | "-.INF" => return Value::Float(f64::NEG_INFINITY),
        ".nan" | ".NaN" | ".NAN" => return Value::Float(f64::NAN),
        _ => {}
    }
    let first = text.bytes().next().unwrap_or(b' ');
    if !matches!(first, b'0'..=b'9' | b'-' | b'+' | b'.') {
        return Value::Str(text.to_owned());
    }
    let number = text.replace('_', "");
    if let Some(value) = integer(&number) {
        // What is too big for compose's integers is kept as its digits.
        return i64::try_from(value).map_or_else(|_| Value::Str(value.to_string()), Value::Int);
    }
    if is_float(&number)
        && let Ok(value) = number.parse()
    {
        return Value::Float(value);
    }
    Value::Str(text.to_owned())
}

fn integer(text: &str) -> Option<i128> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    if digits.is_empty() || digits.starts_with(['+', '-']) {
        return None;
    }
    let (radix, digits) = match digits.get(..2) {
        Some("0x" | "0X") => (16, &digits[2..]),
        Some("0o" | "0O") => (8, &digits[2..]),
        Some("0b" | "0B") => (2, &digits[2..]),
        _ if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        _ => (10, digits),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()? * sign;
    let known = i128::from(i64::MIN)..=i128::from(u64::MAX);
    known.contains(&value).then_some(value)
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let text = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let mantissa_ok = match mantissa.split_once('.') {
        Some(("", after)) => digits(after),
        Some((before, "")) => digits(before),
        Some((before, after)) => digits(before) && digits(after),
        None => digits(mantissa),
    };
    mantissa_ok && exponent.is_none_or(|text| digits(text.strip_prefix(['-', '+']).unwrap_or(text)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn one(text: &str) -> Node {
        parse(text, 0).expect("parses").remove(0)
    }

    fn fails(text: &str) -> Diagnostic {
        parse(text, 0).expect_err("is refused")
    }

    #[test]
    fn plain_scalars_have_composes_types() {
        let node =
            one("[yes, 0777, 0o17, 1_000, 1.10, null, ~, on, 2001-01-01, 08, 0x1f, 1e3, '1']");
        let kinds: Vec<_> = node
            .as_seq()
            .unwrap()
            .iter()
            .map(|n| n.value.clone())
            .collect();
        let text = |s: &str| Value::Str(s.into());
        assert_eq!(
            kinds,
            vec![
                text("yes"),
                Value::Int(511),
                Value::Int(15),
                Value::Int(1000),
                Value::Float(1.1),
                Value::Null,
                Value::Null,
                text("on"),
                text("2001-01-01"),
                Value::Float(8.0),
                Value::Int(31),
                Value::Float(1000.0),
                text("1"),
            ]
        );
    }

    #[test]
    fn merge_keys_fill_what_is_missing() {
        let node = one("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  y: 9\n  <<: [*a, *b]\n");
        let c = node.get("c").unwrap().as_map().unwrap();
        let pairs: Vec<_> = c
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_int().unwrap()))
            .collect();
        assert_eq!(pairs, vec![("y", 9), ("x", 1), ("z", 4)]);
    }

    #[test]
    fn spans_cover_keys_and_values() {
        let text = "services:\n  web:\n    image: nginx\n";
        let node = one(text);
        let image = node.at(&["services", "web", "image"]).unwrap();
        assert_eq!(
            &text[image.span.start as usize..image.span.end as usize],
            "nginx"
        );
        assert_eq!(
            &text[image.key.start as usize..image.key.end as usize],
            "image"
        );
    }

    #[test]
    fn bombs_end_in_an_error() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let refs = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb.push_str(&format!("a{n}: &a{n} [{refs}]\n"));
        }
        assert_eq!(fails(&bomb).code, Code::Limit);
        assert_eq!(
            fails(&"[".repeat(300)).severity,
            crate::diag::Severity::Error
        );
        let deep: String = (0..100)
            .map(|n| format!("{}k:\n", "  ".repeat(n)))
            .collect();
        assert_eq!(fails(&deep).code, Code::Limit);
        assert_eq!(fails(&"x".repeat(MAX_FILE_BYTES + 1)).code, Code::Limit);
        assert_eq!(fails("a: &a [*a]").code, Code::Cycle);
    }

    #[test]
    fn duplicates_and_odd_keys_are_refused() {
        let twice = fails("a: 1\nb: 2\na: 3\n");
        assert_eq!(twice.related.len(), 1);
        assert!(twice.message.contains('a'));
        assert_eq!(fails("1: x").code, Code::Syntax);
        assert_eq!(fails("[a]: x").code, Code::Syntax);
        assert_eq!(fails("<<: 3").code, Code::Syntax);
        assert_eq!(fails("a: *missing").code, Code::Syntax);
    }

    #[test]
    fn composes_tags_are_kept() {
        let node = one("a: !reset null\nb: !override [1]\nc: !!str 1\n");
        assert_eq!(node.get("a").unwrap().tag, Tag::Reset);
        assert_eq!(node.get("b").unwrap().tag, Tag::Override);
        assert_eq!(node.get("c").unwrap().as_str(), Some("1"));
    }
}
