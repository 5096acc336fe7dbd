//! Archives that the cases describe, a member a line:
//!
//! ```text
//! dir d 0755 0:0
//! file d/a 0644 1:2 content with \n
//! link d/l -> a
//! hard d/h = d/a 0644 1:2
//! char d/null 0666 1:3
//! fifo d/p 0600
//! xattr user.name value        (of the member after it)
//! end                          (nothing but what follows: no end-of-archive blocks)
//! ```
//!
//! Names are written as they are, also those that no honest program would write.

use std::io::Write;
use std::process::{Command, Stdio};

use tar::{Builder, EntryType, Header};

use super::case::{Part, unescape};

/// The archive's bytes, compressed as the part says.
pub fn bytes(part: &Part) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    let mut extensions: Vec<(String, Vec<u8>)> = Vec::new();
    for line in &part.body {
        if let Some(pair) = line.strip_prefix("xattr ") {
            let (name, value) = pair.split_once(' ').unwrap();
            extensions.push((format!("SCHILY.xattr.{name}"), unescape(value)));
            continue;
        }
        let pairs = extensions
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_slice()))
            .collect::<Vec<_>>();
        if !pairs.is_empty() {
            builder.append_pax_extensions(pairs).unwrap();
        }
        extensions.clear();
        let (header, content) = member(line);
        builder.append(&header, content.as_slice()).unwrap();
    }
    compressed(builder.into_inner().unwrap(), part.path().1)
}

fn member(line: &str) -> (Header, Vec<u8>) {
    let (kind, rest) = line.split_once(' ').unwrap();
    let mut header = Header::new_gnu();
    header.set_mtime(1_000_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mode(0o644);
    let separator = match kind {
        "link" => " -> ",
        "hard" => " = ",
        _ => " ",
    };
    let (name, rest) = rest.split_once(separator).unwrap_or((rest, ""));
    field(&mut header.as_gnu_mut().unwrap().name, name);
    let mut words = rest.splitn(if separator == " " { 3 } else { 4 }, ' ');
    let mut word = || words.next().unwrap_or_default();
    if separator != " " {
        field(&mut header.as_gnu_mut().unwrap().linkname, word());
    }
    header.set_entry_type(match kind {
        "file" => EntryType::Regular,
        "dir" => EntryType::Directory,
        "link" => EntryType::Symlink,
        "hard" => EntryType::Link,
        "char" => EntryType::Char,
        "block" => EntryType::Block,
        "fifo" => EntryType::Fifo,
        other => panic!("no member `{other}`"),
    });
    let mode = Some(word()).filter(|m| !m.is_empty()).unwrap_or("0644");
    header.set_mode(u32::from_str_radix(mode, 8).unwrap());
    if let Some((first, second)) = word().split_once(':') {
        let (first, second) = (first.parse().unwrap(), second.parse().unwrap());
        match kind {
            "char" | "block" => {
                header.set_device_major(first).unwrap();
                header.set_device_minor(second).unwrap();
            }
            _ => {
                header.set_uid(u64::from(first));
                header.set_gid(u64::from(second));
            }
        }
    }
    let content = unescape(word());
    header.set_size(content.len() as u64);
    header.set_cksum();
    (header, content)
}

fn field(field: &mut [u8], text: &str) {
    let text = unescape(text);
    field[..text.len()].copy_from_slice(&text);
}

fn compressed(bytes: Vec<u8>, how: &str) -> Vec<u8> {
    match how {
        "" => bytes,
        "gzip" => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
        "xz" => {
            let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
        "zstd" => zstd::encode_all(bytes.as_slice(), 1).unwrap(),
        "bzip2" => bzip2(&bytes),
        other => panic!("no compression `{other}`"),
    }
}

/// By busybox: kiln itself only reads it.
fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let kept = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = kiln_testkit::busybox::busybox(kept).unwrap();
    let mut child = Command::new(program)
        .args(["bzip2", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Archives of the cases are smaller than a pipe holds.
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    output.stdout
}
