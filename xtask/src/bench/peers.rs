//! The same start with other people's programs, where they can be run.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Failure;
use super::table::{Row, Samples};
use crate::cargo::program;

const WHAT: &str = "instance start to first byte";
const PRINT: [&str; 3] = ["/bin/busybox", "echo", "x"];

type Measure = fn(usize) -> Result<Samples, Failure>;

/// A row for each, also for those that can't be run.
pub fn first_byte(runs: usize) -> Vec<Row> {
    let rows: [(&str, Measure); 4] = [
        ("crun", |runs| bundle("crun", runs)),
        ("runc", |runs| bundle("runc", runs)),
        ("podman", podman),
        ("docker", docker),
    ];
    rows.into_iter()
        .map(
            |(who, measure)| match installed(who).and_then(|()| measure(runs)) {
                Ok(samples) => Row::times(WHAT, who, &samples, None),
                Err(why) => Row::not_run(WHAT, who, &why.to_string()),
            },
        )
        .collect()
}

pub fn installed(name: &str) -> Result<(), Failure> {
    match program(name).arg("--version").output() {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("{name} is not installed").into()),
    }
}

/// A root file system with one static program, which others must be able to enter.
pub fn root(folder: &Path) -> Result<PathBuf, Failure> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|path| Path::new(path).exists());
    let busybox = busybox.ok_or("busybox-static is not installed")?;
    let root = folder.join("rootfs");
    for name in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    Ok(root)
}

/// Programs that take an OCI runtime bundle.
fn bundle(name: &str, runs: usize) -> Result<Samples, Failure> {
    let folder = tempfile::tempdir()?;
    root(folder.path())?;
    let made = program(name)
        .arg("spec")
        .current_dir(folder.path())
        .output()?;
    said(&made)?;
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = PRINT.to_vec().into();
    fs::write(&path, config.to_string())?;
    sample(runs, |run| {
        let mut command = program(name);
        let id = format!("kiln-bench-{}-{run}", std::process::id());
        command.args(["run", "--bundle"]).arg(folder.path()).arg(id);
        command
    })
}

fn podman(runs: usize) -> Result<Samples, Failure> {
    let folder = tempfile::tempdir()?;
    let root = root(folder.path())?;
    sample(runs, |_| {
        let mut command = program("podman");
        command
            .args(["run", "--rm", "--network=none", "--rootfs"])
            .arg(&root)
            .args(PRINT);
        command
    })
}

/// Makes an image of a folder.
pub fn import(root: &Path, archive: &Path, image: &str) -> Result<(), Failure> {
    let mut tar = program("tar");
    tar.arg("-C").arg(root).arg("-cf").arg(archive).arg(".");
    said(&tar.output()?)?;
    let mut import = program("docker");
    import.arg("import").arg(archive).arg(image);
    said(&import.output()?)
}

fn docker(runs: usize) -> Result<Samples, Failure> {
    said(&program("docker").arg("info").output()?)?;
    let folder = tempfile::tempdir()?;
    let root = root(folder.path())?;
    let image = format!("kiln-bench:{}", std::process::id());
    import(&root, &folder.path().join("root.tar"), &image)?;
    let samples = sample(runs, |_| {
        let mut command = program("docker");
        command
            .args(["run", "--rm", "--network=none", &image])
            .args(PRINT);
        command
    });
    said(&program("docker").args(["rmi", &image]).output()?)?;
    samples
}

/// From starting the command to the first byte on its stdout; the first run is left out.
fn sample(runs: usize, command: impl Fn(usize) -> Command) -> Result<Samples, Failure> {
    let mut samples = Samples::default();
    for run in 0..=runs {
        let taken = once(&mut command(run))?;
        if run > 0 {
            samples.add(taken);
        }
    }
    Ok(samples)
}

fn once(command: &mut Command) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdout = child.stdout.take().ok_or("no stdout")?;
    let read = stdout.read(&mut [0; 1])?;
    let taken = begun.elapsed();
    drop(stdout);
    let output = child.wait_with_output()?;
    if read == 0 {
        said(&output)?;
        return Err("it printed nothing".into());
    }
    Ok(taken)
}

/// The last line of what a program that failed has said.
pub fn said(output: &std::process::Output) -> Result<(), Failure> {
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    Err(line
        .map_or_else(|| output.status.to_string(), |line| line.trim().to_owned())
        .into())
}
