//! Replacing a service while requests keep coming, each of them counted.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kiln_testkit::load::{Load, Mode, Report};
use tokio::sync::oneshot;

use super::Failure;
use super::bed::{Bed, REPLICAS};
use super::table::{Row, Samples};

/// Requests a second.
const RATE: u32 = 500;
/// The load before the command, and after the last old instance is gone.
const AROUND: Duration = Duration::from_millis(300);
/// Removing the old ones must not take longer.
const LIMIT: Duration = Duration::from_secs(60);

/// Something that can replace its instances while its address is being asked.
pub struct Subject<'a> {
    pub who: &'static str,
    pub address: SocketAddr,
    pub aim: Option<Duration>,
    /// With something that has never run: until the last old instance is gone.
    pub replace: &'a mut dyn FnMut(u64) -> Result<Duration, Failure>,
}

/// From the command to the last old instance gone; and the number of failed requests.
pub fn under_load(
    subject: &mut Subject,
    name: &str,
    mode: Mode,
    runs: usize,
) -> Result<(Row, u64), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mut samples = Samples::default();
    let (mut requests, mut failed) = (0, 0);
    let mut slow = Vec::new();
    for run in 0..runs {
        let (stop, stopped) = oneshot::channel::<()>();
        let load = Load::new(subject.address, RATE, mode);
        let load = runtime.spawn(load.run(async move {
            // Either way it is over: told, or the teller is gone.
            let _ = stopped.await;
        }));
        std::thread::sleep(AROUND);
        let replaced = (subject.replace)(revision(name, run));
        std::thread::sleep(AROUND);
        let _ = stop.send(());
        let report = runtime.block_on(load)?;
        samples.add(replaced?);
        requests += report.requests();
        failed += report.failed();
        slow.push(report.latency.percentile(99.0));
        complain(subject.who, run, &report);
    }
    let what = format!("replacing {REPLICAS} instances at {RATE}/s, {name}");
    let mut row = Row::times(&what, subject.who, &samples, subject.aim);
    let p99 = super::table::median(&mut slow).as_secs_f64() * 1000.0;
    row.note = format!("{failed} of {requests} requests failed; p99 {p99:.1} ms");
    Ok((row, failed))
}

/// One that has never run: each replacement needs a change.
fn revision(name: &str, run: usize) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs());
    seconds * 1000 + name.len() as u64 * 20 + run as u64
}

fn complain(who: &str, run: usize, report: &Report) {
    if report.failed() > 0 {
        eprintln!("{who}, run {run}: {report}");
    }
}

/// By `kiln up`.
pub fn by_kiln(bed: &Bed, revision: u64) -> Result<Duration, Failure> {
    let old = bed.instances()?;
    let begun = Instant::now();
    bed.up(revision)?;
    loop {
        let now = bed.instances()?;
        if old.is_disjoint(&now) {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() > LIMIT {
            return Err(format!("old instances are still there: {old:?}").into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
