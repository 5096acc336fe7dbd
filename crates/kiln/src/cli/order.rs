//! Options of the project before the command, where `docker compose` has them.

use std::ffi::OsString;

/// Options with a value that `docker compose` has before its command, and kiln behind it.
const OF_PROJECTS: [(&str, Option<char>); 7] = [
    ("--file", Some('f')),
    ("--project-name", Some('p')),
    ("--environment", Some('e')),
    ("--profile", None),
    ("--env-file", None),
    ("--project-directory", None),
    ("--allow-ignored", None),
];

/// Options with a value that every command has.
const OF_ALL: [&str; 3] = ["--root", "--cache-size", "--run-timeout"];

/// The command line with the project's options behind the command, wherever they stood.
pub fn in_order(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut words = words.into_iter().peekable();
    let mut before: Vec<OsString> = words.next().into_iter().collect();
    let mut moved = Vec::new();
    while let Some(word) = words.next_if(|word| word.to_string_lossy().starts_with('-')) {
        let text = word.to_string_lossy().into_owned();
        let short = |c: &char| text.starts_with(&format!("-{c}"));
        let of_project = OF_PROJECTS.iter().find(|(long, letter)| {
            text.split('=').next() == Some(long) || letter.as_ref().is_some_and(short)
        });
        let to = match of_project {
            Some(_) => &mut moved,
            None => &mut before,
        };
        to.push(word);
        let alone = match of_project {
            Some((long, _)) => text == *long || text.len() == 2,
            None => OF_ALL.contains(&text.as_str()),
        };
        if alone {
            to.extend(words.next());
        }
    }
    before.extend(words.next());
    before.extend(moved);
    before.extend(words);
    before
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_option_with_a_value_that_stands_before_the_command_is_known() {
        let command = Cli::command();
        let own = command
            .get_arguments()
            .filter(|a| a.get_action().takes_values());
        let own: Vec<String> = own
            .filter_map(|option| option.get_long().map(|long| format!("--{long}")))
            .collect();
        assert_eq!(own, OF_ALL);
    }

    #[test]
    fn the_projects_options_may_stand_before_the_command() {
        for (said, meant) in [
            ("up", "up"),
            ("-f a.yaml up", "up -f a.yaml"),
            (
                "-fa.yaml --file=b.yaml -p x up --detach",
                "up -fa.yaml --file=b.yaml -p x --detach",
            ),
            ("--run-timeout 5m -p x up", "--run-timeout 5m up -p x"),
            (
                "--root /r --json -f - config web",
                "--root /r --json config -f - web",
            ),
            (
                "--profile a --profile=b --env-file e status",
                "status --profile a --profile=b --env-file e",
            ),
            ("exec -f x", "exec -f x"),
            ("--help", "--help"),
            ("-f", "-f"),
            ("", ""),
        ] {
            let words = ["kiln"].into_iter().chain(said.split_whitespace());
            let ordered = in_order(words.map(OsString::from));
            let ordered: Vec<String> = ordered[1..]
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            assert_eq!(ordered.join(" "), meant, "{said}");
        }
    }
}
