//! Whether a command made for another platform can be run here: the processor itself may
//! (i386 on amd64), or the kernel hands it to an emulator that is registered with it.
//!
//! An emulator is only of use in a sandbox if it was registered with the flag `F`: the kernel
//! then has it open, and needs no path that the image doesn't have.

use std::fmt;
use std::fs;
use std::path::Path;

use super::{BuildError, Prepared, host};
use crate::containerfile::{Kind, Span};

/// Where the kernel shows what it hands to others (Documentation/admin-guide/binfmt-misc.rst).
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";
/// A registration is a few lines; this bounds what is read of one.
const MAX_REGISTRATION: usize = 4096;

/// A command that can't be run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// What would be run, with its place: `Containerfile: line 3: RUN make`.
    pub what: String,
    pub platform: String,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, platform } = self;
        write!(
            f,
            "{what}: it would have to be run for {platform}, which this machine ({}) can't, and \
             no emulator is registered with the kernel. Install one (Debian: `apt install \
             qemu-user-static`), or do without: run it in a stage `FROM \
             --platform=$BUILDPLATFORM` and COPY what it makes, or take a base with \
             `distroless: true`, whose packages run nothing",
            host()
        )
    }
}

impl std::error::Error for Foreign {}

/// Whether this machine runs programs for `platform` (in its normal form).
pub fn runs_here(platform: &str) -> bool {
    is_native(platform, host()) || has_emulator(platform, Path::new(BINFMT))
}

/// Refuses a build that would have to run what can't be run here, before anything is done.
pub(super) fn check(prepared: &Prepared) -> Result<(), BuildError> {
    for needed in &prepared.graph.stages {
        if runs_here(&needed.platform) {
            continue;
        }
        let own = &prepared.file.stages[needed.index].instructions;
        let all = || needed.triggers.iter().chain(own);
        let run = all().find(|i| matches!(i.kind, Kind::Run(_)));
        if let Some(instruction) = run {
            let (span, text): (Span, _) = (instruction.span, &instruction.text);
            return Err(BuildError::Foreign(Foreign {
                what: format!("{}: {span}: {text}", prepared.file_name),
                platform: needed.platform.clone(),
            }));
        }
    }
    Ok(())
}

/// A processor also runs what its lower variants do, and amd64 what i386 does.
fn is_native(platform: &str, host: &str) -> bool {
    if (platform, host) == ("linux/386", "linux/amd64") {
        return true;
    }
    let parsed = |text: &str| text.parse::<kiln_oci::Platform>().ok();
    let fits = parsed(platform).zip(parsed(host));
    fits.is_some_and(|(platform, host)| platform.fitness(&host).is_some())
}

/// ELF's number for a platform's machine, and whether its numbers are big-endian.
fn machine(platform: &str) -> Option<(u16, bool)> {
    Some(match platform.split('/').nth(1)? {
        "386" => (3, false),
        "ppc64le" => (21, false),
        "s390x" => (22, true),
        "arm" => (40, false),
        "amd64" => (62, false),
        "arm64" => (183, false),
        "riscv64" => (243, false),
        "loong64" => (258, false),
        _ => return None,
    })
}

fn has_emulator(platform: &str, registered: &Path) -> bool {
    let Some(wanted) = machine(platform) else {
        return false;
    };
    let entries = fs::read_dir(registered).into_iter().flatten().flatten();
    let mut texts = entries
        .filter(|entry| !matches!(entry.file_name().to_str(), Some("register" | "status")))
        .filter_map(|entry| fs::read(entry.path()).ok())
        .filter(|bytes| bytes.len() <= MAX_REGISTRATION);
    texts.any(|bytes| serves(&String::from_utf8_lossy(&bytes)) == Some(wanted))
}

/// The machine that a registration is for; `None`: it is off, not for ELF, or of no use in a
/// sandbox.
fn serves(text: &str) -> Option<(u16, bool)> {
    let mut lines = text.lines();
    if lines.next() != Some("enabled") {
        return None;
    }
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    if !field("flags: ")?.contains('F') || field("offset ")?.trim() != "0" {
        return None;
    }
    let magic = hex::decode(field("magic ")?.trim()).ok()?;
    let header = magic.get(..20)?;
    if &header[..4] != b"\x7fELF" {
        return None;
    }
    let big = header[5] == 2;
    let bytes = [header[18], header[19]];
    Some(match big {
        true => (u16::from_be_bytes(bytes), true),
        false => (u16::from_le_bytes(bytes), false),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_processor_runs_its_own_and_what_is_below_it() {
        for (platform, host, expected) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/386", "linux/amd64", true),
            ("linux/amd64", "linux/386", false),
            ("linux/amd64/v3", "linux/amd64", false),
            ("linux/arm64", "linux/amd64", false),
            ("linux/arm/v7", "linux/arm64", false),
            ("linux/arm/v6", "linux/arm/v7", true),
        ] {
            assert_eq!(is_native(platform, host), expected, "{platform} on {host}");
        }
    }

    #[test]
    fn an_emulator_counts_if_the_kernel_has_it_open() {
        // As qemu-user registers it for aarch64.
        let magic = "7f454c460201010000000000000000000200b700";
        let entry = |state: &str, flags: &str, magic: &str| {
            format!(
                "{state}\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: {flags}\n\
                 offset 0\nmagic {magic}\nmask ffffffffffffff00fffffffffffffffffeffffff\n"
            )
        };
        let folder = tempfile::tempdir().unwrap();
        let put = |text: String| fs::write(folder.path().join("qemu-aarch64"), text).unwrap();
        let has = |platform: &str| has_emulator(platform, folder.path());
        assert!(!has("linux/arm64"));
        put(entry("enabled", "POF", magic));
        assert!(has("linux/arm64") && !has("linux/arm/v7") && !has("linux/s390x"));
        put(entry("disabled", "POF", magic));
        assert!(!has("linux/arm64"));
        put(entry("enabled", "PO", magic));
        assert!(!has("linux/arm64"), "its path is not in the sandbox");
        put(entry(
            "enabled",
            "F",
            "7f454c4602020100000000000000000000020016",
        ));
        assert!(has("linux/s390x"));
        put("enabled\n".into());
        assert!(!has("linux/arm64"));
        assert!(!has_emulator("linux/arm64", Path::new("/nowhere")));
    }
}
