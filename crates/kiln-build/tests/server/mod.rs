//! A server on an address of the host that RUNs reach: a bridge of its own.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kiln_model::network::BridgeNetwork;
use kiln_runtime::net;

/// Answers are given in their order, the last again and again.
#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn of(status: u16, body: &str) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

#[derive(Default)]
pub struct Pages {
    answers: Mutex<BTreeMap<String, Vec<Answer>>>,
    /// Heads of requests, with their bodies.
    pub seen: Mutex<Vec<String>>,
}

pub struct Server {
    pub address: SocketAddr,
    pub pages: Arc<Pages>,
    end: Arc<AtomicBool>,
}

/// An address of the host.
pub struct Address {
    network: BridgeNetwork,
}

static BRIDGES: AtomicU32 = AtomicU32::new(0);

impl Address {
    pub fn new() -> Self {
        let number = BRIDGES.fetch_add(1, Ordering::Relaxed);
        let mut taken = Vec::new();
        loop {
            let network = BridgeNetwork {
                name: "outside".into(),
                bridge: format!("kbf{}n{number}", std::process::id()),
                subnet: net::free_subnet(&taken).unwrap(),
                internal: false,
                mtu: None,
            };
            match net::ensure_bridge(&network) {
                Err(net::BridgeError::SubnetTaken { .. }) => taken.push(network.subnet),
                made => {
                    made.unwrap();
                    return Self { network };
                }
            }
        }
    }

    pub fn ip(&self) -> Ipv4Addr {
        self.network.gateway()
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        let _ = net::remove_bridge(&self.network.bridge);
    }
}

impl Server {
    pub fn http(at: &Address) -> Self {
        Self::begin(at, None)
    }

    /// `tls`: what [`certificates`] made.
    pub fn https(at: &Address, tls: Arc<rustls::ServerConfig>) -> Self {
        Self::begin(at, Some(tls))
    }

    fn begin(at: &Address, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind((at.ip(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (pages, end) = (Arc::new(Pages::default()), Arc::new(AtomicBool::new(false)));
        let (shared, ended) = (pages.clone(), end.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (pages, tls) = (shared.clone(), tls.clone());
                std::thread::spawn(move || match tls {
                    None => pages.serve(stream),
                    Some(tls) => {
                        let connection = rustls::ServerConnection::new(tls).unwrap();
                        pages.serve(rustls::StreamOwned::new(connection, stream));
                    }
                });
            }
        });
        Self {
            address,
            pages,
            end,
        }
    }

    pub fn set(&self, path: &str, answers: &[Answer]) {
        let mut pages = self.pages.answers.lock().unwrap();
        pages.insert(path.to_owned(), answers.to_vec());
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// How many requests there were so far.
    pub fn count(&self) -> usize {
        self.pages.seen.lock().unwrap().len()
    }

    /// No connection is taken any more.
    pub fn stop(&self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Pages {
    /// One request; the connection is closed after it.
    fn serve(&self, stream: impl Read + Write) {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let length = head.lines().find_map(|line| {
            let line = line.to_ascii_lowercase();
            line.strip_prefix("content-length:")?.trim().parse().ok()
        });
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body).unwrap();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut seen = self.seen.lock().unwrap();
        seen.push(head.clone() + &String::from_utf8_lossy(&body));
        drop(seen);
        let answer = {
            let mut answers = self.answers.lock().unwrap();
            match answers.get_mut(&path) {
                Some(all) if all.len() > 1 => all.remove(0),
                Some(all) => all[0].clone(),
                None => Answer::of(404, "no such page"),
            }
        };
        let Answer {
            status,
            headers,
            body,
        } = answer;
        let mut text = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ndate: now\r\n");
        if !headers.iter().any(|(name, _)| *name == "content-length") {
            text.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        let stream = reader.get_mut();
        let _ = stream.write_all(format!("{text}\r\n").as_bytes());
        let _ = stream.write_all(&body);
        let _ = stream.flush();
    }
}

/// A certificate for this address, and the authority's in PEM; `None`, and a word about it,
/// where there is no openssl.
pub fn certificates(folder: &Path, ip: Ipv4Addr) -> Option<(Arc<rustls::ServerConfig>, String)> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let path = |name: &str| -> PathBuf { folder.join(name) };
    let script = format!(
        "set -e; cd {}; \
         openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key \
           -out ca.pem -days 30 -subj /CN=test-authority \
           -addext keyUsage=critical,keyCertSign; \
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key \
           -out own.csr -subj /CN=test; \
         printf 'subjectAltName=IP:{ip}\\nauthorityKeyIdentifier=keyid\\n' > ext; \
         openssl x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 \
           -extfile ext -out own.pem",
        folder.display()
    );
    let made = Command::new("sh").args(["-c", &script]).output().unwrap();
    if !made.status.success() {
        assert!(
            std::env::var_os("KILN_TEST_STRICT").is_none(),
            "needs openssl"
        );
        eprintln!("SKIPPED: needs openssl");
        return None;
    }
    let chain = vec![CertificateDer::from_pem_file(path("own.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(path("own.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let authority = std::fs::read_to_string(path("ca.pem")).unwrap();
    Some((Arc::new(config), authority))
}
