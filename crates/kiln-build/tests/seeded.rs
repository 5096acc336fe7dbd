//! Secrets of every kind that people have left in images, by every way that leads into one:
//! none gets in, each is named, and none is shown. What only looks like one is no reason to
//! refuse anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;

use kiln_model::Digest;
use kiln_store::tree::Kind;
use world::{World, busybox, context, sandboxes, world};

/// What seeds are made of; none of it may ever be told.
const HUSH: &str = "Hu5hHu5h";

/// Frames and prefixes are put together here, so that no scanner takes this file for a leak.
fn framed(label: &str) -> String {
    let line = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n";
    let frame = |word: &str| format!("-----{word} {label}-----\n");
    format!("{}{}{}", frame("BEGIN"), line.repeat(3), frame("END"))
}

fn key(kind: &str) -> String {
    framed(&format!("{kind}PRIVATE KEY"))
}

fn token(prefix: &str, length: usize) -> String {
    let body = format!("{HUSH}Ab1Cd2Ef3Gh4Ij5Kl6Mn7").repeat(4);
    format!("{prefix}{}", &body[..length])
}

fn jwt() -> String {
    let part = |text: &str| format!("eyJ{text}");
    let (head, body) = (part("hbGciOiJIUzI1NiJ9"), part("zdWIiOiIxMjM0NTY3ODkwIn0"));
    format!("{head}.{body}.{HUSH}J3jVmNHl0w5N_XgL0n3I9P")
}

/// Issuers' tokens: a name, and one.
fn tokens() -> Vec<(&'static str, String)> {
    let upper = "ABCDEFGHIJKLMNOP";
    vec![
        ("aws", format!("{}IA{upper}", "AK")),
        ("aws-session", format!("{}IA{upper}", "AS")),
        ("github-classic", token("ghp_", 36)),
        ("github-app", token("ghs_", 36)),
        ("github-fine", token("github_pat_", 60)),
        ("gitlab", token("glpat-", 20)),
        ("gitlab-deploy", token("gldt-", 20)),
        ("gitlab-runner", token("glrt-", 20)),
        ("slack-bot", token("xoxb-", 40)),
        ("slack-app", token("xapp-1-A", 60)),
        ("npm", token("npm_", 36)),
        ("pypi", token("pypi-AgEIcHlwaS5vcmc", 60)),
        ("stripe", token("sk_live_", 24)),
        ("stripe-restricted", token("rk_live_", 24)),
        ("stripe-webhook", token("whsec_", 32)),
        ("google", token("AIza", 35)),
        ("google-client", token("GOCSPX-", 28)),
        ("docker-hub", token("dckr_pat_", 27)),
    ]
}

/// Keys as they lie in files, by the path they are put at.
fn keys() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = vec![];
    for kind in ["", "RSA ", "EC ", "DSA ", "ENCRYPTED ", "OPENSSH "] {
        let name = kind.trim().to_lowercase();
        all.push((format!("srv/{name}-key.pem"), key(kind).into()));
    }
    for kind in ["rsa", "ecdsa", "ed25519", "dsa"] {
        let path = format!("etc/ssh/ssh_host_{kind}_key");
        all.push((path, key("OPENSSH ").into()));
    }
    for home in ["root/.ssh/id_rsa", "home/me/.ssh/id_ed25519"] {
        all.push((home.into(), key("OPENSSH ").into()));
    }
    let encrypted = key("RSA ").replacen('\n', "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,0\n\n", 1);
    let json = format!("{{\"private_key\": \"{}\"}}", key("").replace('\n', "\\n"));
    all.extend([
        (
            "etc/ssl/private/ssl-cert-snakeoil.key".into(),
            key("").into(),
        ),
        ("srv/pgp.asc".into(), framed("PGP PRIVATE KEY BLOCK").into()),
        ("srv/old-encrypted.pem".into(), encrypted.into()),
        ("srv/service-account.json".into(), json.into()),
        (
            "srv/two.ppk".into(),
            b"PuTTY-User-Key-File-2: ssh-rsa\n".to_vec(),
        ),
        (
            "srv/three.ppk".into(),
            b"PuTTY-User-Key-File-3: ssh-rsa\n".to_vec(),
        ),
        (
            "srv/ssh2".into(),
            format!("---- BEGIN SSH2 ENCRYPTED {} KEY ----\nP2/x\n", "PRIVATE").into(),
        ),
        (
            "root/.gnupg/private-keys-v1.d/AB.key".into(),
            b"(11:private-key(".to_vec(),
        ),
        (
            "root/.age".into(),
            token("AGE-SECRET-KEY-1", 58).to_uppercase().into(),
        ),
        ("etc/munge/munge.key".into(), vec![7; 128]),
        (
            "etc/wireguard/wg0.conf".into(),
            format!("PrivateKey = {HUSH}=\n").into(),
        ),
        (
            "etc/bind/rndc.key".into(),
            format!("key \"rndc-key\" {{\n secret \"{HUSH}==\";\n}};\n").into(),
        ),
    ]);
    let rsa = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
    let by_password = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 5, 0x0d];
    let der: [(&str, &[&[u8]]); 4] = [
        (
            "pkcs8",
            &[&[0x30, 0x82, 4, 0xbd, 2, 1, 0, 0x30, 13, 6, 9], &rsa],
        ),
        (
            "pkcs8-encrypted",
            &[&[0x30, 0x82, 5, 0, 0x30, 0x57, 6, 9], &by_password],
        ),
        (
            "pkcs1",
            &[&[0x30, 0x82, 4, 0xa4, 2, 1, 0, 2, 0x82, 1, 1], &[7; 90]],
        ),
        ("sec1", &[&[0x30, 0x77, 2, 1, 1, 4, 32], &[7; 90]]),
    ];
    for (name, parts) in der {
        all.push((format!("srv/{name}.der"), parts.concat()));
    }
    all
}

/// Files that hold logins, and what is of one machine.
fn files() -> Vec<(String, Vec<u8>)> {
    let url = format!("https://me:{HUSH}@h.test");
    let id = "0123456789abcdef0123456789abcdef\n";
    let files = [
        ("etc/machine-id", id.to_owned()),
        ("var/lib/dbus/machine-id", id.to_owned()),
        ("var/lib/systemd/random-seed", "\u{1}\u{2}".repeat(256)),
        ("root/.netrc", format!("machine h login me password {HUSH}")),
        (
            "root/.docker/config.json",
            format!("{{\"auths\":{{\"h\":{{\"auth\":\"{HUSH}\"}}}}}}"),
        ),
        ("root/.npmrc", format!("//npm.test/:_authToken={HUSH}")),
        ("app/.npmrc", format!("_auth = {HUSH}")),
        (
            "root/.pypirc",
            format!("[pypi]\nusername = __token__\npassword = {HUSH}"),
        ),
        ("root/.git-credentials", url.clone()),
        (
            "app/.git/config",
            format!("[remote \"origin\"]\n\turl = {url}/x.git"),
        ),
        (
            "etc/pip.conf",
            format!("[global]\nindex-url = {url}/simple"),
        ),
        (
            "root/.config/pip/pip.conf",
            format!("[global]\nextra-index-url = {url}/simple"),
        ),
        (
            "etc/apt/auth.conf",
            format!("machine h login me password {HUSH}"),
        ),
        (
            "etc/apt/auth.conf.d/h.conf",
            format!("machine h\nlogin me\npassword {HUSH}"),
        ),
        (
            "etc/apt/sources.list.d/h.list",
            format!("deb {url} stable main"),
        ),
        (
            "root/.kube/config",
            format!("users:\n- user:\n    token: {HUSH}"),
        ),
        (
            "srv/ci.kubeconfig",
            format!("users:\n- user:\n    client-key-data: {HUSH}"),
        ),
        (
            "etc/kubernetes/admin.conf",
            format!("users:\n- user:\n    client-key-data: {HUSH}"),
        ),
        (
            "root/.aws/credentials",
            format!("[default]\naws_secret_access_key = {HUSH}"),
        ),
        (
            "root/.bash_history",
            format!("ls\nmysql -u root -p{HUSH} shop"),
        ),
        (
            "home/me/.bash_history",
            format!("cd /srv; PGPASSWORD={HUSH} psql -U me"),
        ),
        (
            "home/me/.zsh_history",
            format!(": 1:0;curl -u me:{HUSH} https://h.test"),
        ),
        ("app/.env", format!("PORT=80\nDB_PASS={HUSH}")),
        (
            "app/.env.production",
            format!("export STRIPE_API_KEY='{HUSH}'"),
        ),
        ("root/.my.cnf", format!("[client]\npassword={HUSH}")),
        ("root/.pgpass", format!("h:5432:db:me:{HUSH}")),
        (
            "root/.m2/settings.xml",
            format!("<server><password>{HUSH}</password></server>"),
        ),
        (
            "root/.cargo/credentials.toml",
            format!("[registry]\ntoken = \"{HUSH}\""),
        ),
        (
            "root/.config/gh/hosts.yml",
            format!("github.com:\n  oauth_token: {HUSH}"),
        ),
        (
            "etc/wpa_supplicant/wpa_supplicant.conf",
            format!("network={{\n psk=\"{HUSH}\"\n}}"),
        ),
        (
            "etc/NetworkManager/system-connections/home.nmconnection",
            format!("[wifi-security]\nkey-mgmt=wpa-psk\npsk={HUSH}"),
        ),
        ("etc/ppp/chap-secrets", format!("me * {HUSH} *")),
        (
            "etc/shadow",
            format!("root:$y$j9T$abcdefgh${HUSH}:19000:0:99999:7:::\n"),
        ),
        ("srv/.htpasswd", format!("me:$apr1$abcdefgh${HUSH}\n")),
    ];
    let owned = files.map(|(path, text)| (path.to_owned(), text.into_bytes()));
    let mut all = owned.to_vec();
    let token = |(name, text): (&str, String)| {
        let text = format!("settings:\n  access: \"{text}\"\n");
        (format!("srv/tokens/{name}.yaml"), text.into_bytes())
    };
    all.extend(tokens().into_iter().map(token));
    all
}

fn write(folder: &std::path::Path, files: &[(String, Vec<u8>)]) {
    for (path, content) in files {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

/// Each of these paths is named, once, by this instruction, and nothing else is.
#[track_caller]
fn all_named(error: &str, instruction: &str, seeds: &[(String, Vec<u8>)]) {
    let told = error.lines().filter_map(|line| {
        let (_, rest) = line.split_once(&format!(": {instruction}: /"))?;
        rest.split_once(": ").map(|(path, _)| path)
    });
    let mut told: Vec<&str> = told.collect();
    told.sort_unstable();
    told.dedup();
    let mut seeds: Vec<&str> = seeds.iter().map(|(path, _)| path.as_str()).collect();
    seeds.sort_unstable();
    assert_eq!(told, seeds, "{error}");
    shows_nothing(error);
}

#[track_caller]
fn shows_nothing(error: &str) {
    for secret in [HUSH, "MIIE", "ABCDEFGHIJKLMNOP"] {
        assert!(!error.contains(secret), "{error}");
    }
}

#[test]
fn what_is_copied_in_is_named_file_by_file() {
    let one = world();
    let seeds = [keys(), files()].concat();
    let folder = context(&[]);
    write(folder.path(), &seeds);
    let error = one.build(folder.path(), "FROM scratch\nCOPY . /\n");
    let error = error.unwrap_err();
    all_named(&error, "COPY", &seeds);
    // Behind a stage that is copied whole, and taken away by a later instruction.
    for text in [
        "FROM scratch AS a\nCOPY . /\nFROM scratch\nCOPY --from=a / /\n",
        "FROM scratch AS a\nCOPY . /\nFROM a\nCOPY srv /etc\n",
    ] {
        let error = one.build(folder.path(), text).unwrap_err();
        for (path, _) in &seeds {
            assert!(
                error.contains(&format!("COPY: /{path}: ")),
                "{path}: {error}"
            );
        }
    }
}

#[test]
fn what_an_archive_brings_is_named_too() {
    let one = world();
    let seeds = keys();
    let folder = context(&[]);
    let file = std::fs::File::create(folder.path().join("all.tar")).unwrap();
    let mut archive = tar::Builder::new(file);
    for (path, content) in &seeds {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        // Neither owner nor time, as npm's have none.
        archive
            .append_data(&mut header, path, content.as_slice())
            .unwrap();
    }
    archive.into_inner().unwrap();
    let error = one.build(folder.path(), "FROM scratch\nADD all.tar /\n");
    all_named(&error.unwrap_err(), "ADD", &seeds);
}

/// What a command makes is refused like what is copied, but for what tells this machine from
/// others: that is empty in the image, and each instance has its own.
#[test]
fn what_a_command_leaves_is_named_or_made_anew() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let seeds = [keys(), files()].concat();
    write(&folder.path().join("seeds"), &seeds);
    let text =
        format!("{base}RUN --mount=type=bind,source=seeds,target=/seeds cp -a /seeds/. / \n");
    let error = one.build(folder.path(), &text).unwrap_err();
    let (anew, refused): (Vec<_>, Vec<_>) = seeds.into_iter().partition(|(path, _)| {
        let known = kiln_model::identity::at(path.as_bytes()).is_some();
        // Dbus's own goes, and so does what systemd keeps for the next start.
        known || path == "var/lib/dbus/machine-id" || path == "var/lib/systemd/random-seed"
    });
    assert_eq!(anew.len(), 7);
    all_named(&error, "RUN", &refused);

    // Without those that refuse it, the image is there, and holds nothing of the others.
    let only: Vec<String> = anew
        .iter()
        .map(|(path, _)| format!("/seeds/{path}"))
        .collect();
    let text = format!(
        "{base}RUN --mount=type=bind,source=seeds,target=/seeds mkdir -p /etc/ssh \
         /etc/ssl/private /var/lib/dbus /var/lib/systemd && for f in {}; do cp $f ${{f#/seeds}}; done\n",
        only.join(" ")
    );
    one.seen.take();
    let image = one.build(folder.path(), &text).unwrap();
    let told = one.seen.warnings().join("\n");
    for (path, content) in &anew {
        match content_of(&one, &image, path) {
            Some(found) => {
                assert_eq!(found, b"", "{path}");
                assert!(told.contains(&format!("/{path} (")), "{path}: {told}");
            }
            None => assert!(path.starts_with("var/lib/"), "{path}: {content:?}"),
        }
    }
}

fn content_of(world: &World, image: &Digest, path: &str) -> Option<Vec<u8>> {
    match world.tree(image).get(path)?.kind {
        Kind::File { digest, .. } => {
            Some(std::fs::read(world.builder.store.object_path(&digest)).unwrap())
        }
        _ => None,
    }
}

/// Instructions whose own text is the leak, and what they are named by.
fn said() -> Vec<(String, &'static str)> {
    let mut all = vec![
        (format!("ENV SESSION={}", jwt()), "SESSION: JSON Web Token"),
        (format!("ARG SESSION={}", jwt()), "SESSION: JSON Web Token"),
        (
            format!(
                "RUN curl -H 'Authorization: Bearer {}' https://h.test",
                jwt()
            ),
            "instruction:",
        ),
        (
            format!("RUN git clone https://me:{HUSH}@h.test/x.git"),
            "instruction:",
        ),
        (
            format!("LABEL source=https://me:{HUSH}@h.test/x.git"),
            "instruction:",
        ),
        (
            format!("HEALTHCHECK CMD wget -qO- http://me:{HUSH}@localhost/"),
            "instruction:",
        ),
        (
            format!("ENTRYPOINT [\"x\", \"--dsn=postgres://me:{HUSH}@db/x\"]"),
            "instruction:",
        ),
        (
            format!("ENV DATABASE_URL=postgres://me:{HUSH}@db/x"),
            "DATABASE_URL: URL with a password",
        ),
        (
            format!("ENV HTTPS_PROXY=http://me:{HUSH}@proxy:3128"),
            "HTTPS_PROXY: URL with a password",
        ),
    ];
    for name in [
        "DB_PASSWORD",
        "MYSQL_ROOT_PASSWORD",
        "MYSQL_PWD",
        "DB_PASS",
        "REDIS_PASSWD",
        "SIGNING_PASSPHRASE",
        "JWT_SECRET",
        "GITHUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "STRIPE_API_KEY",
        "TLS_PRIVATE_KEY",
        "RAILS_MASTER_KEY",
        "APP_ENCRYPTION_KEY",
    ] {
        for instruction in ["ENV", "ARG"] {
            all.push((format!("{instruction} {name}={HUSH}"), "secret by its name"));
        }
    }
    for (name, token) in tokens() {
        all.push((format!("ENV PLAIN={token}"), "PLAIN: "));
        all.push((format!("ARG PLAIN={token}"), "PLAIN: "));
        all.push((format!("LABEL {name}={token}"), "instruction:"));
        all.push((format!("CMD [\"x\", \"{token}\"]"), "instruction:"));
    }
    all
}

#[test]
fn what_instructions_say_is_named() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let before = base.lines().count();
    for (instruction, named) in said() {
        // It would fail if it were carried out to its end.
        let instruction = match instruction.strip_prefix("RUN ") {
            Some(command) => format!("RUN true || {command}"),
            None => instruction,
        };
        let error = one.build(folder.path(), &format!("{base}{instruction}\n"));
        let error = error.expect_err(&instruction);
        assert!(error.contains(&format!("line {}: ", before + 1)), "{error}");
        assert!(error.contains(named), "{instruction}: {error}");
        shows_nothing(&error);
    }
}

#[test]
fn a_builds_argument_is_in_nothing_that_the_image_tells() {
    let one = world();
    let folder = context(&[("f", "x")]);
    let give = |request: &mut kiln_build::build::BuildRequest| {
        request.build.args = BTreeMap::from([("API_TOKEN".into(), HUSH.into())]);
    };
    let text = "FROM scratch\nARG API_TOKEN\nCOPY f /\n";
    match one.build_with(folder.path(), text, give) {
        Err(error) => {
            assert!(error.contains("API_TOKEN: secret by its name"), "{error}");
            shows_nothing(&error);
        }
        Ok(image) => {
            let blob = |digest: &Digest| {
                std::fs::read_to_string(one.builder.store.blob_path(digest)).unwrap()
            };
            let manifest: serde_json::Value = serde_json::from_str(&blob(&image)).unwrap();
            let config = manifest["config"]["digest"].as_str().unwrap();
            let config = blob(&config.parse().unwrap());
            assert!(config.contains("API_TOKEN"), "{config}");
            shows_nothing(&config);
        }
    }
}

#[test]
fn what_only_looks_like_a_secret_refuses_nothing() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let certificates = framed("CERTIFICATE").repeat(100);
    let frame = format!("-----BEGIN RSA {} KEY-----", "PRIVATE");
    let program = format!("\x7fELF\0{frame}\0-----END RSA PRIVATE KEY-----\0");
    let shown = format!("Use {frame} and so on, or AKIA{}EXAMPLE.", "IOSFODNN7");
    let tests = key("RSA ");
    let innocent = [
        ("etc/ssl/certs/ca-certificates.crt", certificates.as_str()),
        (
            "var/lib/apt/lists/main_Packages",
            "Package: xapp-symbolic-icons\nDepends: glrt-tools, xoxo\n",
        ),
        ("srv/public.pem", &framed("PUBLIC KEY")),
        ("srv/rsa-public.pem", &framed("RSA PUBLIC KEY")),
        ("srv/request.csr", &framed("CERTIFICATE REQUEST")),
        ("srv/dh.pem", &framed("DH PARAMETERS")),
        ("srv/pgp-public.asc", &framed("PGP PUBLIC KEY BLOCK")),
        (
            "root/.ssh/authorized_keys",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me",
        ),
        (
            "root/.ssh/known_hosts",
            "h.test ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAB",
        ),
        ("srv/app", &program),
        ("srv/README.md", &shown),
        (
            "srv/docs.md",
            "set DB_PASSWORD=hunter2, then `mysql -u root -phunter2`",
        ),
        (
            "srv/hashes.txt",
            "2b7e151628aed2a6abf7158809cf4f3c 550e8400-e29b-41d4-a716-446655440000",
        ),
        (
            "srv/package-lock.json",
            "{\"integrity\": \"sha512-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL==\"}",
        ),
        ("srv/app.env.example", "DB_PASSWORD=change-me"),
        ("app/.env.example", "DB_PASSWORD=change-me"),
        (
            "app/.env",
            "PORT=80\nDB_PASSWORD_FILE=/run/secrets/db\nTOKEN_TTL=3600\nDB_PASSWORD=",
        ),
        ("app/.npmrc", "//npm.test/:_authToken=${NPM_TOKEN}\n"),
        ("root/.netrc", "# machine h login me password nothing"),
        (
            "root/.bash_history",
            "cd /srv\nls -p\nread -s PASSWORD\nmysql -u root -p\ncurl -u me https://h.test",
        ),
        (
            "root/.docker/config.json",
            "{\"auths\": {}, \"credsStore\": \"pass\"}",
        ),
        (
            "root/.gitconfig",
            "[user]\n\temail = me@h.test\n[url \"https://h.test\"]",
        ),
        (
            "etc/pip.conf",
            "[global]\nindex-url = https://pypi.org/simple",
        ),
        (
            "etc/shadow",
            "root:*:19000:0:99999:7:::\nweb:!:19000::::::\nold:!!:19000::::::\n",
        ),
        ("etc/gshadow", "root:*::\nweb:!::\n"),
        (
            "etc/wpa_supplicant/wpa_supplicant.conf",
            "ctrl_interface=/run/wpa_supplicant\n",
        ),
        (
            "etc/NetworkManager/system-connections/eth",
            "[ipv4]\nmethod=auto",
        ),
        (
            "etc/ppp/chap-secrets",
            "# client\tserver\tsecret\tIP addresses\n",
        ),
        ("etc/machine-id", "uninitialized\n"),
        ("srv/node_modules/agent/test/server.key", &tests),
        (
            "usr/lib/python3/dist-packages/tornado/test/test.key",
            &tests,
        ),
        ("usr/share/doc/openvpn/examples/keys/server.key", &tests),
    ];
    let innocent = innocent.map(|(path, text)| (path.to_owned(), text.as_bytes().to_vec()));
    write(&folder.path().join("all"), &innocent);
    let text = format!(
        "{base}ENV PATH=/bin GPG_KEY=A035C8C19219BA821ECEA86B64E628F8D684696D PWD=/srv \
         PASSWORD_FILE=/run/secrets/x TOKENIZERS_PARALLELISM=false SECRET_NAME=db \
         API_KEY=$NOTHING DB_PASSWORD= BYPASS=yes HOMEPAGE=https://me@h.test/a:b\n\
         ARG NPM_TOKEN\nLABEL org.opencontainers.image.source=https://h.test/x.git\n\
         COPY all /\nRUN echo \"Authorization: Bearer $NPM_TOKEN\" > /dev/null\n\
         CMD [\"x\", \"--password-file=/run/secrets/x\", \"https://h.test:8443/a@b\"]\n"
    );
    one.build(folder.path(), &text).unwrap();
}
