//! An instance's files and accounts, as it sees them.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use kiln_model::InstanceId;
use kiln_model::instance::ObservedState;
use kiln_runtime::Runtime;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::test::MAX_TEXT_BYTES;

pub(in crate::test) struct Inside<'a> {
    pub runtime: &'a Runtime,
    pub id: &'a InstanceId,
    /// Of its first process, on the host.
    pub pid: u32,
    root: OwnedFd,
}

impl<'a> Inside<'a> {
    pub fn of(runtime: &'a Runtime, id: &'a InstanceId) -> Result<Self, String> {
        let Some(ObservedState::Running { pid, .. }) = runtime.observe(id).map(|o| o.state) else {
            return Err("the program doesn't run any more".into());
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(format!("/proc/{pid}/root"), flags, Mode::empty());
        Ok(Self {
            runtime,
            id,
            pid,
            root: root.map_err(|e| e.to_string())?,
        })
    }

    /// Opens a file; links lead nowhere outside its root. `None`: there is nothing.
    pub fn open(&self, path: &str, flags: OFlags) -> Result<Option<OwnedFd>, String> {
        let flags = flags | OFlags::CLOEXEC;
        let within = ResolveFlags::IN_ROOT;
        match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), within) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }

    /// A file's bytes. `None`: there is none.
    pub fn bytes(&self, path: &str) -> Result<Option<Vec<u8>>, String> {
        let Some(file) = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let read = File::from(file)
            .take(MAX_TEXT_BYTES + 1)
            .read_to_end(&mut bytes);
        read.map_err(|e| format!("{path}: {e}"))?;
        if bytes.len() as u64 > MAX_TEXT_BYTES {
            return Err(format!("{path} has more than {MAX_TEXT_BYTES} bytes"));
        }
        Ok(Some(bytes))
    }

    /// A file's text; nothing, where there is none.
    pub fn text(&self, path: &str) -> Result<String, String> {
        let bytes = self.bytes(path)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What the kernel says of its first process below `/proc`.
    pub fn proc(&self, name: &str) -> Result<String, String> {
        let path = format!("/proc/{}/{name}", self.pid);
        std::fs::read_to_string(&path).map_err(|e| format!("{name}: {e}"))
    }

    /// The fields of the line of `/etc/passwd` or `/etc/group` that `is` finds.
    pub fn account(
        &self,
        file: &str,
        is: impl Fn(&[&str]) -> bool,
    ) -> Result<Option<Vec<String>>, String> {
        let text = self.text(file)?;
        let mut lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let found = lines.find(|fields| fields.len() >= 3 && is(fields));
        Ok(found.map(|fields| fields.into_iter().map(str::to_owned).collect()))
    }

    /// The addresses of a name, by its own files.
    pub fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let text = self.text("/etc/hosts")?;
        let lines = text
            .lines()
            .map(|line| line.split('#').next().unwrap_or(""));
        let mut found = Vec::new();
        for line in lines {
            let mut words = line.split_whitespace();
            let address = words.next().and_then(|word| word.parse().ok());
            if let Some(address) = address
                && words.any(|name| name.eq_ignore_ascii_case(host))
                && !found.contains(&address)
            {
                found.push(address);
            }
        }
        Ok(found)
    }

    /// Whether a connection to `host` ends at the instance itself.
    pub fn is_own(&self, host: &str) -> Result<bool, String> {
        let own = |address: &IpAddr| match address {
            IpAddr::V4(v4) => v4.is_unspecified() || *v4 == std::net::Ipv4Addr::LOCALHOST,
            IpAddr::V6(v6) => v6.is_unspecified() || v6.is_loopback(),
        };
        Ok(self.addresses(host)?.iter().any(own))
    }
}
