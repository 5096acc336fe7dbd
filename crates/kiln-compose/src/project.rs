//! From options to a resolved project: names, profiles, environment files, what is used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map as JsonMap, Value as Json};

use crate::check;
use crate::defaults;
use crate::diag::{Code, Diagnostic, RenderOptions, Severity, did_you_mean, render};
use crate::dotenv::{self, Variables};
use crate::interpolate::{Environment, Interpolation};
use crate::model::{self, At, Binder};
use crate::model_files::{Model, load_model};
use crate::node::{Map, Node, Value};
use crate::output;
use crate::session::{Reader, Session};
use crate::span::{Sources, Span};
use crate::values;

/// The model's sections that compose knows, as it prints them.
const SECTIONS: [(&str, &[model::Field]); 6] = [
    ("services", model::SERVICE),
    ("networks", model::NETWORK),
    ("volumes", model::VOLUME),
    ("configs", model::FILE_OBJECT),
    ("secrets", model::FILE_OBJECT),
    ("models", model::MODEL),
];

/// What to load, and with what.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// The compose files in order, absolute; the later lie over the earlier.
    pub files: Vec<PathBuf>,
    /// The project's folder, absolute: relative paths count from here.
    pub folder: PathBuf,
    /// `--project-name`.
    pub project_name: Option<String>,
    /// The caller's environment with that of `.env` below it.
    pub environment: Environment,
    /// `--profile`; `*` is all.
    pub profiles: Vec<String>,
    /// Only these services and what they depend on; empty: all.
    pub services: Vec<String>,
    /// `--no-env-resolution`: leave `env_file` and `label_file` as they are.
    pub keep_env_files: bool,
    pub skip: Skip,
    /// Keys kiln doesn't honour that are taken as a warning: `services.*.gpus` or just `gpus`.
    pub allow_ignored: Vec<String>,
}

/// Steps that may be left out for printing. Nothing but printing may be done with what
/// comes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skip {
    /// Leave `${…}` as they are, and with them profiles and env files.
    pub interpolation: bool,
    /// Leave out what compose fills in: default networks, names, dependencies.
    pub normalization: bool,
    /// Leave relative paths as they are.
    pub paths: bool,
    /// Leave names that nothing defines.
    pub consistency: bool,
}

/// A project as compose would understand it.
#[derive(Clone, Debug)]
pub struct Project {
    pub name: String,
    /// Absolute.
    pub folder: PathBuf,
    /// The canonical tree: services that are active, and what they use.
    pub tree: Node,
    /// Services whose profile is not active.
    pub disabled: Map,
    pub environment: Environment,
    /// `${…}` are still in it: see [`Skip::interpolation`].
    pub raw: bool,
}

/// [`resolve`]'s result.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub project: Project,
    /// Notes and warnings.
    pub notes: Vec<Diagnostic>,
    /// Every file that was read, in order.
    pub files_read: Vec<PathBuf>,
    pub sources: Sources,
}

/// Why a project cannot be loaded: every reason that was found.
#[derive(Clone, Debug)]
pub struct LoadError {
    /// Errors first, then what else was noted.
    pub diagnostics: Vec<Diagnostic>,
    pub sources: Sources,
}

impl LoadError {
    pub(crate) fn new(mut diagnostics: Vec<Diagnostic>, sources: Sources) -> Self {
        let order = |d: &Diagnostic| (std::cmp::Reverse(d.severity), d.span.file, d.span.start);
        diagnostics.sort_by_key(order);
        Self {
            diagnostics,
            sources,
        }
    }

    pub(crate) fn usage(message: String) -> Self {
        let diagnostic = Diagnostic::error(Code::Usage, Span::NONE, message);
        Self::new(vec![diagnostic], Sources::default())
    }

    pub fn errors(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics
            .iter()
            .filter(|d| d.severity == Severity::Error)
    }

    /// All errors with their source text.
    pub fn render(&self, options: RenderOptions) -> String {
        let texts: Vec<String> = self
            .errors()
            .map(|d| render(d, &self.sources, options))
            .collect();
        texts.join("\n")
    }
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines: Vec<String> = self
            .errors()
            .map(|d| crate::diag::one_line(d, &self.sources))
            .collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for LoadError {}

/// Reads and resolves a project. Says everything that is wrong with it at once, as far as
/// one step allows the next.
pub fn resolve(options: &LoadOptions, reader: &dyn Reader) -> Result<Resolved, LoadError> {
    let mut session = Session::new(reader);
    let project = resolve_in(options, &mut session);
    finish(project, session)
}

pub(crate) fn finish(
    project: Option<Project>,
    session: Session<'_>,
) -> Result<Resolved, LoadError> {
    let diagnostics = session.diagnostics;
    match project {
        Some(project) if !diagnostics.has_errors() => Ok(Resolved {
            project,
            notes: diagnostics.into_list(),
            files_read: session.files_read,
            sources: session.sources,
        }),
        _ => Err(LoadError::new(diagnostics.into_list(), session.sources)),
    }
}

/// `None`: nothing to go on with. A project that comes with errors is for finding more.
pub(crate) fn resolve_in(options: &LoadOptions, session: &mut Session<'_>) -> Option<Project> {
    session.skip = options.skip;
    let mut files = vec![];
    for path in &options.files {
        if let Some(documents) = session.documents(path, None) {
            files.push((path.clone(), documents));
        }
    }
    if session.diagnostics.has_errors() {
        return None;
    }
    let name = project_name(options, &files, session)?;
    let mut environment = options.environment.clone();
    environment.insert("COMPOSE_PROJECT_NAME".into(), name.clone());
    let model = Model {
        folder: &options.folder,
        environment: &environment,
        chain: vec![],
    };
    let mut tree = load_model(files, &model, session)?;
    if tree.as_map().is_none_or(Map::is_empty) {
        session
            .diagnostics
            .error(Code::Schema, tree.span, "the compose file is empty");
        return None;
    }
    if !options.skip.normalization {
        defaults::normalize(&mut tree, &name, &environment);
    }
    if let Some(map) = tree.as_map_mut() {
        map.insert("name".into(), Node::str(name.clone(), Span::NONE));
    }
    let mut project = Project {
        name,
        folder: options.folder.clone(),
        tree,
        disabled: Map::default(),
        environment,
        raw: options.skip.interpolation,
    };
    if project.raw {
        return Some(project);
    }
    project.choose_profiles(options);
    if !options.skip.consistency {
        check::project(&project.tree, &project.disabled, &mut session.diagnostics);
    }
    project.choose_services(&options.services, session);
    project.scale();
    project.prune();
    project.read_environments(options, session);
    let types = project.types();
    types
        .into_iter()
        .for_each(|d| session.diagnostics.push_new(d));
    Some(project)
}

/// `--project-name`, COMPOSE_PROJECT_NAME, the files' `name`, the folder's name.
fn project_name(
    options: &LoadOptions,
    files: &[(PathBuf, Vec<Node>)],
    session: &mut Session<'_>,
) -> Option<String> {
    let from_env = options.environment.get("COMPOSE_PROJECT_NAME");
    let said = options
        .project_name
        .as_ref()
        .or(from_env.filter(|n| !n.is_empty()));
    if let Some(name) = said {
        if normalized_name(name) == *name && !name.is_empty() {
            return Some(name.clone());
        }
        session.diagnostics.push(
            Diagnostic::error(
                Code::Usage,
                Span::NONE,
                format!("`{name}` is not a valid project name"),
            )
            .hint("small letters, digits, `-` and `_`; the first a letter or digit"),
        );
        return None;
    }
    let mut name = String::new();
    let mut said = false;
    for document in files.iter().flat_map(|(_, documents)| documents) {
        if let Some(node) = document
            .get("name")
            .filter(|node| node.as_str() != Some(""))
        {
            let mut node = node.clone();
            Interpolation {
                environment: &options.environment,
                diagnostics: &mut session.diagnostics,
                warned: &mut session.warned,
            }
            .run(&mut node);
            name = normalized_name(node.as_str().unwrap_or_default());
            said = true;
        }
    }
    if !said {
        let folder = options.folder.file_name().unwrap_or_default();
        name = normalized_name(&folder.to_string_lossy());
    }
    if name.is_empty() {
        session.diagnostics.push(
            Diagnostic::error(
                Code::Usage,
                Span::NONE,
                "the project has no name of letters and digits".to_owned(),
            )
            .hint("say `name:` in the compose file, or --project-name"),
        );
        return None;
    }
    Some(name)
}

/// Compose's project name of a text: small letters, digits, `-` and `_`.
pub fn normalized_name(text: &str) -> String {
    let name: String = text
        .to_lowercase()
        .chars()
        .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-'))
        .collect();
    name.trim_start_matches(['_', '-']).to_owned()
}

impl Project {
    /// The active services.
    pub fn services(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.section("services")
    }

    /// A top-level section's entries.
    pub fn section(&self, section: &str) -> impl Iterator<Item = (&str, &Node)> {
        self.tree
            .get(section)
            .and_then(Node::as_map)
            .into_iter()
            .flatten()
            .map(|(key, node)| (key.as_str(), node))
    }

    fn services_mut(&mut self) -> Option<&mut Map> {
        self.tree.as_map_mut()?.get_mut("services")?.as_map_mut()
    }

    fn choose_profiles(&mut self, options: &LoadOptions) {
        let mut active: BTreeSet<String> = options.profiles.iter().cloned().collect();
        let Some(services) = self.services_mut() else {
            return;
        };
        // Choosing a service chooses its profiles.
        for name in &options.services {
            active.extend(services.get(name).map(profiles).unwrap_or_default());
        }
        let is_active = |service: &Node| {
            let own = profiles(service);
            own.is_empty() || active.contains("*") || own.iter().any(|p| active.contains(p))
        };
        let (on, off) = std::mem::take(services)
            .into_iter()
            .partition(|(_, service)| is_active(service));
        *services = on;
        self.disabled = off;
    }

    /// Keeps the chosen services and what they depend on.
    fn choose_services(&mut self, chosen: &[String], session: &mut Session<'_>) {
        if chosen.is_empty() {
            return;
        }
        let mut keep: BTreeSet<String> = BTreeSet::new();
        let mut todo: Vec<String> = chosen.to_vec();
        while let Some(name) = todo.pop() {
            let Some(service) = self.tree.at(&["services", &name]) else {
                if chosen.contains(&name) {
                    let known = self.services().map(|(name, _)| name);
                    session.diagnostics.push(
                        Diagnostic::error(
                            Code::Usage,
                            Span::NONE,
                            format!("there is no service `{name}`"),
                        )
                        .maybe_hint(did_you_mean(&name, known)),
                    );
                }
                continue;
            };
            if keep.insert(name) {
                let dependencies = service.get("depends_on").and_then(Node::as_map);
                todo.extend(dependencies.into_iter().flat_map(Map::keys).cloned());
            }
        }
        let Some(services) = self.services_mut() else {
            return;
        };
        let (on, off) = std::mem::take(services)
            .into_iter()
            .partition(|(name, _)| keep.contains(name));
        *services = on;
        let off: Map = off;
        self.disabled.extend(off);
    }

    /// `scale` is also said as deploy.replicas where there is a `deploy`.
    fn scale(&mut self) {
        for service in self.services_mut().into_iter().flat_map(Map::values_mut) {
            let Some(scale) = service.get("scale").cloned() else {
                continue;
            };
            if let Some(deploy) = service
                .as_map_mut()
                .and_then(|map| map.get_mut("deploy"))
                .and_then(Node::as_map_mut)
            {
                deploy.insert("replicas".into(), scale);
            }
        }
    }

    /// Takes out networks, volumes, configs, secrets and models that no service uses.
    fn prune(&mut self) {
        let mut used: BTreeSet<(&'static str, String)> = BTreeSet::new();
        for (_, service) in self.services() {
            used.extend(references(service));
        }
        let Some(map) = self.tree.as_map_mut() else {
            return;
        };
        for section in ["networks", "volumes", "configs", "secrets", "models"] {
            if let Some(Value::Map(entries)) = map.get_mut(section).map(|node| &mut node.value) {
                entries.retain(|key, _| used.contains(&(section, key.clone())));
            }
        }
    }

    fn read_environments(&mut self, options: &LoadOptions, session: &mut Session<'_>) {
        if options.keep_env_files {
            return;
        }
        let environment = self.environment.clone();
        let folder = self.folder.clone();
        for service in self.services_mut().into_iter().flat_map(Map::values_mut) {
            let Some(service) = service.as_map_mut() else {
                continue;
            };
            service_environment(service, &environment, &folder, session);
            service_labels(service, &folder, session);
        }
    }

    /// Everything that is not of its type.
    fn types(&self) -> Vec<Diagnostic> {
        let mut diagnostics = crate::diag::Diagnostics::default();
        let mut binder = Binder {
            diagnostics: &mut diagnostics,
            extensions: false,
        };
        // Each is dropped at once: all together they are as large as the model.
        for (section, fields) in SECTIONS {
            for (key, node) in self.sorted(section) {
                binder.bind(fields, node, &At::top(section).below(key));
            }
        }
        diagnostics.into_list()
    }

    fn sorted(&self, section: &str) -> Vec<(&str, &Node)> {
        let mut entries: Vec<_> = self.section(section).collect();
        entries.sort_by_key(|(key, _)| *key);
        entries
    }

    /// The model as `docker compose config --format json` prints it (without its escapes).
    pub fn model(&self, extensions: bool) -> Json {
        let mut binder = Binder {
            diagnostics: &mut crate::diag::Diagnostics::default(),
            extensions,
        };
        let mut out = JsonMap::new();
        out.insert("name".into(), Json::String(self.name.clone()));
        for (section, fields) in SECTIONS {
            let mut map = JsonMap::new();
            for (key, node) in self.sorted(section) {
                let bound = binder.bind(fields, node, &At::top(section).below(key));
                map.insert(key.to_owned(), bound);
            }
            if !map.is_empty() || section == "services" {
                out.insert(section.to_owned(), Json::Object(map));
            }
        }
        for (key, node) in self.tree.as_map().into_iter().flatten() {
            if key.starts_with("x-") {
                out.insert(key.clone(), output::to_json(node));
            }
        }
        Json::Object(out)
    }
}

fn profiles(service: &Node) -> Vec<String> {
    service
        .get("profiles")
        .and_then(values::texts)
        .unwrap_or_default()
}

/// The sections and keys that a service refers to.
fn references(service: &Node) -> Vec<(&'static str, String)> {
    let mut out = vec![];
    for section in ["networks", "models"] {
        let map = service.get(section).and_then(Node::as_map);
        out.extend(
            map.into_iter()
                .flatten()
                .map(|(key, _)| (section, key.clone())),
        );
    }
    let items = |node: Option<&Node>, key: &str| -> Vec<Node> {
        node.and_then(|n| n.get(key)?.as_seq())
            .unwrap_or_default()
            .to_vec()
    };
    for volume in items(Some(service), "volumes") {
        if volume.get("type").and_then(Node::as_str) == Some("volume") {
            out.extend(source(&volume).map(|key| ("volumes", key)));
        }
    }
    for config in items(Some(service), "configs") {
        out.extend(source(&config).map(|key| ("configs", key)));
    }
    let build = service.get("build");
    for secret in items(Some(service), "secrets")
        .iter()
        .chain(&items(build, "secrets"))
    {
        out.extend(source(secret).map(|key| ("secrets", key)));
    }
    out
}

fn source(node: &Node) -> Option<String> {
    node.get("source").and_then(Node::text)
}

/// Puts the variables of the service's env files below its own, and takes the files out.
fn service_environment(
    service: &mut Map,
    outer: &Environment,
    folder: &Path,
    session: &mut Session<'_>,
) {
    let own_node = service.get("environment").cloned();
    let span = own_node.as_ref().map_or(Span::NONE, |node| node.span);
    let own = match own_node.as_ref().map(values::key_values) {
        Some(Ok(pairs)) => pairs,
        // Reported when the types are checked.
        Some(Err(_)) => return,
        None => vec![],
    };
    let mut variables: Variables = own
        .iter()
        .filter_map(|(key, value)| Some((key.clone(), value.clone()?)))
        .collect();
    let lookup = |name: &str| {
        let own = || own.iter().find(|(key, _)| key == name)?.1.clone();
        outer.get(name).cloned().or_else(own)
    };
    let files = service.shift_remove("env_file");
    for file in files.iter().filter_map(Node::as_seq).flatten() {
        read_env_file(file, folder, &lookup, &mut variables, session);
    }
    if files.is_none() && own_node.is_none() {
        return;
    }
    let mut map: Map = variables
        .into_iter()
        .map(|(key, value)| (key, Node::str(value, span)))
        .collect();
    for (key, value) in own {
        let said = own_node.as_ref().and_then(|node| node.get(&key));
        let span = said.map_or(span, |node| node.span);
        let node = value.map_or_else(|| Node::null(span), |text| Node::str(text, span));
        map.insert(key, node);
    }
    crate::node::insert(service, "environment", Node::map(map, span));
}

fn read_env_file(
    file: &Node,
    folder: &Path,
    lookup: &dyn Fn(&str) -> Option<String>,
    variables: &mut Variables,
    session: &mut Session<'_>,
) {
    let Some(path) = file.get("path") else { return };
    let text = path.text().unwrap_or_default();
    let required = file
        .get("required")
        .is_none_or(|node| values::boolean(node).unwrap_or(true));
    // Absolute already, unless paths are printed as they are.
    let at = folder.join(&text);
    let bytes = if required {
        session.read(&at, path.span, "the env file")
    } else {
        session.read_optional(&at, path.span, "the env file")
    };
    let Some(bytes) = bytes else { return };
    let format = file.get("format").and_then(Node::text).unwrap_or_default();
    let result = match format.as_str() {
        "" | ".env" => dotenv::parse(&bytes, variables, lookup),
        "raw" => dotenv::parse_raw(&bytes, variables),
        other => {
            session.diagnostics.push(
                Diagnostic::error(
                    Code::Schema,
                    file.get("format").map_or(file.span, |node| node.span),
                    format!("`{other}` is not a format of env files"),
                )
                .hint("leave it out, or write `raw`"),
            );
            return;
        }
    };
    if let Err(error) = result {
        session
            .diagnostics
            .error(Code::Syntax, path.span, format!("{text}: {error}"));
    }
}

/// Puts the labels of the service's label files below its own.
fn service_labels(service: &mut Map, folder: &Path, session: &mut Session<'_>) {
    let Some(files) = service.shift_remove("label_file") else {
        return;
    };
    let mut labels = Variables::new();
    for file in files.as_seq().unwrap_or_default() {
        let path = file.text().unwrap_or_default();
        let Some(bytes) = session.read(&folder.join(&path), file.span, "the label file") else {
            continue;
        };
        // What an earlier file says comes before this one's own.
        let lookup = |name: &str| labels.get(name).cloned();
        let mut found = Variables::new();
        if let Err(error) = dotenv::parse(&bytes, &mut found, &lookup) {
            session
                .diagnostics
                .error(Code::Syntax, file.span, format!("{path}: {error}"));
        }
        labels.extend(found);
    }
    let own = service.get("labels").map(values::key_values);
    for (key, value) in own.into_iter().flatten().flatten() {
        labels.insert(key, value.unwrap_or_default());
    }
    if labels.is_empty() {
        return;
    }
    let map = labels
        .into_iter()
        .map(|(key, value)| (key, Node::str(value, files.span)))
        .collect();
    crate::node::insert(service, "labels", Node::map(map, files.span));
}
