//! Java's stores of trusted certificates (JKS), without the times at which each certificate was
//! put in: ca-certificates-java makes `/etc/ssl/certs/java/cacerts` when it is installed, and
//! `keytool` stores of one's own. Pure.
//!
//! The form (`sun.security.provider.JavaKeyStore`): magic, version, count; for each entry its
//! kind, alias, time in milliseconds, type and bytes; behind them the SHA-1 of password, a
//! phrase and all before. Strings begin with two bytes of length, numbers are big-endian.

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY};

pub(crate) const MAGIC: [u8; 4] = [0xfe, 0xed, 0xfe, 0xed];
const LATER_MAGIC: [u8; 4] = [0xce, 0xce, 0xce, 0xce];
/// Larger ones are left as they are: Debian's has 160 KiB.
pub(crate) const LARGEST: u64 = 8 << 20;

/// The password that everybody has; who has another one has a store that is secret.
const PASSWORD: &str = "changeit";
const PHRASE: &[u8] = b"Mighty Aphrodite";
const VERSION: u32 = 2;
/// An entry that is a certificate and no key.
const CERTIFICATE: u32 = 2;
const SUM: usize = 20;

/// The store with other times; `time` is given and gives seconds since the epoch. Whatever is
/// no such store, holds keys, or has another password comes back as it is.
pub(crate) fn settled(content: Vec<u8>, time: impl Fn(i64) -> i64) -> Vec<u8> {
    settle(&content, time).unwrap_or(content)
}

fn settle(content: &[u8], time: impl Fn(i64) -> i64) -> Option<Vec<u8>> {
    let (body, sum) = content.split_at_checked(content.len().checked_sub(SUM)?)?;
    if !body.starts_with(&MAGIC) || checksum(body) != sum {
        return None;
    }
    let mut new = body.to_vec();
    let mut rest = Reader { body, at: 4 };
    if rest.number()? != VERSION {
        return None;
    }
    for _ in 0..rest.number()? {
        if rest.number()? != CERTIFICATE {
            return None;
        }
        rest.string()?;
        let at = rest.at;
        let millis = i64::from_be_bytes(rest.take(8)?.try_into().ok()?);
        let seconds = millis.div_euclid(1000);
        let settled = time(seconds);
        if settled != seconds {
            let millis = settled.checked_mul(1000)?.to_be_bytes();
            new.get_mut(at..at + 8)?.copy_from_slice(&millis);
        }
        rest.string()?;
        let length = rest.number()?;
        rest.take(length as usize)?;
    }
    if rest.at != body.len() {
        return None;
    }
    let sum = checksum(&new);
    new.extend(sum);
    Some(new)
}

/// Whether it is a store, of this form or Java's later one of it (JCEKS), with an entry that
/// is a private or secret key.
pub(crate) fn has_key(content: &[u8]) -> bool {
    if ![MAGIC, LATER_MAGIC]
        .iter()
        .any(|magic| content.starts_with(magic))
    {
        return false;
    }
    let mut rest = Reader {
        body: content,
        at: 8,
    };
    let mut any_key = || {
        for _ in 0..rest.number()? {
            if rest.number()? != CERTIFICATE {
                return Some(true);
            }
            rest.string()?;
            rest.take(8)?;
            rest.string()?;
            let length = rest.number()?;
            rest.take(length as usize)?;
        }
        Some(false)
    };
    // What can't be read to its end has only been shown to hold certificates.
    any_key().unwrap_or(false)
}

fn checksum(body: &[u8]) -> Vec<u8> {
    let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    for unit in PASSWORD.encode_utf16() {
        sum.update(&unit.to_be_bytes());
    }
    sum.update(PHRASE);
    sum.update(body);
    sum.finish().as_ref().to_vec()
}

struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let part = self.body.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = u16::from_be_bytes(self.take(2)?.try_into().ok()?);
        self.take(length.into())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn store(kind: u32, times: [i64; 2]) -> Vec<u8> {
        store_of(kind, times, b"der")
    }

    /// A store of two entries of this kind, put in at these milliseconds.
    pub(crate) fn store_of(kind: u32, times: [i64; 2], certificate: &[u8]) -> Vec<u8> {
        let mut body = MAGIC.to_vec();
        body.extend(VERSION.to_be_bytes());
        body.extend(2_u32.to_be_bytes());
        for (alias, time) in ["debian:a.pem", "debian:b.pem"].into_iter().zip(times) {
            body.extend(kind.to_be_bytes());
            for text in [alias.as_bytes(), &time.to_be_bytes(), b"X.509"] {
                // Times have no length before them.
                if text.len() != 8 {
                    body.extend((text.len() as u16).to_be_bytes());
                }
                body.extend(text);
            }
            body.extend((certificate.len() as u32).to_be_bytes());
            body.extend(certificate);
        }
        let sum = checksum(&body);
        body.extend(sum);
        body
    }

    #[test]
    fn times_become_what_they_are_to_be_and_the_sum_is_right() {
        let only_late = |time| if time >= 1_000_000 { 7 } else { time };
        let made = store(CERTIFICATE, [1_000_000_123, 5_123]);
        assert_eq!(settled(made, only_late), store(CERTIFICATE, [7_000, 5_123]));
    }

    #[test]
    fn an_entry_that_is_no_certificate_is_a_key() {
        assert!(!has_key(&store(CERTIFICATE, [1, 2])));
        assert!(has_key(&store(1, [1, 2])));
        let mut later = store(3, [1, 2]);
        assert!(has_key(&later));
        later[..4].copy_from_slice(&LATER_MAGIC);
        assert!(has_key(&later));
        later[0] = 0;
        assert!(!has_key(&later), "no store at all");
    }

    #[test]
    fn what_is_not_known_through_and_through_stays() {
        let made = store(CERTIFICATE, [1, 2]);
        let mut other = made.clone();
        if let Some(last) = other.last_mut() {
            *last ^= 1;
        }
        for same in [
            store(1, [9_000_000, 9_000_000]),
            other,
            made[..made.len() - 30].to_vec(),
            MAGIC.to_vec(),
            b"text".to_vec(),
        ] {
            assert_eq!(settled(same.clone(), |_| 0), same);
        }
    }
}
