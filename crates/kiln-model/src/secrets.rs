//! What a secret looks like: variables by their names, tokens by the shape that their issuer
//! gives them, private keys by their frame. `kiln check` looks for them in files, the
//! builder in images. What is found is told by its kind and place, never by its value.

use aho_corasick::{AhoCorasick, Input, MatchKind};

/// Words that a secret variable's name ends with, or has before a [`HARMLESS`] word.
const WORDS: [&str; 6] = [
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "SECRET",
    "TOKEN",
    "CREDENTIALS",
];
/// The same, of two words.
const PAIRS: [&str; 6] = [
    "API_KEY",
    "PRIVATE_KEY",
    "ACCESS_KEY",
    "SECRET_KEY",
    "ENCRYPTION_KEY",
    "MASTER_KEY",
];
/// Last words of names that tell about a secret without holding it.
const HARMLESS: [&str; 26] = [
    "FILE",
    "PATH",
    "DIR",
    "URL",
    "URI",
    "ENDPOINT",
    "LENGTH",
    "SIZE",
    "MIN",
    "MAX",
    "COUNT",
    "EXPIRY",
    "EXPIRES",
    "EXPIRATION",
    "TTL",
    "LIFETIME",
    "TIMEOUT",
    "NAME",
    "TYPE",
    "HEADER",
    "ALGORITHM",
    "HOST",
    "PORT",
    "POLICY",
    "ISSUER",
    "ENABLED",
];
/// What stands where a secret will be, or where none is needed.
const PLACEHOLDERS: [&str; 4] = ["dummy", "placeholder", "example", "xxxx"];
const SAID: [&str; 9] = [
    "true", "false", "yes", "no", "on", "off", "null", "none", "unset",
];

/// Says whether a variable of this name and value is a secret.
pub fn is_secret_variable(name: &str, value: &str) -> bool {
    is_secret_name(name) && is_value(value)
}

/// The kind of secret that a variable holds.
pub fn in_variable(finder: &Finder, name: &str, value: &str) -> Option<&'static str> {
    let token = finder.kinds(value.as_bytes()).first().copied();
    token
        .or_else(|| has_jwt(value).then_some("JSON Web Token"))
        .or_else(|| is_secret_variable(name, value).then_some("secret by its name"))
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_uppercase().replace(['-', '.'], "_");
    let words: Vec<&str> = name.split('_').filter(|word| !word.is_empty()).collect();
    let harmless = words.last().is_some_and(|last| HARMLESS.contains(last));
    // `PWD` alone is a folder.
    let short = |word: &str| word == "PASS" || (word == "PWD" && words.len() > 1);
    let said = |word: &&str| short(word) || WORDS.iter().any(|known| word.ends_with(known));
    let pair = PAIRS.iter().any(|pair| name.contains(pair));
    !harmless && (pair || name.ends_with("APIKEY") || words.iter().any(said))
}

/// Is this more than nothing, a switch, a path, a number of few digits, or a stand-in?
pub fn is_value(value: &str) -> bool {
    let value = value.trim().trim_matches(['"', '\'']);
    let lower = value.to_ascii_lowercase();
    let stand_in = value.starts_with(['/', '$', '<', '%'])
        || value.starts_with("{{")
        || value.chars().all(|c| "*xX.0-".contains(c))
        || PLACEHOLDERS.iter().any(|known| lower.contains(known));
    !stand_in && !SAID.contains(&lower.as_str()) && value != "1"
}

/// A token whose issuer made it recognisable.
struct Shape {
    kind: &'static str,
    prefix: &'static str,
    /// Letters and digits count always.
    more: &'static str,
    least: usize,
    most: usize,
}

const fn shape(
    kind: &'static str,
    prefix: &'static str,
    more: &'static str,
    least: usize,
) -> Shape {
    Shape {
        kind,
        prefix,
        more,
        least,
        most: 255,
    }
}

const fn exact(kind: &'static str, prefix: &'static str, more: &'static str, n: usize) -> Shape {
    Shape {
        kind,
        prefix,
        more,
        least: n,
        most: n,
    }
}

const GITHUB: &str = "GitHub token";
const GITLAB: &str = "GitLab token";
const SLACK: &str = "Slack token";
const STRIPE: &str = "Stripe key";
const AWS: &str = "AWS access key";

const SHAPES: [Shape; 29] = [
    exact(AWS, "AKIA", "", 16),
    exact(AWS, "ASIA", "", 16),
    shape(GITHUB, "ghp_", "", 36),
    shape(GITHUB, "gho_", "", 36),
    shape(GITHUB, "ghu_", "", 36),
    shape(GITHUB, "ghs_", "", 36),
    shape(GITHUB, "ghr_", "", 36),
    shape(GITHUB, "github_pat_", "_", 40),
    shape(GITLAB, "glpat-", "_-.", 20),
    shape(GITLAB, "gldt-", "_-.", 20),
    shape(GITLAB, "glptt-", "_-.", 20),
    shape(GITLAB, "glrt-", "_-.", 20),
    // Packages have names like `xapp-symbolic-icons`.
    shape(SLACK, "xapp-1-A", "-", 60),
    shape(SLACK, "xoxa-", "-", 10),
    shape(SLACK, "xoxb-", "-", 10),
    shape(SLACK, "xoxe-", "-", 10),
    shape(SLACK, "xoxo-", "-", 10),
    shape(SLACK, "xoxp-", "-", 10),
    shape(SLACK, "xoxr-", "-", 10),
    shape(SLACK, "xoxs-", "-", 10),
    exact("Google API key", "AIza", "_-", 35),
    exact("Google client secret", "GOCSPX-", "_-", 28),
    shape(STRIPE, "sk_live_", "", 16),
    shape(STRIPE, "whsec_", "", 32),
    shape(STRIPE, "rk_live_", "", 16),
    exact("npm token", "npm_", "", 36),
    shape("PyPI token", "pypi-AgE", "_-", 50),
    shape("Docker Hub token", "dckr_pat_", "_-", 20),
    shape("age key", "AGE-SECRET-KEY-1", "", 50),
];

const KEY_FRAME: &str = "-----BEGIN ";
/// Longest label within a frame: `-----BEGIN <label>-----`.
const LABEL: usize = 48;
/// A key has at least one unbroken line of so many characters, and so many in all: an
/// Ed25519 key, the shortest, has 64. Examples in texts have fewer.
const KEY_LINE: usize = 40;
const KEY_LENGTH: usize = 60;

/// Finds tokens and private keys in bytes; passes over most of them unread.
pub struct Finder {
    /// Finds what a secret begins with. `None`: it can't be made, and every place is looked at.
    prefixes: Option<AhoCorasick>,
}

impl Default for Finder {
    fn default() -> Self {
        let prefixes = SHAPES.iter().map(|shape| shape.prefix).chain([KEY_FRAME]);
        let builder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostFirst)
            .build(prefixes);
        Self {
            prefixes: builder.ok(),
        }
    }
}

impl Finder {
    /// The kinds of what is found, each once.
    pub fn kinds(&self, bytes: &[u8]) -> Vec<&'static str> {
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(at) = self.next(bytes, from) {
            if let Some(kind) = secret_at(bytes, at)
                && !found.contains(&kind)
            {
                found.push(kind);
            }
            from = at + 1;
        }
        found
    }

    /// The next place that may be a secret's.
    fn next(&self, bytes: &[u8], from: usize) -> Option<usize> {
        match &self.prefixes {
            Some(prefixes) => {
                let found = prefixes.find(Input::new(bytes).range(from..));
                found.map(|found| found.start())
            }
            None => (from < bytes.len()).then_some(from),
        }
    }
}

fn secret_at(bytes: &[u8], at: usize) -> Option<&'static str> {
    let here = bytes.get(at..)?;
    if let Some(rest) = here.strip_prefix(KEY_FRAME.as_bytes()) {
        return is_private_key(rest).then_some("private key");
    }
    let before = at.checked_sub(1).and_then(|i| bytes.get(i));
    if before.is_some_and(u8::is_ascii_alphanumeric) {
        return None;
    }
    let shape = SHAPES
        .iter()
        .find(|shape| here.starts_with(shape.prefix.as_bytes()))?;
    let rest = here.get(shape.prefix.len()..)?;
    let belongs = |b: &&u8| b.is_ascii_alphanumeric() || shape.more.as_bytes().contains(b);
    let length = rest.iter().take(shape.most + 1).take_while(belongs).count();
    let body = rest.get(..length)?;
    let shown = body.ends_with(b"EXAMPLE") || body.iter().all(|b| b"xX*.0".contains(b));
    let fits = (shape.least..=shape.most).contains(&length);
    (fits && !shown).then_some(shape.kind)
}

/// After `-----BEGIN `: a private key's label, and as much after it as a key has.
fn is_private_key(rest: &[u8]) -> bool {
    let label = rest.iter().take(LABEL).position(|b| *b == b'-');
    let Some((label, rest)) = label.map(|end| rest.split_at(end)) else {
        return false;
    };
    let private = label.ends_with(b"PRIVATE KEY") || label.ends_with(b"PRIVATE KEY BLOCK");
    let Some(mut rest) = rest.strip_prefix(b"-----").filter(|_| private) else {
        return false;
    };
    let (mut length, mut line) = (0, 0);
    loop {
        rest = match rest {
            // Written into a program's or a JSON text.
            [b'\\', b'n' | b'r', rest @ ..] => {
                line = 0;
                rest
            }
            [
                b' ' | b'\t' | b'\r' | b'\n' | b'"' | b'\'' | b',',
                rest @ ..,
            ] => {
                line = 0;
                let header = (length == 0).then(|| after_header(rest)).flatten();
                header.unwrap_or(rest)
            }
            [b, rest @ ..] if b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=') => {
                (length, line) = (length + 1, line + 1);
                if length >= KEY_LENGTH && line >= KEY_LINE {
                    return true;
                }
                rest
            }
            _ => return false,
        };
    }
}

/// `Proc-Type: 4,ENCRYPTED` and the like.
fn after_header(rest: &[u8]) -> Option<&[u8]> {
    let end = rest.iter().take(200).position(|b| *b == b'\n')?;
    let (line, rest) = rest.split_at(end);
    let name = line.iter().position(|b| *b == b':')?;
    let named = line[..name]
        .iter()
        .all(|b| b.is_ascii_alphanumeric() || *b == b'-');
    (named && name > 0).then_some(rest)
}

/// Says whether a text has `scheme://user:password@` with a password in it.
pub fn has_url_password(text: &str) -> bool {
    text.match_indices("://").any(|(at, _)| {
        let rest = &text[at + 3..];
        let end = rest.find(|c: char| c.is_whitespace() || "/?#\"'<>`".contains(c));
        let authority = &rest[..end.unwrap_or(rest.len())];
        let user = authority.rsplit_once('@').map(|(user, _)| user);
        let password = user.and_then(|user| user.split_once(':'));
        password.is_some_and(|(_, password)| !password.is_empty() && is_value(password))
    })
}

/// Says whether a text has a JSON Web Token: two objects and a signature.
pub fn has_jwt(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    text.split(|c| !inside(c)).any(|word| {
        let parts: Vec<&str> = word.split('.').collect();
        matches!(parts.as_slice(), [head, body, signature]
            if head.starts_with("eyJ") && body.starts_with("eyJ")
                && head.len() >= 12 && body.len() >= 12 && signature.len() >= 20)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_told_by_their_names_unless_the_value_is_none() {
        for name in [
            "DB_PASSWORD",
            "DBPASSWORD",
            "MYSQL_ROOT_PASSWORD",
            "npm-token",
            "AWS_SECRET_ACCESS_KEY",
            "SECRET_KEY_BASE",
            "STRIPE_API_KEY",
            "OPENAI_APIKEY",
            "PASSWORD_1",
            "GOOGLE_CREDENTIALS",
            "DB_PASS",
            "MYSQL_PWD",
            "RAILS_MASTER_KEY",
        ] {
            assert!(is_secret_variable(name, "hunter2"), "{name}");
            for value in [
                "",
                "/run/secrets/x",
                "$OTHER",
                "true",
                "1",
                "xxxxx",
                "00000000-0000-0000-0000-000000000000",
                "dummy",
            ] {
                assert!(!is_secret_variable(name, value), "{name}={value}");
            }
        }
        for name in [
            "MAX_TOKENS",
            "TOKENIZERS_PARALLELISM",
            "PASSWORD_FILE",
            "TOKEN_TTL",
            "PASSWORD_MIN_LENGTH",
            "SECRET_NAME",
            "GPG_KEY",
            "PATH",
            "KEYCLOAK_HOME",
            "MONKEY",
            "PWD",
            "OLDPWD",
            "BYPASS",
        ] {
            assert!(!is_secret_variable(name, "hunter2"), "{name}");
        }
    }

    /// Put together here, so that no scanner takes this file for a leak.
    fn token(prefix: &str, length: usize) -> String {
        let body = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8Qr9St0Uv1Wx2Yz3".repeat(3);
        format!("{prefix}{}", &body[..length])
    }

    #[test]
    fn tokens_are_told_by_their_shape() {
        let finder = Finder::default();
        let one = |text: &str| finder.kinds(text.as_bytes()).first().copied();
        for shape in &SHAPES {
            let token = token(shape.prefix, shape.least);
            for text in [
                token.clone(),
                format!("a = \"{token}\"\n"),
                format!("::{token} b"),
            ] {
                assert_eq!(one(&text), Some(shape.kind), "{text}");
            }
            assert_eq!(one(&format!("x{token}")), None, "within a word");
            assert_eq!(one(&token[..token.len() - 1]), None, "too short");
            let shown = format!("{}{}", shape.prefix, "x".repeat(shape.least));
            assert_eq!(one(&shown), None, "{shown}");
        }
        assert_eq!(one(&format!("AKIA{}EXAMPLE", "IOSFODNN7")), None);
        let two = format!("{} {}", token("ghp_", 36), token("AKIA", 16));
        assert_eq!(finder.kinds(two.as_bytes()), [GITHUB, AWS]);
    }

    #[test]
    fn a_private_key_is_a_frame_with_a_key_in_it() {
        let finder = Finder::default();
        let is = |text: &str| finder.kinds(text.as_bytes()) == ["private key"];
        let lines = format!("{}\n", "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj").repeat(4);
        for label in ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "] {
            let (begin, end) = (format!("{KEY_FRAME}{label}PRIVATE KEY-----"), "-----END");
            assert!(is(&format!("{begin}\n{lines}{end}")));
            let header = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n";
            assert!(is(&format!("text\n{begin}\n{header}{lines}{end}")));
            assert!(is(&format!(
                "{{\"k\": \"{begin}\\n{}",
                lines.replace('\n', "\\n")
            )));
            assert!(!is(&begin), "the words alone, as programs have them");
            assert!(!is(&format!("{begin}\nMIIEpAIBAAKCAQEA...\n{end}")));
            assert!(!is(&format!(
                "'{begin}'; function f() {{ return {} }}",
                "a".repeat(80)
            )));
            assert!(!is(&format!(
                "{begin} is the first line of such a file, which is then {end}"
            )));
        }
        assert!(!is(&format!("{KEY_FRAME}PUBLIC KEY-----\n{lines}")));
        assert!(!is(&format!("{KEY_FRAME}CERTIFICATE-----\n{lines}")));
        let pgp = format!("{KEY_FRAME}PGP PRIVATE KEY BLOCK-----\n\n{lines}");
        assert!(is(&pgp));
    }

    #[test]
    fn passwords_in_urls_and_signed_tokens() {
        for text in [
            "https://me:hunter2@example.com/x.git",
            "curl -O ftp://a:b@h && true",
            "postgres://app:s3cr3t@db/app",
        ] {
            assert!(has_url_password(text), "{text}");
        }
        for text in [
            "https://example.com/a:b@c",
            "https://git@github.com/x",
            "https://me:$TOKEN@h/",
            "https://me:@h/",
            "http://[::1]:80/",
            "https://registry.test:5000/x@sha256:abc",
        ] {
            assert!(!has_url_password(text), "{text}");
        }
        let part = |text: &str| format!("eyJ{text}");
        let (head, body) = (part("hbGciOiJIUzI1NiJ9"), part("zdWIiOiIxMjM0NTY3ODkwIn0"));
        assert!(has_jwt(&format!(
            "T={head}.{body}.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
        )));
        assert!(!has_jwt(&format!("{head}.{body}")));
        assert!(!has_jwt("a.b.c"));
    }
}
