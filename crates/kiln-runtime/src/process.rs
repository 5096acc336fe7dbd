//! Facts about processes, from `/proc`.

use std::fs;

/// Whether it has a handler for the signal, or keeps it for later (`SigCgt`, `SigBlk` of
/// `/proc/<pid>/status`, proc(5)).
pub fn takes(pid: u32, signal: i32) -> Option<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let bit = 1u64 << u32::try_from(signal - 1).ok()?.min(63);
    Some((set("SigCgt:")? | set("SigBlk:")?) & bit != 0)
}

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
