//! How a service is replaced: `x-kiln.rollout` beside `deploy.update_config`, and that the
//! two don't contradict each other.

use kiln_model::Millis;
use kiln_model::spec::{Order, RolloutOptions, Service, Strategy};

use super::Lowering;
use crate::diag::{Code, Diagnostic};
use crate::node::Node;

/// `x-kiln.rollout`; its `monitor` goes to `update_config`.
#[derive(Clone, Debug, Default)]
pub(super) struct Rollout {
    pub options: RolloutOptions,
    pub monitor: Option<Millis>,
}

impl Lowering<'_> {
    /// A strategy's name, or a mapping.
    pub(super) fn rollout(&mut self, node: &Node, path: &str) -> Rollout {
        let mut out = Rollout::default();
        if node.as_str().is_some() {
            out.options.strategy = self.strategy(node, path);
            if out.options.strategy == Some(Strategy::Canary) {
                let what = format!("{path}: a canary needs `steps`");
                let hint = "{strategy: canary, steps: [{weight: 5, duration: 1m}]}";
                let wrong = Diagnostic::error(Code::Schema, node.span, what);
                self.diagnostics.push(wrong.hint(hint));
            }
            return out;
        }
        let known = ["strategy", "keep_warm", "monitor", "steps", "analysis"];
        for (key, value) in self.known(node, path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "strategy" => out.options.strategy = self.strategy(value, &here),
                "keep_warm" => out.options.keep_warm = self.span_of_time(value, &here),
                "steps" => out.options.steps = self.steps(value, &here),
                "analysis" => out.options.analysis = Some(self.analysis(value, &here)),
                _ => out.monitor = self.span_of_time(value, &here),
            }
        }
        let canary = out.options.strategy == Some(Strategy::Canary);
        if canary && node.get("steps").is_none() {
            self.wrong(node.span, format!("{path}: a canary needs `steps`"));
        }
        out
    }

    fn strategy(&mut self, node: &Node, path: &str) -> Option<Strategy> {
        let hint = match node.as_str() {
            Some("rolling") => return Some(Strategy::Rolling),
            Some("blue-green") => return Some(Strategy::BlueGreen),
            Some("recreate") => return Some(Strategy::Recreate),
            Some("canary") => return Some(Strategy::Canary),
            Some("handoff") => {
                "a handoff is chosen by itself; `x-kiln.exclusive: true` asks for it"
            }
            _ => "leave it out for all at once behind one switch",
        };
        let what = format!("{path} is `rolling`, `blue-green`, `canary` or `recreate`");
        self.diagnostics
            .push(Diagnostic::error(Code::Schema, node.span, what).hint(hint));
        None
    }

    /// Puts what the service, or else the project, says into `service`.
    pub(super) fn set_rollout(&mut self, service: &mut Service, own: Option<Rollout>, node: &Node) {
        if let Some(rollout) = own {
            service.update.monitor = rollout.monitor.or(service.update.monitor);
            service.kiln.rollout = Some(rollout.options);
        } else if let Some(rollout) = self.rollout.clone() {
            service.update.monitor = service.update.monitor.or(rollout.monitor);
            service.kiln.rollout = Some(rollout.options);
        }
        for what in contradictions(service) {
            self.wrong(node.key, what);
        }
    }
}

fn contradictions(service: &Service) -> Vec<&'static str> {
    let update = &service.update;
    let rollout = service.kiln.rollout.as_ref();
    let strategy = rollout.and_then(|r| r.strategy.as_ref());
    let warm = rollout.is_some_and(|r| r.keep_warm.is_some());
    let batches = update.parallelism.is_some_and(|n| n > 0);
    let mut found = Vec::new();
    if strategy != Some(&Strategy::Canary) {
        found.extend(without_a_canary(service));
    }
    let mut note = |wrong: bool, what| {
        if wrong {
            found.push(what);
        }
    };
    note(
        service.kiln.exclusive == Some(true) && service.replicas > 1,
        "x-kiln.exclusive: never two copies at once, but several replicas are wanted",
    );
    let (first, last) = (Some(Order::StartFirst), Some(Order::StopFirst));
    let stops = update.order == last && service.replicas > 1;
    note(
        service.kiln.max_age.is_some() && (stops || strategy == Some(&Strategy::Recreate)),
        "x-kiln.max_age: a copy that is too old goes after the new one has come; \
         take out `stop-first` or `recreate`",
    );
    match strategy {
        Some(Strategy::Canary) => {
            note(
                update.order == last,
                "the strategy `canary` keeps the old instances beside the new; \
                 update_config.order says stop-first",
            );
            note(
                batches,
                "the strategy `canary` starts all new instances before traffic moves; take out \
                 update_config.parallelism",
            );
        }
        Some(Strategy::Recreate) => {
            note(
                update.order == first,
                "the strategy `recreate` ends the old instances first; \
                 update_config.order says start-first",
            );
            note(
                warm,
                "the strategy `recreate` ends the old instances first: none is kept warm",
            );
            note(
                batches,
                "the strategy `recreate` replaces all instances at once; take out \
                 update_config.parallelism, or say `order: stop-first` instead of it",
            );
        }
        Some(Strategy::BlueGreen) => {
            note(
                update.order == last,
                "the strategy `blue-green` starts the new instances first; \
                 update_config.order says stop-first",
            );
            note(
                batches,
                "the strategy `blue-green` moves all traffic at once; take out \
                 update_config.parallelism, or say `rolling`",
            );
        }
        Some(Strategy::Rolling) | None => note(
            warm && update.order == last,
            "x-kiln.rollout.keep_warm: with `order: stop-first` nothing is left to keep",
        ),
    }
    found
}

/// Keys that nothing would come of.
fn without_a_canary(service: &Service) -> impl Iterator<Item = &'static str> {
    let rollout = service.kiln.rollout.as_ref();
    let analysis = rollout.and_then(|r| r.analysis.as_ref());
    let steps = rollout
        .is_some_and(|r| !r.steps.is_empty())
        .then_some("x-kiln.rollout.steps are a canary's: say `strategy: canary`");
    let prometheus = analysis.is_some_and(|a| a.prometheus.is_some()).then_some(
        "x-kiln.rollout.analysis.prometheus is asked at the end of a canary's steps: \
         say `strategy: canary`",
    );
    let unwatched = service.update.monitor == Some(Millis(0));
    let unused = (analysis.is_some() && unwatched).then_some(
        "x-kiln.rollout.analysis judges the time after the switch, which `monitor: 0` takes away",
    );
    [steps, prometheus, unused].into_iter().flatten()
}
