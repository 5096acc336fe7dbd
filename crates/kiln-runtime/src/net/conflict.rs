//! Firewalls of others that drop what kiln's instances send and receive.
//!
//! A packet passes only if every table accepts it, so kiln's own accept is no help
//! against a chain whose policy is to drop: Docker sets the FORWARD policy to DROP,
//! ufw and hand-written rules often INPUT. kiln changes no tables but its own; it says
//! so, and what to do.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::channel::Channel;
use super::nft::{Hook, chains_with_hook, rule_bytes};

/// How kiln's bridges are named; a rule that names such an interface is taken as the
/// user's exception for them.
const BRIDGE_PREFIX: &[u8] = b"kn";
/// `NFTA_DATA_VALUE`, after which a comparison's bytes follow.
const DATA_VALUE: [u8; 2] = 1u16.to_ne_bytes();

// linux/netfilter_ipv4/ip_tables.h
const IPT_SO_GET_INFO: libc::c_int = 64;
const IPT_SO_GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_getinfo`: name, valid hooks, hook entries, underflows, entries, size.
const INFO_BYTES: usize = 84;
const INFO_UNDERFLOW_AT: usize = 56;
const INFO_SIZE_AT: usize = 80;
/// `struct ipt_get_entries` before its entries: name, size, padding.
const ENTRIES_AT: usize = 40;
/// `struct ipt_entry`'s size, after which its (standard) target begins; the verdict
/// follows the target's 32-byte head.
const ENTRY_BYTES: usize = 112;
const VERDICT_AT: usize = ENTRY_BYTES + 32;
/// `-NF_DROP - 1`
const VERDICT_DROP: i32 = -1;
/// A table of more bytes is not looked into (Kubernetes makes some of a few MiB).
const TABLE_LIMIT: usize = 64 << 20;

/// In words: which chain of another firewall drops what kiln forwards between
/// instances and the outside, and what to do. `None`: none is seen (or the kernel can't be asked).
pub fn forward_policy_conflict() -> Option<String> {
    let place = dropping_chain(Hook::Forward)?;
    Some(format!(
        "{place} drops forwarded packets that no rule of it accepts (Docker sets it so): instances \
         can't reach the outside; with Docker: `iptables -I DOCKER-USER -i kn+ -j ACCEPT` and \
         `iptables -I DOCKER-USER -o kn+ -j ACCEPT`, otherwise the same in that chain (kiln's own \
         table still drops what must not pass)"
    ))
}

/// The same for packets to the host: instances then reach neither the resolver nor
/// any service.
pub fn input_policy_conflict() -> Option<String> {
    let place = dropping_chain(Hook::Input)?;
    Some(format!(
        "{place} drops packets to this host that no rule of it accepts: instances can't resolve names \
         nor reach services; let them in: `iptables -I INPUT -i kn+ -j ACCEPT`, with ufw \
         `ufw allow in on <bridge>` (kiln's own table still drops what must not pass)"
    ))
}

fn dropping_chain(hook: Hook) -> Option<String> {
    in_nf_tables(hook).or_else(|| in_legacy_table(hook))
}

/// Native tables and those of iptables-nft.
fn in_nf_tables(hook: Hook) -> Option<String> {
    let mut channel = Channel::netfilter().ok()?;
    let chains = chains_with_hook(&mut channel, hook).ok()?;
    chains.into_iter().filter(|c| c.drops).find_map(|chain| {
        let rules = rule_bytes(&mut channel, &chain).unwrap_or_default();
        let excepted = rules.iter().any(|rule| names_our_bridges(rule));
        (!excepted).then(|| format!("chain {} of the nftables table {}", chain.name, chain.table))
    })
}

fn names_our_bridges(rule: &[u8]) -> bool {
    let value = [&DATA_VALUE, BRIDGE_PREFIX].concat();
    rule.windows(value.len()).any(|window| window == value)
}

/// The filter table of iptables-legacy, only if it is there: asking for it would
/// load it.
fn in_legacy_table(hook: Hook) -> Option<String> {
    let tables = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").ok()?;
    tables.lines().find(|line| *line == "filter")?;
    let (info, entries) = legacy_filter_table().ok()?;
    legacy_drops(&info, &entries, hook).filter(|drops| {
        *drops
            && !entries
                .windows(BRIDGE_PREFIX.len() + 1)
                .any(names_interface)
    })?;
    let chain = if hook == Hook::Input {
        "INPUT"
    } else {
        "FORWARD"
    };
    Some(format!("chain {chain} of iptables-legacy's filter table"))
}

/// The prefix after a zero: an interface's name in an entry begins at a zeroed field's
/// border (after the address masks or the other name).
fn names_interface(window: &[u8]) -> bool {
    window.strip_prefix(&[0]) == Some(BRIDGE_PREFIX)
}

/// Whether the hook's policy, its last rule ("underflow"), is to drop.
fn legacy_drops(info: &[u8], entries: &[u8], hook: Hook) -> Option<bool> {
    let number = |bytes: &[u8], at: usize| {
        let raw = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(raw.try_into().ok()?))
    };
    let underflow = number(info, INFO_UNDERFLOW_AT + 4 * hook as usize)? as usize;
    let verdict = number(entries, underflow.checked_add(VERDICT_AT)?)? as i32;
    Some(verdict == VERDICT_DROP)
}

/// `struct ipt_getinfo` and the entries of the filter table.
fn legacy_filter_table() -> io::Result<(Vec<u8>, Vec<u8>)> {
    let info = legacy_option(IPT_SO_GET_INFO, &[], INFO_BYTES)?;
    let size = info
        .get(INFO_SIZE_AT..INFO_SIZE_AT + 4)
        .and_then(|raw| Some(u32::from_ne_bytes(raw.try_into().ok()?)))
        .filter(|size| (*size as usize) < TABLE_LIMIT)
        .ok_or(io::ErrorKind::InvalidData)?;
    let all = legacy_option(
        IPT_SO_GET_ENTRIES,
        &size.to_ne_bytes(),
        ENTRIES_AT + size as usize,
    )?;
    Ok((info, all.get(ENTRIES_AT..).unwrap_or_default().to_vec()))
}

/// `getsockopt(SOL_IP, option)` with a buffer that begins with the table's name (32
/// bytes) and `argument`.
#[allow(unsafe_code)] // No safe wrapper knows these options.
fn legacy_option(option: libc::c_int, argument: &[u8], size: usize) -> io::Result<Vec<u8>> {
    const NAME_BYTES: usize = 32;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut buffer = vec![0u8; size.max(NAME_BYTES + argument.len())];
    buffer[..6].copy_from_slice(b"filter");
    buffer[NAME_BYTES..NAME_BYTES + argument.len()].copy_from_slice(argument);
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the buffer is live, owned and `length` bytes long; the kernel writes at
    // most that many and keeps no pointer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(buffer)
    }
}
