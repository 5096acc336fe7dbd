//! The server's side of the control socket.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::{Answer, PROTOCOL, Refusal, Request};
use crate::core::{Core, RefusedError};
use crate::handover;
use crate::limits::{CONTROL_CONNECTIONS, CONTROL_LINE};
use crate::lock;

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("a proxy is running already and has {0}")]
    Running(PathBuf),
    #[error("can't make the control socket {path}")]
    Bind { path: PathBuf, source: io::Error },
}

/// The listening socket and the lock which says that this process has it.
pub(crate) struct Socket {
    listener: UnixListener,
    /// Where it is now: a retired proxy's is moved aside.
    path: Mutex<PathBuf>,
    lock: File,
}

/// What a conversation is about.
struct Host {
    core: Arc<Core>,
    socket: Arc<Socket>,
    shutdown: watch::Sender<bool>,
}

impl Socket {
    /// Makes it with mode 0600 from its first moment on, in place of one that was left
    /// behind. Only one process at a time has it: whoever holds the lock beside it.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let fail = |source| SocketError::Bind {
            path: path.to_owned(),
            source,
        };
        let lock = File::create(path.with_extension("lock")).map_err(fail)?;
        if lock.try_lock().is_err() {
            return Err(SocketError::Running(path.to_owned()));
        }
        let fresh = path.with_extension("new");
        let listener = (|| {
            match std::fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&fresh)?;
            std::fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
            std::fs::rename(&fresh, path)?;
            Ok(listener)
        })()
        .map_err(fail)?;
        Ok(Self {
            listener,
            path: Mutex::new(path.to_owned()),
            lock,
        })
    }

    /// Lets another process have its place, and goes on under another name.
    fn move_aside(&self) -> io::Result<()> {
        let mut path = lock(&self.path);
        let aside = handover::aside(&path);
        std::fs::rename(&*path, &aside)?;
        *path = aside;
        self.lock.unlock()
    }

    /// Answers until it is dropped. `shutdown` is set when somebody asks for it.
    pub(crate) async fn serve(self: &Arc<Self>, core: Arc<Core>, shutdown: watch::Sender<bool>) {
        let host = Arc::new(Host {
            core,
            socket: Arc::clone(self),
            shutdown,
        });
        let places = Arc::new(Semaphore::new(CONTROL_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let host = Arc::clone(&host);
                    tokio::spawn(async move {
                        if let Err(error) = converse(&host, stream).await {
                            tracing::debug!(%error, "control connection");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "control socket");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&*lock(&self.path));
    }
}

async fn converse(host: &Host, stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    while let Some(line) = read_line(&mut read).await? {
        let answer = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => {
                let answered = answer(host, request, write.as_ref());
                tokio::pin!(answered);
                tokio::select! {
                    answer = &mut answered => answer,
                    // The client is gone: whatever it waits for ends without effect.
                    () = gone(&mut read) => return Ok(()),
                }
            }
            Err(error) => Answer::Refused {
                kind: Refusal::Invalid,
                message: format!("this is no request: {error}"),
            },
        };
        write_line(&mut write, &answer).await?;
    }
    Ok(())
}

async fn read_line(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = read.take(CONTROL_LINE).read_until(b'\n', &mut line).await?;
    if n == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let text = format!("a line ended early or is longer than {CONTROL_LINE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(Some(line))
}

/// Resolves at the end of the stream; further requests may wait in the meantime.
async fn gone(read: &mut BufReader<OwnedReadHalf>) {
    match read.fill_buf().await {
        Ok([]) | Err(_) => {}
        Ok(_) => std::future::pending().await,
    }
}

async fn write_line(write: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Sends copies of the listening sockets; the answer says what they are for.
async fn sockets(core: &Core, stream: &UnixStream) -> Answer {
    let sent = async {
        let (wanted, fds): (Vec<_>, Vec<_>) = core.sockets().await?.into_iter().unzip();
        handover::send(stream, &fds).await?;
        Ok::<_, io::Error>(wanted)
    };
    match sent.await {
        Ok(wanted) => Answer::Sockets(wanted),
        Err(error) => Answer::Refused {
            kind: Refusal::Invalid,
            message: format!("the sockets can't be passed on: {error}"),
        },
    }
}

async fn retire(host: &Host) -> Answer {
    // The place first: should that fail, this proxy goes on as if nothing had been asked.
    if let Err(error) = host.socket.move_aside() {
        return Answer::Refused {
            kind: Refusal::State,
            message: format!("the control socket can't be moved aside: {error}"),
        };
    }
    host.core.retire().await;
    Answer::Done
}

async fn answer(host: &Host, request: Request, stream: &UnixStream) -> Answer {
    let core = &host.core;
    let outcome = match request {
        Request::Hello => Ok(Answer::Hello {
            protocol: PROTOCOL,
            pid: std::process::id(),
        }),
        Request::Apply(table) => {
            // In its own task: a client that goes away must not leave half a table.
            let core = Arc::clone(core);
            match tokio::spawn(async move { core.apply(*table).await }).await {
                Ok(applied) => applied.map(Answer::Applied),
                Err(error) => return broken(&error),
            }
        }
        Request::RemoveEnvironment(name) => {
            let core = Arc::clone(core);
            match tokio::spawn(async move { core.remove_environment(&name).await }).await {
                Ok(removed) => removed.map(|()| Answer::Done),
                Err(error) => return broken(&error),
            }
        }
        Request::Drain { instance, limit } => core
            .drain(&instance, limit.into())
            .await
            .map(Answer::Drained),
        Request::Status => Ok(Answer::Status(Box::new(core.status().await))),
        Request::Traffic(of) => Ok(Answer::Traffic(core.traffic(&of).await)),
        Request::Ports => Ok(Answer::Ports(core.ports().await)),
        Request::TakeOver => Ok(sockets(core, stream).await),
        Request::Retire => Ok(retire(host).await),
        Request::Shutdown => {
            host.shutdown.send_replace(true);
            Ok(Answer::Done)
        }
    };
    outcome.unwrap_or_else(|refused| Answer::Refused {
        kind: kind(&refused),
        message: describe(&refused),
    })
}

fn kind(refused: &RefusedError) -> Refusal {
    match refused {
        RefusedError::Older { .. } => Refusal::OlderGeneration,
        RefusedError::UnknownService { .. } => Refusal::Invalid,
        RefusedError::StillServing(_) => Refusal::StillServing,
        RefusedError::State(_) => Refusal::State,
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// A task that panicked: a bug, told rather than hidden.
fn broken(error: &tokio::task::JoinError) -> Answer {
    Answer::Refused {
        kind: Refusal::State,
        message: format!("the proxy failed within: {error}"),
    }
}
