//! Names of images in registries: `[registry/]repository[:tag][@digest]`, as Docker
//! reads them (github.com/distribution/reference, its grammar and its defaults).

use std::fmt;
use std::str::FromStr;

use kiln_model::Digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where names without a registry live.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Its name in very old references and in Docker's credentials.
const OLD_DEFAULT_REGISTRY: &str = "index.docker.io";
/// The host that answers for it.
const DEFAULT_REGISTRY_HOST: &str = "registry-1.docker.io";
/// Where its own images without a folder live.
const DEFAULT_FOLDER: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Longest registry and repository together, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG_BYTES: usize = 128;

/// An image's full name. Its text form is canonical: nothing is left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a [`Reference`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not an image reference: {problem} (expected [registry/]name[:tag][@sha256:…], like nginx:1.27 or localhost:5000/shop/web)"
)]
pub struct ReferenceError {
    text: String,
    problem: &'static str,
}

impl Reference {
    /// `docker.io`, `registry.example:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The host, with its port if it says one, that answers for the registry.
    pub fn registry_host(&self) -> &str {
        match self.registry.as_str() {
            DEFAULT_REGISTRY => DEFAULT_REGISTRY_HOST,
            other => other,
        }
    }

    /// `library/nginx`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a registry calls the image: its digest, else its tag, else `latest`.
    pub fn selector(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string(),
            None => self.tag().unwrap_or(DEFAULT_TAG).into(),
        }
    }

    /// With the tag `latest` if it has neither tag nor digest.
    #[must_use]
    pub fn with_default_tag(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some(DEFAULT_TAG.into());
        }
        self
    }

    /// The same image, pinned. The tag stays, for people.
    #[must_use]
    pub fn with_digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// As people write it: without what is understood anyway, `nginx:1.27`.
    pub fn familiar(&self) -> String {
        let name = match self.registry.as_str() {
            DEFAULT_REGISTRY => match self.repository.strip_prefix(DEFAULT_FOLDER) {
                Some(short) if !short.contains('/') => short.to_owned(),
                _ => self.repository.clone(),
            },
            registry => format!("{registry}/{}", self.repository),
        };
        format!("{name}{}", self.suffix())
    }

    fn suffix(&self) -> String {
        let tag = self.tag.as_ref().map(|t| format!(":{t}"));
        let digest = self.digest.as_ref().map(|d| format!("@{d}"));
        tag.unwrap_or_default() + &digest.unwrap_or_default()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|problem| ReferenceError {
            text: text.into(),
            problem,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() == 64 && text.bytes().all(is_hex) {
        return Err("64 hex digits alone are an id; a digest is written name@sha256:…");
    }
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) => {
            let digest = digest
                .parse()
                .map_err(|_| "its digest is not sha256: and 64 lower-case hex digits")?;
            (rest, Some(digest))
        }
    };
    let (name, tag) = split_tag(rest)?;
    let (registry, repository) = split_registry(name);
    check_registry(&registry)?;
    check_repository(&repository)?;
    if registry.len() + 1 + repository.len() > MAX_NAME_BYTES {
        return Err("its name is longer than 255 bytes");
    }
    Ok(Reference {
        registry,
        repository,
        tag,
        digest,
    })
}

/// A colon after the last slash begins a tag; before it, a port.
fn split_tag(text: &str) -> Result<(&str, Option<String>), &'static str> {
    let name_start = text.rfind('/').map_or(0, |slash| slash + 1);
    let Some(colon) = text[name_start..].find(':') else {
        return Ok((text, None));
    };
    let (name, tag) = text.split_at(name_start + colon);
    let tag = &tag[1..];
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let starts_well = tag.bytes().next().is_some_and(word);
    let all_well = tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if !starts_well || !all_well || tag.len() > MAX_TAG_BYTES {
        return Err("its tag is not 1 to 128 letters, digits, `_`, `.` and `-`");
    }
    Ok((name, Some(tag.into())))
}

/// The first component is a registry if it could not be a folder: it has a dot, a
/// colon, or a capital letter, or is `localhost`.
fn split_registry(name: &str) -> (String, String) {
    let explicit = name.split_once('/').filter(|(first, _)| {
        first.contains(['.', ':'])
            || *first == "localhost"
            || first.bytes().any(|b| b.is_ascii_uppercase())
    });
    let (registry, repository) = explicit.unwrap_or((DEFAULT_REGISTRY, name));
    let registry = match registry {
        OLD_DEFAULT_REGISTRY => DEFAULT_REGISTRY,
        other => other,
    };
    let folder = match registry == DEFAULT_REGISTRY && !repository.contains('/') {
        true => DEFAULT_FOLDER,
        false => "",
    };
    (registry.into(), format!("{folder}{repository}"))
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let problem = "its registry is not a host name or address with an optional port";
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or(problem)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| problem)?;
            (
                None,
                after.strip_prefix(':').or(after.is_empty().then_some("0")),
            )
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), Some("0")),
        },
    };
    let port_fits = port.is_some_and(|port| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    let label_fits = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match port_fits && host.is_none_or(|host| host.split('.').all(label_fits)) {
        true => Ok(()),
        false => Err(problem),
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("its name has capital letters, which registries don't allow");
    }
    match repository.split('/').all(component_fits) {
        true => Ok(()),
        false => Err(
            "its name is not lower-case letters and digits, divided by `.`, `_`, `__`, `-` or `/`",
        ),
    }
}

/// Words of `a-z0-9` with one separator between two: `.`, `_`, `__` or dashes.
fn component_fits(component: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !component.starts_with(word) || !component.ends_with(word) {
        return false;
    }
    component
        .split(word)
        .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}{}", self.registry, self.repository, self.suffix())
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    const SHA: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_and_shortened_as_docker_does() {
        for (text, canonical, familiar) in [
            ("nginx", "docker.io/library/nginx", "nginx"),
            ("nginx:1.27", "docker.io/library/nginx:1.27", "nginx:1.27"),
            ("a/b", "docker.io/a/b", "a/b"),
            ("library/nginx", "docker.io/library/nginx", "nginx"),
            ("docker.io/nginx", "docker.io/library/nginx", "nginx"),
            ("index.docker.io/nginx", "docker.io/library/nginx", "nginx"),
            ("docker.io/a/b:t", "docker.io/a/b:t", "a/b:t"),
            ("library/a/b", "docker.io/library/a/b", "library/a/b"),
            ("localhost/x", "localhost/x", "localhost/x"),
            (
                "localhost:5000/x:1",
                "localhost:5000/x:1",
                "localhost:5000/x:1",
            ),
            ("Host/x", "Host/x", "Host/x"),
            (
                "h.example/a__b/c-----d",
                "h.example/a__b/c-----d",
                "h.example/a__b/c-----d",
            ),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x", "127.0.0.1:5000/x"),
            ("[::1]:5000/x", "[::1]:5000/x", "[::1]:5000/x"),
            ("[fe80::1]/x", "[fe80::1]/x", "[fe80::1]/x"),
            ("foo:5000", "docker.io/library/foo:5000", "foo:5000"),
            ("foo_bar/x", "docker.io/foo_bar/x", "foo_bar/x"),
        ] {
            let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(reference.to_string(), canonical);
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(canonical.parse(), Ok(reference.clone()));
            assert_eq!(familiar.parse(), Ok(reference));
        }
    }

    #[test]
    fn digests_pin_and_tags_stay() {
        let both: Reference = format!("nginx:1@{SHA}").parse().unwrap();
        assert_eq!((both.tag(), both.selector()), (Some("1"), SHA.into()));
        let bare: Reference = "nginx".parse().unwrap();
        assert_eq!(bare.selector(), "latest");
        assert_eq!(bare.clone().with_default_tag().familiar(), "nginx:latest");
        let pinned = bare.with_digest(SHA.parse().unwrap());
        assert_eq!(pinned.clone().with_default_tag(), pinned);
        assert_eq!(pinned.familiar(), format!("nginx@{SHA}"));
        assert_eq!(pinned.registry_host(), "registry-1.docker.io");
    }

    #[test]
    fn malformed_names_are_refused_with_their_problem() {
        let long_name = "a/".repeat(130) + "a";
        let long_tag = format!("a:{}", "t".repeat(129));
        for (text, problem) in [
            ("", "empty"),
            (&SHA[7..], "an id"),
            ("Nginx", "capital"),
            ("a//b", "lower-case"),
            ("/a", "lower-case"),
            ("a/", "lower-case"),
            ("-a", "lower-case"),
            ("a-", "lower-case"),
            ("a..b", "lower-case"),
            ("a___b", "lower-case"),
            ("a._b", "lower-case"),
            ("ä", "lower-case"),
            ("a b", "lower-case"),
            ("https://h.example/a", "registry"),
            ("h.example:port/a", "registry"),
            ("h.example:99999/a", "registry"),
            ("h.example:/a", "registry"),
            ("h..example/a", "registry"),
            ("-h.example/a", "registry"),
            ("user@h.example/a", "digest"),
            ("[::1/a", "registry"),
            ("[::1]x/a", "registry"),
            ("[x]:1/a", "registry"),
            ("a:", "tag"),
            ("a:-x", "tag"),
            ("a:x:y", "tag"),
            ("a:ü", "tag"),
            (&long_tag, "tag"),
            ("a@sha256:12", "digest"),
            ("a@sha512:12", "digest"),
            ("a@", "digest"),
            (&long_name, "255"),
        ] {
            match text.parse::<Reference>() {
                Ok(reference) => panic!("{text} was taken as {reference}"),
                Err(error) => assert!(error.problem.contains(problem), "{error}"),
            }
        }
    }
}
