//! A folder, or a tar file, as named members.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ArchiveError, MAX_ARCHIVE_BYTES, MAX_MEMBERS};
use crate::layer::{
    Compression, EntryKind, LayerItem, LayerReadError, LayerReader, Limits, Whiteouts, decompress,
};

/// Most links followed from one member to another.
const MAX_LINKS: usize = 10;

pub(super) enum Source {
    Folder(PathBuf),
    Tar {
        path: PathBuf,
        file: Arc<File>,
        members: BTreeMap<String, Member>,
    },
}

pub(super) enum Member {
    /// Where its content lies in the uncompressed file, in bytes.
    File { start: u64, size: u64 },
    /// Another member's name: very old archives say repeated layers so.
    Link(String),
}

type Content = (Box<dyn Read + Send>, u64);

impl Source {
    pub fn open(path: &Path, scratch: &Path) -> Result<Self, ArchiveError> {
        let open_error = |source| ArchiveError::Open {
            path: path.into(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(open_error)?;
        if metadata.is_dir() {
            return Ok(Self::Folder(path.into()));
        }
        if !metadata.is_file() {
            let problem = "it is neither a file nor a folder";
            return Err(open_error(io::Error::new(
                io::ErrorKind::InvalidInput,
                problem,
            )));
        }
        let file = uncompressed(path, scratch)?;
        let members = index(&file).map_err(|source| ArchiveError::Tar {
            path: path.into(),
            source,
        })?;
        Ok(Self::Tar {
            path: path.into(),
            file: Arc::new(file),
            members,
        })
    }

    pub fn has(&self, member: &str) -> Result<bool, ArchiveError> {
        Ok(self.member(member)?.is_some())
    }

    /// A member's content and size in bytes; `None`: there is none of that name.
    pub fn member(&self, member: &str) -> Result<Option<Content>, ArchiveError> {
        match self {
            Self::Folder(folder) if leads_out(member) => Err(ArchiveError::Unusable {
                path: folder.clone(),
                member: member.into(),
                problem: "it leads out of the folder".into(),
            }),
            Self::Folder(folder) => {
                open_file(&folder.join(member)).map_err(|source| ArchiveError::Member {
                    path: folder.clone(),
                    member: member.into(),
                    source,
                })
            }
            Self::Tar {
                path,
                file,
                members,
            } => match find(members, member) {
                Ok(None) => Ok(None),
                Ok(Some((start, size))) => {
                    let section = Section {
                        file: Arc::clone(file),
                        at: start,
                        left: size,
                    };
                    Ok(Some((Box::new(section), size)))
                }
                Err(problem) => Err(ArchiveError::Unusable {
                    path: path.clone(),
                    member: member.into(),
                    problem: problem.into(),
                }),
            },
        }
    }
}

fn leads_out(member: &str) -> bool {
    member.starts_with('/') || member.split('/').any(|part| part == "..")
}

fn open_file(path: &Path) -> io::Result<Option<Content>> {
    // Asked before opening: opening a named pipe would wait for a writer.
    let metadata = match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    Ok(Some((Box::new(file), size)))
}

/// Follows links between members, as far as [`MAX_LINKS`].
fn find(
    members: &BTreeMap<String, Member>,
    name: &str,
) -> Result<Option<(u64, u64)>, &'static str> {
    let mut name = name;
    for _ in 0..=MAX_LINKS {
        match members.get(name) {
            None => return Ok(None),
            Some(Member::File { start, size }) => return Ok(Some((*start, *size))),
            Some(Member::Link(target)) => name = target,
        }
    }
    Err("it is a link that leads in a circle")
}

/// The file itself if it is uncompressed, else its content in a nameless file.
fn uncompressed(path: &Path, scratch: &Path) -> Result<File, ArchiveError> {
    let open_error = |source| ArchiveError::Open {
        path: path.into(),
        source,
    };
    let mut file = File::open(path).map_err(open_error)?;
    let (compression, content) = decompress(&file).map_err(open_error)?;
    if compression == Compression::None {
        drop(content);
        file.seek(SeekFrom::Start(0)).map_err(open_error)?;
        return Ok(file);
    }
    let scratch_error = |source| ArchiveError::Scratch {
        path: path.into(),
        scratch: scratch.into(),
        source,
    };
    let mut unpacked = tempfile::tempfile_in(scratch).map_err(scratch_error)?;
    let mut bounded = content.take(MAX_ARCHIVE_BYTES + 1);
    let size = io::copy(&mut bounded, &mut unpacked).map_err(scratch_error)?;
    if size > MAX_ARCHIVE_BYTES {
        return Err(ArchiveError::Tar {
            path: path.into(),
            source: LayerReadError::TooLarge {
                limit: MAX_ARCHIVE_BYTES,
            },
        });
    }
    unpacked.seek(SeekFrom::Start(0)).map_err(scratch_error)?;
    Ok(unpacked)
}

/// Where each member of an uncompressed tar lies; of equal names the last counts.
fn index(file: &File) -> Result<BTreeMap<String, Member>, LayerReadError> {
    let limits = Limits {
        entries: MAX_MEMBERS,
        bytes: MAX_ARCHIVE_BYTES,
    };
    let mut members = BTreeMap::new();
    let mut reader = LayerReader::new(file, limits, Whiteouts::Plain)?;
    while let Some(item) = reader.next_entry()? {
        let LayerItem::Entry(entry) = item else {
            continue;
        };
        // Names that no image has are not looked for either.
        let Ok(name) = String::from_utf8(entry.path) else {
            continue;
        };
        let member = match entry.kind {
            EntryKind::File { size } => Member::File {
                start: reader.offset(),
                size,
            },
            EntryKind::Symlink { target } => match resolve(&name, &target) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            EntryKind::Hardlink { target } => match String::from_utf8(target) {
                Ok(target) => Member::Link(target),
                Err(_) => continue,
            },
            _ => continue,
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// The member that a symbolic link names; `None`: nothing inside the archive.
fn resolve(link: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    if target.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// A part of a file, read without moving the file's own position.
struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        let n = self.file.read_at(&mut buffer[..room], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}
