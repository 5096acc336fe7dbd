//! The shim's long life: moves output into the log, waits for the end, cleans up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kiln_model::instance::ExitStatus;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};

use super::run::Instance;
use crate::cgroup::Cgroup;
use crate::log::{Lines, Record, Stream, Writer};
use crate::shim_io::wait_readable;
use crate::status::now;

/// One read of output.
const CHUNK: usize = 32 << 10;
/// What is left in the pipes after the end is read for so long; only a process
/// outside of every group can keep a pipe open then.
const DRAIN: Duration = Duration::from_millis(500);

/// The shim's ends of the container's standard streams.
pub struct Output {
    /// A pseudo terminal's master when the instance has a tty.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Only held open.
    pub stdin: Option<OwnedFd>,
}

/// From now on signals are read, not delivered; the executor sets them free again.
pub fn block_signals() -> io::Result<()> {
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    Ok(())
}

/// Waits for one child's end.
pub fn reap(pid: i32) -> Option<ExitStatus> {
    let pid = Pid::from_raw(pid)?;
    rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))
        .ok()?
        .and_then(|(_, status)| exit_status(status))
}

pub fn exit_status(status: WaitStatus) -> Option<ExitStatus> {
    status
        .exit_status()
        .map(ExitStatus::Code)
        .or_else(|| status.terminating_signal().map(ExitStatus::Signal))
}

struct Source {
    fd: OwnedFd,
    stream: Stream,
    lines: Lines,
}

impl Source {
    /// Reads what is there into the log; `false`: it has ended.
    fn pump(&mut self, log: &mut Writer, buffer: &mut [u8]) -> bool {
        match rustix::io::read(&self.fd, &mut *buffer) {
            Ok(0) => false,
            Ok(n) => {
                let stream = self.stream;
                let bytes = buffer.get(..n).unwrap_or_default();
                self.lines
                    .push(bytes, |text, partial| keep(log, stream, text, partial));
                true
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => true,
            // EIO: the last user of the terminal is gone.
            Err(_) => false,
        }
    }
}

/// A full disk loses lines, never the instance.
fn keep(log: &mut Writer, stream: Stream, text: &str, partial: bool) {
    let _ = log.write(&Record {
        time: now(),
        stream,
        text: text.to_owned(),
        partial,
    });
}

/// Stays until everything of the instance has ended; gives how its program ended.
pub fn to_the_end(instance: Instance, log: &mut Writer, cgroup: &Cgroup) -> ExitStatus {
    let mut sources = Vec::new();
    for (fd, stream) in [
        (instance.output.stdout, Stream::Stdout),
        (instance.output.stderr, Stream::Stderr),
    ] {
        sources.extend(fd.map(|fd| Source {
            fd,
            stream,
            lines: Lines::default(),
        }));
    }
    let mut buffer = vec![0; CHUNK];
    let status = watch(instance.pid, &mut sources, log, &mut buffer);
    let out_of_memory = cgroup.out_of_memory();
    let refused = cgroup.processes_refused();
    // Processes outside its pid namespace (a shared one), if any.
    cgroup.kill();
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    drain(sources, log, &mut buffer);
    if refused > 0 && !status.success() {
        let text = "it could not start more processes: it had as many as it may have";
        keep(log, Stream::System, text, false);
    }
    match status {
        ExitStatus::Signal(9) | ExitStatus::Code(137) if out_of_memory => ExitStatus::OutOfMemory,
        other => other,
    }
}

fn watch(pid: i32, sources: &mut Vec<Source>, log: &mut Writer, buffer: &mut [u8]) -> ExitStatus {
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    let Ok(signals) = SignalFd::with_flags(&child, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
    else {
        return reap(pid).unwrap_or(ExitStatus::Unknown);
    };
    loop {
        while let Ok(Some(_)) = signals.read_signal() {}
        if let Some(status) = reap_ended(pid) {
            return status;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        fds.extend(sources.iter().map(|s| PollFd::new(&s.fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return reap(pid).unwrap_or(ExitStatus::Unknown),
        }
        let ready: Vec<bool> = fds
            .iter()
            .skip(1)
            .map(|f| !f.revents().is_empty())
            .collect();
        drop(fds);
        let mut ready = ready.into_iter();
        sources.retain_mut(|source| {
            !ready.next().unwrap_or(false) || {
                let alive = source.pump(log, buffer);
                if !alive {
                    let stream = source.stream;
                    source
                        .lines
                        .finish(|text, partial| keep(log, stream, text, partial));
                }
                alive
            }
        });
    }
}

/// Reaps every child that has ended; gives the program's status if it is among them.
fn reap_ended(pid: i32) -> Option<ExitStatus> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(None) => return None,
            Ok(Some((ended, status))) => {
                let ours = ended.as_raw_nonzero().get() == pid;
                if let (true, Some(status)) = (ours, exit_status(status)) {
                    return Some(status);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            // Our child was reaped unseen: nobody knows its status.
            Err(_) => return Some(ExitStatus::Unknown),
        }
    }
}

fn drain(sources: Vec<Source>, log: &mut Writer, buffer: &mut [u8]) {
    let end = Instant::now() + DRAIN;
    for mut source in sources {
        while wait_readable(
            source.fd.as_fd(),
            Some(end.saturating_duration_since(Instant::now())),
        ) && source.pump(log, buffer)
        {}
        let stream = source.stream;
        source
            .lines
            .finish(|text, partial| keep(log, stream, text, partial));
    }
}
