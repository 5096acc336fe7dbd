//! What a RUN reaches: its process's own network behind NAT, nothing, or the host's; and
//! that none of it stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_build::build::BuildRequest;
use kiln_model::Digest;
use kiln_model::instance::{Interface, Resolver};
use kiln_model::network::BridgeNetwork;
use kiln_runtime::net;
use world::{World, builder, busybox, sandboxes, working, world};

/// Where a name server of the test's own listens; only the host itself reaches it.
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);

fn built(world: &World, folder: &Path, text: &str, network: &str) -> Result<Digest, String> {
    let change = |request: &mut BuildRequest| request.build.network = network.into();
    world.build_with(folder, text, change)
}

fn bridges(root: &Path) -> Vec<String> {
    let prefix = format!("{}{}-", net::BRIDGE_PREFIX, net::root_tag(root));
    let all = net::bridges(&prefix).unwrap();
    all.into_iter().map(|bridge| bridge.name).collect()
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, Iterator::count)
}

/// All that builds may leave of a root.
fn left(root: &Path) -> (usize, usize, usize) {
    (
        bridges(root).len(),
        working(root).len(),
        count(&root.join("instances")),
    )
}

/// Another network with one address on it, `.2`, and its namespace.
struct Outside {
    network: BridgeNetwork,
    netns: PathBuf,
    _folder: tempfile::TempDir,
}

impl Outside {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let network = BridgeNetwork {
            name: "outside".into(),
            bridge: format!("kbt{}", std::process::id()),
            subnet: net::free_subnet(&[]).unwrap(),
            internal: false,
            mtu: None,
        };
        net::ensure_bridge(&network).unwrap();
        let netns = folder.path().join("netns");
        net::create_netns(&netns).unwrap();
        let outside = Self {
            network,
            netns,
            _folder: folder,
        };
        net::attach(&outside.netns, &outside.interface()).unwrap();
        outside
    }

    fn interface(&self) -> Interface {
        Interface {
            name: "eth0".into(),
            bridge: self.network.bridge.clone(),
            address: self.network.subnet.nth(2),
            prefix: self.network.subnet.prefix(),
            gateway: None,
            mtu: None,
            mac: None,
        }
    }

    /// Tells every caller at port 7 its address.
    fn tell_addresses(&self) {
        let bound = net::inside(&self.netns, |_| TcpListener::bind(("0.0.0.0", 7)));
        let listener = bound.unwrap().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip();
                writeln!(stream, "{peer}").unwrap();
            }
        });
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = net::detach(&self.netns, &self.interface());
        let _ = net::delete_netns(&self.netns);
        let _ = net::remove_bridge(&self.network.bridge);
    }
}

#[test]
fn a_command_reaches_the_outside_behind_the_hosts_address() {
    if !sandboxes() {
        return;
    }
    let outside = Outside::new();
    outside.tell_addresses();
    let (folder, base) = busybox();
    let mut one = world();
    let text = format!(
        "{base}RUN nc -w 10 {} 7 < /dev/null > /seen; readlink /proc/self/ns/net > /own",
        outside.network.subnet.nth(2)
    );
    let digest = built(&one, folder.path(), &text, "default").unwrap();
    // The namespace has no way back: only a masqueraded caller gets an answer.
    let gateway = outside.network.gateway().to_string();
    assert_eq!(one.text(&digest, "seen").trim(), gateway);
    let hosts = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(one.text(&digest, "own").trim(), hosts.to_str().unwrap());

    let root = one.root.path().to_owned();
    assert_eq!(left(&root), (1, 1, 0), "one network, as long as it is used");
    let other = builder(&root, one.seen.clone(), Resolver::default());
    let of_first = bridges(&root);
    let mut two = world();
    std::mem::swap(&mut one, &mut two);
    one.builder = other;
    let text = format!("{text}; true");
    built(&one, folder.path(), &text, "default").unwrap();
    assert_eq!(bridges(&root).len(), 2, "each process has one of its own");
    one.builder = builder(&root, one.seen.clone(), Resolver::default());
    assert_eq!(bridges(&root), of_first, "and takes no other's away");
    two.builder = builder(&root, one.seen.clone(), Resolver::default());
    assert_eq!(left(&root), (0, 0, 0));
}

#[test]
fn names_are_those_of_the_hosts_own_name_servers() {
    if !sandboxes() {
        return;
    }
    let server = UdpSocket::bind((SERVER, 53)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let answer = address_of(&buffer[..length]);
            server.send_to(&answer, from).unwrap();
        }
    });
    let (folder, base) = busybox();
    let mut one = world();
    let resolver = Resolver {
        nameservers: vec![SERVER.into()],
        search: vec!["kiln.test".into()],
        options: Vec::new(),
    };
    one.builder = builder(one.root.path(), one.seen.clone(), resolver);
    let text = format!(
        "{base}RUN nslookup -type=a name.test > /answer; grep search /etc/resolv.conf > /search"
    );
    let digest = built(&one, folder.path(), &text, "default").unwrap();
    let answer = one.text(&digest, "answer");
    assert!(answer.contains("192.0.2.7"), "{answer}");
    assert_eq!(one.text(&digest, "search"), "search kiln.test\n");
}

/// Every name is at 192.0.2.7 (RFC 1035, section 4).
fn address_of(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    answer[7] = 1;
    answer.extend(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\xc0\x00\x02\x07");
    answer
}

#[test]
fn none_is_loopback_alone_and_host_is_the_hosts() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let look = "readlink /proc/self/ns/net > /own; ls /proc/sys/net/ipv4/conf > /names; \
                ping -c1 -w5 127.0.0.1";
    let hosts = fs::read_link("/proc/self/ns/net").unwrap();
    let hosts = hosts.to_str().unwrap();
    let of = |run: &str, build: &str| {
        let text = format!("{base}RUN {run} {look}");
        let digest = built(&one, folder.path(), &text, build).unwrap();
        let own = one.text(&digest, "own");
        (own.trim() == hosts, one.text(&digest, "names"))
    };
    let alone = (false, "all\ndefault\nlo\n".to_owned());
    assert_eq!(of("--network=none", "host"), alone);
    assert_eq!(of("--network=default true;", "none"), alone);
    assert!(of("--network=host", "none").0 && of("true;", "host").0);
    assert_eq!(bridges(one.root.path()), [""; 0], "nobody asked for one");
    let told = built(&one, folder.path(), &base, "bridge").unwrap_err();
    assert!(
        told.contains("`bridge` is neither `none`, `host` nor `default`"),
        "{told}"
    );
}

/// Set in the process that is killed: its KILN_ROOT.
const KILLED: &str = "KILN_TEST_KILLED";

#[test]
fn what_a_killed_build_left_goes_with_the_next() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    if let Some(root) = std::env::var_os(KILLED) {
        let mut one = world();
        one.builder = builder(Path::new(&root), one.seen.clone(), Resolver::default());
        let text = format!("{base}RUN touch /cache-of-test && sleep 1000");
        let _ = built(&one, folder.path(), &text, "default");
        return;
    }
    let one = world();
    let root = one.root.path().to_owned();
    let name = "what_a_killed_build_left_goes_with_the_next";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(KILLED, &root)
        .stderr(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    std::thread::spawn(move || while let Some(Ok(_)) = lines.next() {});
    let running = || left(&root) == (1, 2, 1) && count(&root.join("cache/steps")) > 2;
    let begun = (0..600).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        running() && touched(&root)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(begun, "{:?}", left(&root));
    assert_eq!(left(&root), (1, 2, 1), "a kill leaves everything");
    built(&one, folder.path(), &format!("{base}RUN true"), "none").unwrap();
    assert_eq!(left(&root), (0, 0, 0));
}

/// The command of the killed build runs.
fn touched(root: &Path) -> bool {
    let folders = working(root);
    let mut written = folders.iter().map(|f| f.join("upper/cache-of-test"));
    written.any(|path| path.exists())
}
