//! Compose files, merged, included and extended: the parser, the merge and the lowering.
//! The bytes are up to four files, divided by a byte that no UTF-8 has.
#![no_main]

use std::io;
use std::path::{Path, PathBuf};

use kiln_compose::{ConfigFormat, LoadOptions, lower, resolve};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 4] = ["compose.yaml", "override.yaml", "other.yaml", "a.env"];

fuzz_target!(|data: &[u8]| {
    let files: Vec<(PathBuf, &[u8])> = data
        .splitn(NAMES.len(), |byte| *byte == 0xff)
        .zip(NAMES)
        .map(|(text, name)| (Path::new("/fuzz").join(name), text))
        .collect();
    let reader = |path: &Path| -> io::Result<Vec<u8>> {
        let found = files.iter().find(|(name, _)| name == path);
        found
            .map(|(_, text)| text.to_vec())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    let options = LoadOptions {
        files: files.iter().take(2).map(|(path, _)| path.clone()).collect(),
        folder: "/fuzz".into(),
        profiles: vec!["*".into()],
        ..LoadOptions::default()
    };
    if let Ok(resolved) = resolve(&options, &reader) {
        let _ = resolved.project.config(ConfigFormat::Yaml);
        let mut sources = resolved.sources.clone();
        let _ = lower(&resolved.project, &reader, &mut sources, &[]);
    }
});
