//! What a RUN over a Debian root without apt sources is shown of the machine's own, and
//! that nothing of it stays. The machine must be a Debian.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use kiln_build::build::BuildRequest;
use kiln_model::spec::DebianBase;
use kiln_store::tree::Tree;
use world::{busybox, compose, sandboxes, world};

const SOURCES: &str = "etc/apt/sources.list.d/kiln.sources";
/// As much of a Debian as is looked at.
const DEBIAN: &str = "RUN mkdir -p /usr/bin /etc/apt && touch /usr/bin/apt-get\n\
    COPY <<E /etc/os-release\nID=debian\nVERSION_CODENAME=bookworm\nE\n";

/// Every path that the builder's own name is part of.
fn traces(tree: &Tree) -> Vec<String> {
    let paths = tree
        .walk()
        .map(|item| String::from_utf8(item.path).unwrap());
    paths.filter(|path| path.contains("kiln")).collect()
}

#[test]
fn a_debian_without_sources_sees_the_machines_own_and_keeps_nothing_of_them() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let look = format!(
        "RUN cat /{SOURCES} > /seen; for k in $(sed -n 's/^Signed-By: //p' /{SOURCES}); \
         do case $k in /*) test -s $k && echo $k >> /keys; esac; done; true\n"
    );
    let one = world();
    let digest = one.build(folder.path(), &format!("{base}{DEBIAN}{look}"));
    let digest = digest.unwrap();
    let seen = one.text(&digest, "seen");
    assert!(
        seen.contains("Suites: bookworm\nComponents: main\n"),
        "{seen}"
    );
    let tree = one.tree(&digest);
    let files = seen.matches("Signed-By: /").count();
    let shown = match tree.get("keys") {
        Some(_) => one.text(&digest, "keys").lines().count(),
        None => 0,
    };
    assert_eq!(shown, files, "each key that is named is there: {seen}");
    assert_eq!(traces(&tree), [""; 0]);
    assert!(tree.get("etc/apt/sources.list.d").is_none() && tree.get("run").is_none());
}

#[test]
fn who_has_sources_or_no_apt_is_shown_none() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let own = "COPY <<E /etc/apt/sources.list.d/own.sources\nTypes: deb\nE\n";
    let commented = "COPY <<E /etc/apt/sources.list\n# deb http://m.test s main\nE\n";
    let there = format!("RUN test -e /{SOURCES}");
    let none = format!("RUN test ! -e /{SOURCES}");
    let one = world();
    for text in [
        format!("{base}{DEBIAN}{own}{none}"),
        format!("{base}{DEBIAN}{commented}{there}"),
        format!("{base}{DEBIAN}RUN rm /usr/bin/apt-get\n{none}"),
        format!("{base}{DEBIAN}RUN sed -i s/debian/other/ /etc/os-release\n{none}"),
    ] {
        one.build(folder.path(), &text).unwrap();
    }
}

/// Needs the network.
#[tokio::test(flavor = "multi_thread")]
async fn apt_get_install_works_over_a_base_that_names_no_mirror() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let base = DebianBase {
        suite: "bookworm".into(),
        packages: vec!["apt".into()],
        essential: true,
        ..DebianBase::default()
    };
    let before = one.tree(&compose(&one, &base).await);
    assert!(before.get("usr/bin/apt-get").is_some() && before.get("usr/bin/tree").is_none());
    let text = "FROM root\nRUN apt-get update && apt-get install -y --no-install-recommends tree \
                && rm -rf /var/lib/apt/lists/*\nRUN tree --version > /made";
    let folder = world::context(&[]);
    let outside = |request: &mut BuildRequest| request.build.network = "default".into();
    let digest = one.build_with(folder.path(), text, outside).unwrap();
    let tree = one.tree(&digest);
    assert!(one.text(&digest, "made").starts_with("tree v"));
    assert_eq!(traces(&tree), traces(&before));
    let listed = |tree: &Tree| tree.children("etc/apt/sources.list.d").unwrap().count();
    assert_eq!(listed(&tree), listed(&before));
    assert!(tree.get("run/kiln-keys").is_none());
}

/// Needs the network.
#[tokio::test(flavor = "multi_thread")]
async fn openssh_server_is_installed_without_keys_and_finds_its_own() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let base = DebianBase {
        suite: "bookworm".into(),
        packages: vec!["apt".into()],
        essential: true,
        ..DebianBase::default()
    };
    compose(&one, &base).await;
    let text = "FROM root\nRUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install \
                -y --no-install-recommends openssh-server ssl-cert && rm -rf /var/lib/apt/lists/*\n\
                RUN mkdir -p /run/sshd && /usr/sbin/sshd -t && ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key \
                && openssl x509 -noout -in /etc/ssl/certs/ssl-cert-snakeoil.pem && rmdir /run/sshd";
    let outside = |request: &mut BuildRequest| request.build.network = "default".into();
    let folder = world::context(&[]);
    let digest = one.build_with(folder.path(), text, outside).unwrap();
    for (path, _) in kiln_model::identity::PLACES {
        assert_eq!(one.text(&digest, path), "", "{path}");
    }
    // Private keys of whatever kind would have refused the image; nothing else is new.
    let tree = one.tree(&digest);
    let keys = tree.walk().filter(|item| item.path.ends_with(b".key"));
    assert_eq!(keys.count(), 1);
}
