//! Where apt finds packages in a RUN over a base that has no sources of its own: bases
//! are the same on every machine, mirrors are not. The machine's own sources are shown
//! to the step and stay out of the image.

use std::path::Path;

use kiln_model::instance::{InstanceMount, InstanceMountSource};

use super::work::Work;
use super::{ExecError, Site};
use crate::debian::sources::{self, Archive, KeyRef};
use crate::files::{self, Source};
use crate::lock::ArchiveKind;
use crate::rootfs::Rootfs;

/// Where the step sees them.
const TARGET: &str = "/etc/apt/sources.list.d/kiln.sources";
/// A sources file, or an os-release, is not larger.
const MAX_TEXT: u64 = 1 << 20;

/// What apt is shown.
#[derive(Default)]
pub(super) struct Apt {
    pub mounts: Vec<InstanceMount>,
    /// The archives' names that the sources have, and the machine's mirrors, which the recording
    /// proxy asks instead: what is recorded names no mirror either.
    pub mirrors: Vec<(String, String)>,
}

impl Site<'_> {
    /// What is shown to apt; nothing where there is no apt, or it has sources.
    pub(super) fn apt(
        &self,
        before: &Rootfs,
        work: &mut Work,
        platform: &str,
    ) -> Result<Apt, ExecError> {
        let Some(suite) = lacks_sources(before)? else {
            return Ok(Apt::default());
        };
        let arch = crate::debian::architecture(platform).unwrap_or_default();
        // A machine without Debian sources has none to give: apt will say what it misses.
        let found = sources::read(Path::new("/"))
            .and_then(|config| sources::archives(&config, &suite, arch));
        let archives = match found {
            Ok(archives) => archives,
            Err(cause) => {
                tracing::debug!(%cause, "no sources for apt");
                return Ok(Apt::default());
            }
        };
        let (archives, mirrors) = without_mirrors(archives);
        let mut mounts = Vec::new();
        let text = render(&archives, |key| {
            let name = key.file_name().unwrap_or_default().to_string_lossy();
            let target = format!("/run/kiln-keys/{}-{name}", mounts.len());
            mounts.push(file(key.to_owned(), target.clone()));
            target
        });
        if text.is_empty() {
            tracing::debug!("the machine's sources for apt are all on its own disk");
            return Ok(Apt::default());
        }
        let path = work.file("apt-sources", text.as_bytes(), 0o644)?;
        mounts.push(file(path, TARGET.into()));
        Ok(Apt { mounts, mirrors })
    }
}

/// Archives by names that nobody has (RFC 6761, 6.4), and which mirror is behind each: what
/// goes past the recording proxy reaches nothing. A second mirror of one archive stays as it is.
fn without_mirrors(mut archives: Vec<Archive>) -> (Vec<Archive>, Vec<(String, String)>) {
    let mut mirrors: Vec<(String, String)> = Vec::new();
    for archive in &mut archives {
        let own = match archive.kind {
            ArchiveKind::Debian => "http://debian.invalid/debian",
            ArchiveKind::Security => "http://debian.invalid/debian-security",
        };
        let real = archive.uri.trim_end_matches('/').to_owned();
        let web = real.starts_with("http://") || real.starts_with("https://");
        let known = mirrors.iter().find(|(shown, _)| shown == own);
        if !web || known.is_some_and(|(_, other)| *other != real) {
            continue;
        }
        if known.is_none() {
            mirrors.push((own.to_owned(), real));
        }
        archive.uri = own.to_owned();
    }
    (archives, mirrors)
}

fn file(path: std::path::PathBuf, target: String) -> InstanceMount {
    InstanceMount {
        source: InstanceMountSource::File {
            path,
            uid: 0,
            gid: 0,
            mode: 0o644,
            secret: false,
        },
        target,
        read_only: true,
        exec: false,
        dev: false,
    }
}

/// The suite of a Debian root with apt and no sources.
fn lacks_sources(root: &Rootfs) -> Result<Option<String>, ExecError> {
    let names = |path: &str| files::names(path.as_bytes());
    let apt = files::resolve(root, &names("/usr/bin/apt-get"), true)?;
    if root.kind(&apt).is_none() {
        return Ok(None);
    }
    let stated = |path: &str| -> Result<bool, ExecError> {
        let text = root.text(path, MAX_TEXT)?;
        let mut lines = text.lines().map(str::trim);
        Ok(lines.any(|line| !line.is_empty() && !line.starts_with('#')))
    };
    if stated("/etc/apt/sources.list")? {
        return Ok(None);
    }
    let folder = "/etc/apt/sources.list.d";
    for name in root.names(&names(folder)) {
        let name = String::from_utf8_lossy(&name).into_owned();
        let counts = name.ends_with(".list") || name.ends_with(".sources");
        if counts && stated(&format!("{folder}/{name}"))? {
            return Ok(None);
        }
    }
    Ok(suite(&root.text("/etc/os-release", MAX_TEXT)?))
}

/// `VERSION_CODENAME` of a Debian's os-release.
fn suite(text: &str) -> Option<String> {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.map(|value| value.trim_matches(['"', '\'', ' ']).to_owned())
    };
    (value("ID=")? == "debian").then(|| value("VERSION_CODENAME="))?
}

/// The sources in apt's own form; `key`: where a key file of the machine's is seen.
fn render(archives: &[Archive], mut key: impl FnMut(&Path) -> String) -> String {
    let mut text = String::new();
    // What was only guessed may not be there, and apt takes that for a failure.
    let sure = archives.iter().filter(|a| !a.optional);
    for archive in sure.filter(|a| a.uri.starts_with("http")) {
        text.push_str(&format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            archive.uri, archive.suite
        ));
        if !archive.check_valid_until {
            text.push_str("Check-Valid-Until: no\n");
        }
        let mut keys = Vec::new();
        for signed in &archive.signed_by {
            match signed {
                KeyRef::File(path) => keys.push(key(path)),
                KeyRef::Fingerprint(print) => keys.push(print.clone()),
                KeyRef::Inline(armored) => {
                    let lines = armored.lines().map(|line| match line.trim() {
                        "" => "\n .".to_owned(),
                        line => format!("\n {line}"),
                    });
                    keys.push(lines.collect());
                }
            }
        }
        if !keys.is_empty() {
            text.push_str(&format!("Signed-By: {}\n", keys.join(" ")));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::ArchiveKind;

    #[test]
    fn sources_are_written_as_apt_reads_them() {
        let archive = |suite: &str, signed_by, optional| Archive {
            kind: ArchiveKind::Debian,
            uri: "http://m.test/debian".into(),
            suite: suite.into(),
            signed_by,
            check_valid_until: false,
            optional,
        };
        let archives = [
            archive("s", vec![KeyRef::File("/k/a.gpg".into())], false),
            archive("t", vec![KeyRef::Inline("B\n\nE\n".into())], false),
            archive("guessed", Vec::new(), true),
        ];
        let text = render(&archives, |key| format!("/seen{}", key.display()));
        let head = "Types: deb\nURIs: http://m.test/debian\nSuites: ";
        let tail = "\nComponents: main\nCheck-Valid-Until: no\nSigned-By: ";
        assert_eq!(
            text,
            format!("{head}s{tail}/seen/k/a.gpg\n\n{head}t{tail}\n B\n .\n E\n\n")
        );
    }

    #[test]
    fn only_debian_has_a_suite() {
        let text = "PRETTY_NAME=x\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(suite(text).as_deref(), Some("bookworm"));
        assert_eq!(suite(&text.replace("debian", "other")), None);
        assert_eq!(suite("ID=debian\n"), None);
    }
}
