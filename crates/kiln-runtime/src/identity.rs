//! What tells one machine from another, made anew: ids and keys, in the forms that the
//! programs which use them write themselves.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::identity::Identity;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};

/// Makes the identity of one instance; the two halves of a pair fit.
pub struct Maker {
    host: String,
    random: SystemRandom,
    ed25519: Option<Pair>,
    ecdsa: Option<Pair>,
    snakeoil: Option<Pair>,
}

/// A private file and the public one that goes with it.
#[derive(Clone)]
struct Pair {
    private: String,
    public: String,
}

/// ring says no more than that it failed.
fn failed(_: impl Sized) -> io::Error {
    io::Error::other("no key could be made")
}

impl Maker {
    pub fn new(host: &str) -> Self {
        let host = match host.trim() {
            "" => "localhost",
            host => host,
        };
        Self {
            host: host.to_owned(),
            random: SystemRandom::new(),
            ed25519: None,
            ecdsa: None,
            snakeoil: None,
        }
    }

    /// The file's content; `None`: kiln makes no such thing, and it stays empty.
    pub fn make(&mut self, identity: Identity) -> io::Result<Option<Vec<u8>>> {
        let text = match identity {
            Identity::MachineId => self.machine_id()?,
            Identity::SshEd25519 => self.ed25519()?.private,
            Identity::SshEd25519Public => self.ed25519()?.public,
            Identity::SshEcdsa => self.ecdsa()?.private,
            Identity::SshEcdsaPublic => self.ecdsa()?.public,
            Identity::SnakeoilKey => self.snakeoil()?.private,
            Identity::SnakeoilCertificate => self.snakeoil()?.public,
            Identity::SshRsa | Identity::SshRsaPublic => return Ok(None),
        };
        Ok(Some(text.into_bytes()))
    }

    fn random<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    /// machine-id(5): a random UUID of version 4, in hexadecimal digits.
    fn machine_id(&self) -> io::Result<String> {
        let mut id: [u8; 16] = self.random()?;
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(hex + "\n")
    }

    fn public_line(&self, kind: &str, blob: &[u8]) -> String {
        format!("{kind} {} root@{}\n", STANDARD.encode(blob), self.host)
    }

    /// In OpenSSH's own form (PROTOCOL.key), as it reads this kind in no other.
    fn ed25519(&mut self) -> io::Result<Pair> {
        if let Some(pair) = &self.ed25519 {
            return Ok(pair.clone());
        }
        const KIND: &str = "ssh-ed25519";
        let seed: [u8; 32] = self.random()?;
        let key = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(failed)?;
        let public = key.public_key().as_ref();
        let blob = ssh_strings(&[KIND.as_bytes(), public]);
        let check: [u8; 4] = self.random()?;
        let comment = format!("root@{}", self.host);
        let mut private = [check, check].concat();
        private.extend(&blob);
        private.extend(ssh_strings(&[
            &[&seed, public].concat(),
            comment.as_bytes(),
        ]));
        // The block size where nothing encrypts it.
        let padding = (8 - private.len() % 8) % 8;
        private.extend((1..=padding).map(|n| n as u8));
        let mut whole = b"openssh-key-v1\0".to_vec();
        whole.extend(ssh_strings(&[b"none", b"none", b""]));
        whole.extend(1_u32.to_be_bytes());
        whole.extend(ssh_strings(&[&blob, &private]));
        let pair = Pair {
            private: pem("OPENSSH PRIVATE KEY", &whole),
            public: self.public_line(KIND, &blob),
        };
        Ok(self.ed25519.insert(pair).clone())
    }

    /// The key in PKCS#8 as PEM, and its pair.
    fn p256(&self) -> io::Result<(String, EcdsaKeyPair)> {
        let kind = &ECDSA_P256_SHA256_ASN1_SIGNING;
        let document = EcdsaKeyPair::generate_pkcs8(kind, &self.random).map_err(failed)?;
        let key =
            EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &self.random).map_err(failed)?;
        Ok((pem("PRIVATE KEY", document.as_ref()), key))
    }

    fn ecdsa(&mut self) -> io::Result<Pair> {
        if let Some(pair) = &self.ecdsa {
            return Ok(pair.clone());
        }
        const KIND: &str = "ecdsa-sha2-nistp256";
        let (private, key) = self.p256()?;
        let point = key.public_key().as_ref();
        let blob = ssh_strings(&[KIND.as_bytes(), b"nistp256", point]);
        let public = self.public_line(KIND, &blob);
        Ok(self.ecdsa.insert(Pair { private, public }).clone())
    }

    /// As ssl-cert's: signed by itself, for the host's name.
    fn snakeoil(&mut self) -> io::Result<Pair> {
        if let Some(pair) = &self.snakeoil {
            return Ok(pair.clone());
        }
        let (private, key) = self.p256()?;
        let serial: [u8; 8] = self.random()?;
        let signed = to_be_signed(&self.host, &serial, key.public_key().as_ref());
        let signature = key.sign(&self.random, &signed).map_err(failed)?;
        let certificate = der(
            SEQUENCE,
            &[signed, ecdsa_with_sha256(), bits(signature.as_ref())].concat(),
        );
        let public = pem("CERTIFICATE", &certificate);
        Ok(self.snakeoil.insert(Pair { private, public }).clone())
    }
}

/// Each with its length before it.
fn ssh_strings(strings: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for string in strings {
        bytes.extend((string.len() as u32).to_be_bytes());
        bytes.extend(*string);
    }
    bytes
}

fn pem(label: &str, bytes: &[u8]) -> String {
    const LINE: usize = 64;
    let text = STANDARD.encode(bytes);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(LINE));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem + &format!("-----END {label}-----\n")
}

// X.509 in DER (X.690), as much as one certificate needs.
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const UTF8: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
const DNS_NAME: u8 = 0x82;

/// Longest common name, by RFC 5280.
const COMMON_NAME: usize = 64;

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    match content.len() {
        length @ 0..0x80 => bytes.push(length as u8),
        length => {
            let digits = length.to_be_bytes();
            let first = digits.iter().position(|b| *b != 0).unwrap_or(0);
            bytes.push(0x80 | (digits.len() - first) as u8);
            bytes.extend(&digits[first..]);
        }
    }
    bytes.extend(content);
    bytes
}

fn bits(content: &[u8]) -> Vec<u8> {
    der(BIT_STRING, &[&[0], content].concat())
}

fn ecdsa_with_sha256() -> Vec<u8> {
    const ID: [u8; 8] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    der(SEQUENCE, &der(OBJECT, &ID))
}

fn to_be_signed(host: &str, serial: &[u8; 8], point: &[u8]) -> Vec<u8> {
    const EC_KEY: [u8; 7] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    const P256: [u8; 8] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    const COMMON_NAME_ID: [u8; 3] = [0x55, 0x04, 0x03];
    const ALTERNATIVE_NAME: [u8; 3] = [0x55, 0x1d, 0x11];
    let sequence = |parts: &[Vec<u8>]| der(SEQUENCE, &parts.concat());
    let shown = host.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = shown.take_while(|end| *end <= COMMON_NAME).last();
    let common_name = &host[..end.unwrap_or(0)];
    let name = sequence(&[der(
        SET,
        &sequence(&[
            der(OBJECT, &COMMON_NAME_ID),
            der(UTF8, common_name.as_bytes()),
        ]),
    )]);
    let names = sequence(&[der(DNS_NAME, host.as_bytes())]);
    // A positive number without leading zeros.
    let mut number = *serial;
    number[0] = (number[0] & 0x7f) | 0x40;
    sequence(&[
        // Version 3.
        der(VERSION, &der(INTEGER, &[2])),
        der(INTEGER, &number),
        ecdsa_with_sha256(),
        name.clone(),
        // As long as the instance lives: the latest time means that nothing is said.
        sequence(&[
            der(UTC_TIME, b"700101000000Z"),
            der(GENERALIZED_TIME, b"99991231235959Z"),
        ]),
        name,
        sequence(&[
            sequence(&[der(OBJECT, &EC_KEY), der(OBJECT, &P256)]),
            bits(point),
        ]),
        der(
            EXTENSIONS,
            &sequence(&[sequence(&[
                der(OBJECT, &ALTERNATIVE_NAME),
                der(OCTET_STRING, &names),
            ])]),
        ),
    ])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    fn made(maker: &mut Maker, identity: Identity) -> String {
        String::from_utf8(maker.make(identity).unwrap().unwrap()).unwrap()
    }

    /// What a program prints; `None`: it is not there.
    fn says(program: &str, args: &[&str]) -> Option<String> {
        let output = match Command::new(program).args(args).output() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                assert!(
                    std::env::var_os("KILN_TEST_STRICT").is_none(),
                    "needs {program}"
                );
                eprintln!("SKIPPED: needs {program}");
                return None;
            }
            output => output.unwrap(),
        };
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {error}");
        Some(String::from_utf8(output.stdout).unwrap())
    }

    fn put(folder: &Path, name: &str, text: &str) -> String {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn openssh_reads_the_keys_and_finds_that_they_fit() {
        let folder = tempfile::tempdir().unwrap();
        let mut maker = Maker::new("web-1");
        for (private, public) in [
            (Identity::SshEd25519, Identity::SshEd25519Public),
            (Identity::SshEcdsa, Identity::SshEcdsaPublic),
        ] {
            let key = put(folder.path(), "key", &made(&mut maker, private));
            let Some(told) = says("ssh-keygen", &["-y", "-f", &key]) else {
                return;
            };
            let public = made(&mut maker, public);
            let words = |text: &str| text.split(' ').take(2).collect::<Vec<_>>().join(" ");
            assert_eq!(words(told.trim()), words(&public));
            assert!(public.ends_with(" root@web-1\n"));
        }
        assert_eq!(maker.make(Identity::SshRsa).unwrap(), None);
    }

    #[test]
    fn openssl_verifies_the_certificate_and_its_key() {
        let folder = tempfile::tempdir().unwrap();
        for host in ["web-1", &"long.".repeat(20)] {
            let mut maker = Maker::new(host);
            let key = put(
                folder.path(),
                "key",
                &made(&mut maker, Identity::SnakeoilKey),
            );
            let certificate = made(&mut maker, Identity::SnakeoilCertificate);
            let certificate = put(folder.path(), "certificate", &certificate);
            let Some(own) = says("openssl", &["pkey", "-in", &key, "-pubout"]) else {
                return;
            };
            let read = ["x509", "-in", &certificate, "-noout"];
            let told = says("openssl", &[&read[..], &["-pubkey"]].concat()).unwrap();
            assert_eq!(told, own);
            let text = says(
                "openssl",
                &[&read[..], &["-ext", "subjectAltName"]].concat(),
            );
            assert!(text.unwrap().contains(&format!("DNS:{host}")));
            says(
                "openssl",
                &["verify", "-CAfile", &certificate, &certificate],
            )
            .unwrap();
        }
    }

    #[test]
    fn no_two_instances_are_the_same() {
        let (mut one, mut other) = (Maker::new("h"), Maker::new("h"));
        for (_, identity) in kiln_model::identity::PLACES {
            if let Some(first) = one.make(identity).unwrap() {
                assert_ne!(Some(first), other.make(identity).unwrap(), "{identity:?}");
            }
        }
        let id = made(&mut one, Identity::MachineId);
        let digits = id.trim_end().bytes().filter(u8::is_ascii_hexdigit).count();
        assert_eq!((digits, id.len()), (32, 33));
    }
}
