//! Files that programs keep logins in: known by their names, and secret when there is one
//! in them.

use kiln_model::secrets::{has_url_password, is_secret_variable, is_value};

/// More of such a file is not read.
const LONGEST: usize = 1 << 20;

/// How a login stands in a file.
enum Holds {
    /// After one of these words.
    Words(&'static [&'static str]),
    /// In a URL.
    Url,
    /// As a variable that is secret by its name.
    Variables,
    /// The file is nothing but logins.
    Anything,
}

use Holds::{Anything, Url, Variables, Words};

/// The end of a path, and what is looked for in such a file.
const FILES: &[(&str, Holds)] = &[
    (".npmrc", Words(&["_authToken", "_auth", "_password"])),
    (".yarnrc", Words(&["_authToken", "_auth", "_password"])),
    (".yarnrc.yml", Words(&["npmAuthToken", "npmAuthIdent"])),
    (".netrc", Words(&["password"])),
    ("_netrc", Words(&["password"])),
    ("apt/auth.conf", Words(&["password"])),
    (".pypirc", Words(&["password"])),
    (".git-credentials", Url),
    (".config/git/credentials", Url),
    (".gitconfig", Url),
    (".git/config", Url),
    ("pip.conf", Url),
    ("pip.ini", Url),
    (".pip/pip.conf", Url),
    (".condarc", Url),
    ("uv.toml", Url),
    (
        ".docker/config.json",
        Words(&["auth", "identitytoken", "password"]),
    ),
    (".dockercfg", Words(&["auth", "password"])),
    ("containers/auth.json", Words(&["auth"])),
    (
        ".composer/auth.json",
        Words(&["password", "github.com", "gitlab.com"]),
    ),
    (
        "composer/auth.json",
        Words(&["password", "github.com", "gitlab.com"]),
    ),
    (
        ".aws/credentials",
        Words(&["aws_secret_access_key", "aws_session_token"]),
    ),
    (".aws/config", Words(&["aws_secret_access_key"])),
    (".cargo/credentials", Words(&["token"])),
    (".cargo/credentials.toml", Words(&["token"])),
    ("cargo/credentials.toml", Words(&["token"])),
    (".gem/credentials", Words(&["rubygems_api_key"])),
    (".bundle/config", Url),
    ("gh/hosts.yml", Words(&["oauth_token"])),
    (".config/hub", Words(&["oauth_token"])),
    (".m2/settings.xml", Words(&["password"])),
    (".gradle/gradle.properties", Variables),
    (
        ".kube/config",
        Words(&["client-key-data", "token", "password"]),
    ),
    (
        "application_default_credentials.json",
        Words(&["refresh_token", "private_key"]),
    ),
    (".terraformrc", Words(&["token"])),
    ("credentials.tfrc.json", Words(&["token"])),
    (".my.cnf", Words(&["password"])),
    (".pgpass", Anything),
    (".vault-token", Anything),
    (".s3cfg", Words(&["secret_key"])),
    (".boto", Words(&["secret_key", "aws_secret_access_key"])),
    (".env", Variables),
    (".envrc", Variables),
    (".bash_history", Variables),
    (".ash_history", Variables),
    (".sh_history", Variables),
    (".zsh_history", Variables),
    (".python_history", Variables),
];

/// Files of which there may be any number in a folder: the folder, what their names end with.
const FOLDERS: &[(&str, &str, Holds)] = &[
    ("apt/auth.conf.d/", ".conf", Words(&["password"])),
    ("apt/sources.list.d/", "", Url),
    ("apt/apt.conf.d/", "", Url),
];
const SOURCES: &str = "apt/sources.list";
/// `.env.production`; not what shows how to write one.
const ENV: &str = ".env.";
const SHOWN: [&str; 6] = ["example", "sample", "template", "dist", "tmpl", "default"];

/// Says whether a file of this path, relative to the root, is one of those: only then is
/// its text worth [`has_login`].
pub(super) fn is_known(path: &str) -> bool {
    holds(path).is_some()
}

/// Says whether the file holds a login.
pub(super) fn has_login(path: &str, content: &[u8]) -> bool {
    let Some(holds) = holds(path) else {
        return false;
    };
    let text = String::from_utf8_lossy(&content[..content.len().min(LONGEST)]);
    let lines = || {
        let lines = text.lines().map(str::trim);
        lines.filter(|line| !line.starts_with(['#', ';']))
    };
    match holds {
        Words(words) => lines_join(lines(), words),
        Url => lines().any(has_url_password),
        Variables => lines().any(|line| {
            let line = line.strip_prefix("export ").unwrap_or(line);
            let pair = line.split_once('=');
            pair.is_some_and(|(name, value)| {
                let name = name.trim().rsplit(' ').next().unwrap_or_default();
                is_secret_variable(name, value) || has_url_password(value)
            })
        }),
        Anything => lines().any(|line| !line.is_empty()),
    }
}

fn holds(path: &str) -> Option<&'static Holds> {
    let is = |end: &str| {
        let before = path.strip_suffix(end);
        before.is_some_and(|before| before.is_empty() || before.ends_with('/'))
    };
    if let Some((_, holds)) = FILES.iter().find(|(end, _)| is(end)) {
        return Some(holds);
    }
    if is(SOURCES) {
        return Some(&Url);
    }
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let within = |wanted: &str| format!("{folder}/").ends_with(wanted);
    let found = FOLDERS
        .iter()
        .find(|(folder, end, _)| within(folder) && name.ends_with(end));
    if let Some((_, _, holds)) = found {
        return Some(holds);
    }
    let environment = name.strip_prefix(ENV)?;
    let shown = environment.split('.').any(|part| SHOWN.contains(&part));
    (!shown).then_some(&Variables)
}

/// Says whether one of the words is given a value, on its line or on the next one.
fn lines_join<'a>(lines: impl Iterator<Item = &'a str>, words: &[&str]) -> bool {
    let text = lines.collect::<Vec<_>>().join("\n");
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    words.iter().any(|word| {
        text.match_indices(word).any(|(at, _)| {
            let alone = !text[..at].ends_with(inside);
            let after = &text[at + word.len()..];
            let value = after.trim_start_matches(|c: char| " \t\n\"':=>".contains(c));
            // Nothing between is the word within another one.
            let given = alone && value.len() < after.len();
            let end = value.find(|c: char| c.is_whitespace() || "\"'<>,}".contains(c));
            let value = &value[..end.unwrap_or(value.len())];
            given && !value.is_empty() && !value.starts_with('{') && is_value(value)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_logins_are_told_from_those_without() {
        let holding = [
            ("root/.npmrc", "//registry.npmjs.org/:_authToken=abcd1234"),
            ("app/.netrc", "machine h\n  login me\n  password p4ss"),
            (
                "etc/apt/auth.conf.d/own.conf",
                "machine h login me password p4ss",
            ),
            (
                "root/.pypirc",
                "[pypi]\nusername = __token__\npassword = p4ss",
            ),
            ("root/.git-credentials", "https://me:p4ss@h"),
            (
                "app/.git/config",
                "[remote \"origin\"]\n url = https://me:p4ss@h/x",
            ),
            (
                "etc/pip.conf",
                "[global]\nindex-url = https://me:p4ss@h/simple",
            ),
            (
                "etc/apt/sources.list.d/x.list",
                "deb https://me:p4ss@h s main",
            ),
            (
                "root/.docker/config.json",
                "{\"auths\": {\"h\": {\"auth\": \"bWU6cA==\"}}}",
            ),
            (
                "root/.aws/credentials",
                "[default]\naws_secret_access_key = abcd",
            ),
            (
                "root/.cargo/credentials.toml",
                "[registry]\ntoken = \"cio1234\"",
            ),
            (
                "root/.config/gh/hosts.yml",
                "github.com:\n  oauth_token: abcd",
            ),
            (
                "root/.m2/settings.xml",
                "<server><password>p4ss</password></server>",
            ),
            ("root/.kube/config", "users:\n- user:\n    token: abcd"),
            ("app/.env", "PORT=80\nDB_PASSWORD=p4ss"),
            ("app/.env.production", "export API_TOKEN='p4ss'"),
            ("root/.bash_history", "ls\nexport DB_PASSWORD=p4ss"),
            ("root/.pgpass", "h:5432:db:me:p4ss"),
        ];
        for (path, text) in holding {
            assert!(is_known(path) && has_login(path, text.as_bytes()), "{path}");
        }
        let innocent = [
            (
                "root/.npmrc",
                "//registry.npmjs.org/:_authToken=${NPM_TOKEN}\nsave=false",
            ),
            ("root/.netrc", "# machine h login me password p4ss"),
            (
                "root/.docker/config.json",
                "{\"auths\": {\"h\": {}}, \"credsStore\": \"pass\"}",
            ),
            (
                "etc/pip.conf",
                "[global]\nindex-url = https://pypi.org/simple",
            ),
            (
                "app/.git/config",
                "[remote \"origin\"]\n url = https://git@h/x",
            ),
            (
                "app/.env",
                "PORT=80\nDB_PASSWORD=\nDB_PASSWORD_FILE=/run/secrets/x",
            ),
            ("app/.env.example", "DB_PASSWORD=p4ss"),
            (
                "etc/apt/sources.list.d/debian.sources",
                "URIs: http://mirror.example/debian",
            ),
            ("root/.aws/config", "[default]\nregion = eu-central-1"),
            ("app/config.json", "{\"password\": \"p4ss\"}"),
        ];
        for (path, text) in innocent {
            assert!(!has_login(path, text.as_bytes()), "{path}");
        }
    }
}
