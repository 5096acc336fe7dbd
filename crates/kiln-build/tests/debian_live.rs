//! Bases composed from the real archive that this machine's apt is configured for.
//! Needs the network and root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use kiln_build::debian::base::{self, ScriptRun};
use kiln_build::debian::fetch::Fetcher;
use kiln_build::debian::image::{self, Description, ImageBlobs};
use kiln_build::debian::locking::{self, Asked, Machine};
use kiln_build::debian::sandbox;
use kiln_build::lock::Lock;
use kiln_model::instance::ExitStatus;
use kiln_model::progress::Silent;
use kiln_model::spec::DebianBase;
use kiln_model::{Digest, ImageConfig, Progress};
use kiln_oci::testing::MemoryBlobs;
use kiln_runtime::{Runtime, RuntimeConfig};

fn skipped() -> bool {
    if rustix::process::geteuid().is_root() {
        return false;
    }
    assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
    eprintln!("SKIPPED: needs root");
    true
}

fn machine() -> Machine {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    Machine {
        root: "/".into(),
        now,
        arch: "amd64".into(),
    }
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// One cache for all tests: packages are fetched once.
fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-cache")
}

/// Stands in for kiln's own sandbox.
fn unshared(
    run: &ScriptRun,
    on_line: &mut dyn FnMut(&str),
) -> Result<ExitStatus, Box<dyn std::error::Error + Send + Sync>> {
    let root = run.upper.display();
    let stage = run.stage_target;
    let script = format!(
        "mount --make-rprivate / && mount --bind {root} {root} && mount -t proc proc {root}/proc && mkdir -p {root}{stage} \
         && mount --bind {} {root}{stage} && mount -t tmpfs dev {root}/dev && ln -s /proc/self/fd {root}/dev/fd \
         && for n in null zero full random urandom tty; do touch {root}/dev/$n; mount --bind /dev/$n {root}/dev/$n; done \
         && hostname kiln && exec chroot {root} \"$@\" 2>&1",
        run.stage.display()
    );
    let mut child = Command::new("unshare")
        .args([
            "-m",
            "-p",
            "-f",
            "-i",
            "-u",
            "-n",
            "--kill-child",
            "sh",
            "-c",
            &script,
            "sh",
        ])
        .args(&run.argv)
        .env_clear()
        .envs(run.env.iter().cloned())
        .stdout(Stdio::piped())
        .spawn()?;
    for line in std::io::BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
        on_line(&String::from_utf8_lossy(&line?));
    }
    Ok(ExitStatus::Code(child.wait()?.code().unwrap_or(-1)))
}

struct Made {
    folder: tempfile::TempDir,
    files: BTreeMap<PathBuf, String>,
    image: ImageBlobs,
    lock: Lock,
}

fn base(packages: &[&str], distroless: bool) -> DebianBase {
    DebianBase {
        suite: "bookworm".into(),
        packages: packages.iter().map(|p| p.to_string()).collect(),
        essential: true,
        distroless,
        ..DebianBase::default()
    }
}

async fn make(base: &DebianBase) -> Made {
    make_with(base, Lock::default()).await
}

async fn make_with(base: &DebianBase, lock: Lock) -> Made {
    make_in(base, lock, &unshared).await
}

async fn make_in(base: &DebianBase, mut lock: Lock, sandbox: &base::RunScripts<'_>) -> Made {
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let fetcher = Fetcher::new(client(), cache()).unwrap();
    let asked = Asked {
        name: "test",
        base,
        mirror: None,
    };
    let mut clock = Instant::now();
    let mut lap = |what: &str| {
        eprintln!(
            "{:?} {}: {what} {:?}",
            base.packages,
            base.suite,
            clock.elapsed()
        );
        clock = Instant::now();
    };
    let machine = machine();
    let packages = locking::packages(&fetcher, &machine, &asked, &mut lock, &progress)
        .await
        .unwrap();
    lap("resolved");
    let files = locking::files(&fetcher, &machine, &asked, &packages, &progress)
        .await
        .unwrap();
    lap("fetched");
    // The instance is named by it.
    let folder = tempfile::Builder::new().prefix("base-").tempdir().unwrap();
    let run: Option<&base::RunScripts> = if base.distroless { None } else { Some(sandbox) };
    let start = Instant::now();
    let verbose = std::env::var_os("KILN_TEST_VERBOSE").is_some();
    let root = base::build(folder.path(), &files, 0, run, &mut |line| {
        if verbose {
            eprintln!("| {:?} {line}", start.elapsed());
        }
    })
    .unwrap_or_else(|e| panic!("{e}"));
    lap(&format!("built {} packages", files.len()));
    let description = Description {
        config: ImageConfig::default(),
        created_by: "test".into(),
        epoch: 0,
    };
    let image = image::write(&root, folder.path(), description, &MemoryBlobs::new()).unwrap();
    lap("made an image");
    Made {
        files: scan(&root),
        folder,
        image,
        lock,
    }
}

/// Every path with all that a layer would say of it.
fn scan(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let content = if meta.is_file() {
                Digest::of(std::fs::read(&path).unwrap()).short()
            } else if meta.is_symlink() {
                std::fs::read_link(&path).unwrap().display().to_string()
            } else {
                String::new()
            };
            if meta.is_dir() {
                open.push(path.clone());
            }
            // Clamped in the layer: anything later than the epoch becomes the epoch.
            let line = format!(
                "{:o} {}:{} {} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime().min(0)
            );
            found.insert(path.strip_prefix(root).unwrap().into(), line);
        }
    }
    found
}

impl Made {
    fn chroot(&self, command: &str) -> String {
        let root = self.folder.path().join("upper");
        let output = Command::new("/usr/sbin/chroot")
            .arg(root)
            .args(["/bin/sh", "-c", command])
            .env_clear()
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    fn has(&self, path: &str) -> bool {
        self.files.contains_key(Path::new(path))
    }
}

fn differences(a: &Made, b: &Made) -> Vec<String> {
    let all: std::collections::BTreeSet<_> = a.files.keys().chain(b.files.keys()).collect();
    let differs = |path: &&&PathBuf| a.files.get(**path) != b.files.get(**path);
    let text = |path: &PathBuf| {
        format!(
            "{}: {:?} {:?}",
            path.display(),
            a.files.get(path),
            b.files.get(path)
        )
    };
    all.iter().filter(differs).map(|p| text(p)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_base_is_configured_and_the_same_twice() {
    if skipped() {
        return;
    }
    let asked = base(&[], false);
    let first = make(&asked).await;
    assert_eq!(
        first.chroot("dpkg --audit; dpkg-query -W -f '${Status}\n' | sort -u"),
        "install ok installed"
    );
    assert_eq!(first.chroot("getent passwd www-data | cut -d: -f3"), "33");
    assert!(first.has("etc/os-release") && !first.has("usr/sbin/policy-rc.d"));
    assert!(
        !first
            .files
            .keys()
            .any(|p| p.to_string_lossy().ends_with(".dpkg-new"))
    );
    assert!(first.files[Path::new("bin")].ends_with(" usr/bin"));
    let second = make_with(&asked, first.lock.clone()).await;
    assert_eq!(differences(&first, &second), [""; 0]);
    assert_eq!(first.image, second.image);
    assert_eq!(first.lock, second.lock);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_configured_and_not_started() {
    if skipped() {
        return;
    }
    let asked = base(&["redis-server", "nginx-light", "python3-minimal"], false);
    let first = make(&asked).await;
    assert_eq!(first.chroot("python3 -c 'print(6*7)'"), "42");
    assert!(first.chroot("redis-server --version").contains("v=7"));
    assert_eq!(
        first.chroot("nginx -t 2>/dev/null; stat -c %U /var/lib/redis"),
        "redis"
    );
    let second = make_with(&asked, first.lock.clone()).await;
    assert_eq!(differences(&first, &second), [""; 0]);
    assert_eq!(first.image, second.image);
}

#[tokio::test(flavor = "multi_thread")]
async fn distroless_bases_run_their_program_and_nothing_else() {
    if skipped() {
        return;
    }
    let busybox = make(&base(&["busybox-static"], true)).await;
    assert!(busybox.has("var/lib/dpkg/status.d/busybox-static") && !busybox.has("bin/sh"));
    let root = busybox.folder.path().join("upper");
    let output = Command::new("/usr/sbin/chroot")
        .arg(&root)
        .args(["/bin/busybox", "echo", "hi"])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"hi\n");

    let asked = base(&["python3-minimal", "ca-certificates"], true);
    let python = make(&asked).await;
    assert!(!python.has("usr/bin/dpkg") && !python.has("usr/bin/dash"));
    assert!(python.has("etc/ssl/certs/ca-certificates.crt"));
    let root = python.folder.path().join("upper");
    let output = Command::new("/usr/sbin/chroot")
        .arg(&root)
        .args(["/usr/bin/python3", "-c", "print(1)"])
        .output()
        .unwrap();
    assert_eq!(
        output.stdout,
        b"1\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let again = make_with(&asked, python.lock.clone()).await;
    assert_eq!(differences(&python, &again), [""; 0]);
    assert_eq!(python.image, again.image);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_suite_than_the_machines_own() {
    if skipped() {
        return;
    }
    let asked = DebianBase {
        suite: "trixie".into(),
        ..base(&["redis-server"], false)
    };
    let first = make(&asked).await;
    assert_eq!(
        first.chroot(". /etc/os-release; echo $VERSION_CODENAME"),
        "trixie"
    );
    let second = make_with(&asked, first.lock.clone()).await;
    assert_eq!(differences(&first, &second), [""; 0]);
    assert_eq!(first.image, second.image);
}

/// Where cargo put the runtime's shim, if it has been built.
fn shim() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let shim = test.parent()?.parent()?.join("kiln-shim");
    if shim.exists() {
        return Some(shim);
    }
    assert!(
        std::env::var_os("KILN_TEST_STRICT").is_none(),
        "needs kiln-shim"
    );
    eprintln!("SKIPPED: needs kiln-shim (cargo build -p kiln-runtime)");
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn kilns_own_sandbox_gives_the_same_image() {
    if skipped() {
        return;
    }
    let Some(shim) = shim() else { return };
    let root = tempfile::tempdir().unwrap();
    let config = RuntimeConfig {
        root: root.path().into(),
        shim: vec![shim.into()],
    };
    let runtime = Arc::new(Runtime::open(config).unwrap());
    let run = sandbox::runner(runtime.clone(), Arc::default());
    let asked = base(&["redis-server"], false);
    let first = make_in(&asked, Lock::default(), &*run).await;
    let second = make_with(&asked, first.lock.clone()).await;
    assert_eq!(differences(&first, &second), [""; 0]);
    assert_eq!(first.image, second.image);
}
