//! Signals by name or number, as compose and images write them.

use nix::sys::signal::Signal;

/// A text that names no signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no signal (use a name like SIGTERM or TERM, SIGRTMIN+3, or a number from 1 to 64)"
)]
pub struct SignalError(String);

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
pub fn parse(text: &str) -> Result<i32, SignalError> {
    let fail = || SignalError(text.to_owned());
    let trimmed = text.trim();
    if let Ok(number) = trimmed.parse::<i32>() {
        return (1..=64)
            .contains(&number)
            .then_some(number)
            .ok_or_else(fail);
    }
    let upper = trimmed.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(number) = real_time(name) {
        return number.ok_or_else(fail);
    }
    // POLL is another name of IO, CLD of CHLD, IOT of ABRT.
    let name = match name {
        "POLL" => "IO",
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        other => other,
    };
    format!("SIG{name}")
        .parse::<Signal>()
        .map(|signal| signal as i32)
        .map_err(|_| fail())
}

/// Outer `None`: not a real-time signal's name; inner `None`: a wrong one.
fn real_time(name: &str) -> Option<Option<i32>> {
    // The C library keeps 32 and 33 for itself.
    const FIRST: i32 = 34;
    const LAST: i32 = 64;
    let offset = |rest: &str, sign: char| -> Option<i32> {
        if rest.is_empty() {
            return Some(0);
        }
        rest.strip_prefix(sign)?.parse().ok()
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').and_then(|n| FIRST.checked_add(n))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, '-').and_then(|n| LAST.checked_sub(n))
    } else {
        return None;
    };
    Some(number.filter(|n| (FIRST..=LAST).contains(n)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_numbers_and_real_time_signals_are_understood() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGQUIT", 3),
            ("WINCH", 28),
            ("IOT", 6),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "0", "65", "SIGNOPE", "RTMIN+31", "RTMAX+1", "-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
