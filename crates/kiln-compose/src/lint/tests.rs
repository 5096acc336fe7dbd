#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use super::*;
use crate::project::{LoadOptions, resolve};

fn found(text: &str) -> (Vec<(&'static str, usize)>, String) {
    let options = LoadOptions {
        files: vec!["/p/compose.yaml".into()],
        folder: "/p".into(),
        ..LoadOptions::default()
    };
    let reader = |_: &Path| -> std::io::Result<Vec<u8>> { Ok(text.as_bytes().to_vec()) };
    let resolved = resolve(&options, &reader).expect("valid");
    let findings = lint(&resolved.project, &resolved.sources);
    let shown = findings
        .iter()
        .map(|finding| {
            let place = resolved.sources.place(finding.diagnostic.span).unwrap();
            assert!(finding.diagnostic.hint.is_some());
            (finding.rule.id, place.line)
        })
        .collect();
    let fixes: Vec<Fix> = findings.into_iter().filter_map(|f| f.fix).collect();
    (shown, apply(text, 0, &fixes))
}

#[test]
fn each_rule_strikes_where_it_should() {
    let service = |lines: &str| format!("services:\n  a:\n    image: x:1\n    {lines}\n");
    for (lines, expected) in [
        ("volumes: [./src:/app]", vec![("code-bind", 4)]),
        ("volumes: [./src:/app:ro]", vec![("bind-mount", 4)]),
        ("volumes: [/srv/x:/x]", vec![("host-bind", 4)]),
        ("volumes: [/srv/x:/x:ro]", vec![("bind-mount", 4)]),
        (
            "volumes: [/var/run/docker.sock:/var/run/docker.sock:ro]",
            vec![("docker-socket", 4)],
        ),
        ("volumes: [data]", vec![]),
        ("privileged: true", vec![("privileged", 4)]),
        ("privileged: false", vec![]),
        (
            "cap_add: [CAP_SYS_ADMIN, NET_ADMIN]",
            vec![("extra-powers", 4)],
        ),
        (
            "security_opt: [\"seccomp:unconfined\"]",
            vec![("extra-powers", 4)],
        ),
        ("security_opt: [\"no-new-privileges:true\"]", vec![]),
        ("network_mode: host", vec![("host-namespace", 4)]),
        ("x-kiln: {root: scratch}", vec![("unsealed-root", 4)]),
        ("restart: \"no\"", vec![]),
        ("ports: [80]\n    restart: \"no\"", vec![("no-restart", 5)]),
        (
            "environment: {DB_PASSWORD: hunter2}",
            vec![("secret-in-environment", 4)],
        ),
        (
            "environment: [API_TOKEN=abc]",
            vec![("secret-in-environment", 4)],
        ),
        (
            "environment: {DB_PASSWORD_FILE: /run/secrets/x, ALLOW_EMPTY_PASSWORD: yes, TOKEN: }",
            vec![],
        ),
    ] {
        assert_eq!(found(&service(lines)).0, expected, "{lines}");
    }
    for (image, count) in [
        ("x", 1),
        ("x:latest", 1),
        ("h:5000/x", 1),
        ("h:5000/x:2", 0),
        (
            "x@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            0,
        ),
        ("oci:./x", 0),
        ("python", 0),
    ] {
        let text = format!(
            "services: {{a: {{image: \"{image}\"}}}}\nx-kiln: {{bases: {{python: {{suite: trixie}}}}}}"
        );
        assert_eq!(found(&text).0.len(), count, "{image}");
    }
}

#[test]
fn what_others_wait_for_must_come() {
    let text = |b: &str, condition: &str| {
        format!(
            "services:\n  a: {{image: x:1, depends_on: {{b: {{condition: {condition}}}}}}}\n  b: {{image: y:1{b}}}\n"
        )
    };
    let healthy = |b| found(&text(b, "service_healthy")).0;
    assert_eq!(healthy(""), [("no-healthcheck", 3)]);
    assert_eq!(
        healthy(", healthcheck: {disable: true}"),
        [("no-healthcheck", 3)]
    );
    assert_eq!(
        healthy(", healthcheck: {test: [NONE]}"),
        [("no-healthcheck", 3)]
    );
    assert_eq!(healthy(", healthcheck: {test: x}"), []);
    let done = |b| found(&text(b, "service_completed_successfully"));
    let (ids, mended) = done(", restart: always");
    assert_eq!(ids, [("job-restart", 3)]);
    assert!(mended.contains("restart: on-failure"), "{mended}");
    assert_eq!(done(", restart: on-failure").0, []);
}

#[test]
fn mended_files_are_found_good() {
    let text = "services:\n  a:\n    image: x:1\n    privileged: true\n    volumes:\n      - ./a:/a\n      - \"./b:/b\" # ü\n      - './c:/c:rw'\n      - {type: bind, source: ./d, target: /d}\n      - ./$$e:/e\n";
    let (ids, mended) = found(text);
    assert_eq!(ids.len(), 6);
    assert_eq!(
        mended,
        text.replace("privileged: true", "privileged: false")
            .replace("./a:/a", "./a:/a:ro")
            .replace("./b:/b", "./b:/b:ro")
            .replace("/c:rw", "/c:ro")
    );
    let left = found(&mended).0;
    let worse: Vec<_> = left.iter().filter(|(id, _)| *id != "bind-mount").collect();
    assert_eq!(worse.len(), 2, "{worse:?}");
}

#[test]
fn rules_are_in_order_and_explained() {
    let ids: Vec<_> = RULES.iter().map(|rule| rule.id).collect();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    assert_eq!(ids, sorted);
    assert!(RULES.iter().all(|rule| rule.why.ends_with('.')));
}
