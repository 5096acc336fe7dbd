//! What files of goss say (goss.readthedocs.io, "The gossfile configuration"): resources of
//! a running system, each with what its attributes must be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Pattern;
use crate::Millis;

/// A file, and those that it includes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goss {
    pub resources: Vec<Resource>,
}

/// One thing that is looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resource {
    /// As the file calls it.
    pub id: String,
    pub skip: bool,
    pub probe: Probe,
    /// What each attribute must be, in the order of goss's own reports: the first says
    /// whether it is there at all; when that fails, the others are skipped.
    pub attributes: Vec<(Attribute, Matcher)>,
}

/// Where its attributes come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// `tcp://host:port`; whether it can be connected to.
    Addr {
        host: String,
        port: u16,
        timeout: Millis,
    },
    /// Run by the instance's `sh -c`.
    Command {
        exec: String,
        timeout: Millis,
    },
    Dns {
        host: String,
    },
    File {
        path: String,
    },
    Group {
        name: String,
    },
    Http(HttpProbe),
    Interface {
        name: String,
    },
    KernelParam {
        name: String,
    },
    Matching {
        content: Value,
    },
    Mount {
        path: String,
    },
    Package {
        name: String,
    },
    Port {
        protocol: PortProtocol,
        port: u16,
    },
    /// By the name of its program (`comm`).
    Process {
        comm: String,
    },
    User {
        name: String,
    },
}

/// One request of HTTP/1.1, and where it is redirected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpProbe {
    pub host: String,
    pub port: u16,
    /// With its query.
    pub path: String,
    pub method: String,
    pub headers: Vec<(String, String)>,
    /// Name and password.
    pub login: Option<(String, String)>,
    pub body: String,
    pub follow: bool,
    pub timeout: Millis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortProtocol {
    Tcp,
    Tcp6,
    Udp,
    Udp6,
}

impl PortProtocol {
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Tcp6, Self::Udp, Self::Udp6];

    /// Also the name of the kernel's table of its sockets.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tcp6 => "tcp6",
            Self::Udp => "udp",
            Self::Udp6 => "udp6",
        }
    }
}

/// An attribute's name, as the file has it (`exists`, `exit-status`, `ip` …).
pub type Attribute = String;

/// What an attribute must be. A value of another type is converted first, as goss does:
/// numbers and texts into each other, a text into the list of its lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matcher {
    /// A plain text: equal, as a text.
    Text(String),
    /// A plain number: equal, as a number.
    Number(f64),
    Bool(bool),
    /// `equal`: without conversion.
    Equal(Value),
    HavePrefix(String),
    HaveSuffix(String),
    MatchRegexp(Pattern),
    ContainSubstring(String),
    HaveLen(u64),
    /// Of lines: each of them is found, or not where it says so.
    HavePatterns(Vec<LinePattern>),
    HaveKey(Box<Matcher>),
    ContainElement(Box<Matcher>),
    /// Each by another element.
    ContainElements(Vec<Matcher>),
    /// The same, and no element is left.
    ConsistOf(Vec<Matcher>),
    Not(Box<Matcher>),
    And(Vec<Matcher>),
    Or(Vec<Matcher>),
    Compare {
        than: Comparison,
        number: f64,
    },
    /// Values within a text of JSON, by their paths: names and positions.
    Json(BTreeMap<String, Matcher>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    Gt,
    Ge,
    Lt,
    Le,
}

/// One of a list of patterns: `text`, `!text`, `/regex/`, `!/regex/flags`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinePattern {
    /// As the file has it.
    pub written: String,
    /// No line may be like this.
    pub inverse: bool,
    pub line: Line,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    Contains(String),
    Matches(Pattern),
}

impl LinePattern {
    /// Reads it as goss does (`matchers/have_patterns.go`).
    pub fn new(written: &str) -> Self {
        let inverse = written.starts_with('!');
        let core = written.strip_prefix('!').unwrap_or(written);
        let line = match regex(core) {
            Some(pattern) => Line::Matches(pattern),
            None => {
                let text = written.trim_start_matches(['\\', '/', '!']);
                Line::Contains(text.to_owned())
            }
        };
        Self {
            written: written.to_owned(),
            inverse,
            line,
        }
    }
}

/// `/regex/`, with flags `i`, `m` and `s` behind it.
fn regex(text: &str) -> Option<Pattern> {
    let (pattern, flags) = text.strip_prefix('/')?.rsplit_once('/')?;
    if !flags.chars().all(|flag| matches!(flag, 'i' | 'm' | 's')) {
        return None;
    }
    Some(Pattern(match flags.is_empty() {
        true => pattern.to_owned(),
        false => format!("(?{flags}){pattern}"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_lines_are_read_as_goss_reads_them() {
        let text = |text: &str| Line::Contains(text.into());
        let regex = |text: &str| Line::Matches(Pattern(text.into()));
        for (written, inverse, line) in [
            ("foo", false, text("foo")),
            ("!foo", true, text("foo")),
            ("\\!foo", false, text("foo")),
            ("/[Ff]oo/", false, regex("[Ff]oo")),
            ("!/a\\/b/i", true, regex("(?i)a\\/b")),
            ("/usr/bin", false, text("usr/bin")),
            ("/usr/x", false, text("usr/x")),
            ("/usr/", false, regex("usr")),
            ("", false, text("")),
        ] {
            let found = LinePattern::new(written);
            assert_eq!((found.inverse, found.line), (inverse, line), "{written}");
        }
    }
}
