//! Finds a section of an ELF file by its name (System V ABI, "Sections"). Nothing in the file
//! is believed: every place is looked at with bounds.

use std::io::{self, Read, Seek, SeekFrom};

/// A file with fewer bytes has no sections worth looking for.
pub(super) const LEAST: u64 = 256;
/// More sections than any program has.
const MAX_SECTIONS: u64 = 4096;
/// Their names together.
const MAX_NAMES: u64 = 1 << 20;

/// Where a section lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub start: u64,
    pub size: u64,
}

struct Layout {
    wide: bool,
    big: bool,
}

impl Layout {
    fn number(&self, bytes: &[u8], at: usize, length: usize) -> Option<u64> {
        let field = bytes.get(at..at.checked_add(length)?)?;
        let mut value = 0u64;
        for index in 0..length {
            let byte = if self.big {
                field[index]
            } else {
                field[length - 1 - index]
            };
            value = value << 8 | u64::from(byte);
        }
        Some(value)
    }

    /// A number at one place of a 32-bit structure, and another of a 64-bit one.
    fn field(&self, bytes: &[u8], narrow: (usize, usize), wide: (usize, usize)) -> Option<u64> {
        let (at, length) = if self.wide { wide } else { narrow };
        self.number(bytes, at, length)
    }
}

/// The named sections, in the order of `wanted`; `None`: it is no ELF file.
pub(super) fn sections<const N: usize>(
    file: &mut (impl Read + Seek),
    wanted: [&str; N],
) -> io::Result<Option<[Option<Section>; N]>> {
    let mut header = [0; 64];
    file.seek(SeekFrom::Start(0))?;
    if read_up_to(file, &mut header)? < 52 || &header[..4] != b"\x7fELF" {
        return Ok(None);
    }
    let layout = Layout {
        wide: header[4] == 2,
        big: header[5] == 2,
    };
    let fields = [
        layout.field(&header, (32, 4), (40, 8)),
        layout.field(&header, (46, 2), (58, 2)),
        layout.field(&header, (48, 2), (60, 2)),
        layout.field(&header, (50, 2), (62, 2)),
    ];
    let [Some(table), Some(entry), Some(count), Some(names)] = fields else {
        return Ok(None);
    };
    let smallest = if layout.wide { 64 } else { 40 };
    if table == 0 || count == 0 || count > MAX_SECTIONS || entry < smallest || names >= count {
        // Stripped of its sections, or made to look strange: there is nothing to read.
        return Ok(Some([None; N]));
    }
    file.seek(SeekFrom::Start(table))?;
    let mut entries = vec![0; usize::try_from(count * entry).map_err(io::Error::other)?];
    let read = read_up_to(file, &mut entries)?;
    entries.truncate(read);
    let section = |index: u64| {
        let at = usize::try_from(index.checked_mul(entry)?).ok()?;
        let bytes = entries.get(at..)?;
        let name = layout.number(bytes, 0, 4)?;
        let start = layout.field(bytes, (16, 4), (24, 8))?;
        let size = layout.field(bytes, (20, 4), (32, 8))?;
        Some((name, Section { start, size }))
    };
    let Some((_, strings)) = section(names).filter(|(_, found)| found.size <= MAX_NAMES) else {
        return Ok(Some([None; N]));
    };
    let texts = content(file, strings)?;
    let mut found = [None; N];
    for (name, section) in (0..count).filter_map(section) {
        let rest = usize::try_from(name).ok().and_then(|at| texts.get(at..));
        let name = rest.and_then(|rest| rest.split(|b| *b == 0).next());
        for (wanted, found) in wanted.iter().zip(&mut found) {
            if name == Some(wanted.as_bytes()) {
                *found = Some(section);
            }
        }
    }
    Ok(Some(found))
}

/// A section's content, as far as the file has it. The caller has bounded its size.
pub(super) fn content(file: &mut (impl Read + Seek), section: Section) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(section.start))?;
    let mut bytes = Vec::new();
    file.take(section.size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read(&mut buffer[done..])? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}
