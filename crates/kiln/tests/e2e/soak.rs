//! One replacement after the other under all kinds of load at once. In short here, in full
//! by `cargo xtask soak`.

use std::time::Duration;

use kiln_testkit::load::{Load, Mode};

use crate::common::{App, Kiln, wait_until};
use crate::matrix::{at, every_way, under};

/// Between two replacements.
const PAUSE: Duration = Duration::from_millis(500);

/// So many loads share the rate: every way, and two of plain requests.
const LOADS: u32 = 7;

/// How long it is to be.
struct Length {
    replacements: u32,
    /// A second, over all loads.
    rate: u32,
    requests: u64,
}

const SHORT: Length = Length {
    replacements: 6,
    rate: 500,
    requests: 10_000,
};
const FULL: Length = Length {
    replacements: 50,
    rate: 500,
    requests: 100_000,
};

fn length() -> Length {
    match std::env::var("KILN_SOAK").as_deref() {
        Ok("full") => FULL,
        Ok(other) => panic!("KILN_SOAK is `full` or not there, not {other}"),
        Err(_) => SHORT,
    }
}

#[test]
fn replacements_one_after_the_other_fail_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let app = App {
        environment: "      APP_DELAY_MS: 5",
        keys: "    deploy: {replicas: 3}",
        ..App::default()
    };
    let mut project = kiln.app("soak", &app);
    project.up().ok();
    let length = length();
    let each = length.rate.div_ceil(LOADS);
    let mut loads = every_way(project.port, each);
    for mode in [Mode::NewConnection, Mode::KeepAlive { connections: 16 }] {
        loads.push(Load::new(at(project.port), each, mode));
    }
    let least = Duration::from_secs(length.requests / u64::from(length.rate) + 1);
    let begun = std::time::Instant::now();
    let reports = under(loads, || {
        for version in 2..length.replacements + 2 {
            project.set("VERSION", version);
            project.up().ok();
            assert_eq!(project.page(), version.to_string());
            std::thread::sleep(PAUSE);
        }
        std::thread::sleep(least.saturating_sub(begun.elapsed()));
    });
    for report in &reports {
        println!("{report}");
        assert_eq!(report.failed(), 0, "{report}");
        // Those that outlive the drain limit are closed, but never without a frame.
        assert!(!report.closed_websockets.contains_key(&None), "{report}");
    }
    let requests: u64 = reports
        .iter()
        .map(kiln_testkit::load::Report::requests)
        .sum();
    assert!(requests >= length.requests, "{requests} requests");
    let last = u64::from(length.replacements + 1);
    wait_until("the last three alone", || {
        let all = project.instances_if_known();
        all.len() == 3 && all.iter().all(|i| i.serving && i.release == last)
    });
}
