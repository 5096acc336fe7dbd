//! PAX extended headers (POSIX.1-2001): `length key=value\n` records.

use std::collections::BTreeMap;

/// Extended attributes in PAX, as star began it and Docker writes it.
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";

/// Parses all records of a header; the last of equal keys wins.
pub(super) fn decode(mut records: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, &'static str> {
    let mut map = BTreeMap::new();
    while !records.is_empty() {
        let space = records
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or("a PAX record has no length")?;
        let length = decimal(&records[..space]).ok_or("a PAX record's length is no number")?;
        let length = usize::try_from(length).unwrap_or(0);
        if length <= space + 1 || length > records.len() {
            return Err("a PAX record's length does not fit its header");
        }
        let (record, rest) = records.split_at(length);
        let record = record[space + 1..]
            .strip_suffix(b"\n")
            .ok_or("a PAX record has no line end")?;
        let equals = record
            .iter()
            .position(|b| *b == b'=')
            .ok_or("a PAX record has no `=`")?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.is_empty() {
            return Err("a PAX record has no key");
        }
        map.insert(key.to_vec(), value.to_vec());
        records = rest;
    }
    Ok(map)
}

/// Writes records, sorted by key. Keys must not hold `=`.
pub(super) fn encode(records: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in records {
        // The length counts its own digits, so it is found by growing it.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() > length {
            length += 1;
        }
        bytes.extend_from_slice(length.to_string().as_bytes());
        for part in [b" ", key.as_slice(), b"=", value, b"\n"] {
            bytes.extend_from_slice(part);
        }
    }
    bytes
}

/// Digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |sum, digit| match digit {
        b'0'..=b'9' => sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// `-12.75` in whole seconds, rounded down: -13.
pub(super) fn seconds(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match digits.iter().position(|b| *b == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &[][..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let whole = i64::try_from(decimal(whole)?).ok()?;
    match negative {
        false => Some(whole),
        true => whole
            .checked_neg()?
            .checked_sub(i64::from(fraction.iter().any(|b| *b != b'0'))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn records_read_back_at_every_length_near_a_digit_change() {
        for size in (0..1100).chain(9_980..10_010).chain(99_970..100_010) {
            let records = BTreeMap::from([(b"k".to_vec(), vec![b'\n'; size])]);
            let bytes = encode(&records);
            assert_eq!(decode(&bytes).unwrap(), records, "{size}");
        }
        assert_eq!(
            encode(&BTreeMap::from([(b"a".to_vec(), b"b".to_vec())])),
            b"6 a=b\n"
        );
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"6 a=b"[..],
            b"7 a=b\n",
            b"5 a=b\n",
            b"a=b\n",
            b" a=b\n",
            b"-6 a=b\n",
            b"6 a:b\n",
            b"5 =b\n",
            b"0 ",
            b"3 \n",
            b"99999999999999999999999999 a=b\n",
            b"18446744073709551615 a=b\n",
            b"6 a=b\n\0\0",
        ] {
            assert!(decode(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times_round_down() {
        assert_eq!(seconds(b"12.75"), Some(12));
        assert_eq!(seconds(b"-12.75"), Some(-13));
        assert_eq!(seconds(b"-12.0"), Some(-12));
        assert_eq!(seconds(b"12"), Some(12));
        for bad in [
            &b""[..],
            b"-",
            b".",
            b"1.x",
            b"1e9",
            b"99999999999999999999",
        ] {
            assert_eq!(seconds(bad), None, "{}", String::from_utf8_lossy(bad));
        }
    }
}
