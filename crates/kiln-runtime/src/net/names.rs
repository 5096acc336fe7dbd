//! Names and addresses that follow from others, so that nothing has to be remembered:
//! the same instance always gets the same interface and hardware address.

use std::net::Ipv4Addr;
use std::path::Path;

use kiln_model::Digest;

/// The longest interface name (`IFNAMSIZ` without its end mark), bytes.
pub const INTERFACE_NAME_BYTES: usize = 15;

/// Six hex digits that tell this kiln root from others on the machine.
///
/// The path is made canonical; one that does not exist yet is only made absolute.
pub fn root_tag(kiln_root: &Path) -> String {
    let path = kiln_root
        .canonicalize()
        .or_else(|_| std::path::absolute(kiln_root))
        .unwrap_or_else(|_| kiln_root.to_owned());
    hash_of(&[path.as_os_str().as_encoded_bytes()], 6)
}

/// The host's end of the pair that joins `interface` of the instance in `netns`:
/// `kv` and twelve hex digits.
pub fn veth_name(netns: &Path, interface: &str) -> String {
    let path = netns.as_os_str().as_encoded_bytes();
    format!("kv{}", hash_of(&[path, b"\0", interface.as_bytes()], 12))
}

/// A locally administered unicast hardware address that holds the IPv4 address, so
/// that peers' ARP caches stay right when an instance comes back with its address.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x6b, a, b, c, d]
}

/// `aa:bb:cc:dd:ee:ff` of a unicast address.
pub(super) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        let part = parts
            .next()
            .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let usable = bytes[0] & 1 == 0 && bytes != [0; 6];
    (parts.next().is_none() && usable).then_some(bytes)
}

/// As the kernel judges names (`dev_valid_name`), and plain ASCII.
pub(super) fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
}

fn hash_of(parts: &[&[u8]], digits: usize) -> String {
    let mut hex = Digest::of(parts.concat()).hex();
    hex.truncate(digits);
    hex
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ_by_what_they_are_for() {
        let one = veth_name(Path::new("/r/instances/a/netns"), "eth0");
        assert_eq!(one, veth_name(Path::new("/r/instances/a/netns"), "eth0"));
        assert_ne!(one, veth_name(Path::new("/r/instances/a/netns"), "eth1"));
        assert_ne!(one, veth_name(Path::new("/r/instances/b/netns"), "eth0"));
        assert!(is_interface_name(&one));
        for bad in ["", "a-name-of-sixteen", "a/b", "a b", "..", "eth0:1"] {
            assert!(!is_interface_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_root_has_one_tag_however_it_is_written() {
        assert_eq!(
            root_tag(Path::new("/usr/lib")),
            root_tag(Path::new("/usr/lib/../lib"))
        );
        assert_ne!(root_tag(Path::new("/usr/lib")), root_tag(Path::new("/usr")));
        assert_eq!(root_tag(Path::new("/not/there")).len(), 6);
    }

    #[test]
    fn hardware_addresses_are_unicast_and_read_back() {
        assert_eq!(
            mac_of(Ipv4Addr::new(10, 200, 0, 7)),
            [0x0a, 0x6b, 10, 200, 0, 7]
        );
        assert_eq!(
            parse_mac("02:42:ac:11:65:43").unwrap(),
            [2, 0x42, 0xac, 0x11, 0x65, 0x43]
        );
        for bad in [
            "",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "2:42:ac:11:65:43",
            "02:42:ac:11:65:43:00",
            "+2:42:ac:11:65:43",
        ] {
            assert!(parse_mac(bad).is_none(), "{bad}");
        }
    }
}
