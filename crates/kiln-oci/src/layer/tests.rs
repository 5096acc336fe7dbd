#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};

use kiln_model::Digest;

use super::ustar::{BLOCK, Header};
use super::*;

fn entry(path: &str, kind: EntryKind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        xattrs: BTreeMap::new(),
    }
}

/// Entries with every special case of the format.
fn samples() -> Vec<(Entry, Vec<u8>)> {
    let file = |path: &str, content: &[u8]| {
        let size = content.len() as u64;
        (entry(path, EntryKind::File { size }), content.to_vec())
    };
    let other = |path: &str, kind| (entry(path, kind), Vec::new());
    let long = format!("dir/{}/{}", "a".repeat(200), "b".repeat(255));
    let mut special = file("dir/special", b"x");
    special.0.mode = 0o6755;
    (special.0.uid, special.0.gid) = (u32::MAX, 2_097_152);
    special.0.mtime = -7;
    special.0.xattrs = [
        (
            b"security.capability".to_vec(),
            vec![1, 0, 0, 2, 0, b'\n', b'='],
        ),
        (b"user.empty.not".to_vec(), vec![b'v'; 1000]),
    ]
    .into();
    let mut late = file("late", &[7; 1024]);
    late.0.mtime = 2_000_000_000;
    let mut odd = file("odd", b"not utf-8");
    odd.0.path = b"\xff\xfe name".to_vec();
    vec![
        other("", EntryKind::Dir),
        other("dir", EntryKind::Dir),
        file(
            "dir/big",
            &(0..300_000u32)
                .map(|i| (i.wrapping_mul(i) >> 7) as u8)
                .collect::<Vec<_>>(),
        ),
        file("dir/empty", b""),
        special,
        file(&long, b"long"),
        other(
            "link",
            EntryKind::Symlink {
                target: "../../../etc/passwd".into(),
            },
        ),
        other(
            "long-link",
            EntryKind::Symlink {
                target: vec![b't'; 4000],
            },
        ),
        other(
            "hard",
            EntryKind::Hardlink {
                target: long.clone().into(),
            },
        ),
        other("null", EntryKind::Char { major: 1, minor: 3 }),
        other(
            "disk",
            EntryKind::Block {
                major: 8,
                minor: 1_048_575,
            },
        ),
        other("pipe", EntryKind::Fifo),
        late,
        odd,
    ]
}

/// Gives at most `step` bytes at a time.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.1.min(buffer.len()).min(self.0.len());
        buffer[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

fn write_samples(step: usize) -> (WrittenLayer, Vec<u8>) {
    let mut writer = LayerWriter::new(Vec::new(), Some(1_700_000_000)).unwrap();
    for (entry, content) in samples() {
        writer.entry(&entry, &mut Slow(&content, step)).unwrap();
    }
    writer.whiteout(b"dir/gone").unwrap();
    writer.whiteout(&[b'x'; 250]).unwrap();
    writer.opaque(b"fresh").unwrap();
    writer.opaque(b"").unwrap();
    writer.finish().unwrap()
}

type ReadBack = Vec<(LayerItem, Vec<u8>)>;

fn read_all(bytes: &[u8], diff_id: Option<&Digest>) -> Result<ReadBack, LayerReadError> {
    let limits = Limits {
        entries: 1000,
        bytes: 10 << 20,
    };
    read_within(bytes, diff_id, limits, Whiteouts::Interpret)
}

fn read_within(
    bytes: &[u8],
    diff_id: Option<&Digest>,
    limits: Limits,
    whiteouts: Whiteouts,
) -> Result<ReadBack, LayerReadError> {
    let mut reader = LayerReader::new(bytes, limits, whiteouts)?;
    let mut items = Vec::new();
    while let Some(item) = reader.next_entry()? {
        let mut content = Vec::new();
        reader
            .read_to_end(&mut content)
            .map_err(|e| e.downcast::<LayerReadError>().unwrap())?;
        items.push((item, content));
    }
    reader.finish(diff_id)?;
    Ok(items)
}

/// The golden: if this changes, every image that kiln builds gets another digest.
/// That may only happen knowingly (a new zstd), and must be told to users.
#[test]
fn the_bytes_of_a_layer_are_pinned() {
    let (written, bytes) = write_samples(usize::MAX);
    assert_eq!(
        written.diff_id.to_string(),
        "sha256:28e81174a7ef98df1f0ec37466a99abdce5a4338d3a47d6ede1f62d009948261"
    );
    assert_eq!(
        written.digest.to_string(),
        "sha256:00f35749c04ec252e2a8b1727deefede5e62881d9c08084c19a2251c111fd994"
    );
    assert_eq!(
        (Digest::of(&bytes), bytes.len() as u64),
        (written.digest, written.size)
    );
    assert_eq!(
        written.descriptor().media_type,
        "application/vnd.oci.image.layer.v1.tar+zstd"
    );
}

#[test]
fn the_bytes_do_not_depend_on_how_content_arrives() {
    let (written, _) = write_samples(usize::MAX);
    for step in [1, 511, 4096, 100_003] {
        assert_eq!(write_samples(step).0, written, "{step} bytes at a time");
    }
}

#[test]
fn what_is_written_reads_back() {
    let (written, bytes) = write_samples(usize::MAX);
    let items = read_all(&bytes, Some(&written.diff_id)).unwrap();
    let mut expected: ReadBack = samples()
        .into_iter()
        .map(|(mut entry, content)| {
            entry.mtime = entry.mtime.min(1_700_000_000);
            (LayerItem::Entry(entry), content)
        })
        .collect();
    for item in [
        LayerItem::Whiteout {
            path: b"dir/gone".to_vec(),
        },
        LayerItem::Whiteout {
            path: vec![b'x'; 250],
        },
        LayerItem::OpaqueDir {
            path: b"fresh".to_vec(),
        },
        LayerItem::OpaqueDir { path: b"".to_vec() },
    ] {
        expected.push((item, Vec::new()));
    }
    for (found, expected) in items.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(items.len(), expected.len());
}

#[test]
fn content_is_skipped_when_it_is_not_read() {
    let (written, bytes) = write_samples(usize::MAX);
    let mut reader = LayerReader::new(&bytes[..], Limits::IMAGE, Whiteouts::Interpret).unwrap();
    let mut count = 0;
    while let Some(_item) = reader.next_entry().unwrap() {
        let mut some = [0; 10];
        let _ = reader.read(&mut some).unwrap();
        count += 1;
    }
    assert_eq!(count, samples().len() + 4);
    assert_eq!(reader.offset(), written.tar_size);
    assert_eq!(reader.finish(None).unwrap(), written.diff_id);
}

#[test]
fn every_compression_is_recognised() {
    let tar = archive(&[(file_header("a", 1), b"x")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar[..700]).unwrap();
    let mut gzip = gzip.finish().unwrap();
    let mut second = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    second.write_all(&tar[700..]).unwrap();
    gzip.extend(second.finish().unwrap());
    let mut zstd = vec![0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    zstd.extend(zstd::encode_all(&tar[..700], 1).unwrap());
    zstd.extend(zstd::encode_all(&tar[700..], 1).unwrap());
    let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&tar).unwrap();
    let xz = xz.finish().unwrap();
    let diff_id = Digest::of(&tar);
    for (name, bytes) in [
        ("none", &tar),
        ("gzip", &gzip),
        ("zstd", &zstd),
        ("xz", &xz),
    ] {
        let items = read_all(bytes, Some(&diff_id)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(items[0].1, b"x", "{name}");
        for cut in (13..bytes.len() - 1).step_by(7).filter(|_| name != "none") {
            assert!(
                read_all(&bytes[..cut], Some(&diff_id)).is_err(),
                "{name} cut at {cut}"
            );
        }
        let wrong = read_all(bytes, Some(&Digest::of("other")));
        assert!(
            matches!(wrong, Err(LayerReadError::WrongDiffId { .. })),
            "{name}"
        );
    }
    for bytes in [&gzip, &zstd, &xz] {
        let mut damaged = bytes.clone();
        let middle = damaged.len() - 20;
        damaged[middle] ^= 0x55;
        assert!(read_all(&damaged, Some(&diff_id)).is_err());
    }
}

#[test]
fn an_empty_layer_is_a_layer() {
    assert_eq!(read_all(b"", None).unwrap(), []);
    assert_eq!(read_all(&[0; 1024], None).unwrap(), []);
    assert_eq!(read_all(&[0; 512], None).unwrap(), []);
    assert_eq!(read_all(&[0; 10240], None).unwrap(), []);
}

fn file_header(name: &str, size: usize) -> Header {
    Header {
        name: name.into(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: size as i64,
        mtime: 0,
        kind: b'0',
        link: Vec::new(),
        major: 0,
        minor: 0,
    }
}

/// A tar of headers and contents as they are, sizes not checked.
fn archive(members: &[(Header, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (header, content) in members {
        bytes.extend(ustar::encode(header));
        bytes.extend(*content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.extend([0; 2 * BLOCK]);
    bytes
}

/// A file named `f`, after a PAX header with `records`.
fn pax_file(records: &[(&str, &str)]) -> Vec<(Header, &'static [u8])> {
    let records = records
        .iter()
        .map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()));
    let content = pax::encode(&records.collect()).leak();
    let header = Header {
        kind: b'x',
        ..file_header("pax", content.len())
    };
    vec![(header, content), (file_header("f", 0), b"")]
}

/// The block with its checksum made right.
fn with_sum(mut block: [u8; BLOCK]) -> Vec<u8> {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

mod hostile;
