//! One host with two hundred instances.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Failure;
use super::bed::Bed;
use super::memory::proportional;
use super::table::{Row, Samples};

const INSTANCES: u32 = 200;
/// For health checks and logs to fall silent.
const SETTLE: Duration = Duration::from_secs(10);
/// How long the daemon is watched doing nothing.
const IDLE: Duration = Duration::from_secs(20);

pub fn instances(bed: &Bed, runs: usize) -> Result<Vec<Row>, Failure> {
    let daemon = *bed.processes()?.first().ok_or("no daemon")?;
    let few = bed.instances()?.len() as u64;
    let before = proportional(daemon)?;
    let begun = Instant::now();
    bed.scale(INSTANCES)?;
    let started = begun.elapsed().as_secs_f64();
    std::thread::sleep(SETTLE);
    let many = bed.instances()?.len() as u64;
    if many < u64::from(INSTANCES) {
        return Err(format!("{many} of {INSTANCES} instances run").into());
    }
    let each = proportional(daemon)?.saturating_sub(before) / (many - few).max(1);
    let ticks = cpu_ticks(daemon)?;
    std::thread::sleep(IDLE);
    let spent = cpu_ticks(daemon)? - ticks;
    // USER_HZ is 100 on every Linux that kiln runs on (time(7)).
    let percent = spent as f64 / IDLE.as_secs_f64();
    let mut status = Samples::default();
    for _ in 0..runs {
        let begun = Instant::now();
        bed.status()?;
        status.add(begun.elapsed());
    }
    let what = |what: &str| format!("{INSTANCES} instances: {what}");
    let row = |name: &str, value: String, bar: &str, note: String| Row {
        what: what(name),
        who: "kiln".into(),
        value,
        worst: String::new(),
        bar: bar.into(),
        note,
    };
    let rows = vec![
        Row::times(
            &what("kiln status"),
            "kiln",
            &status,
            Some(Duration::from_millis(200)),
        ),
        row(
            "daemon's CPU, idle",
            format!("{percent:.2} %"),
            "1 %",
            format!("over {} s; all started in {started:.1} s", IDLE.as_secs()),
        ),
        row(
            "daemon's memory each (PSS)",
            format!("{each} KiB"),
            "100 KiB",
            String::new(),
        ),
    ];
    bed.scale(super::bed::REPLICAS)?;
    Ok(rows)
}

/// User and system time, in 1/100 s: fields 14 and 15 of `/proc/<pid>/stat` (proc(5)).
fn cpu_ticks(pid: u32) -> Result<u64, Failure> {
    let path = Path::new("/proc").join(pid.to_string()).join("stat");
    let text = std::fs::read_to_string(&path)?;
    let (_, rest) = text.rsplit_once(')').ok_or("no process name")?;
    let fields = rest.split_whitespace().skip(11).take(2);
    fields.map(|f| Ok(f.parse::<u64>()?)).sum()
}
