//! `init`: makes a project of a folder. Where there is a compose file, it says what hurts
//! immutability and offers the changes as a diff; where there is none, it writes one, and a
//! Containerfile. What is generated is pure ([`detect`]); nothing that exists is overwritten.

mod detect;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use kiln_build::lock::Lock;
use kiln_compose::disk::FILE_NAMES;
use kiln_compose::lint::{Finding, Fix, apply};
use kiln_compose::{Diagnostic, Severity};
use kiln_oci::reference::Reference;

use crate::check::{Checked, look};
use crate::cli::{InitArgs, ReadArgs};
use crate::failure::{Failure, Kind};

/// Files that tell what a folder holds are read up to here.
const LARGEST_READ: u64 = 1 << 20;

pub fn init(args: &InitArgs) -> Result<(), Failure> {
    let folder = std::path::absolute(&args.folder).map_err(|e| wrong(&args.folder, e))?;
    if !folder.is_dir() {
        return Err(wrong(&args.folder, "it is no folder"));
    }
    match FILE_NAMES.iter().any(|name| folder.join(name).is_file()) {
        true => improve(&folder, args.write),
        false => create(&folder),
    }
}

fn wrong(path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Input, format!("{}: {error}", path.display()))
}

/// A project that is there: what hurts, and what would help.
fn improve(folder: &Path, write: bool) -> Result<(), Failure> {
    let mut checked = look(&ReadArgs {
        project: folder.to_owned(),
        ..ReadArgs::default()
    });
    if checked
        .diagnostics
        .iter()
        .any(|d| d.severity == Severity::Error)
        && checked.findings.is_empty()
    {
        eprint!("{}", checked.text());
        return Err(wrong(folder, "the project can't be read as it is"));
    }
    pin(folder, &mut checked.findings);
    let changes = changes(&checked);
    // Findings are for people here; the diff is what may go on into `git apply`.
    eprint!("{}", checked.text());
    for change in &changes {
        out!("{}", diff(folder, change));
    }
    if changes.is_empty() {
        errln!("there is nothing that kiln could change by itself");
        return Ok(());
    }
    if !write {
        errln!("`kiln init --write` makes these changes");
        return Ok(());
    }
    for change in &changes {
        replace(change)?;
        errln!("changed {}", change.path.display());
    }
    Ok(())
}

struct Change {
    path: PathBuf,
    before: String,
    after: String,
}

/// Images without a tag get the digest that kiln.lock knows.
fn pin(folder: &Path, findings: &mut [Finding]) {
    // A lock that can't be read is somebody else's error: nothing is pinned then.
    let Ok(lock) = Lock::load(&folder.join("kiln.lock")) else {
        return;
    };
    for finding in findings {
        let Some(image) = finding.image.as_deref() else {
            continue;
        };
        let Ok(reference) = image.parse::<Reference>() else {
            continue;
        };
        let reference = reference.with_default_tag();
        if let Some(digest) = lock.images.get(&reference.to_string()) {
            finding.fix = Some(Fix {
                span: finding.diagnostic.span,
                text: format!("{image}@{digest}"),
            });
        }
    }
}

/// Every compose file with its fixes, and without the obsolete `version`.
fn changes(checked: &Checked) -> Vec<Change> {
    let sources = &checked.sources;
    let mut fixes: BTreeMap<u32, Vec<Fix>> = BTreeMap::new();
    let found = checked
        .findings
        .iter()
        .filter_map(|found| found.fix.clone());
    let obsolete = checked
        .diagnostics
        .iter()
        .filter_map(|d| version_line(d, checked));
    for fix in found.chain(obsolete) {
        fixes.entry(fix.span.file).or_default().push(fix);
    }
    fixes
        .into_iter()
        .filter_map(|(file, fixes)| {
            let source = sources.get(file)?;
            let before = source.text.to_string();
            let after = apply(&before, file, &fixes);
            let path = source.path.clone();
            (after != before).then_some(Change {
                path,
                before,
                after,
            })
        })
        .collect()
}

/// Takes the whole line out, where `version:` has one of its own.
fn version_line(diagnostic: &Diagnostic, checked: &Checked) -> Option<Fix> {
    if diagnostic.key.as_deref() != Some("version") {
        return None;
    }
    let mut span = diagnostic.span;
    let text = &checked.sources.get(span.file)?.text;
    let start = usize::try_from(span.start).ok()?;
    let line = text.get(start..)?.split_inclusive('\n').next()?;
    let alone = start == 0 || text.as_bytes().get(start - 1) == Some(&b'\n');
    let plain = line.trim_end().len() < 24 && !line.contains(['{', ',']);
    span.end = span.start + u32::try_from(line.len()).ok()?;
    (alone && plain).then_some(Fix {
        span,
        text: String::new(),
    })
}

fn diff(folder: &Path, change: &Change) -> String {
    let name = change.path.strip_prefix(folder).unwrap_or(&change.path);
    let name = name.display();
    similar::TextDiff::from_lines(&change.before, &change.after)
        .unified_diff()
        .header(&format!("a/{name}"), &format!("b/{name}"))
        .to_string()
}

/// By a rename, so that a crash leaves the one or the other, with the old one's mode.
fn replace(change: &Change) -> Result<(), Failure> {
    let error = |e: std::io::Error| wrong(&change.path, e);
    let now = fs::read_to_string(&change.path).map_err(error)?;
    if now != change.before {
        return Err(wrong(&change.path, "it was changed meanwhile; try again"));
    }
    let mut name = change.path.clone().into_os_string();
    name.push(".kiln-new");
    let fresh = PathBuf::from(name);
    let written = write_new(&fresh, &change.after)
        .and_then(|()| fs::set_permissions(&fresh, fs::metadata(&change.path)?.permissions()))
        .and_then(|()| fs::rename(&fresh, &change.path));
    written.map_err(|e| {
        let _ = fs::remove_file(&fresh);
        error(e)
    })
}

fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// A folder without a compose file.
fn create(folder: &Path) -> Result<(), Failure> {
    let found = detect::Folder {
        names: names(folder)?,
        read: &|name| read(&folder.join(name)),
    };
    let Some(made) = detect::project(&found) else {
        return Err(Failure::new(
            Kind::Input,
            format!("{}: kiln doesn't see what this is", folder.display()),
        )
        .hint(format!(
            "it knows folders with {}",
            detect::KNOWN.join(", ")
        )));
    };
    for (name, text) in &made.files {
        let path = folder.join(name);
        match write_new(&path, text) {
            Ok(()) => outln!("{}", path.display()),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                errln!("{} is there and stays as it is", path.display());
            }
            Err(e) => return Err(wrong(&path, e)),
        }
    }
    errln!("this is {}", made.what);
    for line in &made.to_do {
        errln!("look at: {line}");
    }
    errln!("then: kiln check && kiln up");
    Ok(())
}

fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder).map_err(|e| wrong(folder, e))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Empty where it can't be read: what a file says is only a hint.
fn read(path: &Path) -> String {
    let small = fs::metadata(path).is_ok_and(|meta| meta.len() <= LARGEST_READ);
    match small {
        true => fs::read_to_string(path).unwrap_or_default(),
        false => String::new(),
    }
}
