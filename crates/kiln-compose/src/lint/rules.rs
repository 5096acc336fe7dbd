//! The rules by name: what each finds, how bad that is, and why.

use crate::diag::Severity;

/// One thing that is looked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Stable: people write it after `--skip`, and other programs keep it.
    pub id: &'static str,
    pub severity: Severity,
    /// What it finds, in a few words.
    pub title: &'static str,
    /// Why it matters.
    pub why: &'static str,
}

const fn rule(
    id: &'static str,
    severity: Severity,
    title: &'static str,
    why: &'static str,
) -> Rule {
    Rule {
        id,
        severity,
        title,
        why,
    }
}

/// Every rule, by its id's order.
pub const RULES: &[Rule] = &[
    rule(
        "bind-mount",
        Severity::Note,
        "A read-only bind mount",
        "What is mounted is not part of the release: it changes without one, and a rollback does not bring it back.",
    ),
    rule(
        "code-bind",
        Severity::Warning,
        "A read-write bind mount of the project's own files",
        "Whatever runs can be edited while it runs, and what it writes ends up in the project.",
    ),
    rule(
        "docker-socket",
        Severity::Error,
        "The Docker socket is mounted",
        "Whoever can speak to it is root on the host; and where kiln runs, nothing may answer there.",
    ),
    rule(
        "extra-powers",
        Severity::Warning,
        "Protection is taken away",
        "The defaults keep a broken-into program from breaking out.",
    ),
    rule(
        "host-bind",
        Severity::Note,
        "A read-write bind mount of the host's files",
        "The service depends on one machine's files, which no release holds.",
    ),
    rule(
        "host-namespace",
        Severity::Note,
        "The host's network or processes are shared",
        "Two copies would meet on the same ports: such a service is replaced with a short pause.",
    ),
    rule(
        "job-restart",
        Severity::Warning,
        "A job that is started again for ever",
        "Others wait for it to complete, which it never does.",
    ),
    rule(
        "no-healthcheck",
        Severity::Warning,
        "Others wait for it to be healthy, and nothing says when it is",
        "Unless its image brings a health check, they wait for ever.",
    ),
    rule(
        "no-restart",
        Severity::Note,
        "A service that stays down when it fails",
        "`restart: \"no\"` is heard: a copy that ends is not replaced.",
    ),
    rule(
        "privileged",
        Severity::Warning,
        "A privileged service",
        "It can change the host, and what it changes there no release knows.",
    ),
    rule(
        "secret-in-environment",
        Severity::Warning,
        "A secret among the environment variables",
        "Variables are shown by `explain`, inherited by every child process and printed by crash reports; secrets are files.",
    ),
    rule(
        "unpinned-image",
        Severity::Warning,
        "An image without a tag, or with `latest`",
        "kiln.lock pins its digest, but nobody can tell which release of the program it was meant to be.",
    ),
    rule(
        "unsealed-root",
        Severity::Note,
        "A root that can be written to",
        "An instance can change its own programs until it is replaced.",
    ),
];

pub(super) fn by_id(id: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.id == id)
}
