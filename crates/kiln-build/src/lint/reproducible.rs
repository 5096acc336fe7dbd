//! kiln's own rules: what makes the same file give another image on another day.

use super::{Around, Found, Rule};
use crate::containerfile::{CommandLine, Containerfile, Instruction, Kind, Run, Source, Stage};
use crate::remote;

/// Programs that read commands from a pipe.
const SHELLS: [&str; 8] = [
    "sh", "bash", "dash", "ash", "zsh", "python", "python3", "perl",
];

pub(super) fn lint(file: &Containerfile, around: &Around<'_>, found: &mut Found) {
    let bases = super::variables::bases(file, around);
    for (index, stage) in file.stages.iter().enumerate() {
        if let Some(base) = bases.get(index)
            && !is_fixed(base, &file.stages[..index], around)
        {
            found.add(
                Rule::UnpinnedBase,
                stage.span,
                format!(
                    "`{base}` may be another image tomorrow; `kiln lock` pins it, or its digest"
                ),
            );
        }
        for instruction in &stage.instructions {
            match &instruction.kind {
                Kind::Add(copy) if copy.checksum.is_none() => {
                    for source in &copy.sources {
                        added(source, instruction, around, found);
                    }
                }
                Kind::Run(run) => fetched(run, instruction, found),
                _ => {}
            }
        }
    }
}

/// Says the same tomorrow, or nothing can be said of it.
fn is_fixed(base: &str, before: &[Stage], around: &Around<'_>) -> bool {
    let lower = base.to_ascii_lowercase();
    let is = |stage: &Stage| stage.name.as_deref() == Some(lower.as_str());
    let on_disk = ["oci:", "docker-archive:"];
    base.is_empty()
        || base == "scratch"
        || base.contains('@')
        || on_disk.iter().any(|scheme| base.starts_with(scheme))
        || around.contexts.contains(&base)
        || before.iter().any(is)
        || (around.pinned)(base)
}

fn added(source: &Source, instruction: &Instruction, around: &Around<'_>, found: &mut Found) {
    let Source::Path(path) = source else { return };
    if remote::is_remote(path) && !path.contains('$') && !(around.pinned)(path) {
        found.add(
            Rule::UncheckedAdd,
            instruction.span,
            format!("`{path}` may change; give its --checksum, or let a build pin it in kiln.lock"),
        );
    }
}

fn fetched(run: &Run, instruction: &Instruction, found: &mut Found) {
    let mut text = match &run.command {
        CommandLine::Shell(text) => text.clone(),
        CommandLine::Exec(words) => words.join(" "),
    };
    for doc in &run.heredocs {
        text.push('\n');
        text.push_str(&doc.content);
    }
    for command in text.split([';', '\n']).flat_map(|line| line.split("&&")) {
        let parts: Vec<&str> = command.split('|').collect();
        let downloads = |part: &&str| matches!(program(part), Some("curl" | "wget"));
        let Some(at) = parts.iter().position(downloads) else {
            continue;
        };
        let into = parts[at..].iter().skip(1).find_map(|part| {
            let program = program(part)?;
            SHELLS.contains(&program).then_some(program)
        });
        match into {
            Some(shell) => found.add(
                Rule::PipeToShell,
                instruction.span,
                format!("whatever the server sends is run by `{shell}`; ADD it with a --checksum"),
            ),
            None if parts[at..].iter().any(|part| goes_past(part)) => found.note(
                Rule::UnrecordedDownload,
                instruction.span,
                "only what is fetched by HTTP through the proxy that a RUN is given is in \
                 kiln.lock; ADD it with a --checksum",
            ),
            None => {}
        }
    }
}

/// Whether a download is not recorded as others are.
fn goes_past(part: &str) -> bool {
    let signs = [
        "ftp://",
        "ftps://",
        "sftp://",
        "scp://",
        "--noproxy",
        "--no-proxy",
        "--proxy",
        "socks",
    ];
    signs.iter().any(|sign| part.contains(sign))
}

/// The program's name, without its folder; `sudo` and settings before it are passed over.
fn program(part: &str) -> Option<&str> {
    let mut words = part.split_whitespace();
    let word = words.find(|word| {
        !word.contains('=') && !matches!(*word, "sudo" | "-E" | "env" | "(" | "{" | "if" | "!")
    })?;
    let word = word.trim_start_matches(['(', '$', '`', '"']);
    word.rsplit('/').next()
}
