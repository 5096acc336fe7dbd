//! Numbers, sizes and durations in the forms compose reads and prints. Pure.

/// Prints a float as Go's `%v` does: shortest form, an exponent below 1e-4 and from 1e6.
pub fn go_float(value: f64) -> String {
    exponent_form(format!("{value:e}"), value)
}

/// As [`go_float`], for single precision.
pub fn go_float32(value: f32) -> String {
    exponent_form(format!("{value:e}"), f64::from(value))
}

fn exponent_form(shortest: String, value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "+Inf" } else { "-Inf" }.into();
    }
    let Some((mantissa, exponent)) = shortest.split_once('e') else {
        return shortest;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    plain(mantissa, exponent)
}

/// `mantissa`·10^`exponent` without an exponent.
fn plain(mantissa: &str, exponent: i32) -> String {
    let (sign, digits) = match mantissa.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", mantissa),
    };
    let digits: String = digits.chars().filter(|c| *c != '.').collect();
    let point = exponent + 1;
    if point <= 0 {
        let zeros = "0".repeat(usize::try_from(-point).unwrap_or(0));
        return format!("{sign}0.{zeros}{digits}");
    }
    let point = usize::try_from(point).unwrap_or(0);
    if point >= digits.len() {
        return format!("{sign}{digits}{}", "0".repeat(point - digits.len()));
    }
    format!("{sign}{}.{}", &digits[..point], &digits[point..])
}

const NANOS_PER_SECOND: i64 = 1_000_000_000;

/// A duration in nanoseconds: `1h30m`, `10s`, `1.5s`, also `d` and `w`; a bare 0 is allowed.
pub fn parse_duration(text: &str) -> Result<i64, String> {
    let bad = || format!("`{text}` is not a duration; write for example `30s`, `1m30s` or `2h`");
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total: f64 = 0.0;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit_end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        total += number * unit_nanos(&rest[..unit_end]).ok_or_else(bad)?;
        rest = &rest[unit_end..];
    }
    if total > 9.2e18 {
        return Err(format!("the duration `{text}` is too long"));
    }
    // The cast is exact up to 2^53 ns (104 days) and rounds to well below 1 ms beyond.
    #[allow(clippy::cast_possible_truncation)]
    let nanos = total.round() as i64;
    Ok(if negative { -nanos } else { nanos })
}

fn unit_nanos(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1.0,
        "us" | "µs" | "μs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        "m" => 60e9,
        "h" => 3600e9,
        "d" => 86_400e9,
        "w" => 604_800e9,
        _ => return None,
    })
}

/// Prints nanoseconds as Go does: `1h0m0s`, `1m30s`, `1.5s`, `20ms`, `0s`.
pub fn go_duration(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let total = nanos.unsigned_abs();
    if total == 0 {
        return "0s".into();
    }
    let second = NANOS_PER_SECOND.unsigned_abs();
    if total < second {
        let (unit, per) = match total {
            n if n < 1000 => ("ns", 1),
            n if n < 1_000_000 => ("µs", 1000),
            _ => ("ms", 1_000_000),
        };
        return format!("{sign}{}{unit}", decimal(total, per));
    }
    let whole = total / second;
    let (hours, minutes) = (whole / 3600, whole / 60 % 60);
    let seconds = decimal(total % (60 * second), second);
    match (hours, minutes) {
        (0, 0) => format!("{sign}{seconds}s"),
        (0, _) => format!("{sign}{minutes}m{seconds}s"),
        _ => format!("{sign}{hours}h{minutes}m{seconds}s"),
    }
}

/// `value / per` without trailing zeros.
fn decimal(value: u64, per: u64) -> String {
    let fraction = value % per;
    if fraction == 0 {
        return (value / per).to_string();
    }
    let width = per.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{}.{}", value / per, digits.trim_end_matches('0'))
}

/// Bytes: a plain number (also negative), or one with `b`, `k`, `m`, `g`, `t`, `p` and their
/// `kb` and `kib` forms, all of which count by 1024.
pub fn parse_bytes(text: &str) -> Result<i64, String> {
    let bad = || format!("`{text}` is not a size; write for example `64m`, `1.5g` or `1048576`");
    if let Ok(number) = text.parse::<i64>() {
        return Ok(number);
    }
    let digits = text
        .rfind(|c: char| c.is_ascii_digit() || c == '.')
        .map(|at| at + 1)
        .ok_or_else(bad)?;
    let number: f64 = text[..digits].trim().parse().map_err(|_| bad())?;
    let unit = text[digits..].trim_start().to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if !unit.contains('i') => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(bad()),
    };
    if number < 0.0 || unit.ends_with("bb") || unit.ends_with('i') {
        return Err(bad());
    }
    let bytes = number * 1024f64.powi(power);
    if bytes >= 9.2e18 {
        return Err(format!("the size `{text}` is too big"));
    }
    #[allow(clippy::cast_possible_truncation)]
    Ok(bytes as i64)
}

/// The booleans that compose casts texts to.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "y" | "yes" | "on" => Some(true),
        "false" | "n" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// A soft and a hard limit; -1 is none at all.
pub fn ulimit((soft, hard): (i64, i64)) -> Result<(i64, i64), String> {
    if hard != -1 && (soft > hard || soft == -1) {
        return Err("soft is more than hard".into());
    }
    Ok((soft, hard))
}

/// `nofile=1024:4096`, or `nofile=1024` for both: as docker's `--ulimit`.
pub fn parse_ulimit(text: &str) -> Result<(String, (i64, i64)), String> {
    let bad = || format!("`{text}` is no ulimit; write for example `nofile=1024:4096`");
    let (name, limits) = text.split_once('=').ok_or_else(bad)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| text.parse().ok().filter(|n| *n >= -1).ok_or_else(bad);
    let pair = ulimit((number(soft)?, number(hard)?));
    let pair = pair.map_err(|why| format!("`{text}`: {why}"))?;
    match name.is_empty() {
        true => Err(bad()),
        false => Ok((name.to_owned(), pair)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_compose_prints_them() {
        for (value, text) in [
            (1.10, "1.1"),
            (3.0, "3"),
            (0.25, "0.25"),
            (1e21, "1e+21"),
            (123456.7, "123456.7"),
            (1234567.8, "1.2345678e+06"),
            (1e6, "1e+06"),
            (0.00001, "1e-05"),
            (0.0001, "0.0001"),
            (-12.5, "-12.5"),
        ] {
            assert_eq!(go_float(value), text);
        }
        assert_eq!(go_float32(0.1), "0.1");
    }

    #[test]
    fn durations_read_and_print() {
        for (text, printed) in [
            ("90s", "1m30s"),
            ("1h", "1h0m0s"),
            ("1.5s", "1.5s"),
            ("20ms", "20ms"),
            ("1d", "24h0m0s"),
            ("0", "0s"),
            ("100us", "100µs"),
        ] {
            let nanos = parse_duration(text);
            assert_eq!(nanos.map(go_duration), Ok(printed.into()), "{text}");
        }
        for bad in ["", "10", "s", "1x", "1s2", "-", "99999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_count_by_1024() {
        for (text, bytes) in [
            ("64m", 64 << 20),
            ("1.5g", 3 << 29),
            ("10 MB", 10 << 20),
            ("1kib", 1024),
            ("7b", 7),
            ("7", 7),
            ("-1", -1),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "m", "1x", "-1m", "1bb", "1i", "99999999999p", "1.2.3m"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ulimits_are_one_number_or_two_and_soft_is_at_most_hard() {
        for (text, pair) in [
            ("nofile=7", (7, 7)),
            ("nofile=7:9", (7, 9)),
            ("nofile=7:-1", (7, -1)),
            ("nofile=-1", (-1, -1)),
        ] {
            assert_eq!(parse_ulimit(text), Ok(("nofile".into(), pair)), "{text}");
        }
        for (text, why) in [
            ("nofile", "is no ulimit"),
            ("=7", "is no ulimit"),
            ("nofile=", "is no ulimit"),
            ("nofile=7:", "is no ulimit"),
            ("nofile=7:8:9", "is no ulimit"),
            ("nofile=-2", "is no ulimit"),
            ("nofile=many", "is no ulimit"),
            ("nofile=9:7", "soft is more than hard"),
            ("nofile=-1:7", "soft is more than hard"),
        ] {
            let told = parse_ulimit(text).map_err(|e| e.contains(why) && e.contains(text));
            assert_eq!(told, Err(true), "{text}");
        }
    }
}
