//! What compilers write into programs: Go's build information, and the list that
//! cargo-auditable adds.

use std::io::{self, Read, Seek};

use serde_json::Value;

use super::elf::{self, Section};
use super::{Ecosystem, Said};

/// Of either section; the largest programs have some hundred KB.
const MAX_SECTION: u64 = 8 << 20;
/// Go's section begins with it; strings follow from the 33rd byte on if bit 1 of the 16th is
/// set (Go 1.18 and later; `debug/buildinfo`).
const GO: &[u8] = b"\xff Go buildinf:";
const GO_STRINGS: usize = 32;
/// Before and after the modules, so that tools find them in any file.
const GO_MARK: usize = 16;

pub(super) fn packages(file: &mut (impl Read + Seek)) -> io::Result<Vec<Said>> {
    let Some([go, rust]) = elf::sections(file, [".go.buildinfo", ".dep-v0"])? else {
        return Ok(Vec::new());
    };
    let mut said = Vec::new();
    if let Some(bytes) = bounded(file, go, ".go.buildinfo")? {
        said.extend(golang(&bytes));
    }
    if let Some(bytes) = bounded(file, rust, ".dep-v0")? {
        said.extend(auditable(&bytes)?);
    }
    Ok(said)
}

fn bounded(
    file: &mut (impl Read + Seek),
    section: Option<Section>,
    name: &str,
) -> io::Result<Option<Vec<u8>>> {
    match section {
        None => Ok(None),
        Some(section) if section.size > MAX_SECTION => {
            let why = format!("its section {name} has {} bytes", section.size);
            Err(io::Error::other(why))
        }
        Some(section) => elf::content(file, section).map(Some),
    }
}

/// Older programs only point to the strings, and tell nothing here.
fn golang(bytes: &[u8]) -> Vec<Said> {
    let inline = bytes.get(15).is_some_and(|flags| flags & 2 != 0);
    if !bytes.starts_with(GO) || !inline {
        return Vec::new();
    }
    let mut rest = bytes.get(GO_STRINGS..).unwrap_or_default();
    let (Some(version), Some(modules)) = (go_string(&mut rest), go_string(&mut rest)) else {
        return Vec::new();
    };
    let version = String::from_utf8_lossy(version);
    let mut all = vec![Said::new(
        Ecosystem::Golang,
        "stdlib",
        version
            .trim_start_matches("go")
            .split(' ')
            .next()
            .unwrap_or_default(),
    )];
    let inner = modules.len().checked_sub(GO_MARK);
    let modules = inner
        .and_then(|end| modules.get(GO_MARK..end))
        .unwrap_or_default();
    for line in String::from_utf8_lossy(modules).lines() {
        let mut words = line.split('\t');
        let (kind, name, version) = (words.next(), words.next(), words.next());
        match (kind, name) {
            (Some("mod" | "dep"), Some(name)) => {
                all.push(Said::new(
                    Ecosystem::Golang,
                    name,
                    version.unwrap_or_default(),
                ));
            }
            // What stands in the place of the one before.
            (Some("=>"), Some(name)) => {
                all.pop();
                all.push(Said::new(
                    Ecosystem::Golang,
                    name,
                    version.unwrap_or_default(),
                ));
            }
            _ => {}
        }
    }
    all
}

/// A length as a varint, and so many bytes.
fn go_string<'b>(rest: &mut &'b [u8]) -> Option<&'b [u8]> {
    let mut length = 0usize;
    for shift in (0..63).step_by(7) {
        let (first, after) = rest.split_first()?;
        *rest = after;
        length |= usize::from(first & 0x7f).checked_shl(shift)?;
        if first & 0x80 == 0 {
            let (text, after) = rest.split_at_checked(length)?;
            *rest = after;
            return Some(text);
        }
    }
    None
}

/// Compressed JSON: `packages`, each with a name and version.
fn auditable(bytes: &[u8]) -> io::Result<Vec<Said>> {
    let mut text = Vec::new();
    let decoder = flate2::read::ZlibDecoder::new(bytes);
    decoder.take(MAX_SECTION).read_to_end(&mut text)?;
    let value: Value = serde_json::from_slice(&text)?;
    let packages = value.get("packages").and_then(Value::as_array);
    let said = packages.into_iter().flatten().filter_map(|package| {
        let get = |name: &str| package.get(name).and_then(Value::as_str);
        Some(Said::new(Ecosystem::Cargo, get("name")?, get("version")?))
    });
    Ok(said.collect())
}
