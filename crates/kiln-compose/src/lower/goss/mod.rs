//! Files of goss. Every resource that goss knows is either read here or refused by its name
//! and place; so is every attribute.

mod matcher;
mod probe;

use std::path::Path;

use kiln_model::Digest;
use kiln_model::suite::{Goss, Matcher, Resource};

use super::Lowering;
use crate::diag::{Code, Diagnostic};
use crate::node::{Node, Value};
use crate::paths;
use crate::span::Span;

/// Files within files, as deep as goss goes.
const MAX_DEPTH: usize = 50;
/// Files of one suite in all: one that includes itself twice ends here.
const MAX_FILES: usize = 200;

/// A kind of resource.
struct Kind {
    key: &'static str,
    /// Says the name, where the resource's key doesn't.
    name: &'static str,
    /// What has matchers, in the order of goss's reports. The first must be there.
    attributes: &'static [&'static str],
    /// What else may be said.
    options: &'static [&'static str],
}

const fn kind(
    key: &'static str,
    name: &'static str,
    attributes: &'static [&'static str],
    options: &'static [&'static str],
) -> Kind {
    Kind {
        key,
        name,
        attributes,
        options,
    }
}

const KINDS: [Kind; 14] = [
    kind(
        "addr",
        "address",
        &["reachable"],
        &["timeout", "local-address"],
    ),
    kind(
        "command",
        "exec",
        &["exit-status", "stdout", "stderr"],
        &["timeout", "retry_count", "retry_delay"],
    ),
    kind(
        "dns",
        "resolve",
        &["resolvable", "addrs"],
        &["server", "timeout", "retry_count", "retry_delay"],
    ),
    kind(
        "file",
        "path",
        &[
            "exists",
            "mode",
            "owner",
            "uid",
            "group",
            "gid",
            "linked-to",
            "filetype",
            "contains",
            "contents",
            "size",
            "md5",
            "sha256",
            "sha512",
        ],
        &[],
    ),
    kind("group", "groupname", &["exists", "gid"], &[]),
    kind(
        "http",
        "url",
        &["status", "headers", "body"],
        &[
            "method",
            "allow-insecure",
            "no-follow-redirects",
            "timeout",
            "request-headers",
            "request-body",
            "username",
            "password",
            "ca-file",
            "cert-file",
            "key-file",
            "proxy",
        ],
    ),
    kind("interface", "name", &["exists", "addrs", "mtu"], &[]),
    kind("kernel-param", "name", &["value"], &[]),
    kind("matching", "", &["matches"], &["content", "as-reader"]),
    kind(
        "mount",
        "mountpoint",
        &[
            "exists",
            "opts",
            "vfs-opts",
            "source",
            "filesystem",
            "usage",
        ],
        &["timeout"],
    ),
    kind(
        "package",
        "name",
        &["installed", "versions"],
        &["retry_count", "retry_delay"],
    ),
    kind("port", "port", &["listening", "ip"], &[]),
    kind("process", "comm", &["running"], &[]),
    kind(
        "user",
        "username",
        &["exists", "uid", "gid", "home", "groups", "shell"],
        &[],
    ),
];

/// What goss knows and an instance has not.
const REFUSED: [(&str, &str); 2] = [
    (
        "service",
        "an instance has no init system; say `process` or `port`",
    ),
    ("registry", "that is Windows'"),
];

/// The files that a suite is put together from.
#[derive(Default)]
pub(super) struct Parts {
    digests: Vec<Digest>,
    /// By kind and name: the later wins, as where goss merges.
    resources: Vec<Resource>,
}

impl Parts {
    pub fn new(bytes: &[u8]) -> Self {
        Self {
            digests: vec![Digest::of(bytes)],
            resources: vec![],
        }
    }

    /// Of all the bytes that were read.
    pub fn digest(&self) -> Digest {
        let all: Vec<String> = self.digests.iter().map(Digest::to_string).collect();
        Digest::of(all.join("\n"))
    }

    pub fn into_goss(self) -> Goss {
        Goss {
            resources: self.resources,
        }
    }

    fn add(&mut self, resource: Resource) {
        let same = |known: &&mut Resource| known.id == resource.id;
        match self.resources.iter_mut().find(same) {
            Some(known) => *known = resource,
            None => self.resources.push(resource),
        }
    }
}

impl Lowering<'_> {
    pub(super) fn goss(&mut self, root: &Node, file: &Path, parts: &mut Parts, depth: usize) {
        self.no_templates(root.span);
        let known: Vec<&str> = KINDS
            .iter()
            .map(|kind| kind.key)
            .chain(REFUSED.iter().map(|(key, _)| *key))
            .chain(["gossfile"])
            .collect();
        for (key, value) in self.known(root, "the file", &known) {
            if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == key) {
                self.refused(value.key, key, why);
                continue;
            }
            let entries: Vec<(&String, &Node)> = match &value.value {
                Value::Map(map) => map.iter().collect(),
                Value::Null => continue,
                _ => {
                    let what = format!("{key} must be a mapping, not {}", value.kind());
                    self.wrong(value.span, what);
                    continue;
                }
            };
            let kind = KINDS.iter().find(|kind| kind.key == key);
            for (name, said) in entries {
                match kind {
                    Some(kind) => {
                        let resource = self.resource(kind, name, said);
                        resource.into_iter().for_each(|one| parts.add(one));
                    }
                    None => self.included(file, name, said, parts, depth),
                }
            }
        }
    }

    /// `gossfile: {NAME: {file: PATH, skip: false}}`
    fn included(&mut self, from: &Path, name: &str, said: &Node, parts: &mut Parts, depth: usize) {
        let path = format!("gossfile.{name}");
        let (mut file, mut skip) = (name.to_owned(), false);
        for (key, value) in self.known(said, &path, &["title", "meta", "skip", "file"]) {
            let here = format!("{path}.{key}");
            match key {
                "file" => file = self.string(value, &here).unwrap_or_default(),
                "skip" => skip = self.boolean(value, &here).unwrap_or_default(),
                _ => {}
            }
        }
        if skip {
            return;
        }
        if file.contains(['*', '?', '[']) {
            let why = "what a pattern finds is not said by the file; name each file";
            return self.refused(said.key, &format!("{path}: {file}"), why);
        }
        if depth >= MAX_DEPTH || parts.digests.len() >= MAX_FILES {
            let what = format!("{path}: more than {MAX_DEPTH} files deep, or {MAX_FILES} in all");
            self.diagnostics.error(Code::Cycle, said.key, what);
            return;
        }
        let file = paths::join(&paths::parent(from), &file);
        if let Some((root, bytes)) = self.test_file(&file, said.key) {
            parts.digests.push(Digest::of(&bytes));
            self.goss(&root, &file, parts, depth + 1);
        }
    }

    /// goss fills every file in as a template, so that `{{` can't be meant as it stands.
    fn no_templates(&mut self, within: Span) {
        let Some(source) = self.sources.get(within.file) else {
            return;
        };
        let Some(at) = source.text.find("{{") else {
            return;
        };
        let at = u32::try_from(at).unwrap_or_default();
        let place = Span {
            file: within.file,
            start: at,
            end: at + 2,
        };
        self.refused(
            place,
            "{{…}}",
            "templates of goss are not filled in; `goss render` writes the file without them",
        );
    }

    fn resource(&mut self, kind: &Kind, name: &str, said: &Node) -> Option<Resource> {
        let path = format!("{}.{name}", kind.key);
        let known: Vec<&str> = ["title", "meta", "skip"]
            .iter()
            .chain([kind.name].iter().filter(|name| !name.is_empty()))
            .chain(kind.attributes)
            .chain(kind.options)
            .copied()
            .collect();
        let entries = self.known(said, &path, &known);
        let mut skip = false;
        let mut named = name.to_owned();
        for (key, value) in &entries {
            if *key == "skip" {
                skip = self.boolean(value, &format!("{path}.skip"))?;
            } else if *key == kind.name {
                named = self.string(value, &format!("{path}.{key}"))?;
            }
        }
        let required = kind.attributes[0];
        if said.get(required).is_none_or(Node::is_null) {
            self.wrong(said.key, format!("{path}: the key `{required}` is missing"));
        }
        let mut attributes = vec![];
        for attribute in kind.attributes {
            let Some(value) = said.get(attribute).filter(|value| !value.is_null()) else {
                continue;
            };
            let here = format!("{path}.{attribute}");
            if *attribute == "md5" {
                self.refused(value.key, &here, "MD5 proves nothing; say `sha256`");
                continue;
            }
            let matcher = self.attribute(attribute, value, &here);
            attributes.extend(matcher.map(|matcher| ((*attribute).to_owned(), matcher)));
        }
        Some(Resource {
            id: match named == name {
                true => format!("{} {name}", kind.key),
                false => format!("{} {name}: {named}", kind.key),
            },
            skip,
            probe: self.probe(kind.key, &named, said, &path)?,
            attributes,
        })
    }

    /// Of what is read line by line, a list is one of patterns.
    fn attribute(&mut self, name: &str, value: &Node, path: &str) -> Option<Matcher> {
        let lines = [
            "stdout", "stderr", "contents", "contains", "body", "headers",
        ];
        match &value.value {
            Value::Seq(_) if lines.contains(&name) => {
                if value.as_seq().is_some_and(<[Node]>::is_empty) {
                    let what = format!("{path}: an empty list asks for nothing");
                    let note = Diagnostic::note(value.key, what);
                    let note = note.hint("`\"\"` says that it is empty");
                    self.diagnostics.push(note);
                }
                Some(Matcher::HavePatterns(self.line_patterns(value, path)?))
            }
            _ => self.matcher(value, path),
        }
    }
}
