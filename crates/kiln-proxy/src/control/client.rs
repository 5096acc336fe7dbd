//! The client's side of the control socket.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_model::route::DrainReport;
use kiln_model::{EnvironmentName, InstanceId, Millis, RoutingTable, Traffic};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{Answer, PROTOCOL, Refusal, Request};
use crate::limits::CONTROL_LINE;
use crate::status::{Applied, Ports, Status};

/// Talks to a running proxy. Each call makes its own connection, so calls may run at the
/// same time, and a restart of the proxy in between is not noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    socket: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no proxy answers on {socket}")]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("the proxy on {socket} went away before it answered")]
    Lost {
        socket: PathBuf,
        source: Option<io::Error>,
    },
    #[error("the proxy on {socket} speaks another protocol ({found}) than this kiln ({PROTOCOL})")]
    Protocol { socket: PathBuf, found: String },
    #[error("the proxy refuses: {message}")]
    Refused { kind: Refusal, message: String },
}

impl Client {
    /// Finds out if a proxy answers there which understands this client.
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let client = Self {
            socket: socket.to_owned(),
        };
        match client.ask(&Request::Hello).await? {
            Answer::Hello { protocol, .. } if protocol == PROTOCOL => Ok(client),
            Answer::Hello { protocol, .. } => Err(client.other(protocol.to_string())),
            answer => Err(client.unexpected(&answer)),
        }
    }

    /// Puts a table into effect; the same one again is no change. When this returns,
    /// nothing new goes to instances the table does not name. Refused if a newer
    /// generation is in effect. Listeners which failed are told in the answer, the rest
    /// is in effect; the next table tries them again.
    pub async fn apply(&self, table: &RoutingTable) -> Result<Applied, ClientError> {
        match self.ask(&Request::Apply(Box::new(table.clone()))).await? {
            Answer::Applied(applied) => Ok(applied),
            answer => Err(self.unexpected(&answer)),
        }
    }

    /// Returns when the instance has nothing in flight: by itself, or because it was cut
    /// at `limit` (which takes up to 4 s more, as it is spread out). Dropping the call
    /// ends the wait without effect. Refused while a table names the instance; at once
    /// done for one that is not known.
    pub async fn drain(
        &self,
        instance: &InstanceId,
        limit: Millis,
    ) -> Result<DrainReport, ClientError> {
        let request = Request::Drain {
            instance: instance.clone(),
            limit,
        };
        match self.ask(&request).await? {
            Answer::Drained(report) => Ok(report),
            answer => Err(self.unexpected(&answer)),
        }
    }

    /// Forgets an environment and its generation. One that is not known is no error.
    pub async fn remove_environment(&self, name: &EnvironmentName) -> Result<(), ClientError> {
        self.done(&Request::RemoveEnvironment(name.clone())).await
    }

    pub async fn status(&self) -> Result<Status, ClientError> {
        match self.ask(&Request::Status).await? {
            Answer::Status(status) => Ok(*status),
            answer => Err(self.unexpected(&answer)),
        }
    }

    /// What was counted of these instances since the proxy has known them; those that it
    /// does not know are left out.
    pub async fn traffic(
        &self,
        of: Vec<InstanceId>,
    ) -> Result<BTreeMap<InstanceId, Traffic>, ClientError> {
        match self.ask(&Request::Traffic(of)).await? {
            Answer::Traffic(traffic) => Ok(traffic),
            answer => Err(self.unexpected(&answer)),
        }
    }

    pub async fn ports(&self) -> Result<Ports, ClientError> {
        match self.ask(&Request::Ports).await? {
            Answer::Ports(ports) => Ok(ports),
            answer => Err(self.unexpected(&answer)),
        }
    }

    /// Tells a proxy whose sockets have been taken over to serve only what it has.
    pub(crate) async fn retire(&self) -> Result<(), ClientError> {
        self.done(&Request::Retire).await
    }

    /// Asks the proxy to end: it takes nothing new and finishes what is open. Returns
    /// before it has ended.
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        self.done(&Request::Shutdown).await
    }

    async fn done(&self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request).await? {
            Answer::Done => Ok(()),
            answer => Err(self.unexpected(&answer)),
        }
    }

    async fn ask(&self, request: &Request) -> Result<Answer, ClientError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Unreachable {
            socket: self.socket.clone(),
            source,
        })?;
        let line = exchange(stream, request).await;
        let line = line.map_err(|error| self.lost(Some(error)))?;
        if line.is_empty() {
            return Err(self.lost(None));
        }
        match serde_json::from_slice(&line) {
            Ok(Answer::Refused { kind, message }) => Err(ClientError::Refused { kind, message }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.other(error.to_string())),
        }
    }

    fn lost(&self, source: Option<io::Error>) -> ClientError {
        ClientError::Lost {
            socket: self.socket.clone(),
            source,
        }
    }

    fn other(&self, found: String) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            found,
        }
    }

    fn unexpected(&self, answer: &Answer) -> ClientError {
        self.other(format!("unexpected answer {answer:?}"))
    }
}

async fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    BufReader::new(stream)
        .take(CONTROL_LINE)
        .read_until(b'\n', &mut answer)
        .await?;
    Ok(answer)
}
