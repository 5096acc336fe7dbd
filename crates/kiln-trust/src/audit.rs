//! The audit log: `audit/log.jsonl`, one JSON object a line ([`Entry`]), format 1.
//!
//! `hash` is the sha256 of the line's JSON without the `hash` field, keys in the
//! order of [`Entry`]; `previous` is the hash of the line before, and 64 zeros in the
//! first. Appending holds an exclusive `flock` on the file, so that any number of
//! processes may append.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Millis};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// A line longer than this was not written by kiln.
const LONGEST_LINE: u64 = 1 << 20;

/// Takes what has happened; a transparency log will be another one.
pub trait AuditSink: Send + Sync {
    /// Returns the entry's number once it is on disk.
    fn record(&self, fact: Fact) -> Result<u64, AuditError>;
}

/// Something that happened, as its witness tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// Since the epoch.
    pub time: Millis,
    /// Login name, or `kiln` for what it does by itself.
    pub actor: String,
    /// `build`, `test`, `release`, `replace`, `rollback`, `exec`, `refuse`, `gc` …
    pub action: String,
    /// What it is about: `shop/web`, an instance, a digest.
    pub subject: String,
    /// Never secret values.
    pub details: BTreeMap<String, String>,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counted from 0 without gaps.
    pub number: u64,
    pub previous: Digest,
    #[serde(flatten)]
    pub fact: Fact,
    pub hash: Digest,
}

/// What [`AuditLog::verify`] found in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub entries: u64,
    /// The last entry's hash: whoever knows it can tell whether history was rewritten.
    pub head: Option<Digest>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("the audit log {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the audit log {path} is broken at entry {number}: {what}")]
    Broken {
        path: PathBuf,
        number: u64,
        what: String,
    },
}

/// The log of one kiln root.
pub struct AuditLog {
    path: PathBuf,
}

impl AuditLog {
    /// `root` is KILN_ROOT; the log's folder is made when it is missing.
    pub fn open(root: &Path) -> Result<Self, AuditError> {
        let folder = root.join("audit");
        let path = folder.join("log.jsonl");
        let io = |source| AuditError::Io {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(&folder).map_err(io)?;
        Ok(Self { path })
    }

    /// Every entry, oldest first. Stops with an error at the first that does not fit.
    pub fn entries(&self) -> Result<Vec<Entry>, AuditError> {
        let mut entries = Vec::new();
        self.walk(|entry| entries.push(entry))?;
        Ok(entries)
    }

    /// What is told of one action, the oldest first. Nothing is checked: who has to be sure
    /// verifies. A line that can't be read is left out.
    pub fn facts(&self, action: &str) -> Result<Vec<Fact>, AuditError> {
        let mut facts = Vec::new();
        // Most lines are of other actions, and need not be read as a whole.
        let said = format!("\"action\":{}", serde_json::Value::from(action));
        self.lines(|line| {
            if line.contains(&said) {
                let entry = serde_json::from_str::<Entry>(line).ok();
                facts.extend(entry.map(|e| e.fact).filter(|f| f.action == action));
            }
            Ok(())
        })?;
        Ok(facts)
    }

    /// Checks every hash, link and number.
    pub fn verify(&self) -> Result<Verified, AuditError> {
        let mut verified = Verified {
            entries: 0,
            head: None,
        };
        self.walk(|entry| {
            verified.entries += 1;
            verified.head = Some(entry.hash);
        })?;
        Ok(verified)
    }

    fn walk(&self, mut each: impl FnMut(Entry)) -> Result<(), AuditError> {
        let mut previous = GENESIS;
        let mut number = 0;
        self.lines(|line| {
            let entry = self.checked(line, number, previous)?;
            previous = entry.hash;
            number += 1;
            each(entry);
            Ok(())
        })
    }

    fn lines(
        &self,
        mut each: impl FnMut(&str) -> Result<(), AuditError>,
    ) -> Result<(), AuditError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.io(e)),
        };
        flock(&file, FlockOperation::LockShared).map_err(|e| self.io(e.into()))?;
        let mut reader = BufReader::new(file);
        loop {
            let mut line = String::new();
            let read = (&mut reader)
                .take(LONGEST_LINE)
                .read_line(&mut line)
                .map_err(|e| self.io(e))?;
            if read == 0 {
                return Ok(());
            }
            each(&line)?;
        }
    }

    fn checked(&self, line: &str, number: u64, previous: Digest) -> Result<Entry, AuditError> {
        let broken = |what: String| AuditError::Broken {
            path: self.path.clone(),
            number,
            what,
        };
        if !line.ends_with('\n') {
            return Err(broken("its line is cut short".into()));
        }
        let entry: Entry =
            serde_json::from_str(line).map_err(|e| broken(format!("not an entry ({e})")))?;
        if entry.number != number {
            return Err(broken(format!("it says it is entry {}", entry.number)));
        }
        if entry.previous != previous {
            return Err(broken("it does not follow the entry before it".into()));
        }
        let hash = hash_of(number, previous, &entry.fact).map_err(|e| broken(e.to_string()))?;
        if hash != entry.hash {
            return Err(broken("its content does not match its hash".into()));
        }
        Ok(entry)
    }

    fn io(&self, source: io::Error) -> AuditError {
        AuditError::Io {
            path: self.path.clone(),
            source,
        }
    }

    /// The last whole entry; what a torn write left behind it is cut off (it was never
    /// confirmed to anyone). `None` in an empty log.
    fn tail(&self, file: &mut File) -> Result<Option<Entry>, AuditError> {
        let length = file.metadata().map_err(|e| self.io(e))?.len();
        let from = length.saturating_sub(2 * LONGEST_LINE);
        file.seek(SeekFrom::Start(from)).map_err(|e| self.io(e))?;
        let mut bytes = Vec::new();
        file.take(2 * LONGEST_LINE)
            .read_to_end(&mut bytes)
            .map_err(|e| self.io(e))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        if whole < bytes.len() {
            file.set_len(from + whole as u64).map_err(|e| self.io(e))?;
        }
        file.seek(SeekFrom::End(0)).map_err(|e| self.io(e))?;
        let Some(body) = whole.checked_sub(1).and_then(|end| bytes.get(..end)) else {
            return Ok(None);
        };
        let start = body.iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        let line = body.get(start..).unwrap_or_default();
        serde_json::from_slice(line)
            .map(Some)
            .map_err(|e| AuditError::Broken {
                path: self.path.clone(),
                number: 0,
                what: format!("its last line is not an entry ({e}); run `kiln audit verify`"),
            })
    }
}

impl AuditSink for AuditLog {
    fn record(&self, fact: Fact) -> Result<u64, AuditError> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(|e| self.io(e))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| self.io(e.into()))?;
        let last = self.tail(&mut file)?;
        let (number, previous) = last.map_or((0, GENESIS), |e| (e.number + 1, e.hash));
        let broken = |e: serde_json::Error| AuditError::Broken {
            path: self.path.clone(),
            number,
            what: e.to_string(),
        };
        let hash = hash_of(number, previous, &fact).map_err(broken)?;
        let mut line = serde_json::to_vec(&Entry {
            number,
            previous,
            fact,
            hash,
        })
        .map_err(broken)?;
        line.push(b'\n');
        file.write_all(&line)
            .and_then(|()| file.sync_data())
            .map_err(|e| self.io(e))?;
        Ok(number)
    }
}

const GENESIS: Digest = Digest::from_bytes([0; 32]);

fn hash_of(number: u64, previous: Digest, fact: &Fact) -> Result<Digest, serde_json::Error> {
    #[derive(Serialize)]
    struct Body<'a> {
        number: u64,
        previous: Digest,
        #[serde(flatten)]
        fact: &'a Fact,
    }
    Digest::of_json(&Body {
        number,
        previous,
        fact,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn fact(action: &str) -> Fact {
        Fact {
            time: Millis(1),
            actor: "ada".into(),
            action: action.into(),
            subject: "shop/web".into(),
            details: [("digest".to_owned(), "sha256:00".to_owned())].into(),
        }
    }

    fn log_of_three() -> (tempfile::TempDir, AuditLog) {
        let root = tempfile::tempdir().unwrap();
        let log = AuditLog::open(root.path()).unwrap();
        for action in ["build", "test", "release"] {
            log.record(fact(action)).unwrap();
        }
        (root, log)
    }

    #[test]
    fn entries_are_numbered_chained_and_verified() {
        let (_root, log) = log_of_three();
        let entries = log.entries().unwrap();
        assert_eq!(
            entries.iter().map(|e| e.number).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert_eq!(entries[2].previous, entries[1].hash);
        let head = Some(entries[2].hash);
        assert_eq!(log.verify().unwrap(), Verified { entries: 3, head });
    }

    #[test]
    fn facts_are_those_of_one_action_whatever_stands_around_them() {
        let (_root, log) = log_of_three();
        let mut told = fact("release");
        told.subject = "\"action\":\"test\"".into();
        log.record(told).unwrap();
        let mut text = fs::read_to_string(&log.path).unwrap();
        text.insert_str(0, "{\"action\":\"test\"\n");
        text.push_str("{\"number\":4,\"action\":\"test\",");
        fs::write(&log.path, text).unwrap();
        assert_eq!(log.facts("test").unwrap(), [fact("test")]);
        assert_eq!(log.facts("release").unwrap().len(), 2);
        assert_eq!(log.facts("tes").unwrap(), []);
    }

    #[test]
    fn a_changed_removed_or_reordered_entry_is_found() {
        let (_root, log) = log_of_three();
        let text = fs::read_to_string(&log.path).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let changed = text.replacen("\"test\"", "\"rest\"", 1);
        let removed = [lines[0], lines[2]].concat();
        let reordered = [lines[1], lines[0], lines[2]].concat();
        let headless = lines[1..].concat();
        for (bad, number) in [(changed, 1), (removed, 1), (reordered, 0), (headless, 0)] {
            fs::write(&log.path, bad).unwrap();
            match log.verify() {
                Err(AuditError::Broken { number: at, .. }) => assert_eq!(at, number),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_torn_write_is_cut_off_by_the_next_entry() {
        let (_root, log) = log_of_three();
        let mut text = fs::read_to_string(&log.path).unwrap();
        text.push_str("{\"number\":3,\"prev");
        fs::write(&log.path, text).unwrap();
        assert!(log.verify().is_err());
        assert_eq!(log.record(fact("rollback")).unwrap(), 3);
        assert_eq!(log.verify().unwrap().entries, 4);
    }
}
