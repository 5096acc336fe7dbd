//! Why an instruction is carried out although it was before: what its key is made of is
//! remembered by name when it is carried out, and compared the next time.
//!
//! # Format
//! `cache/reasons/<digest of where the instruction stands>.json`: a [`Record`]. One that is
//! lost or can't be read costs an explanation and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

use super::mounts::{Mounted, Shown};
use super::{Place, Site};
use crate::copy::Picked;
use crate::evaluate::{CopyAction, RunAction, Step};
use crate::files::shown;

const FORMAT: u32 = 1;
/// More files of one instruction are remembered as a whole.
const MAX_FILES: usize = 10_000;
/// So many names are told of a kind.
const TOLD: usize = 5;
const BEFORE: &str = "what stands before it";
const FETCHED: &str = "what it fetched";
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// What a key was made of: names for people, and a digest of each.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inputs(BTreeMap<String, String>);

#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    key: Digest,
    inputs: Inputs,
}

impl Inputs {
    fn new(before: &Digest, epoch: i64) -> Self {
        let mut inputs = Self::default();
        inputs.add(BEFORE, before);
        inputs.add(EPOCH, &epoch);
        inputs
    }

    pub(super) fn of_parts(before: &Digest, epoch: i64, parts: Vec<(String, String)>) -> Self {
        let mut inputs = Self::new(before, epoch);
        for (name, value) in parts {
            inputs.add(name, &value);
        }
        inputs
    }

    fn add(&mut self, name: impl Into<String>, value: &impl std::fmt::Debug) {
        let digest = Digest::of(format!("{value:?}")).short();
        self.0.insert(name.into(), digest);
    }

    pub(super) fn fetched(&mut self, digest: Option<&Digest>) {
        match digest {
            Some(digest) => self.add(FETCHED, digest),
            None => {
                self.0.remove(FETCHED);
            }
        }
    }

    /// What differs from `old`, in words.
    fn since(&self, old: &Self) -> String {
        let names = |of: &Self, counts: &dyn Fn(&str) -> bool| -> Vec<String> {
            let names = of.0.keys().filter(|name| counts(name));
            names.cloned().collect()
        };
        let other = |name: &str| {
            old.0
                .get(name)
                .is_some_and(|had| self.0.get(name) != Some(had))
        };
        let changed = names(self, &|name| other(name));
        let added = names(self, &|name| !old.0.contains_key(name));
        let gone = names(old, &|name| !self.0.contains_key(name));
        let all = [("changed", changed), ("new", added), ("gone", gone)];
        let told = all.into_iter().filter(|(_, names)| !names.is_empty());
        let told: Vec<String> = told.map(|(how, names)| listed(how, &names)).collect();
        told.join("; ")
    }
}

fn listed(how: &str, names: &[String]) -> String {
    let shown = names[..names.len().min(TOLD)].join(", ");
    match names.len().saturating_sub(TOLD) {
        0 => format!("{how}: {shown}"),
        more => format!("{how}: {shown} and {more} more"),
    }
}

impl Site<'_> {
    pub(super) fn folder_inputs(&self, before: &Digest, path: &str, user: &str) -> Inputs {
        let mut inputs = Inputs::new(before, self.epoch);
        inputs.add("the path", &path);
        inputs.add("the user", &user);
        inputs
    }

    pub(super) fn copy_inputs(
        &self,
        before: &Digest,
        action: &CopyAction,
        picked: &[Picked],
    ) -> Inputs {
        let mut inputs = Inputs::new(before, self.epoch);
        inputs.add("the destination", &action.destination);
        inputs.add("the owner", &action.chown);
        inputs.add("the mode", &action.chmod);
        inputs.add("its flags", &(action.unpack, action.link, action.parents));
        let count: usize = picked.iter().map(|picked| picked.items.len()).sum();
        if count > MAX_FILES {
            let mut hasher = kiln_model::Hasher::new();
            picked.iter().for_each(|p| p.hash_into(&mut hasher));
            inputs.add("its files", &hasher.finish());
            return inputs;
        }
        for one in picked {
            let name = String::from_utf8_lossy(&one.name).into_owned();
            for item in &one.items {
                let below = shown(&item.path);
                let name = format!("{name}{}", if item.path.is_empty() { "" } else { &below });
                // A folder's own time and content are those of what is in it.
                inputs.add(
                    name,
                    &(item.meta.mode, item.meta.uid, item.meta.gid, &item.shape),
                );
            }
        }
        inputs
    }

    pub(super) fn run_inputs(
        &self,
        before: &Digest,
        run: &RunAction,
        mounts: &[Mounted],
    ) -> Inputs {
        let mut inputs = Inputs::new(before, self.epoch);
        inputs.add("the command", &(&run.argv, &run.script));
        inputs.add("the folder", &run.cwd);
        inputs.add("the user", &run.user);
        inputs.add("the network", &self.network_of(run));
        inputs.add("extra_hosts", &self.hosts);
        for (name, limit) in self.ulimits {
            inputs.add(format!("the ulimit {name}"), limit);
        }
        for (name, value) in &run.env {
            inputs.add(format!("${name}"), value);
        }
        for mounted in mounts {
            let files = mounted.files.as_ref();
            let files = files.map(|(shown, path): &(Shown, String)| (shown.key(), path));
            let name = format!("the mount {}", mounted.mount.target);
            inputs.add(name, &(&mounted.mount, files));
        }
        inputs
    }
}

/// Where an instruction's inputs are remembered.
pub(super) struct Reasons {
    path: PathBuf,
}

impl Reasons {
    /// An instruction is known again by its text, its stage and its file.
    pub fn new(cache: &Path, build: &Digest, step: &Step, place: &Place<'_>) -> Self {
        let stands = format!("{build}\n{}\n{}\n{}", place.stage, place.twin, step.text);
        let name = format!("{}.json", Digest::of(stands).hex());
        Self {
            path: cache.join("reasons").join(name),
        }
    }

    /// Why `key` was not in the cache; in words.
    pub fn why(&self, key: &Digest, inputs: &Inputs) -> String {
        let known = fs::read(&self.path).ok();
        let known = known.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
        match known.filter(|record| record.format == FORMAT) {
            None => "the instruction is new here, or written otherwise".into(),
            Some(record) if record.key == *key => "its result has left the cache".into(),
            Some(record) => match inputs.since(&record.inputs) {
                // Modification times and the like.
                told if told.is_empty() => "something of its files that is not content".into(),
                told => told,
            },
        }
    }

    pub fn remember(&self, key: Digest, inputs: Inputs) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let format = FORMAT;
        let record = serde_json::to_vec(&Record {
            format,
            key,
            inputs,
        })?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        io::Write::write_all(&mut file, &record)?;
        file.persist(&self.path).map_err(|e| e.error)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(names: &[(&str, i32)]) -> Inputs {
        let mut inputs = Inputs::default();
        names
            .iter()
            .for_each(|(name, value)| inputs.add(*name, value));
        inputs
    }

    #[test]
    fn what_differs_is_named_and_long_lists_are_cut() {
        let old = inputs(&[("a", 1), ("b", 1), ("c", 1)]);
        let new = inputs(&[("a", 2), ("b", 1), ("d", 1)]);
        assert_eq!(new.since(&old), "changed: a; new: d; gone: c");
        assert_eq!(old.since(&old), "");
        let many = ["f", "g", "h", "i", "j", "k", "l"].map(|name| (name, 1));
        let told = inputs(&many).since(&inputs(&[]));
        assert_eq!(told, "new: f, g, h, i, j and 2 more");
    }
}
