//! Compose files that no one here wrote, against what `docker compose` makes of them. The
//! corpus lies beside the repository (`KILN_SHARED`, or `../shared`); without it the test
//! says that it is skipped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_compose::disk::read_file;
use kiln_compose::{Code, Environment, LoadError, LoadOptions, resolve};
use serde_json::Value as Json;

/// Files whose result differs, and why. A file that no longer differs must be taken out.
const DIFFERENCES: &[(&str, &str)] = &[(
    "pkg/e2e/fixtures/build-test/ssh/compose.yaml",
    "the file is valid; docker compose 2.40 fails to print ssh keys as JSON",
)];

/// What each error of the corpus is called here.
fn cause(error: &str) -> &'static [Code] {
    if error.contains("not found") || error.contains("no such file") {
        &[Code::File]
    } else if error.contains("cycle") || error.starts_with(" include ") {
        &[Code::Cycle]
    } else if error.contains("interpolating") {
        &[Code::Interpolation]
    } else if error.contains("MUST include") {
        &[Code::Conflict]
    } else {
        &[Code::Schema]
    }
}

fn corpus() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let shared = std::env::var_os("KILN_SHARED").map_or(beside, PathBuf::from);
    let corpus = shared.join("compose-corpus");
    // What is resolved has no `..` in it any more.
    if let Ok(corpus) = corpus.canonicalize() {
        return Some(corpus);
    }
    eprintln!(
        "SKIPPED: no corpus at {} (set KILN_SHARED)",
        corpus.display()
    );
    None
}

fn load(file: &Path) -> Result<Json, LoadError> {
    let folder = file.parent().unwrap().to_owned();
    // The golden results were made in an empty environment by a user without a home.
    let mut environment = Environment::from([("HOME".into(), "/nonexistent".into())]);
    if let Ok(bytes) = read_file(&folder.join(".env")) {
        kiln_compose::dotenv::parse(&bytes, &mut environment, &|_| None).expect(".env");
    }
    let options = LoadOptions {
        files: vec![file.to_owned()],
        folder,
        environment,
        profiles: vec!["*".into()],
        ..LoadOptions::default()
    };
    resolve(&options, &read_file).map(|resolved| resolved.project.config_json())
}

/// The first few places where two values differ.
fn differences(ours: &Json, theirs: &Json, path: &str, out: &mut Vec<String>) {
    match (ours, theirs) {
        (Json::Object(a), Json::Object(b)) => {
            let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = format!("{path}.{key}");
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => differences(a, b, &path, out),
                    (a, b) => out.push(format!("{path}: {a:?} / {b:?}")),
                }
            }
        }
        (Json::Array(a), Json::Array(b)) if a.len() == b.len() => {
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                differences(a, b, &format!("{path}[{at}]"), out);
            }
        }
        (a, b) if a == b => {}
        (Json::Number(a), Json::Number(b)) if a.as_f64() == b.as_f64() => {}
        (a, b) => out.push(format!("{path}: {a} / {b}")),
    }
}

#[test]
fn the_corpus_resolves_as_docker_compose_resolves_it() {
    let Some(corpus) = corpus() else { return };
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut failures = vec![];
    for set in ["awesome-compose", "compose-go", "docker-compose-fixtures"] {
        let files = corpus.join(set).join("files");
        let golden = std::fs::read_to_string(corpus.join(set).join("golden.jsonl")).unwrap();
        for line in golden.lines() {
            let line: Json = serde_json::from_str(line).unwrap();
            let name = line["file"].as_str().unwrap();
            let result = load(&files.join(name));
            let problem = judge(&line, result, &files);
            let known = DIFFERENCES.iter().any(|(file, _)| *file == name);
            let kind = if line["ok"] == true {
                "accepted"
            } else {
                "rejected"
            };
            let count = counts.entry(kind).or_default();
            count.1 += 1;
            match problem {
                None => {
                    count.0 += 1;
                    if known {
                        failures.push(format!(
                            "{set}/{name}: listed as different, but is the same"
                        ));
                    }
                }
                Some(_) if known => {}
                Some(problem) => failures.push(format!("{set}/{name}: {problem}")),
            }
        }
    }
    for (kind, (same, all)) in &counts {
        println!("{kind}: {same} of {all} the same");
    }
    assert!(
        failures.is_empty(),
        "{} differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn judge(line: &Json, result: Result<Json, LoadError>, files: &Path) -> Option<String> {
    match (line["ok"] == true, result) {
        (true, Ok(ours)) => {
            let text = ours
                .to_string()
                .replace(&files.display().to_string(), "/corpus");
            let ours: Json = serde_json::from_str(&text).unwrap();
            let mut out = vec![];
            differences(&ours, &line["config"], "", &mut out);
            (!out.is_empty()).then(|| out.into_iter().take(4).collect::<Vec<_>>().join("; "))
        }
        (true, Err(error)) => Some(format!("is refused: {error}")),
        (false, Ok(_)) => Some(format!(
            "is accepted; docker compose says: {}",
            line["error"]
        )),
        (false, Err(error)) => {
            let expected = cause(line["error"].as_str().unwrap_or_default());
            let same = error.errors().any(|d| expected.contains(&d.code));
            (!same).then(|| format!("other cause: {error}; docker compose: {}", line["error"]))
        }
    }
}
