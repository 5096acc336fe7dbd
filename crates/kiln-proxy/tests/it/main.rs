//! The proxy from outside: a real one, with real sockets on loopback addresses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod control;
mod dns;
mod handover;
mod http;
mod split;
mod support;
mod swap;
mod tcp;
