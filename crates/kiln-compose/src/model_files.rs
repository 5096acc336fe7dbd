//! A list of compose files becomes one canonical tree: filled in, included, extended,
//! merged, checked, with absolute paths.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::canonical::canonical;
use crate::check;
use crate::defaults;
use crate::diag::{Code, Diagnostic};
use crate::extends::Extender;
use crate::include;
use crate::interpolate::Environment;
use crate::merge;
use crate::node::{Map, Node};
use crate::paths;
use crate::schema;
use crate::session::Session;
use crate::span::Span;

/// What a list of files is read with.
pub(crate) struct Model<'a> {
    /// Relative paths count from here.
    pub folder: &'a Path,
    pub environment: &'a Environment,
    /// The files whose `include` led here.
    pub chain: Vec<PathBuf>,
}

impl Model<'_> {
    pub fn home(&self) -> Option<&str> {
        self.environment.get("HOME").map(String::as_str)
    }
}

/// Reads parsed files into one tree. `None`: something could not be read at all; other errors
/// are reported, and the tree is good enough to find more of them.
pub(crate) fn load_model(
    files: Vec<(PathBuf, Vec<Node>)>,
    model: &Model<'_>,
    session: &mut Session<'_>,
) -> Option<Node> {
    let mut root = Node::map(Map::default(), Span::NONE);
    for (path, documents) in files {
        for document in documents {
            add_document(&mut root, document, &path, model, session);
            if session.diagnostics.hopeless() {
                return None;
            }
        }
    }
    defaults::set(&mut root);
    session.lenient(|diagnostics| check::tree(&root, diagnostics));
    // Paths of an included project only mean something to itself.
    if !session.skip.paths || !model.chain.is_empty() {
        let base = paths::Base {
            folder: model.folder,
            home: model.home(),
        };
        paths::resolve(&mut root, base);
    }
    if !session.skip.interpolation {
        defaults::list_environment(&mut root, model.environment);
    }
    Some(root)
}

fn add_document(
    root: &mut Node,
    mut document: Node,
    path: &Path,
    model: &Model<'_>,
    session: &mut Session<'_>,
) {
    if document.as_map().is_none() {
        session.diagnostics.push(
            Diagnostic::error(
                Code::Schema,
                document.span,
                format!("a compose file must be a mapping, not {}", document.kind()),
            )
            .hint("begin with `services:`"),
        );
        return;
    }
    session.interpolate(&mut document, model.environment);
    let mut chain = model.chain.clone();
    chain.push(path.to_owned());
    let here = Model {
        folder: model.folder,
        environment: model.environment,
        chain,
    };
    include::apply(&mut document, &here, session);
    merge::apply_tags(root, &document);
    Extender {
        session,
        environment: model.environment,
        folder: model.folder,
        home: model.home(),
        files: HashMap::new(),
    }
    .run(&mut document, path);
    merge::strip_tags(&mut document);
    if root.span.is_none() {
        root.span = document.span;
    }
    merge::merge(root, document, &mut vec![], &mut session.diagnostics);
    merge::unique(root);
    session.lenient(|diagnostics| schema::validate(root, diagnostics));
    drop_version(root, session);
    session.lenient(|diagnostics| canonical(root, diagnostics));
    merge::unique(root);
}

fn drop_version(root: &mut Node, session: &mut Session<'_>) {
    if let Some(version) = root
        .as_map_mut()
        .and_then(|map| map.shift_remove("version"))
    {
        session.diagnostics.push(
            Diagnostic::note(
                version.key,
                "the key `version` is obsolete and has no effect",
            )
            .hint("take it out")
            .key("version"),
        );
    }
}
