//! Nothing secret, and nothing of one machine, goes into an image: what each instruction
//! adds is looked through when its layer is made, and what the target's instructions added
//! is judged when the image is put together. What an image is built on was another build's.
//!
//! Private keys, tokens of known shapes, files that hold logins or hashes of passwords,
//! passwords in commands, the build's own secrets, and variables that are secret by name
//! refuse the image. What a RUN made to tell this machine from others
//! ([`kiln_model::identity`]) is in the image as an empty file, which the runtime fills for
//! each instance; that is only told.
//!
//! Passed over: what a package manager has installed outside of `/etc` (whoever wants it
//! can fetch it, test keys included), and tests within packages of languages.
//!
//! Findings are remembered with an instruction's result, and of composed bases in
//! `cache/scans/<manifest>.json`.
//!
//! Invariant: a finding says kind and place, never the secret.

mod commands;
mod credentials;
mod instruction;
mod keys;
mod packages;
mod scan;

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::containerfile::Span;
use crate::context::glob::{BadPattern, Glob};
pub(crate) use instruction::{in_instruction, in_labels};
pub use scan::{Given, Look};
pub(crate) use scan::{LOOKED_INTO, in_tree, is_new, judged};

/// What kinds of the build's own secrets begin with.
const GIVEN: &str = "the build's secret ";

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// `/path`, a variable's name, or `instruction:` and the short digest of its text: what
    /// `x-kiln.allow_secrets` names it by.
    pub place: String,
    pub kind: String,
    /// It is empty in the image, and made for each instance.
    pub made_anew: bool,
}

impl Finding {
    fn new(place: impl Into<String>, kind: impl Into<String>) -> Self {
        Self {
            place: place.into(),
            kind: kind.into(),
            made_anew: false,
        }
    }

    /// One that the build itself was given.
    pub(crate) fn given(place: impl Into<String>, id: &str) -> Self {
        Self::new(place, format!("{GIVEN}`{id}`"))
    }

    pub(crate) fn is_given(&self) -> bool {
        self.kind.starts_with(GIVEN)
    }

    pub(crate) fn told_anew(&self) -> String {
        let Self { place, kind, .. } = self;
        format!("{place} ({kind}) is empty in the image; each instance gets its own")
    }

    pub(crate) fn told_allowed(&self) -> String {
        let Self { place, kind, .. } = self;
        format!("{place} ({kind}) is in the image, as x-kiln.allow_secrets says")
    }
}

/// A finding, and which instruction brought it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    pub finding: Finding,
    pub span: Span,
    /// `COPY`, `RUN` …
    pub instruction: String,
}

/// What is not to be in an image; never empty.
#[derive(Debug)]
pub struct Refused {
    pub file: String,
    pub findings: Vec<Located>,
}

/// How to go on, for people.
pub const HINT: &str = "what a step needs but the image must not hold: `RUN --mount=type=secret` \
     and `build.secrets`; what a service needs: `secrets`; what is no secret: its name under \
     `x-kiln.allow_secrets`, as `/path`, a pattern, or the variable's name";

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the image would hold what is secret, or of this machine:")?;
        for found in &self.findings {
            let Finding { place, kind, .. } = &found.finding;
            write!(f, "\n  {}: ", self.file)?;
            if found.span != Span::default() {
                write!(f, "{}: ", found.span)?;
            }
            write!(f, "{}: {place}: {kind}", found.instruction)?;
        }
        Ok(())
    }
}

/// `x-kiln.allow_secrets`: what is no secret, or is meant to be in the image.
#[derive(Default)]
pub struct Allowed {
    patterns: Vec<(String, Glob)>,
    used: Mutex<BTreeSet<usize>>,
}

impl Allowed {
    /// Patterns as in a `.dockerignore` (a path begins with `/`), or names of variables.
    pub fn new(patterns: &[String]) -> Result<Self, BadPattern> {
        let compile = |text: &String| Ok((text.clone(), Glob::ignore(text)?));
        Ok(Self {
            patterns: patterns.iter().map(compile).collect::<Result<_, _>>()?,
            used: Mutex::default(),
        })
    }

    pub fn allows(&self, finding: &Finding) -> bool {
        let fits = |(_, glob): &(String, Glob)| glob.matches(&finding.place);
        let Some(first) = self.patterns.iter().position(fits) else {
            return false;
        };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(first);
        true
    }

    /// The patterns that something was found for, and the others.
    pub fn used(&self) -> (Vec<&str>, Vec<&str>) {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let patterns = self.patterns.iter().enumerate();
        let (mut yes, mut no) = (Vec::new(), Vec::new());
        for (index, (text, _)) in patterns {
            let kind = if used.contains(&index) {
                &mut yes
            } else {
                &mut no
            };
            kind.push(text.as_str());
        }
        (yes, no)
    }
}

/// The findings in an image that was composed, not built by instructions: looked for once
/// for each manifest, in `cache/scans`.
pub(crate) fn in_image(
    store: &kiln_store::Store,
    cache: &std::path::Path,
    manifest: &kiln_model::Digest,
) -> Result<Vec<Finding>, crate::exec::ExecError> {
    use crate::exec::ExecError;
    let folder = cache.join("scans");
    let path = folder.join(format!("{}.json", manifest.hex()));
    let known = std::fs::read(&path).ok();
    if let Some(known) = known.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
        return Ok(known);
    }
    let image = store.image(manifest).map_err(ExecError::store)?;
    let image = image.ok_or(ExecError::Lost(*manifest))?;
    let tree = store.load_tree(&image.tree).map_err(ExecError::store)?;
    let found = in_tree(&tree, store)?;
    let fail = |cause| ExecError::Scratch {
        path: path.clone(),
        cause,
    };
    std::fs::create_dir_all(&folder).map_err(fail)?;
    let mut file = tempfile::NamedTempFile::new_in(&folder).map_err(fail)?;
    serde_json::to_writer(&mut file, &found).map_err(|e| fail(e.into()))?;
    file.persist(&path).map_err(|e| fail(e.error))?;
    Ok(found)
}
