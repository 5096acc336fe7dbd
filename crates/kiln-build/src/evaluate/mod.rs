//! From a stage's instructions and its base's configuration to the steps that change
//! files, and the configuration the stage ends with. Pure: variables, shells, users and
//! folders are followed here, files are not touched.

mod copy;
mod run;

use std::collections::BTreeMap;

use kiln_model::ImageConfig;
use kiln_model::spec::{ExposedPort, HealthTest, Healthcheck, Protocol};

use crate::containerfile::expand::{ExpandError, Lexer};
use crate::containerfile::mount::Mount;
use crate::containerfile::{
    CommandLine, Containerfile, Declared, Health, HealthCommand, Instruction, Kind, Pair,
    RunNetwork, Span,
};
use crate::context::ignore::clean;
use crate::copy::mode::ModeChange;
use crate::remote::Remote;

/// PATH where neither base nor file says one (as docker has it).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Build arguments that reach RUN without an ARG and never count for the cache; also in
/// small letters, and always in both.
const PROXIES: [&str; 5] = [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
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
    #[error("--checksum {0}")]
    Checksum(&'static str),
    #[error(
        "RUN --security=insecure would give the command the rights of root on this machine; \
         kiln never does that: leave the flag out, or do it outside of the build"
    )]
    Insecure,
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
    Declared(Box<Declared>),
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
    pub sources: Vec<Taking>,
    /// Absolute; a trailing `/` says it is a folder.
    pub destination: String,
    pub chown: Option<String>,
    pub chmod: Option<ModeChange>,
    pub exclude: Vec<String>,
    pub parents: bool,
    /// A layer of its own: no link of what is there already is followed.
    pub link: bool,
}

/// What a COPY or ADD takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taking {
    /// A path or pattern in the context, or in what `from` names.
    Path(String),
    /// A heredoc, as a file of this name.
    Inline {
        name: String,
        content: String,
    },
    Remote(Remote),
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
    /// ONBUILD instructions, as written.
    pub on_build: Vec<String>,
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
    /// The base's ONBUILD instructions: they come first.
    pub triggers: &'a [Instruction],
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
        on_build: Vec::new(),
    };
    let mut steps = Vec::new();
    let own = &file.stages[index].instructions;
    for instruction in start.triggers.iter().chain(own) {
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
        on_build: state.on_build,
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
    on_build: Vec<String>,
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
            Kind::Declared(declared) => {
                Ok((Action::Declared(declared.clone()), declared.to_string()))
            }
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
                self.on_build.push(text.clone());
                text.clone()
            }
            Kind::Add(_) | Kind::Copy(_) | Kind::Declared(_) | Kind::Run(_) | Kind::Workdir(_) => {
                String::new()
            }
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

/// `80`, `80/udp`, `8000-8010`; of `8080:80` and `127.0.0.1:8080:80`, as docker takes them,
/// only the last means something to an image.
fn ports(text: &str) -> Option<impl Iterator<Item = ExposedPort>> {
    let (range, protocol) = match text.split_once('/') {
        Some((range, protocol)) => (range, protocol.to_ascii_lowercase()),
        None => (text, "tcp".into()),
    };
    let protocol = match protocol.as_str() {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let range = range.rsplit(':').next().unwrap_or(range);
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
