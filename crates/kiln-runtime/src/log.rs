//! An instance's output.
//!
//! **Format** (version 1): `log` holds one JSON object a line,
//! `{"time":<milliseconds since the epoch>,"stream":"stdout"|"stderr"|"system","text":"…"}`,
//! with `"partial":true` where no newline follows: a line longer than [`MAX_LINE`] goes on in
//! the next record, or the stream has ended. Bytes that aren't UTF-8 are replaced. `system` is kiln's own word (why a
//! start failed). When `log` reaches the service's `max_size` it becomes `log.1`,
//! `log.1` becomes `log.2`, and so on up to `max_files` files in all.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kiln_model::Millis;
use kiln_model::spec::Logging;
use serde::{Deserialize, Serialize};

/// Bytes after which a line is cut into several records.
pub const MAX_LINE: usize = 16 << 10;
/// A record's line can't be longer: six bytes of JSON for one byte of text.
const MAX_RECORD: u64 = MAX_LINE as u64 * 6 + 256;
/// More files than this are not kept, whatever the service asks for.
const MAX_FILES: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    Stdout,
    Stderr,
    System,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub time: Millis,
    pub stream: Stream,
    pub text: String,
    /// No newline follows: the line goes on in the stream's next record, or there is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
pub struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    /// Calls `emit(text, partial)` for each line that `bytes` completes.
    pub fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&str, bool)) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.pending.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.pending.pop();
                if self.pending.ends_with(b"\r") {
                    self.pending.pop();
                }
                self.cut(&mut emit);
                emit(&String::from_utf8_lossy(&self.pending), false);
                self.pending.clear();
            } else {
                self.cut(&mut emit);
            }
        }
    }

    /// The last line, which had no end.
    pub fn finish(&mut self, mut emit: impl FnMut(&str, bool)) {
        if !self.pending.is_empty() {
            emit(&String::from_utf8_lossy(&self.pending), true);
            self.pending.clear();
        }
    }

    fn cut(&mut self, emit: &mut impl FnMut(&str, bool)) {
        while self.pending.len() > MAX_LINE {
            // Not inside a character, if there is a border nearby.
            let end = (MAX_LINE - 3..=MAX_LINE)
                .rev()
                .find(|n| self.pending.get(*n).is_none_or(|b| b & 0xc0 != 0x80))
                .unwrap_or(MAX_LINE);
            let rest = self.pending.split_off(end);
            emit(&String::from_utf8_lossy(&self.pending), true);
            self.pending = rest;
        }
    }
}

/// The shim's end: appends records and rotates the files.
pub struct Writer {
    path: PathBuf,
    file: File,
    size: u64,
    logging: Logging,
}

impl Writer {
    pub fn open(path: &Path, logging: &Logging) -> io::Result<Self> {
        let file = open(path)?;
        Ok(Self {
            size: file.metadata()?.len(),
            path: path.to_owned(),
            file,
            logging: logging.clone(),
        })
    }

    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        if self.logging.discard && record.stream != Stream::System {
            return Ok(());
        }
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if self.size > 0 && self.size + line.len() as u64 > self.logging.max_size.max(1) {
            self.rotate()?;
        }
        self.file.write_all(&line)?;
        self.size += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let files = self.logging.max_files.clamp(1, MAX_FILES);
        if files == 1 {
            std::fs::remove_file(&self.path)?;
        } else {
            for n in (1..files - 1).rev() {
                match std::fs::rename(numbered(&self.path, n), numbered(&self.path, n + 1)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
            std::fs::rename(&self.path, numbered(&self.path, 1))?;
        }
        self.file = open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn numbered(path: &Path, n: u32) -> PathBuf {
    match n {
        0 => path.to_owned(),
        n => path.with_extension(n.to_string()),
    }
}

/// The files of a log, oldest first.
pub fn files(path: &Path) -> Vec<PathBuf> {
    (0..MAX_FILES)
        .rev()
        .map(|n| numbered(path, n))
        .filter(|p| p.is_file())
        .collect()
}

/// Reads records from the oldest on, across rotations, also while they are written.
pub struct Reader {
    path: PathBuf,
    current: Option<BufReader<File>>,
    line: Vec<u8>,
}

impl Reader {
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            current: None,
            line: Vec::new(),
        }
    }

    /// The next record; `None`: nothing more for now.
    pub fn next_record(&mut self) -> io::Result<Option<Record>> {
        loop {
            if self.current.is_none() {
                let Some(oldest) = files(&self.path).into_iter().next() else {
                    return Ok(None);
                };
                match File::open(oldest) {
                    Ok(file) => self.current = Some(BufReader::new(file)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                }
            }
            // Whether there is a newer file is asked before reading to the end:
            // nothing is added to this one once there is.
            let newer = self.newer()?;
            if let Some(record) = self.read_line()? {
                return Ok(Some(record));
            }
            match newer {
                Some(file) => self.current = Some(BufReader::new(file)),
                None => return Ok(None),
            }
        }
    }

    fn read_line(&mut self) -> io::Result<Option<Record>> {
        let Some(reader) = &mut self.current else {
            return Ok(None);
        };
        loop {
            let room = MAX_RECORD.saturating_sub(self.line.len() as u64);
            let read = io::Read::take(&mut *reader, room).read_until(b'\n', &mut self.line)?;
            if !self.line.ends_with(b"\n") {
                if read > 0 && self.line.len() as u64 >= MAX_RECORD {
                    self.line.clear(); // not written by us
                    continue;
                }
                return Ok(None); // half a record: the rest comes
            }
            let record = serde_json::from_slice(&self.line);
            self.line.clear();
            if let Ok(record) = record {
                return Ok(Some(record));
            }
        }
    }

    /// The file after the current one, if that has been rotated.
    fn newer(&self) -> io::Result<Option<File>> {
        let Some(reader) = &self.current else {
            return Ok(None);
        };
        let inode = reader.get_ref().metadata()?.ino();
        // A rotation may go on at the same time: look again until two looks agree.
        const LOOKS: u32 = 8;
        for _ in 0..LOOKS {
            let list: Vec<File> = files(&self.path)
                .iter()
                .filter_map(|p| File::open(p).ok())
                .collect();
            let mut inodes = Vec::new();
            for file in &list {
                inodes.push(file.metadata()?.ino());
            }
            inodes.dedup();
            if inodes.len() != list.len() || list.is_empty() {
                continue;
            }
            return Ok(match inodes.iter().position(|i| *i == inode) {
                Some(at) => list.into_iter().nth(at + 1),
                // Rotated away: go on with the oldest there is.
                None => list.into_iter().next(),
            });
        }
        Ok(None)
    }
}

/// The last `count` records.
pub fn tail(path: &Path, count: usize) -> io::Result<Vec<Record>> {
    let mut reader = Reader::new(path);
    let mut last = std::collections::VecDeque::new();
    while let Some(record) = reader.next_record()? {
        if last.len() == count {
            last.pop_front();
        }
        last.push_back(record);
    }
    Ok(last.into())
}

/// The end of a plain text file, at most `bytes` long.
pub fn text_tail(path: &Path, bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, bytes), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<(String, bool)> {
        let mut lines = Lines::default();
        let mut out = Vec::new();
        for piece in pieces {
            lines.push(piece, |text, partial| out.push((text.to_owned(), partial)));
        }
        lines.finish(|text, partial| out.push((text.to_owned(), partial)));
        out
    }

    #[test]
    fn lines_are_joined_cut_and_ended() {
        let text = |s: &str| (s.to_owned(), false);
        assert_eq!(
            lines(&[b"a\nb", b"c\r\n\nlast"]),
            [text("a"), text("bc"), text(""), ("last".to_owned(), true)]
        );
        let long = vec![b'x'; MAX_LINE * 2 + 5];
        let cut = lines(&[&long, b"\n"]);
        assert_eq!(
            cut.iter().map(|(t, p)| (t.len(), *p)).collect::<Vec<_>>(),
            [(MAX_LINE, true), (MAX_LINE, true), (5, false)]
        );
        let wide = "é".repeat(MAX_LINE);
        assert!(
            lines(&[wide.as_bytes()])
                .iter()
                .all(|(t, _)| !t.contains('\u{fffd}'))
        );
    }

    #[test]
    fn nothing_is_lost_across_rotations_and_files_stay_bounded() {
        let dir = std::env::temp_dir().join(format!("kiln-log-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("log");
        let logging = Logging {
            max_size: 1000,
            max_files: 3,
            discard: false,
        };
        let mut writer = Writer::open(&path, &logging).unwrap();
        let mut reader = Reader::new(&path);
        let mut seen = 0;
        for n in 0..500u32 {
            let record = Record {
                time: Millis(1),
                stream: Stream::Stdout,
                text: n.to_string(),
                partial: false,
            };
            writer.write(&record).unwrap();
            if n % 7 == 0 {
                while let Some(record) = reader.next_record().unwrap() {
                    assert_eq!(record.text, seen.to_string());
                    seen += 1;
                }
            }
        }
        while reader.next_record().unwrap().is_some() {
            seen += 1;
        }
        assert_eq!(seen, 500);
        assert_eq!(files(&path).len(), 3);
        assert!(
            files(&path)
                .iter()
                .all(|p| p.metadata().unwrap().len() <= 1000)
        );
        assert_eq!(tail(&path, 2).unwrap().last().unwrap().text, "499");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
