//! Networks, names, ports, and networks that several projects share.

use super::{Case, Has, HasNot, Is, check, look, project};
use crate::common::{BUSYBOX, Kiln, Project, get};

const CASES: &[Case] = &[
    Case {
        name: "server",
        keys: "container_name: the-server
expose: ['8000']
networks:
  front: {aliases: [shop], priority: 1}
  back: {ipv4_address: 10.213.8.50, mac_address: '02:42:0a:d5:00:99', interface_name: inner}
ports:
  - '${PORT}:8000'
  - {target: 8000, published: '${LOCAL}', host_ip: 127.0.0.2, protocol: tcp, mode: host, name: web, app_protocol: http}
  - {target: 8000, published: '${RANGE}', protocol: tcp}",
        looks: &[
            look("networks networks.*.interface_name networks.*.mac_address", "cat /sys/class/net/inner/address", Is("02:42:0a:d5:00:99")),
            look("/networks.*.ipam /networks.*.ipam.config /networks.*.ipam.config.[].subnet", "ip addr show inner", Has("inet 10.213.")),
            look("/networks.*.driver_opts", "cat /sys/class/net/eth0/mtu", Is("1400")),
            look("networks.*.priority /networks /networks.*.internal", "ip route | grep ^default", Has("dev eth0")),
        ],
    },
    Case {
        name: "client",
        keys: "networks: [front]
mac_address: '02:42:0a:d5:00:77'
dns: [192.0.2.53]
dns_search: [example.test]
dns_opt: ['ndots:2']
links: ['server:linked']
extra_hosts: {far: 192.0.2.9}",
        looks: &[
            look("mac_address", "cat /sys/class/net/eth0/address", Is("02:42:0a:d5:00:77")),
            look("dns", "cat /etc/resolv.conf", Has("nameserver 192.0.2.53")),
            look("dns_search", "cat /etc/resolv.conf", Has("search example.test")),
            look("dns_opt", "cat /etc/resolv.conf", Has("options ndots:2")),
            look("networks.*.aliases", "wget -q -O - http://shop:8000/", Is("network")),
            look("container_name", "wget -q -O - http://the-server:8000/", Is("network")),
            look("links", "wget -q -O - http://linked:8000/", Is("network")),
            look("expose", "wget -q -O - http://server:8000/", Is("network")),
            look("/networks.*.name", "nslookup server.plaza", Has("Address")),
        ],
    },
    Case {
        name: "inner",
        keys: "networks: [back]",
        looks: &[
            look("networks.*.ipv4_address", "nslookup server", Has("10.213.8.50")),
            look("/networks.*.internal", "ip route", HasNot("default")),
        ],
    },
    Case {
        name: "alone",
        keys: "network_mode: none",
        looks: &[look("network_mode", "ls /sys/class/net", Is("lo"))],
    },
    Case {
        name: "outside",
        keys: "network_mode: host\ncommand: [/bin/sleep, '1000']",
        looks: &[look("network_mode", "readlink /proc/1/ns/net", Is("{host:ns/net}"))],
    },
    Case {
        name: "side",
        keys: "network_mode: service:server\ncommand: [/bin/sleep, '1000']",
        looks: &[
            look("network_mode", "readlink /proc/1/ns/net", Is("{server:ns/net}")),
            look("network_mode", "wget -q -O - http://127.0.0.1:8000/", Is("network")),
            look("network_mode", "wget -q -O - http://shop:8000/", Is("network")),
        ],
    },
];

const TOP: &str = "networks:
  front: {name: plaza, driver: bridge, labels: {a: b}, driver_opts: {com.docker.network.driver.mtu: '1400'}}
  back: {internal: true, enable_ipv4: true, enable_ipv6: false, ipam: {driver: default, config: [{subnet: 10.213.0.0/20, gateway: 10.213.0.1}]}}
";

pub const OTHER: &[&str] = &[
    "ports",
    "ports.[].target",
    "ports.[].published",
    "ports.[].host_ip",
    "ports.[].protocol",
    "ports.[].mode",
    "ports.[].name",
    "ports.[].app_protocol",
    "/networks.*.external",
    "/networks.*.external.name",
];

pub fn keys() -> impl Iterator<Item = &'static str> {
    let looks = CASES.iter().flat_map(|c| c.looks).map(|l| l.of);
    looks.chain(OTHER.iter().copied())
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn networks_names_and_ports_are_as_said() {
    let Some(kiln) = Kiln::new() else { return };
    let mut project = project(&kiln, "network", CASES, TOP, &[]);
    let (local, range) = (free_port(), free_port());
    project.set("LOCAL", local);
    project.set("RANGE", format!("{range}-{}", range.saturating_add(9)));
    project.up().ok();
    check(&project, CASES);
    assert_eq!(project.page(), "network");
    assert!(get(local, "/").is_err(), "only on 127.0.0.2");
    assert!(std::net::TcpStream::connect(("127.0.0.2", local)).is_ok());
    let mut some = range..=range.saturating_add(9);
    assert!(some.any(|port| get(port, "/").is_ok_and(|a| a.body.trim() == "network")));
    shared_networks(&kiln, &project);
}

/// Another project on its network, by its name; and on one that belongs to nobody.
fn shared_networks(kiln: &Kiln, project: &Project) {
    let guest = "    networks: [theirs, market]
networks:
  theirs: {external: true, name: plaza}
  market: {external: {name: market}}
";
    let compose = |service: &str, networks: &str| {
        format!("{BUSYBOX}services:\n  {service}:\n    build: .\n{networks}")
    };
    let text = compose("visitor", guest);
    let containerfile = fs_read(project, "Containerfile");
    let files = [
        ("compose.yaml", text.as_str()),
        ("Containerfile", containerfile.as_str()),
        ("run", "#!/bin/sh\n"),
        ("passwd", "root:x:0:0::/:/bin/sh\n"),
        ("group", "root:x:0:\n"),
        ("www/index.html", "guest"),
    ];
    let guest = kiln.project("guest", &files);
    guest
        .up()
        .code(&[3])
        .says(&["market", "kiln networks create market"]);
    kiln.run(&["networks", "create", "market"]).ok();
    guest.up().ok();
    let seen = guest
        .inside("visitor", "wget -q -O - http://shop:8000/")
        .ok();
    assert_eq!(seen.stdout.trim(), "network");
    let seen = project
        .inside("client", "wget -q -O - http://visitor:8000/")
        .ok();
    assert_eq!(seen.stdout.trim(), "guest");
    let text = compose(
        "neighbour",
        "    networks: [market]\nnetworks: {market: {external: true}}\n",
    );
    let mut files = files;
    files[0].1 = &text;
    let third = kiln.project("third", &files);
    third.up().ok();
    let seen = third
        .inside("neighbour", "wget -q -O - http://visitor:8000/")
        .ok();
    assert_eq!(seen.stdout.trim(), "guest");
    let unseen = third.inside("neighbour", "wget -T 2 -q -O - http://shop:8000/");
    assert_ne!(unseen.code, Some(0), "{unseen}");
    // The one it belongs to goes; those that have joined stay connected.
    project.run("down", &[]).ok();
    let route = guest.inside("visitor", "ip addr show").ok().stdout;
    assert!(route.contains("eth1"), "{route}");
    let listed = kiln.run(&["networks", "list"]).ok().stdout;
    assert!(
        listed.contains("plaza") && listed.contains("guest third"),
        "{listed}"
    );
    kiln.run(&["networks", "remove", "market"])
        .code(&[7])
        .says(&["in use"]);
    guest.run("down", &[]).ok();
    third.run("down", &[]).ok();
    kiln.run(&["networks", "remove", "market"]).ok();
    super::nothing_is_left(kiln);
}

fn fs_read(project: &Project, name: &str) -> String {
    std::fs::read_to_string(project.folder.join(name)).unwrap()
}
