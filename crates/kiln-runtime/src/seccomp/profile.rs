//! Docker's seccomp profile form (moby `profiles/seccomp`): parsing and choosing
//! the rules that apply. Pure.

use std::collections::BTreeMap;

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use serde::Deserialize;

use super::{SeccompError, Surroundings, holds};

/// Docker's own profile has 20 KB.
pub const MAX_PROFILE: usize = 1 << 20;
const MAX_RULES: usize = 2000;
const MAX_NAMES: usize = 10_000;
/// A system call has six arguments.
const MAX_ARGS: usize = 6;

/// Ordered as the kernel ranks them, the most restrictive first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    KillProcess,
    KillThread,
    Trap,
    Errno(u32),
    Log,
    Allow,
}

impl Action {
    fn parse(name: &str, errno: Option<u32>) -> Result<Self, SeccompError> {
        Ok(match name {
            "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
            "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
            "SCMP_ACT_TRAP" => Action::Trap,
            "SCMP_ACT_ERRNO" => Action::Errno(errno.unwrap_or(libc::EPERM as u32)),
            "SCMP_ACT_LOG" => Action::Log,
            "SCMP_ACT_ALLOW" => Action::Allow,
            other => {
                return Err(SeccompError::Unsupported {
                    what: "the action",
                    value: other.to_owned(),
                });
            }
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    syscalls: Vec<Syscalls>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Syscalls {
    #[serde(default)]
    names: Vec<String>,
    name: Option<String>,
    action: String,
    errno_ret: Option<u32>,
    args: Option<Vec<Arg>>,
    includes: Option<Filter>,
    excludes: Option<Filter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Filter {
    caps: Vec<String>,
    arches: Vec<String>,
    min_kernel: Option<String>,
}

pub struct Profile {
    pub default_action: Action,
    syscalls: Vec<Syscalls>,
}

/// An action for one call; `None`: whatever its arguments.
type Rule = (Action, i64, Option<SeccompRule>);

impl Profile {
    pub fn parse(text: &str) -> Result<Self, SeccompError> {
        if text.len() > MAX_PROFILE {
            return Err(SeccompError::TooLong);
        }
        let file: File = serde_json::from_str(text)?;
        let names: usize = file.syscalls.iter().map(|s| s.names.len() + 1).sum();
        for (what, count, max) in [
            ("rules", file.syscalls.len(), MAX_RULES),
            ("names", names, MAX_NAMES),
        ] {
            if count > max {
                return Err(SeccompError::TooMany { what, max });
            }
        }
        Ok(Self {
            default_action: Action::parse(&file.default_action, file.default_errno_ret)?,
            syscalls: file.syscalls,
        })
    }

    /// The rules that apply to this machine and instance. Names this machine's
    /// kernel has no number for are left out: nobody can call them.
    pub fn rules(
        &self,
        around: &Surroundings,
        numbers: &BTreeMap<&str, i64>,
    ) -> Result<Vec<Rule>, SeccompError> {
        let mut rules = Vec::new();
        for entry in &self.syscalls {
            let action = Action::parse(&entry.action, entry.errno_ret)?;
            let conditions = conditions(entry.args.as_deref().unwrap_or_default())?;
            if !applies(entry, around)? {
                continue;
            }
            for name in entry.names.iter().chain(&entry.name) {
                let Some(number) = numbers.get(name.as_str()) else {
                    continue;
                };
                if conditions.is_empty() {
                    rules.push((action, *number, None));
                }
                for rule in &conditions {
                    rules.push((action, *number, Some(rule.clone())));
                }
            }
        }
        Ok(rules)
    }
}

fn applies(entry: &Syscalls, around: &Surroundings) -> Result<bool, SeccompError> {
    let arch = match around.arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if let Some(include) = &entry.includes {
        let caps = include.caps.iter().all(|c| holds(around, c));
        let arches = include.arches.is_empty() || include.arches.iter().any(|a| a == arch);
        if !(caps && arches && kernel_reaches(include, around)?.unwrap_or(true)) {
            return Ok(false);
        }
    }
    if let Some(exclude) = &entry.excludes {
        let caps = exclude.caps.iter().any(|c| holds(around, c));
        let arches = exclude.arches.iter().any(|a| a == arch);
        if caps || arches || kernel_reaches(exclude, around)?.unwrap_or(false) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn kernel_reaches(filter: &Filter, around: &Surroundings) -> Result<Option<bool>, SeccompError> {
    let Some(text) = &filter.min_kernel else {
        return Ok(None);
    };
    let parsed = text.split_once('.').and_then(|(major, minor)| {
        let minor = minor.split('.').next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    match parsed {
        Some(version) => Ok(Some(around.kernel >= version)),
        None => Err(SeccompError::Unsupported {
            what: "the kernel version",
            value: text.clone(),
        }),
    }
}

/// Conditions on different arguments hold together; several on one argument are
/// alternatives (as runc reads the form).
fn conditions(args: &[Arg]) -> Result<Vec<SeccompRule>, SeccompError> {
    if args.len() > MAX_ARGS {
        return Err(SeccompError::TooMany {
            what: "arguments in a rule",
            max: MAX_ARGS,
        });
    }
    let mut indexes: Vec<u8> = args.iter().map(|a| a.index).collect();
    indexes.sort_unstable();
    let repeated = indexes.windows(2).any(|pair| pair[0] == pair[1]);
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    if conditions.is_empty() {
        return Ok(Vec::new());
    }
    if repeated {
        return conditions
            .into_iter()
            .map(|c| Ok(SeccompRule::new(vec![c])?))
            .collect();
    }
    Ok(vec![SeccompRule::new(conditions)?])
}

fn condition(arg: &Arg) -> Result<SeccompCondition, SeccompError> {
    let unsupported = |what, value: String| SeccompError::Unsupported { what, value };
    if usize::from(arg.index) >= MAX_ARGS {
        return Err(unsupported("the argument index", arg.index.to_string()));
    }
    let (op, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (SeccompCmpOp::Ne, arg.value),
        "SCMP_CMP_LT" => (SeccompCmpOp::Lt, arg.value),
        "SCMP_CMP_LE" => (SeccompCmpOp::Le, arg.value),
        "SCMP_CMP_EQ" => (SeccompCmpOp::Eq, arg.value),
        "SCMP_CMP_GE" => (SeccompCmpOp::Ge, arg.value),
        "SCMP_CMP_GT" => (SeccompCmpOp::Gt, arg.value),
        "SCMP_CMP_MASKED_EQ" => (SeccompCmpOp::MaskedEq(arg.value), arg.value_two),
        other => return Err(unsupported("the comparison", other.to_owned())),
    };
    Ok(SeccompCondition::new(
        arg.index,
        SeccompCmpArgLen::Qword,
        op,
        value,
    )?)
}
