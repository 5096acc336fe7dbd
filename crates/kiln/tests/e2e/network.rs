//! Names, isolation, and nothing left after `down`.

use crate::common::{BUSYBOX, Kiln, Page, Project, leftovers, wait_until};

const PEERS: &str = "  peer:
    build: .
    expose: [\"8000\"]
    networks: {default: {aliases: [friend]}}
  lonely:
    build: .
    network_mode: none
  inner:
    build: .
    networks: [closed]
networks:
  closed: {internal: true}
";

fn peers<'k>(kiln: &'k Kiln, name: &str) -> Project<'k> {
    kiln.page(
        name,
        &Page {
            more: PEERS,
            text: name,
            ..Page::default()
        },
    )
}

#[test]
fn services_find_each_other_by_name() {
    let Some(kiln) = Kiln::new() else { return };
    let project = peers(&kiln, "names");
    project.up().ok();
    for name in ["peer", "friend", "web"] {
        let line = format!("wget -q -O - http://{name}:8000/");
        let ran = project.inside("web", &line).ok();
        assert_eq!(ran.stdout.trim(), "names", "{name}: {ran}");
    }
    let ran = project.inside("web", "wget -T 5 -q -O - http://stranger:8000/");
    assert_ne!(ran.code, Some(0), "{ran}");
    // The name holds while what is behind it is replaced.
    // Both kinds of address are asked for at once, and answered in any order.
    let look = || {
        let line = "nslookup peer | grep -A 1 peer";
        project.inside("web", line).ok().stdout.trim().to_owned()
    };
    let before = look();
    project.write("www/index.html", "other");
    project.up().ok();
    assert_eq!(before, look(), "a service's address is stable");
    let ran = project.inside("web", "wget -q -O - http://peer:8000/").ok();
    assert_eq!(ran.stdout.trim(), "other", "{ran}");
}

#[test]
fn networks_do_not_meet() {
    let Some(kiln) = Kiln::new() else { return };
    let (a, b) = (peers(&kiln, "left"), peers(&kiln, "right"));
    a.up().ok();
    b.up().ok();
    let address = |project: &Project, service: &str| {
        let line = "ip -4 -o addr show dev eth0 | sed 's/.*inet //; s,/.*,,'";
        project.inside(service, line).ok().stdout.trim().to_owned()
    };
    let reach = |project: &Project, from: &str, to: &str| {
        // Not wget: busybox's static one ends with a fault when it is given an address.
        let line = format!("nc -w 4 {to} 8000 </dev/null");
        project.inside(from, &line).code == Some(0)
    };
    let (peer, stranger) = (address(&a, "peer"), address(&b, "peer"));
    assert!(!peer.is_empty() && peer != stranger, "{peer} {stranger}");
    assert!(reach(&a, "web", &peer), "the test itself is wrong");
    assert!(
        !reach(&a, "web", &stranger),
        "another project's instance is in reach"
    );
    assert!(
        !reach(&a, "inner", &peer),
        "another network's instance is in reach"
    );
    assert!(
        !reach(&a, "lonely", &peer),
        "without a network there is a way out"
    );
    assert!(
        !reach(&a, "inner", "web"),
        "names of another network resolve"
    );
    let lookup = |name: &str| b.inside("web", &format!("nslookup {name} | tail -n +3"));
    assert!(
        !lookup("peer").stdout.contains(&peer),
        "the other project's peer was named"
    );
    // The host reaches both; an instance's own loopback is its own.
    assert_eq!(a.page(), "left");
    assert_eq!(b.page(), "right");
    let port = b.port;
    let ran = a.inside("web", &format!("nc -w 4 127.0.0.1 {port} </dev/null"));
    assert_ne!(ran.code, Some(0), "{ran}");
}

#[test]
fn down_leaves_nothing_running_or_mounted() {
    let Some(kiln) = Kiln::new() else { return };
    let page = Page {
        more: "  other:\n    build: .\n    volumes: [\"data:/data\"]\nvolumes: {data: {}}",
        keys: "    deploy: {replicas: 2}",
        ..Page::default()
    };
    let project = kiln.page("down", &page);
    project.up().ok();
    assert!(
        !leftovers(&kiln.root, false).is_empty(),
        "the test itself is blind"
    );
    project.run("down", &[]).ok();
    assert!(
        crate::common::get(project.port, "/").is_err(),
        "the port still answers"
    );
    let rest = || -> Vec<String> {
        let all = leftovers(&kiln.root, false);
        all.into_iter().filter(|l| !l.contains(" proxy")).collect()
    };
    wait_until("nothing left", || rest().is_empty());
    // Two times down is fine, and releases are still known.
    project.run("down", &[]).ok();
    assert_eq!(project.releases().len(), 1);
    // Nor does the proxy outlive the daemon, as it does where something serves.
    kiln.run(&["daemon", "stop"]).ok();
    let all = || leftovers(&kiln.root, false);
    wait_until("not even a proxy left", || all().is_empty());
}

/// As `nft flush ruleset` does, which would also take what other tests have.
#[test]
fn a_firewall_that_another_program_removes_comes_back() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.page("flushed", &Page::default());
    project.up().ok();
    let table = format!("kiln-{}", kiln_runtime::net::root_tag(&kiln.root));
    let nft = |words: &[&str]| {
        let ran = std::process::Command::new("nft").args(words).output();
        let ran = ran.unwrap_or_else(|e| panic!("nft: {e}"));
        ran.status.success().then_some(ran.stdout)
    };
    let before = nft(&["list", "table", "ip", &table]).expect("a table");
    nft(&["delete", "table", "ip", &table]).expect("it is removed");
    wait_until("the table is back", || {
        nft(&["list", "table", "ip", &table]).is_some_and(|now| now == before)
    });
    // A daemon that comes later sees it, too.
    kiln.run(&["daemon", "stop"]).ok();
    nft(&["delete", "table", "ip", &table]).expect("it is removed");
    project.run("status", &[]);
    project.up().ok();
    wait_until("the table is back", || {
        nft(&["list", "table", "ip", &table]).is_some_and(|now| now == before)
    });
}

#[test]
fn two_roots_do_not_meet() {
    let (Some(one), Some(two)) = (Kiln::new(), Kiln::new()) else {
        return;
    };
    let (a, b) = (
        one.page("same", &Page::default()),
        two.page("same", &Page::default()),
    );
    a.up().ok();
    b.write("www/index.html", "two");
    b.up().ok();
    assert_eq!((a.page(), b.page()), ("one".into(), "two".into()));
    a.run("down", &[]).ok();
    assert_eq!(b.page(), "two");
    let ran = b.inside("web", "wget -q -O - http://web:8000/").ok();
    assert_eq!(ran.stdout.trim(), "two", "{ran}");
}

#[test]
fn what_an_instance_reaches_outside_is_not_the_daemons_api() {
    let Some(kiln) = Kiln::new() else { return };
    let compose = format!(
        "{BUSYBOX}services:\n  web:\n    image: busybox\n    command: [/bin/busybox, sleep, \"1000\"]\n"
    );
    let project = kiln.project("plain", &[("compose.yaml", &compose)]);
    project.up().ok();
    let ran = project.kiln(&[
        "exec",
        "-T",
        "-e",
        "@",
        "web",
        "/bin/busybox",
        "find",
        "/",
        "-xdev",
        "-name",
        "*.sock",
    ]);
    assert_eq!(ran.stdout, "", "{ran}");
}
