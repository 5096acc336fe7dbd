//! The vocabulary every other crate speaks: digests, identifiers, the desired
//! state of a project ([`Spec`]), the numbered record of it ([`Release`]), what a
//! running copy is made of ([`InstanceSpec`]), where traffic goes
//! ([`RoutingTable`]), and what is told about all of it ([`Progress`]).
//!
//! Invariants: everything here is plain data with one serialised form; maps are
//! ordered, so equal values serialise to equal bytes and digests are stable.
//!
//! What must not enter: tokio, clocks, the file system, environment variables,
//! randomness. Time, ids and random numbers are arguments.

mod confinement;
pub mod declared;
mod digest;
mod duration;
pub mod identity;
mod ids;
pub mod image;
pub mod instance;
pub mod network;
pub mod progress;
pub mod release;
pub mod rollout;
pub mod route;
pub mod secrets;
pub mod spec;
pub mod suite;
pub mod traffic;

pub use digest::{Digest, DigestParseError, Hasher};
pub use duration::Millis;
pub use ids::{
    EnvironmentName, Generation, IdError, InstanceId, NetworkName, ProjectName, ReleaseNumber,
    ServiceName, VolumeName,
};
pub use image::ImageConfig;
pub use instance::InstanceSpec;
pub use progress::{Progress, ProgressEvent};
pub use release::{Release, ReleaseRecord};
pub use route::RoutingTable;
pub use spec::Spec;
pub use traffic::Traffic;
