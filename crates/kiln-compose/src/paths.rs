//! Relative paths become absolute, against the folder of the model that says them.

use std::path::{Component, Path, PathBuf};

use crate::canonical::clean_path;
use crate::node::{Map, Node, Value};

/// What paths are resolved against.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    pub folder: &'a Path,
    /// For `~`.
    pub home: Option<&'a str>,
}

impl Base<'_> {
    /// `text` as an absolute, clean path.
    pub fn absolute(&self, text: &str) -> String {
        let text = self.expand_home(text);
        if text.starts_with('/') {
            return text;
        }
        clean_path(&format!("{}/{text}", self.folder.display()))
    }

    fn expand_home(&self, text: &str) -> String {
        match (text.strip_prefix('~'), self.home) {
            (Some(rest), Some(home)) => clean_path(&format!("{home}/{rest}")),
            _ => text.to_owned(),
        }
    }

    fn node(&self, node: &mut Node) {
        if let Value::Str(text) = &mut node.value
            && !text.is_empty()
        {
            *text = self.absolute(text);
        }
    }

    fn key(&self, map: &mut Map, key: &str) {
        if let Some(node) = map.get_mut(key) {
            self.node(node);
        }
    }

    /// What may also be a path of a Windows host, and means the folder itself when empty.
    fn host_key(&self, map: &mut Map, key: &str) {
        if let Some(Value::Str(text)) = map.get_mut(key).map(|node| &mut node.value)
            && !is_windows_absolute(text)
        {
            *text = self.absolute(text);
        }
    }

    fn context(&self, node: &mut Node) {
        if let Value::Str(text) = &mut node.value
            && !text.is_empty()
            && !is_remote_context(text)
        {
            *text = self.absolute(text);
        }
    }
}

/// `C:\\…`, `C:/…` and `\\\\…`
pub fn is_windows_absolute(text: &str) -> bool {
    match text.as_bytes() {
        [b'\\', b'\\', ..] => true,
        [drive, b':', b'\\' | b'/', ..] => drive.is_ascii_alphabetic(),
        _ => false,
    }
}

/// Folder contexts are paths; these are not.
pub fn is_remote_context(text: &str) -> bool {
    const PREFIXES: [&str; 7] = [
        "https://",
        "http://",
        "git://",
        "ssh://",
        "github.com/",
        "git@",
        "service:",
    ];
    text.contains("://") || PREFIXES.iter().any(|prefix| text.starts_with(prefix))
}

/// Resolves every path of a canonical tree.
pub fn resolve(root: &mut Node, base: Base<'_>) {
    let Some(map) = root.as_map_mut() else { return };
    for service in entries(map, "services") {
        service_paths(service, base);
    }
    for kind in ["configs", "secrets"] {
        for resource in entries(map, kind) {
            base.key(resource, "file");
        }
    }
    for volume in entries(map, "volumes") {
        volume_device(volume, base);
    }
}

fn entries<'a>(map: &'a mut Map, key: &str) -> impl Iterator<Item = &'a mut Map> {
    map.get_mut(key)
        .and_then(Node::as_map_mut)
        .into_iter()
        .flat_map(|inner| inner.values_mut())
        .filter_map(Node::as_map_mut)
}

fn service_paths(service: &mut Map, base: Base<'_>) {
    if let Some(build) = service.get_mut("build").and_then(Node::as_map_mut) {
        if let Some(context) = build.get_mut("context") {
            base.context(context);
        }
        let contexts = build.get_mut("additional_contexts");
        for context in contexts
            .and_then(Node::as_map_mut)
            .into_iter()
            .flat_map(Map::values_mut)
        {
            base.context(context);
        }
        let keys = build.get_mut("ssh").and_then(Node::as_map_mut);
        for key in keys.into_iter().flat_map(Map::values_mut) {
            base.node(key);
        }
    }
    for file in items(service, "env_file").filter_map(Node::as_map_mut) {
        base.key(file, "path");
    }
    items(service, "label_file").for_each(|file| base.node(file));
    if let Some(extends) = service.get_mut("extends").and_then(Node::as_map_mut) {
        base.key(extends, "file");
    }
    if let Some(develop) = service.get_mut("develop").and_then(Node::as_map_mut) {
        for rule in items(develop, "watch").filter_map(Node::as_map_mut) {
            base.key(rule, "path");
        }
    }
    if let Some(own) = service.get_mut("x-kiln").and_then(Node::as_map_mut) {
        for check in items(own, "test").filter_map(Node::as_map_mut) {
            base.key(check, "structure");
            base.key(check, "goss");
        }
        if let Some(declared) = own.get_mut("image").and_then(Node::as_map_mut) {
            for file in items(declared, "files").filter_map(Node::as_map_mut) {
                base.key(file, "source");
            }
        }
    }
    for volume in items(service, "volumes").filter_map(Node::as_map_mut) {
        if volume.get("type").and_then(Node::as_str) == Some("bind") {
            base.host_key(volume, "source");
        }
    }
}

fn items<'a>(map: &'a mut Map, key: &str) -> impl Iterator<Item = &'a mut Node> {
    map.get_mut(key)
        .and_then(Node::as_seq_mut)
        .into_iter()
        .flatten()
}

/// `driver: local` with `o: bind` is a bind mount of `device`.
fn volume_device(volume: &mut Map, base: Base<'_>) {
    if volume.get("driver").and_then(Node::as_str) != Some("local") {
        return;
    }
    let Some(options) = volume.get_mut("driver_opts").and_then(Node::as_map_mut) else {
        return;
    };
    if options.get("o").and_then(Node::as_str) == Some("bind") {
        base.host_key(options, "device");
    }
}

/// Joins and cleans, without looking at the disk.
pub fn join(folder: &Path, path: &str) -> PathBuf {
    if path.starts_with('/') {
        return PathBuf::from(clean_path(path));
    }
    PathBuf::from(clean_path(&format!("{}/{path}", folder.display())))
}

/// The folder that a file is in.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.components().next().is_some() => parent.to_owned(),
        _ => PathBuf::from(Component::RootDir.as_os_str()),
    }
}
