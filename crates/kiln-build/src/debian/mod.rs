//! Debian bases without a registry.
mod aptconf;
mod deb822;
pub mod index;
pub mod relation;
pub mod release;
pub mod resolve;
pub mod sources;
pub mod verify;
pub mod version;
