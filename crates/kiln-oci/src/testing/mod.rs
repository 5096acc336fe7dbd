//! Fakes that behave, for tests of this crate and of those that build on it
//! (feature `testing`).

mod blobs;
mod image;

pub use blobs::MemoryBlobs;
pub use image::SampleImage;
