//! Archives that someone made to do harm, or that a disk or network broke.

use super::*;

fn expect_error(name: &str, bytes: &[u8], cause: &str) {
    match read_all(bytes, None) {
        Ok(items) => panic!("{name} was taken: {items:?}"),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.contains(cause),
                "{name}: `{text}` does not say `{cause}`"
            );
        }
    }
}

fn only_path(bytes: &[u8]) -> Vec<u8> {
    match read_all(bytes, None).unwrap().remove(0).0 {
        LayerItem::Entry(entry) => entry.path,
        other => panic!("{other:?}"),
    }
}

fn link_header(kind: u8, name: &str, link: &str) -> Header {
    Header {
        kind,
        link: link.into(),
        ..file_header(name, 0)
    }
}

#[test]
fn paths_stay_inside() {
    for (name, normal) in [
        ("/etc/passwd", "etc/passwd"),
        ("///a//./b", "a/b"),
        ("./a", "a"),
        ("...", "..."),
        ("..a", "..a"),
    ] {
        let bytes = archive(&[(file_header(name, 0), b"")]);
        assert_eq!(only_path(&bytes), normal.as_bytes(), "{name}");
    }
    for name in ["..", "../a", "a/..", "a/../b", "/../a", "./.."] {
        expect_error(name, &archive(&[(file_header(name, 0), b"")]), "`..`");
    }
    for name in ["", ".", "/", "./"] {
        expect_error(name, &archive(&[(file_header(name, 0), b"")]), "empty");
    }
    let name = "n".repeat(256);
    expect_error(
        "name",
        &archive(&pax_file(&[("path", &name)])),
        "longer than 255",
    );
    let name = "n/".repeat(2100);
    expect_error(
        "path",
        &archive(&pax_file(&[("path", &name)])),
        "longer than 4095",
    );
    expect_error("nul", &archive(&pax_file(&[("path", "a\0b")])), "NUL");
}

#[test]
fn links_stay_inside_or_are_kept_as_text() {
    let link = |kind, target| archive(&[(link_header(kind, "l", target), b"")]);
    for target in ["/abs", "../../up", "a//b"] {
        let item = read_all(&link(b'2', target), None).unwrap().remove(0).0;
        let LayerItem::Entry(entry) = item else {
            panic!()
        };
        assert_eq!(
            entry.kind,
            EntryKind::Symlink {
                target: target.into()
            }
        );
    }
    expect_error("empty symlink", &link(b'2', ""), "empty");
    let item = read_all(&link(b'1', "/a/./b"), None).unwrap().remove(0).0;
    let LayerItem::Entry(entry) = item else {
        panic!()
    };
    assert_eq!(
        entry.kind,
        EntryKind::Hardlink {
            target: b"a/b".to_vec()
        }
    );
    expect_error("hard link out", &link(b'1', "../x"), "leads out");
    expect_error("hard link to root", &link(b'1', "/"), "nothing");
}

#[test]
fn long_names_in_all_forms() {
    let long = "d/".repeat(120) + "end";
    let gnu = |kind, text: &str| {
        let content = format!("{text}\0").into_bytes();
        (
            Header {
                kind,
                ..file_header("././@LongLink", content.len())
            },
            content,
        )
    };
    let (l, name) = gnu(b'L', &long);
    let (k, target) = gnu(b'K', &long);
    let bytes = archive(&[
        (l, &name),
        (k, &target),
        (link_header(b'2', "cut", "cut"), b""),
    ]);
    let LayerItem::Entry(entry) = read_all(&bytes, None).unwrap().remove(0).0 else {
        panic!()
    };
    assert_eq!(entry.path, long.as_bytes());
    assert_eq!(
        entry.kind,
        EntryKind::Symlink {
            target: long.clone().into()
        }
    );

    assert_eq!(
        only_path(&archive(&pax_file(&[("path", &long)]))),
        long.as_bytes()
    );

    // ustar's own way: a prefix.
    let mut block = ustar::encode(&file_header("end", 0));
    block[345..348].copy_from_slice(b"d/e");
    assert_eq!(only_path(&with_sum(block)), b"d/e/end");

    // Names don't leak to the next entry.
    let mut members = pax_file(&[("path", "first")]);
    members.push((file_header("second", 0), b""));
    let items = read_all(&archive(&members), None).unwrap();
    let LayerItem::Entry(second) = &items[1].0 else {
        panic!()
    };
    assert_eq!(second.path, b"second");
}

#[test]
fn extension_headers_are_bounded() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let header = Header {
            kind,
            size: (1 << 20) + 1,
            ..file_header("x", 0)
        };
        expect_error(
            "huge extension",
            &ustar::encode(&header),
            "larger than 1 MiB",
        );
        let header = Header {
            kind,
            size: -1,
            ..file_header("x", 0)
        };
        let mut block = ustar::encode(&header);
        block[124..136].copy_from_slice(&[0xff; 12]);
        expect_error("negative extension", &with_sum(block), "larger than 1 MiB");
    }
    // A chain of extension headers is bounded by the number of entries.
    let members: Vec<(Header, &[u8])> = vec![
        (
            Header {
                kind: b'L',
                ..file_header("x", 2)
            },
            b"a\0"
        );
        2000
    ];
    expect_error("chain", &archive(&members), "1000 entries");
    let alone = archive(&[(
        Header {
            kind: b'L',
            ..file_header("x", 2)
        },
        b"a\0",
    )]);
    expect_error("extension of nothing", &alone, "ends after an extension");
}

#[test]
fn numbers_are_checked() {
    for (key, value, cause) in [
        ("size", "-1", "size is invalid"),
        ("size", "99999999999999999999", "size is invalid"),
        ("uid", "4294967296", "owner"),
        ("gid", "x", "group"),
        ("mtime", "yesterday", "time"),
    ] {
        expect_error(key, &archive(&pax_file(&[(key, value)])), cause);
    }
    let mut negative = ustar::encode(&file_header("n", 0));
    negative[124..136].copy_from_slice(&[0xff; 12]);
    expect_error("negative size", &with_sum(negative), "size is invalid");
    let mut garbled = ustar::encode(&file_header("n", 0));
    garbled[124..136].copy_from_slice(b"zzzzzzzzzzz\0");
    expect_error("garbled size", &with_sum(garbled), "size is no number");
}

#[test]
fn a_size_larger_than_the_archive_is_a_truncation() {
    let mut bytes = ustar::encode(&file_header("f", 0o7777777777)).to_vec();
    bytes.extend([0; 5000]);
    expect_error("short", &bytes, "cut short");
    let huge = archive(&pax_file(&[("size", "9223372036854775807")]));
    expect_error("huge", &huge, "cut short");
    let beyond = archive(&pax_file(&[("size", "18446744073709551615")]));
    expect_error("beyond", &beyond, "cut short");

    let whole = archive(&[(file_header("f", 700), &[1; 700])]);
    for cut in [1, 511, 513, 700, 1211, 1300, 1535] {
        expect_error("cut", &whole[..cut], "cut short");
    }
}

#[test]
fn nothing_may_hide_after_the_end() {
    let mut bytes = archive(&[(file_header("f", 0), b"")]);
    bytes.extend([0; 9000]);
    assert!(read_all(&bytes, None).is_ok(), "zero padding is common");
    bytes.extend(ustar::encode(&file_header("hidden", 0)));
    expect_error("second archive", &bytes, "after the archive's end");

    let mut single = ustar::encode(&file_header("f", 0)).to_vec();
    single.extend([0; BLOCK]);
    single.extend(ustar::encode(&file_header("hidden", 0)));
    expect_error("single zero block", &single, "single zero block");
    expect_error("no tar", &[b'x'; 2048], "checksum");
}

#[test]
fn what_is_unsupported_is_named() {
    for (kind, cause) in [
        (b'S', "sparse"),
        (b'M', "multi-volume"),
        (b'V', "volume label"),
        (b'D', "incremental"),
        (b'Z', "tar type `Z`"),
        (0xff, r"tar type `\xff`"),
    ] {
        let header = Header {
            kind,
            ..file_header("strange", 0)
        };
        expect_error("type", &archive(&[(header, b"")]), cause);
    }
    let sparse = archive(&pax_file(&[
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.name", "hole"),
    ]));
    expect_error("pax sparse", &sparse, "`hole` is a sparse file");
}

#[test]
fn bombs_are_stopped_by_the_callers_bounds() {
    let zeros = vec![0; 20 << 20];
    let bomb = zstd::encode_all(&zeros[..], 19).unwrap();
    assert!(bomb.len() < 4000);
    expect_error(
        "bomb of zeros",
        &bomb,
        "larger uncompressed than the 10485760 bytes",
    );

    let member = archive(&[(file_header("zeros", zeros.len()), &zeros)]);
    let bomb = zstd::encode_all(&member[..], 19).unwrap();
    expect_error("bomb of a file", &bomb, "larger uncompressed");

    let many: Vec<(Header, &[u8])> = vec![(file_header("f", 0), b""); 1001];
    expect_error("many", &archive(&many), "1000 entries");
    assert_eq!(read_all(&archive(&many[..1000]), None).unwrap().len(), 1000);

    // A window beyond 128 MiB would need that much memory.
    let mut wide = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    wide.window_log(28).unwrap();
    wide.write_all(&zeros).unwrap();
    expect_error(
        "wide window",
        &wide.finish().unwrap(),
        "can't be decompressed",
    );
}

#[test]
fn repeated_names_are_passed_on_in_order() {
    let bytes = archive(&[(file_header("f", 1), b"1"), (file_header("f", 1), b"2")]);
    let contents: Vec<_> = read_all(&bytes, None)
        .unwrap()
        .into_iter()
        .map(|i| i.1)
        .collect();
    assert_eq!(contents, [b"1", b"2"]);
}

#[test]
fn deletion_marks() {
    let read = |name: &str, whiteouts| {
        let limits = Limits {
            entries: 10,
            bytes: 1 << 20,
        };
        let bytes = archive(&[(file_header(name, 3), b"abc")]);
        read_within(&bytes, None, limits, whiteouts)
            .map(|items| items.into_iter().next().map(|(item, _)| item))
    };
    let marked = |name: &str| read(name, Whiteouts::Interpret);
    let gone = |path: &str| Some(LayerItem::Whiteout { path: path.into() });
    assert_eq!(marked(".wh.a").unwrap(), gone("a"));
    assert_eq!(marked("./d/.wh.a").unwrap(), gone("d/a"));
    assert_eq!(marked("d/.wh..a").unwrap(), gone("d/.a"));
    assert_eq!(
        marked("d/.wh..wh..opq").unwrap(),
        Some(LayerItem::OpaqueDir {
            path: b"d".to_vec()
        })
    );
    for aufs in [".wh..wh.plnk", ".wh..wh.aufs", ".wh..wh.plnk/1.2"] {
        assert_eq!(marked(aufs).unwrap(), None, "{aufs}");
    }
    // The longest name that a file can have can be deleted too.
    let longest = "n".repeat(255);
    let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
    writer.whiteout(longest.as_bytes()).unwrap();
    let items = read_all(&writer.finish().unwrap().1, None).unwrap();
    assert_eq!(Some(items[0].0.clone()), gone(&longest));
    let marked_file = archive(&pax_file(&[("path", &format!(".wh.{longest}"))]));
    let plain = read_within(&marked_file, None, Limits::IMAGE, Whiteouts::Plain);
    assert!(matches!(plain, Err(LayerReadError::Path { .. })));
    for bad in [".wh.", "d/.wh..", ".wh...", ".wh.a/b"] {
        assert!(marked(bad).is_err(), "{bad}");
    }
    let Some(LayerItem::Entry(plain)) = read("d/.wh.a", Whiteouts::Plain).unwrap() else {
        panic!()
    };
    assert_eq!(plain.path, b"d/.wh.a");
}

#[test]
fn extended_attributes_from_pax() {
    let bytes = archive(&pax_file(&[
        ("SCHILY.xattr.user.a", "1"),
        ("SCHILY.xattr.user.b", "x=\n"),
    ]));
    let LayerItem::Entry(entry) = read_all(&bytes, None).unwrap().remove(0).0 else {
        panic!()
    };
    assert_eq!(
        entry.xattrs,
        [
            (b"user.a".to_vec(), b"1".to_vec()),
            (b"user.b".to_vec(), b"x=\n".to_vec())
        ]
        .into()
    );
    let large = "v".repeat(MAX_XATTR_BYTES + 1);
    expect_error(
        "large",
        &archive(&pax_file(&[("SCHILY.xattr.a", &large)])),
        "64 KiB",
    );
    expect_error(
        "nameless",
        &archive(&pax_file(&[("SCHILY.xattr.", "v")])),
        "extended attribute",
    );
}

#[test]
fn writers_refuse_what_readers_would_misread() {
    let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
    let mut refuse = |entry: Entry, content: &[u8], cause: &str| {
        let mut content = content;
        let text = writer.entry(&entry, &mut content).unwrap_err().to_string();
        assert!(text.contains(cause), "`{text}` does not say `{cause}`");
    };
    let file = |path: &str| entry(path, EntryKind::File { size: 0 });
    refuse(file("../up"), b"", "`..`");
    refuse(file("/abs"), b"", "normal form");
    refuse(file("a//b"), b"", "normal form");
    refuse(file("a/"), b"", "normal form");
    refuse(file("a/.wh.b"), b"", ".wh.");
    refuse(file(""), b"", "root");
    refuse(
        entry("l", EntryKind::Symlink { target: vec![] }),
        b"",
        "link target",
    );
    refuse(
        entry(
            "l",
            EntryKind::Hardlink {
                target: b"../x".to_vec(),
            },
        ),
        b"",
        "`..`",
    );
    refuse(
        entry(
            "d",
            EntryKind::Char {
                major: 1 << 21,
                minor: 0,
            },
        ),
        b"",
        "device",
    );
    refuse(
        Entry {
            mode: 0o10000,
            ..file("m")
        },
        b"",
        "mode",
    );
    let xattrs = [(b"a=b".to_vec(), vec![])].into();
    refuse(
        Entry {
            xattrs,
            ..file("x")
        },
        b"",
        "extended attribute",
    );
    refuse(
        entry("s", EntryKind::File { size: 2 }),
        b"1",
        "1 bytes where 2",
    );
    refuse(
        entry("s", EntryKind::File { size: 2 }),
        b"123",
        "3 bytes where 2",
    );
    assert!(writer.whiteout(b"").is_err());
    assert!(writer.whiteout(b"a/../b").is_err());
}

/// Any change of any byte gives entries or an error, and with the diff id known,
/// always an error; never a panic or endless work.
#[test]
fn damaged_archives_never_panic() {
    let tar = {
        let (_, bytes) = write_samples(usize::MAX);
        zstd::decode_all(&bytes[..]).unwrap()
    };
    let diff_id = Digest::of(&tar);
    let headers = 1024;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let tail = tar.len() - 24_000;
    for _ in 0..3000 {
        let mut damaged = tar[tail..].to_vec();
        damaged.splice(0..0, tar[..headers].iter().copied());
        for _ in 0..=random(4) {
            let at = random(damaged.len());
            damaged[at] = match random(3) {
                0 => random(256) as u8,
                1 => 0xff,
                _ => b'7',
            };
        }
        // Half of them with sums made right again, so that damage gets past the check.
        if random(2) == 0 {
            for block in damaged.chunks_exact_mut(BLOCK) {
                if &block[257..262] == b"ustar" {
                    let fixed = with_sum(block.try_into().unwrap());
                    block.copy_from_slice(&fixed[..BLOCK]);
                }
            }
        }
        assert!(read_all(&damaged, Some(&diff_id)).is_err());
    }
}
