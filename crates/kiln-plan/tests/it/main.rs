#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod before;
mod canary;
mod rollouts;
mod support;
mod watching;
