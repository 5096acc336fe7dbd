//! `shim exec`: one more process in a running instance, with the instance's own
//! rights, namespaces and control groups. This process's standard streams are the
//! program's; with a terminal, they are connected to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kiln_model::instance::ExitStatus;
use kiln_model::{InstanceSpec, Millis};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, WaitOptions, pidfd_open};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::executor::KilnExecutor;
use super::{capture, prepare, supervise};
use crate::oci;
use crate::paths::InstancePaths;
use crate::shim_io::wait_readable;
use crate::status::{Phase, Status, write_atomically};
use crate::{sys, users};

/// A request holds arguments and environment: the kernel takes 2 MiB of them.
const MAX_REQUEST: u64 = 8 << 20;
/// The terminal is handed over before the program starts.
const CONSOLE_WAIT: Duration = Duration::from_secs(10);
/// What is left in a terminal after the program's end is read for so long.
const DRAIN: Duration = Duration::from_millis(200);

/// What to run; a file in the instance's folder, removed when read.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    /// Beside the instance's own.
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    pub tty: bool,
    pub privileged: bool,
    /// After this, the process and its group are killed.
    pub timeout: Option<Millis>,
    /// Where the [`ExecAnswer`] is written.
    pub answer: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecAnswer {
    Ended(ExitStatus),
    TimedOut,
    Failed(String),
}

pub fn main(dir: PathBuf, request: PathBuf) -> ExitCode {
    if sys::close_from(3).is_err() {
        return ExitCode::FAILURE;
    }
    capture::Capture::install();
    let paths = InstancePaths::from_dir(dir);
    let request = match read_request(&request) {
        Ok(request) => request,
        Err(_) => return ExitCode::FAILURE,
    };
    let answer = run(&paths, &request).unwrap_or_else(ExecAnswer::Failed);
    let written = serde_json::to_vec(&answer)
        .map_err(io::Error::from)
        .and_then(|text| write_atomically(&request.answer, &text));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn read_request(path: &Path) -> io::Result<ExecRequest> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_REQUEST).read_to_end(&mut text)?;
    fs::remove_file(path)?;
    Ok(serde_json::from_slice(&text)?)
}

fn run(paths: &InstancePaths, request: &ExecRequest) -> Result<ExecAnswer, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let spec: InstanceSpec = fs::read(paths.spec())
        .map_err(|e| text(&e))
        .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| text(&e)))?;
    let Some(Phase::Running { pid, .. }) = Status::read(&paths.status()).map(|s| s.phase) else {
        return Err("the instance is not running".into());
    };
    let asked = as_instance(&spec, request);
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let groups: &[String] = if request.user.is_some() {
        &[]
    } else {
        &spec.group_add
    };
    let identity = users::lookup(&root, &asked.user, groups).map_err(|e| text(&e))?;
    let (report, report_end) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| text(&e))?;
    let mut warnings = Vec::new();
    let program = prepare::program(&asked, &identity, report_end.as_raw_fd(), &mut warnings)
        .map_err(|e| text(&e))?;
    let process = request.answer.with_extension("process");
    let description = json!({
        "terminal": request.tty,
        "user": { "uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups },
        "args": asked.argv,
        "env": [],
        "cwd": asked.cwd,
        "noNewPrivileges": oci::no_new_privileges(&asked),
    });
    write_atomically(&process, description.to_string().as_bytes()).map_err(|e| text(&e))?;
    let console = request.answer.with_extension("console");
    let result = start(
        paths,
        &process,
        &console,
        KilnExecutor {
            program,
            init: false,
        },
        request.tty,
    );
    let _ = fs::remove_file(&process);
    let _ = fs::remove_file(&console);
    let (child, terminal) = result?;
    drop(report_end);
    super::run::wait_for_exec(report, child)?;
    follow(child, terminal, request.timeout.map(Duration::from)).map_err(|e| text(&e))
}

/// The instance's spec with the request's program in it.
fn as_instance(spec: &InstanceSpec, request: &ExecRequest) -> InstanceSpec {
    let mut asked = spec.clone();
    asked.argv = request.argv.clone();
    asked.env.extend(request.env.clone());
    asked.cwd = request.cwd.clone().unwrap_or_else(|| spec.cwd.clone());
    asked.tty = request.tty;
    asked.security.privileged |= request.privileged;
    if let Some(user) = &request.user {
        asked.user = user.clone();
        // Another user's home is elsewhere.
        if !request.env.contains_key("HOME") && !spec.env.contains_key("HOME") {
            asked.env.remove("HOME");
        }
    }
    asked
}

fn start(
    paths: &InstancePaths,
    process: &Path,
    console: &Path,
    executor: KilnExecutor,
    tty: bool,
) -> Result<(i32, Option<OwnedFd>), String> {
    let listener = tty
        .then(|| UnixListener::bind(console))
        .transpose()
        .map_err(|e| format!("cannot make a terminal: {e}"))?;
    let pid = ContainerBuilder::new("instance".to_owned(), SyscallType::default())
        .with_executor(executor)
        .with_root_path(paths.state())
        .map_err(|e| super::run::explain(&e, paths))?
        .with_console_socket(tty.then_some(console))
        .as_tenant()
        .with_process(Some(process))
        .with_detach(tty)
        .build()
        .map_err(|e| super::run::explain(&e, paths))?;
    let terminal = listener
        .map(|listener| receive_console(&listener))
        .transpose()
        .map_err(|e| format!("the instance gave no terminal: {e}"))?;
    Ok((pid.as_raw(), terminal))
}

/// Takes the terminal that libcontainer sends over its console socket.
pub fn receive_console(listener: &UnixListener) -> io::Result<OwnedFd> {
    if !wait_readable(listener.as_fd(), Some(CONSOLE_WAIT)) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (stream, _) = listener.accept()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut name)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Stays with the process to its end or the time limit, and carries a terminal's bytes.
fn follow(
    pid: i32,
    terminal: Option<OwnedFd>,
    timeout: Option<Duration>,
) -> io::Result<ExecAnswer> {
    let Some(child) = rustix::process::Pid::from_raw(pid) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let pidfd = pidfd_open(child, PidfdFlags::empty())?;
    let end = timeout.map(|limit| Instant::now() + limit);
    let mut input_open = terminal.is_some();
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            // Its group too: the shell's children. The session is the process's own.
            let _ = rustix::process::kill_process_group(child, rustix::process::Signal::KILL);
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
            supervise::reap(pid);
            return Ok(ExecAnswer::TimedOut);
        }
        let stdin = io::stdin();
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        if let Some(terminal) = &terminal {
            fds.push(PollFd::new(terminal, PollFlags::IN));
            if input_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|f| !f.revents().is_empty()).collect();
        drop(fds);
        if let Some(terminal) = &terminal {
            if ready.get(1) == Some(&true) {
                copy_some(terminal, &io::stdout());
            }
            if ready.get(2) == Some(&true) {
                input_open = copy_some(&stdin, terminal);
            }
        }
        if ready.first() == Some(&true) {
            break;
        }
    }
    if let Some(terminal) = &terminal {
        while wait_readable(terminal.as_fd(), Some(DRAIN)) && copy_some(terminal, &io::stdout()) {}
    }
    let status = rustix::process::waitpid(Some(child), WaitOptions::empty())?
        .and_then(|(_, status)| supervise::exit_status(status))
        .unwrap_or(ExitStatus::Unknown);
    Ok(ExecAnswer::Ended(status))
}

/// Moves what is there; `false`: one of the two has ended.
fn copy_some(from: &impl AsFd, to: &impl AsFd) -> bool {
    let mut buffer = [0; 4096];
    let Ok(count @ 1..) = rustix::io::read(from, &mut buffer) else {
        return false;
    };
    let mut rest = buffer.get(..count).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}
