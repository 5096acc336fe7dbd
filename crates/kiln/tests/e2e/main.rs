//! The `kiln` binary from the outside, for real: root, namespaces, mounts, networks, HTTP.
//! Facts and counts are asserted, never times.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod bounded;
mod canary;
mod common;
mod crash;
mod examples;
mod failing;
mod faults;
mod honour;
mod input;
mod lasting;
mod load;
mod looking;
mod matrix;
mod network;
mod platforms;
mod proving;
mod registry;
mod rollouts;
mod serving;
mod soak;
mod upgrade;
mod watch;
