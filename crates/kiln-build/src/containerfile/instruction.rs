//! From a logical line to a typed instruction.

use kiln_model::Millis;

use super::declared::Declared;
use super::flags::{Flags, Takes};
use super::heredoc::{self, Heredoc};
use super::syntax::{Form, Statement, behind_first};
use super::{Cause, Span, duration, mount, nearest, words};

/// Stands where no instruction is known yet.
pub(super) const ANY: &str = "the instruction";

/// A build stage: `FROM` and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub span: Span,
    /// The FROM line as written.
    pub text: String,
    /// Unexpanded.
    pub base: String,
    /// Lower case.
    pub name: Option<String>,
    /// Unexpanded.
    pub platform: Option<String>,
    pub instructions: Vec<Instruction>,
}

/// Anything but FROM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub span: Span,
    /// As written, continuation lines joined; heredoc bodies left out.
    pub text: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Add(Copy),
    Arg(Vec<Arg>),
    Cmd(CommandLine),
    Copy(Copy),
    /// No text has it: it comes of `x-kiln.image`.
    Declared(Box<Declared>),
    Entrypoint(CommandLine),
    Env(Vec<Pair>),
    Expose(Vec<String>),
    Healthcheck(Health),
    Label(Vec<Pair>),
    Maintainer(String),
    /// The trigger as written with its heredocs, and parsed.
    Onbuild(String, Box<Instruction>),
    Run(Run),
    Shell(Vec<String>),
    StopSignal(String),
    User(String),
    Volume(Vec<String>),
    Workdir(String),
}

impl Kind {
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Add(_) => "ADD",
            Kind::Arg(_) => "ARG",
            Kind::Cmd(_) => "CMD",
            Kind::Copy(_) => "COPY",
            Kind::Declared(_) => "x-kiln.image",
            Kind::Entrypoint(_) => "ENTRYPOINT",
            Kind::Env(_) => "ENV",
            Kind::Expose(_) => "EXPOSE",
            Kind::Healthcheck(_) => "HEALTHCHECK",
            Kind::Label(_) => "LABEL",
            Kind::Maintainer(_) => "MAINTAINER",
            Kind::Onbuild(..) => "ONBUILD",
            Kind::Run(_) => "RUN",
            Kind::Shell(_) => "SHELL",
            Kind::StopSignal(_) => "STOPSIGNAL",
            Kind::User(_) => "USER",
            Kind::Volume(_) => "VOLUME",
            Kind::Workdir(_) => "WORKDIR",
        }
    }
}

/// `KEY=value`, both unexpanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub key: String,
    pub value: String,
}

/// One variable of an `ARG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arg {
    pub name: String,
    pub default: Option<String>,
}

/// RUN, CMD, ENTRYPOINT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// Through the stage's shell.
    Shell(String),
    Exec(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub command: CommandLine,
    pub heredocs: Vec<Heredoc>,
    /// Unexpanded `--mount` values; their form is checked.
    pub mounts: Vec<String>,
    pub network: RunNetwork,
    /// `--security=insecure`.
    pub insecure: bool,
    pub devices: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunNetwork {
    #[default]
    Default,
    None,
    Host,
}

/// COPY and ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    pub sources: Vec<Source>,
    /// Unexpanded.
    pub destination: String,
    pub from: Option<String>,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    pub link: bool,
    pub parents: bool,
    pub exclude: Vec<String>,
    pub keep_git_dir: Option<bool>,
    pub checksum: Option<String>,
    pub unpack: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Unexpanded.
    Path(String),
    /// A heredoc: a file of its name.
    Inline {
        name: String,
        content: String,
        expand: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    None,
    Check {
        test: HealthCommand,
        interval: Option<Millis>,
        timeout: Option<Millis>,
        start_period: Option<Millis>,
        start_interval: Option<Millis>,
        retries: Option<u32>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthCommand {
    Shell(String),
    Exec(Vec<String>),
}

pub(super) enum Parsed {
    Stage(Stage),
    Instruction(Instruction),
}

const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// A statement of which it is known what it is.
struct Request<'a> {
    name: &'static str,
    statement: &'a Statement,
    escape: char,
}

pub(super) fn parse(statement: &Statement, escape: char) -> Result<Parsed, Cause> {
    let request = Request {
        name: known(&statement.keyword)?,
        statement,
        escape,
    };
    if request.name == "FROM" {
        return from(&request).map(Parsed::Stage);
    }
    let kind = match &statement.form {
        Form::Trigger(trigger) => onbuild(&request, trigger)?,
        _ => parse_kind(&request)?,
    };
    Ok(Parsed::Instruction(Instruction {
        span: statement.span,
        text: statement.text.clone(),
        kind,
    }))
}

/// The instruction of this name, whatever its case.
pub(super) fn keyword(written: &str) -> Option<&'static str> {
    let mut names = NAMES.into_iter();
    names.find(|name| name.eq_ignore_ascii_case(written))
}

fn known(written: &str) -> Result<&'static str, Cause> {
    keyword(written).ok_or_else(|| Cause::UnknownInstruction {
        name: written.to_owned(),
        near: nearest(written, &NAMES),
    })
}

fn parse_kind(request: &Request<'_>) -> Result<Kind, Cause> {
    match request.name {
        "ADD" => request.add().map(Kind::Add),
        "COPY" => request.copy().map(Kind::Copy),
        "RUN" => request.run().map(Kind::Run),
        "HEALTHCHECK" => request.healthcheck().map(Kind::Healthcheck),
        "ONBUILD" => {
            request.no_flags()?;
            Err(request.arguments("needs an instruction"))
        }
        _ => {
            request.no_flags()?;
            request.without_flags()
        }
    }
}

impl Request<'_> {
    fn arguments(&self, rule: &'static str) -> Cause {
        Cause::Arguments {
            instruction: self.name,
            rule,
        }
    }

    fn value(&self, text: &str, rule: &'static str) -> Cause {
        Cause::Value {
            instruction: self.name,
            text: text.to_owned(),
            rule,
        }
    }

    fn flags(&self, known: &[(&'static str, Takes)]) -> Result<Flags, Cause> {
        Flags::parse(self.name, &self.statement.flags, known)
    }

    fn rest(&self) -> &str {
        &self.statement.arguments
    }

    fn no_flags(&self) -> Result<(), Cause> {
        self.flags(&[]).map(|_| ())
    }

    fn without_flags(&self) -> Result<Kind, Cause> {
        match self.name {
            "ARG" => self.arg().map(Kind::Arg),
            "CMD" => Ok(Kind::Cmd(self.command())),
            "ENTRYPOINT" => Ok(Kind::Entrypoint(self.command())),
            "ENV" => self.pairs().map(Kind::Env),
            "LABEL" => self.pairs().map(Kind::Label),
            "EXPOSE" => self.list(words::plain(self.rest())).map(Kind::Expose),
            "MAINTAINER" => self.one().map(Kind::Maintainer),
            "SHELL" => self.shell().map(Kind::Shell),
            "STOPSIGNAL" => self.one().map(Kind::StopSignal),
            "USER" => self.one().map(Kind::User),
            "VOLUME" => self.volume().map(Kind::Volume),
            "WORKDIR" => self.one().map(Kind::Workdir),
            _ => Err(self.arguments("is not allowed here")),
        }
    }

    fn one(&self) -> Result<String, Cause> {
        if self.rest().is_empty() {
            return Err(self.arguments("needs one argument"));
        }
        Ok(self.rest().to_owned())
    }

    fn list(&self, words: Vec<String>) -> Result<Vec<String>, Cause> {
        if words.is_empty() {
            return Err(self.arguments("needs at least one argument"));
        }
        Ok(words)
    }

    /// The arguments that are a JSON array.
    fn json(&self) -> Option<Vec<String>> {
        match &self.statement.form {
            Form::Json(words) => Some(words.clone()),
            _ => None,
        }
    }

    fn json_or_words(&self) -> Vec<String> {
        self.json().unwrap_or_else(|| words::plain(self.rest()))
    }

    fn volume(&self) -> Result<Vec<String>, Cause> {
        let volumes = self.list(self.json_or_words())?;
        let volumes: Vec<String> = volumes.iter().map(|v| v.trim().to_owned()).collect();
        if volumes.iter().any(String::is_empty) {
            return Err(self.arguments("can't take an empty path"));
        }
        Ok(volumes)
    }

    fn shell(&self) -> Result<Vec<String>, Cause> {
        let rule = "must be in JSON form: SHELL [\"/bin/bash\", \"-c\"]";
        let words = self.json().ok_or_else(|| self.arguments(rule))?;
        self.list(words)
    }

    fn command(&self) -> CommandLine {
        match self.json() {
            Some(words) => CommandLine::Exec(words),
            None => CommandLine::Shell(self.rest().to_owned()),
        }
    }

    fn pairs(&self) -> Result<Vec<Pair>, Cause> {
        let pairs = match &self.statement.form {
            Form::Pairs(pairs) if !pairs.is_empty() => pairs.clone(),
            _ => return Err(self.arguments("needs at least one argument")),
        };
        match pairs.iter().any(|pair| pair.key.is_empty()) {
            true => Err(self.arguments("can't take an empty name")),
            false => Ok(pairs),
        }
    }

    fn arg(&self) -> Result<Vec<Arg>, Cause> {
        self.list(words::quoted(self.rest(), self.escape))?
            .iter()
            .map(|word| match word.split_once('=') {
                Some(("", _)) => Err(self.arguments("can't take an empty name")),
                Some((name, default)) => Ok(Arg {
                    name: name.to_owned(),
                    default: Some(default.to_owned()),
                }),
                None => Ok(Arg {
                    name: word.clone(),
                    default: None,
                }),
            })
            .collect()
    }

    fn add(&self) -> Result<Copy, Cause> {
        let mut flags = self.flags(&[
            ("chown", Takes::Text),
            ("chmod", Takes::Text),
            ("link", Takes::Bool),
            ("keep-git-dir", Takes::Bool),
            ("checksum", Takes::Text),
            ("unpack", Takes::Bool),
            ("exclude", Takes::Texts),
        ])?;
        let (sources, destination) = self.sources()?;
        Ok(Copy {
            sources,
            destination,
            chown: flags.text("chown"),
            chmod: flags.text("chmod"),
            link: flags.is("link").unwrap_or(false),
            exclude: flags.texts("exclude"),
            keep_git_dir: flags.is("keep-git-dir"),
            checksum: flags.text("checksum"),
            unpack: flags.is("unpack"),
            ..Copy::default()
        })
    }

    fn copy(&self) -> Result<Copy, Cause> {
        let mut flags = self.flags(&[
            ("from", Takes::Text),
            ("chown", Takes::Text),
            ("chmod", Takes::Text),
            ("link", Takes::Bool),
            ("parents", Takes::Bool),
            ("exclude", Takes::Texts),
        ])?;
        let (sources, destination) = self.sources()?;
        Ok(Copy {
            sources,
            destination,
            from: flags.text("from").filter(|from| !from.is_empty()),
            chown: flags.text("chown"),
            chmod: flags.text("chmod"),
            link: flags.is("link").unwrap_or(false),
            parents: flags.is("parents").unwrap_or(false),
            exclude: flags.texts("exclude"),
            ..Copy::default()
        })
    }

    fn sources(&self) -> Result<(Vec<Source>, String), Cause> {
        let mut words = self.json_or_words();
        let destination = match words.len() {
            0 | 1 => return Err(self.arguments("needs at least one source and a destination")),
            _ => words.pop().unwrap_or_default(),
        };
        if matches!(heredoc::parse(&destination), Ok(Some(_))) {
            return Err(self.arguments("can't take a heredoc as its destination"));
        }
        let sources = words.into_iter().map(|word| self.source(word)).collect();
        Ok((sources, destination))
    }

    fn source(&self, word: String) -> Source {
        let doc = heredoc::parse(&word).ok().flatten();
        let body = doc.and_then(|doc| self.statement.heredocs.iter().find(|h| h.name == doc.name));
        match body {
            None => Source::Path(word),
            Some(doc) => Source::Inline {
                name: doc.name.clone(),
                content: match doc.chomp {
                    true => heredoc::chomp(&doc.content),
                    false => doc.content.clone(),
                },
                expand: doc.expand,
            },
        }
    }

    fn run(&self) -> Result<Run, Cause> {
        let mut flags = self.flags(&[
            ("mount", Takes::Texts),
            ("network", Takes::Text),
            ("security", Takes::Text),
            ("device", Takes::Texts),
        ])?;
        let command = self.command();
        // A shell with nothing to do is fine, as docker has it.
        if command == CommandLine::Exec(Vec::new()) {
            return Err(self.arguments("needs a command"));
        }
        let network = match flags.text("network").as_deref() {
            None | Some("default") => RunNetwork::Default,
            Some("none") => RunNetwork::None,
            Some("host") => RunNetwork::Host,
            Some(other) => {
                return Err(flags.bad(
                    "network",
                    format!("takes default, none or host, not `{other}`"),
                ));
            }
        };
        let insecure = match flags.text("security").as_deref() {
            None | Some("sandbox") => false,
            Some("insecure") => true,
            Some(other) => {
                return Err(flags.bad(
                    "security",
                    format!("takes sandbox or insecure, not `{other}`"),
                ));
            }
        };
        let mounts = flags.texts("mount");
        for text in &mounts {
            mount::check(text).map_err(|cause| Cause::Mount {
                text: text.clone(),
                cause,
            })?;
        }
        Ok(Run {
            command,
            heredocs: self.statement.heredocs.to_vec(),
            mounts,
            network,
            insecure,
            devices: flags.texts("device"),
        })
    }

    fn healthcheck(&self) -> Result<Health, Cause> {
        let form = self.rest().split(char::is_whitespace).next();
        let form = form.unwrap_or_default();
        let rest = behind_first(self.rest());
        let mut flags = self.flags(&[
            ("interval", Takes::Text),
            ("timeout", Takes::Text),
            ("start-period", Takes::Text),
            ("start-interval", Takes::Text),
            ("retries", Takes::Text),
        ])?;
        if form.eq_ignore_ascii_case("none") {
            return match rest {
                "" => Ok(Health::None),
                _ => Err(self.arguments("NONE takes no arguments")),
            };
        }
        if !form.eq_ignore_ascii_case("cmd") {
            return Err(self.arguments("needs CMD and a command, or NONE"));
        }
        let test = match self.json() {
            Some(words) if words.is_empty() => return Err(self.arguments("CMD needs a command")),
            Some(words) => HealthCommand::Exec(words),
            None if rest.is_empty() => return Err(self.arguments("CMD needs a command")),
            None => HealthCommand::Shell(rest.to_owned()),
        };
        let mut span = |name: &str| -> Result<Option<Millis>, Cause> {
            let text = flags.text(name).unwrap_or_default();
            duration::parse(&text).map_err(|rule| flags.bad(name, format!("`{text}` {rule}")))
        };
        let (interval, timeout) = (span("interval")?, span("timeout")?);
        let (start_period, start_interval) = (span("start-period")?, span("start-interval")?);
        let retries = match flags.text("retries") {
            None => None,
            Some(text) => Some(text.parse::<u32>().map_err(|_| {
                flags.bad("retries", format!("takes a whole number, not `{text}`"))
            })?),
        };
        Ok(Health::Check {
            test,
            interval,
            timeout,
            start_period,
            start_interval,
            // 0 means Docker's default, like an absent flag.
            retries: retries.filter(|n| *n > 0),
        })
    }
}

fn from(request: &Request<'_>) -> Result<Stage, Cause> {
    let mut flags = request.flags(&[("platform", Takes::Text)])?;
    let mut words = words::plain(request.rest());
    let name = match words.as_slice() {
        [_] => None,
        [_, keyword, name] if keyword.eq_ignore_ascii_case("as") => {
            Some(stage_name(request, name)?)
        }
        _ => return Err(request.arguments("takes `image` or `image AS name`")),
    };
    Ok(Stage {
        span: request.statement.span,
        text: request.statement.text.clone(),
        base: words.swap_remove(0),
        name,
        platform: flags.text("platform"),
        instructions: Vec::new(),
    })
}

fn stage_name(request: &Request<'_>, name: &str) -> Result<String, Cause> {
    let lower = name.to_lowercase();
    let good = lower.starts_with(|c: char| c.is_ascii_lowercase())
        && lower
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    if !good {
        return Err(request.value(
            name,
            "can't name a stage: a letter, then letters, digits, `-`, `_` and `.`",
        ));
    }
    Ok(lower)
}

fn onbuild(request: &Request<'_>, trigger: &Statement) -> Result<Kind, Cause> {
    request.no_flags()?;
    let name = known(&trigger.keyword)?;
    if matches!(name, "ONBUILD" | "FROM" | "MAINTAINER") {
        return Err(request.value(name, "can't be triggered"));
    }
    let triggered = Request {
        name,
        statement: trigger,
        escape: request.escape,
    };
    let mut expression = trigger.text.clone();
    for doc in &trigger.heredocs {
        expression.push('\n');
        expression.push_str(&doc.content);
        expression.push_str(&doc.name);
    }
    Ok(Kind::Onbuild(
        expression,
        Box::new(Instruction {
            span: trigger.span,
            text: trigger.text.clone(),
            kind: parse_kind(&triggered)?,
        }),
    ))
}
