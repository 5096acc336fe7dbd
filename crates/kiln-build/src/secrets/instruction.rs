//! What instructions themselves say: variables, URLs and tokens, which every reader of the
//! image's configuration and history sees.

use std::collections::BTreeMap;

use kiln_model::Digest;
use kiln_model::secrets::{self, Finder};

use super::Finding;
use super::commands::has_login;

/// What runs something, now or later.
const COMMANDS: [&str; 4] = ["RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"];
const URL_PASSWORD: &str = "URL with a password";

/// Looks through an instruction as the image's history has it.
pub(crate) fn in_instruction(finder: &Finder, history: &str) -> Vec<Finding> {
    let (name, rest) = history.split_once(' ').unwrap_or((history, ""));
    if matches!(name, "ENV" | "ARG") {
        return assignments(rest)
            .filter_map(|(name, value)| {
                let kind = secrets::in_variable(finder, name, value);
                let kind = kind.or(secrets::has_url_password(value).then_some(URL_PASSWORD));
                Some(Finding::new(name, kind?))
            })
            .collect();
    }
    let place = || format!("instruction:{}", Digest::of(history).short());
    let finding = |kind| Finding::new(place(), kind);
    let mut kinds = kinds(finder, rest);
    if kinds.is_empty() && COMMANDS.contains(&name) && has_login(rest) {
        kinds.push("password in a command");
    }
    kinds.into_iter().map(finding).collect()
}

/// Labels that the build adds by itself.
pub(crate) fn in_labels(finder: &Finder, labels: &BTreeMap<String, String>) -> Vec<Finding> {
    let found = labels.iter().filter_map(|(name, value)| {
        let kind = kinds(finder, value).first().copied()?;
        Some(Finding::new(name, kind))
    });
    found.collect()
}

fn kinds(finder: &Finder, text: &str) -> Vec<&'static str> {
    let mut kinds = finder.kinds(text.as_bytes());
    kinds.extend(secrets::has_jwt(text).then_some("JSON Web Token"));
    kinds.extend(secrets::has_url_password(text).then_some(URL_PASSWORD));
    kinds
}

/// `A=1 B=2`, as [`crate::evaluate`] writes them: of a value with blanks, the first word.
fn assignments(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_and_commands_are_looked_through() {
        let finder = Finder::default();
        let all = |text: &str| -> Vec<String> {
            let found = in_instruction(&finder, text).into_iter();
            found.map(|f| format!("{}: {}", f.place, f.kind)).collect()
        };
        assert_eq!(
            all("ENV A=b DB_PASSWORD=two words C=d"),
            ["DB_PASSWORD: secret by its name"]
        );
        assert_eq!(all("ARG TOKEN"), [""; 0]);
        assert_eq!(
            all("ARG A B=c API_TOKEN=x1"),
            ["API_TOKEN: secret by its name"]
        );
        assert_eq!(
            all("ENV DATABASE_URL=postgres://a:b1@db/x"),
            ["DATABASE_URL: URL with a password"]
        );
        let github = format!("ghp_{}", "a1".repeat(18));
        assert_eq!(all(&format!("ENV PLAIN={github}")), ["PLAIN: GitHub token"]);
        let run = all(&format!("RUN /bin/sh -c curl -H {github} https://x"));
        assert!(
            matches!(run.as_slice(), [one] if one.starts_with("instruction:") && one.ends_with(": GitHub token")),
            "{run:?}"
        );
        let run = all("RUN /bin/sh -c curl -u me:p4ss https://x");
        assert!(
            matches!(run.as_slice(), [one] if one.ends_with(": password in a command")),
            "{run:?}"
        );
        for innocent in [
            "COPY --chown=me a:b --token p4ss /x",
            "RUN /bin/sh -c apt-get update",
            "ENV PATH=/usr/bin LANG=C.UTF-8 GPG_KEY=A035C8C19219BA821ECEA86B64E628F8D684696D",
            "CMD [\"x\", \"--password-file=/run/secrets/x\"]",
            "COPY a /b",
        ] {
            assert_eq!(all(innocent), [""; 0], "{innocent}");
        }
    }
}
