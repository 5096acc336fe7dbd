//! Facts about processes, from `/proc`.

use std::fs;

/// When a process started, in clock ticks since boot (`/proc/<pid>/stat`, field 22). `None`:
/// it has ended, even if nobody has asked for its exit status yet.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18)?.parse().ok())?
}
