//! Running the binary, never without a bound.

use std::fmt;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// No command of any test takes this long, on the slowest machine: building a base
/// from Debian packages included.
const LONGEST: Duration = Duration::from_secs(400);

/// What a command did.
pub struct Ran {
    /// `None`: it was killed by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    what: String,
}

impl Ran {
    /// Fails the test unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// Fails the test unless the command ended with one of these codes.
    #[track_caller]
    pub fn code(self, codes: &[i32]) -> Self {
        let fits = self.code.is_some_and(|c| codes.contains(&c));
        assert!(fits, "expected exit code {codes:?}: {self}");
        self
    }

    /// Fails the test unless standard error has each of these texts.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stderr.contains(text), "no word of `{text}`: {self}");
        }
        self
    }

    /// Fails the test unless standard error has one of these texts.
    #[track_caller]
    pub fn says_one_of(self, texts: &[&str]) -> Self {
        let found = texts.iter().any(|text| self.stderr.contains(text));
        assert!(found, "none of {texts:?}: {self}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("not JSON ({error}): {self}"),
        }
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`kiln {}` ended with {:?}\n--- stdout\n{}\n--- stderr\n{}\n---",
            self.what, self.code, self.stdout, self.stderr
        )
    }
}

/// A command under way. Killed when dropped.
pub struct Running {
    child: Child,
    stdout: Option<Output>,
    stderr: Option<Output>,
    what: String,
    begun: Instant,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let what: Vec<String> = command
            .get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().map(reader);
        let stderr = child.stderr.take().map(reader);
        Self {
            child,
            stdout,
            stderr,
            what: what.join(" "),
            begun: Instant::now(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// What it has written to standard error so far.
    pub fn said(&self) -> String {
        self.stderr.as_ref().map(Output::so_far).unwrap_or_default()
    }

    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ran {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if self.begun.elapsed() > LONGEST {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let (out, err) = self.output();
                panic!("`kiln {}` did not end; it said:\n{out}\n{err}", self.what);
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let (stdout, stderr) = self.output();
        Ran {
            code: status.code(),
            stdout,
            stderr,
            what: std::mem::take(&mut self.what),
        }
    }

    fn output(&mut self) -> (String, String) {
        let text = |output: Option<Output>| output.map(Output::whole).unwrap_or_default();
        (text(self.stdout.take()), text(self.stderr.take()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a command writes, as it comes.
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    fn whole(self) -> String {
        let _ = self.reader.join();
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }
}

fn reader(mut from: impl Read + Send + 'static) -> Output {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = bytes.clone();
    let reader = std::thread::spawn(move || {
        let mut some = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut some) {
            into.lock().unwrap().extend_from_slice(&some[..count]);
        }
    });
    Output { bytes, reader }
}

/// Sends a signal; a process that is gone is fine.
pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Is it there, and not just unreaped?
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, Some('Z' | 'X') | None)
    })
}

/// Waits until it is so; fails the test when it never is.
#[track_caller]
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    const LIMIT: Duration = Duration::from_secs(90);
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < LIMIT, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
