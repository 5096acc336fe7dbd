//! `cargo xtask reproduce`: images on Debian packages, installed as people write it, built
//! twice from nothing in other conditions, and compared.
//!
//! The second time everything is elsewhere: folder, root, host name, umask, time zone,
//! language, one processor, the images in the opposite order, later, and without network. It
//! has compose.yaml, kiln.lock, kiln.lock.d and what was fetched from the first, as another
//! machine would.
//!
//! The clock can't be set for one program, and two builds of one day don't tell what another
//! day would: so what instructions have made is also searched for today's date.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use kiln_build::build::differences;
use kiln_model::Digest;
use kiln_store::Store;
use kiln_store::tree::{ChangeKind, Kind, Tree, diff};

use crate::cargo::{kiln, program, suite};

type Failure = Box<dyn std::error::Error>;

/// What `apt-get install -y` is given; the first word names the image.
const PACKAGES: [&str; 30] = [
    "nginx",
    "redis-server",
    "postgresql",
    "mariadb-server",
    "openssh-server",
    "php-fpm",
    "dbus",
    "python3",
    "nodejs",
    "git",
    "curl ca-certificates",
    "apache2",
    "haproxy",
    "memcached",
    "rsyslog",
    "cron",
    "default-jre-headless",
    "fontconfig fonts-dejavu",
    "ssl-cert",
    "exim4-daemon-light",
    "vim",
    "locales",
    "python3-pip",
    "gcc libc6-dev",
    "ruby",
    "libwww-perl",
    "imagemagick",
    "supervisor",
    "logrotate",
    "tzdata",
];
/// What other package managers are asked for: the image's name, the packages it needs, and
/// the command.
const OTHERS: [[&str; 3]; 2] = [
    [
        "pip",
        "python3-pip",
        "pip install --break-system-packages flask==3.0.3 requests==2.32.3",
    ],
    ["npm", "npm", "npm install --global express@4.19.2"],
];
/// The share that must be the same, in percent.
const BAR: usize = 95;
/// An image's second build begins so long after its first at least: another minute.
const LATER: Duration = Duration::from_secs(61);
/// So many differing files of an image are named.
const NAMED: usize = 12;
/// Of a file that may have a date in it, so much is read.
const LOOKED_INTO: u64 = 8 << 20;

/// How the two builds differ, as wrappers around kiln.
const USUAL: &str = "umask 022; exec \"$@\"";
const OTHER: &str = "umask 077; hostname elsewhere; exec taskset -c 0 \"$@\"";

struct Package {
    name: String,
    install: String,
    /// Run after that; empty: nothing.
    then: &'static str,
    first: Option<Digest>,
    begun: Instant,
    outcome: Outcome,
}

enum Outcome {
    Same,
    /// Each file with its instruction and how.
    Differs(Vec<String>),
    Failed(String),
}

pub fn run(words: &[String]) -> ExitCode {
    match reproduce(words) {
        Ok(share) if share >= BAR => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The share of images that are the same again, in percent.
fn reproduce(words: &[String]) -> Result<usize, Failure> {
    let folder = tempfile::Builder::new()
        .prefix("kiln-reproduce-")
        .tempdir()?;
    let bed = Bed {
        kiln: kiln()?,
        one: folder.path().join("one"),
        two: folder.path().join("an other/place/that is/deeper"),
    };
    let others = OTHERS.map(|[name, ..]| name);
    let asked: Vec<&str> = match words.is_empty() {
        true => PACKAGES.into_iter().chain(others).collect(),
        false => words.iter().map(String::as_str).collect(),
    };
    let mut packages: Vec<Package> = asked.into_iter().map(Package::named).collect();
    for package in &mut packages {
        package.begun = Instant::now();
        match bed.first(package) {
            Ok(digest) => package.first = Some(digest),
            Err(error) => package.outcome = Outcome::Failed(error.to_string()),
        }
        eprintln!("{}: built in {:.0?}", package.name, package.begun.elapsed());
    }
    for package in packages.iter_mut().rev() {
        let Some(first) = package.first else {
            continue;
        };
        std::thread::sleep(LATER.saturating_sub(package.begun.elapsed()));
        let outcome = bed.second(package, &first);
        package.outcome = outcome.unwrap_or_else(|error| Outcome::Failed(error.to_string()));
        tell(package);
        if let Err(error) = tell_dates(&bed.one.join("root"), package) {
            println!("  not searched for dates: {error}");
        }
    }
    let same = packages
        .iter()
        .filter(|package| matches!(package.outcome, Outcome::Same))
        .count();
    for package in packages.iter().filter(|package| package.first.is_none()) {
        tell(package);
    }
    let share = same * 100 / packages.len().max(1);
    println!(
        "\n{same} of {} images are the same again, bit for bit ({share} %; to reach: {BAR} %)",
        packages.len()
    );
    Ok(share)
}

impl Package {
    fn named(word: &str) -> Self {
        match OTHERS.into_iter().find(|[name, ..]| *name == word) {
            Some([name, install, then]) => Self::new(name, install, then),
            None => Self::new(word.split(' ').next().unwrap_or_default(), word, ""),
        }
    }

    fn new(name: &str, install: &str, then: &'static str) -> Self {
        Self {
            name: name.replace(|c: char| !c.is_ascii_alphanumeric(), "-"),
            install: install.to_owned(),
            then,
            first: None,
            begun: Instant::now(),
            outcome: Outcome::Failed(String::new()),
        }
    }

    /// The isolated test is a job that ends at once.
    fn compose(&self) -> String {
        let then = match self.then {
            "" => String::new(),
            then => format!("        RUN {then}\n"),
        };
        format!(
            "name: reproduce\n\
             x-kiln: {{bases: {{debian: {{suite: {}, packages: [apt]}}}}}}\n\
             services:\n  {}:\n    build:\n      context: .\n      dockerfile_inline: |\n        \
             FROM debian\n        RUN apt-get update && apt-get install -y {}\n{then}    \
             command: [\"true\"]\n    deploy: {{mode: replicated-job}}\n",
            suite(),
            self.name,
            self.install
        )
    }
}

/// Where the two builds take place.
struct Bed {
    kiln: PathBuf,
    one: PathBuf,
    two: PathBuf,
}

impl Bed {
    fn first(&self, package: &Package) -> Result<Digest, Failure> {
        let project = self.one.join(&package.name);
        fs::create_dir_all(&project)?;
        fs::write(project.join("compose.yaml"), package.compose())?;
        let mut command = program("sh");
        command.args(["-c", USUAL, "sh"]).env("TZ", "UTC");
        self.build(&mut command, &project, &self.one.join("root"))
    }

    fn second(&self, package: &Package, first: &Digest) -> Result<Outcome, Failure> {
        let project = self.two.join(&package.name);
        let (before, root) = (self.one.join(&package.name), self.two.join("root"));
        fs::create_dir_all(&project)?;
        for name in ["compose.yaml", "kiln.lock"] {
            fs::copy(before.join(name), project.join(name))?;
        }
        let kept = before.join("kiln.lock.d");
        if kept.exists() {
            link_all(&kept, &project.join("kiln.lock.d"))?;
        }
        for fetched in ["network", "debian"] {
            link_all(
                &self.one.join("root/cache").join(fetched),
                &root.join("cache").join(fetched),
            )?;
        }
        let mut command = program("unshare");
        command.args(["--uts", "sh", "-c", OTHER, "sh"]);
        command.envs([("TZ", "Pacific/Kiritimati"), ("LANG", "de_DE.UTF-8")]);
        for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            command.env(name, "http://127.0.0.1:9");
        }
        let second = self.build(&mut command, &project, &root)?;
        if second == *first {
            return Ok(Outcome::Same);
        }
        let (one, two) = (Store::open(&self.one.join("root"))?, Store::open(&root)?);
        let found = differences((&one, first), (&two, &second))?;
        let told = found.iter().map(|found| {
            let why = found.why.map(|why| format!(" ({why})"));
            let (path, how, by) = (&found.path, &found.how, &found.instruction);
            format!("{path}: {how}{}: {by}", why.unwrap_or_default())
        });
        Ok(Outcome::Differs(told.collect()))
    }

    /// What `wrapper` around `kiln build` gives for the project's one service.
    fn build(&self, wrapper: &mut Command, project: &Path, root: &Path) -> Result<Digest, Failure> {
        let command = wrapper.arg(&self.kiln).args(["--json", "build"]);
        command.arg(project).env("KILN_ROOT", root);
        // A wrapper that is told to end leaves nothing behind.
        let output = command.process_group(0).output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let last: Vec<&str> = errors.lines().rev().take(NAMED).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            return Err(last.join("\n  ").into());
        }
        let release: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let services = release["services"].as_object().ok_or("no services")?;
        let service = services.values().next().ok_or("no service")?;
        let digest = service["image"]["digest"].as_str().ok_or("no digest")?;
        Ok(digest.parse()?)
    }
}

/// Files of a folder, by another name.
fn link_all(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_file() && !target.exists() {
            fs::hard_link(entry.path(), target)?;
        }
    }
    Ok(())
}

fn tell(package: &Package) {
    match &package.outcome {
        Outcome::Same => println!("{}: the same", package.name),
        Outcome::Failed(why) => println!("{}: not built:\n  {why}", package.name),
        Outcome::Differs(files) => {
            println!("{}: {} files differ", package.name, files.len());
            for file in files.iter().take(NAMED) {
                println!("  {file}");
            }
        }
    }
}

/// Names the files that the image's instructions have made and that have today's date in them.
fn tell_dates(root: &Path, package: &Package) -> Result<(), Failure> {
    let Some(digest) = &package.first else {
        return Ok(());
    };
    let dates = today()?;
    let store = Store::open(root)?;
    let image = store.image(digest)?.ok_or("the image is not there")?;
    // A base of packages is one layer.
    let base = image.layers.first().ok_or("the image has no layers")?;
    let before = store.layer_tree(&Tree::new(), &base.digest, None)?;
    let after = store.load_tree(&image.tree)?;
    for change in diff(&before, &after) {
        let (ChangeKind::Added(node) | ChangeKind::Modified { after: node, .. }) = change.kind
        else {
            continue;
        };
        let Kind::File { digest, .. } = node.kind else {
            continue;
        };
        let mut content = Vec::new();
        let object = store.open_object(&digest)?.ok_or("its content is gone")?;
        object.take(LOOKED_INTO).read_to_end(&mut content)?;
        let has = |date: &&String| {
            let date = date.as_bytes();
            content.windows(date.len()).any(|part| part == date)
        };
        if let Some(date) = dates.iter().find(has) {
            let path = String::from_utf8_lossy(&change.path).into_owned();
            println!("  /{path} has today's date in it: {date}");
        }
    }
    Ok(())
}

/// Today as programs write it.
fn today() -> Result<Vec<String>, Failure> {
    const FORMS: [&str; 5] = ["%Y-%m-%d", "%Y%m%d", "%d %b %Y", "%b %e %Y", "%a %b %e"];
    let form = |form: &&str| -> Result<String, Failure> {
        let output = program("date").args(["-u", &format!("+{form}")]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    FORMS.iter().map(form).collect()
}
