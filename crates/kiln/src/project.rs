//! Reading the project a command is about.

use kiln_compose::disk::{DiskOptions, load_from_disk};
use kiln_compose::{Diagnostic, LoadError, Loaded, RenderOptions, Sources, render};

use crate::cli::{ProjectArgs, ReadArgs};
use crate::failure::{Failure, Kind};

/// Notes and warnings are printed; errors stop, all of them shown.
pub fn load(args: &ProjectArgs) -> Result<Loaded, Failure> {
    load_with(&options(&args.read))
}

pub fn load_with(options: &DiskOptions) -> Result<Loaded, Failure> {
    let loaded = load_from_disk(options).map_err(|e| failure(&e))?;
    print_notes(&loaded.notes, &loaded.sources);
    Ok(loaded)
}

pub fn options(args: &ReadArgs) -> DiskOptions {
    DiskOptions {
        files: args.files.clone(),
        project_name: args.project_name.clone(),
        project_directory: args.project_directory.clone(),
        env_files: args.env_file.clone(),
        profiles: args.profile.clone(),
        allow_ignored: args.allow_ignored.clone(),
        ..DiskOptions::new(&args.project)
    }
}

pub fn failure(error: &LoadError) -> Failure {
    let text: Vec<String> = error
        .diagnostics
        .iter()
        .map(|d| render(d, &error.sources, RenderOptions::default()))
        .collect();
    Failure::new(Kind::Input, text.join("\n"))
}

pub fn print_notes(notes: &[Diagnostic], sources: &Sources) {
    for note in notes {
        errln!("{}", kiln_compose::one_line(note, sources));
    }
}
