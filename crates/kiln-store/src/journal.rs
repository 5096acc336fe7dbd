//! What was written or found again lately, so that a lease can protect it without
//! clocks: a lease is a place in the journal, and protects what comes after it.
//!
//! # Format
//! `journal`: text; every record is a line feed, one letter (`o`bject, `b`lob, `t`ree,
//! `i`mage record) and 64 hex digits. Records *begin* with their line feed, so that one
//! torn by a full disk spoils only itself. Appended while holding the publishing lock,
//! emptied by `gc` while holding the removing lock and when nobody else has a lease.

use std::io::{Read, Seek, SeekFrom, Write};

use kiln_model::Digest;

use crate::layout::{Layout, PathError, Shelf, at};

/// Appends a record; the caller holds the publishing lock.
pub(crate) fn note(layout: &Layout, shelf: Shelf, digest: &Digest) -> Result<(), PathError> {
    note_all(layout, shelf, std::iter::once(digest))
}

/// The same of several, with one write.
pub(crate) fn note_all<'d>(
    layout: &Layout,
    shelf: Shelf,
    digests: impl ExactSizeIterator<Item = &'d Digest>,
) -> Result<(), PathError> {
    let mut records = Vec::with_capacity(digests.len() * 66);
    for digest in digests {
        records.push(b'\n');
        records.push(shelf.letter());
        records.extend_from_slice(digest.hex().as_bytes());
    }
    let mut journal = layout.journal()?;
    journal
        .write_all(&records)
        .map_err(|source| at("write", &layout.sub("journal"))(source))
}

/// Its length in bytes: where a lease taken now begins.
pub(crate) fn end(layout: &Layout) -> Result<u64, PathError> {
    Ok(crate::store::file_size(&layout.sub("journal"))?.unwrap_or(0))
}

/// The records between two places in it.
pub(crate) fn between(
    layout: &Layout,
    from: u64,
    to: u64,
) -> Result<Vec<(Shelf, Digest)>, PathError> {
    let path = layout.sub("journal");
    let Some(mut file) = crate::store::open(&path)? else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(from))
        .and_then(|_| file.take(to.saturating_sub(from)).read_to_end(&mut bytes))
        .map_err(at("read", &path))?;
    Ok(bytes.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// Empties it; the caller holds the removing lock and knows that no lease needs it.
pub(crate) fn clear(layout: &Layout) -> Result<(), PathError> {
    let journal = layout.journal()?;
    journal
        .set_len(0)
        .map_err(|source| at("empty", &layout.sub("journal"))(source))
}

fn parse(line: &[u8]) -> Option<(Shelf, Digest)> {
    let (letter, hex) = line.split_first()?;
    let shelf = (Shelf::ALL.into_iter()).find(|shelf| shelf.letter() == *letter)?;
    let digest = Digest::from_hex(std::str::from_utf8(hex).ok()?).ok()?;
    Some((shelf, digest))
}
