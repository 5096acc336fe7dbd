//! The certificate authority of one process's builds: made when the first RUN asks for a
//! network, kept in memory only, and gone with the process. Its certificates are written
//! here (RFC 5280, in DER), as they need few of X.509's parts.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::Digest;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

/// Names that certificates are kept for; with more they are made again.
const HOSTS_KEPT: usize = 1024;
/// What programs show as the issuer.
const ISSUER: &str = "kiln: recording proxy of one build";
/// RFC 5280: the longest common name.
const COMMON_NAME: usize = 64;
/// A line of a PEM file.
const PEM_LINE: usize = 64;

pub(in crate::network) struct Authority {
    random: SystemRandom,
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
    /// One key for all names: in PKCS#8, and its public half.
    host_key: Vec<u8>,
    host_point: Vec<u8>,
    hosts: Mutex<BTreeMap<String, Arc<ServerConfig>>>,
}

fn failed(_: impl Sized) -> io::Error {
    io::Error::other("no key could be made")
}

impl Authority {
    pub fn new() -> io::Result<Self> {
        let random = SystemRandom::new();
        let (_, key) = pair(&random)?;
        let (host_key, host) = pair(&random)?;
        let mut authority = Self {
            host_point: host.public_key().as_ref().to_vec(),
            host_key,
            certificate: Vec::new(),
            key,
            random,
            hosts: Mutex::default(),
        };
        let point = authority.key.public_key().as_ref().to_vec();
        let extensions = [
            // cA, and none below it.
            extension(
                &[0x55, 0x1d, 0x13],
                true,
                &sequence(&[der(BOOLEAN, &[0xff]), der(INTEGER, &[0])]),
            ),
            // keyCertSign and cRLSign.
            extension(&[0x55, 0x1d, 0x0f], true, &der(BIT_STRING, &[1, 0x06])),
            extension(
                &[0x55, 0x1d, 0x0e],
                false,
                &der(OCTET_STRING, &id_of(&point)),
            ),
        ];
        authority.certificate = authority.sign(ISSUER, &point, &extensions)?;
        Ok(authority)
    }

    /// The certificate as programs' bundles hold it.
    pub fn pem(&self) -> String {
        let text = STANDARD.encode(&self.certificate);
        let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (line, after) = rest.split_at(rest.len().min(PEM_LINE));
            pem.push_str(line);
            pem.push('\n');
            rest = after;
        }
        pem + "-----END CERTIFICATE-----\n"
    }

    /// What the certificate is known by wherever it was copied to: a line of its PEM form,
    /// and its public key as it stands in DER.
    pub fn marks(&self) -> Vec<Vec<u8>> {
        let line = self
            .pem()
            .lines()
            .nth(4)
            .unwrap_or_default()
            .as_bytes()
            .to_vec();
        vec![line, self.key.public_key().as_ref().to_vec()]
    }

    /// What a server with this name speaks TLS with; HTTP/1.1 only.
    pub fn server(&self, host: &str) -> io::Result<Arc<ServerConfig>> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = hosts.get(host) {
            return Ok(known.clone());
        }
        let chain = vec![
            CertificateDer::from(self.of_host(host)?),
            CertificateDer::from(self.certificate.clone()),
        ];
        let key = PrivatePkcs8KeyDer::from(self.host_key.clone());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(chain, key.into())
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if hosts.len() >= HOSTS_KEPT {
            hosts.clear();
        }
        let config = Arc::new(config);
        hosts.insert(host.to_owned(), config.clone());
        Ok(config)
    }

    fn of_host(&self, host: &str) -> io::Result<Vec<u8>> {
        let name = match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) => der(IP_NAME, &address.octets()),
            Ok(IpAddr::V6(address)) => der(IP_NAME, &address.octets()),
            Err(_) => der(DNS_NAME, host.as_bytes()),
        };
        let issuer = der(KEY_ID, &id_of(self.key.public_key().as_ref()));
        let server_auth = der(OBJECT, &[0x2b, 6, 1, 5, 5, 7, 3, 1]);
        let extensions = [
            // digitalSignature.
            extension(&[0x55, 0x1d, 0x0f], true, &der(BIT_STRING, &[7, 0x80])),
            extension(&[0x55, 0x1d, 0x25], false, &sequence(&[server_auth])),
            extension(&[0x55, 0x1d, 0x11], false, &sequence(&[name])),
            extension(&[0x55, 0x1d, 0x23], false, &sequence(&[issuer])),
        ];
        self.sign(host, &self.host_point, &extensions)
    }

    fn sign(&self, subject: &str, point: &[u8], extensions: &[Vec<u8>]) -> io::Result<Vec<u8>> {
        const EC_KEY: [u8; 7] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
        const P256: [u8; 8] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
        let mut serial = [0_u8; 16];
        self.random.fill(&mut serial).map_err(failed)?;
        // A positive number without leading zeros.
        serial[0] = (serial[0] & 0x7f) | 0x40;
        let signed = sequence(&[
            // Version 3.
            der(VERSION, &der(INTEGER, &[2])),
            der(INTEGER, &serial),
            ecdsa_with_sha256(),
            name(ISSUER),
            // No build outlives its process; clocks may be wrong, or faked for a test.
            sequence(&[
                der(UTC_TIME, b"000101000000Z"),
                der(UTC_TIME, b"491231235959Z"),
            ]),
            name(subject),
            sequence(&[
                sequence(&[der(OBJECT, &EC_KEY), der(OBJECT, &P256)]),
                der(BIT_STRING, &[&[0], point].concat()),
            ]),
            der(EXTENSIONS, &sequence(extensions)),
        ]);
        let signature = self.key.sign(&self.random, &signed).map_err(failed)?;
        let signature = der(BIT_STRING, &[&[0], signature.as_ref()].concat());
        Ok(sequence(&[signed, ecdsa_with_sha256(), signature]))
    }
}

fn pair(random: &SystemRandom) -> io::Result<(Vec<u8>, EcdsaKeyPair)> {
    let kind = &ECDSA_P256_SHA256_ASN1_SIGNING;
    let document = EcdsaKeyPair::generate_pkcs8(kind, random).map_err(failed)?;
    let key = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), random).map_err(failed)?;
    Ok((document.as_ref().to_vec(), key))
}

// X.690, section 8, and RFC 5280, section 4.
const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const UTF8: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
const KEY_ID: u8 = 0x80;
const DNS_NAME: u8 = 0x82;
const IP_NAME: u8 = 0x87;

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

fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
    der(SEQUENCE, &parts.concat())
}

fn ecdsa_with_sha256() -> Vec<u8> {
    sequence(&[der(
        OBJECT,
        &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02],
    )])
}

/// A name that is only a common name, cut to its bound.
fn name(text: &str) -> Vec<u8> {
    let mut end = text.len().min(COMMON_NAME);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let id = der(OBJECT, &[0x55, 0x04, 0x03]);
    let part = sequence(&[id, der(UTF8, &text.as_bytes()[..end])]);
    sequence(&[der(SET, &part)])
}

fn extension(id: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let mut parts = vec![der(OBJECT, id)];
    if critical {
        parts.push(der(BOOLEAN, &[0xff]));
    }
    parts.push(der(OCTET_STRING, value));
    sequence(&parts)
}

/// A key's identifier: 20 bytes that follow from it.
fn id_of(point: &[u8]) -> Vec<u8> {
    Digest::of(point).as_bytes()[..20].to_vec()
}
