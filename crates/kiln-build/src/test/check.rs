//! The checks of `x-kiln.test`, from within the instance's network and files.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use kiln_model::instance::{ExitStatus, ObservedState};
use kiln_model::spec::{Check, Hook};
use kiln_model::{InstanceId, Millis};
use kiln_runtime::{ExecIo, ExecSpec, Runtime};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// An answer or a file is read up to this many bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// For people.
pub fn shown(check: &Check) -> String {
    match check {
        Check::Http { port, path, .. } => format!("http :{port}{path}"),
        Check::Tcp { port } => format!("tcp :{port}"),
        Check::Exec { command, .. } => format!("exec {}", command.join(" ")),
        Check::File { path, .. } => format!("file {path}"),
        Check::Suite { kind, path, .. } => format!("{} {path}", kind.as_str()),
    }
}

/// Tries a check once; the error says what was found instead.
pub fn run(runtime: &Runtime, id: &InstanceId, check: &Check) -> Result<(), String> {
    match check {
        Check::Tcp { port } => dial(runtime, id, *port).map(|_| ()),
        Check::Http {
            port,
            path,
            status,
            body,
        } => http(runtime, id, *port, path, *status, body.as_deref()),
        Check::Exec {
            command: argv,
            exit,
            output,
        } => command(
            runtime,
            id,
            argv,
            *exit,
            output.as_deref(),
            Millis::from(ATTEMPT),
        ),
        Check::File {
            path,
            exists,
            contains,
            mode,
        } => file(runtime, id, path, *exists, contains.as_deref(), *mode),
        // Their cases are their own.
        Check::Suite { .. } => Ok(()),
    }
}

fn dial(runtime: &Runtime, id: &InstanceId, port: u16) -> Result<std::net::TcpStream, String> {
    let stream = runtime
        .dial(id, port)
        .map_err(|e| format!("can't connect to port {port}: {e}"))?;
    let limited = stream
        .set_read_timeout(Some(ATTEMPT))
        .and_then(|()| stream.set_write_timeout(Some(ATTEMPT)));
    limited.map_err(|e| e.to_string())?;
    Ok(stream)
}

fn http(
    runtime: &Runtime,
    id: &InstanceId,
    port: u16,
    path: &str,
    status: u16,
    body: Option<&str>,
) -> Result<(), String> {
    let mut stream = dial(runtime, id, port)?;
    // HTTP/1.0: the answer ends with the connection and is in one piece.
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: localhost\r\nUser-Agent: kiln\r\nAccept: */*\r\n\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    let read = stream.take(MAX_ANSWER).read_to_end(&mut answer);
    let (found, content) = answered(&answer).ok_or_else(|| match read {
        Err(e) => format!("no HTTP answer: {e}"),
        Ok(_) => "no HTTP answer".to_owned(),
    })?;
    if found != status {
        return Err(format!("status {found} instead of {status}"));
    }
    match body {
        Some(wanted) if !String::from_utf8_lossy(content).contains(wanted) => {
            Err(format!("the body doesn't contain `{wanted}`"))
        }
        _ => Ok(()),
    }
}

/// Status and body of an answer.
fn answered(answer: &[u8]) -> Option<(u16, &[u8])> {
    let head_end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..head_end]).ok()?;
    let line = head.lines().next()?;
    let status = line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    Some((status, &answer[head_end + 4..]))
}

/// Runs a command in the instance.
pub fn command(
    runtime: &Runtime,
    id: &InstanceId,
    argv: &[String],
    exit: i32,
    output: Option<&str>,
    timeout: Millis,
) -> Result<(), String> {
    let spec = ExecSpec {
        argv: argv.to_vec(),
        timeout: Some(timeout),
        ..ExecSpec::default()
    };
    execute(runtime, id, &spec, exit, output)
}

/// Runs a hook, as it would be run in a release.
pub fn hook(runtime: &Runtime, id: &InstanceId, hook: &Hook, limit: Millis) -> Result<(), String> {
    let spec = ExecSpec {
        argv: hook.command.clone(),
        env: hook.environment.clone(),
        cwd: hook.working_dir.clone(),
        user: hook.user.clone(),
        tty: false,
        privileged: hook.privileged,
        timeout: Some(limit),
    };
    execute(runtime, id, &spec, 0, None)
}

/// A command's end, with each of its outputs up to [`MAX_ANSWER`].
pub struct Captured {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command in the instance; the error says why it could not be.
pub fn capture(runtime: &Runtime, id: &InstanceId, spec: &ExecSpec) -> Result<Captured, String> {
    let text = |e: std::io::Error| e.to_string();
    let (stdout, stderr) = (tempfile::tempfile(), tempfile::tempfile());
    let (stdout, stderr) = (stdout.map_err(text)?, stderr.map_err(text)?);
    let io = ExecIo {
        stdin: OwnedFd::from(File::open("/dev/null").map_err(text)?),
        stdout: OwnedFd::from(stdout.try_clone().map_err(text)?),
        stderr: OwnedFd::from(stderr.try_clone().map_err(text)?),
    };
    let status = runtime.exec(id, spec, io).map_err(|e| e.to_string())?;
    Ok(Captured {
        status,
        stdout: said(stdout).map_err(text)?,
        stderr: said(stderr).map_err(text)?,
    })
}

fn said(mut file: File) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(MAX_ANSWER).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn execute(
    runtime: &Runtime,
    id: &InstanceId,
    spec: &ExecSpec,
    exit: i32,
    output: Option<&str>,
) -> Result<(), String> {
    let ended = capture(runtime, id, spec)?;
    let all = format!("{}{}", ended.stdout, ended.stderr);
    let said = all.trim();
    if ended.status != ExitStatus::Code(exit) {
        let command = spec.argv.join(" ");
        return Err(format!("`{command}` {}: {said}", ended.status));
    }
    match output {
        Some(wanted) if !all.contains(wanted) => {
            Err(format!("the output doesn't contain `{wanted}`: {said}"))
        }
        _ => Ok(()),
    }
}

/// Looks at a file as the instance sees it; links lead nowhere outside its root.
fn file(
    runtime: &Runtime,
    id: &InstanceId,
    path: &str,
    exists: bool,
    contains: Option<&str>,
    mode: Option<u32>,
) -> Result<(), String> {
    let Some(ObservedState::Running { pid, .. }) = runtime.observe(id).map(|o| o.state) else {
        return Err("the program doesn't run any more".into());
    };
    let root = rustix::fs::open(
        format!("/proc/{pid}/root"),
        OFlags::PATH | OFlags::DIRECTORY,
        Mode::empty(),
    );
    let root = root.map_err(|e| e.to_string())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let file = match (opened, exists) {
        (Ok(_), false) => return Err("it exists".into()),
        (Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR), false) => return Ok(()),
        (Err(e), _) => return Err(e.to_string()),
        (Ok(file), true) => File::from(file),
    };
    let meta = file.metadata().map_err(|e| e.to_string())?;
    let found = meta.permissions().mode() & 0o7777;
    if let Some(mode) = mode
        && mode != found
    {
        return Err(format!("its mode is {found:04o}, not {mode:04o}"));
    }
    let Some(wanted) = contains else {
        return Ok(());
    };
    let mut content = Vec::new();
    file.take(MAX_ANSWER)
        .read_to_end(&mut content)
        .map_err(|e| e.to_string())?;
    match String::from_utf8_lossy(&content).contains(wanted) {
        true => Ok(()),
        false => Err(format!("it doesn't contain `{wanted}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_or_refused() {
        let answer = b"HTTP/1.1 404 Not Found\r\nX: y\r\n\r\nbody";
        assert_eq!(answered(answer), Some((404, &b"body"[..])));
        for bad in [
            &b"HTTP/1.1 200 OK\r\n"[..],
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 xx\r\n\r\n",
            b"",
        ] {
            assert_eq!(answered(bad), None);
        }
    }
}
