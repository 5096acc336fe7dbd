//! Reads `.deb` files (deb(5)): an ar archive with a control and a data tar. Every
//! part is bounded; nothing is written here.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};

use super::{deb822, index};

/// Control files are scripts and lists; the largest seen have 5 MB.
const MAX_CONTROL_BYTES: u64 = 64 << 20;
/// A package's content, decompressed.
const MAX_DATA_BYTES: u64 = 32 << 30;
/// What an xz stream may ask for; Debian builds with at most 64 MiB dictionaries.
const MAX_XZ_MEMORY: u64 = 512 << 20;
/// log2 of the window a zstd stream may ask for.
const MAX_ZSTD_WINDOW: u32 = 27;
/// A `.deb` has three members and perhaps a signature.
const MAX_MEMBERS: usize = 16;

/// Why a package file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    #[error("cannot read the package file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not a Debian package: {problem}")]
    Malformed { path: PathBuf, problem: String },
    #[error(
        "{path} has gone bad on disk: expected {expected}, found {found}; it was removed and is fetched again by the next run"
    )]
    Corrupt {
        path: PathBuf,
        expected: Digest,
        found: Digest,
    },
}

/// One opened package: where its parts are, and its control files.
#[derive(Debug)]
pub struct Deb {
    path: PathBuf,
    data: Member,
    /// The `control` file's text.
    pub control: String,
    /// The other control files, in archive order: name, content.
    pub info: Vec<(String, Vec<u8>)>,
}

#[derive(Clone, Debug)]
struct Member {
    name: String,
    start: u64,
    size: u64,
}

impl Deb {
    /// Opens the file at `path`, whose content must be `expected`. A file with other
    /// content is removed: it came from the cache, which refills itself.
    pub fn open(path: &Path, expected: &Digest) -> Result<Self, DebError> {
        let read = |source| DebError::Read {
            path: path.into(),
            source,
        };
        let mut file = File::open(path).map_err(read)?;
        let found = hash(&mut file).map_err(read)?;
        if found != *expected {
            std::fs::remove_file(path).map_err(read)?;
            return Err(DebError::Corrupt {
                path: path.into(),
                expected: *expected,
                found,
            });
        }
        Self::read(path, &mut file).map_err(|error| DebError::Malformed {
            path: path.into(),
            problem: error.to_string(),
        })
    }

    fn read(path: &Path, file: &mut File) -> io::Result<Self> {
        let members = members(file)?;
        let find = |prefix: &str| {
            let found = members.iter().find(|m| m.name.starts_with(prefix));
            found
                .cloned()
                .ok_or_else(|| io::Error::other(format!("it has no {prefix}*")))
        };
        if members.first().is_none_or(|m| m.name != "debian-binary") {
            return Err(io::Error::other("it does not start with debian-binary"));
        }
        let control_member = find("control.tar")?;
        let (control, info) = read_control(decompress(file, &control_member, MAX_CONTROL_BYTES)?)?;
        Ok(Self {
            path: path.into(),
            data: find("data.tar")?,
            control,
            info,
        })
    }

    /// A field of the control file; empty if it has none.
    pub fn field(&self, name: &str) -> &str {
        let stanza = deb822::stanzas(&self.control).next();
        stanza.and_then(|s| s.get(name)).unwrap_or_default()
    }

    /// A control file other than `control`.
    pub fn info(&self, name: &str) -> Option<&[u8]> {
        let found = self.info.iter().find(|(found, _)| found == name);
        found.map(|(_, content)| content.as_slice())
    }

    /// The absolute paths in `conffiles`; those marked `remove-on-upgrade` are no files
    /// of the package.
    pub fn conffiles(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(self.info("conffiles").unwrap_or_default()).into_owned();
        let lines = text.lines().map(str::trim);
        lines
            .filter(|line| line.starts_with('/'))
            .map(Into::into)
            .collect()
    }

    /// The data tar, decompressed.
    pub fn data(&self) -> Result<tar::Archive<Box<dyn Read>>, DebError> {
        let opened =
            File::open(&self.path).and_then(|mut f| decompress(&mut f, &self.data, MAX_DATA_BYTES));
        let reader = opened.map_err(|source| DebError::Read {
            path: self.path.clone(),
            source,
        })?;
        Ok(tar::Archive::new(reader))
    }

    /// Bytes of the data tar as it is in the file.
    pub fn data_size(&self) -> u64 {
        self.data.size
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn hash(file: &mut File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..count]);
    }
}

/// The members of an ar archive (System V form, short names).
fn members(file: &mut File) -> io::Result<Vec<Member>> {
    let mut magic = [0; 8];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut magic)?;
    if &magic != b"!<arch>\n" {
        return Err(io::Error::other("it is no ar archive"));
    }
    let length = file.metadata()?.len();
    let mut members = Vec::new();
    let mut at = 8;
    while at + 60 <= length && members.len() < MAX_MEMBERS {
        let mut header = [0; 60];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut header)?;
        let text = |range: std::ops::Range<usize>| {
            String::from_utf8_lossy(&header[range]).trim().to_string()
        };
        let bad = || io::Error::other("an ar header is malformed");
        if &header[58..] != b"`\n" {
            return Err(bad());
        }
        let size: u64 = text(48..58).parse().map_err(|_| bad())?;
        let start = at + 60;
        if size > length - start {
            return Err(io::Error::other("it is cut off"));
        }
        members.push(Member {
            name: text(0..16).trim_end_matches('/').into(),
            start,
            size,
        });
        at = start + size + size % 2;
    }
    Ok(members)
}

fn decompress(file: &mut File, member: &Member, limit: u64) -> io::Result<Box<dyn Read>> {
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(member.start))?;
    let raw = BufReader::with_capacity(1 << 17, file.take(member.size));
    let suffix = member
        .name
        .split_once(".tar")
        .map_or("", |(_, suffix)| suffix);
    let plain: Box<dyn Read> = match suffix {
        "" => Box::new(raw),
        ".gz" => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
        ".xz" => {
            let stream =
                xz2::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY, xz2::stream::CONCATENATED)?;
            Box::new(xz2::bufread::XzDecoder::new_stream(raw, stream))
        }
        ".zst" => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW)?;
            Box::new(decoder)
        }
        other => {
            return Err(io::Error::other(format!(
                "kiln does not know the compression `{other}`"
            )));
        }
    };
    Ok(Box::new(Bounded {
        inner: plain,
        left: limit,
    }))
}

/// Fails, where [`Read::take`] would end quietly.
struct Bounded {
    inner: Box<dyn Read>,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("it unpacks to more than a package may have"))?;
        Ok(count)
    }
}

/// The text of `control`, and the other control files.
type Control = (String, Vec<(String, Vec<u8>)>);

fn read_control(reader: Box<dyn Read>) -> io::Result<Control> {
    let mut control = None;
    let mut info = Vec::new();
    for entry in tar::Archive::new(reader).entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = path.trim_start_matches("./").to_string();
        if !index::plain_name(&name) {
            return Err(io::Error::other(format!(
                "its control file `{name}` has an unsafe name"
            )));
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        match name.as_str() {
            "control" => {
                control = Some(String::from_utf8_lossy(&content).trim().to_string() + "\n")
            }
            _ => info.push((name, content)),
        }
    }
    let control = control.ok_or_else(|| io::Error::other("it has no control file"))?;
    Ok((control, info))
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    /// A tar entry for a test's package.
    pub enum Item<'a> {
        Dir(&'a str, u32),
        File(&'a str, &'a str, u32),
        Link(&'a str, &'a str),
        Hard(&'a str, &'a str),
    }

    fn tar_of(items: &[Item]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for item in items {
            let mut header = tar::Header::new_gnu();
            let (kind, path, mode, content, target) = match item {
                Item::Dir(path, mode) => (tar::EntryType::Directory, path, *mode, "", None),
                Item::File(path, content, mode) => {
                    (tar::EntryType::Regular, path, *mode, *content, None)
                }
                Item::Link(path, target) => {
                    (tar::EntryType::Symlink, path, 0o777, "", Some(target))
                }
                Item::Hard(path, target) => (tar::EntryType::Link, path, 0o644, "", Some(target)),
            };
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1_000_000_000);
            header.set_size(content.len() as u64);
            // Set by hand: the crate itself refuses the unsafe names tests need.
            let name = &mut header.as_old_mut().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            if let Some(target) = target {
                let link = &mut header.as_old_mut().linkname;
                link[..target.len()].copy_from_slice(target.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn ar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = b"!<arch>\n".to_vec();
        for (name, content) in members {
            bytes.extend(
                format!(
                    "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
                    0,
                    0,
                    0,
                    "100644",
                    content.len()
                )
                .bytes(),
            );
            bytes.extend(content);
            bytes.extend(vec![b'\n'; content.len() % 2]);
        }
        bytes
    }

    /// A package file's bytes.
    pub fn deb(control: &str, info: &[(&str, &str)], data: &[Item]) -> Vec<u8> {
        let mut items = vec![Item::File("./control", control, 0o644)];
        items.extend(
            info.iter()
                .map(|(name, content)| Item::File(name, content, 0o755)),
        );
        let zst = zstd::encode_all(tar_of(data).as_slice(), 3).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gz, &tar_of(&items)).unwrap();
        ar(&[
            ("debian-binary", b"2.0\n".to_vec()),
            ("control.tar.gz", gz.finish().unwrap()),
            ("data.tar.zst", zst),
        ])
    }

    pub fn opened(folder: &Path, bytes: &[u8]) -> Result<Deb, DebError> {
        let digest = Digest::of(bytes);
        let path = folder.join(digest.hex());
        std::fs::write(&path, bytes).unwrap();
        Deb::open(&path, &digest)
    }

    #[test]
    fn control_and_data_are_found_in_any_compression() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = deb(
            "Package: a\nVersion: 1\n",
            &[
                ("./postinst", "#!/bin/sh\n"),
                ("./conffiles", "/etc/a\nremove-on-upgrade /etc/b\n"),
            ],
            &[Item::Dir("./", 0o755), Item::File("./x", "hello", 0o644)],
        );
        let deb = opened(folder.path(), &bytes).unwrap();
        assert_eq!(deb.field("Version"), "1");
        assert_eq!(deb.conffiles(), ["/etc/a"]);
        assert!(deb.info("postinst").is_some() && deb.info("prerm").is_none());
        let mut data = deb.data().unwrap();
        let mut text = String::new();
        data.entries()
            .unwrap()
            .nth(1)
            .unwrap()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn what_is_no_package_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let good = deb("Package: a\n", &[], &[]);
        let unsafe_name = deb("Package: a\n", &[("./a/b", "x")], &[]);
        let no_data = ar(&[
            ("debian-binary", vec![]),
            (
                "control.tar",
                tar_of(&[Item::File("./control", "P: a\n", 0)]),
            ),
        ]);
        let odd = ar(&[("debian-binary", vec![]), ("control.tar.lz4", vec![1, 2])]);
        for bad in [
            b"".to_vec(),
            b"!<arch>\n".to_vec(),
            good[..good.len() - 20].to_vec(),
            unsafe_name,
            no_data,
            odd,
        ] {
            assert!(matches!(
                opened(folder.path(), &bad),
                Err(DebError::Malformed { .. } | DebError::Read { .. })
            ));
        }
    }

    #[test]
    fn a_file_that_went_bad_is_removed_and_named_with_both_hashes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "bad").unwrap();
        let error = Deb::open(&path, &Digest::of("good"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&Digest::of("good").hex()) && error.contains(&Digest::of("bad").hex()),
            "{error}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn a_bomb_is_stopped() {
        let mut bounded = Bounded {
            inner: Box::new(io::repeat(0)),
            left: 1000,
        };
        assert!(bounded.read_to_end(&mut Vec::new()).is_err());
    }
}
