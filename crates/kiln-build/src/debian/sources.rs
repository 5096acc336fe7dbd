//! Where Debian is: the machine's apt configuration, or an explicit mirror, turned
//! into the archives of one suite.
//!
//! Rules. An apt source counts when its suite is a Debian one (a release's codename
//! or alias, with `-updates` or `-security`); backports, proposed updates, flat
//! archives, `cdrom:` and other vendors' suites do not. If the wanted suite is
//! configured, exactly those sources are used. If it is not, the configured sources'
//! addresses and keys are used with the wanted suite's names. A missing `-updates`
//! or `-security` is looked for beside the suite itself: at the same address, and
//! at the address with its folder `debian` changed to `debian-security`; if it is not
//! there either, that is a warning. `sid` and `experimental` have neither. An explicit
//! mirror follows the same rule of neighbours.
//!
//! Whether a source is Debian's is finally decided by its signed Release file, when
//! that is fetched. Parsing is pure; only [`read`] touches the file system.

use std::path::{Path, PathBuf};

use super::{aptconf, deb822};
use crate::lock::ArchiveKind;

/// More sources than any real machine has.
const MAX_SOURCES: usize = 1000;
/// Names Debian's suites go by; newer ones are reached through the machine's own
/// configuration naming them.
const DEBIAN_SUITES: [&str; 18] = [
    "jessie",
    "stretch",
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "experimental",
    "wheezy",
    "squeeze",
    "rc-buggy",
];
const WITHOUT_POCKETS: [&str; 4] = ["sid", "unstable", "experimental", "rc-buggy"];

/// Why the apt configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{file}, line {line}: {problem}")]
    Syntax {
        file: PathBuf,
        line: usize,
        problem: String,
    },
    #[error(
        "the apt configuration below {root} names no Debian archive to take suite `{suite}` from; set x-kiln.debian.mirror in the compose file"
    )]
    NoDebian { root: PathBuf, suite: String },
    #[error("`{uri}` is no mirror address kiln can use (http:, https: or file:)")]
    Mirror { uri: String },
    #[error("`{suite}` is no suite name")]
    Suite { suite: String },
}

/// What an archive's signature is checked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRef {
    /// A keyring file, binary or armored.
    File(PathBuf),
    /// One of the default keyrings' keys, by fingerprint (upper-case hex).
    Fingerprint(String),
    /// An armored key inside the source's own text.
    Inline(String),
}

/// One `deb` source as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AptSource {
    pub uris: Vec<String>,
    pub suites: Vec<String>,
    pub architectures: Vec<String>,
    /// Empty: the default keyrings.
    pub signed_by: Vec<KeyRef>,
    pub check_valid_until: bool,
}

/// What kiln uses of a machine's apt configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AptConfig {
    /// The folder it was read below, for messages.
    pub root: PathBuf,
    pub sources: Vec<AptSource>,
    /// `Acquire::Check-Valid-Until "false"`.
    pub ignore_valid_until: bool,
}

/// One `dists/` folder to take packages from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    pub kind: ArchiveKind,
    /// Without a slash at its end.
    pub uri: String,
    /// The folder's name below `dists/`.
    pub suite: String,
    pub signed_by: Vec<KeyRef>,
    pub check_valid_until: bool,
    /// Not configured but guessed: it may be missing.
    pub optional: bool,
}

/// Parses a `sources.list` in the one-line form.
pub fn parse_one_line(text: &str, file: &Path) -> Result<Vec<AptSource>, SourcesError> {
    let mut sources = Vec::new();
    for (index, raw) in text.lines().enumerate() {
        let problem = |problem: &str| SourcesError::Syntax {
            file: file.into(),
            line: index + 1,
            problem: problem.into(),
        };
        let line = raw.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line
            .strip_prefix("deb")
            .filter(|rest| rest.starts_with([' ', '\t']))
        else {
            // `deb-src` and blank lines; anything else apt would refuse as well.
            if line.is_empty() || line.starts_with("deb-src") {
                continue;
            }
            return Err(problem("neither `deb` nor `deb-src`"));
        };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inside) => inside
                .split_once(']')
                .ok_or_else(|| problem("`[` without `]`"))?,
            None => ("", rest),
        };
        // An address may hold blanks only in brackets (`cdrom:[…]/`).
        if rest.trim_start().starts_with("cdrom:") {
            continue;
        }
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            return Err(problem("an address and a suite are needed after `deb`"));
        };
        let mut source = AptSource {
            uris: vec![uri.into()],
            suites: vec![suite.into()],
            architectures: Vec::new(),
            signed_by: Vec::new(),
            check_valid_until: true,
        };
        for option in options.split_whitespace() {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            source.option(key.trim_end_matches(['+', '-']), &value.replace(',', " "));
        }
        sources.push(source);
    }
    Ok(sources)
}

/// Parses a `.sources` file.
pub fn parse_deb822(text: &str, file: &Path) -> Result<Vec<AptSource>, SourcesError> {
    let mut sources = Vec::new();
    for stanza in deb822::stanzas(text) {
        if stanza.fields().next().is_none() {
            continue;
        }
        let line = 1 + (stanza.text().as_ptr() as usize - text.as_ptr() as usize).min(text.len());
        let line = 1 + text[..line - 1].matches('\n').count();
        let words = |name: &str| -> Vec<String> {
            let value = stanza.get(name).unwrap_or_default();
            let lines = value.lines().filter(|l| !l.trim_start().starts_with('#'));
            lines
                .flat_map(str::split_whitespace)
                .map(Into::into)
                .collect()
        };
        let enabled = stanza.get("Enabled").is_none_or(is_yes);
        if !enabled || !words("Types").iter().any(|kind| kind == "deb") {
            continue;
        }
        let (uris, suites) = (words("URIs"), words("Suites"));
        if uris.is_empty() || suites.is_empty() {
            return Err(SourcesError::Syntax {
                file: file.into(),
                line,
                problem: "a stanza of type deb needs URIs and Suites".into(),
            });
        }
        let mut source = AptSource {
            uris,
            suites,
            architectures: Vec::new(),
            signed_by: Vec::new(),
            check_valid_until: true,
        };
        for (key, value) in stanza.fields() {
            source.option(key, value);
        }
        sources.push(source);
    }
    Ok(sources)
}

impl AptSource {
    /// Takes over an option that matters here; both forms share their names.
    /// `Trusted: yes` is passed over on purpose: kiln verifies every archive.
    fn option(&mut self, key: &str, value: &str) {
        match key.to_ascii_lowercase().as_str() {
            "arch" | "architectures" => {
                self.architectures = value.split_whitespace().map(Into::into).collect();
            }
            "signed-by" => self.signed_by = key_refs(value),
            "check-valid-until" => self.check_valid_until = is_yes(value),
            _ => {}
        }
    }
}

fn is_yes(value: &str) -> bool {
    !matches!(
        value.to_ascii_lowercase().as_str(),
        "no" | "false" | "without" | "off" | "disable" | "0"
    )
}

fn key_refs(value: &str) -> Vec<KeyRef> {
    if value.contains("-----BEGIN") {
        let lines = value.lines().map(|line| match line.trim() {
            "." => "",
            line => line,
        });
        return vec![KeyRef::Inline(lines.collect::<Vec<_>>().join("\n") + "\n")];
    }
    value
        .split([' ', '\t', '\n', ','])
        .filter(|word| !word.is_empty())
        .map(|word| match word.starts_with('/') {
            true => KeyRef::File(word.into()),
            // A `!` asks for exactly that key: the comparison is by full fingerprint anyway.
            false => KeyRef::Fingerprint(word.trim_end_matches('!').to_ascii_uppercase()),
        })
        .collect()
}

/// Reads the apt configuration below `root` (`/` for the machine's own).
pub fn read(root: &Path) -> Result<AptConfig, SourcesError> {
    let etc = root.join("etc/apt");
    let mut config = AptConfig {
        root: root.into(),
        ..AptConfig::default()
    };
    let mut files = folder(&etc.join("sources.list.d"), &["list", "sources"])?;
    files.insert(0, etc.join("sources.list"));
    for file in files {
        let Some(text) = read_text(&file)? else {
            continue;
        };
        let mut sources = match file.extension().is_some_and(|e| e == "sources") {
            true => parse_deb822(&text, &file)?,
            false => parse_one_line(&text, &file)?,
        };
        for source in &mut sources {
            source.uris = expand_mirror_lists(root, &source.uris)?;
            rebase_keys(root, source);
        }
        config.sources.extend(sources);
        config.sources.truncate(MAX_SOURCES);
    }
    let mut files = folder(&etc.join("apt.conf.d"), &["conf", ""])?;
    files.push(etc.join("apt.conf"));
    for file in files {
        let text = read_text(&file)?.unwrap_or_default();
        for (key, value) in aptconf::parse(&text) {
            if key == "acquire::check-valid-until" {
                config.ignore_valid_until = !is_yes(&value);
            }
        }
    }
    Ok(config)
}

fn read_text(file: &Path) -> Result<Option<String>, SourcesError> {
    match std::fs::read(file) {
        // Comments may be in any encoding.
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SourcesError::Read {
            path: file.into(),
            source,
        }),
    }
}

fn folder(path: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, SourcesError> {
    let fail = |source| SourcesError::Read {
        path: path.into(),
        source,
    };
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        let extension = path.extension().unwrap_or_default();
        if extensions.iter().any(|wanted| *wanted == extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `mirror+file:/list` becomes the list's addresses, in its order.
fn expand_mirror_lists(root: &Path, uris: &[String]) -> Result<Vec<String>, SourcesError> {
    let mut all = Vec::new();
    for uri in uris {
        let Some(list) = uri.strip_prefix("mirror+file:") else {
            all.push(uri.clone());
            continue;
        };
        let path = root.join(list.trim_start_matches('/'));
        let text = read_text(&path)?.unwrap_or_default();
        let lines = text
            .lines()
            .map(|line| line.split('#').next().unwrap_or_default());
        all.extend(
            lines
                .filter_map(|line| line.split_whitespace().next())
                .map(Into::into),
        );
    }
    Ok(all)
}

fn rebase_keys(root: &Path, source: &mut AptSource) {
    for key in &mut source.signed_by {
        if let KeyRef::File(path) = key {
            *path = root.join(path.strip_prefix("/").unwrap_or(path));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pocket {
    Release,
    Updates,
    Security,
}

impl Pocket {
    fn suite(self, base: &str) -> String {
        match self {
            Pocket::Release => base.into(),
            Pocket::Updates => format!("{base}-updates"),
            Pocket::Security => format!("{base}-security"),
        }
    }

    fn kind(self) -> ArchiveKind {
        match self {
            Pocket::Release | Pocket::Updates => ArchiveKind::Debian,
            Pocket::Security => ArchiveKind::Security,
        }
    }
}

/// `bookworm-security` → (`bookworm`, security); `None`: not for kiln.
fn pocket(suite: &str) -> Option<(&str, Pocket)> {
    if suite.ends_with('/') {
        return None;
    }
    for (suffix, pocket) in [
        ("-updates", Pocket::Updates),
        ("-security", Pocket::Security),
        ("/updates", Pocket::Security),
    ] {
        if let Some(base) = suite.strip_suffix(suffix) {
            return Some((base, pocket));
        }
    }
    (!suite.ends_with("-backports")
        && !suite.ends_with("-proposed-updates")
        && !suite.ends_with("-sloppy"))
    .then_some((suite, Pocket::Release))
}

/// The archives of `suite` for `arch`, by the rules above, in a stable order.
pub fn archives(config: &AptConfig, suite: &str, arch: &str) -> Result<Vec<Archive>, SourcesError> {
    check_suite(suite)?;
    let mut exact = Vec::new();
    let mut mapped = Vec::new();
    for source in &config.sources {
        if !source.architectures.is_empty() && !source.architectures.iter().any(|a| a == arch) {
            continue;
        }
        for (base, pocket) in source.suites.iter().filter_map(|s| pocket(s)) {
            for uri in source.uris.iter().filter(|uri| !uri.starts_with("cdrom:")) {
                let archive = Archive {
                    kind: pocket.kind(),
                    uri: uri.replace("$(ARCH)", arch).trim_end_matches('/').into(),
                    suite: pocket.suite(suite),
                    signed_by: source.signed_by.clone(),
                    check_valid_until: source.check_valid_until && !config.ignore_valid_until,
                    optional: false,
                };
                if base == suite {
                    exact.push((pocket, archive));
                } else if DEBIAN_SUITES.contains(&base) {
                    mapped.push((pocket, archive));
                }
            }
        }
    }
    let has_release = |list: &[(Pocket, Archive)]| list.iter().any(|(p, _)| *p == Pocket::Release);
    let chosen = match has_release(&exact) {
        true => exact,
        false => mapped,
    };
    if !has_release(&chosen) {
        return Err(SourcesError::NoDebian {
            root: config.root.clone(),
            suite: suite.into(),
        });
    }
    Ok(complete(chosen, suite))
}

/// The archives of `suite` at an explicit mirror.
pub fn mirror_archives(mirror: &str, suite: &str) -> Result<Vec<Archive>, SourcesError> {
    check_suite(suite)?;
    if !["http://", "https://", "file:/"]
        .iter()
        .any(|scheme| mirror.starts_with(scheme))
    {
        return Err(SourcesError::Mirror { uri: mirror.into() });
    }
    let release = Archive {
        kind: ArchiveKind::Debian,
        uri: mirror.trim_end_matches('/').into(),
        suite: suite.into(),
        signed_by: Vec::new(),
        check_valid_until: true,
        optional: false,
    };
    Ok(complete(vec![(Pocket::Release, release)], suite))
}

/// Suite names become parts of addresses and paths.
fn check_suite(suite: &str) -> Result<(), SourcesError> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if suite.is_empty() || suite.starts_with(['.', '-']) || !suite.bytes().all(fine) {
        return Err(SourcesError::Suite {
            suite: suite.into(),
        });
    }
    Ok(())
}

/// Adds the neighbours that are not configured, as optional, and drops doubles.
fn complete(mut chosen: Vec<(Pocket, Archive)>, suite: &str) -> Vec<Archive> {
    let bare = WITHOUT_POCKETS.contains(&suite);
    chosen.retain(|(pocket, _)| !bare || *pocket == Pocket::Release);
    let missing = [Pocket::Updates, Pocket::Security]
        .into_iter()
        .filter(|wanted| !bare && !chosen.iter().any(|(found, _)| found == wanted));
    let mut guessed = Vec::new();
    for wanted in missing {
        for (_, release) in chosen
            .iter()
            .filter(|(pocket, _)| *pocket == Pocket::Release)
        {
            let uri = match wanted {
                Pocket::Security => security_neighbour(&release.uri),
                _ => Some(release.uri.clone()),
            };
            guessed.extend(uri.map(|uri| Archive {
                kind: wanted.kind(),
                uri,
                suite: wanted.suite(suite),
                optional: true,
                ..release.clone()
            }));
        }
    }
    let all = chosen
        .into_iter()
        .map(|(_, archive)| archive)
        .chain(guessed);
    let mut archives: Vec<Archive> = Vec::new();
    for archive in all {
        if !archives
            .iter()
            .any(|a| a.uri == archive.uri && a.suite == archive.suite)
        {
            archives.push(archive);
        }
    }
    archives
}

/// `…/debian` → `…/debian-security`, also with folders after it (snapshots).
fn security_neighbour(uri: &str) -> Option<String> {
    let mut parts: Vec<&str> = uri.split('/').collect();
    let at = parts
        .iter()
        .rposition(|part| *part == "debian")
        .filter(|at| *at > 2)?;
    parts[at] = "debian-security";
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    const F: &str = "/etc/apt/sources.list";

    fn one_line(text: &str) -> AptConfig {
        AptConfig {
            sources: parse_one_line(text, Path::new(F)).unwrap(),
            ..AptConfig::default()
        }
    }

    fn names(archives: &[Archive]) -> Vec<String> {
        let mark = |a: &Archive| if a.optional { "?" } else { "" };
        archives
            .iter()
            .map(|a| format!("{} {}{}", a.uri, a.suite, mark(a)))
            .collect()
    }

    const CLASSIC: &str = "\
# comment
deb [arch=amd64,arm64 signed-by=/k/a.gpg] http://m.test/debian/ bookworm main contrib # tail
deb-src http://m.test/debian bookworm main
deb http://m.test/debian bookworm-updates main
deb http://s.test/debian-security bookworm-security main
deb http://m.test/debian bookworm-backports main
deb cdrom:[Debian GNU/Linux 12 _Bookworm_]/ bookworm main
deb https://vendor.test/apt stuff main
deb https://flat.test/apt ./
";

    #[test]
    fn the_machines_own_suite_is_taken_as_configured() {
        let config = one_line(CLASSIC);
        let archives = archives(&config, "bookworm", "amd64").unwrap();
        assert_eq!(
            names(&archives),
            [
                "http://m.test/debian bookworm",
                "http://m.test/debian bookworm-updates",
                "http://s.test/debian-security bookworm-security"
            ]
        );
        assert_eq!(archives[0].signed_by, [KeyRef::File("/k/a.gpg".into())]);
        assert_eq!(archives[2].kind, ArchiveKind::Security);
    }

    #[test]
    fn another_suite_comes_from_the_same_addresses() {
        let config = one_line(CLASSIC);
        assert_eq!(
            names(&archives(&config, "trixie", "amd64").unwrap()),
            [
                "http://m.test/debian trixie",
                "http://m.test/debian trixie-updates",
                "http://s.test/debian-security trixie-security"
            ]
        );
        assert_eq!(
            names(&archives(&config, "sid", "amd64").unwrap()),
            ["http://m.test/debian sid"]
        );
    }

    #[test]
    fn neighbours_that_are_not_configured_are_guessed() {
        let config = one_line("deb http://m.test/debian sid main");
        assert_eq!(
            names(&archives(&config, "bookworm", "amd64").unwrap()),
            [
                "http://m.test/debian bookworm",
                "http://m.test/debian bookworm-updates?",
                "http://m.test/debian-security bookworm-security?"
            ]
        );
        assert_eq!(
            names(
                &mirror_archives("http://m.test/archive/debian/20250101T000000Z/", "trixie")
                    .unwrap()
            )[2],
            "http://m.test/archive/debian-security/20250101T000000Z trixie-security?"
        );
        assert_eq!(
            mirror_archives("http://debian/x", "trixie").unwrap().len(),
            2
        );
    }

    #[test]
    fn no_debian_is_said() {
        for text in [
            "",
            "deb http://u.test/ubuntu noble main",
            "deb [arch=arm64] http://m.test/debian bookworm main",
        ] {
            let error = archives(&one_line(text), "trixie", "amd64").unwrap_err();
            assert!(
                error.to_string().contains("x-kiln.debian.mirror"),
                "{error}"
            );
        }
        assert!(archives(&one_line(CLASSIC), "../x", "amd64").is_err());
        assert!(mirror_archives("ftp://m.test/debian", "trixie").is_err());
    }

    #[test]
    fn bad_lines_are_named() {
        for bad in [
            "deb [arch=amd64 http://m.test x main",
            "dep http://m.test x main",
            "deb http://m.test",
        ] {
            let error = parse_one_line(&format!("\n{bad}"), Path::new(F)).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("/etc/apt/sources.list, line 2"),
                "{error}"
            );
        }
        let error = parse_deb822(
            "Types: deb\nURIs: x\nSuites: y\n\nTypes: deb\nURIs: x\n",
            Path::new(F),
        )
        .unwrap_err();
        assert!(error.to_string().contains("line 5"), "{error}");
    }

    #[test]
    fn deb822_stanzas_with_options_and_an_inline_key() {
        let text = "\
# head

Types: deb deb-src
URIs: http://m.test/debian
Suites: bookworm
 bookworm-updates
Components: main
Check-Valid-Until: no
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.test/debian
Suites: bookworm

Types: deb-src
URIs: http://src.test/debian
Suites: bookworm

types: deb
uris: http://s.test/debian-security
suites: bookworm-security
signed-by: /k/a.asc, ABCDEF0123!
";
        let sources = parse_deb822(text, Path::new("x.sources")).unwrap();
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert!(!sources[0].check_valid_until && sources[1].check_valid_until);
        let [KeyRef::Inline(key)] = sources[0].signed_by.as_slice() else {
            panic!("{:?}", sources[0].signed_by);
        };
        assert!(key.contains("BLOCK-----\n\nabc\n"), "{key}");
        assert_eq!(
            sources[1].signed_by,
            [
                KeyRef::File("/k/a.asc".into()),
                KeyRef::Fingerprint("ABCDEF0123".into())
            ]
        );
    }

    #[test]
    fn a_whole_configuration_is_read_below_a_folder() {
        let root = tempfile::tempdir().unwrap();
        let apt = root.path().join("etc/apt");
        std::fs::create_dir_all(apt.join("sources.list.d")).unwrap();
        std::fs::create_dir_all(apt.join("apt.conf.d")).unwrap();
        std::fs::create_dir_all(apt.join("mirrors")).unwrap();
        std::fs::write(
            apt.join("sources.list"),
            "deb http://a.test/debian bookworm main\n",
        )
        .unwrap();
        std::fs::write(
            apt.join("sources.list.d/b.sources"),
            "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/l.list\nSuites: bookworm-security\nSigned-By: /k.gpg\n",
        )
        .unwrap();
        std::fs::write(apt.join("sources.list.d/c.list.save"), "garbage").unwrap();
        std::fs::write(
            apt.join("mirrors/l.list"),
            "# l\nhttp://b.test/debian-security priority:1\n",
        )
        .unwrap();
        std::fs::write(
            apt.join("apt.conf.d/99x"),
            "Acquire { Check-Valid-Until \"false\"; };",
        )
        .unwrap();
        let config = read(root.path()).unwrap();
        assert!(config.ignore_valid_until);
        let archives = archives(&config, "bookworm", "amd64").unwrap();
        assert_eq!(
            names(&archives),
            [
                "http://a.test/debian bookworm",
                "http://b.test/debian-security bookworm-security",
                "http://a.test/debian bookworm-updates?"
            ]
        );
        assert_eq!(
            archives[1].signed_by,
            [KeyRef::File(root.path().join("k.gpg"))]
        );
        assert!(!archives[0].check_valid_until);
        let empty = tempfile::tempdir().unwrap();
        assert!(read(empty.path()).unwrap().sources.is_empty());
    }
}
