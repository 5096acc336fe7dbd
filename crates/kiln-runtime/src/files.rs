//! The text of the few files kiln puts into every instance's `/etc`.

use std::fmt::Write;
use std::net::IpAddr;

use kiln_model::InstanceSpec;
use kiln_model::instance::InstanceNetwork;

/// `/etc/hosts`: localhost, the instance's own name, then the given names.
pub fn hosts(spec: &InstanceSpec) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    let own: IpAddr = match &spec.network {
        InstanceNetwork::Bridged(interfaces) => interfaces
            .first()
            .map_or(IpAddr::from([127, 0, 0, 1]), |i| i.address.into()),
        _ => IpAddr::from([127, 0, 0, 1]),
    };
    let name = match &spec.domainname {
        Some(domain) => format!("{0}.{domain} {0}", spec.hostname),
        None => spec.hostname.clone(),
    };
    if !name.trim().is_empty() {
        let _ = writeln!(text, "{own}\t{name}");
    }
    for (address, name) in &spec.hosts {
        let _ = writeln!(text, "{address}\t{name}");
    }
    text
}

/// `/etc/resolv.conf` (resolv.conf(5)); empty without a resolver.
pub fn resolv_conf(spec: &InstanceSpec) -> String {
    let mut text = String::new();
    let Some(resolver) = &spec.resolver else {
        return text;
    };
    if !resolver.search.is_empty() {
        let _ = writeln!(text, "search {}", resolver.search.join(" "));
    }
    for server in &resolver.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !resolver.options.is_empty() {
        let _ = writeln!(text, "options {}", resolver.options.join(" "));
    }
    text
}

/// `/etc/hostname`.
pub fn hostname(spec: &InstanceSpec) -> String {
    format!("{}\n", spec.hostname)
}
