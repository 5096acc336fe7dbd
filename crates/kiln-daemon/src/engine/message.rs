//! What is asked of an engine, and how its answer comes back.

use kiln_model::{InstanceId, Release, ReleaseNumber};
use kiln_plan::Event;
use tokio::sync::{mpsc, oneshot};

use crate::api::error::ApiError;
use crate::api::types::{EnvironmentStatus, Explanation, ReleaseAnswer};

/// Something for an engine to take in.
pub enum Message {
    Event(Event),
    Release {
        release: Box<Release>,
        by: String,
        dry_run: bool,
        reply: Reply<ReleaseAnswer>,
    },
    Rollback {
        to: Option<ReleaseNumber>,
        by: String,
        reply: Reply<ReleaseAnswer>,
    },
    Down {
        by: String,
        reply: Reply<u64>,
    },
    Abandon {
        by: String,
        reply: Reply<()>,
    },
    /// The last message of an environment that was only made to be thrown away.
    Forget {
        by: String,
        reply: Reply<()>,
    },
    Pause {
        by: String,
        reply: Reply<()>,
    },
    Resume {
        by: String,
        reply: Reply<()>,
    },
    Promote {
        by: String,
        reply: Reply<()>,
    },
    Tainted {
        id: InstanceId,
        by: String,
        command: Vec<String>,
        reply: Reply<()>,
    },
    Status {
        reply: Reply<EnvironmentStatus>,
    },
    Explain {
        id: InstanceId,
        reply: Reply<Explanation>,
    },
}

pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

#[derive(Clone)]
pub struct EngineHandle {
    pub(super) sender: mpsc::Sender<Message>,
}

impl EngineHandle {
    pub async fn send(&self, message: Message) -> Result<(), ApiError> {
        self.sender
            .send(message)
            .await
            .map_err(|_| ApiError::internal("the environment's engine has stopped"))
    }

    /// Sends a question and waits for its answer.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Message) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply)).await?;
        answer
            .await
            .map_err(|_| ApiError::internal("the environment's engine gave no answer"))?
    }
}
