//! Tests of an image that stand in files of their own, in formats that others have made:
//! container-structure-test's and goss's. Read by `kiln_compose`, carried out by
//! `kiln_build::test`.
//!
//! What a release says of them is the file's name and digest
//! ([`Check::Suite`](crate::spec::Check::Suite)); their content is beside the services in
//! [`Spec::suites`](crate::Spec::suites).

mod goss;
mod pattern;
mod structure;

use serde::{Deserialize, Serialize};

pub use goss::{
    Comparison, Goss, HttpProbe, Line, LinePattern, Matcher, PortProtocol, Probe, Resource,
};
pub use pattern::Pattern;
pub use structure::{
    CommandTest, ContentTest, ExecutableBy, ExistenceTest, LicenseTest, MetadataTest, Structure,
    Wanted,
};

/// Which format a file of tests has; also the key of `x-kiln.test` that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuiteKind {
    /// container-structure-test, schema 2.0.0.
    Structure,
    Goss,
}

impl SuiteKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Structure => "structure",
            Self::Goss => "goss",
        }
    }
}

/// What such a file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    Structure(Box<Structure>),
    Goss(Goss),
}
