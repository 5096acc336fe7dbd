//! `extends`: a service takes another's definition, of this file or of another one, and
//! lays its own over it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::canonical;
use crate::diag::{Code, Diagnostic, did_you_mean};
use crate::interpolate::Environment;
use crate::merge;
use crate::node::{Map, Node, Value};
use crate::paths;
use crate::session::{Session, size};
use crate::span::{Span, Via};

/// Services between one and the last that it builds on.
pub const MAX_CHAIN: usize = 64;

/// What extending needs to know of the model it happens in.
pub(crate) struct Extender<'s, 'a> {
    pub session: &'s mut Session<'a>,
    pub environment: &'s Environment,
    /// Relative `file:` keys of this model count from here.
    pub folder: &'s Path,
    pub home: Option<&'s str>,
    /// Files that were already read for their services.
    pub files: HashMap<PathBuf, Option<Rc<Map>>>,
}

/// A service on the way to its base: the file and the name.
type Step = (PathBuf, String, Span);

impl Extender<'_, '_> {
    /// Applies `extends` in every service of a file's tree.
    pub fn run(&mut self, root: &mut Node, file: &Path) {
        let Some(Value::Map(services)) = root
            .as_map_mut()
            .and_then(|map| map.get_mut("services"))
            .map(|node| &mut node.value)
        else {
            return;
        };
        let names: Vec<String> = services.keys().cloned().collect();
        for name in names {
            if self.session.exhausted || self.session.diagnostics.full() {
                return;
            }
            if let Some(merged) = self.service(&name, services, file, &mut vec![]) {
                crate::node::insert(services, &name, merged);
            }
        }
    }

    /// The service with its bases laid under it; `None` when there is nothing to change.
    fn service(
        &mut self,
        name: &str,
        services: &Map,
        file: &Path,
        chain: &mut Vec<Step>,
    ) -> Option<Node> {
        let service = services.get(name)?;
        let extends = service.get("extends")?;
        let (base_name, base_file) = self.reference(name, extends)?;
        if let Some(at) = chain.iter().position(|(f, n, _)| f == file && n == name) {
            self.cycle(&chain[at..], name);
            return None;
        }
        if chain.len() >= MAX_CHAIN {
            self.session.exhaust(
                extends.span,
                format!("services extend each other over more than {MAX_CHAIN} steps"),
            );
            return None;
        }
        chain.push((file.to_owned(), name.to_owned(), extends.key));
        let base = match &base_file {
            None => self.base_here(name, &base_name, services, file, chain, extends),
            Some(path) => self.base_elsewhere(&base_name, path, chain, extends),
        };
        chain.pop();
        let mut base = base?;
        if !self.session.spend(size(&base), extends.span) {
            return None;
        }
        if base.is_null() {
            base.value = Value::Map(Map::default());
        }
        merge::strip_tags(&mut base);
        merge::apply_tags(&mut base, service);
        let mut own = service.clone();
        merge::strip_tags(&mut own);
        let (span, key) = (service.span, service.key);
        let mut path = vec!["services".to_owned(), name.to_owned()];
        merge::merge(&mut base, own, &mut path, &mut self.session.diagnostics);
        base.span = span;
        base.key = key;
        if let Some(map) = base.as_map_mut() {
            map.shift_remove("extends");
        }
        Some(base)
    }

    fn reference(&mut self, name: &str, extends: &Node) -> Option<(String, Option<PathBuf>)> {
        let wrong = |what: &str| {
            Diagnostic::error(
                Code::Schema,
                extends.span,
                format!("services.{name}.extends {what}"),
            )
        };
        match &extends.value {
            Value::Str(base) => Some((base.clone(), None)),
            Value::Map(map) => {
                let Some(base) = map.get("service").and_then(Node::as_str) else {
                    let missing = wrong("needs the key `service`");
                    self.session.diagnostics.push(missing);
                    return None;
                };
                let file = match map.get("file") {
                    None => None,
                    Some(Node {
                        value: Value::Str(file),
                        span,
                        ..
                    }) => {
                        if is_remote(file) {
                            self.remote(file, *span);
                            return None;
                        }
                        let base = paths::Base {
                            folder: self.folder,
                            home: self.home,
                        };
                        Some(PathBuf::from(base.absolute(file)))
                    }
                    Some(_) => {
                        let text = wrong("`file` must be a text");
                        self.session.diagnostics.push(text);
                        return None;
                    }
                };
                Some((base.to_owned(), file))
            }
            _ => {
                let form = wrong("must be a service's name or a mapping");
                self.session.diagnostics.push(form);
                None
            }
        }
    }

    fn remote(&mut self, file: &str, span: Span) {
        self.session.diagnostics.push(
            Diagnostic::error(
                Code::Unsupported,
                span,
                format!("`{file}`: remote compose files are not supported"),
            )
            .hint("copy the file into the project"),
        );
    }

    fn base_here(
        &mut self,
        name: &str,
        base: &str,
        services: &Map,
        file: &Path,
        chain: &mut Vec<Step>,
        extends: &Node,
    ) -> Option<Node> {
        let Some(node) = services.get(base) else {
            let known = services.keys().map(String::as_str).filter(|k| *k != name);
            self.session.diagnostics.push(
                Diagnostic::error(
                    Code::Reference,
                    extends.span,
                    format!("cannot extend service `{base}`: there is no such service here"),
                )
                .maybe_hint(did_you_mean(base, known)),
            );
            return None;
        };
        match self.service(base, services, file, chain) {
            Some(merged) => Some(merged),
            // Either it extends nothing, or that failed and is reported.
            None => Some(node.clone()),
        }
    }

    fn base_elsewhere(
        &mut self,
        base: &str,
        path: &Path,
        chain: &mut Vec<Step>,
        extends: &Node,
    ) -> Option<Node> {
        let services = self.services_of(path, extends.span)?;
        if services.contains_key(base) {
            return match self.service(base, &services, path, chain) {
                Some(merged) => Some(merged),
                None => services.get(base).cloned(),
            };
        }
        let known = services.keys().map(String::as_str);
        self.session.diagnostics.push(
            Diagnostic::error(
                Code::Reference,
                extends.span,
                format!(
                    "cannot extend service `{base}`: {} has no such service",
                    path.display()
                ),
            )
            .maybe_hint(did_you_mean(base, known)),
        );
        None
    }

    /// The services of another file, canonical and with absolute paths. Read once.
    fn services_of(&mut self, path: &Path, from: Span) -> Option<Rc<Map>> {
        if let Some(known) = self.files.get(path) {
            return known.clone();
        }
        let read = self.read_services(path, from).map(Rc::new);
        self.files.insert(path.to_owned(), read.clone());
        read
    }

    fn read_services(&mut self, path: &Path, from: Span) -> Option<Map> {
        let documents = self.session.documents(path, Some((Via::Extends, from)))?;
        let mut root = Node::map(Map::default(), Span::NONE);
        for mut document in documents {
            self.session.interpolate(&mut document, self.environment);
            merge::apply_tags(&mut root, &document);
            merge::strip_tags(&mut document);
            merge::merge(
                &mut root,
                document,
                &mut vec![],
                &mut self.session.diagnostics,
            );
        }
        merge::unique(&mut root);
        self.session
            .lenient(|diagnostics| canonical::canonical(&mut root, diagnostics));
        let folder = paths::parent(path);
        if !self.session.skip.paths || folder != self.folder {
            let base = paths::Base {
                folder: &folder,
                home: self.home,
            };
            paths::resolve(&mut root, base);
        }
        match root
            .as_map_mut()
            .and_then(|map| map.shift_remove("services"))
        {
            Some(Node {
                value: Value::Map(services),
                ..
            }) => Some(services),
            _ => {
                self.session.diagnostics.error(
                    Code::Reference,
                    from,
                    format!("cannot extend from {}: it has no services", path.display()),
                );
                None
            }
        }
    }

    fn cycle(&mut self, chain: &[Step], name: &str) {
        let mut names: Vec<&str> = chain.iter().map(|(_, n, _)| n.as_str()).collect();
        names.push(name);
        let span = chain.first().map_or(Span::NONE, |(_, _, span)| *span);
        let mut diagnostic = Diagnostic::error(
            Code::Cycle,
            span,
            format!(
                "services extend each other in a circle: {}",
                names.join(" -> ")
            ),
        );
        for (_, step, place) in chain.iter().skip(1) {
            diagnostic = diagnostic.also(*place, format!("`{step}` extends the next"));
        }
        self.session.diagnostics.push(diagnostic);
    }
}

/// References that compose fetches from a registry or a repository.
pub(crate) fn is_remote(path: &str) -> bool {
    path.starts_with("oci://") || path.contains("://") || path.starts_with("git@")
}
