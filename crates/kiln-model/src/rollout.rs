//! `x-kiln.rollout`: how a service's instances are replaced, and by what its traffic is
//! judged meanwhile.

use serde::{Deserialize, Serialize};

use crate::Millis;

/// Beyond `deploy.update_config` (into which its `monitor` goes). What nothing is said of
/// is left out, so that digests of earlier releases stay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RolloutOptions {
    /// `None`: all at once behind one switch, or what `update_config` says.
    pub strategy: Option<Strategy>,
    /// How long old instances stay ready after the switch, for a return at once.
    pub keep_warm: Option<Millis>,
    /// Of [`Strategy::Canary`]; after the last one all traffic moves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<CanaryStep>,
    /// What each step, and the time after the switch, is judged by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub analysis: Option<Analysis>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// A few at a time (`parallelism`, or one); old and new serve side by side meanwhile.
    Rolling,
    /// All new ones are proven before any traffic moves.
    BlueGreen,
    /// The old end before the new begin; callers wait.
    Recreate,
    /// All new ones are proven, then they get a growing part of the traffic.
    Canary,
}

/// The new instances get so much of the service's traffic for so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStep {
    /// Percent, 1 to 100.
    pub weight: u8,
    pub duration: Millis,
}

/// Limits for the new release's traffic, as the proxy counts it, or as Prometheus knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Analysis {
    /// Failed of all requests, in millionths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_error_rate: Option<u32>,
    /// By how much that may be more than the old release's, in millionths of the requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_error_rate_increase: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_latency_p99: Option<Millis>,
    /// By how much that may be more than the old release's, in millionths of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_latency_p99_increase: Option<u32>,
    /// Fewer say nothing: a step goes on until there are as many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_requests: Option<u64>,
    /// Asked at the end of each step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<Prometheus>,
}

impl Analysis {
    /// Some limit for what the proxy counts.
    pub fn limits_traffic(&self) -> bool {
        self.max_error_rate.is_some()
            || self.max_error_rate_increase.is_some()
            || self.max_latency_p99.is_some()
            || self.max_latency_p99_increase.is_some()
    }
}

/// An instant query whose one value must lie within the limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prometheus {
    /// `http://host:port`, as the host reaches it.
    pub url: String,
    pub query: String,
    pub min: Option<Number>,
    pub max: Option<Number>,
}

/// Any finite number. Written as text: read back it is the same to the last bit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Number(f64);

impl Eq for Number {}

impl Number {
    /// `None`: infinite, or not a number.
    pub fn new(value: f64) -> Option<Self> {
        value.is_finite().then_some(Self(value))
    }

    pub fn get(self) -> f64 {
        self.0
    }
}

impl From<Number> for String {
    fn from(number: Number) -> Self {
        number.0.to_string()
    }
}

impl TryFrom<String> for Number {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = text.parse().ok().and_then(Self::new);
        number.ok_or_else(|| format!("`{text}` is not a number"))
    }
}
