//! Durations as Go writes them: `1h30m`, `1.5s`, `300ms`.

use kiln_model::Millis;

/// Parses a span of at least one millisecond; `0` means "not set".
pub(super) fn parse(text: &str) -> Result<Option<Millis>, &'static str> {
    const RULE: &str = "is not a duration (like 30s, 1m30s, 500ms)";
    if text.is_empty() || text == "0" {
        return Ok(None);
    }
    let mut nanos = 0_f64;
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.starts_with('-') {
        return Err("is negative");
    }
    if rest.is_empty() {
        return Err(RULE);
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or("needs a unit (like 30s)")?;
        let number: f64 = rest[..digits].parse().map_err(|_| RULE)?;
        rest = &rest[digits..];
        let unit_end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..unit_end] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err("has an unknown unit (ns, us, ms, s, m, h)"),
        };
        nanos += number * unit;
        rest = &rest[unit_end..];
    }
    // Go's durations end at 292 years.
    if nanos > i64::MAX as f64 {
        return Err("is too long");
    }
    if nanos == 0.0 {
        return Ok(None);
    }
    if nanos < 1e6 {
        return Err("is less than 1ms");
    }
    Ok(Some(Millis((nanos / 1e6) as u64)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_add_up_and_others_are_refused() {
        assert_eq!(parse("1h2m3.5s").unwrap(), Some(Millis(3_723_500)));
        assert_eq!(parse("250ms").unwrap(), Some(Millis(250)));
        assert_eq!(parse("0s").unwrap(), None);
        for bad in ["5", "s", "-1s", "1x", "1us", "1..2s", "+", "999999999h"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
