//! `shim run`: makes one container and stays with it to its end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use kiln_model::InstanceSpec;
use kiln_model::instance::ExitStatus;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use rustix::pipe::{PipeFlags, pipe_with};

use super::executor::KilnExecutor;
use super::supervise::{self, Output};
use super::{Handshake, capture, prepare};
use crate::cgroup::{self, Cgroup, Layout};
use crate::lock::Liveness;
use crate::log::{self, Record, Stream, Writer};
use crate::oci;
use crate::paths::InstancePaths;
use crate::root::{self, tree::Abilities};
use crate::shim_io::wait_readable;
use crate::status::{Phase, Status, now, write_atomically};
use crate::{capabilities, devices, process, sys, users};

/// A spec is a few kilobytes; custom seccomp profiles and environments make it longer.
const MAX_SPEC: u64 = 16 << 20;
/// Between "created" and the program's exec lie a few system calls.
const EXEC_WAIT: Duration = Duration::from_secs(30);
/// How much of the shim's own log explains a failed start.
const CAUSE_BYTES: u64 = 2000;
const MAX_REPORT: u64 = 64 << 10;

/// A started container.
pub struct Instance {
    pub pid: i32,
    pub output: Output,
    pub warnings: Vec<String>,
}

pub fn main(dir: PathBuf) -> ExitCode {
    // Twice forked and in a session of its own, it outlives its caller.
    let _ = rustix::process::setsid();
    match sys::fork() {
        Ok(sys::Fork::Parent(_)) => return ExitCode::SUCCESS,
        Ok(sys::Fork::Child) => {}
        Err(e) => return refuse(&format!("cannot fork: {e}")),
    }
    if let Err(e) = sys::close_from(3).and_then(|()| sys::set_child_subreaper()) {
        return refuse(&format!("cannot detach: {e}"));
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    capture::Capture::install();
    let paths = InstancePaths::from_dir(dir);
    cgroup::leave_callers_group(&tag(&paths));
    let lock = match Liveness::acquire(&paths.lock()) {
        Ok(lock) => lock,
        Err(e) => {
            return refuse(&format!(
                "another shim holds {}: {e}",
                paths.lock().display()
            ));
        }
    };
    if let Err(e) = give_back_turn() {
        return refuse(&format!("cannot detach: {e}"));
    }
    let code = match read_spec(&paths) {
        Ok(spec) => run(&spec, &paths),
        Err(cause) => refuse(&cause),
    };
    drop(lock);
    code
}

/// Its share of the caller's turn is standard input: from here on the lock tells.
fn give_back_turn() -> io::Result<()> {
    Ok(rustix::stdio::dup2_stdin(File::open("/dev/null")?)?)
}

fn read_spec(paths: &InstancePaths) -> Result<InstanceSpec, String> {
    let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", paths.spec().display());
    let mut text = Vec::new();
    File::open(paths.spec())
        .and_then(|file| file.take(MAX_SPEC).read_to_end(&mut text))
        .map_err(|e| fail(&e))?;
    serde_json::from_slice(&text).map_err(|e| fail(&e))
}

fn refuse(cause: &str) -> ExitCode {
    tell(&Handshake::Failed {
        cause: cause.to_owned(),
    });
    ExitCode::FAILURE
}

/// Says the one line to whoever started us, and lets go of the pipe.
fn tell(handshake: &Handshake) {
    if let Ok(mut line) = serde_json::to_vec(handshake) {
        line.push(b'\n');
        let _ = io::stdout().write_all(&line);
        let _ = io::stdout().flush();
    }
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(null);
    }
}

fn run(spec: &InstanceSpec, paths: &InstancePaths) -> ExitCode {
    let mut log = match Writer::open(&paths.log(), &spec.logging) {
        Ok(log) => log,
        Err(e) => return refuse(&format!("{}: {e}", paths.log().display())),
    };
    if let Err(e) = Status::new(Phase::Starting, &[]).write(&paths.status()) {
        return refuse(&format!("{}: {e}", paths.status().display()));
    }
    let cgroup = Cgroup::new(Layout::detect(), &cgroup_path(paths));
    if let Err(e) = supervise::block_signals() {
        return refuse(&format!("cannot block signals: {e}"));
    }
    match launch(spec, paths, &cgroup) {
        Ok(instance) => {
            let since = now();
            let pid = instance.pid.unsigned_abs();
            let running = Phase::Running {
                pid,
                ticks: process::start_ticks(pid).unwrap_or(0),
                since,
            };
            let _ = Status::new(running, &instance.warnings).write(&paths.status());
            tell(&Handshake::Started { pid, since });
            let warnings = instance.warnings.clone();
            let status = supervise::to_the_end(instance, &mut log, &cgroup);
            let _ = cgroup.remove();
            finish(paths, status, None, &warnings);
            ExitCode::SUCCESS
        }
        Err(cause) => {
            cgroup.kill();
            let _ = cgroup.remove();
            let _ = log.write(&Record {
                time: now(),
                stream: Stream::System,
                text: cause.clone(),
                partial: false,
            });
            finish(paths, ExitStatus::StartFailed, Some(cause.clone()), &[]);
            refuse(&cause)
        }
    }
}

fn finish(paths: &InstancePaths, status: ExitStatus, cause: Option<String>, warnings: &[String]) {
    let _ = fs::remove_dir_all(paths.state());
    let exited = Phase::Exited {
        status,
        at: now(),
        cause,
    };
    let _ = Status::new(exited, warnings).write(&paths.status());
}

/// `/kiln-<tag>/<id>`: the tag keeps two kiln roots apart.
pub fn cgroup_path(paths: &InstancePaths) -> String {
    let id = paths
        .dir()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    format!("/{}/{id}", tag(paths))
}

/// The group above all of one kiln root's.
fn tag(paths: &InstancePaths) -> String {
    let root = paths.dir().parent().and_then(|p| p.parent());
    format!("kiln-{}", crate::net::root_tag(root.unwrap_or(paths.dir())))
}

/// Everything up to the program's exec. The error is the cause, in words.
fn launch(spec: &InstanceSpec, paths: &InstancePaths, group: &Cgroup) -> Result<Instance, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut warnings = Vec::new();
    root::private_namespace()
        .map_err(|e| format!("cannot make a mount namespace: {e} (kiln must run as root)"))?;
    let mut late = root::assemble(spec, paths, Abilities::default()).map_err(|e| text(&e))?;
    prepare::shared_memory(spec, paths, &mut late).map_err(|e| text(&e))?;
    prepare::check(spec, &paths.rootfs()).map_err(|e| text(&e))?;
    let identity =
        users::lookup(&paths.rootfs(), &spec.user, &spec.group_add).map_err(|e| text(&e))?;
    let (report, report_end) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| text(&e))?;
    let mut program = prepare::program(spec, &identity, report_end.as_raw_fd(), &mut warnings)
        .map_err(|e| text(&e))?;
    let devices = devices::devices(&spec.security).map_err(|e| text(&e))?;
    let device_rules = match group.confine_devices(&devices.allowed) {
        Ok(rules) => rules,
        Err(e) => {
            // Better without the means to make a device than with all of them.
            program.capabilities &= !capabilities::MKNOD;
            warnings.push(format!(
                "this machine cannot confine devices ({e}): the instance may not make device nodes"
            ));
            None
        }
    };
    let rlimits = prepare::rlimits(spec, &mut warnings).map_err(|e| text(&e))?;
    let namespaces = prepare::namespaces(spec, paths).map_err(|e| text(&e))?;
    let config = oci::config(
        spec,
        &oci::Facts {
            rootfs: &paths.rootfs(),
            identity: &identity,
            late: &late,
            cgroup: &cgroup_path(paths),
            namespaces: &namespaces,
            rlimits: &rlimits,
            devices: &devices.nodes,
            device_rules: device_rules.as_deref(),
            cgroup_mounts: &cgroup::v1_mounts(),
        },
    );
    write_config(paths, &config).map_err(|e| text(&e))?;
    let stdio = Stdio::new(spec, paths, identity.uid, identity.gid).map_err(|e| text(&e))?;
    let executor = KilnExecutor {
        program,
        init: spec.init,
    };
    let (mut container, output) = create(spec, paths, executor, stdio)?;
    drop(report_end);
    let pid = container.pid().map_or(0, |p| p.as_raw());
    warnings.extend(group.limit(&spec.limits));
    warnings.extend(oom_score(spec, pid));
    container.start().map_err(|e| explain(&e, paths))?;
    wait_for_exec(report, pid)?;
    Ok(Instance {
        pid,
        output,
        warnings,
    })
}

fn write_config(paths: &InstancePaths, config: &serde_json::Value) -> io::Result<()> {
    fs::create_dir_all(paths.bundle())?;
    write_atomically(
        &paths.bundle().join("config.json"),
        &serde_json::to_vec(config)?,
    )
}

fn oom_score(spec: &InstanceSpec, pid: i32) -> Option<String> {
    let score = spec.limits.oom_score_adj?;
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .err()
        .map(|e| format!("oom_score_adj {score} is not set: {e}"))
}

/// The ends the container gets, and the ends kept here.
struct Stdio {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    console: Option<(UnixListener, PathBuf)>,
    output: Output,
}

impl Stdio {
    fn new(spec: &InstanceSpec, paths: &InstancePaths, uid: u32, gid: u32) -> io::Result<Self> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let (stdout_read, stdout) = pipe()?;
        let (stderr_read, stderr) = pipe()?;
        let (stdin, stdin_write) = if spec.stdin_open && !spec.tty {
            let (read, write) = pipe()?;
            // Kept open and never written to: the program must not see an end.
            (read, Some(write))
        } else {
            (File::open("/dev/null")?.into(), None)
        };
        // So that /dev/stdout can be opened again by a program that isn't root.
        for end in [&stdout, &stderr] {
            std::os::unix::fs::fchown(end, Some(uid), Some(gid))?;
        }
        let console = if spec.tty {
            let path = paths.stage().join("console");
            Some((UnixListener::bind(&path)?, path))
        } else {
            None
        };
        Ok(Self {
            stdin,
            stdout,
            stderr,
            console,
            output: Output {
                stdout: Some(stdout_read),
                stderr: Some(stderr_read),
                stdin: stdin_write,
            },
        })
    }
}

fn create(
    spec: &InstanceSpec,
    paths: &InstancePaths,
    executor: KilnExecutor,
    stdio: Stdio,
) -> Result<(Container, Output), String> {
    let _ = fs::remove_dir_all(paths.state());
    fs::create_dir_all(paths.state()).map_err(|e| e.to_string())?;
    let Stdio {
        stdin,
        stdout,
        stderr,
        console,
        mut output,
    } = stdio;
    let socket = console.as_ref().map(|(_, path)| path.clone());
    let builder = ContainerBuilder::new("instance".to_owned(), SyscallType::default())
        .with_executor(executor)
        .with_root_path(paths.state())
        .map_err(|e| explain(&e, paths))?
        .with_console_socket(socket)
        .with_stdin(stdin)
        .with_stdout(stdout)
        .with_stderr(stderr);
    let container = builder
        .as_init(paths.bundle())
        .with_systemd(false)
        .with_detach(spec.tty)
        .build()
        .map_err(|e| explain(&e, paths))?;
    if let Some((listener, _)) = console {
        let master = super::exec::receive_console(&listener)
            .map_err(|e| format!("the container gave no terminal: {e}"))?;
        if spec.stdin_open {
            output.stdin = master.try_clone().ok();
        }
        output.stdout = Some(master);
        output.stderr = None;
    }
    Ok((container, output))
}

/// Waits until the program is executed, or says why it wasn't.
pub fn wait_for_exec(report: OwnedFd, pid: i32) -> Result<(), String> {
    if !wait_readable(report.as_fd(), Some(EXEC_WAIT)) {
        return Err(format!(
            "the program was not executed within {} s",
            EXEC_WAIT.as_secs()
        ));
    }
    let mut cause = String::new();
    File::from(report)
        .take(MAX_REPORT)
        .read_to_string(&mut cause)
        .map_err(|e| e.to_string())?;
    if cause.is_empty() {
        return Ok(());
    }
    supervise::reap(pid);
    Err(cause)
}

/// libcontainer's error, all of its chain, and what it logged on the way.
pub fn explain(error: &dyn std::error::Error, paths: &InstancePaths) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    let details = log::text_tail(&paths.shim_log(), CAUSE_BYTES).unwrap_or_default();
    if let Some(first) = details.lines().find(|l| !l.trim().is_empty()) {
        text.push_str(&format!(" ({})", first.trim()));
    }
    text
}
