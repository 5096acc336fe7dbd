//! In the place of the crate of this name, which libcontainer needs for checkpoints and
//! cannot be built without: kiln replaces instances and never thaws one.
//!
//! The real one brings protobuf, twice, and its code generator: a sixth of the first
//! release build, for code that a program run as root had better not contain. Here a
//! [`Criu`] cannot exist, so that the type checker proves none of its methods is ever
//! called. What must not enter: anything that does something.

use std::convert::Infallible;
use std::os::fd::RawFd;

/// Why there is no checkpoint.
#[derive(Debug)]
pub struct CriuError;

impl std::fmt::Display for CriuError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("kiln is built without checkpoints")
    }
}

impl std::error::Error for CriuError {}

/// How control groups would be kept.
#[derive(Debug, Clone)]
pub enum CgMode {
    DEFAULT,
}

/// A connection to criu: there is none.
pub struct Criu(Infallible);

impl Criu {
    /// # Errors
    /// Always.
    pub fn new() -> Result<Self, CriuError> {
        Err(CriuError)
    }

    pub fn get_criu_version(&mut self) -> Result<u32, CriuError> {
        match self.0 {}
    }

    pub fn dump(&mut self) -> Result<(), CriuError> {
        match self.0 {}
    }
}

macro_rules! never_called {
    ($($name:ident($($argument:ty),*)),* $(,)?) => {
        impl Criu {
            $(pub fn $name(&mut self, $(_: $argument),*) {
                match self.0 {}
            })*
        }
    };
}

never_called! {
    add_external(String),
    cgroups_mode(CgMode),
    set_ext_unix_sk(bool),
    set_external_mount(String, String),
    set_file_locks(bool),
    set_images_dir_fd(RawFd),
    set_leave_running(bool),
    set_link_remap(bool),
    set_log_file(String),
    set_log_level(i32),
    set_manage_cgroups(bool),
    set_orphan_pts_master(bool),
    set_pid(i32),
    set_root(String),
    set_shell_job(bool),
    set_tcp_established(bool),
    set_work_dir_fd(RawFd),
}

/// The key under which criu would know a namespace.
pub fn criu_ns_to_key(name: &str) -> String {
    name.to_owned()
}
