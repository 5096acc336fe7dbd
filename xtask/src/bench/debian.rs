//! Debian roots composed of packages that are there already: a minimal one, beside what
//! mmdebstrap makes of the same suite where it is installed, and a distroless nginx. Whole
//! processes of `kiln lock` with a KILN_ROOT that has nothing but the package files.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::Failure;
use super::table::{Row, Samples};
use crate::cargo::{kiln, program, suite};

/// The rows' names, what is asked of the base, and the aim.
const BASES: [(&str, &str, Duration); 2] = [
    (
        "a minimal Debian root",
        "{suite: SUITE}",
        Duration::from_secs(6),
    ),
    (
        "distroless nginx",
        "{suite: SUITE, packages: [nginx-light, ca-certificates, tzdata], distroless: true}",
        Duration::from_secs(2),
    ),
];

pub fn rows(runs: usize) -> Result<Vec<Row>, Failure> {
    let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
    let suite = suite();
    let mut rows = Vec::new();
    for (number, (what, base, aim)) in BASES.into_iter().enumerate() {
        let folder = folder.path().join(number.to_string());
        rows.push(composed(
            &folder,
            what,
            &base.replace("SUITE", &suite),
            aim,
            runs,
        )?);
        if number == 0 {
            rows.push(by_mmdebstrap(&folder, what, &suite, runs)?);
        }
    }
    Ok(rows)
}

fn composed(
    folder: &Path,
    what: &str,
    base: &str,
    aim: Duration,
    runs: usize,
) -> Result<Row, Failure> {
    let project = folder.join("project");
    fs::create_dir_all(&project)?;
    let compose =
        format!("x-kiln: {{bases: {{measured: {base}}}}}\nservices: {{a: {{image: measured}}}}\n");
    fs::write(project.join("compose.yaml"), compose)?;
    let kiln = kiln()?;
    let lock = |root: &Path| -> Result<Duration, Failure> {
        let mut command = program(&kiln);
        command.arg("lock").arg(&project).env("KILN_ROOT", root);
        let begun = Instant::now();
        let output = command.stdin(Stdio::null()).output()?;
        match output.status.success() {
            true => Ok(begun.elapsed()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
        }
    };
    let first = folder.join("first");
    lock(&first)?;
    let kept = "cache/debian";
    fs::remove_dir_all(first.join(kept).join("images"))?;
    let mut samples = Samples::default();
    for run in 0..runs {
        let root = folder.join(format!("run-{run}"));
        link(&first.join(kept), &root.join(kept))?;
        samples.add(lock(&root)?);
        fs::remove_dir_all(root)?;
    }
    let lock = fs::read_to_string(project.join("kiln.lock"))?;
    let mut row = Row::times(what, "kiln", &samples, Some(aim));
    row.note += &format!(", {} packages", lock.matches("sha256").count());
    Ok(row)
}

/// The same files under other names.
fn link(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => link(&entry.path(), &target)?,
            false => fs::hard_link(entry.path(), target)?,
        }
    }
    Ok(())
}

fn by_mmdebstrap(folder: &Path, what: &str, suite: &str, runs: usize) -> Result<Row, Failure> {
    const WHO: &str = "mmdebstrap";
    if !Path::new("/usr/bin/mmdebstrap").exists() {
        return Ok(Row::not_run(what, WHO, "it is not installed"));
    }
    let mut samples = Samples::default();
    for _ in 0..runs {
        let root = folder.join(WHO);
        let mut command = program("/usr/bin/mmdebstrap");
        command.args(["--variant=minbase", suite]).arg(&root);
        let begun = Instant::now();
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            return Ok(Row::not_run(what, WHO, "it failed"));
        }
        samples.add(begun.elapsed());
        fs::remove_dir_all(root)?;
    }
    let mut row = Row::times(what, WHO, &samples, None);
    row.note += ", fetching the packages too";
    Ok(row)
}
