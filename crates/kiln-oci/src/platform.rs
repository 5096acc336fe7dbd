//! Which of an index's images runs on a machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Operating system, architecture and variant, in Go's words (OCI image-spec v1.1,
/// image-index.md, "platform").
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(
        rename = "os.version",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub os_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a [`Platform`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a platform (os/architecture or os/architecture/variant, like linux/amd64)"
)]
pub struct PlatformParseError {
    text: String,
}

/// The platform of this machine: `linux/amd64`.
pub fn host_platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    match architecture {
        "arm" => "linux/arm/v7".into(),
        _ => format!("linux/{architecture}"),
    }
}

impl Platform {
    /// How well an image made for `self` runs where `wanted` is asked for: `None` not
    /// at all, else the higher the better.
    ///
    /// A variant asked for also runs every lower one; none asked for means the
    /// architecture's baseline (`arm64`: v8, `arm`: v7, `amd64`: v1).
    pub fn fitness(&self, wanted: &Platform) -> Option<u32> {
        if self.os != wanted.os || self.architecture != wanted.architecture {
            return None;
        }
        let (mine, asked) = (self.level()?, wanted.level()?);
        (mine <= asked).then_some(mine)
    }

    /// The variant as a number; `None`: a variant that kiln doesn't know.
    fn level(&self) -> Option<u32> {
        let baseline = match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        match self.variant.as_deref() {
            None | Some("") => Some(baseline),
            Some(text) => text.strip_prefix('v')?.parse().ok(),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('/').collect();
        let well_formed = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(well_formed) {
            return Err(PlatformParseError { text: text.into() });
        }
        let (os, architecture, variant) = match parts.as_slice() {
            [os, arch] => (os, arch, None),
            [os, arch, variant] => (os, arch, Some((*variant).to_owned())),
            _ => return Err(PlatformParseError { text: text.into() }),
        };
        Ok(Self {
            architecture: (*architecture).into(),
            os: (*os).into(),
            os_version: None,
            variant,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some(variant) => write!(f, "/{variant}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn text_form_round_trips_and_refuses_other_forms() {
        for text in ["linux/amd64", "linux/arm/v7", "linux/arm64/v8"] {
            assert_eq!(platform(text).to_string(), text);
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        assert!(host_platform().parse::<Platform>().is_ok());
    }

    #[test]
    fn a_lower_variant_runs_and_a_higher_one_does_not() {
        let fits = |image: &str, wanted: &str| platform(image).fitness(&platform(wanted));
        assert!(fits("linux/arm64/v8", "linux/arm64").is_some());
        assert!(fits("linux/arm64", "linux/arm64/v8").is_some());
        assert!(fits("linux/amd64/v3", "linux/amd64").is_none());
        assert!(fits("linux/amd64", "linux/amd64/v3").is_some());
        assert!(fits("linux/arm/v7", "linux/arm/v7") > fits("linux/arm/v6", "linux/arm/v7"));
        assert!(fits("linux/arm/v7", "linux/arm/v6").is_none());
        assert!(fits("windows/amd64", "linux/amd64").is_none());
        assert!(fits("unknown/unknown", "linux/amd64").is_none());
        assert!(fits("linux/arm/strange", "linux/arm").is_none());
    }
}
