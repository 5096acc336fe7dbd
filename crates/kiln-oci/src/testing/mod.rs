//! Fakes that behave, for tests of this crate and of those that build on it
//! (feature `testing`).

mod blobs;
mod image;
pub mod registry;

pub use blobs::MemoryBlobs;
pub use image::SampleImage;
pub use registry::TestRegistry;
