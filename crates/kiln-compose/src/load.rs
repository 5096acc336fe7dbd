//! The whole way: from options to a Spec, or to everything that stands in its way.

use std::path::PathBuf;

use kiln_model::Spec;

use crate::config::ConfigFormat;
use crate::diag::{Diagnostic, RenderOptions, render};
use crate::lower::lower;
use crate::project::{LoadError, LoadOptions, Project, finish, resolve_in};
use crate::session::{Reader, Session};
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

/// Resolves and lowers. What lowering refuses is told together with what is wrong.
pub fn load(options: &LoadOptions, reader: &dyn Reader) -> Result<Loaded, LoadError> {
    let mut session = Session::new(reader);
    let project = resolve_in(options, &mut session);
    let lowered = project.as_ref().map(|project| {
        let sources = &mut session.sources;
        lower(project, reader, sources, &options.allow_ignored)
    });
    let mut spec = None;
    match lowered {
        Some(Ok(lowered)) => {
            for diagnostic in lowered.diagnostics {
                session.diagnostics.push_new(diagnostic);
            }
            for file in lowered.files_read {
                session.note_read(&file);
            }
            spec = Some(lowered.spec);
        }
        Some(Err(diagnostic)) => session.diagnostics.push(diagnostic),
        None => {}
    }
    let resolved = finish(project, session)?;
    match spec {
        Some(spec) => Ok(Loaded {
            project: resolved.project,
            spec,
            notes: resolved.notes,
            files_read: resolved.files_read,
            sources: resolved.sources,
        }),
        // Without a Spec there was an error, and `finish` has returned it.
        None => Err(LoadError::new(resolved.notes, resolved.sources)),
    }
}
