//! A suite's Release file: what it says, and how a signed one (InRelease) is taken
//! apart. Pure; the signature itself is checked in [`super::verify`]. Only text that
//! was covered by the signature is ever parsed.

use std::collections::BTreeMap;

use kiln_model::Digest;

use super::deb822;

/// Why a Release file can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReleaseError {
    #[error("{url} is not a signed Release file")]
    NotSigned { url: String },
    #[error("{url} is no Release file: {problem}")]
    Syntax { url: String, problem: String },
    #[error(
        "{url} is for suite `{found}`, not `{wanted}`: the mirror or a machine on the way gives out the wrong suite"
    )]
    WrongSuite {
        url: String,
        found: String,
        wanted: String,
    },
    #[error(
        "{url} was valid until {valid_until} only: the mirror is out of date (or this machine's clock is wrong); use another mirror, or for a snapshot set `Check-Valid-Until: no` in its apt source"
    )]
    Expired { url: String, valid_until: String },
    #[error("suite `{suite}` has no component `{component}` for {arch} (it has {known})")]
    NoComponent {
        suite: String,
        component: String,
        arch: String,
        known: String,
    },
}

/// What kiln needs of a Release file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Release {
    pub origin: String,
    pub suite: String,
    pub codename: String,
    /// As written.
    pub valid_until: Option<String>,
    pub by_hash: bool,
    pub architectures: Vec<String>,
    /// `Architecture: all` packages are in the other architectures' indexes too.
    pub all_included: bool,
    pub components: Vec<String>,
    /// Path below the suite → digest and size in bytes.
    pub files: BTreeMap<String, (Digest, u64)>,
}

/// Splits a cleartext-signed file (RFC 9580, section 7) into the signed text and the
/// armored signature. Text before and after is left out.
pub fn split_signed(text: &str) -> Option<(String, String)> {
    const BEGIN: &str = "-----BEGIN PGP SIGNED MESSAGE-----";
    const SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
    const END: &str = "-----END PGP SIGNATURE-----";
    let mut lines = text
        .lines()
        .map(str::trim_end)
        .skip_while(|line| *line != BEGIN);
    lines.next()?;
    // Armor headers (`Hash: …`) up to the blank line.
    lines.by_ref().find(|line| line.is_empty())?;
    let mut message: Vec<&str> = Vec::new();
    for line in lines.by_ref() {
        if line == SIGNATURE {
            let mut signature = vec![SIGNATURE];
            for line in lines {
                signature.push(line);
                if line == END {
                    return Some((message.join("\n"), signature.join("\n") + "\n"));
                }
            }
            return None;
        }
        if line.starts_with("-----") {
            return None;
        }
        message.push(line.strip_prefix("- ").unwrap_or(line));
    }
    None
}

/// Parses a Release file's text; `url` is for messages.
pub fn parse(text: &str, url: &str) -> Result<Release, ReleaseError> {
    let syntax = |problem: &str| ReleaseError::Syntax {
        url: url.into(),
        problem: problem.into(),
    };
    let stanza = deb822::stanzas(text)
        .next()
        .ok_or_else(|| syntax("it is empty"))?;
    let mut release = Release::default();
    for (name, value) in stanza.fields() {
        let words = || value.split_whitespace().map(String::from).collect();
        match name.to_ascii_lowercase().as_str() {
            "origin" => release.origin = value.into(),
            "suite" => release.suite = value.into(),
            "codename" => release.codename = value.into(),
            "valid-until" => release.valid_until = Some(value.into()),
            "acquire-by-hash" => release.by_hash = value == "yes",
            "no-support-for-architecture-all" => release.all_included = value.contains("Packages"),
            "architectures" => release.architectures = words(),
            "components" => release.components = words(),
            "sha256" => {
                release.files =
                    files(value).ok_or_else(|| syntax("its SHA256 list is malformed"))?
            }
            _ => {}
        }
    }
    if release.files.is_empty() {
        return Err(syntax("it lists no files by SHA256"));
    }
    // The security archive calls its components `updates/main`.
    for component in &mut release.components {
        if let Some(plain) = component.strip_prefix("updates/") {
            *component = plain.into();
        }
    }
    Ok(release)
}

fn files(value: &str) -> Option<BTreeMap<String, (Digest, u64)>> {
    let lines = value.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let digest = Digest::from_hex(words.next()?).ok()?;
            let size = words.next()?.parse().ok()?;
            Some((words.next()?.to_string(), (digest, size)))
        })
        .collect()
}

impl Release {
    /// Checks that this is `suite`, and at `now` (seconds since the epoch) still valid.
    pub fn check(&self, url: &str, suite: &str, now: Option<u64>) -> Result<(), ReleaseError> {
        if self.codename != suite && self.suite != suite {
            return Err(ReleaseError::WrongSuite {
                url: url.into(),
                found: format!("{} ({})", self.codename, self.suite),
                wanted: suite.into(),
            });
        }
        let (Some(text), Some(now)) = (&self.valid_until, now) else {
            return Ok(());
        };
        let until = parse_date(text).ok_or_else(|| ReleaseError::Syntax {
            url: url.into(),
            problem: format!("`{text}` is no date"),
        })?;
        if until < now {
            return Err(ReleaseError::Expired {
                url: url.into(),
                valid_until: text.clone(),
            });
        }
        Ok(())
    }

    /// The package indexes of one component: (path, digest, size), the best
    /// compressed form of each.
    pub fn indexes(&self, component: &str, arch: &str) -> Vec<(String, Digest, u64)> {
        // Where `all` is not named, its index may be listed, but is not kept up.
        let separate = self.architectures.iter().any(|a| a == "all") && !self.all_included;
        let all = separate.then_some("all");
        [Some(arch), all]
            .into_iter()
            .flatten()
            .filter_map(|arch| {
                [".xz", ".gz", ""].iter().find_map(|suffix| {
                    let path = format!("{component}/binary-{arch}/Packages{suffix}");
                    let (digest, size) = self.files.get(&path)?;
                    Some((path, *digest, *size))
                })
            })
            .collect()
    }
}

/// `Sat, 28 Nov 2026 00:53:02 UTC` as seconds since the epoch.
fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, day, month, year, time, zone] = words.as_slice() else {
        return None;
    };
    if !matches!(*zone, "UTC" | "GMT" | "+0000" | "Z") {
        return None;
    }
    let day: i64 = day.parse().ok().filter(|d| (1..=31).contains(d))?;
    let month = 1 + i64::try_from(MONTHS.iter().position(|m| m == month)?).ok()?;
    let year: i64 = year.parse().ok().filter(|y| (1970..10_000).contains(y))?;
    let clock: Vec<i64> = time
        .split(':')
        .map(|p| p.parse().ok())
        .collect::<Option<_>>()?;
    let [hours, minutes, seconds] = clock.as_slice() else {
        return None;
    };
    // Days since the epoch of a Gregorian date, counting years from March.
    let shifted = if month > 2 { year } else { year - 1 };
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let days = shifted * 365 + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
    u64::try_from(days * 86_400 + hours * 3600 + minutes * 60 + seconds).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn dates_are_seconds_since_the_epoch() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(
            parse_date("Sat, 28 Nov 2026 00:53:02 UTC"),
            Some(1_795_827_182)
        );
        assert_eq!(
            parse_date("Thu, 29 Feb 2024 12:00:00 UTC"),
            Some(1_709_208_000)
        );
        for bad in [
            "",
            "Sat, 28 Nov 2026 00:53:02 CET",
            "Sat, 99 Nov 2026 00:53:02 UTC",
            "Sat, 28 Nov 2026 x UTC",
        ] {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_signed_text_comes_out() {
        let text = "Origin: Evil\n-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: Debian \n- -----x\n\
                    -----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----\nOrigin: Evil\n";
        let (message, signature) = split_signed(text).unwrap();
        assert_eq!(message, "Origin: Debian\n-----x");
        assert!(signature.starts_with("-----BEGIN PGP SIGNATURE-----\n\nabc\n-----END"));
        for cut in [
            "",
            "Origin: Debian\n",
            &text[..120],
            &text[..text.len() - 45],
        ] {
            assert_eq!(split_signed(cut), None, "{cut}");
        }
    }

    fn sample(extra: &str) -> String {
        format!(
            "Origin: Debian\nSuite: stable-security\nCodename: trixie-security\nAcquire-By-Hash: yes\n{extra}\
             Components: updates/main\nSHA256:\n {0} 10 main/binary-amd64/Packages.xz\n {0} 12 main/binary-amd64/Packages.gz\n {0} 3 main/binary-all/Packages.gz\n",
            Digest::of("x").hex()
        )
    }

    #[test]
    fn suite_and_time_are_checked() {
        let release = parse(&sample("Valid-Until: Thu, 01 Jan 1970 00:01:40 UTC\n"), "u").unwrap();
        assert_eq!(release.components, ["main"]);
        release.check("u", "trixie-security", Some(100)).unwrap();
        release.check("u", "stable-security", None).unwrap();
        assert!(matches!(
            release.check("u", "trixie-security", Some(101)),
            Err(ReleaseError::Expired { .. })
        ));
        assert!(matches!(
            release.check("u", "bookworm-security", None),
            Err(ReleaseError::WrongSuite { .. })
        ));
    }

    #[test]
    fn the_best_compressed_index_is_chosen() {
        let paths = |extra: &str| -> Vec<String> {
            let release = parse(&sample(extra), "u").unwrap();
            release
                .indexes("main", "amd64")
                .into_iter()
                .map(|(path, ..)| path)
                .collect()
        };
        assert_eq!(
            paths("Architectures: all amd64\n"),
            [
                "main/binary-amd64/Packages.xz",
                "main/binary-all/Packages.gz"
            ]
        );
        assert_eq!(
            paths("Architectures: all amd64\nNo-Support-for-Architecture-all: Packages\n"),
            ["main/binary-amd64/Packages.xz"]
        );
        assert_eq!(
            paths("Architectures: amd64\n"),
            ["main/binary-amd64/Packages.xz"]
        );
        assert!(parse("Origin: Debian\n", "u").is_err());
        assert!(parse("SHA256:\n zz 1 a\n", "u").is_err());
        assert!(parse("", "u").is_err());
    }
}
