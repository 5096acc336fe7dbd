//! What RUNs fetch: recorded once, given again without network, and only anew when asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod server;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use kiln_build::build::BuildRequest;
use kiln_build::lock::Lock;
use kiln_build::network::record::{Kept, Recording, Recordings};
use kiln_model::Digest;
use kiln_model::spec::DebianBase;
use kiln_store::tree::Kind;
use server::{Address, Answer, Server, certificates};
use world::{World, busybox, compose, sandboxes, world};

type Locked = BTreeMap<String, Recording>;

/// A world, and what its lock has.
struct Bench {
    world: World,
    folder: tempfile::TempDir,
    base: String,
    locked: Locked,
}

impl Bench {
    fn new() -> Self {
        let (folder, base) = busybox();
        Self {
            world: world(),
            folder,
            base,
            locked: Locked::new(),
        }
    }

    /// Another machine with the same lock, and with these recorded contents at most.
    fn elsewhere(&self, with_contents: bool) -> Self {
        let (folder, base) = busybox();
        let other = world();
        if with_contents {
            copy(&self.world.builder.fetches, &other.builder.fetches);
        }
        Self {
            world: other,
            folder,
            base,
            locked: through_the_file(&self.locked),
        }
    }

    fn build(
        &mut self,
        text: &str,
        change: impl FnOnce(&mut BuildRequest),
    ) -> Result<Digest, String> {
        let recordings = Recordings::new(self.locked.clone()).keeping(self.kept());
        let recordings = Arc::new(recordings);
        let known = recordings.clone();
        let text = format!("{}{text}", self.base);
        let built = self.world.build_with(self.folder.path(), &text, |request| {
            request.build.network = "default".into();
            request.recordings = known;
            change(request);
        });
        let whole = kiln_oci::host_platform();
        self.locked = recordings.settled(built.is_ok().then_some(whole.as_str()));
        built
    }

    fn kept(&self) -> Kept {
        Kept::beside(&self.folder.path().join("kiln.lock"))
    }

    fn run(&mut self, command: &str) -> Result<Digest, String> {
        self.build(&format!("RUN {command}"), |_| {})
    }

    fn live(&mut self, command: &str) -> Result<Digest, String> {
        self.build(&format!("RUN {command}"), |request| request.live = true)
    }

    fn exchanges(&self) -> Vec<kiln_build::network::record::Exchange> {
        let all = self.locked.values();
        all.flat_map(|recording| recording.exchanges.clone())
            .collect()
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// As `kiln.lock` has it.
fn through_the_file(locked: &Locked) -> Locked {
    let mut lock = Lock::default();
    lock.network.insert("web".into(), locked.clone());
    let text = lock.render().unwrap();
    let read = Lock::parse(&text, Path::new("kiln.lock")).unwrap();
    read.network["web"].clone()
}

/// Every file of the image that holds this text, and every path that is named so.
fn traces(world: &World, image: &Digest, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for item in world.tree(image).walk() {
        let path = String::from_utf8(item.path).unwrap();
        if path.contains(text) {
            found.push(path.clone());
        }
        if let Kind::File { digest, .. } = &item.node.kind {
            let content = fs::read(world.builder.store.object_path(digest)).unwrap();
            if content.windows(text.len()).any(|w| w == text.as_bytes()) {
                found.push(path);
            }
        }
    }
    found
}

/// Every file below a folder that holds this text.
fn holding(folder: &Path, text: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            found.extend(holding(&path, text));
        } else if meta.is_file() {
            let content = fs::read(&path).unwrap();
            if content.windows(text.len()).any(|w| w == text.as_bytes()) {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn what_was_fetched_once_is_there_without_network_and_nothing_of_the_proxy_is() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let server = Server::http(&at);
    let dated = "Wed, 21 Oct 2015 07:28:00 GMT";
    server.set(
        "/a",
        &[Answer::of(200, "first").with("last-modified", dated)],
    );
    let command = format!(
        "mkdir /got && wget -O /got/a {} && ! wget -O /got/none {} && touch /got/done",
        server.url("/a"),
        server.url("/none"),
    );
    let mut one = Bench::new();
    let first = one.run(&command).unwrap();
    assert_eq!(one.world.text(&first, "got/a"), "first");
    let exchanges = one.exchanges();
    let seen: Vec<(&str, u16)> = exchanges
        .iter()
        .map(|e| (e.url.as_str(), e.status))
        .collect();
    assert_eq!(
        seen,
        [
            (server.url("/a").as_str(), 200),
            (server.url("/none").as_str(), 404)
        ]
    );
    assert_eq!(exchanges[0].headers["last-modified"], dated);
    assert!(!exchanges[0].headers.contains_key("date"));
    assert_eq!(exchanges[0].sha256, Digest::of("first"));

    one.world.seen.counts();
    let again = one.run(&command).unwrap();
    assert_eq!(again, first);
    let (_, carried_out) = one.world.seen.counts();
    assert_eq!(carried_out, 0, "it is the cache's");

    server.stop();
    let before = server.count();
    let mut other = one.elsewhere(true);
    assert_eq!(other.run(&command).unwrap(), first);
    assert_eq!(server.count(), before);
    assert_eq!(other.locked, one.locked);

    for text in [
        "192.0.2.1",
        "kiln-net",
        "3128",
        "BEGIN CERTIFICATE",
        "kiln: recording",
    ] {
        assert_eq!(traces(&one.world, &first, text), [""; 0], "{text}");
    }
    let image = one.world.builder.store.image(&first).unwrap().unwrap();
    let config = format!("{:?}", image.config).to_ascii_lowercase();
    assert!(
        !config.contains("proxy") && !config.contains("kiln-net"),
        "{config}"
    );
    let root = one.world.root.path();
    assert_eq!(
        holding(root, "recording proxy of one build"),
        [""; 0].map(std::path::PathBuf::from)
    );
    assert_eq!(
        holding(root, "PRIVATE KEY"),
        [""; 0].map(std::path::PathBuf::from)
    );
}

/// As PostgreSQL's files are: its folder belongs to nobody else, and no two are the same.
const DATABASE: &str = "RUN mkdir -p /db/main/global && cd /db/main && echo 15 > PG_VERSION && \
    head -c 16 /dev/urandom > global/pg_control && ln -s PG_VERSION link && \
    touch -d @1700000000 PG_VERSION && chmod 700 . && chown -R 33:34 .\n";
const CHANGED: &str = "RUN date +%N > /db/main/log\n";

#[test]
fn a_database_is_recorded_and_the_same_build_is_given_it_again() {
    if !sandboxes() {
        return;
    }
    let mut one = Bench::new();
    let first = one.build(DATABASE, |_| {}).unwrap();
    let told = one.world.seen.warnings().join("\n");
    assert!(
        told.contains(
            "/db/main, a database, is another one each time it is made, so it is recorded"
        ),
        "{told}"
    );
    let recorded = |bench: &Bench| {
        bench
            .locked
            .values()
            .flat_map(|r| r.made.values().cloned())
            .collect::<Vec<_>>()
    };
    assert_eq!(recorded(&one).len(), 1, "{:?}", one.locked);
    let tree = one.world.tree(&first);
    let meta = |path: &str| {
        let meta = &tree.get(path).unwrap().meta;
        (meta.mode, meta.uid, meta.gid, meta.mtime.seconds)
    };
    assert_eq!(meta("db/main"), (0o700, 33, 34, 0));
    assert_eq!(meta("db/main/PG_VERSION").3, 1_700_000_000);
    assert!(matches!(
        tree.get("db/main/link").unwrap().kind,
        Kind::Symlink { .. }
    ));

    let mut other = one.elsewhere(false);
    copy(
        &one.folder.path().join("kiln.lock.d"),
        &other.folder.path().join("kiln.lock.d"),
    );
    assert_eq!(other.build(DATABASE, |_| {}).unwrap(), first);
    let told = other.world.seen.warnings().join("\n");
    assert!(
        told.contains("/db/main, a database, is the one that kiln.lock names"),
        "{told}"
    );
    assert_eq!(other.locked, one.locked);

    // Of other files it is made anew, as it may be of them; so it is when that is asked for.
    let base = std::mem::replace(&mut other.base, format!("{}COPY f /init\n", one.base));
    let changed = other.build(DATABASE, |_| {}).unwrap();
    let control = |bench: &Bench, image| {
        bench
            .world
            .tree(image)
            .get("db/main/global/pg_control")
            .unwrap()
            .kind
            .clone()
    };
    assert_ne!(control(&other, &changed), control(&one, &first));
    other.base = base;
    let live = one.build(DATABASE, |request| request.live = true).unwrap();
    assert_ne!(live, first);

    // What is written to one later is recorded with what it was.
    let text = format!("{DATABASE}{CHANGED}");
    let later = one.build(&text, |_| {}).unwrap();
    assert_eq!(recorded(&one).len(), 2);
    let mut other = one.elsewhere(false);
    copy(
        &one.folder.path().join("kiln.lock.d"),
        &other.folder.path().join("kiln.lock.d"),
    );
    assert_eq!(other.build(&text, |_| {}).unwrap(), later);
    // Without the recorded ones it is another image, which is told.
    let mut bare = one.elsewhere(false);
    assert_ne!(bare.build(&text, |_| {}).unwrap(), later);

    // What the lock no longer names goes.
    let path = one.folder.path().join("kiln.lock");
    let mut lock = Lock::default();
    lock.network.insert("web".into(), one.locked.clone());
    lock.save(&path).unwrap();
    let count = || {
        fs::read_dir(one.folder.path().join("kiln.lock.d"))
            .unwrap()
            .count()
    };
    assert_eq!(count(), 2);
    lock.network.clear();
    lock.save(&path).unwrap();
    assert!(!one.folder.path().join("kiln.lock.d").exists());
}

#[test]
fn what_changes_upstream_is_seen_when_it_is_asked_for() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let server = Server::http(&at);
    server.set("/a", &[Answer::of(200, "old")]);
    let command = format!("wget -O /a {}; echo $SOME > /some", server.url("/a"));
    let mut one = Bench::new();
    let first = one.run(&command).unwrap();
    server.set("/a", &[Answer::of(200, "new")]);

    // Something before it is another: the instruction is carried out, and gets the same.
    let text = format!("RUN touch /before\nRUN {command}");
    let moved = one.build(&text, |_| {}).unwrap();
    assert_eq!(one.world.text(&moved, "a"), "old");
    assert_eq!(server.count(), 1);
    // Without the content it is fetched, and is not what it was.
    let mut bare = one.elsewhere(false);
    let told = bare.run(&command).unwrap_err();
    let (expected, found) = (Digest::of("old"), Digest::of("new"));
    for part in [
        server.url("/a"),
        expected.to_string(),
        found.to_string(),
        "--network=live".into(),
    ] {
        assert!(told.contains(&part), "{part}: {told}");
    }
    assert_eq!(bare.locked, one.locked, "what failed has taught nothing");
    server.set("/a", &[Answer::of(200, "old")]);
    assert_eq!(bare.run(&command).unwrap(), first);
    server.stop();
    let mut offline = one.elsewhere(false);
    let told = offline.run(&command).unwrap_err();
    assert!(
        told.contains("is not on this machine and can't be fetched"),
        "{told}"
    );

    let server = Server::http(&at);
    server.set("/a", &[Answer::of(200, "2nd")]);
    let command = format!("wget -O /a {}", server.url("/a"));
    one.run(&command).unwrap();
    server.set("/a", &[Answer::of(200, "3rd")]);
    let same = one.run(&command).unwrap();
    assert_eq!(one.world.text(&same, "a"), "2nd");
    let anew = one.live(&command).unwrap();
    assert_eq!(one.world.text(&anew, "a"), "3rd");
    assert_eq!(one.exchanges()[0].sha256, Digest::of("3rd"));
    assert_eq!(one.run(&command).unwrap(), anew);
}

#[test]
fn answers_come_in_their_order_and_failures_are_not_kept() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let server = Server::http(&at);
    let answers = [
        Answer::of(503, "not now"),
        Answer::of(200, "one"),
        Answer::of(500, "neither"),
        Answer::of(200, "two"),
    ];
    server.set("/a", &answers);
    let url = server.url("/a");
    let get = |name: &str| format!("until wget -O /{name} {url}; do sleep 0.1; done");
    let command = format!("{}; {}", get("one"), get("two"));
    let mut one = Bench::new();
    let first = one.run(&command).unwrap();
    assert_eq!(one.world.text(&first, "one"), "one");
    assert_eq!(one.world.text(&first, "two"), "two");
    let bodies: Vec<Digest> = one.exchanges().iter().map(|e| e.sha256).collect();
    assert_eq!(bodies, [Digest::of("one"), Digest::of("two")]);
    assert_eq!(server.count(), 4);
    let told = one.world.seen.warnings().join("\n");
    assert!(told.contains("503") && told.contains("500"), "{told}");
    server.stop();
    let mut other = one.elsewhere(true);
    assert_eq!(other.run(&command).unwrap(), first);
}

#[test]
fn logins_and_the_builds_secrets_are_written_nowhere() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let server = Server::http(&at);
    let (login, secret) = ("bG9naW46cGFzc3dvcmQ", "sesame-open-1234");
    server.set(
        "/private",
        &[Answer::of(401, "who?"), Answer::of(200, "for you")],
    );
    server.set(&format!("/key/{secret}/x"), &[Answer::of(200, "keyed")]);
    server.set(
        "/login",
        &[Answer::of(200, "{\"token\": \"tok-en-value-77\"}")],
    );
    let command = format!(
        "--mount=type=secret,id=door wget -O /none {0} || true; \
         wget --header \"Authorization: Basic {login}\" -O /private {0} && \
         wget -O /keyed {1}/key/$(cat /run/secrets/door)/x && wget -O /dev/null {1}/login",
        server.url("/private"),
        server.url(""),
    );
    let mut one = Bench::new();
    let with_secret = |request: &mut BuildRequest| {
        request.secrets.insert("door".into(), secret.into());
    };
    let text = format!(
        "RUN {}",
        command.replace(&format!("Basic {login}"), "Basic $(echo $L)")
    );
    let text = format!("ARG L={login}\n{text}");
    let first = one.build(&text, with_secret).unwrap();
    assert_eq!(one.world.text(&first, "private"), "for you");
    assert_eq!(one.world.text(&first, "keyed"), "keyed");
    let sent = server.pages.seen.lock().unwrap().join("\n");
    assert!(sent.contains(login) && sent.contains(secret));
    let lock = format!("{:?}", one.locked);
    for text in [secret, "tok-en-value-77"] {
        assert!(!lock.contains(text), "{lock}");
        assert_eq!(holding(one.world.root.path(), text).len(), 0, "{text}");
    }
    assert!(!lock.contains(login), "{lock}");
    assert_eq!(holding(&one.world.builder.fetches, login).len(), 0);
    let direct: Vec<&String> = one.locked.values().flat_map(|r| &r.direct).collect();
    assert_eq!(direct, [&format!("a token from {}", server.url("/login"))]);
}

#[test]
fn what_goes_past_the_proxy_is_named() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let server = Server::http(&at);
    server.set("/a", &[Answer::of(200, "direct")]);
    let mut one = Bench::new();
    let clean = one.run("true").unwrap();
    assert_eq!(
        one.locked,
        Locked::new(),
        "who asks nothing needs no place in the lock"
    );
    assert_eq!(one.world.text(&clean, "etc/passwd").lines().count(), 2);
    let port = server.address.port();
    // A connection to the host itself isn't forwarded: what is outside of it is.
    let command = format!(
        "http_proxy= wget -T 2 -O /a {} ; nslookup x.test 198.51.100.9; \
         nc -w 1 198.51.100.7 {port} < /dev/null; true",
        server.url("/a")
    );
    one.run(&command).unwrap();
    let direct: Vec<&String> = one.locked.values().flat_map(|r| &r.direct).collect();
    let tcp = format!("198.51.100.7:{port}/tcp");
    assert!(direct.contains(&&tcp), "{direct:?}");
    assert!(
        direct.contains(&&"198.51.100.9:53/udp".to_owned()),
        "{direct:?}"
    );
    let told = one.world.seen.warnings().join("\n");
    assert!(
        told.contains(&format!("not hermetic: {tcp} is not recorded")),
        "{told}"
    );
    let host = one.build("RUN --network=host true", |_| {}).unwrap();
    assert!(one.world.tree(&host).get("bin/busybox").is_some());
    let direct: Vec<&String> = one.locked.values().flat_map(|r| &r.direct).collect();
    assert!(direct[0].contains("host's network"), "{direct:?}");
}

#[test]
fn the_hosts_own_services_are_out_of_reach_and_kilns_certificate_stays_out_of_images() {
    if !sandboxes() {
        return;
    }
    let own = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = own.local_addr().unwrap().port();
    let mut one = Bench::new();
    let command =
        format!("no_proxy= wget -O /a http://127.0.0.1:{port}/ 2>/told; cat /told; false");
    let told = one.run(&command).unwrap_err();
    assert!(told.contains("403"), "{told}");
    for copied in [
        "cp $SSL_CERT_FILE /ca.pem",
        "sed 1,3d $SSL_CERT_FILE > /ca.pem",
        "echo on $http_proxy > /p",
    ] {
        let told = one.run(copied).unwrap_err();
        assert!(
            told.contains("what a RUN is given for this build only"),
            "{told}"
        );
    }
    // Lists of variables are as they would be without.
    let text = "RUN env | sort > /env; export > /shell; cat /proc/self/environ > /raw\nRUN \
                --network=none env | sort > /none";
    let image = one.build(text, |_| {}).unwrap();
    assert_eq!(
        one.world.text(&image, "env"),
        one.world.text(&image, "none")
    );
    for path in ["env", "shell", "raw"] {
        let text = one.world.text(&image, path);
        assert!(
            text.contains("HOME") && !text.to_lowercase().contains("proxy"),
            "{text}"
        );
    }
}

const CURL: &str = "curl -sSf --retry 0";

/// Needs the network.
#[tokio::test(flavor = "multi_thread")]
async fn https_is_recorded_where_programs_check_certificates() {
    if !sandboxes() {
        return;
    }
    let at = Address::new();
    let made = tempfile::tempdir().unwrap();
    let Some((tls, authority)) = certificates(made.path(), at.ip()) else {
        return;
    };
    let server = Server::https(&at, tls);
    server.set("/a", &[Answer::of(200, "from afar")]);
    server.set("/b", &[Answer::of(200, "read by python")]);
    let base = DebianBase {
        suite: "bookworm".into(),
        packages: ["curl", "ca-certificates", "python3", "wget"]
            .map(str::to_owned)
            .into(),
        essential: true,
        ..DebianBase::default()
    };
    let url = |path: &str| format!("https://{}{path}", server.address);
    let text = format!(
        "FROM root\nCOPY own.crt /usr/local/share/ca-certificates/own.crt\n\
         RUN {CURL} -o /a {0} && wget -qO /w {0} && \
         update-ca-certificates && {CURL} -o /a2 {0} && wget -qO /w2 {0} && \
         python3 -c 'import urllib.request as u; open(\"/b\",\"wb\").write(u.urlopen(\"{1}\").read())'",
        url("/a"),
        url("/b"),
    );
    let mut one = Bench::new();
    one.base = String::new();
    compose(&one.world, &base).await;
    fs::write(one.folder.path().join("own.crt"), &authority).unwrap();
    let first = one.build(&text, |_| {}).unwrap();
    for (path, content) in [
        ("a", "from afar"),
        ("w2", "from afar"),
        ("b", "read by python"),
    ] {
        assert_eq!(one.world.text(&first, path), content);
    }
    let urls: Vec<String> = one.exchanges().into_iter().map(|e| e.url).collect();
    assert_eq!(urls, [url("/a"), url("/b")]);
    // The store that the RUN made anew has the image's own authority, and not kiln's.
    let bundle = one.world.text(&first, "etc/ssl/certs/ca-certificates.crt");
    assert!(bundle.contains(authority.lines().nth(2).unwrap()));
    for text in ["192.0.2.1:", "kiln-net", "recording proxy"] {
        assert_eq!(traces(&one.world, &first, text), [""; 0], "{text}");
    }
    server.stop();
    let mut other = one.elsewhere(true);
    other.base = String::new();
    compose(&other.world, &base).await;
    fs::write(other.folder.path().join("own.crt"), &authority).unwrap();
    assert_eq!(other.build(&text, |_| {}).unwrap(), first);
}
