//! Files of goss, asked of the running instance: what goss would find within it, looked at
//! from outside, so that the image needs neither goss nor (but for commands) a shell.
//!
//! A resource that fails is looked at again until the checks' time is over, as every other
//! check; `retry_count` has nothing to add. Names are resolved by the instance's own
//! files; only its loopback can be reached.

mod http;
mod inside;
mod matcher;
mod network;
mod packages;
mod probe;

use std::collections::BTreeMap;

use kiln_model::suite::Resource;
use serde_json::Value;

use self::inside::Inside;
use super::sheet::CaseResult;

/// What was found of a resource, by attribute. Of what is not there, that it is not.
type Found = BTreeMap<&'static str, Value>;

/// One attempt: what became of each attribute.
pub(super) fn look(inside: &Inside<'_>, resource: &Resource) -> Vec<(String, CaseResult)> {
    let name = |attribute: &str| format!("{}: {attribute}", resource.id);
    if resource.skip {
        let why = || CaseResult::Skipped("the file says so".into());
        let attributes = resource.attributes.iter();
        return attributes.map(|(a, _)| (name(a), why())).collect();
    }
    let asked = |attribute: &str| resource.attributes.iter().any(|(a, _)| a == attribute);
    let found = probe::look(inside, &resource.probe, &asked);
    let mut results: Vec<(String, CaseResult)> = Vec::new();
    let mut absent = false;
    for (at, (attribute, wanted)) in resource.attributes.iter().enumerate() {
        let value = found.as_ref().map_err(String::clone).and_then(|found| {
            let value = found.get(attribute.as_str());
            value.ok_or_else(|| format!("there is no {attribute}"))
        });
        let result = match value {
            _ if absent => CaseResult::Skipped("it is not there as it should be".into()),
            Err(cause) => CaseResult::Failed(cause),
            Ok(value) => match matcher::check(wanted, value) {
                Ok(()) => CaseResult::Passed,
                Err(cause) => CaseResult::Failed(cause),
            },
        };
        // The first says whether it is there: without it the others say nothing.
        let gone = value_is_false(found.as_ref().ok(), attribute);
        absent |= at == 0 && (gone || matches!(result, CaseResult::Failed(_)));
        results.push((name(attribute), result));
    }
    results
}

fn value_is_false(found: Option<&Found>, attribute: &str) -> bool {
    found.and_then(|found| found.get(attribute)) == Some(&Value::Bool(false))
}

pub(super) use inside::Inside as Instance;
