//! `configs` and `secrets`: contents that kiln keeps under a name, for what compose files
//! call `external`. A release takes the version that the name stands for when it is made,
//! and keeps it; `kiln up` after a change makes a new release.

use std::io::Read;
use std::path::Path;

use kiln_model::Digest;
use kiln_oci::BlobWrite;
use kiln_store::Store;
use kiln_trust::SecretStore;
use zeroize::Zeroizing;

use crate::cli::NamedCommand;
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::output;

/// As [`crate::assemble`] has it for configs in files; secrets have their own, smaller bound.
const LARGEST: u64 = 1 << 20;

/// Refs of named configs begin with this.
const CONFIG: &str = "config/";

pub fn configs(context: &Context, command: &NamedCommand) -> Result<(), Failure> {
    context.need_root()?;
    let store = context.store()?;
    match command {
        NamedCommand::Set { name, file } => {
            let value = read(file.as_deref())?;
            let written = store.write(None, &mut value.as_slice()).map_err(machine)?;
            store
                .set_ref(&format!("{CONFIG}{name}"), &written.0)
                .map_err(input)?;
            let digest = [("digest", written.0.to_string())];
            context.record("set config", name, &digest)
        }
        NamedCommand::List => list(context, named_configs(&store)?),
        NamedCommand::Remove { name } => {
            let reference = format!("{CONFIG}{name}");
            let removed = store.remove_ref(&reference).map_err(input)?;
            gone(removed, "config", name)?;
            context.record("remove config", name, &[])
        }
    }
}

pub fn secrets(context: &Context, command: &NamedCommand) -> Result<(), Failure> {
    context.need_root()?;
    let store = SecretStore::open(&context.root).map_err(machine)?;
    match command {
        NamedCommand::Set { name, file } => {
            let value = read(file.as_deref())?;
            let id = store.set(name, &value).map_err(input)?;
            context.record("set secret", name, &[("version", id.to_string())])
        }
        NamedCommand::List => list(context, store.names().map_err(machine)?),
        NamedCommand::Remove { name } => {
            gone(store.remove(name).map_err(input)?, "secret", name)?;
            context.record("remove secret", name, &[])
        }
    }
}

/// The content that an external config stands for now.
pub fn config(store: &Store, name: &str) -> Result<Digest, Failure> {
    let found = store.get_ref(&format!("{CONFIG}{name}")).map_err(input)?;
    found.ok_or_else(|| absent("config", name))
}

/// The value that an external secret stands for now.
pub fn secret(context: &Context, name: &str) -> Result<Vec<u8>, Failure> {
    let store = SecretStore::open(&context.root).map_err(machine)?;
    let id = store.get(name).map_err(input)?;
    let id = id.ok_or_else(|| absent("secret", name))?;
    std::fs::read(store.path(&id)).map_err(|e| machine(format!("the secret `{name}`: {e}")))
}

fn absent(what: &str, name: &str) -> Failure {
    let text = format!("the external {what} `{name}` is not there");
    Failure::new(Kind::Input, text).hint(format!(
        "`kiln {what}s set {name} FILE` makes it; `kiln {what}s list` shows those there are"
    ))
}

fn gone(removed: bool, what: &str, name: &str) -> Result<(), Failure> {
    match removed {
        true => Ok(()),
        false => Err(Failure::new(
            Kind::Conflict,
            format!("there is no {what} `{name}`"),
        )),
    }
}

fn named_configs(store: &Store) -> Result<Vec<(String, Digest)>, Failure> {
    let refs = store.refs(CONFIG).map_err(machine)?;
    let name = |full: &str| full.strip_prefix(CONFIG).unwrap_or(full).to_owned();
    Ok(refs.iter().map(|(n, d)| (name(n), *d)).collect())
}

fn list(context: &Context, names: Vec<(String, Digest)>) -> Result<(), Failure> {
    if context.json {
        let map: std::collections::BTreeMap<_, _> = names.into_iter().collect();
        return output::json(&map);
    }
    let rows: Vec<Vec<String>> = names
        .into_iter()
        .map(|(name, digest)| vec![name, digest.short()])
        .collect();
    output::table(&["NAME", "VERSION"], &rows);
    Ok(())
}

/// The file's content, or what standard input says.
fn read(file: Option<&Path>) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut value = Zeroizing::new(Vec::new());
    let result = match file {
        None => std::io::stdin().take(LARGEST + 1).read_to_end(&mut value),
        Some(path) => std::fs::File::open(path)
            .and_then(|file| file.take(LARGEST + 1).read_to_end(&mut value)),
    };
    let from = file.map_or("standard input".into(), |f| f.display().to_string());
    result.map_err(|e| input(format!("{from}: {e}")))?;
    if value.len() as u64 > LARGEST {
        return Err(input(format!("{from}: larger than 1 MiB")));
    }
    Ok(value)
}

fn input(error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Input, error.to_string())
}
