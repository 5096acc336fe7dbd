//! System calls an instance may make: Docker's default profile, or one in Docker's
//! JSON form, as seccomp filters.
//!
//! A profile's actions become a stack of filters, of which the kernel takes the
//! most restrictive verdict: the first lets through what any rule names and gives
//! the default action for the rest; each further one gives one other action to
//! what its rules match. For the same verdict, the filter installed last says the
//! error number. So where an allowing and a refusing rule match the same call, it
//! is refused.
//!
//! `default.json` is the profile of the moby project (Apache-2.0), without the
//! rules for machines kiln doesn't run on; `syscalls-*.txt` are the kernel's numbers.

mod profile;

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use crate::capabilities;
use profile::{Action, Profile};

const DEFAULT_PROFILE: &str = include_str!("default.json");
const X86_64: &str = include_str!("syscalls-x86_64.txt");
const AARCH64: &str = include_str!("syscalls-aarch64.txt");

/// Calls that later kernels may add get ENOSYS under an allow-list, so that C
/// libraries fall back to what they know. No kernel comes near this number soon.
const LAST_UNKNOWN: i64 = 599;

/// Why a profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("the seccomp profile is not valid: {0}")]
    Parse(#[from] serde_json::Error),
    #[error("the seccomp profile is longer than {} bytes", profile::MAX_PROFILE)]
    TooLong,
    #[error("the seccomp profile uses {what} `{value}`, which kiln does not support{}", hint(.value))]
    Unsupported { what: &'static str, value: String },
    #[error("the seccomp profile has more than {max} {what}")]
    TooMany { what: &'static str, max: usize },
    #[error("the seccomp profile makes a filter the kernel does not take: {0}")]
    Compile(#[from] seccompiler::BackendError),
    #[error(
        "seccomp is not supported on this kind of machine; use `security_opt: [seccomp=unconfined]`"
    )]
    Machine,
}

fn hint(value: &str) -> &'static str {
    match value {
        "SCMP_ACT_NOTIFY" | "SCMP_ACT_TRACE" => " (nothing would answer)",
        _ => "",
    }
}

/// The machine and the instance a profile is translated for.
#[derive(Clone, Debug)]
pub struct Surroundings {
    pub arch: &'static str,
    /// The instance's capabilities: [`capabilities`].
    pub capabilities: u64,
    /// The kernel's `(major, minor)`.
    pub kernel: (u32, u32),
}

impl Surroundings {
    pub fn here(capabilities: u64) -> Self {
        Self {
            arch: std::env::consts::ARCH,
            capabilities,
            kernel: kernel_version(),
        }
    }
}

/// The running kernel's `(major, minor)`.
pub fn kernel_version() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Docker's default profile as filters, in the order they are installed.
pub fn default_filters(around: &Surroundings) -> Result<Vec<BpfProgram>, SeccompError> {
    filters(DEFAULT_PROFILE, around)
}

/// A profile in Docker's JSON form as filters, in the order they are installed.
pub fn filters(profile: &str, around: &Surroundings) -> Result<Vec<BpfProgram>, SeccompError> {
    let (arch, table) = match around.arch {
        "x86_64" => (TargetArch::x86_64, X86_64),
        "aarch64" => (TargetArch::aarch64, AARCH64),
        _ => return Err(SeccompError::Machine),
    };
    let numbers = numbers(table);
    let profile = Profile::parse(profile)?;
    let rules = profile.rules(around, &numbers)?;
    let default = profile.default_action;

    let mut by_action: BTreeMap<Action, Rules> = BTreeMap::new();
    for (action, number, rule) in rules {
        add(by_action.entry(action).or_default(), number, rule);
    }
    if default != Action::Allow && by_action.contains_key(&Action::Allow) {
        let last = numbers.values().max().copied().unwrap_or(0);
        let unknown = by_action
            .entry(Action::Errno(libc::ENOSYS as u32))
            .or_default();
        for number in last + 1..=LAST_UNKNOWN {
            add(unknown, number, None);
        }
    }

    let mut programs = Vec::new();
    if default != Action::Allow {
        let mut named = Rules::new();
        for (_, rules) in by_action.iter() {
            for (number, rules) in rules {
                if rules.is_empty() {
                    named.insert(*number, Vec::new());
                } else {
                    match named.entry(*number).or_insert_with(|| rules.clone()) {
                        all if all.is_empty() => {}
                        some => some.extend(rules.iter().cloned()),
                    }
                }
            }
        }
        programs.push(compile(named, default, Action::Allow, arch)?);
    }
    for (action, rules) in by_action {
        if action != Action::Allow && action != default {
            programs.push(compile(rules, Action::Allow, action, arch)?);
        }
    }
    Ok(programs)
}

/// No rules for a number: it always matches.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn add(rules: &mut Rules, number: i64, rule: Option<SeccompRule>) {
    match (rules.get_mut(&number), rule) {
        (Some(list), Some(rule)) if !list.is_empty() => list.push(rule),
        (Some(_), Some(_)) => {}
        (None, Some(rule)) => {
            rules.insert(number, vec![rule]);
        }
        (_, None) => {
            rules.insert(number, Vec::new());
        }
    }
}

fn compile(
    rules: Rules,
    otherwise: Action,
    matched: Action,
    arch: TargetArch,
) -> Result<BpfProgram, SeccompError> {
    let filter = SeccompFilter::new(rules, otherwise.into(), matched.into(), arch)?;
    Ok(filter.try_into()?)
}

impl From<Action> for SeccompAction {
    fn from(action: Action) -> Self {
        match action {
            Action::KillProcess => SeccompAction::KillProcess,
            Action::KillThread => SeccompAction::KillThread,
            Action::Trap => SeccompAction::Trap,
            Action::Errno(number) => SeccompAction::Errno(number),
            Action::Log => SeccompAction::Log,
            Action::Allow => SeccompAction::Allow,
        }
    }
}

fn numbers(table: &str) -> BTreeMap<&str, i64> {
    table
        .lines()
        .filter_map(|line| {
            let (name, number) = line.split_once(' ')?;
            Some((name, number.parse().ok()?))
        })
        .collect()
}

/// Whether the instance holds a capability that a profile names; unknown names are held by nobody.
fn holds(around: &Surroundings, name: &str) -> bool {
    capabilities::parse(name).is_ok_and(|bit| around.capabilities & bit == bit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn around(arch: &'static str, capabilities: u64) -> Surroundings {
        Surroundings {
            arch,
            capabilities,
            kernel: (6, 1),
        }
    }

    #[test]
    fn the_default_profile_compiles_on_both_machines() {
        for arch in ["x86_64", "aarch64"] {
            let plain = default_filters(&around(arch, 0)).unwrap();
            // The allow-list, and ENOSYS for clone3 and what is yet to come.
            assert_eq!(plain.len(), 2, "{arch}");
            default_filters(&around(arch, capabilities::ALL)).unwrap();
        }
        assert!(matches!(
            default_filters(&around("m68k", 0)),
            Err(SeccompError::Machine)
        ));
    }

    #[test]
    fn unsupported_things_are_refused_by_name() {
        let around = around("x86_64", 0);
        let error = |text: &str| filters(text, &around).unwrap_err().to_string();
        assert!(error("{").contains("not valid"));
        assert!(error(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).contains("`SCMP_ACT_NOTIFY`"));
        let arg = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":1,"op":"SCMP_CMP_FUNNY"}]}]}"#;
        assert!(error(arg).contains("SCMP_CMP_FUNNY"));
        let index = arg
            .replace("SCMP_CMP_FUNNY", "SCMP_CMP_EQ")
            .replace("\"index\":0", "\"index\":6");
        assert!(error(&index).contains("`6`"));
    }
}
