use kiln_model::Digest;

use super::credentials::CredentialError;
use crate::blob::{BlobWriteError, ReadSmallError};
use crate::manifest::{ImageError, ManifestError};

/// Why an image could not be moved from or to a registry.
#[derive(Debug, thiserror::Error)]
#[error("{reference}: {host}: {problem}")]
pub struct RegistryError {
    /// As the user wrote it, or close to it.
    pub reference: String,
    /// Who was asked.
    pub host: String,
    #[source]
    pub problem: Box<Problem>,
}

/// What went wrong, and what helps.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("the request failed: {cause}. {hint}")]
    Unreachable { cause: String, hint: String },
    #[error(
        "it asks for a login, or has no such image. Check the name, run `docker login {registry}`, and try again"
    )]
    LoginNeeded { registry: String },
    #[error(
        "it refuses the credentials that are configured for it. Run `docker login {registry}` again"
    )]
    LoginRefused { registry: String },
    #[error(
        "access is denied ({message}). The name may be wrong, or the account may lack the right"
    )]
    Denied { message: String },
    #[error("it has no {what}. Check the name and tag")]
    NotFound { what: String },
    #[error(
        "it is too busy: it still answered {status} after {attempts} attempts. Try again later"
    )]
    Busy { status: u16, attempts: u32 },
    #[error(
        "it asks to wait {seconds} s before the next attempt ({status}), longer than kiln waits. Try again then; a login often raises the limit"
    )]
    AskedToWait { status: u16, seconds: u64 },
    #[error("it answered {status} to {what}: {message}")]
    Status {
        status: u16,
        what: String,
        message: String,
    },
    #[error("its login procedure can't be followed: {problem}")]
    Challenge { problem: String },
    #[error(
        "it sent content with digest {found} where {expected} was asked for; it, or something on the way, is broken"
    )]
    WrongDigest { expected: Digest, found: Digest },
    #[error(
        "blob {digest} broke off {attempts} times, at last after {found} of {expected} bytes. Try again"
    )]
    Truncated {
        digest: Digest,
        found: u64,
        expected: u64,
        attempts: u32,
    },
    #[error("blob {digest} is longer than the {expected} bytes that its manifest says")]
    TooLong { digest: Digest, expected: u64 },
    #[error("{what} is larger than {limit} bytes, which kiln does not take")]
    TooLarge { what: String, limit: u64 },
    #[error("the transfer of {what} broke off: {cause}")]
    Broken { what: String, cause: String },
    #[error("manifest {digest} can't be used: {source}")]
    Manifest {
        digest: Digest,
        #[source]
        source: ManifestError,
    },
    #[error("the image can't be used: {0}")]
    Image(#[source] ImageError),
    #[error("it has no image for {wanted}, only for: {found}")]
    NoPlatform { wanted: String, found: String },
    #[error("its indexes lie too deep in one another")]
    TooDeep,
    #[error("blob {digest} can't be taken in: {source}")]
    Blob {
        digest: Digest,
        #[source]
        source: BlobWriteError,
    },
    #[error("{0}")]
    Source(#[from] ReadSmallError),
    #[error("{0}")]
    Credentials(#[from] CredentialError),
    /// A worker thread died; a defect of kiln.
    #[error("{what} ended unexpectedly: {cause}")]
    Worker { what: &'static str, cause: String },
}

/// An error and everything under it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
