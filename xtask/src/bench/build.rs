//! Builds with nothing known, with nothing changed, and with one file changed; whole
//! processes, with the most memory that one of them held. kiln's have the image's test in
//! them, a job that ends at once. Beside kiln, where the project asks for no network: buildah
//! where it is installed, and the docker engine that the `docker` in the PATH reaches.
//!
//! Where nothing was fetched, a folder in which nothing is stands for nothing being known: what
//! is removed keeps ext4 from making new files as quickly for some minutes, and that is not
//! what is measured.

use std::cell::Cell;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Failure;
use super::peers::{installed, said};
use super::table::{Row, Samples};
use crate::cargo::{kiln, program, suite};

/// Of files that are younger nothing is remembered.
const SETTLED: Duration = Duration::from_millis(1_100);
/// How often the memory of a process is looked at: the kernel remembers the most it was.
const LOOK: Duration = Duration::from_millis(2);

const COPY: &str = "\
FROM scratch
COPY busybox /bin/busybox
COPY files /files
CMD [\"/bin/busybox\", \"true\"]
";
const APT: &str = "\
FROM debian
RUN apt-get update && apt-get install -y --no-install-recommends nginx
COPY nginx.conf /etc/nginx/nginx.conf
COPY files /var/www/html
CMD [\"nginx\", \"-t\"]
";
const NGINX: &str = "events {}\nhttp { server { listen 8080; root /var/www/html; } }\n";

/// What is built.
struct Project {
    what: String,
    containerfile: &'static str,
    files: usize,
    /// Bytes of each.
    length: usize,
    /// Nothing known, nothing changed, one file changed; milliseconds.
    aims: [u64; 3],
    network: bool,
}

fn projects() -> [Project; 2] {
    [
        Project {
            what: "COPY of 20000 files".into(),
            containerfile: COPY,
            files: 20_000,
            // 162 MB in all.
            length: 8_100,
            aims: [1_500, 150, 300],
            network: false,
        },
        Project {
            what: "apt nginx, 200 files".into(),
            containerfile: APT,
            files: 200,
            length: 8_100,
            // What apt fetches is recorded.
            aims: [3_000, 50, 150],
            network: true,
        },
    ]
}

/// Times, and the most memory in KiB.
#[derive(Default)]
struct Measured {
    times: [Samples; 3],
    memory: u64,
}

pub fn measure(runs: usize, rows: &mut Vec<Row>) -> Result<(), Failure> {
    for project in projects() {
        let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
        let scratch = folder.path();
        let path = scratch.join("project");
        project.write(scratch, &path)?;
        let kiln = Kiln {
            program: kiln()?,
            root: Root::new(scratch.join("root")),
            project: path.clone(),
            fetched: project.network,
        };
        let measured = project.measure(&path, runs, &|| kiln.forget(), &|| kiln.build())?;
        rows.extend(project.rows("kiln", &measured, true));
        if !project.network {
            rows.extend(project.beside(scratch, &path, runs));
        }
    }
    Ok(())
}

impl Project {
    /// The same by others.
    fn beside(&self, scratch: &Path, path: &Path, runs: usize) -> Vec<Row> {
        let buildah = Buildah {
            root: Root::new(scratch.join("buildah")),
            project: path.to_owned(),
        };
        let forget = || {
            buildah.root.next();
            Ok(())
        };
        let by_buildah = installed("buildah")
            .and_then(|()| self.measure(path, runs, &forget, &|| buildah.build()));
        let docker = Docker {
            image: format!("kiln-bench-build:{}", std::process::id()),
            project: path.to_owned(),
        };
        let by_docker = docker
            .answers()
            .and_then(|()| self.measure(path, runs, &|| docker.forget(), &|| docker.build()));
        let mut rows = Vec::new();
        for (who, measured) in [("buildah", by_buildah), ("docker", by_docker)] {
            match measured {
                Ok(mut measured) => {
                    if who == "docker" {
                        // It is its engine that needs it.
                        measured.memory = 0;
                    }
                    rows.extend(self.rows(who, &measured, false));
                }
                Err(why) => rows.push(Row::not_run(&self.what, who, &why.to_string())),
            }
        }
        rows
    }

    /// `forget`: nothing is known; `build`: the command.
    fn measure(
        &self,
        path: &Path,
        runs: usize,
        forget: &dyn Fn() -> Result<(), Failure>,
        build: &dyn Fn() -> Command,
    ) -> Result<Measured, Failure> {
        let mut measured = Measured::default();
        let Measured { times, memory } = &mut measured;
        let [cold, same, one] = times;
        let mut once = |samples: &mut Samples| -> Result<(), Failure> {
            let (took, held) = watched(build())?;
            samples.add(took);
            *memory = held.max(*memory);
            Ok(())
        };
        // What it is built on and what is fetched is there from now on.
        once(&mut Samples::default())?;
        for run in 0..runs {
            forget()?;
            std::thread::sleep(SETTLED);
            once(cold)?;
            once(same)?;
            fs::write(
                file(path, run),
                format!("{run} {:?} ", Instant::now()).repeat(self.length / 50),
            )?;
            once(one)?;
        }
        Ok(measured)
    }

    fn rows(&self, who: &str, measured: &Measured, aims: bool) -> Vec<Row> {
        let names = ["cold", "nothing changed", "one file changed"];
        let each = names.iter().zip(&measured.times).zip(self.aims);
        let mut rows: Vec<Row> = each
            .map(|((name, samples), aim)| {
                let aim = aims.then_some(Duration::from_millis(aim));
                Row::times(&format!("{}, {name}", self.what), who, samples, aim)
            })
            .collect();
        if measured.memory == 0 {
            return rows;
        }
        let mib = |kib: u64| format!("{:.0} MiB", kib as f64 / 1024.0);
        rows.push(Row {
            what: format!("{}, most memory", self.what),
            who: who.into(),
            value: mib(measured.memory),
            worst: String::new(),
            bar: if aims {
                "256 MiB".into()
            } else {
                String::new()
            },
            note: "of one process".into(),
        });
        rows
    }

    /// Files like a program's own: no two the same, and they compress.
    fn write(&self, scratch: &Path, project: &Path) -> Result<(), Failure> {
        fs::create_dir_all(project)?;
        let compose = format!(
            "name: bench-build\n\
             x-kiln: {{bases: {{debian: {{suite: {}}}}}}}\n\
             services: {{built: {{build: ., deploy: {{mode: replicated-job}}}}}}\n",
            suite()
        );
        fs::write(project.join("compose.yaml"), compose)?;
        fs::write(project.join("Containerfile"), self.containerfile)?;
        fs::write(project.join("nginx.conf"), NGINX)?;
        let busybox = project.join("busybox");
        fs::copy(kiln_testkit::busybox::busybox(scratch)?, &busybox)?;
        fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755))?;
        for n in 0..self.files {
            let path = file(project, n);
            if n % 200 == 0
                && let Some(parent) = path.parent()
            {
                fs::create_dir_all(parent)?;
            }
            let mut text = String::new();
            let mut line = n;
            while text.len() < self.length {
                let value = line.wrapping_mul(2_654_435_761);
                text.push_str(&format!("let value_{line} = {value};\n"));
                line += self.files;
            }
            fs::write(path, text)?;
        }
        Ok(())
    }
}

fn file(project: &Path, n: usize) -> PathBuf {
    project.join(format!("files/{}/{n}.txt", n / 200))
}

/// A folder of which there can be a new one.
struct Root {
    path: PathBuf,
    number: Cell<usize>,
}

impl Root {
    fn new(path: PathBuf) -> Self {
        let number = Cell::new(0);
        Self { path, number }
    }

    fn path(&self) -> PathBuf {
        self.path.with_extension(self.number.get().to_string())
    }

    fn next(&self) {
        self.number.set(self.number.get() + 1);
    }
}

struct Kiln {
    program: PathBuf,
    root: Root,
    project: PathBuf,
    /// What was fetched is in the root.
    fetched: bool,
}

impl Kiln {
    fn command(&self) -> Command {
        let mut command = program(&self.program);
        command.env("KILN_ROOT", self.root.path());
        command
    }

    fn build(&self) -> Command {
        let mut command = self.command();
        command.arg("build").arg(&self.project);
        command
    }

    /// What instructions came to, and what it was made of; not what was fetched.
    fn forget(&self) -> Result<(), Failure> {
        if !self.fetched {
            self.root.next();
            return Ok(());
        }
        for name in ["steps", "context", "tests", "reasons"] {
            match fs::remove_dir_all(self.root.path().join("cache").join(name)) {
                // Of files that were just written nothing was remembered.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        let mut gc = self.command();
        gc.arg("gc");
        watched(gc).map(drop)
    }
}

struct Buildah {
    root: Root,
    project: PathBuf,
}

impl Buildah {
    fn command(&self) -> Command {
        let mut command = program("buildah");
        let root = self.root.path();
        command.arg("--root").arg(&root);
        command.arg("--runroot").arg(root.join("run"));
        command.args(["--storage-driver", "overlay"]);
        command
    }

    fn build(&self) -> Command {
        let mut command = self.command();
        command
            .args(["build", "--layers", "--isolation", "chroot", "-t", "bench"])
            .args(["--ulimit", "nofile=20000:20000"])
            .arg(&self.project);
        command
    }
}

struct Docker {
    image: String,
    project: PathBuf,
}

impl Docker {
    fn answers(&self) -> Result<(), Failure> {
        said(&program("docker").arg("info").output()?)
    }

    fn build(&self) -> Command {
        let mut command = program("docker");
        let path = self.project.join("Containerfile");
        command
            .args(["build", "--network", "host", "--tag", &self.image, "--file"])
            .args([&path, &self.project]);
        command
    }

    /// Its engine has no other folder to begin in.
    fn forget(&self) -> Result<(), Failure> {
        for words in [
            &["rmi", "--force", &self.image][..],
            &["builder", "prune", "--all", "--force"],
        ] {
            said(&program("docker").args(words).output()?)?;
        }
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // Where there is no engine there is no image.
        let _ = program("docker")
            .args(["rmi", "--force", &self.image])
            .output();
    }
}

/// Runs a program to its end: how long that took, and the most memory it held in KiB.
fn watched(mut command: Command) -> Result<(Duration, u64), Failure> {
    let said = tempfile::tempfile()?;
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone()?)
        .spawn()?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut most = 0;
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        most = held(&status).unwrap_or(most);
        std::thread::sleep(LOOK);
    };
    let took = begun.elapsed();
    match ended.success() {
        true => Ok((took, most)),
        false => {
            use std::io::{Read, Seek};
            let (mut said, mut text) = (said, String::new());
            said.rewind()?;
            said.read_to_string(&mut text)?;
            let mut lines = text.lines().rev();
            Err(lines.next().unwrap_or("it failed without a word").into())
        }
    }
}

/// `VmHWM` of proc(5).
fn held(status: &Path) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
