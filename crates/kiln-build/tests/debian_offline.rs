//! Composing from a small signed archive in `fixtures/archive` over `file:` addresses:
//! no network. Needs root (owners are written) and gpgv or sqv.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_build::debian::{self, Asked, Composed, DebianContext, DebianError, Machine};
use kiln_build::lock::Lock;
use kiln_model::progress::Silent;
use kiln_model::spec::DebianBase;
use kiln_oci::testing::MemoryBlobs;

/// 2027-01-01, within the archive's validity.
const NOW: u64 = 1_798_761_600;

struct Place {
    folder: tempfile::TempDir,
    blobs: MemoryBlobs,
    now: u64,
}

fn skipped() -> bool {
    if rustix::process::geteuid().is_root() {
        return false;
    }
    assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
    eprintln!("SKIPPED: needs root");
    true
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

impl Place {
    /// A machine whose apt knows a copy of the archive.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/archive");
        copy(&fixture, &folder.path().join("archive"));
        let apt = folder.path().join("machine/etc/apt/sources.list.d");
        std::fs::create_dir_all(&apt).unwrap();
        std::fs::copy(fixture.join("key.asc"), apt.join("../key.asc")).unwrap();
        let text = format!(
            "Types: deb\nURIs: file:{}/archive/debian\nSuites: bookworm\nComponents: main\nSigned-By: /etc/apt/key.asc\n",
            folder.path().display()
        );
        std::fs::write(apt.join("test.sources"), text).unwrap();
        Self {
            folder,
            blobs: MemoryBlobs::new(),
            now: NOW,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("archive").join(name)
    }

    async fn compose(&self, packages: &[&str], lock: &mut Lock) -> Result<Composed, DebianError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ctx = DebianContext {
            blobs: Arc::new(self.blobs.clone()),
            run_scripts: Arc::new(|_, _| Err("no scripts in distroless bases".into())),
            cache: self.folder.path().join("cache"),
            client: reqwest::Client::new(),
            progress: Arc::new(Silent),
            epoch: 0,
            machine: Machine {
                root: self.folder.path().join("machine"),
                now: self.now,
                arch: "amd64".into(),
            },
        };
        let base = DebianBase {
            suite: "bookworm".into(),
            packages: packages.iter().map(|p| p.to_string()).collect(),
            distroless: true,
            ..DebianBase::default()
        };
        let asked = Asked {
            name: "web",
            base: &base,
            mirror: None,
        };
        debian::compose(&ctx, &asked, lock).await
    }
}

/// The whole chain of causes, as a user reads it.
fn told(error: &DebianError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

fn versions(lock: &Lock) -> Vec<String> {
    let packages = &lock.bases["web"].architectures["amd64"];
    packages
        .iter()
        .map(|p| format!("{} {}", p.name, p.version))
        .collect()
}

#[tokio::test]
async fn locked_cached_and_the_same_on_another_machine() {
    if skipped() {
        return;
    }
    let (here, there) = (Place::new(), Place::new());
    let mut lock = Lock::default();
    let first = here.compose(&["hello"], &mut lock).await.unwrap();
    assert_eq!(
        versions(&lock),
        ["base-files 1", "hello 1.1", "hello-data 1"]
    );
    assert!(!first.cached);
    let again = here.compose(&["hello"], &mut lock).await.unwrap();
    assert!(again.cached && again.image == first.image);
    // With a complete lock nothing but package files is needed …
    std::fs::remove_dir_all(there.path("debian/dists")).unwrap();
    let other = there.compose(&["hello"], &mut lock.clone()).await.unwrap();
    assert_eq!(other.image, first.image);
    // … and with those in the cache, no archive at all.
    std::fs::remove_dir_all(here.path("debian")).unwrap();
    std::fs::remove_dir_all(here.folder.path().join("cache/debian/images")).unwrap();
    let offline = here.compose(&["hello"], &mut lock).await.unwrap();
    assert!(!offline.cached && offline.image == first.image);
}

#[tokio::test]
async fn another_package_list_keeps_the_versions_that_still_hold() {
    if skipped() {
        return;
    }
    let place = Place::new();
    let mut lock = Lock::default();
    place.compose(&["hello=1.0"], &mut lock).await.unwrap();
    place
        .compose(&["hello", "hello-data"], &mut lock)
        .await
        .unwrap();
    assert!(
        versions(&lock).contains(&"hello 1.0".to_string()),
        "{:?}",
        versions(&lock)
    );
    lock.update();
    place
        .compose(&["hello", "hello-data"], &mut lock)
        .await
        .unwrap();
    assert!(versions(&lock).contains(&"hello 1.1".to_string()));
}

#[tokio::test]
async fn a_vanished_version_names_the_way_out() {
    if skipped() {
        return;
    }
    let place = Place::new();
    let mut lock = Lock::default();
    Place::new().compose(&["hello"], &mut lock).await.unwrap();
    std::fs::remove_file(place.path("debian/pool/main/hello_1.1_all.deb")).unwrap();
    let text = told(&place.compose(&["hello"], &mut lock).await.unwrap_err());
    assert!(
        text.contains("hello 1.1") && text.contains("kiln lock --update"),
        "{text}"
    );
}

#[tokio::test]
async fn nothing_unsigned_or_altered_gets_in() {
    let digest_of = |path: &Path| kiln_model::Digest::of(std::fs::read(path).unwrap()).hex();
    // A changed Release file.
    let place = Place::new();
    let release = place.path("debian/dists/bookworm/InRelease");
    let text = std::fs::read_to_string(&release).unwrap();
    std::fs::write(&release, text.replace("Suite: oldstable", "Suite: stable")).unwrap();
    let told_of = told(
        &place
            .compose(&["hello"], &mut Lock::default())
            .await
            .unwrap_err(),
    );
    assert!(
        told_of.contains("InRelease has no valid signature") && told_of.contains("key.asc"),
        "{told_of}"
    );
    // An unsigned one.
    let unsigned: String = text
        .lines()
        .filter(|l| l.contains(": ") || l.starts_with(' '))
        .map(|l| format!("{l}\n"))
        .collect();
    std::fs::write(&release, unsigned).unwrap();
    let told_of = told(
        &place
            .compose(&["hello"], &mut Lock::default())
            .await
            .unwrap_err(),
    );
    assert!(told_of.contains("not a signed Release file"), "{told_of}");
    // A changed index, and a changed package: the address and both hashes.
    for name in [
        "debian/dists/bookworm/main/binary-amd64/Packages",
        "debian/pool/main/hello_1.1_all.deb",
    ] {
        let place = Place::new();
        let path = place.path(name);
        let before = digest_of(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[70] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let told_of = told(
            &place
                .compose(&["hello"], &mut Lock::default())
                .await
                .unwrap_err(),
        );
        for part in [name, &before, &digest_of(&path)] {
            assert!(told_of.contains(part), "{part} in {told_of}");
        }
        assert!(place.blobs.digests().is_empty());
    }
}

#[tokio::test]
async fn an_outdated_archive_is_refused_unless_its_source_allows_it() {
    let mut place = Place::new();
    place.now = 1_900_000_000;
    let text = told(
        &place
            .compose(&["hello"], &mut Lock::default())
            .await
            .unwrap_err(),
    );
    assert!(
        text.contains("valid until Sat, 01 Jan 2028") && text.contains("Check-Valid-Until"),
        "{text}"
    );
    if skipped() {
        return;
    }
    let source = place
        .folder
        .path()
        .join("machine/etc/apt/sources.list.d/test.sources");
    let text = std::fs::read_to_string(&source).unwrap() + "Check-Valid-Until: no\n";
    std::fs::write(&source, text).unwrap();
    place
        .compose(&["hello"], &mut Lock::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn bad_requests_are_named() {
    let place = Place::new();
    for (packages, part) in [
        (
            &["nothing-like-it"][..],
            "no package `nothing-like-it` in bookworm",
        ),
        (&["hello=9"], "it has 1.1, 1.0"),
        (&["../x"], "`../x` is not a package name"),
    ] {
        let text = told(
            &place
                .compose(packages, &mut Lock::default())
                .await
                .unwrap_err(),
        );
        assert!(text.contains(part), "{text}");
    }
}
