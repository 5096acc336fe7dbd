//! What is executed in the instance, and with which rights: everything is made
//! ready in the shim, so that between fork and exec nothing is left to decide.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use seccompiler::BpfProgram;

use crate::{capabilities, sys};

/// Docker's, for images that set none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program about to be executed.
#[derive(Clone)]
pub struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
    path: String,
    pub filters: Vec<BpfProgram>,
    /// The set it may have at most.
    pub capabilities: u64,
    pub no_new_privileges: bool,
    /// Where a failed exec is reported; closed by a successful one.
    pub report: RawFd,
}

/// An argument or variable the kernel can't take.
#[derive(Debug, thiserror::Error)]
#[error("{what} holds a zero byte")]
pub struct ZeroByte {
    what: String,
}

impl Program {
    pub fn new(
        argv: &[String],
        env: &BTreeMap<String, String>,
        report: RawFd,
    ) -> Result<Self, ZeroByte> {
        let text = |text: &str, what: String| CString::new(text).map_err(|_| ZeroByte { what });
        Ok(Self {
            argv: argv
                .iter()
                .map(|a| text(a, "an argument".into()))
                .collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|(k, v)| text(&format!("{k}={v}"), format!("the variable {k}")))
                .collect::<Result<_, _>>()?,
            path: env
                .get("PATH")
                .cloned()
                .unwrap_or_else(|| DEFAULT_PATH.to_owned()),
            filters: Vec::new(),
            capabilities: 0,
            no_new_privileges: true,
            report,
        })
    }

    /// Gives up every right the program must not have. Without no-new-privileges a
    /// filter can only be installed as long as the capabilities are there.
    pub fn drop_rights(&self) -> io::Result<()> {
        if !self.no_new_privileges {
            self.install_filters()?;
        }
        self.drop_capabilities()?;
        if self.no_new_privileges {
            rustix::thread::set_no_new_privs(true)?;
            self.install_filters()?;
        }
        Ok(())
    }

    pub fn drop_capabilities(&self) -> io::Result<()> {
        let held = sys::permitted_capabilities()?;
        for bit in (0..capabilities::COUNT).filter(|bit| self.capabilities & (1 << bit) == 0) {
            match sys::drop_bounding(bit) {
                // A kernel that doesn't know it can't give it either.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
        }
        sys::clear_ambient()?;
        let root = rustix::process::geteuid().is_root();
        // As with Docker: other users start without; what they exec can't gain them.
        sys::set_capabilities(if root { self.capabilities & held } else { 0 })
    }

    fn install_filters(&self) -> io::Result<()> {
        for filter in &self.filters {
            sys::install_seccomp(filter)?;
        }
        Ok(())
    }

    /// Executes it. Only returns when that failed, with a cause for the user.
    pub fn exec(&self) -> String {
        let Some(name) = self.argv.first() else {
            return "there is no program to run".into();
        };
        if name.as_bytes().is_empty() {
            return "the program's name is empty".into();
        }
        if name.as_bytes().contains(&b'/') {
            let error = sys::execve(name, &self.argv, &self.env);
            return explain(&name.to_string_lossy(), &error);
        }
        // As a shell looks for it: what can't be executed is passed over.
        let mut denied = None;
        for dir in self.path.split(':') {
            let dir = if dir.is_empty() { "." } else { dir };
            let Ok(path) = CString::new([dir.as_bytes(), b"/", name.as_bytes()].concat()) else {
                continue;
            };
            let error = sys::execve(&path, &self.argv, &self.env);
            let text = path.to_string_lossy();
            let exists =
                std::fs::symlink_metadata(std::ffi::OsStr::from_bytes(path.as_bytes())).is_ok();
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) if !exists => {}
                Some(libc::EACCES) => denied = Some(explain(&text, &error)),
                _ => return explain(&text, &error),
            }
        }
        denied.unwrap_or_else(|| {
            format!(
                "exec {}: not found in PATH ({})",
                name.to_string_lossy(),
                self.path
            )
        })
    }
}

/// Says why an exec failed, looking at the file where the error alone misleads.
fn explain(path: &str, error: &io::Error) -> String {
    let meta = std::fs::metadata(path);
    match error.raw_os_error() {
        Some(libc::ENOENT) if meta.is_ok() => match interpreter(path) {
            Some(interpreter) => format!(
                "exec {path}: it needs the interpreter {interpreter}, which the image does not have"
            ),
            None => format!("exec {path}: its interpreter is missing in the image"),
        },
        Some(libc::ENOENT | libc::ENOTDIR) => format!("exec {path}: no such file"),
        Some(libc::EACCES) => match meta {
            Ok(meta) if meta.is_dir() => format!("exec {path}: it is a folder"),
            Ok(meta) => {
                use std::os::unix::fs::PermissionsExt;
                if meta.permissions().mode() & 0o111 == 0 {
                    format!(
                        "exec {path}: permission denied (the file is not executable: chmod +x it in the image)"
                    )
                } else {
                    format!(
                        "exec {path}: permission denied (its mount is noexec, or the user may not run it)"
                    )
                }
            }
            Err(_) => format!("exec {path}: permission denied"),
        },
        Some(libc::ENOEXEC) => format!(
            "exec {path}: not a program this machine can run (another architecture, or a script without #!)"
        ),
        _ => format!("exec {path}: {error}"),
    }
}

/// What a script's `#!` line or an ELF file's PT_INTERP names.
fn interpreter(path: &str) -> Option<String> {
    const HEAD: u64 = 4096;
    let mut head = Vec::new();
    File::open(path)
        .ok()?
        .take(HEAD)
        .read_to_end(&mut head)
        .ok()?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next()?;
        let text = String::from_utf8_lossy(line).into_owned();
        return text.split_whitespace().next().map(str::to_owned);
    }
    elf_interpreter(&head)
}

/// 64-bit little-endian ELF (ELF-64 object file format, program header).
fn elf_interpreter(head: &[u8]) -> Option<String> {
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| {
        let value = u64::from_le_bytes(head.get(at..at.checked_add(8)?)?.try_into().ok()?);
        usize::try_from(value).ok()
    };
    if head.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (u64_at(32)?, usize::from(u16_at(54)?), u16_at(56)?);
    for n in 0..usize::from(count) {
        let entry = table.checked_add(n.checked_mul(size)?)?;
        if u32_at(entry)? == PT_INTERP {
            let start = u64_at(entry.checked_add(8)?)?;
            let end = start.checked_add(u64_at(entry.checked_add(32)?)?)?;
            let name = head.get(start..end)?;
            return Some(
                String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned(),
            );
        }
    }
    None
}
