//! A resolved project becomes a [`Spec`]. Whatever the Spec cannot carry, or kiln refuses, is
//! an error with its key and place: nothing is dropped in silence.

mod analysis;
mod build;
mod goss;
mod image;
mod kiln;
mod network;
mod resources;
mod rollout;
mod security;
mod service;
mod storage;
mod structure;
mod suite;
mod volume;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::spec::{DebianBase, FileSource};
use kiln_model::suite::Suite;
use kiln_model::{Digest, Millis, ServiceName, Spec};

use crate::diag::{Code, Diagnostic, Diagnostics, Severity};
use crate::keys::{self, Support};
use crate::node::{Node, Value};
use crate::project::Project;
use crate::session::Reader;
use crate::span::{Sources, Span};
use crate::values;

/// [`lower`]'s result. The Spec is only of use when no diagnostic is an error.
#[derive(Clone, Debug)]
pub struct Lowered {
    pub spec: Spec,
    pub diagnostics: Vec<Diagnostic>,
    /// Files whose content is in the Spec (seccomp profiles, tests).
    pub files_read: Vec<PathBuf>,
}

/// Lowers a project that was read from `sources`, which grow by the files of tests.
/// `allow_ignored`: keys (`services.*.gpus`, `deploy.placement`, `gpus`) whose refusal is only
/// a warning. `None`: the project's name itself cannot be carried.
pub fn lower(
    project: &Project,
    reader: &dyn Reader,
    sources: &mut Sources,
    allow_ignored: &[String],
) -> Result<Lowered, Diagnostic> {
    let name = project.name.parse().map_err(|error| {
        Diagnostic::error(
            Code::Usage,
            Span::NONE,
            format!("the project's name: {error}"),
        )
    })?;
    let mut lowering = Lowering {
        project,
        reader,
        sources,
        suites: BTreeMap::new(),
        diagnostics: Diagnostics::default(),
        files_read: vec![],
        rollout: None,
        bases: BTreeMap::new(),
    };
    lowering.support(&project.tree, String::new());
    let extension = lowering.project_extension();
    lowering.rollout = extension.rollout;
    let mut spec = Spec {
        project: name,
        folder: project.folder.clone(),
        services: Default::default(),
        networks: lowering.networks(),
        volumes: lowering.volumes(),
        configs: lowering.file_sources("configs"),
        secrets: lowering.file_sources("secrets"),
        bases: extension.bases,
        debian_mirror: extension.mirror,
        allow_secrets: extension.allow_secrets,
        watch: Default::default(),
        stack: extension.stack,
        suites: Default::default(),
    };
    for (name, node) in project.services() {
        let Some(name) = lowering.id::<ServiceName>(name, node.key) else {
            continue;
        };
        let rules = lowering.watch(node);
        if !rules.is_empty() {
            spec.watch.insert(name.clone(), rules);
        }
        if let Some(service) = lowering.service(&name, node) {
            spec.services.insert(name, service);
        }
    }
    spec.bases.append(&mut lowering.bases);
    spec.suites = std::mem::take(&mut lowering.suites);
    storage::volumes_from(project, &mut spec);
    let mut diagnostics = lowering.diagnostics.into_list();
    for diagnostic in &mut diagnostics {
        allow(diagnostic, allow_ignored);
    }
    Ok(Lowered {
        spec,
        diagnostics,
        files_read: lowering.files_read,
    })
}

/// Turns the refusal of a key that may be ignored into a warning.
fn allow(diagnostic: &mut Diagnostic, allow_ignored: &[String]) {
    let Some(key) = &diagnostic.key else { return };
    if diagnostic.severity != Severity::Error || diagnostic.code != Code::Unsupported {
        return;
    }
    let chosen = !keys::NEEDED.contains(&&**key)
        && allow_ignored.iter().any(|allowed| {
            **key == **allowed
                || key
                    .strip_suffix(allowed.as_str())
                    .is_some_and(|before| before.ends_with('.'))
        });
    if chosen {
        diagnostic.severity = Severity::Warning;
        diagnostic.message = format!("{} (ignored, as allowed)", diagnostic.message);
    }
}

struct Lowering<'a> {
    project: &'a Project,
    reader: &'a dyn Reader,
    /// Files of tests are added, so that what is wrong in them has a place.
    sources: &'a mut Sources,
    suites: BTreeMap<Digest, Suite>,
    diagnostics: Diagnostics,
    files_read: Vec<PathBuf>,
    /// The project's, for services that say nothing.
    rollout: Option<rollout::Rollout>,
    /// Those of `x-kiln.image`.
    bases: BTreeMap<String, DebianBase>,
}

impl Lowering<'_> {
    /// Walks everything that is said and reports what the table doesn't honour.
    fn support(&mut self, node: &Node, pattern: String) {
        let join = |key: &str| {
            if pattern.is_empty() {
                key.to_owned()
            } else {
                format!("{pattern}.{key}")
            }
        };
        match &node.value {
            Value::Map(map) => {
                for (key, inner) in map {
                    if key.starts_with("x-") && keys::support(&join(key)).is_none() {
                        continue;
                    }
                    let exact = join(key);
                    let (next, support) = match keys::support(&exact) {
                        Some(support) => (exact, support),
                        None => (join("*"), Support::Honoured),
                    };
                    match support {
                        Support::Honoured => self.support(inner, next),
                        _ if is_empty(inner) || inner.key.is_none() => {}
                        Support::Refused(hint) => self.refuse(&next, key, inner.key, hint),
                        Support::Note(why) => self.diagnostics.push(
                            Diagnostic::note(inner.key, format!("`{key}` has no effect: {why}"))
                                .key(next),
                        ),
                    }
                }
            }
            Value::Seq(seq) => {
                for inner in seq {
                    self.support(inner, join("[]"));
                }
            }
            _ => {}
        }
    }

    fn refuse(&mut self, pattern: &str, what: &str, span: Span, hint: &str) {
        debug_assert!(
            !matches!(keys::support(pattern), Some(Support::Honoured))
                || keys::LIMITS.iter().any(|(key, _)| *key == pattern),
            "{pattern} is refused, but the table doesn't say so"
        );
        self.diagnostics.push(
            Diagnostic::error(
                Code::Unsupported,
                span,
                format!("kiln does not support `{what}`"),
            )
            .label("not supported")
            .hint(hint)
            .key(pattern),
        );
    }

    /// Refuses a value of a key that is honoured otherwise.
    fn refuse_value(&mut self, pattern: &str, node: &Node, hint: &str) {
        let key = pattern
            .rsplit('.')
            .find(|part| *part != "[]" && *part != "*");
        let what = format!(
            "{}: {}",
            key.unwrap_or(pattern),
            node.text().unwrap_or_else(|| node.kind().to_owned())
        );
        self.refuse(pattern, &what, node.span, hint);
    }

    fn wrong(&mut self, span: Span, what: impl Into<String>) {
        self.diagnostics.error(Code::Schema, span, what);
    }

    /// Takes a result out, reporting its error at `span`.
    fn take<T>(&mut self, result: Result<T, String>, span: Span) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(what) => {
                self.wrong(span, what);
                None
            }
        }
    }

    fn id<T>(&mut self, text: &str, span: Span) -> Option<T>
    where
        T: std::str::FromStr<Err = kiln_model::IdError>,
    {
        let parsed = text.parse::<T>().map_err(|error| error.to_string());
        self.take(parsed, span)
    }

    /// A service that another one names.
    fn service_ref(&mut self, name: &str, span: Span) -> Option<ServiceName> {
        if self.project.tree.at(&["services", name]).is_none() {
            let known: Vec<&str> = self.project.services().map(|(n, _)| n).collect();
            self.diagnostics.push(
                Diagnostic::error(
                    Code::Reference,
                    span,
                    format!("the service `{name}` is not defined"),
                )
                .maybe_hint(crate::diag::did_you_mean(name, known)),
            );
            return None;
        }
        self.id(name, span)
    }

    fn file_sources(&mut self, section: &'static str) -> BTreeMap<String, FileSource> {
        let mut out = BTreeMap::new();
        for (key, node) in self.project.section(section) {
            let text = |key: &str| node.get(key).and_then(Node::text);
            let source = if node.get("external").and_then(Node::as_bool) == Some(true) {
                FileSource::External(text("name").unwrap_or_else(|| key.to_owned()))
            } else if let Some(path) = text("file") {
                FileSource::File(PathBuf::from(path))
            } else if let Some(content) = text("content") {
                FileSource::Content(content)
            } else if let Some(name) = text("environment") {
                FileSource::Environment(name)
            } else {
                continue;
            };
            out.insert(key.to_owned(), source);
        }
        out
    }

    /// `KEY=value` lists and mappings; names without a value are empty.
    fn pairs(&mut self, node: Option<&Node>) -> BTreeMap<String, String> {
        node.map(values::key_values)
            .and_then(Result::ok)
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| (key, value.unwrap_or_default()))
            .collect()
    }

    fn read(&mut self, path: &Path, span: Span) -> Option<String> {
        let read = self.reader.read(path).map_err(|error| error.to_string());
        let text = read.and_then(|bytes| {
            String::from_utf8(bytes).map_err(|_| "the file is not UTF-8 text".to_owned())
        });
        match text {
            Ok(text) => {
                self.files_read.push(path.to_owned());
                Some(text)
            }
            Err(error) => {
                self.diagnostics
                    .error(Code::File, span, format!("{}: {error}", path.display()));
                None
            }
        }
    }
}

/// Says nothing: null, false, "", [] and {}.
fn is_empty(node: &Node) -> bool {
    match &node.value {
        Value::Null | Value::Bool(false) => true,
        Value::Str(text) => text.is_empty(),
        Value::Seq(seq) => seq.is_empty(),
        Value::Map(map) => map.values().all(is_empty),
        _ => false,
    }
}

/// A key's text, unless it is empty.
fn text(node: &Node, key: &str) -> Option<String> {
    node.get(key).and_then(Node::text).filter(|t| !t.is_empty())
}

fn texts(node: &Node, key: &str) -> Vec<String> {
    node.get(key).and_then(values::texts).unwrap_or_default()
}

fn flag(node: &Node, key: &str) -> bool {
    node.get(key)
        .is_some_and(|node| values::boolean(node).unwrap_or(false))
}

fn items<'n>(node: &'n Node, key: &str) -> &'n [Node] {
    node.get(key).and_then(Node::as_seq).unwrap_or_default()
}

/// A key's duration. The types are checked before, so errors are reported there.
fn millis(node: &Node, key: &str) -> Option<Millis> {
    let nanos = values::duration(node.get(key).filter(|n| !n.is_null())?).ok()?;
    Some(Millis(u64::try_from(nanos / 1_000_000).unwrap_or(0)))
}

fn bytes(node: &Node, key: &str) -> Option<i64> {
    values::bytes(node.get(key).filter(|n| !n.is_null())?)
        .ok()
        .filter(|n| *n != 0)
}

fn unsigned_bytes(node: &Node, key: &str) -> Option<u64> {
    u64::try_from(bytes(node, key)?).ok()
}

fn integer(node: &Node, key: &str) -> Option<i64> {
    values::integer(node.get(key).filter(|n| !n.is_null())?).ok()
}
