//! Debian's qemu for programs of another processor, registered with the kernel for as long as
//! a test lasts.
//!
//! A registration is the whole machine's, whoever made it: it is for a processor that no
//! other test counts on being foreign, has a name with the process's number, and goes with its
//! value. What a killed test has left goes with the next.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

const ON_ARM: bool = cfg!(target_arch = "aarch64");
/// What is emulated, as images name it.
pub const PLATFORM: &str = if ON_ARM { "linux/amd64" } else { "linux/arm64" };
/// The same, as `uname -m` says it.
pub const MACHINE: &str = if ON_ARM { "x86_64" } else { "aarch64" };
/// The same, as ELF has it.
const ELF: &str = if ON_ARM { r"\x3e" } else { r"\xb7" };

const PREFIX: &str = "kiln-test-";
/// The first bytes of a program, before its machine.
const MAGIC: &str = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00";
/// Which of their bits count, and of the machine's, as qemu has them.
const MASK: &str =
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff";
/// Only what is needed is unpacked: all of it is 300 MB. From Debian 13 on, `qemu-user` has
/// the static programs.
const FETCH: &str = "both=\"./usr/bin/qemu-$0-static ./usr/bin/qemu-$0\"
for package in qemu-user-static qemu-user; do
    apt-get download $package >&2 || continue
    dpkg-deb --fsys-tarfile ${package}_*.deb | tar -x $both 2>/dev/null
    for file in $both; do test -f $file && mv $file qemu && exit 0; done
done
exit 1";

/// Goes with its value.
pub struct Emulator {
    entry: PathBuf,
}

impl Emulator {
    /// Registers the emulator; `folder` (`CARGO_TARGET_TMPDIR`) keeps it. `mounted` is where
    /// binfmt_misc is.
    pub fn register(folder: &Path, mounted: &Path) -> io::Result<Self> {
        sweep(mounted)?;
        let qemu = qemu(folder)?;
        let name = format!("{PREFIX}{}", std::process::id());
        // F: the kernel opens it now, and needs its path no more.
        let line = format!(r":{name}:M::{MAGIC}{ELF}\x00:{MASK}:{}:F", qemu.display());
        fs::write(mounted.join("register"), line)?;
        Ok(Self {
            entry: mounted.join(name),
        })
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // One that stays is seen by what the test asks afterwards.
        let _ = fs::write(&self.entry, "-1");
    }
}

/// Takes away what processes have left that are no more.
fn sweep(mounted: &Path) -> io::Result<()> {
    for entry in fs::read_dir(mounted)? {
        let entry = entry?;
        let name = entry.file_name();
        let of = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if of.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            fs::write(entry.path(), "-1")?;
        }
    }
    Ok(())
}

/// The program, fetched if it is not there yet.
fn qemu(folder: &Path) -> io::Result<PathBuf> {
    let kept = folder.join(format!("qemu-{MACHINE}"));
    if kept.exists() {
        return Ok(kept);
    }
    let own = folder.join(format!("qemu.{}", std::process::id()));
    fs::create_dir_all(&own)?;
    let fetch = || {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", FETCH, MACHINE])
            .current_dir(&own)
            .status()
    };
    if !fetch()?.success() {
        Command::new("apt-get").arg("update").status()?;
        if !fetch()?.success() {
            return Err(io::Error::other("qemu-user-static can't be downloaded"));
        }
    }
    // Whoever is last has the same.
    fs::rename(own.join("qemu"), &kept)?;
    fs::remove_dir_all(&own)?;
    Ok(kept)
}
