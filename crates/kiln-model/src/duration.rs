use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A span of time, or an instant counted from the Unix epoch, in milliseconds.
/// Which of the two is said by the field that holds it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1000))
    }

    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl From<Millis> for Duration {
    fn from(span: Millis) -> Self {
        Duration::from_millis(span.0)
    }
}

impl From<Duration> for Millis {
    /// Spans beyond 584 million years saturate.
    fn from(span: Duration) -> Self {
        Self(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms if ms < 1000 => write!(f, "{ms}ms"),
            ms if ms < 60_000 && !ms.is_multiple_of(1000) => {
                write!(f, "{}.{}s", ms / 1000, ms % 1000 / 100)
            }
            ms => {
                let secs = ms / 1000;
                let (d, h, m, s) = (secs / 86_400, secs / 3600 % 24, secs / 60 % 60, secs % 60);
                match (d, h, m) {
                    (0, 0, 0) => write!(f, "{s}s"),
                    (0, 0, _) => write!(f, "{m}m{s}s"),
                    (0, ..) => write!(f, "{h}h{m}m"),
                    _ => write!(f, "{d}d{h}h"),
                }
            }
        }
    }
}
