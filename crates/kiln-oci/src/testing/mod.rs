//! Fakes that behave, for tests of this crate and of those that build on it
//! (feature `testing`).

mod blobs;

pub use blobs::MemoryBlobs;
