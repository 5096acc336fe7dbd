//! Package indexes (`Packages`), parsed without copying, and the universe of
//! candidates a base is resolved in. Pure.

use std::cmp::Ordering;
use std::collections::HashMap;

use kiln_model::Digest;

use super::relation::{self, Relation};
use super::{deb822, version};
use crate::lock::{ArchiveKind, LockedPackage};

/// Why an index can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{url} is malformed: package `{package}` {problem}")]
pub struct IndexError {
    pub url: String,
    pub package: String,
    pub problem: &'static str,
}

/// One stanza of an index; texts borrow from it.
#[derive(Clone, Debug, Default)]
pub struct Package<'a> {
    pub name: &'a str,
    pub version: &'a str,
    pub arch: &'a str,
    pub essential: bool,
    pub priority: &'a str,
    pub depends: &'a str,
    pub pre_depends: &'a str,
    pub provides: &'a str,
    pub conflicts: &'a str,
    pub breaks: &'a str,
    pub path: &'a str,
    pub size: u64,
    pub sha256: &'a str,
    pub archive: Option<ArchiveKind>,
}

impl<'a> Package<'a> {
    pub fn dependencies(&self) -> impl Iterator<Item = Vec<Relation<'a>>> {
        relation::parse(self.pre_depends).chain(relation::parse(self.depends))
    }

    pub fn enemies(&self) -> impl Iterator<Item = Relation<'a>> {
        relation::parse(self.conflicts)
            .chain(relation::parse(self.breaks))
            .flatten()
    }

    pub fn provided(&self) -> impl Iterator<Item = Relation<'a>> {
        relation::parse(self.provides).flatten()
    }

    pub fn required(&self) -> bool {
        self.essential || self.priority == "required"
    }

    /// `None` where the index gave no good digest or place ([`parse`] lets none through).
    pub fn lock(&self) -> Option<LockedPackage> {
        Some(LockedPackage {
            name: self.name.into(),
            version: self.version.into(),
            arch: self.arch.into(),
            sha256: Digest::from_hex(self.sha256).ok()?,
            size: self.size,
            archive: self.archive?,
            path: self.path.into(),
        })
    }
}

/// The packages in `text` for `arch` or all architectures.
pub fn parse<'a>(
    text: &'a str,
    arch: &str,
    archive: ArchiveKind,
    url: &str,
) -> Result<Vec<Package<'a>>, IndexError> {
    let mut packages = Vec::new();
    for stanza in deb822::stanzas(text) {
        let mut package = Package {
            archive: Some(archive),
            ..Package::default()
        };
        for (name, value) in stanza.fields() {
            match name {
                "Package" => package.name = value,
                "Version" => package.version = value,
                "Architecture" => package.arch = value,
                "Essential" => package.essential = value == "yes",
                "Priority" => package.priority = value,
                "Depends" => package.depends = value,
                "Pre-Depends" => package.pre_depends = value,
                "Provides" => package.provides = value,
                "Conflicts" => package.conflicts = value,
                "Breaks" => package.breaks = value,
                "Filename" => package.path = value,
                "Size" => package.size = value.parse().unwrap_or(0),
                "SHA256" => package.sha256 = value,
                _ => {}
            }
        }
        if package.arch != arch && package.arch != "all" {
            continue;
        }
        if let Some(problem) = problem(&package) {
            return Err(IndexError {
                url: url.into(),
                package: package.name.into(),
                problem,
            });
        }
        packages.push(package);
    }
    Ok(packages)
}

fn problem(package: &Package) -> Option<&'static str> {
    if !plain_name(package.name) {
        return Some("has an impossible name");
    }
    let version_fine = |b: u8| b.is_ascii_alphanumeric() || b".+-:~".contains(&b);
    if package.version.is_empty() || !package.version.bytes().all(version_fine) {
        return Some("has an impossible version");
    }
    if !plain_path(package.path) {
        return Some("has an unsafe Filename");
    }
    if package.size == 0 {
        return Some("has no Size");
    }
    Digest::from_hex(package.sha256)
        .err()
        .map(|_| "has no SHA256")
}

/// A Debian package name (Policy 5.6.1), which is also safe as a file name.
pub fn plain_name(name: &str) -> bool {
    let first_fine = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    first_fine
        && name.len() <= 200
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-._".contains(&b))
}

/// A relative path without steps up, that needs no escapes in an address.
pub fn plain_path(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with('/')
        && path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-._~:/".contains(&b))
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// All candidates of a suite with its pockets.
#[derive(Debug, Default)]
pub struct Universe<'a> {
    pub packages: Vec<Package<'a>>,
    /// Newest first.
    by_name: HashMap<&'a str, Vec<usize>>,
    providers: HashMap<&'a str, Vec<(usize, Option<&'a str>)>>,
}

impl<'a> Universe<'a> {
    pub fn new(packages: Vec<Package<'a>>) -> Self {
        let mut by_name: HashMap<&str, Vec<usize>> = HashMap::with_capacity(packages.len());
        let mut providers: HashMap<&str, Vec<(usize, Option<&str>)>> = HashMap::new();
        for (index, package) in packages.iter().enumerate() {
            by_name.entry(package.name).or_default().push(index);
            for provided in package.provided() {
                let version = provided.version.map(|(_, version)| version);
                providers
                    .entry(provided.name)
                    .or_default()
                    .push((index, version));
            }
        }
        for list in by_name.values_mut() {
            list.sort_by(|a, b| newest_first(&packages[*a], &packages[*b]));
        }
        Self {
            packages,
            by_name,
            providers,
        }
    }

    /// Every version of `name`, newest first.
    pub fn versions(&self, name: &str) -> &[usize] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
    }

    /// Packages that provide `name`, with the provided version where there is one.
    pub fn providers(&self, name: &str) -> &[(usize, Option<&'a str>)] {
        self.providers.get(name).map_or(&[], Vec::as_slice)
    }

    /// Names of the required set, sorted.
    pub fn required(&self) -> Vec<&'a str> {
        let mut names: Vec<&str> = self
            .by_name
            .iter()
            .filter(|(_, versions)| {
                versions
                    .first()
                    .is_some_and(|i| self.packages[*i].required())
            })
            .map(|(name, _)| *name)
            .collect();
        names.sort_unstable();
        names
    }
}

/// By version; the same version in several archives: the one with the smaller digest,
/// so that the order of sources does not matter.
fn newest_first(a: &Package, b: &Package) -> Ordering {
    version::compare(b.version, a.version)
        .then_with(|| a.archive.cmp(&b.archive))
        .then_with(|| a.sha256.cmp(b.sha256))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn stanza(name: &str, version: &str, more: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nFilename: pool/{name}.deb\nSize: 3\nSHA256: {}\n{more}\n",
            Digest::of(name).hex()
        )
    }

    #[test]
    fn candidates_are_newest_first_and_other_architectures_absent() {
        let text = stanza("a", "1.9", "")
            + &stanza("a", "1.10", "Priority: required\n")
            + &stanza("b", "1", "Provides: v (= 2), w\nEssential: yes\n")
            + "Package: c\nArchitecture: armhf\n";
        let universe = Universe::new(parse(&text, "amd64", ArchiveKind::Debian, "u").unwrap());
        let versions: Vec<_> = universe
            .versions("a")
            .iter()
            .map(|i| universe.packages[*i].version)
            .collect();
        assert_eq!(versions, ["1.10", "1.9"]);
        assert_eq!(universe.required(), ["a", "b"]);
        assert_eq!(universe.providers("v"), [(2, Some("2"))]);
        assert_eq!(universe.providers("w"), [(2, None)]);
        assert!(universe.versions("c").is_empty());
        assert_eq!(universe.packages[2].lock().unwrap().path, "pool/b.deb");
    }

    #[test]
    fn unsafe_stanzas_are_refused() {
        for (from, to) in [
            ("pool/x.deb", "../x.deb"),
            ("pool/x.deb", "/x.deb"),
            ("pool/x.deb", "a//x.deb"),
            ("Package: x", "Package: ../x"),
            ("Size: 3", "Size: -1"),
            ("SHA256: ", "SHA256: z"),
            ("Version: 1", "Version: 1/2"),
        ] {
            let text = stanza("x", "1", "").replace(from, to);
            assert!(
                parse(&text, "amd64", ArchiveKind::Debian, "u").is_err(),
                "{to}"
            );
        }
    }
}
