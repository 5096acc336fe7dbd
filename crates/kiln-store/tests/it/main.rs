//! The store from outside, on real files; as root also mounted by the kernel.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod collect;
mod content;
mod images;
mod mounted;
mod repair;
mod support;
