//! What a connection speaks, judged by its first bytes. Pure.
//!
//! Only a whole HTTP request line counts as HTTP: `GET key\r\n` is also a command of
//! other protocols, and must reach the instance untouched.

use crate::limits::SNIFF_BYTES;

/// The first bytes of HTTP/2 with prior knowledge (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest method that is taken for one.
const METHOD: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sniffed {
    Http1,
    H2,
    Tcp,
}

/// `None` while more bytes are needed.
pub(crate) fn sniff(bytes: &[u8]) -> Option<Sniffed> {
    if bytes.len() >= PREFACE.len() && bytes.starts_with(PREFACE) {
        return Some(Sniffed::H2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    let line = skip_empty_lines(bytes);
    if let Some(end) = line.iter().position(|b| *b == b'\n') {
        let line = line.get(..end).unwrap_or_default();
        return Some(if is_request_line(line) {
            Sniffed::Http1
        } else {
            Sniffed::Tcp
        });
    }
    if !could_be_request_line(line) {
        return Some(Sniffed::Tcp);
    }
    (bytes.len() >= SNIFF_BYTES).then(|| guess(bytes))
}

/// The judgement when no more bytes come, or no more are kept.
pub(crate) fn guess(bytes: &[u8]) -> Sniffed {
    match split_method(skip_empty_lines(bytes)) {
        Some(rest) if rest.starts_with(b"/") || rest.starts_with(b"http://") => Sniffed::Http1,
        _ => Sniffed::Tcp,
    }
}

/// A server should ignore an empty line before a request (RFC 9112, 2.2).
fn skip_empty_lines(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\r\n").unwrap_or(bytes)
}

fn is_request_line(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let Some(rest) = split_method(line) else {
        return false;
    };
    match rest.iter().rposition(|b| *b == b' ') {
        Some(space) if space > 0 => {
            matches!(rest.get(space..), Some(b" HTTP/1.1" | b" HTTP/1.0"))
        }
        _ => false,
    }
}

fn could_be_request_line(line: &[u8]) -> bool {
    let method = line.iter().take_while(|b| is_method_byte(**b)).count();
    match line.get(method) {
        None => method <= METHOD,
        Some(b' ') => (1..=METHOD).contains(&method),
        Some(_) => line == b"\r",
    }
}

/// What follows `METHOD `.
fn split_method(line: &[u8]) -> Option<&[u8]> {
    let method = line.iter().take_while(|b| is_method_byte(**b)).count();
    if !(1..=METHOD).contains(&method) {
        return None;
    }
    line.get(method..)?.strip_prefix(b" ")
}

/// Methods are upper case by convention; lower case would take in too much else.
fn is_method_byte(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte == b'-' || byte == b'_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_only_what_has_a_whole_request_line() {
        let cases: &[(&[u8], Option<Sniffed>)] = &[
            (b"", None),
            (b"G", None),
            (b"GET ", None),
            (b"GET / HTTP/1.1", None),
            (b"GET / HTTP/1.1\r", None),
            (b"GET / HTTP/1.1\r\n", Some(Sniffed::Http1)),
            (b"\r\nGET / HTTP/1.1\r\n", Some(Sniffed::Http1)),
            (b"\r", None),
            (b"OPTIONS * HTTP/1.0\n", Some(Sniffed::Http1)),
            (b"M-SEARCH * HTTP/1.1\r\n", Some(Sniffed::Http1)),
            (b"GET key\r\n", Some(Sniffed::Tcp)),
            (b"PING\r\n", Some(Sniffed::Tcp)),
            (b"get / HTTP/1.1\r\n", Some(Sniffed::Tcp)),
            (b"GET  HTTP/1.1\r\n", Some(Sniffed::Tcp)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Sniffed::Tcp)),
            (b"\x16\x03\x01", Some(Sniffed::Tcp)),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Some(Sniffed::Tcp)),
            (b"PRI * HTTP/2.0\r\n", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Sniffed::H2)),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Some(Sniffed::Tcp)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", Some(Sniffed::Tcp)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(sniff(bytes), *expected, "{:?}", bytes.escape_ascii());
        }
    }

    #[test]
    fn an_endless_first_line_is_judged_by_its_start() {
        let mut long = b"GET /".to_vec();
        long.resize(SNIFF_BYTES, b'x');
        assert_eq!(sniff(&long), Some(Sniffed::Http1));
        assert_eq!(guess(b"GET /a"), Sniffed::Http1);
        assert_eq!(guess(b"GET a"), Sniffed::Tcp);
        assert_eq!(guess(b""), Sniffed::Tcp);
    }
}
