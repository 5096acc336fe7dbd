//! Reading compose files: a large one within this process, and the corpus with whole
//! processes, kiln's and docker compose's in turns.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_compose::{LoadOptions, resolve};

use super::Failure;
use super::table::{Row, Samples, median};
use crate::cargo::{answers, program, repository};

const SERVICES: usize = 500;
const WHOLE: &str = "config, whole process";
/// Names the program to compare with, where it is not `docker-compose` in the PATH.
const OTHER: &str = "DOCKER_COMPOSE";
/// How much faster than docker compose kiln is to be.
const BAR: f64 = 10.0;

/// Parses and resolves a project of 500 services, again and again.
pub fn large(runs: usize) -> Result<Row, Failure> {
    let text = project();
    let options = LoadOptions {
        files: vec!["/bench/compose.yaml".into()],
        folder: "/bench".into(),
        ..LoadOptions::default()
    };
    let reader = |path: &Path| match path.ends_with("compose.yaml") {
        true => Ok(text.clone().into_bytes()),
        false => Err(std::io::ErrorKind::NotFound.into()),
    };
    let mut samples = Samples::default();
    // The first one compiles the schema, once a process.
    for run in 0..=runs {
        let begun = Instant::now();
        let resolved = resolve(&options, &reader).map_err(|e| e.to_string())?;
        let taken = begun.elapsed();
        let services = resolved.project.services().count();
        if services != SERVICES {
            return Err(format!("{services} of {SERVICES} services were read").into());
        }
        if run > 0 {
            samples.add(taken);
        }
    }
    let bar = Some(Duration::from_millis(50));
    let what = format!("parse and resolve {SERVICES} services");
    Ok(Row::times(&what, "kiln", &samples, bar))
}

/// A service has what services of real files have: one in three a build, variables in most.
fn project() -> String {
    let mut text = String::from(
        "x-common: &common\n  restart: unless-stopped\n  logging: {driver: json-file, options: \
         {max-size: 10m}}\nservices:\n",
    );
    for n in 0..SERVICES {
        let _ = write!(
            text,
            "  service{n}:\n    <<: *common\n    image: example.test/team/service{n}:${{TAG:-1.{n}}}\n    \
             environment:\n      NUMBER: \"{n}\"\n      LEVEL: ${{LEVEL:-info}}\n      URL: \
             http://service{n}:${{PORT:-8080}}/\n    ports: [\"{}:8080\"]\n    \
             volumes: [\"data{n}:/data\", \"./conf/{n}:/etc/app:ro\"]\n    healthcheck:\n      \
             test: [CMD, wget, -q, \"http://localhost:8080/\"]\n      interval: 10s\n    \
             networks: [front, back]\n    deploy: {{resources: {{limits: {{memory: 256m}}}}}}\n",
            10_000 + n
        );
        if n % 3 == 0 {
            let _ = writeln!(
                text,
                "    build: {{context: ./src/{n}, args: {{A: \"{n}\"}}}}"
            );
        }
        if n > 0 {
            let _ = writeln!(
                text,
                "    depends_on: {{service{}: {{condition: service_healthy}}}}",
                n - 1
            );
        }
    }
    text.push_str("networks: {front: {}, back: {internal: true}}\nvolumes:\n");
    for n in 0..SERVICES {
        let _ = writeln!(text, "  data{n}: {{}}");
    }
    text
}

/// Docker compose, if it can be started.
pub fn other() -> Option<OsString> {
    let other = std::env::var_os(OTHER).unwrap_or("docker-compose".into());
    answers(program(&other).arg("version")).then_some(other)
}

/// `config` of every file of the corpus that docker compose accepts, kiln's and docker
/// compose's in turns. Who is not there has a row that says so.
pub fn corpus(kiln: &Path, passes: usize) -> Result<Vec<Row>, Failure> {
    let Some(files) = accepted()? else {
        let why = "there is no corpus (KILN_SHARED)";
        return Ok(vec![Row::not_run(WHOLE, "kiln", why)]);
    };
    let home = tempfile::tempdir()?;
    let other = other();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    // The first pass fills the machine's caches.
    for pass in 0..=passes {
        for file in &files {
            let mut command = program(kiln);
            command.args(["config", "--no-env-resolution", "--profile=*", "-f"]);
            let own = timed(command.arg(file), file, home.path())?;
            let own = own.ok_or_else(|| format!("kiln refuses {}", file.display()))?;
            let their = match &other {
                Some(other) => {
                    let mut compose = program(other);
                    compose.arg("-f").arg(file);
                    compose.args(["--profile=*", "config", "--no-env-resolution"]);
                    timed(&mut compose, file, home.path())?
                }
                None => None,
            };
            if pass > 0 {
                ours.push(own);
                theirs.extend(their);
            }
        }
    }
    let note = format!("{} files, {passes} times", files.len());
    let mut rows = vec![row("kiln", &ours, &note)];
    if other.is_none() {
        let why = format!("not installed; name it with {OTHER}");
        rows.push(Row::not_run(WHOLE, "docker compose", &why));
        return Ok(rows);
    }
    rows.push(row("docker compose", &theirs, &note));
    let ratio = median(&mut theirs).as_secs_f64() / median(&mut ours).as_secs_f64();
    rows.push(Row {
        what: WHOLE.into(),
        who: "docker compose / kiln".into(),
        value: format!("{ratio:.1} ×"),
        worst: String::new(),
        bar: format!("{BAR:.0} ×"),
        note: "medians; the aim is the least".into(),
    });
    Ok(rows)
}

fn row(who: &str, times: &[Duration], note: &str) -> Row {
    let mut samples = Samples::default();
    times.iter().for_each(|time| samples.add(*time));
    Row {
        note: note.into(),
        ..Row::times(WHOLE, who, &samples, None)
    }
}

/// How long it took; `None`: it did not succeed.
fn timed(command: &mut Command, file: &Path, home: &Path) -> Result<Option<Duration>, Failure> {
    command.env_clear().env("HOME", home);
    command.env("KILN_ROOT", home.join("root"));
    command.current_dir(file.parent().ok_or("a file without a folder")?);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let begun = Instant::now();
    let status = command.status()?;
    Ok(status.success().then(|| begun.elapsed()))
}

/// The corpus beside the repository, as kiln-compose's test finds it.
fn accepted() -> Result<Option<Vec<PathBuf>>, Failure> {
    let beside = repository().join("../shared");
    let shared = std::env::var_os("KILN_SHARED").map_or(beside, PathBuf::from);
    let Ok(corpus) = shared.join("compose-corpus").canonicalize() else {
        return Ok(None);
    };
    let mut files = Vec::new();
    for set in std::fs::read_dir(corpus)? {
        let set = set?.path();
        let Ok(golden) = std::fs::read_to_string(set.join("golden.jsonl")) else {
            continue;
        };
        for line in golden.lines() {
            let line: serde_json::Value = serde_json::from_str(line)?;
            if let (Some(file), Some(true)) = (line["file"].as_str(), line["ok"].as_bool()) {
                files.push(set.join("files").join(file));
            }
        }
    }
    files.sort();
    Ok(Some(files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_large_project_is_read_whole() {
        let row = large(1).map_err(|e| e.to_string());
        assert_eq!(row.map(|row| row.note), Ok("1 runs".to_owned()));
    }
}
