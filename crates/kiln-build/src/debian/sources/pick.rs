//! Which of the sources of a machine's apt are a suite's archives.
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
//! that is fetched.

use super::{AptConfig, KeyRef, SourcesError};
use crate::lock::ArchiveKind;

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
