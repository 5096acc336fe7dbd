//! Texts that package managers leave: which files they are, and what they say. Pure.

use kiln_store::tree::Tree;
use serde_json::Value;

use super::{Ecosystem, Said};
use crate::debian::deb822;

/// Reads one manifest: its path, its content.
pub(super) type Reader = fn(&str, &[u8]) -> Result<Vec<Said>, String>;

/// Who reads the file at `path` (without a `/` before it); `None`: it is no manifest.
pub(super) fn reader(path: &str, tree: &Tree) -> Option<Reader> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let last = folder.rsplit('/').next().unwrap_or_default();
    match (folder, last, name) {
        ("var/lib/dpkg", _, "status") => Some(dpkg),
        ("var/lib/dpkg/status.d", _, name) if !name.ends_with(".md5sums") => Some(dpkg),
        ("lib/apk/db" | "usr/lib/apk/db", _, "installed") => Some(apk),
        (_, last, "METADATA") if last.ends_with(".dist-info") => Some(python),
        (_, last, "PKG-INFO") if last.ends_with(".egg-info") => Some(python),
        (_, _, name) if name.ends_with(".egg-info") => Some(python),
        (_, _, "package.json") if is_installed(folder) => Some(npm),
        (folder, _, "package-lock.json") => {
            let installed = match folder {
                "" => "node_modules".to_owned(),
                folder => format!("{folder}/node_modules"),
            };
            // What is installed says more than what would be.
            tree.get(installed).is_none().then_some(npm_lock as Reader)
        }
        (_, _, "Cargo.lock") => Some(cargo_lock),
        (_, "specifications" | "default", name) if name.ends_with(".gemspec") => Some(gem),
        _ => None,
    }
}

/// `…/node_modules/name` or `…/node_modules/@scope/name`.
fn is_installed(folder: &str) -> bool {
    let mut parts = folder.rsplit('/');
    let (_, above) = (parts.next(), parts.next().unwrap_or_default());
    above == "node_modules" || (above.starts_with('@') && parts.next() == Some("node_modules"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn dpkg(path: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let text = text(bytes);
    let mut all = Vec::new();
    for stanza in deb822::stanzas(&text) {
        let get = |name: &str| stanza.get(name).unwrap_or_default();
        // A file of status.d is there because the package is.
        let installed = path.ends_with("/status").then(|| get("Status"));
        if installed.is_some_and(|state| !state.ends_with(" installed")) {
            continue;
        }
        let mut said = Said::new(Ecosystem::Deb, get("Package"), get("Version"));
        said.architecture = stanza.get("Architecture").map(str::to_owned);
        said.source = stanza.get("Source").map(|source| {
            // `name`, or `name (version)`.
            let source = source.replace(['(', ')'], "");
            source.split_whitespace().collect::<Vec<_>>().join(" ")
        });
        all.push(said);
    }
    Ok(all)
}

/// One letter, a colon, a value; a blank line ends a package (apk-installed(5)).
fn apk(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let text = text(bytes);
    let mut all = Vec::new();
    for stanza in text.split("\n\n") {
        let get = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        let Some(name) = get("P:") else { continue };
        let mut said = Said::new(Ecosystem::Apk, name, get("V:").unwrap_or_default());
        said.architecture = get("A:").map(str::to_owned);
        said.source = get("o:")
            .filter(|origin| *origin != name)
            .map(str::to_owned);
        all.push(said);
    }
    Ok(all)
}

/// The headers of a METADATA file (core metadata): up to the first blank line.
fn python(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let text = text(bytes);
    let headers = text.lines().take_while(|line| !line.trim().is_empty());
    let headers: Vec<(&str, &str)> = headers.filter_map(|line| line.split_once(": ")).collect();
    let get = |name: &str| {
        let found = headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| *value)
    };
    match get("Name") {
        Some(name) => Ok(vec![Said::new(
            Ecosystem::Pypi,
            name,
            get("Version").unwrap_or_default(),
        )]),
        None => Err("it has no Name".into()),
    }
}

fn json(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|cause| format!("it is no JSON: {cause}"))
}

/// An installed package; a package.json without a name only says what kind of modules it is.
fn npm(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let value = json(bytes)?;
    let get = |name: &str| value.get(name).and_then(Value::as_str);
    let said = get("name").map(|name| {
        let version = get("version").unwrap_or_default();
        Said::new(Ecosystem::Npm, name, version)
    });
    Ok(said.into_iter().collect())
}

fn npm_lock(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let value = json(bytes)?;
    let Some(packages) = value.get("packages").and_then(Value::as_object) else {
        return Err("it has no `packages`: npm 7 and later write them".into());
    };
    let said = packages.iter().filter_map(|(path, package)| {
        // The key "" is the project itself.
        let name = path.rsplit_once("node_modules/").map(|(_, name)| name)?;
        let name = package.get("name").and_then(Value::as_str).unwrap_or(name);
        let version = package.get("version")?.as_str()?;
        Some(Said::new(Ecosystem::Npm, name, version))
    });
    Ok(said.collect())
}

/// The lines of each `[[package]]`; cargo writes no other form.
fn cargo_lock(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let text = text(bytes);
    let said = text.split("[[package]]").skip(1).map(|package| {
        let get = |name: &str| {
            let value = package.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == name).then(|| value.trim().trim_matches('"'))
            });
            value.unwrap_or_default()
        };
        Said::new(Ecosystem::Cargo, get("name"), get("version"))
    });
    Ok(said.collect())
}

/// `s.name = "rack".freeze` and the like, as RubyGems writes them.
fn gem(_: &str, bytes: &[u8]) -> Result<Vec<Said>, String> {
    let text = text(bytes);
    let get = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.trim().split_once('=')?;
            if key.trim() != format!("s.{name}") {
                return None;
            }
            value.split('"').nth(1)
        })
    };
    match (get("name"), get("version")) {
        (Some(name), Some(version)) => Ok(vec![Said::new(Ecosystem::Gem, name, version)]),
        _ => Err("it says no name and version in RubyGems' own way".into()),
    }
}
