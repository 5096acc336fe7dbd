//! What a layer adds, looked through: every new content once, up to a bound, several files
//! at a time.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use kiln_model::identity::{self, Identity};
use kiln_model::secrets::Finder;
use kiln_store::Store;
use kiln_store::tree::{Aspect, Change, ChangeKind, Kind, Tree};

use super::{Finding, credentials, keys, packages};
use crate::exec::ExecError;

/// Of a longer file only the beginning is looked at: keys and settings are small.
pub(crate) const LOOKED_INTO: u64 = 8 << 20;
/// Files looked at at the same time; a bound on memory.
const MAX_THREADS: usize = 4;
/// A shorter secret would be found in files that have nothing to do with it.
const SHORTEST: usize = 8;
/// The same id once more, where it is no link.
const DBUS_ID: &str = "var/lib/dbus/machine-id";

/// The secrets that the build itself was given: id and value.
pub struct Given(Vec<(String, Vec<u8>)>);

impl Given {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn new(secrets: &BTreeMap<String, Vec<u8>>) -> Self {
        let trimmed = secrets
            .iter()
            .map(|(id, value)| (id.clone(), value.trim_ascii().to_vec()));
        Self(
            trimmed
                .filter(|(_, value)| value.len() >= SHORTEST)
                .collect(),
        )
    }
}

/// What is looked for.
pub struct Look<'a> {
    finder: Finder,
    given: &'a Given,
    /// What a RUN is given and no file may hold.
    marks: &'a [Vec<u8>],
}

/// Looks through all of a tree.
pub(crate) fn in_tree(tree: &Tree, store: &Store) -> Result<Vec<Finding>, ExecError> {
    let files = tree.walk().filter_map(|item| match item.node.kind {
        Kind::File { digest, size } => Some((item.path, digest, size)),
        _ => None,
    });
    let files: Vec<(Vec<u8>, Digest, u64)> = files.collect();
    let given = Given(Vec::new());
    let look = Look::new(&given, &[]);
    let next = AtomicUsize::new(0);
    let found = Mutex::new((Vec::new(), None));
    let work = || {
        let mut content = Vec::new();
        while let Some((path, digest, size)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let read = read(store, digest, *size, &mut content);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            match read {
                Ok(()) => found.0.extend(look.at(path, *size, &content)),
                Err(error) => found.1 = Some(error),
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..processors.min(MAX_THREADS).min(files.len()) {
            scope.spawn(work);
        }
        work();
    });
    let (found, error) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    match error {
        Some(error) => Err(error),
        None => Ok(judged(found, tree, store)),
    }
}

fn read(store: &Store, digest: &Digest, size: u64, content: &mut Vec<u8>) -> Result<(), ExecError> {
    content.clear();
    if size == 0 {
        return Ok(());
    }
    let object = store.open_object(digest).map_err(ExecError::store)?;
    let object = object.ok_or(ExecError::Lost(*digest))?;
    let read = object.take(LOOKED_INTO).read_to_end(content);
    read.map(drop).map_err(ExecError::store)
}

/// Without what may be in this tree.
pub(crate) fn judged(mut found: Vec<Finding>, tree: &Tree, store: &Store) -> Vec<Finding> {
    drop_innocent(&mut found, tree, store);
    found.sort();
    found
}

/// Whether a change brings content that was not at its path before.
pub(crate) fn is_new(change: &Change<'_>) -> bool {
    match &change.kind {
        ChangeKind::Added(_) => true,
        ChangeKind::Modified { what, .. } => {
            what.contains(&Aspect::Content) || what.contains(&Aspect::Kind)
        }
        ChangeKind::Removed(_) => false,
    }
}

impl<'a> Look<'a> {
    pub fn new(given: &'a Given, marks: &'a [Vec<u8>]) -> Self {
        Self {
            finder: Finder::default(),
            given,
            marks,
        }
    }

    /// What a file of `size` bytes holds; `content`: its first [`LOOKED_INTO`] bytes.
    pub fn at(&self, path: &[u8], size: u64, content: &[u8]) -> Vec<Finding> {
        let identity = identity::at(path);
        let path = String::from_utf8_lossy(path);
        let place = format!("/{path}");
        if size == 0 {
            let made_anew = |kind| Finding {
                made_anew: true,
                ..Finding::new(place, kind)
            };
            return identity.map(name).map(made_anew).into_iter().collect();
        }
        let kinds = self.finder.kinds(content);
        let mut kinds: Vec<String> = kinds.iter().map(|k| (*k).into()).collect();
        let machine_id = identity == Some(Identity::MachineId) || path == DBUS_ID;
        if machine_id && content.trim_ascii() != b"uninitialized" {
            kinds.push(name(Identity::MachineId).into());
        }
        if keys::is_key(&path, content) {
            kinds.push("private key".into());
        }
        kinds.extend(credentials::kind(&path, content).map(str::to_owned));
        if self.marks.iter().any(|mark| contains(content, mark)) {
            let mark = "what a RUN is given for this build only, to reach the recording proxy";
            kinds.push(mark.into());
        }
        let own = self
            .given
            .0
            .iter()
            .filter(|(_, value)| contains(content, value));
        let own = own.map(|(id, _)| Finding::given(&place, id));
        let kinds = kinds.into_iter().map(|k| Finding::new(&place, k));
        kinds.chain(own).collect()
    }
}

fn name(identity: Identity) -> &'static str {
    match identity {
        Identity::MachineId => "machine id",
        Identity::SshEd25519 | Identity::SshEcdsa | Identity::SshRsa => "ssh host key",
        Identity::SshEd25519Public | Identity::SshEcdsaPublic | Identity::SshRsaPublic => {
            "ssh host key, the public half"
        }
        Identity::SnakeoilKey => "private key of ssl-cert",
        Identity::SnakeoilCertificate => "certificate of ssl-cert",
    }
}

pub(super) fn contains(content: &[u8], wanted: &[u8]) -> bool {
    let Some((first, _)) = wanted.split_first() else {
        return false;
    };
    let mut rest = content;
    while let Some(at) = rest.iter().position(|b| b == first) {
        if rest[at..].starts_with(wanted) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

/// Takes out what packages have brought. The build's own secrets are no package's.
fn drop_innocent(found: &mut Vec<Finding>, tree: &Tree, store: &Store) {
    if found.iter().all(|f| f.made_anew || f.is_given()) {
        return;
    }
    let installed = packages::installed(tree, store);
    found.retain(|finding| {
        let path = finding.place.trim_start_matches('/');
        let public = packages::is_test(path) || installed.contains(&packages::merged(path));
        finding.made_anew || finding.is_given() || !public
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::exec::layer::Delta;
    use kiln_store::tree::Node;

    /// Frames are put together here, so that no scanner takes this file for a leak.
    fn key() -> String {
        let line = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n";
        let frame = |word: &str| format!("-----{word} PRIVATE KEY-----\n");
        format!("{}{}{}", frame("BEGIN"), line.repeat(3), frame("END"))
    }

    fn found(files: &[(&str, &[u8])]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut tree = Tree::new();
        for (path, content) in files {
            let (digest, size) = store.put_object(&mut &content[..]).unwrap();
            tree.make_dirs(path.rsplit_once('/').unwrap().0).unwrap();
            let node = Node::plain(0o644, Kind::File { digest, size });
            tree.insert(*path, node).unwrap();
        }
        let secrets = BTreeMap::from([
            ("npm".to_owned(), b"very-hush-3311\n".to_vec()),
            ("short".to_owned(), b"x".to_vec()),
        ]);
        let nothing = Tree::new();
        let delta = Delta::between(&nothing, &tree);
        let given = Given::new(&secrets);
        let look = Look::new(&given, &[]);
        let (_, found) = delta.whole().unwrap().write(&store, Some(&look)).unwrap();
        let found = judged(found, &tree, &store);
        let told = found.iter().map(|f| match f.made_anew {
            true => format!("{} {} made anew", f.place, f.kind),
            false => format!("{} {}", f.place, f.kind),
        });
        told.collect()
    }

    #[test]
    fn every_seed_is_found() {
        let der = [
            &[0x30, 0x82, 0x04, 0xbd, 2, 1, 0, 0x30, 0x0d, 6, 9][..],
            &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0],
        ]
        .concat();
        let github = format!("token: ghp_{}", "a1B2".repeat(9));
        let key = key();
        let long = [vec![b' '; 3 << 20], key.clone().into_bytes()].concat();
        let seeds: [(&str, &[u8], &str); 11] = [
            ("app/a.pem", key.as_bytes(), "private key"),
            ("etc/ssh/ssh_host_rsa_key", key.as_bytes(), "private key"),
            ("root/.ssh/id_rsa", key.as_bytes(), "private key"),
            ("app/long.log", &long, "private key"),
            ("app/b.ppk", b"PuTTY-User-Key-File-3: x", "private key"),
            ("app/c.der", &der, "private key"),
            ("app/settings.yaml", github.as_bytes(), "GitHub token"),
            (
                "root/.netrc",
                b"machine h password p4ss",
                "file with a login",
            ),
            (
                "etc/machine-id",
                b"0123456789abcdef0123456789abcdef\n",
                "machine id",
            ),
            (
                "root/.npm/_logs/x",
                b"a very-hush-3311 b",
                "the build's secret `npm`",
            ),
            (
                "var/cache/x/y",
                b"very-hush-3311",
                "the build's secret `npm`",
            ),
        ];
        let files = seeds.map(|(path, content, _)| (path, content));
        let mut expected = seeds.map(|(path, _, kind)| format!("/{path} {kind}"));
        expected.sort();
        assert_eq!(found(&files), expected);
    }

    #[test]
    fn innocents_are_passed() {
        let key = key();
        let public = key.replace("PRIVATE", "PUBLIC");
        let certificates = key.replace("PRIVATE KEY", "CERTIFICATE").repeat(200);
        let program = b"\x7fELF\0-----BEGIN RSA PRIVATE KEY-----\0-----END RSA PRIVATE KEY-----\0";
        let files: [(&str, &[u8]); 11] = [
            ("etc/ssl/certs/ca-certificates.crt", certificates.as_bytes()),
            (
                "etc/ssh/ssh_host_ed25519_key.pub",
                b"ssh-ed25519 AAAAC3NzaC1lZDI1 root@x",
            ),
            ("root/.ssh/authorized_keys", b"ssh-rsa AAAAB3NzaC1yc2E me"),
            ("app/public.pem", public.as_bytes()),
            ("usr/bin/openssl", program),
            ("usr/lib/libgnutls.so.30", key.as_bytes()),
            (
                "var/lib/dpkg/info/libgnutls30.list",
                b"/.\n/lib/libgnutls.so.30\n/etc/k.pem\n",
            ),
            ("app/node_modules/x/test/k.pem", key.as_bytes()),
            ("etc/machine-id", b"uninitialized\n"),
            (
                "app/README.md",
                b"set DB_PASSWORD=hunter2, AKIAIOSFODNN7EXAMPLE",
            ),
            ("app/empty", b""),
        ];
        assert_eq!(found(&files), [""; 0]);
        let edited = ("etc/k.pem", key.as_bytes());
        assert_eq!(found(&[files[6], edited]), ["/etc/k.pem private key"]);
    }

    #[test]
    fn an_empty_file_of_identity_is_named() {
        let files: [(&str, &[u8]); 2] = [("etc/ssh/ssh_host_rsa_key", b""), ("etc/x", b"")];
        let expected = "/etc/ssh/ssh_host_rsa_key ssh host key made anew";
        assert_eq!(found(&files), [expected]);
    }
}
