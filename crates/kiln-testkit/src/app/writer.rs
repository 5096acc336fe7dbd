//! One writer at a time: who begins while another holds the file puts that on record.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::Path;

/// Beside the lock, one line a writer.
const STARTS: &str = "starts";
/// Beside the lock, one line for each that met another.
const OVERLAPS: &str = "overlaps";

/// Holds the file as long as what is returned lives.
pub(super) fn begin(path: &Path, who: &str) -> io::Result<File> {
    let file = append(path)?;
    writeln!(append(&path.with_extension(STARTS))?, "{who}")?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            writeln!(append(&path.with_extension(OVERLAPS))?, "{who}")?;
            Ok(file)
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}
