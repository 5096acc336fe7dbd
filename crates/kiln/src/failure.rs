//! Errors as people see them: what kind, what happened, and a way out. The exit code
//! follows the kind.

use std::process::ExitCode;

/// Why a command did not do what was asked.
#[derive(Debug)]
pub struct Failure {
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
}

/// The exit codes, which scripts may rely on. 2 is clap's, for words it can't read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 1: the new release did not prove itself; what ran before serves.
    Rollout,
    /// 3: a file of the user's is wrong.
    Input,
    /// 4: an image could not be built or fetched.
    Build,
    /// 5: an image failed its test.
    Test,
    /// 6: this machine or its daemon can't do it.
    Machine,
    /// 7: someone else is at it, or it is not there.
    Conflict,
    /// 8: what is stored is damaged.
    Damage,
    /// 130: interrupted.
    Interrupted,
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
        }
    }

    /// An error with its causes, each on its own line unless it is said already.
    pub fn with_causes(kind: Kind, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut failure = Self::new(kind, error.to_string());
        let mut next = Some(error);
        while let Some(cause) = next {
            let text = cause.to_string();
            if !failure.message.contains(&text) {
                failure.message.push_str("\n  because: ");
                failure.message.push_str(&text);
            }
            if is_full(cause) {
                failure.hint = Some(
                    "what ran before goes on; `kiln gc` frees what no release needs, or give \
                     kiln another place with --root"
                        .into(),
                );
            }
            next = cause.source();
        }
        failure
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// On standard error.
    pub fn tell(&self, json: bool) {
        if json {
            let value = serde_json::json!({
                "error": self.message, "kind": format!("{:?}", self.kind).to_lowercase(),
                "hint": self.hint,
            });
            errln!("{value}");
            return;
        }
        errln!("error: {}", self.message);
        if let Some(hint) = &self.hint {
            errln!("hint: {hint}");
        }
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Rollout => 1,
            Kind::Input => 3,
            Kind::Build => 4,
            Kind::Test => 5,
            Kind::Machine => 6,
            Kind::Conflict => 7,
            Kind::Damage => 8,
            Kind::Interrupted => 130,
        })
    }
}

fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| matches!(e.kind(), StorageFull | QuotaExceeded))
}

/// For errors that only say what went wrong on this machine.
pub fn machine(error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Machine, error.to_string())
}

impl From<kiln_daemon::api::client::ClientError> for Failure {
    fn from(error: kiln_daemon::api::client::ClientError) -> Self {
        use kiln_daemon::api::client::ClientError;
        use kiln_daemon::api::error::ErrorKind;
        match error {
            ClientError::Api(error) => {
                let kind = match error.kind {
                    ErrorKind::NotFound | ErrorKind::Conflict => Kind::Conflict,
                    ErrorKind::Invalid => Kind::Input,
                    ErrorKind::Internal => Kind::Machine,
                };
                Self {
                    kind,
                    message: error.message,
                    hint: error.hint,
                }
            }
            error @ ClientError::Unreachable { .. } => {
                Failure::new(Kind::Machine, error.to_string())
                    .hint("`kiln up` starts it; `kiln daemon run` shows what it says")
            }
            error @ ClientError::Broken(_) => Failure::new(Kind::Machine, error.to_string()),
        }
    }
}
