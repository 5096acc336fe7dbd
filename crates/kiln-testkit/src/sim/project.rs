//! Random projects and how their programs behave.

use std::collections::BTreeMap;

use kiln_model::release::{Release, ReleasedImage, ReleasedService};
use kiln_model::spec::{
    Analysis, CanaryStep, Condition, Dependency, FailureAction, HealthTest, Healthcheck,
    HealthcheckSetting, Mount, MountSource, NetworkMode, Number, Order, Prometheus, RestartPolicy,
    RolloutOptions, Service, ServiceMode, Strategy, UpdateConfig,
};
use kiln_model::{Digest, ImageConfig, Millis, ServiceName};

use super::rng::Rng;

/// What a program does, whatever it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Ready after this long, and then well.
    Good {
        boot: u64,
    },
    StartFails,
    /// Its `post_start` hook fails.
    HookFails,
    /// Ends with a failure this long after its start.
    Ends {
        after: u64,
        boot: u64,
    },
    NeverReady,
    /// Ready, and then its health check fails again and again.
    Sickens {
        after: u64,
        boot: u64,
    },
    /// Ready and well, but so many of a thousand answers are errors.
    Fails {
        boot: u64,
        permille: u64,
    },
    /// A job's.
    Done {
        after: u64,
        code: i32,
    },
}

impl Behaviour {
    /// It can never be proven.
    pub fn hopeless(self, job: bool) -> bool {
        match self {
            Behaviour::StartFails | Behaviour::HookFails | Behaviour::NeverReady => true,
            Behaviour::Ends { after, boot } => after < boot,
            // A program without a port is taken for ready after a second.
            Behaviour::Done { code, after } => code != 0 && (job || after < 900),
            Behaviour::Good { .. } | Behaviour::Sickens { .. } | Behaviour::Fails { .. } => false,
        }
    }

    pub fn good(self) -> bool {
        matches!(
            self,
            Behaviour::Good { .. } | Behaviour::Done { code: 0, .. }
        )
    }
}

/// The file on the user's disk, as it is edited from release to release.
pub struct Project {
    services: BTreeMap<ServiceName, ReleasedService>,
    behaviours: BTreeMap<Digest, Behaviour>,
    /// As serde has it: a service with nothing stated.
    blank: Service,
    images: u64,
}

/// Of a good release's services.
pub const LONGEST_AGE: u64 = 500_000;

const NAMES: [&str; 5] = ["db", "cache", "api", "web", "worker"];

impl Project {
    pub fn random(rng: &mut Rng) -> Result<Self, serde_json::Error> {
        let mut project = Self {
            services: BTreeMap::new(),
            behaviours: BTreeMap::new(),
            blank: blank()?,
            images: 0,
        };
        for _ in 0..rng.between(1, 3) {
            project.add_service(rng);
        }
        if rng.permille(300) {
            project.add_job(rng);
        }
        Ok(project)
    }

    pub fn behaviour(&self, image: &Digest) -> Behaviour {
        let unknown = Behaviour::Good { boot: 10 };
        self.behaviours.get(image).copied().unwrap_or(unknown)
    }

    /// It is no server: it does its work and may rest.
    pub fn ends_well(&self, name: &ServiceName) -> bool {
        let image = self.services.get(name).map(|s| s.image.digest);
        image.is_some_and(|i| matches!(self.behaviour(&i), Behaviour::Done { code: 0, .. }))
    }

    pub fn release(&self) -> Result<Release, kiln_model::IdError> {
        Ok(Release {
            format: Release::FORMAT,
            environment: "shop".parse()?,
            project: "shop".parse()?,
            services: self.services.clone(),
            networks: BTreeMap::new(),
            volumes: BTreeMap::new(),
        })
    }

    /// One edit. `good`: all images that behave badly are replaced as well, and what is
    /// replaced for its age comes to rest in between.
    pub fn edit(&mut self, rng: &mut Rng, good: bool) {
        let names: Vec<ServiceName> = self.services.keys().cloned().collect();
        match rng.below(12) {
            0 => self.add_service(rng),
            1 if names.len() > 1 => {
                if let Some(name) = rng.pick(&names) {
                    self.remove(name);
                }
            }
            2 | 3 => self.change(rng, &names, |service, rng| {
                if service.service.mode != ServiceMode::Job {
                    service.service.replicas = rng.between(1, 3) as u32;
                }
            }),
            4 => self.change(rng, &names, |service, rng| {
                let value = rng.next().to_string();
                let environment = &mut service.service.process.environment;
                environment.insert("SETTING".into(), value);
            }),
            5 => self.change(rng, &names, settings),
            6 => {}
            _ => {
                for name in &names {
                    if rng.permille(500) {
                        self.new_image(rng, name, good);
                    }
                }
            }
        }
        if good {
            for service in self.services.values_mut() {
                let age = &mut service.service.kiln.max_age;
                *age = age.map(|_| Millis(rng.between(300_000, LONGEST_AGE)));
                let rollout = service.service.kiln.rollout.as_mut();
                if let Some(analysis) = rollout.and_then(|r| r.analysis.as_mut()) {
                    // What nobody can judge would wait for somebody.
                    analysis.min_requests = None;
                    analysis.prometheus = None;
                }
            }
            for name in names {
                let bad = self
                    .services
                    .get(&name)
                    .is_some_and(|s| !self.behaviour(&s.image.digest).good());
                if bad {
                    self.new_image(rng, &name, true);
                }
            }
        }
    }

    fn change(
        &mut self,
        rng: &mut Rng,
        names: &[ServiceName],
        change: impl FnOnce(&mut ReleasedService, &mut Rng),
    ) {
        if let Some(service) = rng.pick(names).and_then(|n| self.services.get_mut(n)) {
            change(service, rng);
        }
    }

    fn remove(&mut self, name: &ServiceName) {
        self.services.remove(name);
        for other in self.services.values_mut() {
            other.service.depends_on.remove(name);
            if other.service.network == NetworkMode::Service(name.clone()) {
                other.service.network = self.blank.network.clone();
            }
        }
    }

    fn add_service(&mut self, rng: &mut Rng) {
        let free = NAMES
            .iter()
            .filter_map(|n| n.parse::<ServiceName>().ok())
            .find(|n| !self.services.contains_key(n));
        let Some(name) = free else { return };
        let mut service = self.blank.clone();
        service.replicas = rng.between(1, 3) as u32;
        if rng.permille(350) {
            service.replicas = 1;
            service.mounts.push(Mount {
                source: MountSource::Volume {
                    volume: format!("{name}-data"),
                    subpath: None,
                    nocopy: false,
                },
                target: "/data".into(),
                read_only: false,
                exec: false,
            });
        }
        let lasting = |s: &&ReleasedService| s.service.restart != RestartPolicy::No;
        let others: Vec<ServiceName> = self
            .services
            .iter()
            .filter(|(_, s)| lasting(s))
            .map(|(n, _)| n.clone())
            .collect();
        if rng.permille(400)
            && let Some(other) = rng.pick(&others)
        {
            let condition = match rng.permille(700) {
                true => Condition::Healthy,
                false => Condition::Started,
            };
            depend(&mut service, other, condition);
            let how = service.depends_on.get_mut(other);
            if let Some(how) = how.filter(|_| rng.permille(300)) {
                how.restart = true;
            }
        }
        if rng.permille(100)
            && let Some(other) = rng.pick(&others)
            && let Some(NetworkMode::Networks(_)) =
                self.services.get(other).map(|s| &s.service.network)
        {
            service.network = NetworkMode::Service(other.clone());
        }
        let mut released = ReleasedService {
            service,
            image: ReleasedImage {
                name: name.to_string(),
                digest: Digest::of(""),
                tree: Digest::of(""),
                config: ImageConfig::default(),
            },
            scratch: Vec::new(),
            listens: vec![80],
            files: BTreeMap::new(),
            mounted_images: BTreeMap::new(),
        };
        if rng.permille(80) {
            // It does something and ends.
            released.listens.clear();
            released.service.mounts.clear();
        } else {
            released.service.restart = RestartPolicy::Always;
            settings(&mut released, rng);
        }
        self.services.insert(name.clone(), released);
        self.new_image(rng, &name, true);
    }

    /// A migration that every other service waits for.
    fn add_job(&mut self, rng: &mut Rng) {
        let Ok(name) = "migrate".parse::<ServiceName>() else {
            return;
        };
        let Some(mut job) = self.services.values().next().cloned() else {
            return;
        };
        job.service = self.blank.clone();
        job.service.mode = ServiceMode::Job;
        job.listens.clear();
        for (other, service) in &mut self.services {
            if !service.service.mounts.is_empty() {
                depend(&mut job.service, other, Condition::Healthy);
            } else {
                depend(
                    &mut service.service,
                    &name,
                    Condition::CompletedSuccessfully,
                );
            }
        }
        // What the job itself waits for must not wait for what waits for the job.
        let first: Vec<ServiceName> = job.service.depends_on.keys().cloned().collect();
        for other in first {
            if let Some(service) = self.services.get_mut(&other) {
                service.service.depends_on.clear();
                service.service.network = self.blank.network.clone();
            }
        }
        self.services.insert(name.clone(), job);
        self.new_image(rng, &name, true);
    }

    /// One server gets a program whose answers are errors, or a good one, and, if it can,
    /// its traffic moves step by step.
    pub fn change_traffic(&mut self, rng: &mut Rng, fails: bool) -> Option<ServiceName> {
        let (name, service) = self.one_server(rng)?;
        let update = &mut service.service.update;
        update.monitor = rng.permille(500).then_some(Millis(20_000));
        update.failure_action = None;
        let options = rng.permille(600).then(|| RolloutOptions {
            strategy: Some(Strategy::Canary),
            steps: steps(rng),
            ..RolloutOptions::default()
        });
        service.service.kiln.rollout = options;
        let boot = rng.between(5, 300);
        let behaviour = match fails {
            true => Behaviour::Fails {
                boot,
                permille: rng.between(500, 1_000),
            },
            false => Behaviour::Good { boot },
        };
        let image = service.image.digest;
        self.behaviours.insert(image, behaviour);
        Some(name)
    }

    /// One server gets a program that ends soon after it has proven itself, with a watch
    /// that is long enough to see it.
    pub fn spoil(&mut self, rng: &mut Rng) -> Option<ServiceName> {
        let (name, service) = self.one_server(rng)?;
        let update = &mut service.service.update;
        update.monitor = rng.permille(500).then_some(Millis(20_000));
        update.failure_action = None;
        update.max_failure_ratio = None;
        let boot = rng.between(5, 300);
        let after = boot + 2_000 + rng.below(2_000);
        let ends = Behaviour::Ends { after, boot };
        let image = service.image.digest;
        self.behaviours.insert(image, ends);
        Some(name)
    }

    /// With a new image.
    fn one_server(&mut self, rng: &mut Rng) -> Option<(ServiceName, &mut ReleasedService)> {
        let servers: Vec<ServiceName> = self
            .services
            .iter()
            .filter(|(_, s)| s.service.restart == RestartPolicy::Always)
            .map(|(name, _)| name.clone())
            .collect();
        let name = rng.pick(&servers).cloned()?;
        self.new_image(rng, &name, true);
        let service = self.services.get_mut(&name)?;
        Some((name, service))
    }

    fn new_image(&mut self, rng: &mut Rng, name: &ServiceName, good: bool) {
        let Some(service) = self.services.get_mut(name) else {
            return;
        };
        self.images += 1;
        let digest = Digest::of(format!("{name} {}", self.images));
        service.image.digest = digest;
        service.image.tree = digest;
        let job = service.service.mode == ServiceMode::Job;
        let good = good || rng.permille(650);
        // With no policy it is no server: it does something and ends.
        let ends = job || service.service.restart == RestartPolicy::No;
        self.behaviours.insert(digest, behaviour(rng, ends, good));
    }
}

fn behaviour(rng: &mut Rng, job: bool, good: bool) -> Behaviour {
    let boot = match rng.permille(800) {
        true => rng.between(5, 300),
        false => rng.between(300, 20_000),
    };
    match (job, good) {
        (true, _) => Behaviour::Done {
            after: boot,
            code: i32::from(!good),
        },
        (false, true) => Behaviour::Good { boot },
        (false, false) => match rng.below(7) {
            6 => Behaviour::Fails {
                boot,
                permille: rng.between(200, 1_000),
            },
            0 => Behaviour::StartFails,
            5 => Behaviour::HookFails,
            1 => Behaviour::NeverReady,
            2 => Behaviour::Ends {
                after: rng.between(1, 400),
                boot: 500,
            },
            3 => Behaviour::Ends {
                after: boot + rng.between(300, 30_000),
                boot,
            },
            _ => Behaviour::Sickens {
                after: boot + rng.between(300, 30_000),
                boot,
            },
        },
    }
}

fn depend(service: &mut Service, other: &ServiceName, condition: Condition) {
    let dependency = Dependency {
        condition,
        restart: false,
        required: true,
    };
    service.depends_on.insert(other.clone(), dependency);
}

fn rollout(rng: &mut Rng) -> RolloutOptions {
    let strategy = match rng.below(5) {
        0 => Strategy::Rolling,
        1 => Strategy::BlueGreen,
        2 => Strategy::Recreate,
        _ => Strategy::Canary,
    };
    let steps = match strategy {
        Strategy::Canary => steps(rng),
        _ => Vec::new(),
    };
    RolloutOptions {
        strategy: Some(strategy),
        keep_warm: rng.permille(500).then(|| Millis(rng.below(60_000))),
        steps,
        analysis: rng.permille(500).then(|| analysis(rng)),
    }
}

/// Weights that rise, as in compose files.
fn steps(rng: &mut Rng) -> Vec<CanaryStep> {
    let mut weight = 0;
    let mut step = |_| {
        weight += rng.between(1, 33) as u8;
        CanaryStep {
            weight,
            duration: Millis(rng.between(500, 10_000)),
        }
    };
    let steps = (1..=3).map(&mut step).collect::<Vec<_>>();
    let count = rng.between(1, 3) as usize;
    steps.into_iter().take(count).collect()
}

fn analysis(rng: &mut Rng) -> Analysis {
    let limit = rng.between(10_000, 100_000) as u32;
    Analysis {
        max_error_rate: rng.permille(500).then_some(limit),
        max_error_rate_increase: rng.permille(500).then_some(limit),
        min_requests: rng.permille(300).then(|| rng.between(1, 40)),
        prometheus: rng.permille(200).then(|| Prometheus {
            url: "http://127.0.0.1:9090".into(),
            query: "failures".into(),
            min: None,
            max: Number::new(0.5),
        }),
        ..Analysis::default()
    }
}

/// What a file may say about how a service is kept and replaced.
/// As compose files say it; there `max_age` is refused with it.
fn stops_first(service: &Service) -> bool {
    let strategy = service
        .kiln
        .rollout
        .as_ref()
        .and_then(|r| r.strategy.as_ref());
    strategy == Some(&Strategy::Recreate)
        || (service.update.order == Some(Order::StopFirst) && service.replicas > 1)
}

fn settings(released: &mut ReleasedService, rng: &mut Rng) {
    let service = &mut released.service;
    if service.mode == ServiceMode::Job || service.restart == RestartPolicy::No {
        return;
    }
    service.restart = match rng.below(4) {
        0 => RestartPolicy::OnFailure {
            max_retries: Some(rng.between(1, 5) as u32),
        },
        1 => RestartPolicy::UnlessStopped,
        _ => RestartPolicy::Always,
    };
    service.kiln.drain = rng.permille(500).then(|| Millis(rng.below(5_000)));
    service.process.stop_grace = rng.permille(500).then(|| Millis(rng.below(3_000)));
    service.update.parallelism = rng.permille(300).then(|| rng.between(0, 3) as u32);
    service.update.delay = rng.permille(200).then(|| Millis(rng.below(3_000)));
    service.update.order = rng.permille(150).then(|| match rng.permille(500) {
        true => Order::StartFirst,
        false => Order::StopFirst,
    });
    if !service.mounts.is_empty() {
        service.update.order = None;
    }
    service.update.monitor = rng.permille(300).then(|| Millis(rng.below(40_000)));
    service.update.failure_action = rng.permille(200).then(|| match rng.below(3) {
        0 => FailureAction::Pause,
        1 => FailureAction::Continue,
        _ => FailureAction::Rollback,
    });
    service.update.max_failure_ratio = rng.permille(200).then(|| rng.below(1_001) as u32);
    service.rollback = rng.permille(200).then(|| UpdateConfig {
        parallelism: rng.permille(500).then(|| rng.between(0, 3) as u32),
        monitor: rng.permille(500).then(|| Millis(rng.below(20_000))),
        ..UpdateConfig::default()
    });
    service.kiln.rollout = rng.permille(400).then(|| rollout(rng));
    service.kiln.max_age = match stops_first(service) {
        true => None,
        false => rng
            .permille(100)
            .then(|| Millis(rng.between(20_000, 100_000))),
    };
    service.health = match rng.permille(600) {
        true => HealthcheckSetting::Set(Healthcheck {
            test: Some(HealthTest::Exec(vec!["check".into()])),
            interval: Some(Millis(rng.between(500, 10_000))),
            timeout: Some(Millis(1_000)),
            retries: Some(rng.between(1, 3) as u32),
            ..Healthcheck::default()
        }),
        false => HealthcheckSetting::Inherit,
    };
    let own = matches!(service.network, NetworkMode::Networks(_));
    if own && service.mounts.is_empty() && rng.permille(50) {
        service.network = NetworkMode::Host;
    }
}

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
