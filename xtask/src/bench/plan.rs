//! One step of the loop for a very large project: everything in memory, nothing stored.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use kiln_model::release::{Release, ReleasedImage, ReleasedService};
use kiln_model::spec::{RestartPolicy, Service};
use kiln_model::{Digest, EnvironmentName, ImageConfig, Millis, ReleaseNumber, ServiceName};
use kiln_plan::{Effect, Event, Goal, Health, Instance, Keeper, Memory, Phase, World};

use super::Failure;
use super::table::{Row, Samples};

const SERVICES: usize = 1000;
const COPIES: u32 = 10;
const NOW: Millis = Millis(1_000_000);

/// Knows one release; saving is not measured here.
struct Only(Release);

impl Memory for Only {
    fn save(&self, _: &World) -> Result<(), String> {
        Ok(())
    }

    fn release(&self, _: &EnvironmentName, _: ReleaseNumber) -> Result<Option<Release>, String> {
        Ok(Some(self.0.clone()))
    }
}

/// Planning when nothing changes, and when one instance of ten thousand has ended.
pub fn steps(runs: usize) -> Result<Vec<Row>, Failure> {
    let memory = Only(release()?);
    let mut keeper = settled(&memory)?;
    let mut quiet = Samples::default();
    let mut ended = Samples::default();
    for run in 0..runs {
        let begun = Instant::now();
        let plan = keeper.take(&memory, Event::Tick, NOW)?;
        quiet.add(begun.elapsed());
        if !plan.effects.is_empty() {
            return Err(format!("a quiet world has {} effects", plan.effects.len()).into());
        }
        let mut other = keeper.clone();
        let id = other.world.instances.keys().nth(run);
        let id = id.cloned().ok_or("no instance")?;
        let status = kiln_model::instance::ExitStatus::Code(1);
        let begun = Instant::now();
        let plan = other.take(&memory, Event::Exited { id, status }, NOW)?;
        ended.add(begun.elapsed());
        if plan.effects.is_empty() {
            return Err("an instance has ended, and nothing is done".into());
        }
    }
    let what = |when: &str| format!("plan {SERVICES} services × {COPIES}, {when}");
    let bar = Some(Duration::from_millis(50));
    Ok(vec![
        Row::times(&what("nothing new"), "kiln", &quiet, bar),
        Row::times(&what("one instance ended"), "kiln", &ended, bar),
    ])
}

fn release() -> Result<Release, Failure> {
    let mut release = Release {
        format: Release::FORMAT,
        environment: "large".parse()?,
        project: "large".parse()?,
        services: Default::default(),
        networks: Default::default(),
        volumes: Default::default(),
    };
    let mut before: Option<ServiceName> = None;
    for n in 0..SERVICES {
        let name: ServiceName = format!("service{n}").parse()?;
        let mut service = blank()?;
        service.replicas = COPIES;
        service.restart = RestartPolicy::Always;
        service
            .process
            .environment
            .insert("NUMBER".into(), n.to_string());
        if let Some(other) = before.take() {
            let how =
                serde_json::json!({"condition": "healthy", "restart": false, "required": true});
            service
                .depends_on
                .insert(other, serde_json::from_value(how)?);
        }
        before = Some(name.clone());
        let image = ReleasedImage {
            name: name.to_string(),
            digest: Digest::of(""),
            tree: Digest::of(""),
            config: ImageConfig::default(),
        };
        let released = ReleasedService {
            service,
            image,
            scratch: Vec::new(),
            listens: vec![80],
            files: Default::default(),
            mounted_images: Default::default(),
        };
        release.services.insert(name, released);
    }
    Ok(release)
}

/// A service with nothing stated.
fn blank() -> Result<Service, serde_json::Error> {
    serde_json::from_value(serde_json::json!({
        "image": {"reference": "x"}, "pull_policy": "missing", "platform": null,
        "process": {}, "mounts": [], "files": [], "ports": [], "expose": [],
        "network": {"networks": {"default": {}}}, "names": {}, "depends_on": {},
        "health": "inherit", "restart": "no", "security": {}, "limits": {}, "namespaces": {},
        "logging": {"max_size": 1, "max_files": 1, "discard": false}, "replicas": 1,
        "mode": "replicated", "update": {}, "rollback": null, "post_start": [], "pre_stop": [],
        "labels": {}, "annotations": {}, "kiln": {}
    }))
}

/// All copies are ready, all traffic goes to them, and nothing is under way.
fn settled(memory: &Only) -> Result<Keeper, Failure> {
    let number = ReleaseNumber(1);
    let mut world = World::new("large".parse()?);
    world.goal = Goal::Release(number);
    world.proven = Some(number);
    let mut keeper = Keeper::resume(world);
    keeper.load(memory, None)?;
    keeper.world.networks_ready = true;
    let prepared = keeper.releases.get(number).ok_or("no release")?;
    let mut counter = 0u32;
    for (name, revision) in &prepared.revisions {
        for index in 1..=COPIES {
            counter += 1;
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + counter);
            let instance = Instance {
                service: name.clone(),
                release: number,
                revision: *revision,
                index,
                job: false,
                addresses: [("default".parse()?, address)].into(),
                joined: Default::default(),
                phase: Phase::Ready { since: NOW },
                health: Health::Healthy,
                tainted: false,
                created: NOW,
            };
            let id = format!("large-{name}-{counter}").parse()?;
            keeper.world.instances.insert(id, instance);
        }
    }
    // The proxy confirms the first table; observing goes on.
    let plan = keeper.take(memory, Event::Tick, NOW)?;
    for effect in plan.effects {
        if let Effect::Route(table) = effect {
            let failed = None;
            keeper.take(memory, Event::Routed { table, failed }, NOW)?;
        }
    }
    match keeper.world.settled() {
        true => Ok(keeper),
        false => Err(format!("not settled: {:?}", keeper.world.under_way.keys().next()).into()),
    }
}
