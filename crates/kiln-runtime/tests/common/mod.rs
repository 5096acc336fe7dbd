//! Small roots made of busybox, and specs for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_model::instance::*;
use kiln_model::spec::Logging;
use kiln_model::{InstanceId, InstanceSpec, Millis};
use kiln_runtime::log::{Record, Stream};
use kiln_runtime::{ExecIo, ExecSpec, Runtime, RuntimeConfig};

/// `false` (with a word about it) when this test can't run here.
pub fn can_run() -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| {
        use std::os::unix::fs::MetadataExt;
        m.uid() == 0
    });
    if !root {
        assert!(
            std::env::var_os("KILN_TEST_STRICT").is_none(),
            "needs root (KILN_TEST_STRICT is set)"
        );
        eprintln!("SKIPPED: needs root");
    }
    root
}

/// Debian's busybox-static, downloaded once.
pub fn busybox() -> PathBuf {
    kiln_testkit::busybox::busybox(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A kiln root of its own, removed with all its instances at the end.
pub struct Fixture {
    pub root: PathBuf,
    pub runtime: Runtime,
}

impl Fixture {
    pub fn new() -> Self {
        let name = format!(
            "kiln-rt-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let root = std::env::temp_dir().join(name);
        let runtime = Runtime::open(RuntimeConfig {
            root: root.clone(),
            shim: vec![env!("CARGO_BIN_EXE_kiln-shim").into()],
        })
        .unwrap();
        Self { root, runtime }
    }

    pub fn id(&self) -> InstanceId {
        InstanceId::new(format!("i-{}", NEXT.fetch_add(1, Ordering::Relaxed))).unwrap()
    }

    /// A folder with busybox, some files, and users.
    pub fn files(&self) -> PathBuf {
        let dir = self
            .root
            .join(format!("files-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        for sub in ["bin", "etc/ssh", "data/sub", "tmp", "var"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        std::fs::set_permissions(dir.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
        std::fs::copy(busybox(), dir.join("bin/busybox")).unwrap();
        for name in [
            "sh", "cat", "ls", "id", "sleep", "mount", "unshare", "touch", "echo", "kill", "ps",
            "httpd", "nc", "hostname", "mknod", "dd", "stat", "head", "env", "chmod", "mkdir",
            "rm", "ping", "cp", "tty", "ln", "mv", "test", "grep", "true", "chown",
        ] {
            std::os::unix::fs::symlink("busybox", dir.join("bin").join(name)).unwrap();
        }
        std::fs::write(
            dir.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(
            dir.join("etc/group"),
            "root:x:0:\nweb:x:34:\nssl:x:50:web\n",
        )
        .unwrap();
        for (identity, mode) in [("machine-id", 0o444), ("ssh/ssh_host_ed25519_key", 0o640)] {
            let path = dir.join("etc").join(identity);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(&path, None, Some(50)).unwrap();
        }
        std::fs::write(dir.join("data/file"), "from the image\n").unwrap();
        std::fs::write(dir.join("data/sub/other"), "other\n").unwrap();
        std::os::unix::fs::symlink("/tmp", dir.join("var/link")).unwrap();
        dir
    }

    /// A writable root over nothing.
    pub fn layered(&self) -> Root {
        let upper = self.files();
        Root::Layered {
            tree: None,
            work: upper.with_extension("work"),
            upper,
        }
    }

    /// An image's tree: EROFS with the contents inside, so that no object is needed.
    pub fn tree(&self) -> TreePaths {
        let files = self.files();
        let metadata = files.with_extension("erofs");
        let made = Command::new("mkfs.erofs")
            .args(["-x-1", "--quiet"])
            .arg(&metadata)
            .arg(&files)
            .output()
            .expect("mkfs.erofs (package erofs-utils)");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let objects = self.root.join("objects");
        std::fs::create_dir_all(&objects).unwrap();
        TreePaths { metadata, objects }
    }

    pub fn sealed(&self, scratch: &[(&str, bool)]) -> Root {
        Root::Sealed {
            tree: self.tree(),
            scratch: scratch
                .iter()
                .map(|(path, exec)| Scratch {
                    path: (*path).to_owned(),
                    size: 4 << 20,
                    exec: *exec,
                })
                .collect(),
        }
    }

    pub fn spec(&self, root: Root, script: &str) -> InstanceSpec {
        InstanceSpec {
            format: InstanceSpec::FORMAT,
            id: self.id(),
            purpose: Purpose::Test,
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: BTreeMap::from([("GREETING".into(), "hello".into())]),
            cwd: "/".into(),
            user: String::new(),
            group_add: vec![],
            hostname: "pot".into(),
            domainname: None,
            root,
            mounts: vec![],
            network: InstanceNetwork::Isolated,
            resolver: None,
            hosts: vec![],
            namespaces: SharedNamespaces::default(),
            security: InstanceSecurity::default(),
            limits: InstanceLimits::default(),
            stop_signal: "SIGTERM".into(),
            stop_grace: Millis(1000),
            init: false,
            tty: false,
            stdin_open: false,
            logging: Logging::default(),
        }
    }

    /// Runs to the end; gives the status and the standard output's lines (the
    /// others marked).
    pub fn run(&self, spec: &InstanceSpec) -> (ExitStatus, String) {
        let mut out = String::new();
        let cancel = std::sync::atomic::AtomicBool::new(false);
        let status = self
            .runtime
            .run_to_end(
                spec,
                &mut |stream, text| {
                    if stream != Stream::Stdout {
                        out.push_str(if stream == Stream::Stderr { "E:" } else { "S:" });
                    }
                    out.push_str(text);
                    out.push('\n');
                },
                &cancel,
            )
            .unwrap();
        (status, out)
    }

    pub fn log(&self, id: &InstanceId) -> Vec<Record> {
        let mut reader = self.runtime.log(id);
        let mut records = Vec::new();
        while let Some(record) = reader.next_record().unwrap() {
            records.push(record);
        }
        records
    }

    pub fn log_text(&self, id: &InstanceId) -> String {
        self.log(id)
            .iter()
            .map(|r| format!("{}\n", r.text))
            .collect()
    }

    /// Runs a shell script in an instance; gives the status and all output.
    pub fn exec(&self, id: &InstanceId, spec: &ExecSpec) -> (ExitStatus, String) {
        let (status, out) = self.try_exec(id, spec);
        (status.unwrap(), out)
    }

    pub fn try_exec(
        &self,
        id: &InstanceId,
        spec: &ExecSpec,
    ) -> (Result<ExitStatus, kiln_runtime::ExecError>, String) {
        let path = self
            .root
            .join(format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let file = std::fs::File::create(&path).unwrap();
        let status = self.runtime.exec(
            id,
            spec,
            ExecIo {
                stdin: std::fs::File::open("/dev/null").unwrap().into(),
                stdout: file.try_clone().unwrap().into(),
                stderr: file.into(),
            },
        );
        (status, std::fs::read_to_string(&path).unwrap())
    }
}

pub fn sh(script: &str) -> ExecSpec {
    ExecSpec {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        ..ExecSpec::default()
    }
}

/// Waits until `done` says so.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < end, "{what}: not within 10 s");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Control groups of a kiln root, in every hierarchy.
pub fn groups_of(root: &Path) -> Vec<PathBuf> {
    let name = format!("kiln-{}", kiln_runtime::net::root_tag(root));
    let below = |dir: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect()
    };
    let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
    hierarchies.extend(below(Path::new("/sys/fs/cgroup")));
    hierarchies
        .iter()
        .map(|h| h.join(&name))
        .filter(|p| p.exists())
        .collect()
}

/// Mounts of this process's namespace below a folder.
pub fn mounts_below(root: &Path) -> Vec<String> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|l| l.contains(&root.display().to_string()))
        .map(str::to_owned)
        .collect()
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for observed in self.runtime.list() {
            let _ = self.runtime.remove(&observed.id);
        }
        let left = mounts_below(&self.root);
        let groups = groups_of(&self.root);
        let _ = std::fs::remove_dir_all(&self.root);
        if !std::thread::panicking() {
            assert!(left.is_empty(), "mounts left: {left:?}");
            assert!(groups.is_empty(), "groups left: {groups:?}");
        }
    }
}
