//! What the tests share: a root of its own for each, the `kiln` binary run with bounds,
//! small projects, plain HTTP, and a look at everything that a root may leave behind.
//!
//! Nothing is started here but the binary under test. [`Kiln`] cleans up whatever happens.

mod fixture;
mod http;
mod leftovers;
mod machine;
mod process;
mod project;

pub use fixture::{BUSYBOX, Page};
pub use http::{Answer, get, request};
pub use leftovers::leftovers;
pub use machine::{Kiln, free_port, lend_packages};
pub use process::{Running, alive, kill, wait_until};
pub use project::{Instance, Project};
