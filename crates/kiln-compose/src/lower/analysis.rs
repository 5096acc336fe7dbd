//! The steps of a canary and what traffic is judged by: `x-kiln.rollout.steps` and
//! `x-kiln.rollout.analysis`.

use kiln_model::Millis;
use kiln_model::spec::{Analysis, CanaryStep, Number, Prometheus};

use super::Lowering;
use crate::node::Node;
use crate::values;

const LIMITS: [&str; 6] = [
    "max_error_rate",
    "max_error_rate_increase",
    "max_latency_p99",
    "max_latency_p99_increase",
    "min_requests",
    "prometheus",
];

impl Lowering<'_> {
    /// `[{weight: 5, duration: 30s}, …]`: weights that rise.
    pub(super) fn steps(&mut self, node: &Node, path: &str) -> Vec<CanaryStep> {
        let mut steps: Vec<CanaryStep> = Vec::new();
        for (at, item) in self.list(node, path).iter().enumerate() {
            let Some(step) = self.step(item, &format!("{path}[{at}]")) else {
                continue;
            };
            if steps.last().is_some_and(|last| last.weight >= step.weight) {
                let what = format!("{path}[{at}].weight must be more than the step's before it");
                self.wrong(item.span, what);
            }
            steps.push(step);
        }
        steps
    }

    fn step(&mut self, node: &Node, path: &str) -> Option<CanaryStep> {
        let (mut weight, mut duration) = (None, None);
        for (key, value) in self.known(node, path, &["weight", "duration"]) {
            let here = format!("{path}.{key}");
            match key {
                "weight" => weight = Some(self.weight(value, &here)?),
                _ => duration = Some(self.some_time(value, &here)?),
            }
        }
        let missing = match (weight, duration) {
            (Some(weight), Some(duration)) => return Some(CanaryStep { weight, duration }),
            (None, _) => "weight",
            (Some(_), None) => "duration",
        };
        self.wrong(node.span, format!("{path}: the key `{missing}` is missing"));
        None
    }

    /// `5`, or `5%`.
    fn weight(&mut self, node: &Node, path: &str) -> Option<u8> {
        let text = node.text().unwrap_or_default();
        let weight = text.strip_suffix('%').unwrap_or(&text).parse().ok();
        let weight = weight.filter(|weight| (1..=100).contains(weight));
        if weight.is_none() {
            self.wrong(node.span, format!("{path} is a percentage from 1 to 100"));
        }
        weight
    }

    fn some_time(&mut self, node: &Node, path: &str) -> Option<Millis> {
        let span = self.span_of_time(node, path)?;
        if span == Millis(0) {
            self.wrong(node.span, format!("{path} must be longer than nothing"));
            return None;
        }
        Some(span)
    }

    pub(super) fn analysis(&mut self, node: &Node, path: &str) -> Analysis {
        let mut out = Analysis::default();
        for (key, value) in self.known(node, path, &LIMITS) {
            let here = format!("{path}.{key}");
            match key {
                "max_error_rate" => out.max_error_rate = self.share(value, &here),
                "max_error_rate_increase" => {
                    out.max_error_rate_increase = self.share(value, &here);
                }
                "max_latency_p99" => out.max_latency_p99 = self.some_time(value, &here),
                "max_latency_p99_increase" => {
                    out.max_latency_p99_increase = self.share(value, &here);
                }
                "min_requests" => out.min_requests = self.number(value, &here),
                _ => out.prometheus = self.prometheus(value, &here),
            }
        }
        out
    }

    /// `1%`, or `0.01`, in millionths.
    fn share(&mut self, node: &Node, path: &str) -> Option<u32> {
        let text = node.text().unwrap_or_default();
        let (number, unit) = match text.strip_suffix('%') {
            Some(percent) => (percent, 10_000.0),
            None => (text.as_str(), 1_000_000.0),
        };
        let millionths = number
            .trim()
            .parse::<f64>()
            .ok()
            .map(|n| (n * unit).round());
        let millionths = millionths.filter(|n| (0.0..=f64::from(u32::MAX)).contains(n));
        if millionths.is_none() {
            let what = format!("{path} is a share like `1%` or `0.01`, not `{text}`");
            self.wrong(node.span, what);
        }
        // It lies within the type's bounds.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        millionths.map(|n| n as u32)
    }

    fn prometheus(&mut self, node: &Node, path: &str) -> Option<Prometheus> {
        let (mut url, mut query, mut min, mut max) = (None, None, None, None);
        for (key, value) in self.known(node, path, &["url", "query", "min", "max"]) {
            let here = format!("{path}.{key}");
            match key {
                "url" => url = Some(self.plain_url(value, &here)?),
                "query" => query = Some(self.string(value, &here)?),
                "min" => min = Some(self.limit(value, &here)?),
                _ => max = Some(self.limit(value, &here)?),
            }
        }
        let missing = match (url, query) {
            (Some(url), Some(query)) if min.or(max).is_some() => {
                return Some(Prometheus {
                    url,
                    query,
                    min,
                    max,
                });
            }
            (None, _) => "the key `url` is missing",
            (_, None) => "the key `query` is missing",
            _ => "a limit is missing: `min` or `max`",
        };
        self.wrong(node.span, format!("{path}: {missing}"));
        None
    }

    fn plain_url(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.string(node, path)?;
        let rest = text.strip_prefix("http://").filter(|rest| {
            let host = rest.split('/').next().unwrap_or_default();
            !host.is_empty() && !host.contains('@') && !rest.contains(['?', '#'])
        });
        if rest.is_none() {
            let what = format!("{path} must be like `http://127.0.0.1:9090` (plain HTTP)");
            self.wrong(node.span, what);
            return None;
        }
        Some(text.trim_end_matches('/').to_owned())
    }

    fn limit(&mut self, node: &Node, path: &str) -> Option<Number> {
        let number = values::number(node).and_then(|n| {
            let finite = Number::new(n);
            finite.ok_or_else(|| "it must be a finite number".into())
        });
        self.take(number.map_err(|what| format!("{path}: {what}")), node.span)
    }
}
