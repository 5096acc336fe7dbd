//! Ports and interfaces, by the kernel's tables of the instance's network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kiln_model::suite::PortProtocol;
use serde_json::json;

use super::Found;
use super::inside::Inside;
use super::probe::absent;

/// The state of a TCP socket that listens (`include/net/tcp_states.h`).
const LISTEN: &str = "0A";

pub(super) fn port(
    inside: &Inside<'_>,
    protocol: PortProtocol,
    port: u16,
) -> Result<Found, String> {
    let name = protocol.as_str();
    let table = inside.proc(&format!("net/{name}"))?;
    let any_state = matches!(protocol, PortProtocol::Udp | PortProtocol::Udp6);
    let ips: Vec<String> = table
        .lines()
        .skip(1)
        .filter_map(|line| socket(line, any_state))
        .filter(|(_, at)| *at == port)
        .map(|(ip, _)| ip.to_string())
        .collect();
    Ok(match ips.is_empty() {
        true => absent("listening"),
        false => Found::from([("listening", json!(true)), ("ip", json!(ips))]),
    })
}

/// Where a line's socket listens.
fn socket(line: &str, any_state: bool) -> Option<(IpAddr, u16)> {
    let mut words = line.split_whitespace().skip(1);
    let (ip, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    if !any_state && state != LISTEN {
        return None;
    }
    Some((address(ip)?, u16::from_str_radix(port, 16).ok()?))
}

/// Words of four bytes, each as this machine has it in memory.
fn address(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::new();
    for word in text.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|b| IpAddr::V4(Ipv4Addr::from(b)));
    let v6 = || <[u8; 16]>::try_from(bytes.as_slice()).map(|b| IpAddr::V6(Ipv6Addr::from(b)));
    v4.or_else(|_| v6()).ok()
}

pub(super) fn interface(inside: &Inside<'_>, name: &str) -> Result<Found, String> {
    let devices = inside.proc("net/dev")?;
    let names = devices.lines().filter_map(|line| line.split_once(':'));
    if !names
        .map(|(name, _)| name.trim())
        .any(|known| known == name)
    {
        return Ok(absent("exists"));
    }
    let mut found = Found::from([("exists", json!(true))]);
    let mtu = inside.text(&format!("/sys/class/net/{name}/mtu"))?;
    let mtu = mtu.trim().parse::<u64>().ok();
    found.extend(mtu.map(|mtu| ("mtu", json!(mtu))));
    // An isolated network has no other IPv4 address: the kernel gives the loopback this.
    let mut addresses = match name {
        "lo" => vec!["127.0.0.1/8".to_owned()],
        _ => Vec::new(),
    };
    // Where there is no IPv6, there is no table.
    let table = inside.proc("net/if_inet6").unwrap_or_default();
    addresses.extend(table.lines().filter_map(|line| inet6(line, name)));
    found.insert("addrs", json!(addresses));
    Ok(found)
}

/// `address index prefix scope flags name`, all in hexadecimal but the name.
fn inet6(line: &str, name: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [address, _, prefix, _, _, of] = words.as_slice() else {
        return None;
    };
    let address = u128::from_str_radix(address, 16).ok()?;
    let prefix = u8::from_str_radix(prefix, 16).ok()?;
    (*of == name).then(|| format!("{}/{prefix}", Ipv6Addr::from(address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_tables_are_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 0 0 0 1";
        let found = socket(line, false);
        assert_eq!(found, Some((IpAddr::from([127, 0, 0, 1]), 8080)));
        let line = line.replace(" 0A ", " 01 ");
        assert_eq!(socket(&line, false), None);
        assert!(socket(&line, true).is_some());
        let six = "0: 00000000000000000000000001000000:0050 0:0 0A 0";
        let found = socket(six, false);
        assert_eq!(found, Some((IpAddr::V6(Ipv6Addr::LOCALHOST), 80)));
        let line = "00000000000000000000000000000001 01 80 10 80       lo";
        assert_eq!(inet6(line, "lo").as_deref(), Some("::1/128"));
        assert_eq!(inet6(line, "eth0"), None);
    }
}
