#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Cursor, Write};

use super::*;
use crate::files::Meta;
use crate::rootfs::node;

fn world(files: &[(&str, &[u8], u32)]) -> Packages {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let mut tree = Tree::new();
    for (path, content, mode) in files {
        let (digest, size) = store.put_object(&mut &content[..]).unwrap();
        let meta = Meta {
            mode: *mode,
            ..Meta::default()
        };
        tree.insert(path, node(meta, Kind::File { digest, size }))
            .unwrap();
    }
    collect(&tree, &store)
}

fn told(packages: &Packages) -> Vec<String> {
    let tell = |p: &Package| {
        let source = p.source.as_ref().map(|s| format!(" of {s}"));
        let (name, version) = (&p.name, &p.version);
        format!(
            "{} {name} {version}{}",
            p.ecosystem.name(),
            source.unwrap_or_default()
        )
    };
    packages.packages.iter().map(tell).collect()
}

#[test]
fn every_package_manager_is_read_in_its_own_words() {
    let lock = br#"{"packages": {"": {"name": "app", "version": "1"},
        "node_modules/a": {"version": "2"}, "node_modules/a/node_modules/@s/b": {"version": "3"}}}"#;
    let found = world(&[
        (
            "var/lib/dpkg/status",
            b"Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9\n\
              Source: glibc (2.36)\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n",
            0o644,
        ),
        ("var/lib/dpkg/status.d/tzdata", b"Package: tzdata\nVersion: 2024a\n", 0o644),
        ("var/lib/dpkg/status.d/tzdata.md5sums", b"0123 usr/x\n", 0o644),
        ("lib/apk/db/installed", b"P:musl\nV:1.2\nA:x86_64\no:musl\n\nP:ssl\nV:3\no:openssl\n", 0o644),
        ("usr/lib/python3/dist-packages/PyYAML-6.dist-info/METADATA", b"Metadata-Version: 2.1\nName: PyYAML\nVersion: 6.0\n\nName: no\n", 0o644),
        ("usr/lib/python3/dist-packages/six.egg-info", b"Name: six\nVersion: 1.16\n", 0o644),
        ("app/node_modules/a/package.json", br#"{"name": "a", "version": "9"}"#, 0o644),
        ("app/node_modules/@s/c/package.json", br#"{"name": "@s/c", "version": "8"}"#, 0o644),
        ("app/node_modules/a/dist/package.json", br#"{"name": "no", "version": "8"}"#, 0o644),
        ("app/package-lock.json", lock, 0o644),
        ("other/package-lock.json", lock, 0o644),
        ("src/Cargo.lock", b"version = 4\n\n[[package]]\nname = \"serde\"\nversion = \"1.0\"\n\n[[package]]\nname = \"x\"\nversion = \"2\"\n", 0o644),
        ("var/lib/gems/3.1.0/specifications/rack-2.gemspec", b"Gem::Specification.new do |s|\n  s.name = \"rack\".freeze\n  s.version = \"2.2\"\nend\n", 0o644),
    ]);
    assert_eq!(found.unread, []);
    assert_eq!(
        told(&found),
        [
            "deb libc6 2.36-9 of glibc 2.36",
            "deb tzdata 2024a",
            "apk musl 1.2",
            "apk ssl 3 of openssl",
            "pypi PyYAML 6.0",
            "pypi six 1.16",
            "npm @s/b 3",
            "npm @s/c 8",
            "npm a 2",
            "npm a 9",
            "cargo serde 1.0",
            "cargo x 2",
            "gem rack 2.2",
        ]
    );
    assert_eq!(found.packages[0].architecture.as_deref(), Some("amd64"));
    assert_eq!(found.packages[1].place, "/var/lib/dpkg/status.d/tzdata");
}

#[test]
fn what_can_not_be_read_is_in_the_record() {
    let long = format!("Package: {}\nVersion: 1\n", "x".repeat(MAX_TEXT + 1));
    let deep = "[".repeat(100_000);
    let found = world(&[
        ("a/node_modules/b/package.json", deep.as_bytes(), 0o644),
        (
            "a/node_modules/c/package.json",
            b"{\"name\": \"\\u001b[2J\"}",
            0o644,
        ),
        ("var/lib/dpkg/status.d/long", long.as_bytes(), 0o644),
        ("var/lib/dpkg/status.d/none", b"\xff\xfe\0", 0o644),
        ("x.egg-info", b"", 0o644),
        ("package-lock.json", b"{}", 0o644),
    ]);
    assert_eq!(found.packages, []);
    let places: Vec<&str> = found.unread.iter().map(|u| u.place.as_str()).collect();
    assert_eq!(
        places,
        [
            "/a/node_modules/b/package.json",
            "/a/node_modules/c/package.json",
            "/package-lock.json",
            "/var/lib/dpkg/status.d/long",
            "/var/lib/dpkg/status.d/none",
            "/x.egg-info",
        ]
    );
}

#[test]
fn what_is_read_is_bounded_and_what_is_beyond_is_told() {
    let large = vec![b'\n'; MAX_MANIFEST as usize + 1];
    let found = world(&[("var/lib/dpkg/status.d/large", &large, 0o644)]);
    assert_eq!(found.packages, []);
    assert_eq!(found.unread.len(), 1);
    assert!(found.unread[0].why.ends_with("are read"), "{found:?}");

    let many: String = (0..=MAX_PACKAGES)
        .map(|n| format!("P:p{n}\nV:1\n\n"))
        .collect();
    let found = world(&[("lib/apk/db/installed", many.as_bytes(), 0o644)]);
    assert_eq!(found.packages.len(), MAX_PACKAGES);
    assert_eq!(found.unread.len(), 1);
    let why = &found.unread[0].why;
    assert!(why.starts_with("there are more than"), "{why}");

    // More sections than any program has: none is looked for.
    let mut program = program(&[(".go.buildinfo", &go("mod\ta\tv1\n"))]);
    assert_eq!(world(&[("bin/x", &program, 0o755)]).packages.len(), 2);
    program[60..62].copy_from_slice(&5000_u16.to_le_bytes());
    assert_eq!(world(&[("bin/x", &program, 0o755)]).packages, []);
}

/// A 64-bit program with these sections and nothing else.
fn program(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut names = vec![0u8];
    let mut bytes = vec![0u8; 64];
    let mut entries = vec![[0u8; 64]];
    let mut add = |name: usize, start: usize, size: usize| {
        let mut entry = [0u8; 64];
        entry[..4].copy_from_slice(&u32::try_from(name).unwrap().to_le_bytes());
        entry[24..32].copy_from_slice(&(start as u64).to_le_bytes());
        entry[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        entries.push(entry);
    };
    for (name, content) in sections {
        add(names.len(), bytes.len(), content.len());
        names.extend(name.bytes().chain([0]));
        bytes.extend_from_slice(content);
    }
    add(0, bytes.len(), names.len());
    bytes.extend_from_slice(&names);
    let table = bytes.len() as u64;
    let count = u16::try_from(entries.len()).unwrap();
    bytes.extend(entries.iter().flatten());
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[40..48].copy_from_slice(&table.to_le_bytes());
    bytes[58..60].copy_from_slice(&64u16.to_le_bytes());
    bytes[60..62].copy_from_slice(&count.to_le_bytes());
    bytes[62..64].copy_from_slice(&(count - 1).to_le_bytes());
    bytes
}

fn go(modules: &str) -> Vec<u8> {
    let mut section = b"\xff Go buildinf:\x08\x02".to_vec();
    section.resize(32, 0);
    let modules = format!("{:16}{modules}{:16}", "", "");
    for text in ["go1.22.1", &modules] {
        let mut length = text.len();
        while length > 0x7f {
            section.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        section.push(length as u8);
        section.extend_from_slice(text.as_bytes());
    }
    section
}

#[test]
fn programs_say_what_they_were_built_from() {
    let modules = "path\tcmd/x\nmod\texample.org/app\t(devel)\t\ndep\tgolang.org/x/net\tv0.1\th1:a=\n\
                   dep\told.org/y\tv1\th1:b=\n=>\tnew.org/y\tv2\th1:c=\nbuild\t-compiler=gc\n";
    let mut list = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    list.write_all(br#"{"packages":[{"name":"serde","version":"1.0","source":"crates.io"}]}"#)
        .unwrap();
    let both = program(&[
        (".text", b"code"),
        (".go.buildinfo", &go(modules)),
        (".dep-v0", &list.finish().unwrap()),
    ]);
    let found = world(&[
        ("bin/app", &both, 0o755),
        ("bin/text", &both, 0o644),
        (
            "bin/broken",
            &program(&[(".dep-v0", b"not compressed")]),
            0o755,
        ),
    ]);
    assert_eq!(
        told(&found),
        [
            "cargo serde 1.0",
            "golang example.org/app (devel)",
            "golang golang.org/x/net v0.1",
            "golang new.org/y v2",
            "golang stdlib 1.22.1",
        ]
    );
    assert_eq!(found.unread.len(), 1);
    assert_eq!(found.unread[0].place, "/bin/broken");
}

#[test]
fn a_record_follows_from_the_files_and_stays_with_the_image() {
    use kiln_oci::manifest::{ConfigDocument, Descriptor, Manifest, media_type, write_config};
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let config = write_config(&ConfigDocument::default());
    let (config, size) = store.write(None, &mut config.as_slice()).unwrap();
    let config = Descriptor::new(media_type::OCI_CONFIG, config, size);
    let manifest = Manifest::new(config, Vec::new()).to_bytes();
    let (manifest, _) = store.write(None, &mut manifest.as_slice()).unwrap();
    let image = store.add_image(&manifest).unwrap();
    assert_eq!(of(&store, &image).unwrap(), None);
    let image = attach(&store, &manifest).unwrap();
    let expected = Packages {
        format: FORMAT,
        packages: Vec::new(),
        unread: Vec::new(),
    };
    assert_eq!(of(&store, &image).unwrap(), Some(expected));
    assert_eq!(attach(&store, &manifest).unwrap(), image);
    assert_eq!(store.add_image(&manifest).unwrap(), image);
    assert!(image.blobs().any(|blob| Some(blob) == image.packages));
    store.set_ref("kept", &manifest).unwrap();
    store.gc(&[], false).unwrap();
    assert!(of(&store, &image).unwrap().is_some());

    // One that another kiln has written stays, and is not misread.
    let newer = br#"{"format":2,"packages":[],"unread":[]}"#;
    let (digest, _) = store.write(None, &mut newer.as_slice()).unwrap();
    let image = store.attach_packages(&image, digest).unwrap();
    assert_eq!(attach(&store, &manifest).unwrap().packages, Some(digest));
    let told = of(&store, &image).unwrap_err();
    assert!(matches!(told, PackagesError::Format(_, 2)), "{told}");
}

#[test]
fn no_byte_of_a_program_is_believed() {
    let whole = program(&[(".go.buildinfo", &go("mod\ta\tv1\n"))]);
    for at in 0..whole.len() {
        for to in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = to;
            let _ = programs::packages(&mut Cursor::new(bytes));
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_program_is_believed(
        header in proptest::collection::vec(proptest::num::u8::ANY, 60),
        rest in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
    ) {
        let bytes = [b"\x7fELF", header.as_slice(), &rest].concat();
        let _ = programs::packages(&mut Cursor::new(bytes));
    }

    #[test]
    fn no_section_is_believed(at in 0usize..700, to in proptest::num::u8::ANY) {
        let mut bytes = program(&[(".go.buildinfo", &go("mod\ta\tv1\n"))]);
        let at = at % bytes.len();
        bytes[at] = to;
        let _ = programs::packages(&mut Cursor::new(bytes));
    }
}
