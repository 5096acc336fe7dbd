use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// A sha256 content address, written `sha256:<64 lower-case hex digits>`
/// (OCI image-spec v1.1, descriptor.md, "Digests").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Trees of many thousand files are read and written by the digit: tables, not branches.
const DIGITS: [u8; 16] = *b"0123456789abcdef";

/// What each byte stands for; more than 15: it is no lower-case digit.
const VALUES: [u8; 256] = {
    let mut values = [u8::MAX; 256];
    let mut value = 0;
    while value < DIGITS.len() {
        values[DIGITS[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// Why a text is not a [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a sha256 digest (sha256: and 64 lower-case hex digits)")]
pub struct DigestParseError {
    text: String,
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(bytes.as_ref()).into())
    }

    /// The digest of a value's canonical JSON: compact, struct fields in
    /// declaration order, maps sorted (the model only uses ordered maps).
    pub fn of_json<T: Serialize>(value: &T) -> Result<Self, serde_json::Error> {
        Ok(Self::of(serde_json::to_vec(value)?))
    }

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex digits without the algorithm.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        text
    }

    /// The first 12 hex digits, for people.
    pub fn short(&self) -> String {
        self.hex()[..12].to_owned()
    }

    /// Parses 64 hex digits without an algorithm prefix.
    pub fn from_hex(text: &str) -> Result<Self, DigestParseError> {
        let fail = || DigestParseError { text: text.into() };
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
            return Err(fail());
        };
        let mut bytes = [0; 32];
        if pairs.len() != bytes.len() {
            return Err(fail());
        }
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            let (high, low) = (VALUES[usize::from(*high)], VALUES[usize::from(*low)]);
            if high | low > 15 {
                return Err(fail());
            }
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl FromStr for Digest {
    type Err = DigestParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("sha256:")
            .ok_or_else(|| DigestParseError { text: text.into() })
            .and_then(|hex| Self::from_hex(hex).map_err(|_| DigestParseError { text: text.into() }))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Computes a [`Digest`] piece by piece.
#[derive(Default, Clone)]
pub struct Hasher(Sha256);

impl Hasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn text_form_round_trips_and_rejects_other_forms() {
        let digest = Digest::of("clay");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        for bad in [
            digest.hex(),
            digest.to_string().to_uppercase(),
            format!("{digest}0"),
            "sha512:00".into(),
            digest.to_string().replace(&digest.hex()[..1], "g"),
            digest.to_string().replace(&digest.hex()[..1], "é"),
            String::new(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hashing_in_pieces_equals_hashing_at_once() {
        let mut hasher = Hasher::new();
        hasher.update(b"cl");
        hasher.update(b"ay");
        assert_eq!(hasher.finish(), Digest::of("clay"));
    }
}
