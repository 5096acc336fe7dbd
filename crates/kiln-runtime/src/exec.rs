//! Running one more process in an instance.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_model::instance::ExitStatus;
use kiln_model::{InstanceId, Millis};

use crate::runtime::{Runtime, RuntimeError};
use crate::shim::{ExecAnswer, ExecRequest};
use crate::status::write_atomically;

/// What to run. The instance's own environment, folder and user hold where nothing
/// is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecSpec {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    pub tty: bool,
    pub privileged: bool,
    /// After this the process and its group are killed.
    pub timeout: Option<Millis>,
}

/// The process's standard streams; with a terminal, what is connected to it.
#[derive(Debug)]
pub struct ExecIo {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot run the exec helper: {0}")]
    Helper(io::Error),
    #[error("cannot run `{command}` in instance {id}: {cause}")]
    Failed {
        id: InstanceId,
        command: String,
        cause: String,
    },
    #[error("`{command}` in instance {id} did not end within {limit} and was killed")]
    TimedOut {
        id: InstanceId,
        command: String,
        limit: Millis,
    },
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Runtime {
    /// Runs a process in a running instance and waits for its end.
    pub fn exec(
        &self,
        id: &InstanceId,
        spec: &ExecSpec,
        io: ExecIo,
    ) -> Result<ExitStatus, ExecError> {
        self.first_process(id)?;
        let dir = self.paths(id).dir().to_owned();
        let name = format!(
            "exec-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let (request, answer) = (
            dir.join(format!("{name}.request")),
            dir.join(format!("{name}.answer")),
        );
        let text = serde_json::to_vec(&ExecRequest {
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            cwd: spec.cwd.clone(),
            user: spec.user.clone(),
            tty: spec.tty,
            privileged: spec.privileged,
            timeout: spec.timeout,
            answer: answer.clone(),
        })
        .map_err(|e| ExecError::Helper(e.into()))?;
        write_atomically(&request, &text).map_err(ExecError::Helper)?;
        let result = self.run_helper(&dir, &request, io);
        let answer_text = fs::read(&answer);
        let _ = fs::remove_file(&request);
        let _ = fs::remove_file(&answer);
        result.map_err(ExecError::Helper)?;
        let failed = |cause: String| ExecError::Failed {
            id: id.clone(),
            command: spec.argv.join(" "),
            cause,
        };
        let answer = answer_text
            .map_err(io::Error::from)
            .and_then(|text| Ok(serde_json::from_slice(&text)?))
            .map_err(|_| failed("its helper ended without an answer (killed?)".into()))?;
        match answer {
            ExecAnswer::Ended(status) => Ok(status),
            ExecAnswer::Failed(cause) => Err(failed(cause)),
            ExecAnswer::TimedOut => Err(ExecError::TimedOut {
                id: id.clone(),
                command: spec.argv.join(" "),
                limit: spec.timeout.unwrap_or_default(),
            }),
        }
    }

    fn run_helper(&self, dir: &Path, request: &Path, io: ExecIo) -> io::Result<()> {
        let argv = &self.config.shim;
        let program = argv.first().cloned().unwrap_or_default();
        Command::new(program)
            .args(argv.iter().skip(1))
            .arg("exec")
            .arg(dir)
            .arg(request)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(io.stdin))
            .stdout(Stdio::from(io.stdout))
            .stderr(Stdio::from(io.stderr))
            .status()?;
        Ok(())
    }
}
