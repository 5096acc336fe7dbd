//! From a stage's instructions and its base's configuration to the steps that change
//! files, and the configuration the stage ends with. Pure: variables, shells, users and
//! folders are followed here, files are not touched.

use std::collections::BTreeMap;

use kiln_model::ImageConfig;
use kiln_model::spec::{ExposedPort, HealthTest, Healthcheck, Protocol};

use crate::containerfile::expand::{ExpandError, Lexer};
use crate::containerfile::mount::{self, Mount};
use crate::containerfile::{
    CommandLine, Containerfile, Copy, Health, HealthCommand, Instruction, Kind, Pair, Run,
    RunNetwork, Source, Span, chomp,
};
use crate::context::ignore::clean;
use crate::copy::mode::{self, ModeChange};

/// PATH where neither base nor file says one (as docker has it).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Build arguments that reach RUN without an ARG and never count for the cache.
const PROXIES: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Why a stage can't be evaluated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{span}: {cause}")]
pub struct EvaluateError {
    pub span: Span,
    pub cause: EvaluateCause,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluateCause {
    #[error("in `{text}`: {cause}")]
    Expansion { text: String, cause: ExpandError },
    #[error("--mount={text}: {cause}")]
    Mount { text: String, cause: String },
    #[error("{0} is not supported yet")]
    Unsupported(String),
    #[error("EXPOSE: `{0}` is not a port (like 80, 80/udp or 8000-8010)")]
    Port(String),
    #[error("--chmod: {0}")]
    Chmod(String),
    #[error("STOPSIGNAL: `{0}` is no signal's name or number")]
    Signal(String),
    #[error("{0} is empty once its variables are filled in")]
    Empty(&'static str),
}

/// One change of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub span: Span,
    /// The instruction as written.
    pub text: String,
    pub action: Action,
    pub history: String,
}

/// What is done, in the order of the file; what changes no file is history only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    None,
    Copy(CopyAction),
    Run(Box<RunAction>),
    /// WORKDIR: made with this owner if it is missing.
    Folder {
        path: String,
        user: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyAction {
    /// Archives are unpacked.
    pub unpack: bool,
    /// `--from`, unresolved.
    pub from: Option<String>,
    pub sources: Vec<Source>,
    /// Absolute; a trailing `/` says it is a folder.
    pub destination: String,
    pub chown: Option<String>,
    pub chmod: Option<ModeChange>,
    pub exclude: Vec<String>,
    pub parents: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunAction {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Proxy variables: given to the program, not part of what it is.
    pub proxies: BTreeMap<String, String>,
    pub cwd: String,
    pub user: String,
    pub network: RunNetwork,
    pub mounts: Vec<Mount>,
    /// A heredoc that is a script of its own: its name and text, at `/dev/pipes/<name>`.
    pub script: Option<(String, String)>,
}

/// What a stage comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluated {
    pub steps: Vec<Step>,
    pub config: ImageConfig,
    pub author: Option<String>,
    /// Variables for a stage built FROM this one.
    pub args: BTreeMap<String, String>,
}

/// What a stage begins with.
pub struct Start<'a> {
    pub config: ImageConfig,
    pub author: Option<String>,
    /// ARGs of the stage this one is built FROM.
    pub args: BTreeMap<String, String>,
    /// Values of the request.
    pub given: &'a BTreeMap<String, String>,
    pub globals: &'a BTreeMap<String, String>,
}

/// Evaluates the stage at `index`.
pub fn evaluate(
    file: &Containerfile,
    index: usize,
    start: Start<'_>,
) -> Result<Evaluated, EvaluateError> {
    let mut config = start.config;
    if !config.env.iter().any(|(name, _)| name == "PATH") {
        config.env.push(("PATH".into(), DEFAULT_PATH.into()));
    }
    let mut variables: BTreeMap<String, String> = config.env.iter().cloned().collect();
    for (name, value) in &start.args {
        variables
            .entry(name.clone())
            .or_insert_with(|| value.clone());
    }
    let mut state = State {
        lexer: Lexer::new(file.escape),
        config,
        author: start.author,
        variables,
        args: start.args,
        given: start.given,
        globals: start.globals,
        cmd_set: false,
    };
    let mut steps = Vec::new();
    for instruction in &file.stages[index].instructions {
        let (action, history) = state.step(instruction).map_err(|cause| EvaluateError {
            span: instruction.span,
            cause,
        })?;
        steps.push(Step {
            span: instruction.span,
            text: instruction.text.clone(),
            action,
            history,
        });
    }
    Ok(Evaluated {
        steps,
        config: state.config,
        author: state.author,
        args: state.args,
    })
}

struct State<'a> {
    lexer: Lexer,
    config: ImageConfig,
    author: Option<String>,
    /// Everything `$x` may mean now.
    variables: BTreeMap<String, String>,
    args: BTreeMap<String, String>,
    given: &'a BTreeMap<String, String>,
    globals: &'a BTreeMap<String, String>,
    /// CMD was given in this stage: ENTRYPOINT leaves it then.
    cmd_set: bool,
}

impl State<'_> {
    fn expand(&self, text: &str) -> Result<String, EvaluateCause> {
        self.lexer
            .word(text, &self.variables)
            .map_err(|cause| EvaluateCause::Expansion {
                text: text.to_owned(),
                cause,
            })
    }

    fn expand_all(&self, texts: &[String]) -> Result<Vec<String>, EvaluateCause> {
        texts.iter().map(|text| self.expand(text)).collect()
    }

    fn step(&mut self, instruction: &Instruction) -> Result<(Action, String), EvaluateCause> {
        let name = instruction.kind.name();
        match &instruction.kind {
            Kind::Copy(copy) => self.copy(name, copy),
            Kind::Add(copy) => self.copy(name, copy),
            Kind::Run(run) => self.run(run),
            Kind::Workdir(path) => self.workdir(path),
            kind => Ok((Action::None, format!("{name} {}", self.change(kind)?))),
        }
    }

    /// Changes the configuration; gives the text for the history.
    fn change(&mut self, kind: &Kind) -> Result<String, EvaluateCause> {
        Ok(match kind {
            Kind::Arg(args) => {
                let mut told = Vec::new();
                for arg in args {
                    told.push(self.arg(&arg.name, arg.default.as_deref())?);
                }
                told.join(" ")
            }
            Kind::Env(pairs) => {
                let pairs = self.pairs(pairs)?;
                let told = shown(&pairs);
                for (name, value) in pairs {
                    self.variables.insert(name.clone(), value.clone());
                    match self.config.env.iter_mut().find(|(n, _)| *n == name) {
                        Some((_, old)) => *old = value,
                        None => self.config.env.push((name, value)),
                    }
                }
                told
            }
            Kind::Label(pairs) => {
                let pairs = self.pairs(pairs)?;
                let told = shown(&pairs);
                self.config.labels.extend(pairs);
                told
            }
            Kind::Cmd(command) => {
                self.config.cmd = self.command(command);
                self.cmd_set = true;
                format!("{:?}", self.config.cmd)
            }
            Kind::Entrypoint(command) => {
                self.config.entrypoint = self.command(command);
                if !self.cmd_set {
                    self.config.cmd.clear();
                }
                format!("{:?}", self.config.entrypoint)
            }
            Kind::Expose(texts) => self.expose(texts)?,
            Kind::Healthcheck(health) => {
                self.config.healthcheck = healthcheck(health);
                format!("{:?}", health)
            }
            Kind::Maintainer(name) => {
                self.author = Some(name.clone());
                name.clone()
            }
            Kind::Shell(words) => {
                self.config.shell.clone_from(words);
                format!("{words:?}")
            }
            Kind::StopSignal(text) => {
                let text = self.expand(text)?;
                if !is_signal(&text) {
                    return Err(EvaluateCause::Signal(text));
                }
                self.config.stop_signal = Some(text.clone());
                text
            }
            Kind::User(text) => {
                let text = self.expand(text)?;
                if text.is_empty() {
                    return Err(EvaluateCause::Empty("USER"));
                }
                self.config.user.clone_from(&text);
                text
            }
            Kind::Volume(texts) => {
                let volumes = self.expand_all(texts)?;
                if volumes.iter().any(String::is_empty) {
                    return Err(EvaluateCause::Empty("a path of VOLUME"));
                }
                self.config.volumes.extend(volumes.iter().cloned());
                self.config.volumes.sort();
                self.config.volumes.dedup();
                format!("{volumes:?}")
            }
            Kind::Onbuild(text, _) => {
                return Err(EvaluateCause::Unsupported(format!("ONBUILD ({text})")));
            }
            Kind::Add(_) | Kind::Copy(_) | Kind::Run(_) | Kind::Workdir(_) => String::new(),
        })
    }

    fn pairs(&self, pairs: &[Pair]) -> Result<Vec<(String, String)>, EvaluateCause> {
        let expand = |p: &Pair| Ok((self.expand(&p.key)?, self.expand(&p.value)?));
        pairs.iter().map(expand).collect()
    }

    fn arg(&mut self, name: &str, default: Option<&str>) -> Result<String, EvaluateCause> {
        let name = self.expand(name)?;
        let value = match (self.given.get(&name), default) {
            (Some(given), _) => Some(given.clone()),
            (None, Some(text)) => Some(self.expand(text)?),
            (None, None) => self.globals.get(&name).cloned(),
        };
        Ok(match value {
            Some(value) => {
                let told = format!("{name}={value}");
                self.variables.insert(name.clone(), value.clone());
                self.args.insert(name, value);
                told
            }
            None => name,
        })
    }

    fn shell(&self) -> Vec<String> {
        match self.config.shell.as_slice() {
            [] => vec!["/bin/sh".into(), "-c".into()],
            words => words.to_vec(),
        }
    }

    fn command(&self, command: &CommandLine) -> Vec<String> {
        match command {
            CommandLine::Exec(words) => words.clone(),
            CommandLine::Shell(text) => {
                let mut words = self.shell();
                words.push(text.clone());
                words
            }
        }
    }

    fn expose(&mut self, texts: &[String]) -> Result<String, EvaluateCause> {
        let mut told = Vec::new();
        for text in texts {
            let words = self.lexer.words(text, &self.variables).map_err(|cause| {
                EvaluateCause::Expansion {
                    text: text.clone(),
                    cause,
                }
            })?;
            for word in words {
                let ports = ports(&word).ok_or_else(|| EvaluateCause::Port(word.clone()))?;
                self.config.exposed.extend(ports);
                told.push(word);
            }
        }
        self.config.exposed.sort();
        self.config.exposed.dedup();
        Ok(format!("[{}]", told.join(" ")))
    }

    fn workdir(&mut self, text: &str) -> Result<(Action, String), EvaluateCause> {
        let text = self.expand(text)?;
        if text.is_empty() {
            return Err(EvaluateCause::Empty("WORKDIR"));
        }
        let path = clean(&self.absolute(&text));
        self.config.working_dir.clone_from(&path);
        let history = format!("WORKDIR {path}");
        let user = self.config.user.clone();
        Ok(match path.as_str() {
            "/" => (Action::None, history),
            _ => (Action::Folder { path, user }, history),
        })
    }

    fn absolute(&self, path: &str) -> String {
        match path.starts_with('/') {
            true => path.to_owned(),
            false => format!("/{}/{path}", self.config.working_dir),
        }
    }

    fn copy(&self, name: &'static str, copy: &Copy) -> Result<(Action, String), EvaluateCause> {
        let add = name == "ADD";
        let unsupported = |what: &str| Err(EvaluateCause::Unsupported(format!("{name} {what}")));
        if copy.link {
            return unsupported("--link");
        }
        if copy.checksum.is_some() {
            return unsupported("--checksum");
        }
        if copy.keep_git_dir.is_some() {
            return unsupported("--keep-git-dir");
        }
        let mut sources = Vec::new();
        for source in &copy.sources {
            sources.push(match source {
                Source::Path(text) => {
                    let text = self.expand(text)?;
                    let remote = ["http://", "https://", "ftp://", "git://", "git@", "ssh://"];
                    if remote.iter().any(|scheme| text.starts_with(scheme)) {
                        return unsupported(&format!(
                            "of `{text}`: only files of the build context"
                        ));
                    }
                    Source::Path(text)
                }
                Source::Inline {
                    name,
                    content,
                    expand,
                } => Source::Inline {
                    name: name.clone(),
                    content: match expand {
                        true => self.expand_body(content)?,
                        false => content.clone(),
                    },
                    expand: false,
                },
            });
        }
        let chown = copy.chown.as_deref().map(|t| self.expand(t)).transpose()?;
        let chmod = copy.chmod.as_deref().map(|t| self.expand(t)).transpose()?;
        let chmod = chmod
            .filter(|t| !t.is_empty())
            .map(|t| mode::parse(&t).map_err(EvaluateCause::Chmod));
        let written = self.expand(&copy.destination)?;
        let folder = written.is_empty()
            || written.ends_with('/')
            || written.ends_with("/.")
            || written == ".";
        let mut destination = clean(&self.absolute(&written));
        if folder && !destination.ends_with('/') {
            destination.push('/');
        }
        let action = CopyAction {
            unpack: copy.unpack.unwrap_or(add),
            from: copy.from.clone(),
            sources,
            destination,
            chown: chown.filter(|t| !t.is_empty()),
            chmod: chmod.transpose()?,
            exclude: copy.exclude.clone(),
            parents: copy.parents,
        };
        let history = copied(name, &action);
        Ok((Action::Copy(action), history))
    }

    /// A heredoc's body: quotes mean nothing in it.
    fn expand_body(&self, text: &str) -> Result<String, EvaluateCause> {
        let lexer = Lexer {
            ignore_quotes: true,
            ..Lexer::new('\\')
        };
        lexer
            .word(text, &self.variables)
            .map_err(|cause| EvaluateCause::Expansion {
                text: text.to_owned(),
                cause,
            })
    }

    fn run(&self, run: &Run) -> Result<(Action, String), EvaluateCause> {
        let unsupported = |what: &str| Err(EvaluateCause::Unsupported(format!("RUN {what}")));
        if run.insecure {
            return unsupported("--security=insecure");
        }
        if !run.devices.is_empty() {
            return unsupported("--device");
        }
        let mut mounts = Vec::new();
        for text in &run.mounts {
            let mut mount = mount::parse(text, &self.lexer, &self.variables).map_err(|cause| {
                EvaluateCause::Mount {
                    text: text.clone(),
                    cause,
                }
            })?;
            if mount.kind == mount::MountKind::Ssh {
                return unsupported("--mount=type=ssh");
            }
            if mount.kind != mount::MountKind::Secret || !mount.target.is_empty() {
                mount.target = clean(&self.absolute(&mount.target));
            }
            if mount.target == "/" {
                return Err(EvaluateCause::Mount {
                    text: text.clone(),
                    cause: "the target can't be `/`".into(),
                });
            }
            mounts.push(mount);
        }
        let (command, script) = with_heredocs(run);
        let argv = match &script {
            Some((name, _)) => {
                let mut argv = self.shell();
                argv.push(format!("/dev/pipes/{name}"));
                argv
            }
            None => self.command(&command),
        };
        let proxies = PROXIES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.given.get(*name)?.clone())))
            .collect();
        let history = format!("RUN {}", argv.join(" "));
        let cwd = match self.config.working_dir.as_str() {
            "" => "/".to_owned(),
            path => clean(&format!("/{path}")),
        };
        let action = RunAction {
            argv,
            env: self.variables.clone(),
            proxies,
            cwd,
            user: self.config.user.clone(),
            network: run.network,
            mounts,
            script,
        };
        Ok((Action::Run(Box::new(action)), history))
    }
}

/// A command with its heredocs: one that is nothing but a heredoc runs its body; others
/// are given to the shell as they are written.
fn with_heredocs(run: &Run) -> (CommandLine, Option<(String, String)>) {
    let (CommandLine::Shell(text), [first, ..]) = (&run.command, run.heredocs.as_slice()) else {
        return (run.command.clone(), None);
    };
    let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = rest
        .strip_prefix("<<")
        .unwrap_or(rest)
        .trim_start_matches('-');
    let word = rest.trim();
    let quoted = [
        first.name.clone(),
        format!("\"{}\"", first.name),
        format!("'{}'", first.name),
    ];
    let alone = text.contains("<<") && run.heredocs.len() == 1 && quoted.iter().any(|q| q == word);
    if alone {
        let body = match first.chomp {
            true => chomp(&first.content),
            false => first.content.clone(),
        };
        return match body.starts_with("#!") {
            true => (run.command.clone(), Some((first.name.clone(), body))),
            false => (CommandLine::Shell(body), None),
        };
    }
    let mut whole = text.clone();
    for doc in &run.heredocs {
        whole.push('\n');
        whole.push_str(&doc.content);
        whole.push_str(&doc.name);
    }
    (CommandLine::Shell(whole), None)
}

fn copied(name: &str, action: &CopyAction) -> String {
    let mut told = name.to_owned();
    if let Some(chown) = &action.chown {
        told.push_str(&format!(" --chown={chown}"));
    }
    for source in &action.sources {
        match source {
            Source::Path(path) => told.push_str(&format!(" {path}")),
            Source::Inline { name, .. } => told.push_str(&format!(" <<{name}")),
        }
    }
    format!("{told} {}", action.destination)
}

fn shown(pairs: &[(String, String)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(" ")
}

fn healthcheck(health: &Health) -> Option<Healthcheck> {
    match health.clone() {
        Health::None => None,
        Health::Check {
            test,
            interval,
            timeout,
            start_period,
            start_interval,
            retries,
        } => Some(Healthcheck {
            test: Some(match test {
                HealthCommand::Exec(words) => HealthTest::Exec(words),
                HealthCommand::Shell(text) => HealthTest::Shell(text),
            }),
            interval,
            timeout,
            start_period,
            start_interval,
            retries,
        }),
    }
}

/// `80`, `80/udp`, `8000-8010`.
fn ports(text: &str) -> Option<impl Iterator<Item = ExposedPort>> {
    let (range, protocol) = match text.split_once('/') {
        Some((range, protocol)) => (range, protocol.to_ascii_lowercase()),
        None => (text, "tcp".into()),
    };
    let protocol = match protocol.as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let (from, to) = range.split_once('-').unwrap_or((range, range));
    let (from, to): (u16, u16) = (from.parse().ok()?, to.parse().ok()?);
    if from == 0 || to < from {
        return None;
    }
    Some((from..=to).map(move |port| ExposedPort { port, protocol }))
}

fn is_signal(text: &str) -> bool {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str| rest.is_empty() || rest[1..].parse::<u32>().is_ok_and(|n| n <= 30);
    NAMES.contains(&name)
        || name
            .strip_prefix("RTMIN")
            .is_some_and(|r| r.is_empty() || r.starts_with('+') && real_time(r))
        || name
            .strip_prefix("RTMAX")
            .is_some_and(|r| r.is_empty() || r.starts_with('-') && real_time(r))
}

#[cfg(test)]
mod tests;
