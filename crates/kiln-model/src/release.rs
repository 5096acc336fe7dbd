//! A release: one environment's whole desired state with every input by digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::instance::Scratch;
use crate::spec::{FileVersion, Network, Service, Volume};
use crate::{
    Digest, EnvironmentName, ImageConfig, Millis, NetworkName, ProjectName, ReleaseNumber,
    ServiceName,
};

/// The content of a release. Its digest identifies it: equal inputs, equal digest.
/// It says nothing of when, by whom, or from which folder it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// [`Release::FORMAT`].
    pub format: u32,
    pub environment: EnvironmentName,
    pub project: ProjectName,
    pub services: BTreeMap<ServiceName, ReleasedService>,
    pub networks: BTreeMap<NetworkName, Network>,
    pub volumes: BTreeMap<String, Volume>,
}

impl Release {
    /// The serialised form's version.
    pub const FORMAT: u32 = 1;

    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Digest::of_json(self)
    }
}

/// A service with everything that makes its instances what they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReleasedService {
    /// Its `image` is replaced by [`ReleasedService::image`]; host paths stay.
    pub service: Service,
    pub image: ReleasedImage,
    /// Learned in the isolated test, declared, and always there (`/tmp` …), sorted.
    pub scratch: Vec<Scratch>,
    /// Ports the image or the compose file says it listens on, or that the isolated
    /// test saw: TCP only, sorted.
    pub listens: Vec<u16>,
    /// What the files of `service.files` contain, by [`FileMount::key`](crate::spec::FileMount::key).
    pub files: BTreeMap<String, FileVersion>,
    /// Digests of images mounted as volumes, by reference.
    pub mounted_images: BTreeMap<String, Digest>,
}

impl ReleasedService {
    /// Identifies all that an instance of this service is made of. What only concerns
    /// traffic and counting (published host ports, replicas, update settings, drain)
    /// is left out: changing those replaces nothing.
    pub fn revision(&self) -> Result<Digest, serde_json::Error> {
        let mut essence = self.clone();
        essence.service.ports.clear();
        essence.service.replicas = 0;
        essence.service.update = Default::default();
        essence.service.rollback = None;
        essence.service.depends_on.clear();
        essence.service.kiln.drain = None;
        essence.service.kiln.test.clear();
        essence.service.kiln.ready = None;
        essence.service.kiln.rollout = None;
        essence.service.kiln.max_age = None;
        essence.service.kiln.snapshot.clear();
        essence.service.restart = Default::default();
        Digest::of_json(&essence)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleasedImage {
    /// What the file says: a reference, or `<project>-<service>` for a build.
    pub name: String,
    /// The manifest.
    pub digest: Digest,
    /// The image's tree in the store.
    pub tree: Digest,
    pub config: ImageConfig,
}

/// A line of an environment's history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    pub number: ReleaseNumber,
    pub digest: Digest,
    pub reason: Reason,
    /// Since the epoch.
    pub created: Millis,
    /// Login name of whoever asked.
    pub by: String,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Up,
    /// A rollout to the content of an earlier release.
    Rollback {
        to: ReleaseNumber,
    },
}

/// How far a release got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    RollingOut,
    /// It served; a later one may have taken its place.
    Proven,
    /// It never took over; what ran before went on.
    Failed {
        cause: String,
    },
    /// Given up on request (Ctrl-C, `down`) or because a newer one came.
    Abandoned,
}
