//! Files that programs keep logins in: known by their names, and secret when there is one
//! in them.

use kiln_model::secrets::{has_url_password, is_secret_variable, is_value};

use super::commands::has_login;

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
    /// Commands as somebody typed them.
    Commands,
    /// Hashes of passwords, as the second of fields.
    Hashes,
    /// The file is nothing but logins.
    Anything,
    /// It is a key, or what keys are made from.
    Key,
}

use Holds::{Anything, Commands, Hashes, Key, Url, Variables, Words};

const LOGIN: &str = "file with a login";

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
    (".kube/config", Words(KUBERNETES)),
    ("kubeconfig", Words(KUBERNETES)),
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
    (".bash_history", Commands),
    (".ash_history", Commands),
    (".sh_history", Commands),
    (".zsh_history", Commands),
    (".python_history", Commands),
    (".mysql_history", Commands),
    (".psql_history", Commands),
    ("fish/fish_history", Commands),
    (".wgetrc", Words(&["password", "http_password"])),
    (".curlrc", Commands),
    ("rclone/rclone.conf", Words(&["pass", "token"])),
    ("ppp/chap-secrets", Anything),
    ("postfix/sasl_passwd", Anything),
    ("exim4/passwd.client", Anything),
    ("rndc.key", Words(&["secret"])),
    ("etc/passwd", Hashes),
    ("etc/passwd-", Hashes),
    ("etc/shadow", Hashes),
    ("etc/shadow-", Hashes),
    ("etc/gshadow", Hashes),
    ("etc/gshadow-", Hashes),
    (".htpasswd", Hashes),
    ("htpasswd", Hashes),
    ("var/lib/systemd/random-seed", Key),
    ("var/lib/urandom/random-seed", Key),
    ("etc/munge/munge.key", Key),
    ("krb5.keytab", Key),
    (".gnupg/secring.gpg", Key),
];

const KUBERNETES: &[&str] = &["client-key-data", "token", "password"];
const WIREGUARD: &[&str] = &["PrivateKey", "PresharedKey"];

/// Files of which there may be any number in a folder: the folder, what their names end with.
const FOLDERS: &[(&str, &str, Holds)] = &[
    ("apt/auth.conf.d/", ".conf", Words(&["password"])),
    ("apt/sources.list.d/", "", Url),
    ("apt/apt.conf.d/", "", Url),
    ("etc/kubernetes/", ".conf", Words(KUBERNETES)),
    (
        "wpa_supplicant/",
        ".conf",
        Words(&["psk", "password", "wep_key0", "private_key_passwd"]),
    ),
    (
        "NetworkManager/system-connections/",
        "",
        Words(&["psk", "password", "wep-key0", "private-key-password"]),
    ),
    ("netplan/", ".yaml", Words(&["password"])),
    ("wireguard/", ".conf", Words(WIREGUARD)),
    ("systemd/network/", ".netdev", Words(WIREGUARD)),
    (".gnupg/private-keys-v1.d/", ".key", Key),
];
const SOURCES: &str = "apt/sources.list";
/// `.env.production`; not what shows how to write one.
const ENV: &str = ".env.";
const SHOWN: [&str; 6] = ["example", "sample", "template", "dist", "tmpl", "default"];

/// What a file of this path, relative to the root, holds that is secret.
pub(super) fn kind(path: &str, content: &[u8]) -> Option<&'static str> {
    let holds = holds(path)?;
    let text = String::from_utf8_lossy(&content[..content.len().min(LONGEST)]);
    let lines = || {
        let lines = text.lines().map(str::trim);
        lines.filter(|line| !line.starts_with(['#', ';']))
    };
    let login = |found: bool| found.then_some(LOGIN);
    match holds {
        Words(words) => login(lines_join(lines(), words)),
        Url => login(lines().any(has_url_password)),
        Variables => login(lines().any(|line| {
            let line = line.strip_prefix("export ").unwrap_or(line);
            let pair = line.split_once('=');
            pair.is_some_and(|(name, value)| {
                let name = name.trim().rsplit(' ').next().unwrap_or_default();
                is_secret_variable(name, value) || has_url_password(value)
            })
        })),
        Commands => login(lines().any(has_login)),
        Anything => login(lines().any(|line| !line.is_empty())),
        Hashes => lines().any(line_has_hash).then_some("hash of a password"),
        Key => Some("secret key"),
    }
}

/// Says whether the second field is what crypt(5) makes of a password, locked or not.
fn line_has_hash(line: &str) -> bool {
    const DES: usize = 13;
    let hash = line.split(':').nth(1).unwrap_or_default();
    let hash = hash.trim_start_matches('!');
    let of_crypt = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/');
    (hash.starts_with('$') && hash.len() > DES)
        || hash.starts_with("{SHA")
        || (hash.len() == DES && hash.chars().all(of_crypt))
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
    if path.ends_with(".kubeconfig") {
        return Some(&Words(KUBERNETES));
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
    fn hashes_of_passwords_are_told_from_what_lets_nobody_in() {
        for hash in [
            "$y$j9T$abcdefgh$0123456789",
            "!$6$abcdefgh$0123",
            "ab0123456789.",
        ] {
            let line = format!("root:{hash}:19000:0:99999:7:::\n");
            let found = kind("etc/shadow", line.as_bytes());
            assert_eq!(found, Some("hash of a password"), "{hash}");
        }
        assert_eq!(
            kind("srv/.htpasswd", b"me:{SHA}abc="),
            Some("hash of a password")
        );
        assert_eq!(
            kind("var/lib/systemd/random-seed", b"\xff\0"),
            Some("secret key")
        );
    }

    #[test]
    fn files_with_logins_are_told_from_those_without() {
        let holding = [
            ("root/.npmrc", "//npm.test/:_authToken=abcd1234"),
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
            ("root/.bash_history", "cd /\nA=b DB_PASSWORD=p4ss ./x"),
            ("root/.bash_history", "curl -u me:p4ss https://h"),
            ("root/.bash_history", "mysql -u me -pp4ss db"),
            ("root/.bash_history", "sshpass -p p4ss ssh h"),
            ("root/.zsh_history", ": 1:0;x login --password p4ss"),
            ("root/.zsh_history", ": 1:0;curl -u me:p4ss h"),
            ("root/.psql_history", "alter role me password 'p4ss';"),
            ("etc/ppp/chap-secrets", "me * p4ss *"),
            (
                "etc/wpa_supplicant/wlan0.conf",
                "network={\n psk=\"p4ssp4ss\"\n}",
            ),
            (
                "etc/NetworkManager/system-connections/home",
                "[wifi-security]\npsk=p4ssp4ss",
            ),
            ("etc/wireguard/wg0.conf", "[Interface]\nPrivateKey = p4ss="),
            ("ci.kubeconfig", "users:\n- user:\n    token: abcd"),
        ];
        for (path, text) in holding {
            assert_eq!(kind(path, text.as_bytes()), Some(LOGIN), "{path}");
        }
        let innocent = [
            (
                "root/.npmrc",
                "//npm.test/:_authToken=${NPM_TOKEN}\nsave=false",
            ),
            ("root/.netrc", "# machine h login me password p4ss"),
            (
                "root/.docker/config.json",
                "{\"auths\": {\"h\": {}}, \"credsStore\": \"pass\"}",
            ),
            (
                "etc/pip.conf",
                "[global]\nindex-url = https://pip.test/simple",
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
            (
                "root/.bash_history",
                "ls -p x\ncp -p4 a b\nmysql -u me -p\ncurl -u me https://h\nx --token $TOKEN\n\
                 read -s PASSWORD\nx --password-file /run/x\nid -u me:",
            ),
            (
                "etc/shadow",
                "root:*:1::::::\na:!:1::::::\nb:!!:::::::\nc::1::::::",
            ),
            ("etc/passwd", "root:x:0:0:root:/root:/bin/bash"),
            (
                "etc/wpa_supplicant/wlan0.conf",
                "network={\n key_mgmt=NONE\n}",
            ),
            ("etc/ppp/chap-secrets", "# client server secret addresses\n"),
        ];
        for (path, text) in innocent {
            assert_eq!(kind(path, text.as_bytes()), None, "{path}");
        }
    }
}
