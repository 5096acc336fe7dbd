//! Linux capabilities by name: Docker's default set, what a service adds and drops.

/// In the order of their numbers (capabilities(7)), without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What Docker gives a container that asks for nothing.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Every capability this kiln knows.
pub const ALL: u64 = (1 << NAMES.len()) - 1;
pub const COUNT: u32 = NAMES.len() as u32;

/// A name that is no capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no capability (use names like NET_ADMIN, or ALL; see capabilities(7))")]
pub struct CapabilityError(String);

/// The bit of one capability, or of all for `ALL`; with or without `CAP_`.
pub fn parse(name: &str) -> Result<u64, CapabilityError> {
    let upper = name.trim().to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if short == "ALL" {
        return Ok(ALL);
    }
    NAMES
        .iter()
        .position(|known| *known == short)
        .map(|bit| 1 << bit)
        .ok_or_else(|| CapabilityError(name.to_owned()))
}

/// The names in a set, in their order.
pub fn names(set: u64) -> Vec<&'static str> {
    NAMES
        .iter()
        .enumerate()
        .filter(|(bit, _)| set & (1 << bit) != 0)
        .map(|(_, name)| *name)
        .collect()
}

/// Docker's rule: with `ALL` added everything but what is dropped; with `ALL`
/// dropped only what is added; else the default set without what is dropped and
/// with what is added. Privileged is everything.
pub fn effective(
    add: &[String],
    drop: &[String],
    privileged: bool,
) -> Result<u64, CapabilityError> {
    let parse_all = |list: &[String]| list.iter().map(|n| parse(n)).collect::<Result<Vec<_>, _>>();
    let (add, drop) = (parse_all(add)?, parse_all(drop)?);
    let union = |list: &[u64]| list.iter().fold(0, |set, bits| set | bits);
    let single = |list: &[u64]| {
        union(
            &list
                .iter()
                .copied()
                .filter(|b| *b != ALL)
                .collect::<Vec<_>>(),
        )
    };
    Ok(if privileged {
        ALL
    } else if add.contains(&ALL) {
        ALL & !single(&drop)
    } else if drop.contains(&ALL) {
        union(&add)
    } else {
        default_set() & !union(&drop) | union(&add)
    })
}

fn default_set() -> u64 {
    DEFAULT
        .iter()
        .filter_map(|name| NAMES.iter().position(|known| known == name))
        .fold(0, |set, bit| set | 1 << bit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn set(add: &[&str], drop: &[&str]) -> Vec<&'static str> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        names(effective(&own(add), &own(drop), false).unwrap())
    }

    #[test]
    fn the_default_is_dockers_fourteen() {
        assert_eq!(default_set(), 0xa804_25fb);
        assert_eq!(set(&[], &[]).len(), 14);
    }

    #[test]
    fn added_and_dropped_as_docker_does() {
        assert_eq!(set(&["NET_ADMIN"], &["ALL"]), ["NET_ADMIN"]);
        assert_eq!(set(&["ALL"], &["SYS_ADMIN"]).len(), 40);
        assert!(!set(&[], &["cap_mknod"]).contains(&"MKNOD"));
        assert!(effective(&["NOPE".into()], &[], false).is_err());
    }
}
