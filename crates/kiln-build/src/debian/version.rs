//! Debian version order (Debian Policy 5.6.12, deb-version(7)).

use std::cmp::Ordering;

/// Compares two versions as dpkg does. Any text has a place in the order.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (epoch_a, upstream_a, revision_a) = split(a);
    let (epoch_b, upstream_b, revision_b) = split(b);
    compare_part(epoch_a, epoch_b)
        .then_with(|| compare_part(upstream_a, upstream_b))
        .then_with(|| compare_part(revision_a, revision_b))
}

/// `[epoch:]upstream[-revision]`; a missing epoch or revision counts as 0.
fn split(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch, upstream, revision)
}

/// Alternating runs of non-digits (by [`weight`]) and digits (by value).
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        loop {
            let (x, y) = (non_digit(a), non_digit(b));
            if x.is_none() && y.is_none() {
                break;
            }
            let order = weight(x).cmp(&weight(y));
            if order.is_ne() {
                return order;
            }
            a = a.get(1..).unwrap_or_default();
            b = b.get(1..).unwrap_or_default();
        }
        let (x, rest_a) = digits(a);
        let (y, rest_b) = digits(b);
        // Without leading zeros the longer number is the larger: no overflow.
        let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    Ordering::Equal
}

fn non_digit(text: &[u8]) -> Option<u8> {
    text.first().copied().filter(|c| !c.is_ascii_digit())
}

/// `~` sorts before the end, which sorts before letters, which sort before the rest.
fn weight(c: Option<u8>) -> i32 {
    match c {
        Some(b'~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i32::from(c),
        Some(c) => i32::from(c) + 256,
    }
}

fn digits(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text
        .iter()
        .position(|c| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let zeros = number.iter().take_while(|c| **c == b'0').count();
    (&number[zeros..], rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_dpkg() {
        let ascending = [
            "0~~",
            "0~~a",
            "0~",
            "0",
            "0-1",
            "0.1",
            "1~rc1",
            "1.0~rc1-1",
            "1.0",
            "1.0-1~bpo1",
            "1.0-1",
            "1.0-1+b1",
            "1.0-1.1",
            "1.0-2",
            "1.0-10",
            "1.0a",
            "1.0+dfsg",
            "1.2.3",
            "1.10",
            "2",
            "99999999999999999999999",
            "1:0.1",
            "2:0",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
        for (a, b) in [
            ("1.0", "1.0-0"),
            ("0:1", "1"),
            ("1.00", "1.0"),
            ("1.0-01", "1.0-1"),
            ("", ""),
        ] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a} and {b}");
        }
        assert_eq!(compare("1.0-a-1", "1.0-b"), Ordering::Greater);
    }
}
