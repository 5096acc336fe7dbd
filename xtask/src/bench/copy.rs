//! COPY of 20,000 files: nothing known, nothing changed, one file changed. Whole processes
//! of `kiln build`, with the image's test, which is a job that ends at once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::Failure;
use super::table::{Row, Samples};
use crate::cargo::{kiln, program};

const FILES: usize = 20_000;
/// 162 MB in all.
const LENGTH: usize = 8_100;
/// Of files that are younger nothing is remembered.
const SETTLED: Duration = Duration::from_millis(1_100);

const COMPOSE: &str = "\
name: bench-copy
services:
  copy:
    build: .
    deploy: {mode: replicated-job}
";
const CONTAINERFILE: &str = "\
FROM scratch
COPY busybox /bin/busybox
COPY files /files
CMD [\"/bin/busybox\", \"true\"]
";

pub fn rows(runs: usize) -> Result<Vec<Row>, Failure> {
    let kiln = kiln()?;
    let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
    let project = folder.path().join("project");
    write(folder.path(), &project)?;
    let build = |words: &[&str]| -> Result<Duration, Failure> {
        let mut command = program(&kiln);
        command
            .args(words)
            .env("KILN_ROOT", folder.path().join("root"));
        let begun = Instant::now();
        let output = command.stdin(Stdio::null()).output()?;
        let took = begun.elapsed();
        match output.status.success() {
            true => Ok(took),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
        }
    };
    let path = project.display().to_string();
    let all: [&str; 2] = ["build", &path];
    let (mut cold, mut same, mut one) = <(Samples, Samples, Samples)>::default();
    for run in 0..runs {
        build(&["build", "--prune"])?;
        std::thread::sleep(SETTLED);
        cold.add(build(&all)?);
        same.add(build(&all)?);
        fs::write(file(&project, run), format!("{run} ").repeat(LENGTH / 8))?;
        one.add(build(&all)?);
    }
    let bar = |millis| Some(Duration::from_millis(millis));
    let row = |what: &str, samples, millis| {
        let what = format!("COPY of {FILES} files, {what}");
        Row::times(&what, "kiln", samples, bar(millis))
    };
    Ok(vec![
        row("cold", &cold, 1_500),
        row("nothing changed", &same, 150),
        row("one file changed", &one, 300),
    ])
}

fn file(project: &Path, n: usize) -> PathBuf {
    project.join(format!("files/{}/{n}.txt", n / 200))
}

/// Files like a program's own: no two the same, and they compress.
fn write(scratch: &Path, project: &Path) -> Result<(), Failure> {
    fs::create_dir_all(project)?;
    fs::write(project.join("compose.yaml"), COMPOSE)?;
    fs::write(project.join("Containerfile"), CONTAINERFILE)?;
    let busybox = project.join("busybox");
    fs::copy(kiln_testkit::busybox::busybox(scratch)?, &busybox)?;
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755))?;
    for n in 0..FILES {
        let path = file(project, n);
        if n % 200 == 0
            && let Some(parent) = path.parent()
        {
            fs::create_dir_all(parent)?;
        }
        let mut text = String::new();
        let mut line = n;
        while text.len() < LENGTH {
            text.push_str(&format!(
                "let value_{line} = {};\n",
                line.wrapping_mul(2_654_435_761)
            ));
            line += FILES;
        }
        fs::write(path, text)?;
    }
    Ok(())
}
