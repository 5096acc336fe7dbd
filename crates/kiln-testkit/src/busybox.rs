//! Debian's static busybox: a program that needs nothing beside it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fetched with `apt-get` and unpacked in the current folder. Where a release has it
/// under /usr only, it is linked to.
const FETCH: &str = "apt-get download busybox-static >&2 && dpkg-deb -x busybox-static_*.deb . \
                     && { test -e bin/busybox || ln -s usr/bin bin; }";

/// The program, below `folder` (`CARGO_TARGET_TMPDIR`), fetched if it is not there yet.
///
/// Several test processes may come here at once: each unpacks in a folder of its own, and
/// only a whole one gets the name that the others look for.
pub fn busybox(folder: &Path) -> io::Result<PathBuf> {
    let kept = folder.join("busybox");
    let program = kept.join("bin/busybox");
    if program.exists() {
        return Ok(program);
    }
    let thread = format!("{:?}", std::thread::current().id());
    let own = folder.join(format!("busybox.{}.{thread}", std::process::id()));
    fs::create_dir_all(&own)?;
    let run = || {
        Command::new("sh")
            .args(["-c", FETCH])
            .current_dir(&own)
            .status()
    };
    if !run()?.success() {
        Command::new("apt-get").arg("update").status()?;
        if !run()?.success() {
            return Err(io::Error::other("busybox-static can't be downloaded"));
        }
    }
    if fs::rename(&own, &kept).is_err() {
        // Somebody else was faster; if not, there is no program, and that is told.
        fs::remove_dir_all(&own)?;
        fs::metadata(&program)?;
    }
    Ok(program)
}
