//! A small model of the world outside: effects are carried out in a seeded random order,
//! and the plan checker looks at every step.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::instance::ExitStatus;
use kiln_model::network::BridgeNetwork;
use kiln_model::release::{ReleasedImage, ReleasedService};
use kiln_model::spec::*;
use kiln_model::*;
use kiln_plan::{
    Conclusion, Effect, Event, Goal, Releases, World, assign_service_addresses, check, step,
};

pub fn service() -> Service {
    let json = serde_json::json!({
        "image": {"reference": "x"}, "pull_policy": "missing", "platform": null,
        "process": {}, "mounts": [], "files": [], "ports": [], "expose": [],
        "network": {"networks": {"default": {}}}, "names": {}, "depends_on": {},
        "health": "inherit", "restart": "no", "security": {}, "limits": {}, "namespaces": {},
        "logging": {"max_size": 1, "max_files": 1, "discard": false}, "replicas": 1,
        "mode": "replicated", "update": {}, "rollback": null, "post_start": [], "pre_stop": [],
        "labels": {}, "annotations": {}, "kiln": {}
    });
    serde_json::from_value(json).unwrap()
}

pub fn released(image: &str, change: impl FnOnce(&mut Service)) -> ReleasedService {
    let mut service = service();
    change(&mut service);
    ReleasedService {
        service,
        image: ReleasedImage {
            name: "x".into(),
            digest: Digest::of(image),
            tree: Digest::of(image),
            config: ImageConfig::default(),
        },
        scratch: vec![],
        listens: vec![80],
        files: BTreeMap::new(),
        mounted_images: BTreeMap::new(),
    }
}

pub fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

pub fn needs(service: &mut Service, other: &str, condition: Condition) {
    let dependency = Dependency {
        condition,
        restart: false,
        required: true,
    };
    service.depends_on.insert(name(other), dependency);
}

/// db (exclusive) ← migrate (job) ← web ×3.
pub fn shop(version: &str) -> Release {
    let db = released(&format!("db {version}"), |s| {
        s.mounts.push(Mount {
            source: MountSource::Volume {
                volume: "data".into(),
                subpath: None,
                nocopy: false,
            },
            target: "/data".into(),
            read_only: false,
            exec: false,
        });
    });
    let migrate = released(&format!("migrate {version}"), |s| {
        needs(s, "db", Condition::Healthy);
    });
    let web = released(&format!("web {version}"), |s| {
        s.replicas = 3;
        needs(s, "db", Condition::Healthy);
        needs(s, "migrate", Condition::CompletedSuccessfully);
    });
    Release {
        format: 1,
        environment: "shop".parse().unwrap(),
        project: "shop".parse().unwrap(),
        services: [
            (name("db"), db),
            (name("migrate"), migrate),
            (name("web"), web),
        ]
        .into(),
        networks: BTreeMap::new(),
        volumes: BTreeMap::new(),
    }
}

pub struct Outside {
    pub world: World,
    pub releases: Releases,
    pub now: u64,
    pub random: u64,
    pub pending: Vec<Effect>,
    pub running: BTreeSet<InstanceId>,
    /// All that were ever started, each as often as it was.
    pub started: Vec<InstanceId>,
    pub concluded: Vec<Conclusion>,
    /// Images whose programs never get ready.
    pub broken: BTreeSet<Digest>,
    pub jobs_fail: bool,
    /// The copy of this number never gets ready.
    pub stubborn: Option<u32>,
    /// Services that had a backend, or let callers wait, in every table since they had one.
    pub gaps: Vec<String>,
    /// What the proxy has counted: requests and failures.
    pub traffic: BTreeMap<InstanceId, (u64, u64)>,
    /// What Prometheus answers.
    pub value: Result<f64, String>,
}

impl Outside {
    pub fn new(seed: u64) -> Self {
        Self {
            world: World::new("shop".parse().unwrap()),
            releases: Releases::default(),
            now: 1_000,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            pending: vec![],
            running: BTreeSet::new(),
            started: vec![],
            concluded: vec![],
            broken: BTreeSet::new(),
            jobs_fail: false,
            stubborn: None,
            gaps: vec![],
            traffic: BTreeMap::new(),
            value: Err("nobody answers".into()),
        }
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % n as u64) as usize
    }

    pub fn up(&mut self, number: u64, release: Release) {
        self.want(number, release, false);
    }

    pub fn roll_back(&mut self, number: u64, release: Release) {
        self.want(number, release, true);
    }

    fn want(&mut self, number: u64, release: Release, rollback: bool) {
        let mut layout = self.world.layout.clone();
        layout
            .networks
            .entry("default".parse().unwrap())
            .or_insert_with(|| BridgeNetwork {
                name: "shop_default".into(),
                bridge: "kn0".into(),
                subnet: "10.9.0.0/24".parse().unwrap(),
                internal: false,
                mtu: None,
            });
        assert!(assign_service_addresses(&mut layout, &release).is_empty());
        self.releases
            .insert(ReleaseNumber(number), release)
            .unwrap();
        self.happened(Event::Desired {
            goal: Goal::Release(ReleaseNumber(number)),
            layout,
            rollback,
        });
    }

    pub fn happened(&mut self, event: Event) {
        self.now += 10;
        let plan = step(&mut self.world, &self.releases, event, Millis(self.now));
        check(&self.world, &self.releases, &plan).unwrap();
        for effect in plan.effects {
            match effect {
                Effect::Conclude(c) => {
                    self.concluded.push(c.clone());
                    self.happened(Event::Concluded { conclusion: c });
                }
                other => self.pending.push(other),
            }
        }
    }

    pub fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::EnsureNetworks { wish, .. } => self.happened(Event::NetworksReady { wish }),
            Effect::Start { id } => {
                self.running.insert(id.clone());
                self.started.push(id.clone());
                let job = self.world.instances.get(&id).unwrap().job;
                self.happened(Event::Started { id: id.clone() });
                if job {
                    self.running.remove(&id);
                    let status = ExitStatus::Code(i32::from(self.jobs_fail));
                    self.happened(Event::Exited { id, status });
                }
            }
            Effect::Observe { id, .. } => {
                let Some(i) = self.world.instances.get(&id) else {
                    return;
                };
                let image = self.releases.service_of(i).unwrap().image.digest;
                let stubborn = self.stubborn == Some(i.index) && !i.phase.ready();
                let event = match self.broken.contains(&image) || stubborn {
                    true => Event::Unhealthy {
                        id,
                        reason: "never answered".into(),
                    },
                    false => Event::Ready { id },
                };
                self.happened(event);
            }
            Effect::Route(table) => {
                for (service, route) in &table.services {
                    let before = self
                        .world
                        .routes
                        .as_ref()
                        .and_then(|t| t.services.get(service));
                    let had = before.is_some_and(|r| !r.backends.is_empty());
                    if had && route.backends.is_empty() && route.mode == route::RouteMode::Serve {
                        self.gaps.push(service.to_string());
                    }
                }
                self.happened(Event::Routed {
                    table,
                    failed: None,
                });
            }
            Effect::Measure { number, instances } => {
                let counted = |id: InstanceId| {
                    let (requests, failed) = self.traffic.get(&id).copied().unwrap_or_default();
                    let latency = traffic::Latency::default();
                    let traffic = Traffic {
                        requests,
                        failed,
                        latency,
                    };
                    (id, traffic)
                };
                let traffic = instances.into_iter().map(counted).collect();
                self.happened(Event::Measured { number, traffic });
            }
            Effect::Query { service, .. } => {
                let value = self.value.clone();
                self.happened(Event::Queried { service, value });
            }
            Effect::Drain { id, .. } => self.happened(Event::Drained { id }),
            Effect::Stop { id, .. } => {
                self.running.remove(&id);
                self.happened(Event::Exited {
                    id,
                    status: ExitStatus::Code(0),
                });
            }
            Effect::Remove { id } => {
                assert!(!self.running.contains(&id), "{id} removed while it runs");
                self.happened(Event::Removed { id });
            }
            Effect::Conclude(_) => unreachable!(),
        }
    }

    pub fn carry_one_out(&mut self) {
        let n = self.below(self.pending.len());
        let effect = self.pending.remove(n);
        self.carry_out(effect);
    }

    /// All there is to be done, without waiting for anything.
    pub fn carry_all_out(&mut self) {
        for _ in 0..2_000 {
            match self.pending.is_empty() {
                true => return,
                false => self.carry_one_out(),
            }
        }
        panic!("no end: {:#?}", self.world);
    }

    /// For so many seconds.
    pub fn carry_for(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.carry_all_out();
            self.now += 1_000;
            self.happened(Event::Tick);
        }
        self.carry_all_out();
    }

    pub fn settle(&mut self) {
        for _ in 0..2_000 {
            if self.pending.is_empty() {
                self.now += 100_000;
                self.happened(Event::Tick);
                if self.pending.is_empty() && self.world.settled() {
                    return;
                }
                continue;
            }
            self.carry_one_out();
        }
        panic!("did not settle: {:#?}", self.world);
    }

    /// The caller dies: effects under way are lost, and are carried out or not.
    pub fn crash(&mut self) {
        let half = self.below(self.pending.len() + 1);
        let lost: Vec<Effect> = self.pending.drain(..).collect();
        for effect in lost.into_iter().take(half) {
            match effect {
                // A job is over by the time anyone looks.
                Effect::Start { id } if !self.world.instances.get(&id).unwrap().job => {
                    self.running.insert(id);
                }
                Effect::Stop { id, .. } => {
                    self.running.remove(&id);
                }
                _ => {}
            }
        }
        let stored = serde_json::to_string(&self.world).unwrap();
        let world: World = serde_json::from_str(&stored).unwrap();
        self.world = world.recovered();
        let instances = self
            .running
            .iter()
            .map(|id| instance::Observed {
                id: id.clone(),
                state: instance::ObservedState::Running {
                    pid: 1,
                    since: Millis(self.now),
                },
                warnings: vec![],
            })
            .collect();
        self.happened(Event::Found { instances });
    }

    pub fn serving(&self, service: &str) -> Vec<Digest> {
        let table = self.world.routes.as_ref().unwrap();
        table.services[&name(service)]
            .backends
            .iter()
            .map(|b| self.world.instances.get(&b.instance).unwrap().revision)
            .collect()
    }
}

pub fn revision(release: &Release, service: &str) -> Digest {
    release.services[&name(service)].revision().unwrap()
}

pub fn only(outside: &Outside, service: &str) -> InstanceId {
    let service = name(service);
    let mut ids = outside.world.of_service(&service).map(|(id, _)| id.clone());
    let id = ids.next().unwrap();
    assert!(ids.next().is_none());
    id
}
