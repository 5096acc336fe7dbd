//! What a RUN fetches: under which name it is recorded, and what its program is told so that
//! it goes through the recording proxy.
//!
//! The proxy's certificate authority is in a file outside of the image (a mount below
//! [`FOLDER`]) that variables and two configuration files point to. The trust stores of the
//! image are left alone: packages rewrite them by rename, which a mount would make fail, and
//! what is put into them would be copied on (into Java's, into a later stage).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_model::instance::{InstanceMount, InstanceMountSource};
use kiln_model::{Digest, InstanceSpec, ProgressEvent};

use super::state::Key;
use super::variables::Variables;
use super::work::Work;
use super::{ExecError, Place, Site};
use crate::containerfile::RunNetwork;
use crate::containerfile::mount::MountKind;
use crate::evaluate::{RunAction, Step};
use crate::files::{self, Source};
use crate::network::record::{Exchange, Made, Proxies, Recording, Route, Session, Setting};
use crate::network::{Connection, Proxy};
use crate::rootfs::Rootfs;

/// Where the sandbox sees kiln's files.
const FOLDER: &str = "/run/kiln-net";
/// A larger bundle of certificates is not read.
const MAX_BUNDLE: u64 = 4 << 20;
/// So many letters of an instruction are in the lock.
const SHOWN: usize = 120;
/// Digits of a RUN's name in the lock.
const NAME: usize = 32;

/// Bundles that distributions have.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Where Debian has what a machine trusts beyond that.
const LOCAL: &str = "/usr/local/share/ca-certificates";

/// Variables by which programs find certificates.
const CERTIFICATES: [&str; 17] = [
    "AWS_CA_BUNDLE",
    "BUNDLE_SSL_CA_CERT",
    "CARGO_HTTP_CAINFO",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "COMPOSER_CAFILE",
    "CURL_CA_BUNDLE",
    "DENO_CERT",
    "GIT_SSL_CAINFO",
    "JULIA_SSL_CA_ROOTS_PATH",
    "NIX_SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "PERL_LWP_SSL_CA_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "SYSTEM_CERTIFICATE_PATH",
    "npm_config_cafile",
];
const PROXIES: [&str; 4] = ["HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy"];
/// Other ways to say it: what they say is for kiln's own way out.
const OTHER_PROXIES: [&str; 6] = [
    "ALL_PROXY",
    "FTP_PROXY",
    "all_proxy",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
];
const WITHOUT: &str = "localhost,127.0.0.1,::1";

/// A RUN's place in the lock, and what is there.
pub(super) struct Taped {
    id: String,
    instruction: String,
    known: Recording,
}

impl Taped {
    /// What the RUN's result depends on, beside its key.
    pub fn digest(&self) -> Option<Digest> {
        self.known.digest()
    }

    /// What it has made here, as the lock has it.
    pub fn made(&self, path: &str) -> Option<&Made> {
        self.known.made.get(path)
    }
}

/// The key of a RUN that fetched this.
pub(super) fn key(of: &Digest, fetched: Option<Digest>) -> Digest {
    let Some(fetched) = fetched else {
        return *of;
    };
    let mut key = Key::new("fetched", of);
    key.field(fetched.as_bytes());
    key.finish()
}

impl Site<'_> {
    /// A RUN is known again by what it says, wherever the files before it come from: what it
    /// fetched stays the same when they change. `None`: it has no network.
    pub(super) fn taped(&self, run: &RunAction, step: &Step, place: &Place<'_>) -> Option<Taped> {
        if self.network_of(run) == RunNetwork::None {
            return None;
        }
        let mut name = Key::new("recording", &Digest::of(place.home));
        name.debug(&(&self.target, place.twin)).debug(&(
            &run.argv,
            &run.env,
            &run.cwd,
            &run.user,
            &run.script,
        ));
        let mut id = name.finish().hex();
        id.truncate(NAME);
        let known = self.recordings.find(&id).unwrap_or_default();
        let line = step.text.lines().next().unwrap_or_default();
        Some(Taped {
            id,
            instruction: line.chars().take(SHOWN).collect(),
            known,
        })
    }

    /// Whether what is recorded is to be fetched anew.
    pub(super) fn anew(&self, taped: Option<&Taped>) -> bool {
        self.live && taped.is_some_and(|taped| taped.known != Recording::default())
    }

    pub(super) fn session(
        &self,
        taped: Option<&Taped>,
        run: &RunAction,
        before: &Rootfs,
        mirrors: Vec<(String, String)>,
        task: &str,
    ) -> Arc<Session> {
        let known: Vec<Exchange> = match taped {
            Some(taped) if !self.live => taped.known.exchanges.clone(),
            _ => Vec::new(),
        };
        let (progress, task) = (self.progress.clone(), task.to_owned());
        let cached = run
            .mounts
            .iter()
            .any(|mount| mount.kind == MountKind::Cache);
        Arc::new(Session::new(Setting {
            known,
            keep_all: cached,
            bodies: &self.bodies,
            route: Route {
                hosts: self.hosts.clone(),
                proxies: proxies(run),
                trusted: trusted(before, run).into_bytes(),
                mirrors,
                loopback: self.network_of(run) == RunNetwork::Host,
            },
            secrets: self.secrets,
            tell: Box::new(move |text| {
                let task = task.clone();
                progress.event(ProgressEvent::Warning { task, text });
            }),
        }))
    }

    /// What the program is given to find the proxy, and to trust it.
    pub(super) fn furnish(
        &self,
        proxy: &Proxy,
        taped: Option<&Taped>,
        run: &RunAction,
        before: &Rootfs,
        spec: &mut InstanceSpec,
        work: &mut Work,
    ) -> Result<Variables, ExecError> {
        let mut show = |name: &str, text: &str| -> Result<String, ExecError> {
            let target = format!("{FOLDER}/{name}");
            let path = work.file(&format!("net-{name}"), text.as_bytes(), 0o644)?;
            spec.mounts.push(file(path, target.clone()));
            Ok(target)
        };
        let bundle = format!("{}{}", proxy.certificate, trusted(before, run));
        let bundle = show("ca.pem", &bundle)?;
        let replayed = !self.live && taped.is_some_and(|taped| !taped.known.exchanges.is_empty());
        let apt = show("apt.conf", &apt(&proxy.url, &bundle, replayed))?;
        let wget = show("wgetrc", &format!("ca_certificate = {bundle}\n"))?;
        for name in PROXIES.iter().chain(&OTHER_PROXIES) {
            spec.env.remove(*name);
        }
        let mut variables = BTreeMap::new();
        let mut set = |name: &str, value: &str| variables.insert(name.to_owned(), value.to_owned());
        for name in PROXIES {
            set(name, &proxy.url);
        }
        for name in ["no_proxy", "NO_PROXY"] {
            set(name, WITHOUT);
        }
        for name in CERTIFICATES {
            set(name, &bundle);
        }
        // Node's own fetch.
        set("NODE_USE_ENV_PROXY", "1");
        let home = spec.env.get("HOME").cloned().unwrap_or_default();
        let own = format!("{home}/.wgetrc");
        if !spec.env.contains_key("APT_CONFIG") {
            set("APT_CONFIG", &apt);
        }
        if !spec.env.contains_key("WGETRC") && text(before, &own).is_empty() {
            set("WGETRC", &wget);
        }
        spec.env.extend(variables.clone());
        let marks = vec![proxy.url.clone(), format!("{FOLDER}/")];
        Ok(Variables::new(variables, marks))
    }

    /// What a RUN's files may not hold.
    pub(super) fn marks(&self) -> Vec<Vec<u8>> {
        let mut marks = self.networks.marks();
        marks.push(format!("{FOLDER}/").into_bytes());
        marks
    }

    /// What the RUN fetched.
    pub(super) fn recorded(
        &self,
        session: &Session,
        connection: &Connection,
    ) -> Result<Recording, ExecError> {
        let outcome = session.finish(connection.direct());
        match outcome.error {
            Some(error) => Err(ExecError::Record(Box::new(error))),
            None => Ok(outcome.recording),
        }
    }

    /// What the RUN fetched and made is known from now on; gives what its result depends on.
    pub(super) fn learn(&self, taped: Option<&Taped>, recording: Recording) -> Option<Digest> {
        let taped = taped?;
        let recording = Recording {
            instruction: taped.instruction.clone(),
            platform: self.target.clone(),
            ..recording
        };
        let digest = recording.digest();
        self.recordings.learn(&taped.id, recording);
        digest
    }
}

/// apt knows no variable for certificates. An index that was good when it was recorded is
/// good when it is given again.
fn apt(proxy: &str, bundle: &str, replayed: bool) -> String {
    let mut text = format!(
        "Acquire::http::Proxy \"{proxy}\";\nAcquire::https::Proxy \"{proxy}\";\n\
         Acquire::https::CaInfo \"{bundle}\";\n"
    );
    if replayed {
        text.push_str("Acquire::Check-Valid-Until \"false\";\n");
    }
    text
}

/// What the build was given for a RUN's own way out: kiln's now.
fn proxies(run: &RunAction) -> Proxies {
    let all: BTreeMap<&String, &String> = run.env.iter().chain(&run.proxies).collect();
    let first = |names: &[&str]| {
        let mut values = names.iter().filter_map(|name| all.get(&(*name).to_owned()));
        values
            .find(|value| !value.is_empty())
            .map(|value| (*value).clone())
    };
    Proxies {
        http: first(&["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]),
        https: first(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
        without: first(&["no_proxy", "NO_PROXY"]),
    }
}

/// The certificates that the image's own programs trust, in PEM.
fn trusted(before: &Rootfs, run: &RunAction) -> String {
    let mut paths: Vec<String> = BUNDLES.map(str::to_owned).into();
    paths.extend(
        CERTIFICATES
            .iter()
            .filter_map(|name| run.env.get(*name).cloned()),
    );
    let names = before.names(&files::names(LOCAL.as_bytes()));
    let names = names.iter().map(|name| String::from_utf8_lossy(name));
    paths.extend(
        names
            .filter(|n| n.ends_with(".crt"))
            .map(|n| format!("{LOCAL}/{n}")),
    );
    let mut all: Vec<String> = Vec::new();
    for path in paths {
        let mut text = text(before, &path);
        if !text.contains("-----BEGIN CERTIFICATE-----") || all.contains(&text) {
            continue;
        }
        if !text.ends_with('\n') {
            text.push('\n');
        }
        all.push(text);
    }
    all.concat()
}

/// Nothing where it can't be read.
fn text(root: &Rootfs, path: &str) -> String {
    root.text(path, MAX_BUNDLE).unwrap_or_default()
}

fn file(path: PathBuf, target: String) -> InstanceMount {
    InstanceMount {
        source: InstanceMountSource::File {
            path,
            uid: 0,
            gid: 0,
            mode: 0o644,
            secret: false,
        },
        target,
        read_only: true,
        exec: false,
        dev: false,
    }
}
