//! The whole module against the real kernel, each test in network and mount
//! namespaces of its own, so that the host is not touched and nothing stays.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

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
struct Host {
    folder: PathBuf,
}

/// Runs `test` on a thread that is alone in new namespaces.
fn on_a_host(name: &str, test: impl FnOnce(&Host) + Send) {
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
    fn instance(&self, name: &str, network: &BridgeNetwork, n: u32) -> PathBuf {
        let path = self.folder.join(name);
        create_netns(&path).unwrap();
        attach(&path, &interface("eth0", network, n)).unwrap();
        path
    }
}

fn network(bridge: &str, subnet: &str, internal: bool) -> BridgeNetwork {
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

fn firewall(networks: &[&BridgeNetwork], catch_all_port: u16) -> Firewall {
    Firewall {
        table: "kiln-test00".to_owned(),
        networks: networks.iter().map(|n| (*n).clone()).collect(),
        catch_all_port,
    }
}

/// A TCP server in the calling thread's namespace which answers each connection with
/// what it sees: `<peer address> <original destination>`.
fn serve(port: u16) -> u16 {
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

fn ask_from(netns: &Path, address: Ipv4Addr, port: u16) -> Option<String> {
    inside(netns, |_| ask(address, port)).unwrap()
}

fn dropped_from(netns: &Path, address: Ipv4Addr, port: u16) -> bool {
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
