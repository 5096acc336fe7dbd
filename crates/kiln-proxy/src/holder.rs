//! Which process has a port, as far as `/proc` tells: only for the error's text.

use std::fs;
use std::net::SocketAddr;

use kiln_model::spec::Protocol;

use crate::status::Holder;

/// The state `LISTEN` in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The process listening on the port of `address` (on any address, as any may be in the
/// way). Best effort.
pub(crate) fn holder(address: SocketAddr, protocol: Protocol) -> Option<Holder> {
    let tables: [&str; 2] = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
    };
    let inodes: Vec<u64> = tables
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|text| inodes(&text, address.port(), protocol))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let wanted: Vec<String> = inodes.iter().map(|n| format!("socket:[{n}]")).collect();
    fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| has_any(*pid, &wanted))
        .map(|pid| Holder {
            pid,
            program: fs::read_to_string(format!("/proc/{pid}/comm"))
                .map_or_else(|_| "?".into(), |name| name.trim().to_owned()),
        })
}

/// The inodes of the sockets in a table of `/proc/net` which have `port`.
fn inodes(table: &str, port: u16, protocol: Protocol) -> Vec<u64> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, local) = fields.get(1)?.rsplit_once(':')?;
            let listens = protocol == Protocol::Udp || *fields.get(3)? == LISTEN;
            let same = u16::from_str_radix(local, 16).ok()? == port;
            (listens && same).then(|| fields.get(9)?.parse().ok())?
        })
        .collect()
}

fn has_any(pid: u32, wanted: &[String]) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    files
        .filter_map(|file| fs::read_link(file.ok()?.path()).ok())
        .any(|target| {
            wanted
                .iter()
                .any(|socket| target.as_os_str() == socket.as_str())
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn this_process_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = holder(address, Protocol::Tcp).unwrap();
        assert_eq!(found.pid, std::process::id());
        assert!(!found.program.is_empty());
        drop(listener);
        assert_eq!(holder(address, Protocol::Tcp), None);
    }
}
