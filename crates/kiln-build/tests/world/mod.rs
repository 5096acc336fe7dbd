//! Whole builds: real folders, a real store, and (as root) real sandboxes.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use kiln_build::build::{BuildRequest, Builder, prepare};
use kiln_build::debian::{self, Asked, DebianContext, Machine, sandbox};
use kiln_build::lock::Lock;
use kiln_build::network::{Network, host_resolver};
use kiln_build::resolve;
use kiln_build::test::{TestRequest, Tester};
use kiln_model::instance::{InstanceLimits, InstanceSecurity, Resolver};
use kiln_model::progress::{Finish, Silent};
use kiln_model::spec::{Build, DebianBase};
use kiln_model::{Digest, Millis, Progress, ProgressEvent};
use kiln_oci::registry::{Client, CredentialSources, Options};
use kiln_runtime::{Runtime, RuntimeConfig};
use kiln_store::Store;
use kiln_store::tree::{Kind, Tree};

/// Remembers every event.
#[derive(Default)]
pub struct Seen(Mutex<Vec<ProgressEvent>>);

impl Progress for Seen {
    fn event(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Seen {
    /// All that was told since the last time.
    pub fn take(&self) -> Vec<ProgressEvent> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    /// How many steps came from the cache, and how many were carried out.
    pub fn counts(&self) -> (usize, usize) {
        let events = std::mem::take(&mut *self.0.lock().unwrap());
        let count = |wanted: Finish| {
            let is = |e: &&ProgressEvent| matches!(e, ProgressEvent::Finished { how, .. } if *how == wanted);
            events.iter().filter(is).count()
        };
        (count(Finish::Cached), count(Finish::Done))
    }

    /// Why steps were carried out, in their order.
    pub fn reasons(&self) -> Vec<String> {
        let events = std::mem::take(&mut *self.0.lock().unwrap());
        let why = |event| match event {
            ProgressEvent::Explained { why, .. } => Some(why),
            _ => None,
        };
        events.into_iter().filter_map(why).collect()
    }
}

impl Seen {
    /// Everything, as `--progress json` has it.
    pub fn all(&self) -> String {
        let events = std::mem::take(&mut *self.0.lock().unwrap());
        let lines = events
            .iter()
            .map(|event| serde_json::to_string(event).unwrap());
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What people were told to mind.
    pub fn warnings(&self) -> Vec<String> {
        let events = std::mem::take(&mut *self.0.lock().unwrap());
        let text = |event| match event {
            ProgressEvent::Warning { text, .. } => Some(text),
            _ => None,
        };
        events.into_iter().filter_map(text).collect()
    }
}

pub struct World {
    pub root: tempfile::TempDir,
    pub builder: Builder,
    pub seen: Arc<Seen>,
    /// What references stand for.
    pub images: Mutex<BTreeMap<String, Digest>>,
}

fn shim() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("kiln-shim")
}

/// What is in the working folders of what is built in a root.
pub fn working(root: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let found = fs::read_dir(folder).into_iter().flatten().flatten();
        found.map(|entry| entry.path()).collect()
    };
    let is_apart = |path: &PathBuf| path.to_string_lossy().contains("/apart-");
    let (apart, mut found): (Vec<_>, Vec<_>) = entries(&root.join("cache/run"))
        .into_iter()
        .partition(is_apart);
    found.extend(apart.iter().flat_map(|folder| entries(folder)));
    found
}

/// False, and a word about it, where sandboxes can't be made.
pub fn sandboxes() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    let why = match (root, shim().exists()) {
        (true, true) => return true,
        (false, _) => "needs root",
        (true, false) => "needs kiln-shim: cargo build -p kiln-runtime",
    };
    assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "{why}");
    eprintln!("SKIPPED: {why}");
    false
}

pub fn world() -> World {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let seen = Arc::new(Seen::default());
    let builder = builder(root.path(), seen.clone(), host_resolver());
    World {
        root,
        builder,
        seen,
        images: Mutex::default(),
    }
}

/// As one process has it.
pub fn builder(root: &Path, seen: Arc<Seen>, resolver: Resolver) -> Builder {
    let runtime = Runtime::open(RuntimeConfig {
        root: root.to_owned(),
        shim: vec![shim().into()],
    });
    let cache = root.join("cache");
    Builder {
        store: Arc::new(Store::open(root).unwrap()),
        runtime: Arc::new(runtime.unwrap()),
        progress: seen,
        network: Arc::new(Network::new(root, &cache, resolver)),
        fetches: Builder::fetches(&cache),
        registry: Arc::new(Client::new(Options::default()).unwrap()),
        cache,
    }
}

impl World {
    pub fn tester(&self) -> Tester {
        Tester {
            store: self.builder.store.clone(),
            runtime: self.builder.runtime.clone(),
            cache: self.builder.cache.clone(),
        }
    }

    pub fn build(&self, context: &Path, file: &str) -> Result<Digest, String> {
        self.build_with(context, file, |_| {})
    }

    pub fn request(&self, context: &Path, file: &str) -> BuildRequest {
        BuildRequest {
            build: Build {
                context: context.to_owned(),
                inline: Some(file.to_owned()),
                network: "none".into(),
                ..Build::default()
            },
            name: "app".into(),
            platform: kiln_oci::platform::host_platform(),
            secrets: BTreeMap::from([("key".to_owned(), b"hush".to_vec())]),
            epoch: 0,
            ssh: BTreeMap::new(),
            pins: Arc::default(),
            recordings: Arc::default(),
            live: false,
            allowed: Arc::default(),
            results: Arc::default(),
            cancel: Arc::new(AtomicBool::new(false)),
        }
    }

    pub fn build_with(
        &self,
        context: &Path,
        file: &str,
        change: impl FnOnce(&mut BuildRequest),
    ) -> Result<Digest, String> {
        let mut request = self.request(context, file);
        change(&mut request);
        let mut prepared = prepare(request).map_err(|e| chain(&e))?;
        let mut images = BTreeMap::new();
        loop {
            let missing = self.builder.missing(&mut prepared, &images);
            let missing = missing.map_err(|e| chain(&e))?;
            if missing.is_empty() {
                break;
            }
            for wanted in missing {
                let name = &wanted.reference;
                let digest = self.images.lock().unwrap().get(name).copied();
                let digest = digest.ok_or_else(|| format!("the image {name} is not there"))?;
                images.insert(wanted, digest);
            }
        }
        self.builder
            .carry_out(&prepared, &images)
            .map_err(|e| chain(&e))
    }

    pub fn tree(&self, manifest: &Digest) -> Tree {
        let image = self.builder.store.image(manifest).unwrap().unwrap();
        self.builder.store.load_tree(&image.tree).unwrap()
    }

    pub fn text(&self, manifest: &Digest, path: &str) -> String {
        match &self
            .tree(manifest)
            .get(path)
            .unwrap_or_else(|| panic!("{path}"))
            .kind
        {
            Kind::File { digest, .. } => {
                let path = self.builder.store.object_path(digest);
                fs::read_to_string(path).unwrap()
            }
            other => panic!("{path}: {other:?}"),
        }
    }
}

pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

pub fn context(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

/// A context with Debian's static busybox, and a Containerfile's first lines with it.
pub fn busybox() -> (tempfile::TempDir, String) {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = kiln_testkit::busybox::busybox(kept).unwrap();
    let folder = context(&[("f", "from context")]);
    fs::copy(program, folder.path().join("busybox")).unwrap();
    let busybox = folder.path().join("busybox");
    fs::set_permissions(busybox, fs::Permissions::from_mode(0o755)).unwrap();
    let text = "FROM scratch AS base\nCOPY busybox /bin/busybox\n\
                RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n\
                COPY <<E /etc/passwd\nroot:x:0:0::/root:/bin/sh\nweb:x:33:33::/home/web:/bin/sh\nE\n";
    (folder, text.to_owned())
}

/// Puts an image of this base into the world's store under the name `root`.
pub async fn compose(world: &World, base: &DebianBase) -> Digest {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let platform = kiln_oci::host_platform();
    let context = DebianContext {
        blobs: world.builder.store.clone(),
        run_scripts: sandbox::runner(world.builder.runtime.clone(), Arc::default()),
        cache: Path::new(env!("CARGO_TARGET_TMPDIR")).join("apt-cache"),
        client: kiln_build::http_client().unwrap(),
        progress: Arc::new(Silent),
        epoch: 0,
        machine: Machine {
            root: "/".into(),
            now: now.unwrap().as_secs(),
            arch: debian::architecture(&platform).unwrap().into(),
        },
    };
    let asked = Asked {
        name: "root",
        base,
        mirror: None,
    };
    let mut lock = Lock::default();
    let composed = debian::compose(&context, &asked, &mut lock).await.unwrap();
    let manifest = composed.image.manifest;
    world.builder.store.add_image(&manifest).unwrap();
    let images = &mut world.images.lock().unwrap();
    images.insert("root".into(), manifest);
    manifest
}

/// A test of a program, as a service alone.
pub fn request(image: Digest, command: &str) -> TestRequest {
    TestRequest {
        name: "app".into(),
        image,
        argv: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]),
        cwd: "/".into(),
        user: "0".into(),
        group_add: Vec::new(),
        stop_signal: "SIGTERM".into(),
        stop_grace: Millis(500),
        init: false,
        mounts: Vec::new(),
        volumes: vec!["/data".into()],
        security: InstanceSecurity::default(),
        limits: InstanceLimits::default(),
        healthcheck: None,
        shell: Vec::new(),
        checks: Vec::new(),
        suites: BTreeMap::new(),
        post_start: Vec::new(),
        completes: false,
        peers: false,
        hosts: Vec::new(),
        settle: Millis(300),
    }
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap().as_secs()
}

/// What finds images for a world's store; no script of a package's is run.
pub fn resolver(world: &World, bases: BTreeMap<String, DebianBase>) -> resolve::Resolver {
    let platform = kiln_oci::host_platform();
    resolve::Resolver {
        store: world.builder.store.clone(),
        debian: DebianContext {
            blobs: world.builder.store.clone(),
            run_scripts: Arc::new(|_, _| panic!("nothing is run")),
            cache: world.builder.cache.clone(),
            client: kiln_build::http_client().unwrap(),
            progress: Arc::new(Silent),
            epoch: 0,
            machine: Machine {
                root: "/".into(),
                now: 0,
                arch: debian::architecture(&platform).unwrap().into(),
            },
        },
        registry: Arc::new(
            Client::new(Options {
                credentials: CredentialSources::default(),
                ..Options::default()
            })
            .unwrap(),
        ),
        platform: platform.parse().unwrap(),
        bases,
        mirror: None,
        folder: world.root.path().to_owned(),
        progress: Arc::new(Silent),
        allowed: Arc::default(),
    }
}
