//! How one proxy takes the place of another without a closed listener or connection.
//!
//! The new one is given copies of all listening sockets ([`send`], [`take`]) and serves on
//! them beside the old one, which changes nothing until then: whoever dies by now leaves
//! the other as it was. Then the old one *retires*: it moves its control socket aside,
//! takes nothing new, and lives until its last connection has ended. Until then the new one
//! tells it each table and drain ([`Predecessors`]), so that its connections go where they
//! should.
//!
//! Must stay as it is over versions: `Request::TakeOver`, `Request::Retire`, and the bytes
//! on the wire (blanks which carry the descriptors, then one line of JSON).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::control::{Answer, Request};
use crate::limits::{CONTROL_LINE, HANDOVER};
use crate::listeners::Wanted;
use crate::lock;
use crate::{Client, ClientError};

/// Descriptors in one message; the kernel takes 253.
const BATCH: usize = 64;

/// Sockets with what they are for. DNS has two.
pub(crate) type Sockets = Vec<(Wanted, OwnedFd)>;

#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    #[error("the proxy on {socket} can't be talked to")]
    Talk { socket: PathBuf, source: io::Error },
    #[error("the proxy on {socket} does not hand over: {message}")]
    Refused { socket: PathBuf, message: String },
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Sends the descriptors; the line that names them is the caller's to send after.
pub(crate) async fn send(stream: &UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    for batch in sockets.chunks(BATCH) {
        let fds: Vec<BorrowedFd<'_>> = batch.iter().map(AsFd::as_fd).collect();
        stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                    return Err(io::Error::other("too many descriptors for one message"));
                }
                let blank = [IoSlice::new(b" ")];
                sendmsg(stream, &blank, &mut control, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await?;
    }
    Ok(())
}

/// Asks the proxy on `socket` for copies of its listening sockets. Blocks, for at most
/// [`HANDOVER`] per message.
pub(crate) fn take(socket: &Path) -> Result<Sockets, TakeOverError> {
    let talk = |source| TakeOverError::Talk {
        socket: socket.to_owned(),
        source,
    };
    let refused = |message: String| TakeOverError::Refused {
        socket: socket.to_owned(),
        message,
    };
    let (line, fds) = ask(socket).map_err(talk)?;
    match serde_json::from_slice(&line).map_err(|e| refused(e.to_string()))? {
        Answer::Sockets(wanted) if wanted.len() == fds.len() => {
            Ok(wanted.into_iter().zip(fds).collect())
        }
        Answer::Sockets(wanted) => Err(refused(format!(
            "{} sockets were announced and {} came",
            wanted.len(),
            fds.len()
        ))),
        Answer::Refused { message, .. } => Err(refused(message)),
        answer => Err(refused(format!("unexpected answer {answer:?}"))),
    }
}

/// The answer's line, and the descriptors which came before it.
fn ask(socket: &Path) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut stream = BlockingStream::connect(socket)?;
    stream.set_read_timeout(Some(HANDOVER))?;
    stream.set_write_timeout(Some(HANDOVER))?;
    let mut request = serde_json::to_vec(&Request::TakeOver)?;
    request.push(b'\n');
    io::Write::write_all(&mut stream, &request)?;
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut bytes = [0u8; 64 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&stream, &mut buffer, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let too_long = line.len() as u64 + received.bytes as u64 > CONTROL_LINE;
        if received.bytes == 0 || too_long {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
    }
    Ok((line, fds))
}

/// Where a retired proxy's control socket goes: the first free name beside its old one.
pub(crate) fn aside(socket: &Path) -> PathBuf {
    let name = |n: u32| socket.with_extension(format!("{RETIRED}{n}"));
    (1..).map(name).find(|p| !p.exists()).unwrap_or(name(0))
}

const RETIRED: &str = "before-";

/// The retired proxies which still have connections.
#[derive(Default)]
pub(crate) struct Predecessors(Mutex<Vec<Client>>);

impl Predecessors {
    /// Looks for them beside the control socket; what a dead one has left is removed.
    pub(crate) async fn find(&self, socket: &Path) {
        let mut found = Vec::new();
        for path in retired(socket) {
            match Client::connect(&path).await {
                Ok(client) => found.push(client),
                Err(ClientError::Unreachable { .. }) => {
                    let _ = std::fs::remove_file(&path);
                }
                Err(error) => tracing::warn!(%error, "a retired proxy can't be led"),
            }
        }
        *lock(&self.0) = found;
    }

    /// Asks all of them; those which have ended meanwhile are forgotten.
    pub(crate) async fn each<T, F>(&self, ask: impl Fn(Client) -> F) -> Vec<T>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let known = lock(&self.0).clone();
        let asked = known
            .into_iter()
            .map(|client| (ask(client.clone()), client));
        let asked = asked.map(|(asked, client)| async move {
            match asked.await {
                Ok(answer) => Some(answer),
                Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => {
                    lock(&self.0).retain(|other| *other != client);
                    None
                }
                Err(error) => {
                    tracing::warn!(%error, "a retired proxy");
                    None
                }
            }
        });
        let answers = futures_util::future::join_all(asked).await;
        answers.into_iter().flatten().collect()
    }

    /// They are led by another proxy from now on.
    pub(crate) fn forget(&self) {
        lock(&self.0).clear();
    }
}

fn retired(socket: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(stem)) = (socket.parent(), socket.file_stem()) else {
        return Vec::new();
    };
    let prefix = format!("{}.{RETIRED}", stem.to_string_lossy());
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .map(|e| e.path())
        .collect()
}
