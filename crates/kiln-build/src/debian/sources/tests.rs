#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::lock::ArchiveKind;

const F: &str = "/etc/apt/sources.list";

fn one_line(text: &str) -> AptConfig {
    AptConfig {
        sources: parse_one_line(text, Path::new(F)).unwrap(),
        ..AptConfig::default()
    }
}

fn names(archives: &[Archive]) -> Vec<String> {
    let mark = |a: &Archive| if a.optional { "?" } else { "" };
    archives
        .iter()
        .map(|a| format!("{} {}{}", a.uri, a.suite, mark(a)))
        .collect()
}

const CLASSIC: &str = "\
# comment
deb [arch=amd64,arm64 signed-by=/k/a.gpg] http://m.test/debian/ bookworm main contrib # tail
deb-src http://m.test/debian bookworm main
deb http://m.test/debian bookworm-updates main
deb http://s.test/debian-security bookworm-security main
deb http://m.test/debian bookworm-backports main
deb cdrom:[Debian GNU/Linux 12 _Bookworm_]/ bookworm main
deb https://vendor.test/apt stuff main
deb https://flat.test/apt ./
";

#[test]
fn the_machines_own_suite_is_taken_as_configured() {
    let config = one_line(CLASSIC);
    let archives = archives(&config, "bookworm", "amd64").unwrap();
    assert_eq!(
        names(&archives),
        [
            "http://m.test/debian bookworm",
            "http://m.test/debian bookworm-updates",
            "http://s.test/debian-security bookworm-security"
        ]
    );
    assert_eq!(archives[0].signed_by, [KeyRef::File("/k/a.gpg".into())]);
    assert_eq!(archives[2].kind, ArchiveKind::Security);
}

#[test]
fn another_suite_comes_from_the_same_addresses() {
    let config = one_line(CLASSIC);
    assert_eq!(
        names(&archives(&config, "trixie", "amd64").unwrap()),
        [
            "http://m.test/debian trixie",
            "http://m.test/debian trixie-updates",
            "http://s.test/debian-security trixie-security"
        ]
    );
    assert_eq!(
        names(&archives(&config, "sid", "amd64").unwrap()),
        ["http://m.test/debian sid"]
    );
}

#[test]
fn neighbours_that_are_not_configured_are_guessed() {
    let config = one_line("deb http://m.test/debian sid main");
    assert_eq!(
        names(&archives(&config, "bookworm", "amd64").unwrap()),
        [
            "http://m.test/debian bookworm",
            "http://m.test/debian bookworm-updates?",
            "http://m.test/debian-security bookworm-security?"
        ]
    );
    assert_eq!(
        names(
            &mirror_archives("http://m.test/archive/debian/20250101T000000Z/", "trixie").unwrap()
        )[2],
        "http://m.test/archive/debian-security/20250101T000000Z trixie-security?"
    );
    assert_eq!(
        mirror_archives("http://debian/x", "trixie").unwrap().len(),
        2
    );
}

#[test]
fn no_debian_is_said() {
    for text in [
        "",
        "deb http://u.test/ubuntu noble main",
        "deb [arch=arm64] http://m.test/debian bookworm main",
    ] {
        let error = archives(&one_line(text), "trixie", "amd64").unwrap_err();
        assert!(
            error.to_string().contains("x-kiln.debian.mirror"),
            "{error}"
        );
    }
    assert!(archives(&one_line(CLASSIC), "../x", "amd64").is_err());
    assert!(mirror_archives("ftp://m.test/debian", "trixie").is_err());
}

#[test]
fn bad_lines_are_named() {
    for bad in [
        "deb [arch=amd64 http://m.test x main",
        "dep http://m.test x main",
        "deb http://m.test",
    ] {
        let error = parse_one_line(&format!("\n{bad}"), Path::new(F)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/etc/apt/sources.list, line 2"),
            "{error}"
        );
    }
    let error = parse_deb822(
        "Types: deb\nURIs: x\nSuites: y\n\nTypes: deb\nURIs: x\n",
        Path::new(F),
    )
    .unwrap_err();
    assert!(error.to_string().contains("line 5"), "{error}");
}

#[test]
fn deb822_stanzas_with_options_and_an_inline_key() {
    let text = "\
# head

Types: deb deb-src
URIs: http://m.test/debian
Suites: bookworm
 bookworm-updates
Components: main
Check-Valid-Until: no
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.test/debian
Suites: bookworm

Types: deb-src
URIs: http://src.test/debian
Suites: bookworm

types: deb
uris: http://s.test/debian-security
suites: bookworm-security
signed-by: /k/a.asc, ABCDEF0123!
";
    let sources = parse_deb822(text, Path::new("x.sources")).unwrap();
    assert_eq!(sources.len(), 2);
    assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
    assert!(!sources[0].check_valid_until && sources[1].check_valid_until);
    let [KeyRef::Inline(key)] = sources[0].signed_by.as_slice() else {
        panic!("{:?}", sources[0].signed_by);
    };
    assert!(key.contains("BLOCK-----\n\nabc\n"), "{key}");
    assert_eq!(
        sources[1].signed_by,
        [
            KeyRef::File("/k/a.asc".into()),
            KeyRef::Fingerprint("ABCDEF0123".into())
        ]
    );
}

#[test]
fn a_whole_configuration_is_read_below_a_folder() {
    let root = tempfile::tempdir().unwrap();
    let apt = root.path().join("etc/apt");
    std::fs::create_dir_all(apt.join("sources.list.d")).unwrap();
    std::fs::create_dir_all(apt.join("apt.conf.d")).unwrap();
    std::fs::create_dir_all(apt.join("mirrors")).unwrap();
    std::fs::write(
        apt.join("sources.list"),
        "deb http://a.test/debian bookworm main\n",
    )
    .unwrap();
    std::fs::write(
        apt.join("sources.list.d/b.sources"),
        "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/l.list\nSuites: bookworm-security\nSigned-By: /k.gpg\n",
    )
    .unwrap();
    std::fs::write(apt.join("sources.list.d/c.list.save"), "garbage").unwrap();
    std::fs::write(
        apt.join("mirrors/l.list"),
        "# l\nhttp://b.test/debian-security priority:1\n",
    )
    .unwrap();
    std::fs::write(
        apt.join("apt.conf.d/99x"),
        "Acquire { Check-Valid-Until \"false\"; };",
    )
    .unwrap();
    let config = read(root.path()).unwrap();
    assert!(config.ignore_valid_until);
    let archives = archives(&config, "bookworm", "amd64").unwrap();
    assert_eq!(
        names(&archives),
        [
            "http://a.test/debian bookworm",
            "http://b.test/debian-security bookworm-security",
            "http://a.test/debian bookworm-updates?"
        ]
    );
    assert_eq!(
        archives[1].signed_by,
        [KeyRef::File(root.path().join("k.gpg"))]
    );
    assert!(!archives[0].check_valid_until);
    let empty = tempfile::tempdir().unwrap();
    assert!(read(empty.path()).unwrap().sources.is_empty());
}
