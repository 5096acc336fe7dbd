//! Checking and taking an instruction's `--flag[=value]`s.

use std::collections::BTreeMap;

use super::{Cause, nearest};

/// How often a flag may stand, and with what.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Bool,
    Text,
    /// May be repeated.
    Texts,
}

pub(super) struct Flags {
    instruction: &'static str,
    values: BTreeMap<&'static str, Vec<String>>,
}

impl Flags {
    /// Checks `given` against what the instruction knows.
    pub fn parse(
        instruction: &'static str,
        given: &[String],
        known: &[(&'static str, Takes)],
    ) -> Result<Self, Cause> {
        let mut values: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for flag in given {
            let (name, value) = match flag[2..].split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (&flag[2..], None),
            };
            let Some((key, form)) = known.iter().find(|(key, _)| *key == name) else {
                let names: Vec<&'static str> = known.iter().map(|(key, _)| *key).collect();
                return Err(Cause::UnknownFlag {
                    instruction,
                    flag: name.into(),
                    near: nearest(name, &names),
                });
            };
            let slot = values.entry(key).or_default();
            if !slot.is_empty() && *form != Takes::Texts {
                return Err(Cause::FlagTwice {
                    instruction,
                    flag: name.into(),
                });
            }
            slot.push(check(instruction, name, *form, value)?);
        }
        Ok(Self {
            instruction,
            values,
        })
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        self.values.remove(name).and_then(|mut v| v.pop())
    }

    pub fn texts(&mut self, name: &str) -> Vec<String> {
        self.values.remove(name).unwrap_or_default()
    }

    pub fn is(&mut self, name: &str) -> Option<bool> {
        self.text(name).map(|v| v == "true")
    }

    pub fn bad(&self, flag: &str, rule: impl Into<String>) -> Cause {
        Cause::FlagValue {
            instruction: self.instruction,
            flag: flag.into(),
            rule: rule.into(),
        }
    }
}

fn check(
    instruction: &'static str,
    name: &str,
    form: Takes,
    value: Option<&str>,
) -> Result<String, Cause> {
    let bad = |rule: String| Cause::FlagValue {
        instruction,
        flag: name.into(),
        rule,
    };
    match (form, value) {
        (Takes::Bool, None) => Ok("true".into()),
        (Takes::Bool, Some(value)) => match value.to_ascii_lowercase().as_str() {
            "" => Err(bad("needs a value after `=`".into())),
            "true" => Ok("true".into()),
            "false" => Ok("false".into()),
            _ => Err(bad(format!("takes true or false, not `{value}`"))),
        },
        (_, None) => Err(bad("needs a value".into())),
        (_, Some(value)) => Ok(value.to_owned()),
    }
}
