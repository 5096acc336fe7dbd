//! Which honoured keys are looked at, and why the others are not.

use std::collections::BTreeSet;

const HONOURED: &str = include_str!("../../../../kiln-compose/schema/honoured.txt");

const LANGUAGE: &str =
    "it ends with reading the file: kiln-compose compares it with docker compose";
const BUILD: &str = "it ends with the image: kiln-build's tests look at what is built";
const WATCHED: &str = "no instance shows the rules: `watch` looks at what follows from them";
const RECORD: &str = "kept in the release; nothing in an instance shows it";
const ONE_VALUE: &str = "only the value that changes nothing is accepted";
const ROLLOUT: &str = "kiln-plan's rollouts and probes are tested against a simulated clock";

/// Keys, or all keys below one with `.**`, that no honour test looks at.
const NOT_LOOKED_AT: &[(&str, &str)] = &[
    ("include", LANGUAGE),
    ("include.**", LANGUAGE),
    ("name", LANGUAGE),
    ("services", LANGUAGE),
    ("services.*.extends", LANGUAGE),
    ("services.*.extends.**", LANGUAGE),
    ("services.*.profiles", LANGUAGE),
    ("services.*.develop", WATCHED),
    ("services.*.develop.**", WATCHED),
    ("services.*.label_file", LANGUAGE),
    ("services.*.build", BUILD),
    ("services.*.build.**", BUILD),
    ("services.*.image", BUILD),
    ("services.*.platform", BUILD),
    ("services.*.pull_policy", BUILD),
    ("networks.*.labels", RECORD),
    ("volumes.*.labels", RECORD),
    ("services.*.annotations", RECORD),
    ("services.*.labels", RECORD),
    ("services.*.deploy.labels", RECORD),
    ("networks.*.driver", ONE_VALUE),
    ("networks.*.enable_ipv4", ONE_VALUE),
    ("networks.*.enable_ipv6", ONE_VALUE),
    ("networks.*.ipam.config.[].gateway", ONE_VALUE),
    ("networks.*.ipam.driver", ONE_VALUE),
    ("services.*.deploy.endpoint_mode", ONE_VALUE),
    ("services.*.deploy.restart_policy.max_attempts", ROLLOUT),
    ("services.*.deploy.rollback_config", ROLLOUT),
    ("services.*.deploy.rollback_config.**", ROLLOUT),
    ("services.*.deploy.update_config", ROLLOUT),
    ("services.*.deploy.update_config.**", ROLLOUT),
    ("services.*.healthcheck.retries", ROLLOUT),
    ("services.*.healthcheck.start_interval", ROLLOUT),
    ("services.*.healthcheck.start_period", ROLLOUT),
    ("services.*.healthcheck.timeout", ROLLOUT),
];

#[test]
fn every_honoured_key_is_looked_at_or_has_a_reason() {
    let all = super::process::keys()
        .chain(super::storage::keys())
        .chain(super::network::keys())
        .chain(super::lifecycle::keys());
    let looked: BTreeSet<String> = all
        .flat_map(str::split_whitespace)
        .map(|key| match key.strip_prefix('/') {
            Some(top) => top.to_owned(),
            None => format!("services.*.{key}"),
        })
        .collect();
    let honoured: BTreeSet<&str> = HONOURED.lines().collect();
    let unknown: Vec<_> = looked
        .iter()
        .filter(|k| !honoured.contains(k.as_str()))
        .collect();
    assert!(unknown.is_empty(), "not honoured keys: {unknown:#?}");
    let excused = |key: &str| {
        NOT_LOOKED_AT
            .iter()
            .any(|(pattern, _)| match pattern.strip_suffix("**") {
                Some(above) => key.starts_with(above),
                None => key == *pattern,
            })
    };
    let neither: Vec<_> = honoured
        .iter()
        .filter(|key| !looked.contains(**key) && !excused(key))
        .collect();
    assert!(neither.is_empty(), "nobody looks at {neither:#?}");
    let both: Vec<_> = looked.iter().filter(|key| excused(key)).collect();
    assert!(both.is_empty(), "looked at, and excused: {both:#?}");
    for (pattern, _) in NOT_LOOKED_AT {
        let above = pattern.trim_end_matches("**");
        let used = honoured.iter().any(|key| match above == *pattern {
            true => key == pattern,
            false => key.starts_with(above),
        });
        assert!(used, "{pattern} is not in the schema's honoured keys");
    }
}
