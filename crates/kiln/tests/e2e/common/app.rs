//! Projects whose program is `kiln_testkit::app`: nothing else is in the image, so that it
//! is there in no time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Kiln, Project};

const CONTAINERFILE: &str = "FROM scratch
COPY root /
EXPOSE 8000
ENTRYPOINT [\"/app\"]
";

/// How the program is run.
#[derive(Default)]
pub struct App<'a> {
    /// More of `environment`: each line indented by six spaces.
    pub environment: &'a str,
    /// More keys of the service `web`: each line indented by four spaces.
    pub keys: &'a str,
    /// More of the compose file.
    pub more: &'a str,
}

impl Kiln {
    /// Serves `${VERSION}` on the project's port; at first that is 1.
    pub fn app(&self, name: &str, app: &App) -> Project<'_> {
        let compose = format!(
            "services:\n  web:\n    build: .\n    ports: [\"${{PORT}}:8000\"]\n    environment:\n\
             \x20     APP_VERSION: \"${{VERSION}}\"\n{}\n{}\n{}\n",
            app.environment, app.keys, app.more
        );
        let files = [
            ("compose.yaml", compose.as_str()),
            ("Containerfile", CONTAINERFILE),
        ];
        let mut project = self.project(name, &files);
        project.set("VERSION", 1);
        let program = program();
        let root = project.folder.join("root");
        put(&program, &root.join("app"));
        for library in libraries(&program) {
            put(&library, &root.join(library.strip_prefix("/").unwrap()));
        }
        project
    }
}

fn program() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_kiln")).parent().unwrap();
    let program = beside.join("examples/app");
    assert!(program.exists(), "cargo build -p kiln --example app");
    program
}

/// Links, as the program is large; images are read and never written.
fn put(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    let from = from.canonicalize().unwrap();
    if fs::hard_link(&from, to).is_err() {
        fs::copy(from, to).unwrap();
    }
}

fn libraries(program: &Path) -> Vec<PathBuf> {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let paths = listed.split_whitespace().filter(|w| w.starts_with('/'));
    let found: Vec<PathBuf> = paths.map(PathBuf::from).collect();
    assert!(!found.is_empty(), "{listed}");
    found
}
