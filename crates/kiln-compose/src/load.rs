//! The whole way: from options to a Spec, or to everything that stands in its way.

use std::path::PathBuf;

use kiln_model::Spec;

use crate::config::ConfigFormat;
use crate::diag::{Diagnostic, RenderOptions, Severity, render};
use crate::lower::lower;
use crate::project::{LoadError, LoadOptions, Project, resolve};
use crate::session::Reader;
use crate::span::Sources;

/// A project that kiln can run.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub project: Project,
    pub spec: Spec,
    /// Notes and warnings.
    pub notes: Vec<Diagnostic>,
    /// Every file whose content matters, in the order of reading.
    pub files_read: Vec<PathBuf>,
    pub sources: Sources,
}

impl Loaded {
    /// See [`Project::config`].
    pub fn config(&self, format: ConfigFormat) -> String {
        self.project.config(format)
    }

    /// The notes with their source text.
    pub fn render_notes(&self, options: RenderOptions) -> Vec<String> {
        self.notes
            .iter()
            .map(|note| render(note, &self.sources, options))
            .collect()
    }
}

/// Resolves and lowers.
pub fn load(options: &LoadOptions, reader: &dyn Reader) -> Result<Loaded, LoadError> {
    let resolved = resolve(options, reader)?;
    let mut notes = resolved.notes;
    let lowered = match lower(&resolved.project, reader, &options.allow_ignored) {
        Ok(lowered) => lowered,
        Err(diagnostic) => {
            notes.push(diagnostic);
            return Err(LoadError::new(notes, resolved.sources));
        }
    };
    for diagnostic in lowered.diagnostics {
        if !notes.contains(&diagnostic) {
            notes.push(diagnostic);
        }
    }
    if notes.iter().any(|note| note.severity == Severity::Error) {
        return Err(LoadError::new(notes, resolved.sources));
    }
    let mut files_read = resolved.files_read;
    for file in lowered.files_read {
        if !files_read.contains(&file) {
            files_read.push(file);
        }
    }
    Ok(Loaded {
        project: resolved.project,
        spec: lowered.spec,
        notes,
        files_read,
        sources: resolved.sources,
    })
}
