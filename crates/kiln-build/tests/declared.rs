//! `x-kiln.image`: images that are declared, without a Containerfile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiln_model::Digest;
use kiln_model::spec::{
    DeclaredContent, DeclaredEntry, DeclaredGroup, DeclaredImage, DeclaredPlace, DeclaredUser,
    ExposedPort, Protocol,
};
use kiln_store::tree::Kind;
use world::{World, context, world};

const FILES: [(&str, &str); 3] = [
    ("conf", "listen 80;\n"),
    ("pages/a", "1"),
    ("pages/d/b", "2"),
];
const ACCOUNTS: &str = "FROM scratch\nCOPY <<E /etc/passwd\nroot:x:0:0::/root:/bin/sh\nE\n\
                        COPY <<E /etc/group\nroot:x:0:\nstaff:x:50:\nE\n\
                        COPY --chmod=0700 <<E /var/log/x/access\nold\nE\n\
                        ENV A=base KEPT=1\nCMD [\"base\"]";

fn place(line: u32) -> DeclaredPlace {
    DeclaredPlace {
        file: "compose.yaml".into(),
        line,
        column: 3,
    }
}

fn entry(path: &str, what: DeclaredContent) -> DeclaredEntry {
    DeclaredEntry {
        path: path.into(),
        what,
        owner: None,
        mode: None,
        place: place(9),
    }
}

fn copied(folder: &Path, name: &str, path: &str) -> DeclaredEntry {
    entry(path, DeclaredContent::Copy(folder.join(name)))
}

fn whole(folder: &Path) -> DeclaredImage {
    let user = |name: &str, uid| DeclaredUser {
        name: name.into(),
        uid,
        group: None,
        groups: vec!["staff".into()],
        home: "/srv".into(),
        shell: "/bin/false".into(),
        place: place(3),
    };
    DeclaredImage {
        place: place(2),
        base: Some("base".into()),
        groups: vec![DeclaredGroup {
            name: "ops".into(),
            gid: 900,
            place: place(4),
        }],
        users: vec![user("web", 1000)],
        entries: vec![
            DeclaredEntry {
                owner: Some("web".into()),
                mode: Some(0o1770),
                ..entry("/srv/tmp", DeclaredContent::Folder)
            },
            DeclaredEntry {
                mode: Some(0o750),
                ..entry("/var/log/x", DeclaredContent::Folder)
            },
            DeclaredEntry {
                owner: Some("web:ops".into()),
                mode: Some(0o640),
                ..copied(folder, "pages", "/srv/pages")
            },
            copied(folder, "conf", "/etc/web/"),
            entry("/etc/web/text", DeclaredContent::Text("$A ${B}\n".into())),
            entry(
                "/var/log/x/access",
                DeclaredContent::Link("/dev/stdout".into()),
            ),
        ],
        entrypoint: Some(vec!["/bin/web".into(), "$HOME".into()]),
        env: [("A", "it's \"$HOME\" \\ <x>"), ("B", "2")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        labels: [("team".to_owned(), "front $1".to_owned())].into(),
        working_dir: Some("/srv/work".into()),
        user: Some("web".into()),
        exposed: vec![ExposedPort {
            port: 80,
            protocol: Protocol::Tcp,
        }],
        stop_signal: Some("SIGQUIT".into()),
        ..DeclaredImage::default()
    }
}

fn build(world: &World, folder: &Path, image: &DeclaredImage) -> Result<Digest, String> {
    world.build_with(folder, "", |request| {
        request.build.inline = None;
        request.build.declared = Some(Box::new(image.clone()));
    })
}

/// A world that has the base.
fn with_base() -> World {
    let world = world();
    let base = world.build(context(&[]).path(), ACCOUNTS).unwrap();
    world.images.lock().unwrap().insert("base".into(), base);
    world.seen.counts();
    world
}

#[test]
fn everything_declared_is_in_the_image_as_it_was_said() {
    let folder = context(&FILES);
    let world = with_base();
    let digest = build(&world, folder.path(), &whole(folder.path())).unwrap();
    let tree = world.tree(&digest);
    let meta = |path: &str| {
        let meta = &tree.get(path).unwrap_or_else(|| panic!("{path}")).meta;
        assert_eq!(meta.mtime.seconds, 0, "{path}");
        (meta.mode, meta.uid, meta.gid)
    };
    assert_eq!(meta("srv/tmp"), (0o1770, 1000, 1000));
    assert_eq!(meta("var/log/x"), (0o750, 0, 0));
    assert_eq!(meta("srv"), (0o755, 0, 0));
    // Whoever may read the files may enter the folders.
    assert_eq!(meta("srv/pages/d"), (0o750, 1000, 900));
    assert_eq!(meta("srv/pages"), (0o750, 1000, 900));
    assert_eq!(meta("srv/pages/d/b"), (0o640, 1000, 900));
    assert_eq!(meta("etc/web/text"), (0o644, 0, 0));
    assert_eq!(meta("srv/work"), (0o755, 1000, 1000));
    assert_eq!(world.text(&digest, "etc/web/conf"), FILES[0].1);
    assert_eq!(world.text(&digest, "etc/web/text"), "$A ${B}\n");
    let link = &tree.get("var/log/x/access").unwrap().kind;
    assert!(matches!(link, Kind::Symlink { target } if target == b"/dev/stdout"));
    assert_eq!(
        world.text(&digest, "etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/srv:/bin/false\n"
    );
    let group = "root:x:0:\nstaff:x:50:web\nops:x:900:\nweb:x:1000:\n";
    assert_eq!(world.text(&digest, "etc/group"), group);
    assert!(tree.get("etc/shadow").is_none(), "the base has none");

    let config = world.builder.store.image(&digest).unwrap().unwrap().config;
    let env = |name: &str| {
        let found = config.env.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(env("A"), Some("it's \"$HOME\" \\ <x>"));
    assert_eq!((env("B"), env("KEPT")), (Some("2"), Some("1")));
    assert_eq!(config.entrypoint, ["/bin/web", "$HOME"]);
    assert!(
        config.cmd.is_empty(),
        "the base's is for its own entrypoint"
    );
    assert_eq!((&*config.user, &*config.working_dir), ("web", "/srv/work"));
    assert_eq!(config.labels["team"], "front $1");
    assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
    assert_eq!(config.exposed.len(), 1);
}

#[test]
fn no_change_is_no_work_and_elsewhere_it_is_the_same() {
    let folder = context(&FILES);
    let world = with_base();
    let image = whole(folder.path());
    let digest = build(&world, folder.path(), &image).unwrap();
    assert_eq!(world.seen.counts(), (0, 2));
    // Where it is said makes no difference.
    let mut moved = image.clone();
    moved.place = place(70);
    moved.entries[0].place = place(71);
    assert_eq!(build(&world, folder.path(), &moved).unwrap(), digest);
    assert_eq!(world.seen.counts(), (2, 0));

    let other = context(&FILES);
    assert_eq!(
        build(&with_base(), other.path(), &whole(other.path())).unwrap(),
        digest
    );
    fs::write(folder.path().join("pages/d/b"), "3").unwrap();
    let changed = build(&world, folder.path(), &image).unwrap();
    assert_eq!(world.text(&changed, "srv/pages/d/b"), "3");
    let why = world.seen.reasons();
    assert_eq!(why[0], "changed: /srv/pages");
}

#[test]
fn what_kiln_writes_beside_the_project_is_no_part_of_a_copied_folder() {
    let folder = context(&FILES);
    let image = DeclaredImage {
        entries: vec![copied(folder.path(), "", "/app")],
        ..DeclaredImage::default()
    };
    let world = world();
    let before = build(&world, folder.path(), &image).unwrap();
    fs::create_dir(folder.path().join("kiln.lock.d")).unwrap();
    for path in ["kiln.lock", "kiln.lock.d/aa", "pages/kiln.lock"] {
        fs::write(folder.path().join(path), "x").unwrap();
    }
    assert_eq!(build(&world, folder.path(), &image).unwrap(), before);
    // Who names it wants it.
    let image = DeclaredImage {
        entries: vec![copied(folder.path(), "kiln.lock", "/app/")],
        ..DeclaredImage::default()
    };
    let named = build(&world, folder.path(), &image).unwrap();
    assert_eq!(world.text(&named, "app/kiln.lock"), "x");
}

#[test]
fn without_a_mode_files_are_as_on_the_host_and_nothing_may_be_below() {
    let folder = context(&FILES);
    let conf = folder.path().join("conf");
    fs::set_permissions(&conf, fs::Permissions::from_mode(0o4755)).unwrap();
    let image = DeclaredImage {
        entries: vec![copied(folder.path(), "conf", "/x/conf")],
        users: Vec::new(),
        ..DeclaredImage::default()
    };
    let world = world();
    let digest = build(&world, folder.path(), &image).unwrap();
    let tree = world.tree(&digest);
    assert_eq!(tree.get("x/conf").unwrap().meta.mode, 0o4755);
    assert!(tree.get("etc").is_none());
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let folder = context(&FILES);
    let world = with_base();
    let one = |entry: DeclaredEntry| DeclaredImage {
        place: place(2),
        base: Some("base".into()),
        entries: vec![entry],
        ..DeclaredImage::default()
    };
    let text = |path: &str| entry(path, DeclaredContent::Text("x".into()));
    let mut owned = text("/x");
    owned.owner = Some("nobody".into());
    for (image, expected) in [
        (
            one(copied(folder.path(), "missing", "/x")),
            "compose.yaml: line 2: x-kiln.image files: 1: compose.yaml:9:3: /x: ",
        ),
        (
            one(owned),
            "compose.yaml:9:3: /x: the user `nobody` is not in the image's /etc/passwd",
        ),
        (
            one(text("/var/log")),
            "compose.yaml:9:3: /var/log: /var/log is a folder",
        ),
        (
            one(entry("/etc/passwd", DeclaredContent::Folder)),
            "compose.yaml:9:3: /etc/passwd: /etc/passwd is not a folder",
        ),
        (
            DeclaredImage {
                stop_signal: Some("NOPE".into()),
                ..one(text("/x"))
            },
            "compose.yaml: line 2: STOPSIGNAL: `NOPE`",
        ),
    ] {
        let told = build(&world, folder.path(), &image).unwrap_err();
        assert!(told.contains(expected), "{told}");
    }
    let mut known = one(text("/x"));
    known.users = whole(folder.path()).users;
    known.users[0].name = "root".into();
    let told = build(&world, folder.path(), &known).unwrap_err();
    assert!(
        told.contains("compose.yaml:3:3: the base has the user `root`"),
        "{told}"
    );
}

#[test]
fn secrets_are_refused_as_in_any_image() {
    let folder = context(&[]);
    let key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1c7+9z5Pad7OejecsQ0bu3aozN3tihPmljnnudb9G3HECdnHlWu2a1gXW9JW5TQuN0g\n-----END RSA PRIVATE KEY-----\n";
    let image = DeclaredImage {
        place: place(2),
        entries: vec![entry("/key.pem", DeclaredContent::Text(key.into()))],
        ..DeclaredImage::default()
    };
    let told = build(&world(), folder.path(), &image).unwrap_err();
    assert!(
        told.contains("/key.pem") && told.contains("x-kiln.image"),
        "{told}"
    );
}
