//! Where Debian is: the machine's apt configuration, or an explicit mirror, turned
//! into the archives of one suite ([`archives`]).
//!
//! Parsing is pure; only [`read`] touches the file system.

mod pick;

use std::path::{Path, PathBuf};

use super::{aptconf, deb822};
pub use pick::{Archive, archives, mirror_archives};

/// More sources than any real machine has.
const MAX_SOURCES: usize = 1000;

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

#[cfg(test)]
mod tests;
