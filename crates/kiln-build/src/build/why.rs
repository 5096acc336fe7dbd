//! Why two builds may have made different contents, in words, with what to do about it: told
//! from the contents alone. Where they tell nothing, nothing is said. Pure.

pub(super) const OWN_TIME: &str = "a time that the command gave it: SOURCE_DATE_EPOCH is set in a \
     RUN and stays the same (touch -d @$SOURCE_DATE_EPOCH)";
const TIME: &str = "the time of the build: SOURCE_DATE_EPOCH is set in a RUN and stays the same \
     (date -d @$SOURCE_DATE_EPOCH)";
const GZIP: &str = "the time in gzip's header: `gzip -n` leaves it out";
const TAR: &str = "times within a tar archive: `tar --sort=name --mtime=@$SOURCE_DATE_EPOCH`";
const ZIP: &str = "times within a zip archive: `touch -d @$SOURCE_DATE_EPOCH` what is packed, \
     then `zip -X`";
const PYC: &str = "the source's time in compiled Python: `python3 -m compileall \
     --invalidation-mode unchecked-hash`";
const LINES: &str = "the same lines in another order: of a folder (find | sort), of a hash table \
     (PYTHONHASHSEED=0), or of what ran at the same time (make -j1)";
const WORDS: &str = "the same words in another order: of a hash table (PYTHONHASHSEED=0), of a \
     folder (find | sort), or of what ran at the same time (make -j1)";
const RANDOM: &str = "random, like a uuid, a key or a salt; or a digest of something that differs";
const NUMBER: &str = "a number that is another each time: random, a process id, or a count of \
     processors";

/// What two contents that differ tell of the reason.
pub(super) fn of_contents(one: &[u8], two: &[u8]) -> Option<&'static str> {
    if let Some(why) = of_format(one, two) {
        return Some(why);
    }
    if one.contains(&0) || two.contains(&0) {
        return None;
    }
    let (one, two) = (
        std::str::from_utf8(one).ok()?,
        std::str::from_utf8(two).ok()?,
    );
    if sorted(one.split('\n')) == sorted(two.split('\n')) {
        return Some(LINES);
    }
    if sorted(words(one)) == sorted(words(two)) && letters(one) == letters(two) {
        return Some(WORDS);
    }
    let changed: Vec<(&str, &str)> = one
        .split('\n')
        .zip(two.split('\n'))
        .filter(|(a, b)| a != b)
        .collect();
    if one.split('\n').count() != two.split('\n').count() || changed.is_empty() {
        return None;
    }
    let all = |is: &dyn Fn(&str, &str) -> bool| changed.iter().all(|(a, b)| is(a, b));
    if all(&|a, b| has_time(b) && without(a, is_of_time) == without(b, is_of_time)) {
        return Some(TIME);
    }
    let number = |word: &str| word.bytes().all(|b| b.is_ascii_digit());
    let other = |a: &str, b: &str| !words(a).eq(words(b));
    if all(&|a, b| other(a, b) && without(a, number) == without(b, number)) {
        return Some(NUMBER);
    }
    all(&|a, b| is_random(a) && is_random(b)).then_some(RANDOM)
}

/// What the name of a file tells that is there only once.
pub(super) fn of_name(path: &[u8]) -> Option<&'static str> {
    let name = String::from_utf8_lossy(path);
    let name = name.rsplit('/').next().unwrap_or_default();
    match (has_time(name), is_random(name)) {
        (true, _) => Some(TIME),
        (false, true) => Some(RANDOM),
        (false, false) => None,
    }
}

/// Formats with times in them.
fn of_format(one: &[u8], two: &[u8]) -> Option<&'static str> {
    let both = |magic: &[u8], at: usize| {
        let has = |bytes: &[u8]| bytes.get(at..).is_some_and(|rest| rest.starts_with(magic));
        has(one) && has(two)
    };
    let differ = |from: usize, to: usize| one.get(from..to) != two.get(from..to);
    if both(&[0x1f, 0x8b], 0) && differ(4, 8) {
        return Some(GZIP);
    }
    if both(b"ustar", 257) && tar_times(one, two) {
        return Some(TAR);
    }
    if both(b"PK\x03\x04", 0) && differ(10, 14) {
        return Some(ZIP);
    }
    // PEP 552: two bytes of version, "\r\n", flags, then the source's time.
    if both(b"\r\n\0\0\0\0", 2) && differ(8, 12) {
        return Some(PYC);
    }
    None
}

/// Says whether archives of the same length differ in a member's time. A header is at a
/// multiple of 512, has `ustar` at 257, and the time at 136.
fn tar_times(one: &[u8], two: &[u8]) -> bool {
    one.chunks(512).zip(two.chunks(512)).any(|(a, b)| {
        let header = |block: &[u8]| block.get(257..262) == Some(b"ustar");
        header(a) && header(b) && a.get(136..148) != b.get(136..148)
    })
}

fn sorted<'t>(parts: impl Iterator<Item = &'t str>) -> Vec<&'t str> {
    let mut parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
    parts.sort_unstable();
    parts
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

fn letters(text: &str) -> Vec<u8> {
    let mut letters = text.as_bytes().to_vec();
    letters.sort_unstable();
    letters
}

/// The words that are left, in their order.
fn without(text: &str, is: impl Fn(&str) -> bool) -> Vec<&str> {
    words(text).filter(|word| !is(word)).collect()
}

/// What times are written with: numbers, and the names of days and months.
fn is_of_time(word: &str) -> bool {
    const NAMES: [&str; 21] = [
        "mon", "tue", "wed", "thu", "fri", "sat", "sun", "jan", "feb", "mar", "apr", "may", "jun",
        "jul", "aug", "sep", "oct", "nov", "dec", "am", "pm",
    ];
    let name = word.to_ascii_lowercase();
    word.bytes().any(|b| b.is_ascii_digit())
        || NAMES
            .iter()
            .any(|known| name.get(..3).unwrap_or(&name) == *known)
}

/// Says whether a text has `12:34`, `2026-11-28`, or seconds since 1970 (of 2020 to 2065, also
/// as milliseconds and so on).
fn has_time(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let pair = |at: usize| digit(at) && digit(at + 1);
    let runs = text.split(|c: char| !c.is_ascii_digit());
    let epoch = |run: &str| {
        let first = run.as_bytes().first();
        matches!(run.len(), 10 | 13 | 16 | 19)
            && matches!(first, Some(b'1' | b'2'))
            && ("16".."30").contains(&&run[..2])
    };
    let of_day = |run: &str| {
        matches!(run.len(), 8 | 12 | 14) && ("20200101".."20700101").contains(&&run[..8])
    };
    let clock =
        (0..bytes.len()).any(|at| pair(at) && bytes.get(at + 2) == Some(&b':') && pair(at + 3));
    // With its third part: a uuid has digits on both sides of a dash, too.
    let date = (0..bytes.len()).any(|at| {
        let parts = pair(at) && pair(at + 2) && pair(at + 5);
        let mark = bytes.get(at + 4);
        parts && matches!(mark, Some(b'-' | b'/')) && bytes.get(at + 7) == mark
    });
    clock || date || runs.into_iter().any(|run| epoch(run) || of_day(run))
}

/// Says whether a text has a long word of hexadecimal digits or of base64.
fn is_random(text: &str) -> bool {
    const SHORTEST: usize = 6;
    let letter =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '_' | '-' | '.' | '$');
    let mixed = |word: &str| {
        let digits = word.chars().filter(char::is_ascii_digit).count();
        let upper = word.chars().filter(char::is_ascii_uppercase).count();
        let lower = word.chars().filter(char::is_ascii_lowercase).count();
        word.len() >= SHORTEST && (digits > 0 && upper + lower > 0 || upper > 0 && lower > 0)
    };
    text.split(|c| !letter(c)).any(mixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(one: &str, two: &str) -> Option<&'static str> {
        of_contents(one.as_bytes(), two.as_bytes())
    }

    #[test]
    fn reasons_are_told_from_texts() {
        for (one, two, expected) in [
            ("built 1764331200\n", "built 1764331267\n", Some(TIME)),
            ("1764331200123456789", "1764331267123456780", Some(TIME)),
            (
                "Sat Nov 28 12:14:28 UTC 2026",
                "Sun Nov 29 00:01:02 UTC 2026",
                Some(TIME),
            ),
            ("on 2026-11-28 of x", "on 2026-11-29 of x", Some(TIME)),
            ("b\na\n", "a\nb\n", Some(LINES)),
            ("{'b', 'a'}\n", "{'a', 'b'}\n", Some(WORDS)),
            ("pid 8122", "pid 977", Some(NUMBER)),
            ("cpus: 2", "cpus: 1", Some(NUMBER)),
            (
                "id 0a51c3d2-77b1-4d0a-9a3e-0d2b6f1e8c11",
                "id 7be2d9a0-0c1f-4f4e-8b02-fe2a9d3c5b60",
                Some(RANDOM),
            ),
            (
                "id 0a511234-5678-4d0a-9a3e-0d2b6f1e8c11",
                "id 7be29876-5432-4f4e-8b02-fe2a9d3c5b60",
                Some(RANDOM),
            ),
            ("$6$yUx.8sJ3$abc", "$6$Qw12as./$xyz", Some(RANDOM)),
            ("some words", "other words", None),
            ("a, b", "a; b", None),
            ("one\n", "one\ntwo\n", None),
        ] {
            assert_eq!(why(one, two), expected, "{one:?} {two:?}");
        }
        assert_eq!(of_name(b"tmp/made.1764331200"), Some(TIME));
        assert_eq!(of_name(b"tmp/tmp.Xa81Qk2"), Some(RANDOM));
        assert_eq!(of_name(b"usr/lib/readme"), None);
    }

    #[test]
    fn formats_with_times_are_known() {
        let with = |head: &[u8], at: usize, byte: u8| {
            let mut bytes = vec![0; 1024];
            bytes[..head.len()].copy_from_slice(head);
            bytes[at] = byte;
            bytes
        };
        let told = |head: &[u8], at| of_contents(&with(head, at, 1), &with(head, at, 2));
        assert_eq!(told(&[0x1f, 0x8b, 8, 0], 5), Some(GZIP));
        assert_eq!(told(b"PK\x03\x04", 11), Some(ZIP));
        assert_eq!(told(&[0xa7, 0x0d, 13, 10, 0, 0, 0, 0], 9), Some(PYC));
        let mut header = vec![0; 262];
        header[257..].copy_from_slice(b"ustar");
        assert_eq!(told(&header, 140), Some(TAR));
        assert_eq!(told(&header, 600), None, "a member's content");
    }
}
