//! How an instance proves that it may take traffic, and that it still should.

use kiln_model::Millis;
use kiln_model::release::ReleasedService;
use kiln_model::spec::{HealthTest, Healthcheck, HealthcheckSetting, Protocol, Ready};
use serde::{Deserialize, Serialize};

/// What the prober does with one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbePlan {
    /// Every one of these must hold before it is ready.
    pub ready: Vec<Probe>,
    /// Asked again and again once it is ready.
    pub health: Option<Probe>,
    pub interval: Millis,
    /// Between attempts until it is ready.
    pub start_interval: Millis,
    pub timeout: Millis,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
    /// It must have been up for this long.
    pub settle: Millis,
    /// Not ready by then: it has failed.
    pub deadline: Millis,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    Exec(Vec<String>),
    /// One of these ports accepts connections; if it speaks HTTP, it answers below 500.
    Serves(Vec<u16>),
    Tcp(u16),
    /// Answers with this status, or below 400 if `None`.
    Http {
        port: u16,
        path: String,
        status: Option<u16>,
    },
}

/// Up this long without a port or a check to ask: long enough to see a program that
/// dies on its configuration.
const SETTLE_BLIND: Millis = Millis(1000);
/// Up this long when a port or check has answered.
const SETTLE_ANSWERED: Millis = Millis(200);
/// The same for a release that has served before: it has shown that it stays up.
const SETTLE_PROVEN: Millis = Millis(50);
/// Without any statement of the user's: the time a slow program may take to answer.
const DEADLINE: Millis = Millis(60_000);
const ASK_EVERY: Millis = Millis(50);

/// Derives the plan from the health check, `x-kiln.ready`, and the ports. `proven`: the
/// release has served before.
pub fn probe_plan(service: &ReleasedService, proven: bool) -> ProbePlan {
    let check = effective_check(service);
    let interval = check
        .as_ref()
        .and_then(|c| c.interval)
        .unwrap_or(Millis::from_secs(30));
    let timeout = check
        .as_ref()
        .and_then(|c| c.timeout)
        .unwrap_or(Millis::from_secs(30));
    let retries = check.as_ref().and_then(|c| c.retries).unwrap_or(3).max(1);
    let start_period = check
        .as_ref()
        .and_then(|c| c.start_period)
        .unwrap_or(Millis(0));
    let health = check
        .as_ref()
        .and_then(|c| exec_of(c, &service.image.config.shell));
    let mut settle = if proven {
        SETTLE_PROVEN
    } else {
        SETTLE_ANSWERED
    };
    let mut ready: Vec<Probe> = Vec::new();
    match &service.service.kiln.ready {
        Some(Ready::Http { port, path, status }) => {
            ready.push(Probe::Http {
                port: *port,
                path: path.clone(),
                status: *status,
            });
        }
        Some(Ready::Tcp { port }) => ready.push(Probe::Tcp(*port)),
        Some(Ready::Settled(span)) => settle = *span,
        None => match &health {
            Some(probe) => ready.push(probe.clone()),
            None => match inferred_ports(service) {
                ports if ports.is_empty() => settle = SETTLE_BLIND,
                ports => ready.push(Probe::Serves(ports)),
            },
        },
    }
    // A health check that may fail `retries` times after its start period has that
    // long to succeed; kiln is never less patient than the check itself.
    let patience = start_period
        .0
        .saturating_add((interval.0 + timeout.0) * u64::from(retries));
    let deadline = match health {
        Some(_) => Millis(patience.max(DEADLINE.0)),
        None => DEADLINE,
    };
    ProbePlan {
        ready,
        start_interval: ASK_EVERY,
        health,
        interval,
        timeout,
        retries,
        settle,
        deadline: deadline.saturating_add(settle),
    }
}

/// The compose file's health check over the image's, key by key.
pub fn effective_check(service: &ReleasedService) -> Option<Healthcheck> {
    merged_check(
        &service.service.health,
        service.image.config.healthcheck.as_ref(),
    )
}

/// As [`effective_check`], before there is a release.
pub fn merged_check(
    setting: &HealthcheckSetting,
    image: Option<&Healthcheck>,
) -> Option<Healthcheck> {
    let image = image.cloned();
    match setting {
        HealthcheckSetting::Disabled => None,
        HealthcheckSetting::Inherit => image,
        HealthcheckSetting::Set(set) => {
            let image = image.unwrap_or_default();
            Some(Healthcheck {
                test: set.test.clone().or(image.test),
                interval: set.interval.or(image.interval),
                timeout: set.timeout.or(image.timeout),
                start_period: set.start_period.or(image.start_period),
                start_interval: set.start_interval.or(image.start_interval),
                retries: set.retries.or(image.retries),
            })
        }
    }
}

fn exec_of(check: &Healthcheck, shell: &[String]) -> Option<Probe> {
    Some(Probe::Exec(match check.test.as_ref()? {
        HealthTest::Exec(argv) => argv.clone(),
        HealthTest::Shell(text) if shell.is_empty() => {
            vec!["/bin/sh".into(), "-c".into(), text.clone()]
        }
        HealthTest::Shell(text) => shell
            .iter()
            .cloned()
            .chain(std::iter::once(text.clone()))
            .collect(),
    }))
}

/// Published ports first: those must answer. Else whatever it is said to listen on.
fn inferred_ports(service: &ReleasedService) -> Vec<u16> {
    let published: Vec<u16> = service
        .service
        .ports
        .iter()
        .filter(|p| p.protocol == Protocol::Tcp)
        .map(|p| p.target)
        .collect();
    if published.is_empty() {
        service.listens.clone()
    } else {
        published
    }
}
