//! Is the new release's traffic good enough? A pure answer from what the proxy has
//! counted, with the numbers that it follows from.

use kiln_model::spec::{Analysis, Prometheus};
use kiln_model::{Millis, Traffic};

/// So many requests say something, where the file does not say how many do.
pub(crate) const MIN_REQUESTS: u64 = 50;
/// What a release may be worse by than the one before it, where the file says nothing: a
/// twentieth of the requests.
const INCREASE: u32 = 50_000;
const MILLION: u64 = 1_000_000;

/// What traffic says of a release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Opinion {
    /// Within the limits, as far as it can be told.
    Good(String),
    /// So few requests that nothing can be told.
    Few(String),
    Bad(String),
}

impl Opinion {
    pub fn text(&self) -> &str {
        match self {
            Opinion::Good(text) | Opinion::Few(text) | Opinion::Bad(text) => text,
        }
    }
}

/// Where the file says nothing: no more failures than before.
pub(crate) fn unstated() -> Analysis {
    Analysis {
        max_error_rate_increase: Some(INCREASE),
        ..Analysis::default()
    }
}

/// `new` against the limits, and against `old` where they are relative to it.
pub(crate) fn judge(analysis: &Analysis, new: &Traffic, old: &Traffic) -> Opinion {
    let enough = analysis.min_requests.unwrap_or(MIN_REQUESTS).max(1);
    if let Some(why) = too_many_failures(analysis, new, old, enough) {
        return Opinion::Bad(why);
    }
    if new.requests < enough {
        let requests = new.requests;
        let why = format!("only {requests} of the {enough} requests that a verdict needs");
        return Opinion::Few(why);
    }
    if let Some(why) = too_slow(analysis, new, old, enough) {
        return Opinion::Bad(why);
    }
    let mut said = rate(new);
    if let Some(micros) = new.latency.quantile(990) {
        said.push_str(&format!(", p99 {}", time(micros)));
    }
    Opinion::Good(said)
}

/// More than there may be even if all that is still to come of `enough` went well.
fn too_many_failures(
    analysis: &Analysis,
    new: &Traffic,
    old: &Traffic,
    enough: u64,
) -> Option<String> {
    let stated = analysis.max_error_rate.map(|limit| (limit.into(), None));
    let before = millionths(old.failed, old.requests);
    let relative = analysis.max_error_rate_increase.map(|increase| {
        let increase = u64::from(increase);
        (before + increase, Some(increase))
    });
    let (limit, increase) = stated.into_iter().chain(relative).min()?;
    let failed = u128::from(new.failed) * u128::from(MILLION);
    if failed <= u128::from(limit) * u128::from(new.requests.max(enough)) {
        return None;
    }
    let why = format!("{}, the limit is {}", rate(new), ratio(limit));
    Some(match increase {
        Some(increase) => format!(
            "{why}: the old release's {} and {}",
            ratio(before),
            ratio(increase)
        ),
        None => why,
    })
}

fn too_slow(analysis: &Analysis, new: &Traffic, old: &Traffic, enough: u64) -> Option<String> {
    let stated = analysis
        .max_latency_p99
        .map(|limit| limit.0.saturating_mul(1000));
    let before = old.latency.quantile(990).filter(|_| old.requests >= enough);
    let relative = analysis.max_latency_p99_increase.zip(before);
    let relative = relative.map(|(increase, before)| {
        before.saturating_add(before.saturating_mul(increase.into()) / MILLION)
    });
    let limit = stated.into_iter().chain(relative).min()?;
    let is = new.latency.quantile(990).filter(|is| *is > limit)?;
    let why = format!(
        "p99 of {} requests is {}, the limit is {}",
        new.requests,
        time(is),
        time(limit)
    );
    Some(match before.filter(|_| Some(limit) == relative) {
        Some(before) => format!("{why}: the old release's {} and more", time(before)),
        None => why,
    })
}

/// The value that Prometheus has given.
pub(crate) fn judge_value(prometheus: &Prometheus, value: f64) -> Opinion {
    let below = prometheus
        .min
        .map(|min| min.get())
        .filter(|min| value < *min);
    let above = prometheus
        .max
        .map(|max| max.get())
        .filter(|max| value > *max);
    let query = &prometheus.query;
    match below.or(above) {
        _ if value.is_nan() => Opinion::Few(format!("`{query}` is not a number")),
        Some(limit) => Opinion::Bad(format!("`{query}` is {value}, the limit is {limit}")),
        None => Opinion::Good(format!("`{query}` is {value}")),
    }
}

fn rate(traffic: &Traffic) -> String {
    let share = ratio(millionths(traffic.failed, traffic.requests));
    format!("{share} of {} requests failed", traffic.requests)
}

/// Rounded up: what is more than a limit must not look like it.
fn millionths(part: u64, whole: u64) -> u64 {
    let scaled = u128::from(part) * u128::from(MILLION);
    let share = scaled.div_ceil(u128::from(whole.max(1)));
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// `0.05`: to four digits, and to more where it is less.
fn ratio(millionths: u64) -> String {
    let digits = if millionths < 1000 { 6 } else { 4 };
    let text = format!("{:.digits$}", millionths as f64 / MILLION as f64);
    let short = text.trim_end_matches('0').trim_end_matches('.');
    short.to_owned()
}

fn time(micros: u64) -> String {
    match micros {
        0..1000 => format!("{micros}µs"),
        _ => Millis(micros / 1000).to_string(),
    }
}

/// The worse of two by how often requests failed.
pub(crate) fn worse(one: Traffic, other: Traffic) -> Traffic {
    let share = |t: &Traffic| millionths(t.failed, t.requests);
    match share(&one) < share(&other) {
        true => other,
        false => one,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::spec::Number;
    use kiln_model::traffic::Latency;

    fn traffic(requests: u64, failed: u64, millis: u64) -> Traffic {
        let mut cells = vec![0; Latency::CELLS];
        cells[Latency::cell(millis * 1000)] = requests;
        Traffic {
            requests,
            failed,
            latency: Latency::new(cells),
        }
    }

    fn said(opinion: Opinion) -> String {
        let word = match opinion {
            Opinion::Good(_) => "good",
            Opinion::Few(_) => "few",
            Opinion::Bad(_) => "bad",
        };
        format!("{word}: {}", opinion.text())
    }

    #[test]
    fn a_stated_rate_is_a_limit_whatever_was_before() {
        let analysis = Analysis {
            max_error_rate: Some(10_000),
            ..Analysis::default()
        };
        let judge = |new| said(judge(&analysis, &new, &traffic(9, 9, 1)));
        let bad = "bad: 0.05 of 120 requests failed, the limit is 0.01";
        assert_eq!(judge(traffic(120, 6, 1)), bad);
        assert_eq!(
            judge(traffic(100, 1, 1)),
            "good: 0.01 of 100 requests failed, p99 992µs"
        );
        assert!(judge(traffic(100, 2, 1)).starts_with("bad"));
        assert!(judge(traffic(49, 0, 1)).starts_with("few: only 49 of the 50"));
    }

    #[test]
    fn failures_say_enough_before_there_are_enough_requests() {
        let analysis = Analysis {
            max_error_rate: Some(100_000),
            min_requests: Some(40),
            ..Analysis::default()
        };
        let judge = |failed| judge(&analysis, &traffic(failed, failed, 1), &Traffic::default());
        assert!(matches!(judge(4), Opinion::Few(_)));
        assert!(matches!(judge(5), Opinion::Bad(_)));
    }

    #[test]
    fn where_nothing_is_stated_it_must_not_get_worse() {
        let judge = |new, old| said(judge(&unstated(), &new, &old));
        let old = traffic(1000, 100, 1);
        assert!(judge(traffic(100, 15, 1), old.clone()).starts_with("good"));
        let bad = "bad: 0.16 of 100 requests failed, the limit is 0.15: the old release's 0.1 \
                   and 0.05";
        assert_eq!(judge(traffic(100, 16, 1), old), bad);
        assert!(judge(traffic(3, 3, 1), Traffic::default()).starts_with("bad"));
        assert!(judge(traffic(2, 2, 1), Traffic::default()).starts_with("few"));
    }

    #[test]
    fn of_two_limits_the_lower_counts() {
        let analysis = Analysis {
            max_error_rate: Some(10_000),
            max_error_rate_increase: Some(50_000),
            ..Analysis::default()
        };
        let verdict = judge(&analysis, &traffic(100, 2, 1), &traffic(100, 0, 1));
        assert!(said(verdict).ends_with("the limit is 0.01"));
    }

    #[test]
    fn slowness_is_judged_in_itself_and_against_the_old_release() {
        let stated = Analysis {
            max_latency_p99: Some(Millis(250)),
            ..Analysis::default()
        };
        let old = traffic(100, 0, 100);
        let slow = said(judge(&stated, &traffic(100, 0, 400), &old));
        assert!(slow.starts_with("bad: p99 of 100 requests is"), "{slow}");
        assert!(slow.ends_with("the limit is 250ms"), "{slow}");
        let relative = Analysis {
            max_latency_p99_increase: Some(200_000),
            ..Analysis::default()
        };
        assert!(said(judge(&relative, &traffic(100, 0, 100), &old)).starts_with("good"));
        let slow = said(judge(&relative, &traffic(100, 0, 150), &old));
        assert!(slow.contains("the old release's"), "{slow}");
        // Of an old release that nobody asked anything nothing is known.
        let unknown = judge(&relative, &traffic(100, 0, 150), &Traffic::default());
        assert!(said(unknown).starts_with("good"));
    }

    #[test]
    fn a_value_lies_within_its_limits() {
        let prometheus = Prometheus {
            url: String::new(),
            query: "up".into(),
            min: Number::new(0.5),
            max: Number::new(2.0),
        };
        let judge = |value| said(judge_value(&prometheus, value));
        assert_eq!(judge(0.5), "good: `up` is 0.5");
        assert_eq!(judge(0.25), "bad: `up` is 0.25, the limit is 0.5");
        assert_eq!(judge(2.5), "bad: `up` is 2.5, the limit is 2");
        assert!(judge(f64::NAN).starts_with("few"));
    }

    #[test]
    fn small_shares_are_shown_as_well() {
        assert_eq!(ratio(millionths(1, 3)), "0.3333");
        assert_eq!(ratio(millionths(1, 100_000)), "0.00001");
        assert_eq!(ratio(0), "0");
        assert_eq!(ratio(1_000_000), "1");
    }
}
