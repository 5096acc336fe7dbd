//! `include`: another project's services, networks, volumes, configs and secrets become
//! this one's, with their own folder and `.env`.

use std::path::{Path, PathBuf};

use crate::diag::{Code, Diagnostic};
use crate::dotenv::{self, Variables};
use crate::extends::is_remote;
use crate::interpolate::Environment;
use crate::model_files::{Model, load_model};
use crate::node::{Map, Node, Value};
use crate::output;
use crate::paths;
use crate::session::Session;
use crate::span::{Span, Via};

const SECTIONS: [&str; 6] = [
    "services", "volumes", "networks", "secrets", "configs", "models",
];

/// Included files between the project's own and the innermost.
pub const MAX_DEPTH: usize = 16;

/// One entry of `include`, in long form.
struct Entry {
    files: Vec<(PathBuf, Span)>,
    folder: PathBuf,
    /// `None`: the default `.env`, if there is one.
    env_files: Option<Vec<(PathBuf, Span)>>,
    span: Span,
}

/// Takes `include` out of a file's tree and puts in what it brings.
pub(crate) fn apply(root: &mut Node, model: &Model<'_>, session: &mut Session<'_>) {
    let Some(map) = root.as_map_mut() else { return };
    let Some(include) = map.shift_remove("include") else {
        return;
    };
    let Some(list) = include.as_seq() else {
        if !include.is_null() {
            session.diagnostics.error(
                Code::Schema,
                include.span,
                format!("include must be a list, not {}", include.kind()),
            );
        }
        return;
    };
    for item in list {
        if session.exhausted || session.diagnostics.full() {
            return;
        }
        let Some(entry) = read_entry(item, model, session) else {
            continue;
        };
        if let Some(imported) = load_entry(&entry, model, session) {
            import(imported, root, session);
        }
    }
}

const KEYS: [&str; 3] = ["path", "env_file", "project_directory"];

fn wrong(span: Span, what: String) -> Diagnostic {
    Diagnostic::error(Code::Schema, span, what)
}

/// What the entry names, and the mapping that it is, unless it is but a path.
fn form(item: &Node) -> Result<(&Node, Option<&Map>), Diagnostic> {
    match &item.value {
        Value::Str(_) => Ok((item, None)),
        Value::Map(map) => match map.get("path") {
            Some(path) => Ok((path, Some(map))),
            None => {
                let what = "include: the key `path` is missing";
                Err(wrong(item.span, what.into()))
            }
        },
        _ => Err(wrong(
            item.span,
            format!(
                "include: each entry is a path or a mapping, not {}",
                item.kind()
            ),
        )),
    }
}

fn read_entry(item: &Node, model: &Model<'_>, session: &mut Session<'_>) -> Option<Entry> {
    let (path, map) = match form(item) {
        Ok(said) => said,
        Err(wrong) => {
            session.diagnostics.push(wrong);
            return None;
        }
    };
    for (key, node) in map.into_iter().flatten() {
        if !KEYS.contains(&key.as_str()) {
            session.diagnostics.push(
                wrong(node.key, format!("unknown key `{key}` in include"))
                    .maybe_hint(crate::diag::did_you_mean(key, KEYS)),
            );
        }
    }
    let texts = texts(path, "include.path", session)?;
    if let Some((remote, span)) = texts.iter().find(|(text, _)| is_remote(text)) {
        session.diagnostics.push(
            Diagnostic::error(
                Code::Unsupported,
                *span,
                format!("`{remote}`: remote compose files are not supported"),
            )
            .hint("copy the file into the project"),
        );
        return None;
    }
    let base = paths::Base {
        folder: model.folder,
        home: model.home(),
    };
    let resolve = |(text, span): (String, Span)| (PathBuf::from(base.absolute(&text)), span);
    let files: Vec<_> = texts.into_iter().map(resolve).collect();
    let first = files.first()?.0.clone();
    let folder = match map.and_then(|map| map.get("project_directory")?.as_str()) {
        Some(folder) => PathBuf::from(base.absolute(folder)),
        None => paths::parent(&first),
    };
    let env_files = match map.and_then(|map| map.get("env_file")) {
        Some(node) => Some(
            self::texts(node, "include.env_file", session)?
                .into_iter()
                .map(resolve)
                .collect(),
        ),
        None => None,
    };
    Some(Entry {
        files,
        folder,
        env_files,
        span: item.span,
    })
}

fn texts(node: &Node, what: &str, session: &mut Session<'_>) -> Option<Vec<(String, Span)>> {
    let found = match &node.value {
        Value::Str(text) => Some(vec![(text.clone(), node.span)]),
        Value::Seq(seq) => seq
            .iter()
            .map(|item| Some((item.as_str()?.to_owned(), item.span)))
            .collect(),
        _ => None,
    };
    if found.is_none() {
        session.diagnostics.error(
            Code::Schema,
            node.span,
            format!("{what} must be a text or a list of texts"),
        );
    }
    found
}

fn load_entry(entry: &Entry, model: &Model<'_>, session: &mut Session<'_>) -> Option<Node> {
    let (main, _) = entry.files.first()?;
    if model.chain.len() > MAX_DEPTH {
        session.exhaust(
            entry.span,
            format!("compose files include each other over more than {MAX_DEPTH} steps"),
        );
        return None;
    }
    if model.chain.contains(main) {
        let mut names: Vec<String> = model
            .chain
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        names.push(main.display().to_string());
        session.diagnostics.error(
            Code::Cycle,
            entry.span,
            format!(
                "compose files include each other in a circle: {}",
                names.join(" -> ")
            ),
        );
        return None;
    }
    let environment = environment(entry, model.environment, session)?;
    let mut files = vec![];
    for (path, span) in &entry.files {
        let documents = session.documents(path, Some((Via::Include, *span)))?;
        files.push((path.clone(), documents));
    }
    let inner = Model {
        folder: &entry.folder,
        environment: &environment,
        chain: model.chain.clone(),
    };
    load_model(files, &inner, session)
}

/// The includer's variables, and below them those of the included project's env files.
fn environment(
    entry: &Entry,
    outer: &Environment,
    session: &mut Session<'_>,
) -> Option<Environment> {
    let mut found = Variables::new();
    match &entry.env_files {
        None => {
            let path = entry.folder.join(".env");
            if let Some(bytes) = session.read_optional(&path, entry.span, "the env file") {
                read_env(&path, &bytes, outer, &mut found, entry.span, session)?;
            }
        }
        Some(files) => {
            for (path, span) in files {
                if path == Path::new("/dev/null") {
                    continue;
                }
                let bytes = session.read(path, *span, "the env file")?;
                read_env(path, &bytes, outer, &mut found, *span, session)?;
            }
        }
    }
    let mut environment = outer.clone();
    for (name, value) in found {
        environment.entry(name).or_insert(value);
    }
    Some(environment)
}

/// Reads an env file's bytes into `found`; reports and gives `None` when they are wrong.
pub(crate) fn read_env(
    path: &Path,
    bytes: &[u8],
    outer: &Environment,
    found: &mut Variables,
    from: Span,
    session: &mut Session<'_>,
) -> Option<()> {
    let lookup = |name: &str| outer.get(name).cloned();
    match dotenv::parse(bytes, found, &lookup) {
        Ok(()) => Some(()),
        Err(error) => {
            session
                .diagnostics
                .error(Code::Syntax, from, format!("{}: {error}", path.display()));
            None
        }
    }
}

/// Puts what was included beside what the including file says itself; the same name on both
/// sides is an error, unless it says the same.
fn import(mut imported: Node, root: &mut Node, session: &mut Session<'_>) {
    for section in SECTIONS {
        let Some(from) = imported
            .as_map_mut()
            .and_then(|map| map.shift_remove(section))
        else {
            continue;
        };
        let Value::Map(from) = from.value else {
            continue;
        };
        let Some(map) = root.as_map_mut() else { return };
        let target = map
            .entry(section.to_owned())
            .or_insert_with(|| Node::map(Map::default(), Span::NONE));
        if target.is_null() {
            target.value = Value::Map(Map::default());
        }
        let Value::Map(target) = &mut target.value else {
            continue;
        };
        for (name, resource) in from {
            match target.get(&name) {
                Some(own) if output::to_json(own) != output::to_json(&resource) => {
                    session.diagnostics.push(
                        Diagnostic::error(
                            Code::Conflict,
                            own.key,
                            format!("{section}.{name} is defined here and in an included file"),
                        )
                        .also(resource.key, "included")
                        .hint("to change it, include a second file over the first: `path: [file, changes]`"),
                    );
                }
                Some(_) => {}
                None => {
                    target.insert(name, resource);
                }
            }
        }
    }
}
