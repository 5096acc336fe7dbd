//! What a build comes to, as text: `refused`, or a line for each part of the configuration
//! and for each path.
//!
//! ```text
//! === a-name
//! config.Env ["PATH=/bin"]
//! d 0755 0:0 /etc
//! f 0644 0:0 /etc/a "one\n"
//! f 0644 0:0 /etc/b 1234 sha256:…
//! l 0:0 /etc/l -> a
//! h /etc/same = /etc/a
//! ```
//!
//! Times are left out: docker's are of the day, kiln's are not. What `kiln-base` has is left
//! out where it is unchanged; `- /path` is what is gone of it.

use std::collections::BTreeMap;

use kiln_model::Digest;

/// Longer content is told by its digest.
const SHOWN: usize = 100;

/// Of the configuration: everything that means something where the image is run or built on
/// (docker's `ArgsEscaped` does on Windows only).
const KEYS: [&str; 12] = [
    "Env",
    "Entrypoint",
    "Cmd",
    "WorkingDir",
    "User",
    "Volumes",
    "ExposedPorts",
    "Labels",
    "StopSignal",
    "Healthcheck",
    "Shell",
    "OnBuild",
];

/// One path, without its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: char,
    pub mode: u32,
    pub owner: (u64, u64),
    /// What it holds or where it leads, as it is shown.
    pub rest: String,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Paths without slashes at their ends. The root itself has no line: docker's has the mode
/// of its own store.
pub type Nodes = BTreeMap<Vec<u8>, Node>;

pub fn content(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.len() <= SHOWN => format!("{text:?}"),
        _ => format!("{} {}", bytes.len(), Digest::of(bytes)),
    }
}

pub fn shown(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}

impl Node {
    fn line(&self, path: &[u8]) -> String {
        let path = shown(path);
        let (uid, gid) = self.owner;
        let mut line = match self.kind {
            'h' => return format!("h {path} = {}", self.rest),
            'l' => format!("l {uid}:{gid} {path} -> {}", self.rest),
            kind => format!("{kind} {:04o} {uid}:{gid} {path} {}", self.mode, self.rest),
        };
        for (name, value) in &self.xattrs {
            line.push_str(&format!(" {name}={}", hex(value)));
        }
        line.trim_end().to_owned()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All lines of an image; `base`: what `kiln-base` has, if it is built on that.
pub fn lines(config: &serde_json::Value, nodes: &Nodes, base: &Nodes) -> Vec<String> {
    let mut lines = Vec::new();
    for key in KEYS {
        let empty = match &config[key] {
            serde_json::Value::Null | serde_json::Value::Bool(false) => true,
            serde_json::Value::String(text) => text.is_empty(),
            serde_json::Value::Array(list) => list.is_empty(),
            serde_json::Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if !empty {
            lines.push(format!("config.{key} {}", config[key]));
        }
    }
    let on_base = nodes.contains_key(b"bin/busybox".as_slice());
    let base = if on_base { base } else { &Nodes::new() };
    for (path, node) in nodes {
        if base.get(path) != Some(node) {
            lines.push(node.line(path));
        }
    }
    let gone = base.keys().filter(|path| !nodes.contains_key(*path));
    lines.extend(gone.map(|path| format!("- {}", shown(path))));
    lines
}

/// The goldens of a file, by their cases' names.
pub fn parse(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut goldens: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        match line.strip_prefix("=== ") {
            Some(name) => current = Some(goldens.entry(name.to_owned()).or_default()),
            None => current.as_mut().unwrap().push(line.to_owned()),
        }
    }
    goldens
}

/// What is expected and not there, and the reverse; empty: the same.
pub fn difference(expected: &[String], found: &[String]) -> String {
    let without = |sign: char, these: &[String], those: &[String]| -> String {
        let only = these.iter().filter(|line| !those.contains(line));
        only.map(|line| format!("  {sign} {line}\n")).collect()
    };
    without('-', expected, found) + &without('+', found, expected)
}
