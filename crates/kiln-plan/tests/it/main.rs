#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod rollouts;
mod support;
mod watching;
