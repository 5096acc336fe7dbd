use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Why a text is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a valid {what}: {rule}")]
pub struct IdError {
    text: String,
    what: &'static str,
    rule: &'static str,
}

const NAME_RULE: &str =
    "1 to 128 characters of a-z, A-Z, 0-9, `.`, `_` and `-`, the first a letter or digit";

fn check(text: &str, what: &'static str) -> Result<(), IdError> {
    let first_ok = text
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_ok = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if first_ok && rest_ok && text.len() <= 128 {
        return Ok(());
    }
    Err(IdError {
        text: text.into(),
        what,
        rule: NAME_RULE,
    })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $type(String);

        impl $type {
            /// Checks the name's form: it is used in file names and labels.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check(&text, $what)?;
                Ok(Self(text))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A compose project.
    ProjectName, "project name"
);
name!(
    /// A place where one release at a time runs. Defaults to the project's name.
    EnvironmentName, "environment name"
);
name!(
    /// A compose service.
    ServiceName, "service name"
);
name!(
    /// A compose network, by its key in the file.
    NetworkName, "network name"
);
name!(
    /// A named volume, by its full (project-prefixed) name.
    VolumeName, "volume name"
);
name!(
    /// One running copy of a service, never reused: `<service>-<release>-<index>-<suffix>`
    /// by convention; nothing may parse it.
    InstanceId, "instance id"
);

macro_rules! counter {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $type(pub u64);

        impl $type {
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter!(
    /// A release's number within its environment, counted from 1.
    ReleaseNumber
);
counter!(
    /// Counts an environment's plans; receivers refuse an older one.
    Generation
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for bad in [
            "",
            "../up",
            "a/b",
            ".hidden",
            "-flag",
            "a b",
            "é",
            &"x".repeat(129),
        ] {
            assert!(ServiceName::new(bad).is_err(), "{bad}");
        }
        for good in ["web", "A1", "my.svc_2-x"] {
            assert!(ServiceName::new(good).is_ok(), "{good}");
        }
    }
}
