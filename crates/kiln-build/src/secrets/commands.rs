//! Passwords on a command's line: as a variable, an option, in SQL or in a URL.

use kiln_model::secrets::{has_url_password, is_secret_variable, is_value};

/// Programs whose `-p` is followed by a password without a blank.
const BY_P: [&str; 7] = [
    "mysql",
    "mysqladmin",
    "mysqldump",
    "mysqlimport",
    "mariadb",
    "mariadb-dump",
    "sshpass",
];
/// Programs whose `-u` is followed by `user:password`.
const BY_U: [&str; 6] = ["curl", "http", "https", "ab", "lftp", "smbclient"];
/// First words of options that are about a password without having one.
const ABOUT: [&str; 10] = [
    "disabled", "disable", "enable", "no", "without", "with", "skip", "ask", "lock", "expire",
];
/// Options for a password that are not named so.
const OTHERS: [&str; 3] = ["--requirepass", "--masterauth", "--passphrase"];

/// Looks through a shell's text, or the words of an exec form as JSON has them.
pub(super) fn has_login(text: &str) -> bool {
    let words = text.trim_start().starts_with('[');
    let text = match words {
        true => text.replace(['[', ']', '"', ','], " "),
        false => text.replace("\\\n", " "),
    };
    let ends = |c: char| matches!(c, '\n' | ';' | '|' | '&');
    text.split(ends).any(command_has_login)
}

/// The same of one command.
fn command_has_login(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let runs = |programs: &[&str]| {
        let name = |word: &&str| word.rsplit('/').next().unwrap_or_default().to_owned();
        words
            .iter()
            .map(name)
            .any(|name| programs.contains(&name.as_str()))
    };
    let given = words.windows(2).any(|pair| match pair {
        ["-u" | "--user", login] => {
            let password = bare(login).split_once(':');
            runs(&BY_U) && password.is_some_and(|(_, password)| is_password(password))
        }
        // No option of `sshpass`'s means anything else by it.
        ["-p", password] => runs(&["sshpass"]) && is_value(password),
        [option, value] => is_option(option, value),
        _ => false,
    });
    let joined = |word: &&str| {
        let password = word.strip_prefix("-p").filter(|rest| !rest.is_empty());
        password.is_some_and(is_value) && runs(&BY_P)
    };
    given
        || words.iter().any(|w| is_assigned(w) || joined(w))
        || has_url_password(line)
        || is_sql(line)
}

/// `NAME=value` and `--name=value`.
fn is_assigned(word: &str) -> bool {
    let pair = bare(word).split_once('=');
    pair.is_some_and(|(name, value)| {
        let named = name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        named && is_secret_variable(name, value) && is_password(value)
    })
}

/// `--name value`.
fn is_option(option: &str, value: &str) -> bool {
    let Some(name) = option.strip_prefix("--") else {
        return false;
    };
    let first = name.split('-').next().unwrap_or_default();
    let about = name.contains('=') || ABOUT.contains(&first);
    let secret = OTHERS.contains(&option) && is_value(value) || is_secret_variable(option, value);
    !about && !value.starts_with('-') && secret && is_password(value)
}

/// `IDENTIFIED BY 'x'`, `PASSWORD 'x'`.
fn is_sql(line: &str) -> bool {
    let upper = line.to_ascii_uppercase();
    ["IDENTIFIED BY '", "PASSWORD '"].iter().any(|words| {
        let found = upper.find(words).map(|at| &line[at + words.len()..]);
        found.is_some_and(|rest| is_password(rest.split('\'').next().unwrap_or_default()))
    })
}

/// Neither empty nor what a shell puts something else in place of.
fn is_password(text: &str) -> bool {
    let text = bare(text);
    !text.is_empty() && !text.contains(['$', '`']) && is_value(text)
}

fn bare(word: &str) -> &str {
    word.trim_matches(['"', '\'', ';'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_commands_are_told_from_what_is_about_them() {
        for holding in [
            "curl -u me:p4ss https://h",
            "a && curl --user 'me:p4ss' h",
            "mysql -u root -pp4ss -e 'select 1'",
            "sshpass -p p4ss ssh h",
            "/usr/bin/sshpass -pp4ss ssh h",
            "docker login --username me --password p4ss h",
            "export DB_PASSWORD=p4ss; ./x",
            "make deploy API_TOKEN=\"p4ss\"",
            "x --password=p4ss",
            "psql -c \"ALTER ROLE me PASSWORD 'p4ss'\"",
            "mysql <<E\nCREATE USER me IDENTIFIED BY 'p4ss';\nE",
            "git clone https://me:p4ss@h/x",
            "[\"redis-server\", \"--requirepass\", \"p4ss\"]",
            "x \\\n  --token p4ss",
        ] {
            assert!(has_login(holding), "{holding}");
        }
        for innocent in [
            "adduser --system --disabled-password app",
            "adduser --disabled-password --gecos '' app",
            "gcc -pthread a.c && apt-get install -y mysql-client",
            "apt-get install -y mysql-client -pfoo; mysql -p",
            "mkdir -p /srv && cp -p4 a b",
            "chroot -u 1:2 / x",
            "sed -i 's/DB_PASSWORD=old/DB_PASSWORD=new/' x",
            "DB_PASSWORD=$(cat /run/secrets/p) ./x",
            "DB_PASSWORD=\"`x`\" ./x",
            "x --password \"$PASSWORD\" --token-file /run/x",
            "mysql -p$PASSWORD",
            "psql -c \"ALTER ROLE me PASSWORD '$PASSWORD'\"",
            "curl -u me: https://h",
            "SECRET_KEY=dummy python manage.py collectstatic",
            "[\"x\", \"--password-file=/run/secrets/x\"]",
            "npm config set fund false",
        ] {
            assert!(!has_login(innocent), "{innocent}");
        }
    }
}
