//! What the proxy counts, and that no more traffic goes to a canary than its steps say.

use kiln_model::release::{Outcome, ReleasedService};
use kiln_model::route::RoutingTable;
use kiln_model::spec::{CanaryStep, NetworkMode, Order, Strategy};
use kiln_model::{Digest, InstanceId, ServiceName};
use kiln_plan::{Event, Health, is_exclusive};

use super::laws::{Broken, Plant};
use super::project::Behaviour;
use super::run::Sim;

/// The revisions whose traffic a canary divides, and how.
struct Steps {
    new: Digest,
    old: Digest,
    steps: Vec<CanaryStep>,
}

impl Sim {
    /// Who works on it answers, as its program does.
    pub(super) fn answer(&mut self, number: u64) {
        let image = self.outside.worker(number).map(|process| process.image);
        let fails = match image.map(|image| self.project.behaviour(&image)) {
            Some(Behaviour::Fails { permille, .. }) => self.rng.permille(permille),
            _ => false,
        };
        self.outside.answer(number, !fails);
    }

    /// `None`: nobody answers.
    pub(super) fn measure(&mut self, number: u64, of: &[InstanceId]) -> Option<Event> {
        if !self.outside.proxy_up {
            self.fail(kiln_plan::EffectKey::Measure);
            return None;
        }
        let blind = self.plant == Some(Plant::CountNoFailure);
        let counted = |id: &InstanceId| {
            let mut traffic = self.outside.processes.get(id)?.traffic.clone();
            if blind {
                traffic.failed = 0;
            }
            Some((id.clone(), traffic))
        };
        let traffic = of.iter().filter_map(counted).collect();
        Some(Event::Measured { number, traffic })
    }

    /// Prometheus knows how the service's new program does, if it answers.
    pub(super) fn query(&mut self, service: ServiceName) -> Event {
        let world = self.keeper.as_ref().map(|k| &k.world);
        let goal = world.and_then(|w| w.goal.release());
        let release = goal.and_then(|n| self.disk.content(n));
        let image = release.and_then(|r| Some(r.services.get(&service)?.image.digest));
        let behaviour = image.map(|image| self.project.behaviour(&image));
        let value = match behaviour {
            _ if self.rng.permille(200) => Err("no answer".into()),
            Some(Behaviour::Fails { .. }) => Ok(1.0),
            _ => Ok(0.0),
        };
        Event::Queried { service, value }
    }

    /// A table that is sent gives each new instance no more than the steps, which take
    /// their time, allow by now. Where no well old one is left they have all of it, and the
    /// steps go on.
    pub(super) fn keeps_to_the_steps(&mut self, table: &RoutingTable) -> Result<(), Broken> {
        for (name, route) in &table.services {
            let Some(Steps { new, old, steps }) = self.steps_to_keep(name) else {
                continue;
            };
            let is_new = |id: &InstanceId| {
                let world = self.keeper.as_ref().map(|k| &k.world);
                let instance = world.and_then(|w| w.instances.get(id));
                instance.is_some_and(|i| i.revision == new)
            };
            let newest = route
                .backends
                .iter()
                .filter(|b| is_new(&b.instance))
                .count();
            let gets = match &route.split {
                _ if newest == 0 => continue,
                Some(split) => u64::from(split.weight),
                None => 100,
            };
            let goal = self.keeper.as_ref().and_then(|k| k.world.goal.release());
            let (now, skew) = (self.now, self.skew);
            let began = match (self.canary, goal) {
                // Whoever sets the clock makes steps longer or shorter.
                (Some((release, _, then)), Some(goal)) if release == goal && then != skew => {
                    continue;
                }
                (Some((release, began, _)), Some(goal)) if release == goal => began,
                (_, Some(goal)) => {
                    self.canary = Some((goal, now, skew));
                    now
                }
                _ => continue,
            };
            let mut left = now - began;
            let mut allowed = 100;
            for step in &steps {
                if left < step.duration.0 {
                    allowed = u64::from(step.weight);
                    break;
                }
                left -= step.duration.0;
            }
            if gets > allowed && self.is_well(name, old) {
                return Err(Broken::TooMuchWeight(name.clone()));
            }
        }
        Ok(())
    }

    /// The steps of a service whose traffic moves step by step, as long as nobody has had a
    /// say.
    fn steps_to_keep(&self, name: &ServiceName) -> Option<Steps> {
        let world = &self.keeper.as_ref()?.world;
        let newest = world.goal.release()?;
        let open = self.disk.outcomes.get(&newest) == Some(&Outcome::RollingOut);
        let back = self
            .undisturbed
            .filter(|_| open && self.settled_rollout())?;
        let new = self.disk.content(newest)?.services.get(name)?;
        let old = self.disk.content(back)?.services.get(name)?;
        let options = new.service.kiln.rollout.as_ref()?;
        let stops_first = new.service.update.order == Some(Order::StopFirst);
        // Who shares another's network goes with it.
        let shares = |s: &ReleasedService| matches!(s.service.network, NetworkMode::Service(_));
        let canary = options.strategy == Some(Strategy::Canary)
            && !stops_first
            && !is_exclusive(new)
            && !shares(new)
            && !shares(old);
        let steps = Steps {
            new: new.revision().ok()?,
            old: old.revision().ok()?,
            steps: options.steps.clone(),
        };
        (canary && steps.new != steps.old).then_some(steps)
    }

    /// Kiln knows of an instance of this revision that is well.
    fn is_well(&self, name: &ServiceName, revision: Digest) -> bool {
        let world = self.keeper.as_ref().map(|k| &k.world);
        let mut copies = world.into_iter().flat_map(|w| w.of_service(name));
        copies
            .any(|(_, i)| i.phase.ready() && i.revision == revision && i.health == Health::Healthy)
    }
}
