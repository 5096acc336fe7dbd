//! Projects of several files, from text to Spec, without a disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod carried;
mod declared;
mod refused;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_compose::{Code, Diagnostic, Environment, LoadError, LoadOptions, Loaded, load};

/// Files by path; the folder is `/p`.
struct Files(BTreeMap<PathBuf, String>);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let path = |name: &str| Path::new("/p").join(name);
        Files(
            files
                .iter()
                .map(|(name, text)| (path(name), (*text).to_owned()))
                .collect(),
        )
    }

    fn options(&self) -> LoadOptions {
        LoadOptions {
            files: vec!["/p/compose.yaml".into()],
            folder: "/p".into(),
            environment: Environment::from([("HOST".into(), "h".into())]),
            ..LoadOptions::default()
        }
    }

    fn load_with(&self, options: &LoadOptions) -> Result<Loaded, LoadError> {
        let reader = |path: &Path| -> io::Result<Vec<u8>> {
            let text = self.0.get(path).ok_or(io::ErrorKind::NotFound)?;
            Ok(text.clone().into_bytes())
        };
        load(options, &reader)
    }

    fn load(&self) -> Result<Loaded, LoadError> {
        self.load_with(&self.options())
    }
}

fn one(text: &str) -> Loaded {
    match Files::new(&[("compose.yaml", text)]).load() {
        Ok(loaded) => loaded,
        Err(error) => panic!("{error}"),
    }
}

fn errors(files: &[(&str, &str)]) -> Vec<Diagnostic> {
    let error = Files::new(files).load().expect_err("is refused");
    error.errors().cloned().collect()
}

fn codes(text: &str) -> Vec<Code> {
    errors(&[("compose.yaml", text)])
        .iter()
        .map(|d| d.code)
        .collect()
}
