//! Private keys by their form: what has no frame of text that [`Finder`] knows.
//!
//! [`Finder`]: kiln_model::secrets::Finder

use super::scan::contains;
use crate::keystore;

/// Larger ones are no lists of keys.
const LONGEST_JSON: usize = 1 << 20;
/// Letters of the shortest private number in a JSON Web Key: 128 bits.
const SHORTEST: usize = 22;

pub(super) fn is_key(path: &str, content: &[u8]) -> bool {
    is_ssh_key(content)
        || is_der_key(content)
        || is_pkcs12(content)
        || keystore::has_key(content)
        || is_json_key(path, content)
}

/// As PuTTY and ssh.com write them.
fn is_ssh_key(content: &[u8]) -> bool {
    content.starts_with(b"PuTTY-User-Key-File-")
        || content.starts_with(b"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----")
}

/// Without a frame: PKCS#8 of RSA, Ed25519 and keys on elliptic curves, encrypted or not;
/// PKCS#1; and SEC 1.
fn is_der_key(content: &[u8]) -> bool {
    const KINDS: [&[u8]; 3] = [
        &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01],
        &[0x2b, 0x65, 0x70],
        &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01],
    ];
    const BY_PASSWORD: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0d];
    let body = match content {
        [0x30, 0x82, _, _, body @ ..] | [0x30, 0x81, _, body @ ..] | [0x30, _, body @ ..] => body,
        _ => return false,
    };
    match body {
        // The version, then a sequence, an object and their lengths.
        [2, 1, 0, 0x30, _, 0x06, _, kind @ ..] => KINDS.iter().any(|k| kind.starts_with(k)),
        // The version, and a long number: the modulus.
        [2, 1, 0, 0x02, 0x81 | 0x82, ..] => true,
        // The version, and as many bytes as a curve's secret has.
        [2, 1, 1, 0x04, 28 | 32 | 48 | 66, ..] => true,
        [0x30, _, 0x06, 9, kind @ ..] => kind.starts_with(&BY_PASSWORD),
        _ => false,
    }
}

/// A store of keys and certificates (RFC 7292) that holds a key: certificates alone are
/// public. The bags' kinds are outside of what is encrypted.
fn is_pkcs12(content: &[u8]) -> bool {
    // PKCS#12, 10.1: keyBag and pkcs8ShroudedKeyBag.
    const BAGS: [&[u8]; 2] = [
        &[
            0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x0c, 0x0a, 0x01, 0x01,
        ],
        &[
            0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x0c, 0x0a, 0x01, 0x02,
        ],
    ];
    // The version, then the content's sequence.
    const BEGINNING: [u8; 4] = [2, 1, 3, 0x30];
    let body = match content {
        [0x30, 0x82, _, _, body @ ..] | [0x30, 0x81, _, body @ ..] => body,
        // Of no stated length, as Java wrote it, and of large ones.
        [0x30, 0x80, body @ ..] | [0x30, 0x83, _, _, _, body @ ..] => body,
        _ => return false,
    };
    body.starts_with(&BEGINNING) && BAGS.iter().any(|bag| contains(body, bag))
}

/// A JSON Web Key (RFC 7517), alone or in a set, with its private part: `d` of a pair, `k`
/// of a shared one.
fn is_json_key(path: &str, content: &[u8]) -> bool {
    let named = [".json", ".jwk", ".jwks"]
        .iter()
        .any(|end| path.ends_with(end));
    if !named || content.len() > LONGEST_JSON || !contains(content, b"\"kty\"") {
        return false;
    }
    let text = String::from_utf8_lossy(content);
    let has = |member: &str| {
        text.match_indices(member).any(|(at, _)| {
            let after = text[at + member.len()..].trim_start();
            let value = after.strip_prefix(':').map(str::trim_start);
            let value = value.and_then(|value| value.strip_prefix('"'));
            value.is_some_and(|value| {
                let end = value.find(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c));
                end.is_some_and(|end| end >= SHORTEST && value[end..].starts_with('"'))
            })
        })
    };
    has("\"d\"") || has("\"k\"")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn json_web_keys_with_a_private_part_are_told_from_public_ones() {
        let private = "b".repeat(43);
        let key = |members: &str| format!("{{\"keys\": [{{\"kty\": \"EC\", {members}}}]}}");
        let pair = key(&format!("\"x\": \"{private}\", \"d\" : \"{private}\""));
        let shared = key(&format!("\"k\":\"{private}\""));
        let public = key(&format!("\"x\": \"{private}\", \"kid\": \"d\""));
        for (path, text, expected) in [
            ("srv/jwks.json", &pair, true),
            ("srv/own.jwk", &shared, true),
            ("srv/jwks.json", &public, false),
            ("srv/notes.txt", &pair, false),
        ] {
            assert_eq!(is_key(path, text.as_bytes()), expected, "{path}: {text}");
        }
    }

    #[test]
    fn stores_with_a_key_are_told_from_those_of_certificates() {
        let store = |bag: u8| {
            let kind = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 12, 10, 1, bag];
            [
                &[0x30, 0x82, 9, 9, 2, 1, 3, 0x30, 0x82, 9, 9][..],
                &kind,
                b"rest",
            ]
            .concat()
        };
        for (bag, expected) in [(1, true), (2, true), (3, false)] {
            assert_eq!(is_key("srv/a.p12", &store(bag)), expected, "{bag}");
        }
        let mut other = store(2);
        other[6] = 1;
        assert!(!is_key("srv/a.p12", &other), "of another version");
    }
}
