//! How long it takes from asking for an instance to the first byte its program prints.

use std::fs;
use std::time::{Duration, Instant};

use kiln_model::instance::{InstanceNetwork, InstanceSpec, Purpose};
use kiln_runtime::{Runtime, RuntimeConfig};

use super::Failure;
use super::bed::Bed;
use super::table::{Row, Samples};

/// A start that takes longer than this has failed.
const LIMIT: Duration = Duration::from_secs(10);

/// Starts copies of a serving instance with another program in an empty network of their
/// own: what the runtime costs, without readiness, proxy and planner.
pub fn first_byte(bed: &Bed, runs: usize) -> Result<Row, Failure> {
    let model = model(bed)?;
    let runtime = Runtime::open(RuntimeConfig {
        root: bed.scratch(),
        shim: vec![bed.program().into(), "shim".into()],
    })?;
    let mut samples = Samples::default();
    for run in 0..=runs {
        let mut spec = model.clone();
        spec.id = format!("bench-{run}").parse()?;
        let taken = once(&runtime, &spec);
        runtime.remove(&spec.id)?;
        // The first one finds nothing in the page cache.
        if run > 0 {
            samples.add(taken?);
        }
    }
    let bar = Some(Duration::from_millis(60));
    Ok(Row::times(
        "instance start to first byte",
        "kiln",
        &samples,
        bar,
    ))
}

fn model(bed: &Bed) -> Result<InstanceSpec, Failure> {
    let instances = bed.instances()?;
    let id = instances.first().ok_or("no instance runs")?;
    let path = bed.root().join("instances").join(id).join("spec.json");
    let mut spec: InstanceSpec = serde_json::from_slice(&fs::read(path)?)?;
    spec.purpose = Purpose::Test;
    spec.network = InstanceNetwork::Isolated;
    spec.argv = ["/bin/busybox", "echo", "x"].map(Into::into).to_vec();
    Ok(spec)
}

fn once(runtime: &Runtime, spec: &InstanceSpec) -> Result<Duration, Failure> {
    let begun = Instant::now();
    runtime.start(spec)?;
    loop {
        let written = runtime.log_files(&spec.id);
        if written
            .iter()
            .any(|file| fs::metadata(file).is_ok_and(|m| m.len() > 0))
        {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() > LIMIT {
            return Err("an instance printed nothing".into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
