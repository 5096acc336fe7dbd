//! The whole module against the real kernel, each test in network and mount
//! namespaces of its own, so that the host is not touched and nothing stays.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod tables;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::instance::Interface;
use kiln_model::network::BridgeNetwork;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{getsockopt, sockopt};

use super::*;

const PATIENCE: Duration = Duration::from_secs(5);
/// What is dropped must not arrive within this.
const DROPPED: Duration = Duration::from_millis(300);

/// A machine of its own: namespaces, a folder, loopback up.
pub(super) struct Host {
    folder: PathBuf,
}

/// Runs `test` on a thread that is alone in new namespaces.
pub(super) fn on_a_host(name: &str, test: impl FnOnce(&Host) + Send) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
        eprintln!("SKIPPED: needs root");
        return;
    }
    let folder = std::env::temp_dir().join(format!("kiln-net-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
                let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
                mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
                netns::bring_up_loopback().unwrap();
                test(&Host {
                    folder: folder.clone(),
                });
            })
            .join()
    });
    fs::remove_dir_all(&folder).unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

impl Host {
    /// An instance attached to `network` with the address `n` of its subnet.
    pub(super) fn instance(&self, name: &str, network: &BridgeNetwork, n: u32) -> PathBuf {
        let path = self.folder.join(name);
        create_netns(&path).unwrap();
        attach(&path, &interface("eth0", network, n)).unwrap();
        path
    }
}

pub(super) fn network(bridge: &str, subnet: &str, internal: bool) -> BridgeNetwork {
    BridgeNetwork {
        name: format!("test_{bridge}"),
        bridge: bridge.to_owned(),
        subnet: subnet.parse().unwrap(),
        internal,
        mtu: None,
    }
}

fn interface(name: &str, network: &BridgeNetwork, n: u32) -> Interface {
    Interface {
        name: name.to_owned(),
        bridge: network.bridge.clone(),
        address: network.subnet.nth(n),
        prefix: network.subnet.prefix(),
        gateway: (!network.internal && name == "eth0").then(|| network.gateway()),
        mtu: network.mtu,
        mac: None,
    }
}

pub(super) fn firewall(networks: &[&BridgeNetwork], catch_all_port: u16) -> Firewall {
    Firewall {
        table: "kiln-test00".to_owned(),
        networks: networks.iter().map(|n| (*n).clone()).collect(),
        catch_all_port: Some(catch_all_port),
        recorder: None,
    }
}

/// A TCP server in the calling thread's namespace which answers each connection with
/// what it sees: `<peer address> <original destination>`.
pub(super) fn serve(port: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let original = match getsockopt(&stream, sockopt::OriginalDst) {
                Ok(raw) => SocketAddrV4::new(
                    Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr)),
                    u16::from_be(raw.sin_port),
                )
                .to_string(),
                Err(_) => "none".to_owned(),
            };
            let peer = stream.peer_addr().unwrap().ip();
            let _ = write!(stream, "{peer} {original}");
        }
    });
    port
}

/// What the server at `address` says; `None`: no connection within `limit`.
fn ask_within(address: Ipv4Addr, port: u16, limit: Duration) -> Option<String> {
    let to = SocketAddr::new(IpAddr::V4(address), port);
    let mut stream = TcpStream::connect_timeout(&to, limit).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn ask(address: Ipv4Addr, port: u16) -> Option<String> {
    ask_within(address, port, PATIENCE)
}

pub(super) fn ask_from(netns: &Path, address: Ipv4Addr, port: u16) -> Option<String> {
    inside(netns, |_| ask(address, port)).unwrap()
}

pub(super) fn dropped_from(netns: &Path, address: Ipv4Addr, port: u16) -> bool {
    inside(netns, |_| ask_within(address, port, DROPPED))
        .unwrap()
        .is_none()
}

fn serve_in(netns: &Path, port: u16) -> u16 {
    inside(netns, |_| serve(port)).unwrap()
}

fn sysctl_of(path: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/{path}"))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn a_service_address_leads_to_the_proxy_which_knows_the_original_destination() {
    on_a_host("service", |host| {
        let net = network("knt1", "10.201.0.0/20", false);
        ensure_bridge(&net).unwrap();
        let port = serve(0);
        firewall(&[&net], port).apply().unwrap();
        let one = host.instance("one", &net, 5);
        let service = net.service_range().nth(9);

        let seen = ask_from(&one, service, 6379).unwrap();
        assert_eq!(seen, format!("10.201.0.5 {service}:6379"));
        // The host reaches it as well, seen as coming from the gateway.
        let seen = ask(service, 80).unwrap();
        assert_eq!(seen, format!("10.201.0.1 {service}:80"));
        // Nothing redirects at the gateway itself, nor directly to the port.
        assert!(dropped_from(&one, net.gateway(), port));
        assert!(ask_within(Ipv4Addr::LOCALHOST, port, DROPPED).is_none());
        // Other protocols at a service address fail at once.
        inside(&one, |_| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect((service, 9)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send(b"x").unwrap();
            let refused = socket.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        })
        .unwrap();
    });
}

#[test]
fn what_leaves_is_masqueraded_and_networks_are_apart() {
    on_a_host("apart", |host| {
        // A bridge outside the firewall stands for the network the host is in.
        let outside = network("outside0", "192.0.2.0/24", false);
        let (a, b) = (
            network("knta", "10.201.0.0/20", false),
            network("kntb", "10.201.16.0/20", false),
        );
        let shut = network("kntc", "10.201.32.0/20", true);
        for net in [&outside, &a, &b, &shut] {
            ensure_bridge(net).unwrap();
        }
        let port = serve(0);
        firewall(&[&a, &b, &shut], port).apply().unwrap();
        let far = host.instance("far", &outside, 9);
        let (in_a, also_a) = (host.instance("a1", &a, 5), host.instance("a2", &a, 6));
        let (in_b, in_shut) = (host.instance("b1", &b, 5), host.instance("c1", &shut, 5));
        for netns in [&far, &in_a, &in_b, &in_shut] {
            serve_in(netns, 80);
        }
        serve(8080);

        // Out, as the host.
        let far_address = outside.subnet.nth(9);
        assert_eq!(ask_from(&in_a, far_address, 80).unwrap(), "192.0.2.1 none");
        // Within a network, and from the host, as itself.
        assert_eq!(
            ask_from(&also_a, a.subnet.nth(5), 80).unwrap(),
            "10.201.0.6 none"
        );
        assert_eq!(ask(b.subnet.nth(5), 80).unwrap(), "10.201.16.1 none");
        assert_eq!(ask(shut.subnet.nth(5), 80).unwrap(), "10.201.32.1 none");
        // Not into another network: neither its instances, services nor gateway.
        assert!(dropped_from(&in_a, b.subnet.nth(5), 80));
        assert!(dropped_from(&in_a, b.service_range().nth(3), 80));
        assert!(dropped_from(&in_a, b.gateway(), 8080));
        // Not from outside, though it routes through us.
        assert!(dropped_from(&far, a.subnet.nth(5), 80));
        assert!(dropped_from(&far, a.service_range().nth(3), 80));
        assert!(dropped_from(&far, outside.gateway(), port));
        assert_eq!(
            ask_from(&far, outside.gateway(), 8080).unwrap(),
            "192.0.2.9 192.0.2.1:8080"
        );
        // An internal network has its services only.
        let service = shut.service_range().nth(3);
        assert_eq!(
            ask_from(&in_shut, service, 80).unwrap(),
            format!("10.201.32.5 {service}:80")
        );
        assert!(dropped_from(&in_shut, shut.gateway(), 8080));
        inside(&in_shut, |_| add_default_route(shut.gateway())).unwrap();
        assert!(dropped_from(&in_shut, far_address, 80));
        // Even without the firewall the kernel doesn't forward for it.
        firewall(&[&a], port).remove().unwrap();
        assert!(dropped_from(&in_shut, far_address, 80));
        assert_eq!(sysctl_of("ipv4/conf/kntc/forwarding"), "0");
    });
}

/// As a program in an instance with CAP_NET_ADMIN might.
fn add_default_route(gateway: Ipv4Addr) {
    let mut channel = channel::Channel::route().unwrap();
    let link = link::find(&mut channel, "eth0").unwrap().unwrap();
    let route = attach::default_route(link.index, gateway);
    let message = netlink_packet_route::RouteNetlinkMessage::NewRoute(route);
    channel
        .change(message, netlink_packet_core::NLM_F_CREATE)
        .unwrap();
}

#[test]
fn a_borrowed_source_address_goes_nowhere() {
    on_a_host("spoof", |host| {
        let (a, b) = (
            network("knta", "10.201.0.0/20", false),
            network("kntb", "10.201.16.0/20", false),
        );
        for net in [&a, &b] {
            ensure_bridge(net).unwrap();
        }
        firewall(&[&a, &b], 1).apply().unwrap();
        let one = host.instance("a1", &a, 5);
        let udp = UdpSocket::bind((a.gateway(), 5353)).unwrap();
        udp.set_read_timeout(Some(DROPPED)).unwrap();
        let send_as = |source: Ipv4Addr| {
            inside(&one, |_| {
                let mut channel = channel::Channel::route().unwrap();
                let index = link::find(&mut channel, "eth0").unwrap().unwrap().index;
                let message = bridge::address_message(index, source, 32, source);
                let add = netlink_packet_route::RouteNetlinkMessage::NewAddress(message);
                let _ = channel.change(add, netlink_packet_core::NLM_F_CREATE);
                UdpSocket::bind((source, 0))
                    .unwrap()
                    .send_to(b"x", (a.gateway(), 5353))
                    .unwrap();
            })
            .unwrap();
            udp.recv_from(&mut [0; 8]).map(|(_, from)| from.ip()).ok()
        };
        assert_eq!(send_as(a.subnet.nth(5)), Some(a.subnet.nth(5).into()));
        assert_eq!(send_as(b.subnet.nth(7)), None);
        assert_eq!(send_as("203.0.113.7".parse().unwrap()), None);
    });
}

#[test]
fn with_bridge_netfilter_a_network_works_the_same() {
    on_a_host("brnf", |host| {
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if fs::write(path, "1").is_err() {
            eprintln!("SKIPPED: the kernel has no br_netfilter");
            return;
        }
        let net = network("knt1", "10.201.0.0/20", true);
        ensure_bridge(&net).unwrap();
        let port = serve(0);
        firewall(&[&net], port).apply().unwrap();
        let (one, two) = (host.instance("one", &net, 5), host.instance("two", &net, 6));
        serve_in(&two, 80);
        assert_eq!(
            ask_from(&one, net.subnet.nth(6), 80).unwrap(),
            "10.201.0.5 none"
        );
        let service = net.service_range().nth(1);
        assert_eq!(
            ask_from(&one, service, 81).unwrap(),
            format!("10.201.0.5 {service}:81")
        );
    });
}

#[test]
fn a_bridge_stands_as_described_and_goes_without_a_trace() {
    on_a_host("bridge", |_| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let mut net = network("knt1", "10.201.0.0/20", true);
        assert_eq!(
            ensure_bridge(&net).unwrap(),
            Ensured {
                created: true,
                notes: vec![]
            }
        );
        assert_eq!(
            sysctl_of("ipv4/ip_forward"),
            "0",
            "an internal network needs no forwarding"
        );
        net.internal = false;
        let ensured = ensure_bridge(&net).unwrap();
        assert!(!ensured.created);
        assert!(
            ensured
                .notes
                .iter()
                .any(|n| n.contains("net.ipv4.ip_forward")),
            "{ensured:?}"
        );
        assert_eq!(ensure_bridge(&net).unwrap(), Ensured::default());
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/knt1/forwarding", "1"),
            ("ipv4/conf/knt1/rp_filter", "1"),
            ("ipv4/conf/knt1/send_redirects", "0"),
            ("ipv6/conf/knt1/disable_ipv6", "1"),
        ] {
            assert_eq!(sysctl_of(key), value, "{key}");
        }
        // A changed subnet and frame size replace the old.
        net.subnet = "10.202.0.0/24".parse().unwrap();
        net.mtu = Some(1400);
        ensure_bridge(&net).unwrap();
        let mut channel = channel::Channel::route().unwrap();
        let link = link::find(&mut channel, "knt1").unwrap().unwrap();
        assert_eq!(link.mtu, 1400);
        let addresses = survey::addresses(&mut channel).unwrap();
        let own: Vec<_> = addresses.iter().filter(|a| a.index == link.index).collect();
        assert_eq!(own.len(), 1);
        assert_eq!((own[0].address, own[0].prefix), (net.gateway(), 24));
        let local = |channel: &mut _| {
            let routes = survey::routes(channel).unwrap();
            routes
                .iter()
                .filter(|r| r.prefix == 25)
                .map(|r| r.destination)
                .collect::<Vec<_>>()
        };
        assert_eq!(local(&mut channel), [net.service_range().base()]);
        assert_eq!(
            bridges("knt").unwrap(),
            [Bridge {
                name: "knt1".into(),
                ports: vec![]
            }]
        );
        remove_bridge("knt1").unwrap();
        remove_bridge("knt1").unwrap();
        assert_eq!(bridges("knt").unwrap(), []);
        assert!(local(&mut channel).is_empty());
        assert!(matches!(
            remove_bridge("lo"),
            Err(BridgeError::NotABridge { .. })
        ));
        net.bridge = "lo".into();
        assert!(matches!(
            ensure_bridge(&net),
            Err(BridgeError::NotABridge { .. })
        ));
        net.bridge = "a/b".into();
        assert!(matches!(ensure_bridge(&net), Err(BridgeError::Name { .. })));
    });
}

#[test]
fn subnets_of_others_are_avoided_and_refused() {
    on_a_host("subnet", |_| {
        let first = free_subnet(&[]).unwrap();
        let mut net = network("knt1", "10.201.0.0/20", false);
        net.subnet = first;
        ensure_bridge(&net).unwrap();
        let second = free_subnet(&[]).unwrap();
        assert!(!second.overlaps(&first));
        let third = free_subnet(&[second]).unwrap();
        assert!(!third.overlaps(&first) && !third.overlaps(&second));

        let same = BridgeNetwork {
            bridge: "knt0".into(),
            ..net.clone()
        };
        let refusal = ensure_bridge(&same).unwrap_err();
        assert!(
            matches!(refusal, BridgeError::SubnetTaken { .. }),
            "{refusal}"
        );
        assert!(refusal.to_string().contains("knt1"), "{refusal}");
        assert_eq!(bridges("knt").unwrap().len(), 1);
        // The one that stands already is not in its own way.
        ensure_bridge(&net).unwrap();
    });
}

#[test]
fn roots_that_choose_the_same_subnet_at_once_never_both_get_it() {
    on_a_host("race", |_| {
        for _ in 0..10 {
            let barrier = std::sync::Barrier::new(3);
            let won: Vec<bool> = std::thread::scope(|scope| {
                let barrier = &barrier;
                let run = |n: u32| {
                    let net = network(&format!("knt{n}"), "10.201.0.0/20", false);
                    scope.spawn(move || {
                        barrier.wait();
                        match ensure_bridge(&net) {
                            Ok(_) => true,
                            Err(BridgeError::SubnetTaken { .. }) => false,
                            Err(e) => panic!("{e}"),
                        }
                    })
                };
                let threads: Vec<_> = (0..3).map(run).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let stand: Vec<String> = bridges("knt")
                .unwrap()
                .into_iter()
                .map(|b| b.name)
                .collect();
            assert_eq!(won.iter().filter(|w| **w).count(), 1, "{won:?} {stand:?}");
            assert_eq!(stand.len(), 1);
            remove_bridge(&stand[0]).unwrap();
        }
    });
}

#[test]
fn a_namespace_file_holds_lists_and_lets_go() {
    on_a_host("netns", |host| {
        let path = host.folder.join("with space");
        fs::write(&path, "").unwrap();
        assert!(!is_netns(&path).unwrap());
        assert!(matches!(
            inside(&path, |_| ()),
            Err(NetnsError::NotANamespace { .. })
        ));
        create_netns(&path).unwrap();
        assert!(is_netns(&path).unwrap());
        let id =
            |p: &Path| inside(p, |_| fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
        let before = id(&path);
        create_netns(&path).unwrap();
        assert_eq!(id(&path), before, "one that is there is kept");
        assert_ne!(before, fs::read_link("/proc/thread-self/ns/net").unwrap());
        inside(&path, |_| {
            assert!(TcpListener::bind("127.0.0.1:80").is_ok());
            let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
            assert_eq!(TcpListener::bind("[::1]:80").is_ok(), ipv6);
            assert_eq!(sysctl_of("ipv4/ip_unprivileged_port_start"), "0");
            assert_eq!(sysctl_of("ipv6/conf/default/disable_ipv6"), "1");
        })
        .unwrap();
        let other = host.folder.join("other");
        create_netns(&other).unwrap();
        let folder = host.folder.canonicalize().unwrap();
        assert_eq!(
            netns_files(&host.folder).unwrap(),
            [folder.join("other"), folder.join("with space")]
        );
        for path in [&path, &other, &other] {
            delete_netns(path).unwrap();
            assert!(!path.exists());
        }
        assert!(netns_files(&host.folder).unwrap().is_empty());
        let lost = host.folder.join("no/such/folder");
        assert!(matches!(create_netns(&lost), Err(NetnsError::File { .. })));
    });
}

#[test]
fn an_interface_is_as_asked_and_its_first_packet_arrives() {
    on_a_host("attach", |host| {
        let mut net = network("knt1", "10.201.0.0/20", false);
        net.mtu = Some(1450);
        ensure_bridge(&net).unwrap();
        serve(80);
        let path = host.folder.join("one");
        create_netns(&path).unwrap();
        let mut first = interface("eth0", &net, 5);
        first.mtu = None;
        let mut host_side = channel::Channel::route().unwrap();
        for n in 0..20 {
            // The same again replaces; a lost first packet would cost a second.
            attach(&path, &first).unwrap();
            let port = link::find(&mut host_side, &veth_name(&path, "eth0")).unwrap();
            assert!(port.is_some_and(|p| p.up && p.forwarding), "try {n}");
            let seen = inside(&path, |_| {
                ask_within(net.gateway(), 80, Duration::from_millis(500))
            });
            assert_eq!(seen.unwrap().as_deref(), Some("10.201.0.5 none"), "try {n}");
        }
        let port = veth_name(&path, "eth0");
        assert_eq!(bridges("knt").unwrap()[0].ports, [port]);
        inside(&path, |_| {
            let mut channel = channel::Channel::route().unwrap();
            let link = link::find(&mut channel, "eth0").unwrap().unwrap();
            assert_eq!(link.mtu, 1450, "the bridge's");
            assert_eq!(sysctl_of("ipv6/conf/eth0/disable_ipv6"), "1");
            let routes = survey::routes(&mut channel).unwrap();
            assert!(
                routes
                    .iter()
                    .any(|r| r.prefix == 0 && r.gateway == Some(net.gateway()))
            );
        })
        .unwrap();
        detach(&path, &first).unwrap();
        detach(&path, &first).unwrap();
        assert_eq!(bridges("knt").unwrap()[0].ports, Vec::<String>::new());
    });
}

#[test]
fn an_address_that_moves_is_found_at_its_new_place_at_once() {
    on_a_host("moves", |host| {
        let net = network("knt1", "10.201.0.0/20", false);
        ensure_bridge(&net).unwrap();
        let asker = host.instance("asker", &net, 4);
        let mut moving = interface("eth0", &net, 5);
        for n in 0..3 {
            let path = host.folder.join(format!("place{n}"));
            create_netns(&path).unwrap();
            moving.mac = Some(format!("02:00:00:00:00:0{n}"));
            attach(&path, &moving).unwrap();
            serve_in(&path, 80);
            let limit = Duration::from_millis(500);
            let seen = inside(&asker, |_| ask_within(moving.address, 80, limit)).unwrap();
            assert_eq!(seen.as_deref(), Some("10.201.0.4 none"), "place {n}");
            detach(&path, &moving).unwrap();
        }
    });
}

#[test]
fn an_interface_that_cannot_be_is_refused_and_nothing_stays() {
    on_a_host("refused", |host| {
        let net = network("knt1", "10.201.0.0/20", false);
        ensure_bridge(&net).unwrap();
        let path = host.folder.join("one");
        create_netns(&path).unwrap();
        let good = interface("eth0", &net, 5);
        let with = |change: fn(&mut Interface)| {
            let mut interface = good.clone();
            change(&mut interface);
            attach(&path, &interface).unwrap_err().to_string()
        };
        assert!(with(|i| i.bridge = "nowhere".into()).contains("no bridge nowhere"));
        assert!(with(|i| i.bridge = "lo".into()).contains("no bridge lo"));
        assert!(with(|i| i.mac = Some("01:00:5e:00:00:01".into())).contains("01:00:5e"));
        assert!(with(|i| i.name = "lo".into()).contains("not lo"));
        assert!(with(|i| i.prefix = 0).contains("/0"));
        let unreachable = with(|i| i.gateway = Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert!(
            unreachable.contains("eth0") && unreachable.contains("knt1"),
            "{unreachable}"
        );
        assert_eq!(bridges("knt").unwrap()[0].ports, Vec::<String>::new());
        assert!(attach(&host.folder.join("none"), &good).is_err());
        attach(&path, &good).unwrap();
    });
}
