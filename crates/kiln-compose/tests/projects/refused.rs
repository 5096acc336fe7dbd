//! What is wrong, can't be honoured or has no effect is told, with its place.

use kiln_compose::Severity;
use kiln_model::spec::FileSource;

use super::*;

#[test]
fn unsupported_keys_are_refused_with_their_place_and_may_be_allowed() {
    let text = "services:\n  a:\n    image: x\n    gpus: all\n    deploy:\n      placement: {constraints: [x]}\n    network_mode: bridge\n";
    let files = Files::new(&[("compose.yaml", text)]);
    let error = files.load().expect_err("refused");
    let shown: Vec<_> = error
        .errors()
        .map(|d| {
            (
                d.key.clone().unwrap().into_string(),
                error.sources.place(d.span).unwrap().line,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("services.*.gpus".to_owned(), 4),
            ("services.*.deploy.placement".to_owned(), 6),
            ("services.*.network_mode".to_owned(), 7)
        ]
    );
    let mut options = files.options();
    options.allow_ignored = vec![
        "gpus".into(),
        "deploy.placement".into(),
        "services.*.network_mode".into(),
    ];
    let loaded = files.load_with(&options).expect("allowed");
    let warnings = loaded
        .notes
        .iter()
        .filter(|n| n.severity == Severity::Warning)
        .count();
    assert_eq!(warnings, 3);
}

#[test]
fn values_that_cannot_be_honoured_are_refused() {
    for service in [
        "pid: container:x",
        "logging: {driver: syslog}",
        "security_opt: [systempaths=unconfined]",
        "ports: [80/sctp]",
        "volumes: [{type: npipe, source: x, target: /x}]",
        "userns_mode: keep",
        "deploy: {endpoint_mode: dnsrr}",
        "tmpfs: ['/x:uid=5']",
        "volumes_from: ['container:x']",
        "build: 'https://example.com/x.git'",
        "pull_policy: refresh",
        "network_mode: container:x",
    ] {
        let found = codes(&format!("services: {{a: {{image: x, {service}}}}}"));
        assert_eq!(found, [Code::Unsupported], "{service}");
    }
    for network in [
        "driver: overlay",
        "enable_ipv6: true",
        "driver_opts: {x: y}",
        "ipam: {config: [{subnet: 'fd00::/64'}]}",
    ] {
        let found = codes(&format!(
            "services: {{a: {{image: x, networks: [n]}}}}\nnetworks: {{n: {{{network}}}}}"
        ));
        assert_eq!(found, [Code::Unsupported], "{network}");
    }
}

#[test]
fn unknown_x_kiln_keys_are_errors_and_other_extensions_are_not() {
    let found = errors(&[(
        "compose.yaml",
        "x-own: {a: b}\nx-kiln: {basis: {}}\nservices: {a: {image: x, x-team: z, x-kiln: {scrach: [/x], test: [{http: {port: 80}, tcp: 5}]}, volumes: [{type: volume, target: /v, x-kiln: {exe: true}}]}}",
    )]);
    let hints: Vec<_> = found
        .iter()
        .map(|d| d.hint.clone().unwrap_or_default())
        .collect();
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(
        hints[0].contains("bases") && hints[1].contains("scratch"),
        "{hints:?}"
    );
}

#[test]
fn strategies_that_contradict_the_rest_are_errors() {
    for (keys, says) in [
        ("x-kiln: {rollout: canary}", "needs `steps`"),
        ("x-kiln: {rollout: {strategy: canary}}", "needs `steps`"),
        ("x-kiln: {rollout: {strategy: handoff}}", "is `rolling`"),
        (
            "x-kiln: {rollout: {steps: [{weight: 5%, duration: 1m}]}}",
            "say `strategy: canary`",
        ),
        (
            "x-kiln: {rollout: {analysis: {prometheus: {url: 'http://p', query: up, min: 1}}}}",
            "say `strategy: canary`",
        ),
        (
            "x-kiln: {rollout: {monitor: 0s, analysis: {max_error_rate: 1%}}}",
            "takes away",
        ),
        (
            "x-kiln: {rollout: {strategy: canary, steps: [{weight: 5, duration: 1m}]}}, \
             deploy: {update_config: {order: stop-first}}",
            "stop-first",
        ),
        (
            "x-kiln: {rollout: {strategy: canary, steps: [{weight: 5, duration: 1m}]}}, \
             deploy: {update_config: {parallelism: 2}}",
            "parallelism",
        ),
        ("x-kiln: {exclusive: true}, scale: 2", "several replicas"),
        ("x-kiln: {max_age: 1s}", "too short"),
        ("x-kiln: {snapshot: true}", "no named volume"),
        ("x-kiln: {snapshot: [data]}", "no volume `data`"),
        ("x-kiln: {max_age: 1h, rollout: recreate}", "too old"),
        (
            "x-kiln: {rollout: {strategy: recreate, keep_warm: 1m}}",
            "none is kept warm",
        ),
        (
            "x-kiln: {rollout: recreate}, deploy: {update_config: {order: start-first}}",
            "recreate",
        ),
        (
            "x-kiln: {rollout: recreate}, deploy: {update_config: {parallelism: 2}}",
            "recreate",
        ),
        (
            "x-kiln: {rollout: blue-green}, deploy: {update_config: {order: stop-first}}",
            "blue-green",
        ),
        (
            "x-kiln: {rollout: blue-green}, deploy: {update_config: {parallelism: 2}}",
            "blue-green",
        ),
        (
            "x-kiln: {rollout: {keep_warm: 1m}}, deploy: {update_config: {order: stop-first}}",
            "nothing is left",
        ),
    ] {
        let text = format!("services: {{a: {{image: x, {keys}}}}}");
        let found = errors(&[("compose.yaml", &text)]);
        assert_eq!(found.len(), 1, "{keys}: {found:#?}");
        assert!(found[0].message.contains(says), "{keys}: {found:#?}");
    }
}

#[test]
fn steps_and_limits_that_make_no_sense_are_errors() {
    let step = "steps: [{weight: 5, duration: 1m}]";
    for (keys, says) in [
        ("steps: [{weight: 5}]", "`duration` is missing"),
        ("steps: [{duration: 1m}]", "`weight` is missing"),
        ("steps: [{weight: 0, duration: 1m}]", "from 1 to 100"),
        ("steps: [{weight: 101%, duration: 1m}]", "from 1 to 100"),
        ("steps: [{weight: 5, duration: 0s}]", "longer than nothing"),
        (
            "steps: [{weight: 5, duration: 1m}, {weight: 5, duration: 1m}]",
            "more than the step's before",
        ),
        ("analysis: {max_error_rate: much}", "a share like `1%`"),
        ("analysis: {max_error_rate: -1%}", "a share like `1%`"),
        ("analysis: {max_latency_p99: 0s}", "longer than nothing"),
        ("analysis: {max_errors: 1}", "unknown key `max_errors`"),
        ("analysis: {min_requests: -1}", "out of range"),
        (
            "analysis: {prometheus: {query: up, min: 1}}",
            "`url` is missing",
        ),
        (
            "analysis: {prometheus: {url: 'http://p', min: 1}}",
            "`query` is missing",
        ),
        (
            "analysis: {prometheus: {url: 'http://p', query: up}}",
            "a limit is missing",
        ),
        (
            "analysis: {prometheus: {url: 'https://p', query: up, min: 1}}",
            "plain HTTP",
        ),
        (
            "analysis: {prometheus: {url: 'http://p', query: up, max: .inf}}",
            "number",
        ),
    ] {
        let more = if keys.starts_with("steps") { "" } else { step };
        let text = format!(
            "services: {{a: {{image: x, x-kiln: {{rollout: {{strategy: canary, {keys}, {more}}}}}}}}}"
        );
        let found = errors(&[("compose.yaml", &text)]);
        assert_eq!(found.len(), 1, "{keys}: {found:#?}");
        assert!(found[0].message.contains(says), "{keys}: {found:#?}");
    }
}

#[test]
fn everything_wrong_is_told_at_once() {
    let found = errors(&[(
        "compose.yaml",
        "services:\n  a:\n    imagee: x\n    depends_on: [bb]\n    volumes: [dat:/x]\n    gpus: all\n    x-kiln: {redy: 1}\n  b:\n    image: ${TAG:?}\n    restart: perhaps\n    healthcheck: {interval: 5parsec}\nvolumes: {data: }\n",
    )]);
    assert_eq!(found.len(), 8, "{found:#?}");
}

#[test]
fn an_error_shows_its_source_and_where_the_file_came_from() {
    let files = Files::new(&[
        (
            "compose.yaml",
            "include:\n  - sub/inner.yaml\nservices: {}\n",
        ),
        (
            "sub/inner.yaml",
            "services:\n  a:\n    image: x\n    prts: [80]\n",
        ),
    ]);
    let error = files.load().expect_err("refused");
    let text = error.render(kiln_compose::RenderOptions::default());
    for part in [
        "unknown key `prts`",
        "inner.yaml:4:5",
        "did you mean `ports`?",
        "included from /p/compose.yaml:2:5",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert_eq!(
        error.to_string(),
        "/p/sub/inner.yaml:4:5: error: unknown key `prts` in services.a (did you mean `ports`?)"
    );
}

#[test]
fn circles_are_errors() {
    assert_eq!(
        codes("services: {a: {extends: b}, b: {extends: a}}")[0],
        Code::Cycle
    );
    assert_eq!(
        codes("services: {a: {image: x, depends_on: [b]}, b: {image: x, depends_on: [a]}}"),
        [Code::Cycle]
    );
    let found = errors(&[
        (
            "compose.yaml",
            "include: [b.yaml]\nservices: {a: {image: x}}",
        ),
        ("b.yaml", "include: [c.yaml]"),
        ("c.yaml", "include: [b.yaml]"),
    ]);
    assert_eq!(found[0].code, Code::Cycle);
}

#[test]
fn what_grows_without_end_is_bounded() {
    // Each file includes the next twice.
    let mut files: Vec<(String, String)> = vec![(
        "compose.yaml".into(),
        "include: [f0.yaml]\nservices: {a: {image: x}}".into(),
    )];
    for n in 0..20 {
        let text = format!("include: [f{0}.yaml, f{0}.yaml]", n + 1);
        files.push((format!("f{n}.yaml"), text));
    }
    files.push(("f20.yaml".into(), "services: {z: {image: x}}".into()));
    let files: Vec<_> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    assert_eq!(errors(&files)[0].code, Code::Limit);
    // Each service extends the one before and copies all that it has.
    let list: Vec<String> = (0..2000)
        .map(|n| n.to_string())
        .map(|n| format!("'x{n}'"))
        .collect();
    let list = list.join(", ");
    let mut text = format!("services:\n  s0: {{image: x, security_opt: [{list}]}}\n");
    for n in 1..2000 {
        text.push_str(&format!("  s{n}: {{extends: s{}}}\n", n - 1));
    }
    assert!(codes(&text).contains(&Code::Limit));
}

#[test]
fn notes_say_what_has_no_effect() {
    let loaded =
        one("version: '3'\nservices: {a: {image: '${UNSET}x', attach: true, command: a | b}}");
    let text: Vec<_> = loaded.notes.iter().map(|n| n.message.clone()).collect();
    assert_eq!(loaded.notes.len(), 4, "{text:#?}");
}

#[test]
fn broken_files_end_in_one_error() {
    for text in [
        "a: [",
        "\t",
        "a: 'x",
        "services: {a: *x}",
        "- a",
        "x",
        "%YAML 9",
        "{",
        "a: b: c",
        "\u{0}",
        "? [a]\n: b",
    ] {
        let found = errors(&[("compose.yaml", text)]);
        assert!(!found.is_empty(), "{text:?}");
    }
}

/// What the model has a place for, but nothing carries out.
const LATER: &str = r#"
services:
  web:
    image: x
    post_start: [{command: [echo]}]
    cgroup_parent: x
    pid: service:db
    ipc: service:db
    uts: service:db
    networks: {shared: {gw_priority: 1}}
    volumes: ["nfs:/nfs"]
    configs: [conf]
    secrets: [key]
    deploy: {restart_policy: {window: 1s}}
  db: {image: y}
networks: {shared: {external: true}}
volumes: {nfs: {driver_opts: {type: nfs, o: addr=host, device: ":/x"}}}
configs: {conf: {external: true}}
secrets: {key: {external: {name: other}}}
"#;

#[test]
fn what_is_not_carried_out_is_refused_with_its_line_but_printed() {
    let files = Files::new(&[("compose.yaml", LATER)]);
    let error = files.load().expect_err("refused");
    let mut shown: Vec<_> = error
        .errors()
        .map(|d| {
            assert!(d.hint.is_some(), "{d:?}");
            let place = error.sources.place(d.span).unwrap();
            (place.line, d.key.clone().unwrap_or_default().into_string())
        })
        .collect();
    shown.sort();
    let expected = [
        (6, "services.*.cgroup_parent"),
        (9, "services.*.uts"),
        (10, "services.*.networks.*.gw_priority"),
        (17, "volumes.*.driver_opts"),
    ];
    let shown: Vec<_> = shown.iter().map(|(n, key)| (*n, key.as_str())).collect();
    assert_eq!(shown, expected);
    let options = files.options();
    let reader = |path: &Path| -> io::Result<Vec<u8>> {
        let text = files.0.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.clone().into_bytes())
    };
    let resolved = kiln_compose::resolve(&options, &reader).expect("docker compose prints it");
    let printed = resolved.project.config_json();
    assert_eq!(
        printed["services"]["web"]["post_start"][0]["command"][0],
        "echo"
    );
    assert_eq!(printed["networks"]["shared"]["external"], true);
}

#[test]
fn what_is_not_carried_out_may_be_ignored_unless_something_would_be_missing() {
    let files = Files::new(&[("compose.yaml", LATER)]);
    let mut options = files.options();
    options.allow_ignored = ["cgroup_parent", "uts", "gw_priority", "driver_opts"]
        .map(Into::into)
        .to_vec();
    let text = LATER.replace("cgroup_parent: x", "provider: {type: y}");
    let wrong = Files::new(&[("compose.yaml", &text)]);
    options.allow_ignored.push("provider".into());
    let error = wrong.load_with(&options).expect_err("nothing to run");
    let keys: Vec<_> = error.errors().map(|d| d.key.as_deref()).collect();
    assert_eq!(keys, [Some("services.*.provider")]);
    let loaded = files.load_with(&options).expect("ignored");
    let web = &loaded.spec.services["web"];
    let kept = |name: &str| Some(FileSource::External(name.into()));
    assert_eq!(loaded.spec.configs.get("conf").cloned(), kept("conf"));
    assert_eq!(loaded.spec.secrets.get("key").cloned(), kept("other"));
    assert_eq!(web.post_start[0].command, ["echo"]);
    let of_db = kiln_model::spec::NamespaceMode::Service("db".parse().unwrap());
    assert_eq!(web.namespaces.pid, of_db);
    assert_eq!(web.namespaces.uts, kiln_model::spec::NamespaceMode::Private);
    assert!(loaded.spec.networks["shared"].external);
    assert!(loaded.spec.volumes["nfs"].driver_opts.is_empty());
    let noted = |key: &str| loaded.notes.iter().any(|n| n.key.as_deref() == Some(key));
    assert!(noted("services.*.deploy.restart_policy.window"));
}
