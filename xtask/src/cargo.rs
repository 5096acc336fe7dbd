//! Calling cargo and other programs from the repository's root.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The repository's root, wherever this was called from.
pub fn repository() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .unwrap_or_else(|| OsString::from(env!("CARGO_MANIFEST_DIR")));
    let mut root = PathBuf::from(manifest);
    root.pop();
    root
}

/// A program, at the repository's root, without input.
pub fn program(name: impl Into<OsString>) -> Command {
    let mut command = Command::new(name.into());
    command.current_dir(repository()).stdin(Stdio::null());
    for (key, _) in std::env::vars_os() {
        if is_cargos_own(&key.to_string_lossy()) {
            command.env_remove(key);
        }
    }
    command
}

/// What `cargo run` tells this program about itself. Build scripts that look at these
/// would otherwise be run again each time cargo is called from here and from a shell.
fn is_cargos_own(key: &str) -> bool {
    [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_CRATE_",
        "CARGO_BIN_",
    ]
    .iter()
    .any(|start| key.starts_with(start))
        || ["CARGO_PRIMARY_PACKAGE", "OUT_DIR"].contains(&key)
}

pub fn cargo(words: &[&str]) -> Command {
    let mut command = program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words);
    command
}

/// Is this program there and able to tell its version?
pub fn answers(command: &mut Command) -> bool {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Runs to the end, giving every line of output and errors, in order, to `on_line`.
pub fn stream(command: &mut Command, on_line: &mut dyn FnMut(&str)) -> std::io::Result<bool> {
    let (reader, writer) = std::io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    // The command holds the pipe's writing end: without this the reading never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    lines(reader, on_line)?;
    Ok(child.wait()?.success())
}

fn lines(reader: impl Read, on_line: &mut dyn FnMut(&str)) -> std::io::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        on_line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
    }
}

/// The release build.
#[cfg(any(feature = "bench", feature = "reproduce"))]
pub fn kiln() -> Result<PathBuf, String> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| repository().join("target"), PathBuf::from);
    let kiln = repository().join(target).join("release/kiln");
    match kiln.is_file() {
        true => Ok(kiln),
        false => Err(format!("{} is not built", kiln.display())),
    }
}

/// This Debian's name, so that the machine's mirrors have it.
#[cfg(any(feature = "bench", feature = "reproduce"))]
pub fn suite() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or("bookworm")
        .trim_matches('"')
        .to_owned()
}
