//! Effects, carried out on the machine outside as kiln-daemon's executor would, with
//! the bugs a test may have planted.

use kiln_model::instance::ExitStatus;
use kiln_model::release::{Outcome, ReleasedService};
use kiln_model::route::{RouteMode, RoutingTable};
use kiln_model::spec::{NetworkMode, Order, Strategy};
use kiln_model::{Generation, InstanceId};
use kiln_plan::{Conclusion, Effect, EffectKey, Event, Goal, ProbePlan, is_exclusive};

use super::laws::{Broken, Plant};
use super::outside::{Process, Run};
use super::project::Behaviour;
use super::run::{Item, Sim};

/// Pause before an effect that could not be carried out is told of.
const PAUSE: u64 = 1_000;

impl Sim {
    /// Carries an effect out and tells what came of it.
    pub(super) fn act(&mut self, effect: Effect, wish: u64) -> Result<(), Broken> {
        let key = effect.key();
        // It fails before or after it took effect.
        let fails = self.restless && self.rng.permille(10);
        if fails && self.rng.permille(500) {
            self.fail(key);
            return Ok(());
        }
        let event = match effect {
            Effect::EnsureNetworks { .. } | Effect::Conclude(_)
                if wish != self.outside.networks_wish =>
            {
                self.fail(key);
                return Ok(());
            }
            Effect::EnsureNetworks { wish, .. } => {
                self.outside.networks = true;
                Some(Event::NetworksReady { wish })
            }
            Effect::Start { id } => Some(self.start(id)?),
            Effect::Route(table) => self.route(table)?,
            Effect::Measure { number, instances } => self.measure(number, &instances),
            Effect::Query { service, .. } => Some(self.query(service)),
            Effect::Drain { id, limit } => self.begin_drain(id, limit.0)?,
            Effect::Stop { id, grace, .. } => self.stop(id, grace.0)?,
            Effect::Remove { id } => self.remove(id)?,
            Effect::Conclude(conclusion) => {
                self.outside.networks = false;
                Some(Event::Concluded { conclusion })
            }
            Effect::Observe { .. } => None,
        };
        match event {
            Some(_) if fails => self.fail(key),
            Some(event) => self.tell(1, event),
            None => {}
        }
        Ok(())
    }

    pub(super) fn fail(&mut self, key: EffectKey) {
        let cause = "it went wrong".into();
        self.tell(PAUSE, Event::Failed { key, cause });
    }

    /// The daemon died while it was about this.
    pub(super) fn half_done(&mut self, effect: Effect) {
        let done = match effect {
            Effect::Start { id } => self.start(id).map(drop),
            Effect::Stop { id, .. } => {
                // The signal was sent; nobody waits for what becomes of it.
                let status = ExitStatus::Code(0);
                if self.outside.processes.get(&id).is_some_and(|p| p.drained) {
                    self.outside.end(&id, status, self.now);
                }
                Ok(())
            }
            Effect::Remove { id } => self.outside.remove(&id),
            Effect::Route(table) if self.outside.proxy_up => {
                let wanted = std::collections::BTreeSet::new();
                self.outside.apply(&table, &wanted, self.now).map(drop)
            }
            Effect::Conclude(_) => {
                self.outside.networks = false;
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(broken) = done {
            self.broken = Some(broken);
        }
    }

    fn start(&mut self, id: InstanceId) -> Result<Event, Broken> {
        if self.outside.gone.contains(&id) {
            let cause = "it is gone".into();
            return Ok(Event::StartFailed { id, cause });
        }
        let facts = self.facts(&id);
        let Some((process, behaviour)) = facts else {
            let cause = "nobody knows it".into();
            return Ok(Event::StartFailed { id, cause });
        };
        let full = self.disk.full.get() && self.rng.permille(500);
        let cause = match behaviour {
            _ if !self.outside.networks => Some("its network is not there"),
            _ if full => Some("no space left on device"),
            Behaviour::StartFails => Some("no such program"),
            _ => None,
        };
        if let Some(cause) = cause {
            let cause = cause.into();
            return Ok(Event::StartFailed { id, cause });
        }
        let before = self.outside.processes.get(&id).map(|p| p.run);
        if let Some(Run::Exited { .. }) = before {
            let cause = "it has ended".into();
            return Ok(Event::StartFailed { id, cause });
        }
        if before != Some(Run::Running) {
            self.outside.start(&id, process)?;
            match behaviour {
                Behaviour::Ends { after, .. } => self.after(after, Item::Ends(id.clone(), 1)),
                Behaviour::Done { after, code } => self.after(after, Item::Ends(id.clone(), code)),
                _ => {}
            }
        }
        if self.plant == Some(Plant::EagerReady) {
            self.tell(10, Event::Ready { id: id.clone() });
        }
        if behaviour == Behaviour::HookFails {
            let reason = "its hook failed".into();
            return Ok(Event::Unhealthy { id, reason });
        }
        Ok(Event::Started { id })
    }

    /// From the world in memory, or, for a daemon that has just died, from its disk.
    fn facts(&self, id: &InstanceId) -> Option<(Process, Behaviour)> {
        let stored = match &self.keeper {
            Some(_) => None,
            None => self.disk.world().ok().flatten(),
        };
        let world = self.keeper.as_ref().map(|k| &k.world).or(stored.as_ref())?;
        let instance = world.instances.get(id)?;
        let release = self.disk.content(instance.release)?;
        let released = release.services.get(&instance.service)?;
        let process = Process {
            service: instance.service.clone(),
            image: released.image.digest,
            exclusive: is_exclusive(released) && !instance.job,
            run: Run::Running,
            since: self.now,
            proven: None,
            retired: false,
            drained: false,
            in_flight: Default::default(),
            traffic: Default::default(),
        };
        let behaviour = self.project.behaviour(&released.image.digest);
        Some((process, behaviour))
    }

    fn route(&mut self, table: RoutingTable) -> Result<Option<Event>, Broken> {
        // The table can't know of a wish that came after it.
        let wanted = self.wanted().intersection(&self.sent).cloned().collect();
        let followed = self.planted_proxy(table.clone());
        if !self.outside.proxy_up || !self.outside.apply(&followed, &wanted, self.now)? {
            self.fail(EffectKey::Route);
            return Ok(None);
        }
        let numbers: Vec<u64> = self.outside.requests.keys().copied().collect();
        for number in numbers {
            let takes = self.rng.between(2, 60);
            self.after(takes, Item::Answer(number));
        }
        // A port of the release may have been taken by somebody else.
        let failed = (self.restless && self.rng.permille(4)).then(|| "port in use".into());
        Ok(Some(Event::Routed { table, failed }))
    }

    /// What the proxy follows, who may have a bug, too.
    fn planted_proxy(&self, mut table: RoutingTable) -> RoutingTable {
        match (self.plant, &self.outside.table) {
            (Some(Plant::StaleBackends), Some(old)) => {
                for (name, route) in &mut table.services {
                    let before = old.services.get(name).map_or(&[][..], |r| &r.backends);
                    let stale = before.iter().filter(|b| !route.backends.contains(b));
                    let stale: Vec<_> = stale.cloned().collect();
                    route.backends.extend(stale);
                }
            }
            (Some(Plant::OneFewer), _) => {
                for route in table.services.values_mut().filter(|r| r.backends.len() > 1) {
                    route.backends.pop();
                }
            }
            _ => {}
        }
        table
    }

    pub(super) fn planted_table(&self, mut table: RoutingTable) -> RoutingTable {
        match self.plant {
            Some(Plant::OldGeneration) if table.generation.0 > 3 => {
                table.generation = Generation(2);
            }
            Some(Plant::LoseBackends) if table.generation.0.is_multiple_of(4) => {
                if let Some(route) = table.services.values_mut().next_back() {
                    route.backends.clear();
                    route.mode = RouteMode::Serve;
                }
            }
            Some(Plant::HeavyCanary) => {
                for split in table.services.values_mut().filter_map(|r| r.split.as_mut()) {
                    split.weight = split.weight.saturating_mul(2).min(100);
                }
            }
            Some(Plant::NoParking) => {
                for route in table.services.values_mut() {
                    route.mode = RouteMode::Serve;
                }
            }
            _ => {}
        }
        table
    }

    fn begin_drain(&mut self, id: InstanceId, limit: u64) -> Result<Option<Event>, Broken> {
        match self.plant {
            Some(Plant::SkipDrain) => return Ok(Some(Event::Drained { id })),
            Some(Plant::StopInsteadOfDrain) => {
                let wanted = self.wanted();
                self.outside.stop(&id, &wanted, self.now)?;
                return Ok(Some(Event::Drained { id }));
            }
            _ => {}
        }
        if !self.outside.proxy_up {
            self.fail(EffectKey::Drain(id));
            return Ok(None);
        }
        if let Some(process) = self.outside.processes.get_mut(&id) {
            process.retired = true;
        }
        let until = self.now + limit;
        self.drain(id, until);
        Ok(None)
    }

    /// Where the file asks for a verdict after the switch, what served before stays ready
    /// until it is there. Asked when a drain is decided: a release that is wanted a moment
    /// later does not call back who is on its way out.
    pub(super) fn may_be_drained(&self, id: &InstanceId) -> Result<(), Broken> {
        let facts = || {
            let world = &self.keeper.as_ref()?.world;
            let newest = world.goal.release()?;
            let open = self.disk.outcomes.get(&newest) == Some(&Outcome::RollingOut);
            let back = self
                .undisturbed
                .filter(|_| open && self.settled_rollout())?;
            let process = self.outside.processes.get(id)?;
            let name = &process.service;
            let new = self.disk.content(newest)?.services.get(name)?;
            let old = self.disk.content(back)?.services.get(name)?;
            let instance = world.instances.get(id)?;
            let update = &new.service.update;
            let monitor = update.monitor.filter(|m| m.0 > 0);
            let rollout = new.service.kiln.rollout.as_ref();
            let strategy = rollout.and_then(|r| r.strategy.as_ref());
            let recreated = strategy == Some(&Strategy::Recreate) && update.order.is_none();
            let room_first = recreated || update.order == Some(Order::StopFirst);
            let overlap = !room_first && !is_exclusive(new);
            // Who shares another's network goes with it.
            let shares = |s: &ReleasedService| matches!(s.service.network, NetworkMode::Service(_));
            let own = !shares(new) && !shares(old);
            let served = process.image == old.image.digest && process.image != new.image.digest;
            let served = served && old.revision().ok() == Some(instance.revision);
            let wanted = instance.index <= old.service.replicas && process.proven.is_some();
            Some(monitor.is_some() && overlap && own && served && wanted && process.running())
        };
        match facts() {
            Some(true) if !self.told_unwell.contains(id) => Err(Broken::NotKeptWarm(id.clone())),
            _ => Ok(()),
        }
    }

    /// By wish, not on its way back, by `update_config`.
    pub(super) fn settled_rollout(&self) -> bool {
        let rollout = self.keeper.as_ref().and_then(|k| k.world.rollout.as_ref());
        rollout.is_some_and(|r| !r.rollback && !r.promoted)
    }

    pub(super) fn drain(&mut self, id: InstanceId, until: u64) {
        if !self.outside.proxy_up {
            return self.fail(EffectKey::Drain(id));
        }
        let idle = self
            .outside
            .processes
            .get(&id)
            .is_none_or(|p| p.in_flight.is_empty());
        if idle || self.now >= until {
            self.outside.cut(&id);
            self.tell(1, Event::Drained { id });
        } else {
            let pause = (until - self.now).min(100);
            self.after(pause, Item::Draining(self.life, id, until));
        }
    }

    fn stop(&mut self, id: InstanceId, _grace: u64) -> Result<Option<Event>, Broken> {
        let exclusive = self.outside.processes.get(&id).is_some_and(|p| p.exclusive);
        let status = ExitStatus::Code(0);
        let planted = match exclusive {
            true => Plant::SecondWriter,
            false => Plant::SayExited,
        };
        if self.plant == Some(planted) {
            return Ok(Some(Event::Exited { id, status }));
        }
        let wanted = self.wanted();
        self.outside.stop(&id, &wanted, self.now)?;
        // Who waits for the process tells as well.
        let event = Event::Exited {
            id: id.clone(),
            status,
        };
        self.tell(3, event.clone());
        Ok(Some(event))
    }

    fn remove(&mut self, id: InstanceId) -> Result<Option<Event>, Broken> {
        let alive = self.outside.runs(&id);
        match self.plant {
            Some(Plant::ForgetToRemove) => {}
            Some(Plant::SecondWriter) if alive => {}
            _ => self.outside.remove(&id)?,
        }
        Ok(Some(Event::Removed { id }))
    }

    /// A program ends by itself; the shim's parent tells, if there is one.
    pub(super) fn ends(&mut self, id: &InstanceId, code: i32) {
        if !self.outside.runs(id) {
            return;
        }
        let status = match code {
            139 => ExitStatus::Signal(11),
            code => ExitStatus::Code(code),
        };
        self.outside.end(id, status, self.now);
        let id = id.clone();
        self.tell(2, Event::Exited { id, status });
    }

    /// The prober, as long as this daemon lives.
    pub(super) fn watch(&mut self, id: InstanceId, plan: &ProbePlan) {
        let Some(process) = self.outside.processes.get(&id) else {
            return;
        };
        let age = self.now - process.since;
        // As kiln-daemon tells its prober.
        let proven = self.keeper.as_ref().is_some_and(|k| {
            let instance = k.world.instances.get(&id);
            instance.is_some_and(|i| i.phase.ready())
        });
        let behaviour = self.project.behaviour(&process.image);
        let life = self.life;
        let left = |at: u64| at.saturating_sub(age).max(1);
        let ready = |boot: u64| left(boot.max(plan.settle.0));
        let sick = |id: &InstanceId| Event::Unhealthy {
            id: id.clone(),
            reason: "the check fails".into(),
        };
        match behaviour {
            Behaviour::NeverReady => {
                let event = sick(&id);
                self.after(left(plan.deadline.0), Item::Observe(life, id, event));
            }
            Behaviour::Good { boot }
            | Behaviour::Ends { boot, .. }
            | Behaviour::Fails { boot, .. }
                if !proven =>
            {
                let event = Event::Ready { id: id.clone() };
                self.after(ready(boot), Item::Observe(life, id, event));
            }
            Behaviour::Done { .. } if !proven => {
                let event = Event::Ready { id: id.clone() };
                self.after(ready(0), Item::Observe(life, id, event));
            }
            Behaviour::Sickens { after, boot } => {
                if !proven {
                    let event = Event::Ready { id: id.clone() };
                    self.after(ready(boot), Item::Observe(life, id.clone(), event));
                }
                if plan.health.is_some() {
                    let event = sick(&id);
                    self.after(left(after), Item::Observe(life, id, event));
                }
            }
            _ => {}
        }
    }

    /// What the prober found, if what it asks is still there and still watched.
    pub(super) fn observed(&mut self, id: &InstanceId, event: Event) {
        let watched = self.keeper.as_ref().is_some_and(|k| {
            let instance = k.world.instances.get(id);
            instance.is_some_and(|i| i.phase.rising())
        });
        let Some(process) = self.outside.processes.get_mut(id) else {
            return;
        };
        if !process.running() || !watched {
            return;
        }
        let ready = matches!(event, Event::Ready { .. });
        if ready {
            process.proven.get_or_insert(self.now);
        }
        if ready && self.plant == Some(Plant::SwallowReady) {
            return;
        }
        self.tell(0, event.clone());
        if !ready {
            // It says so again for as long as it is so.
            self.after(5_000, Item::Observe(self.life, id.clone(), event));
        }
    }

    /// A rollout's end is recorded.
    pub(super) fn conclude(&mut self, conclusion: Conclusion) -> Result<Option<Event>, Broken> {
        let goal = self.keeper.as_ref().map(|k| k.world.goal);
        match &conclusion {
            Conclusion::Failed { release, .. } if goal == Some(Goal::Release(*release)) => {
                Err(Broken::NotTurnedBack(release.0))
            }
            _ => Ok(self.record(conclusion)),
        }
    }

    fn record(&mut self, conclusion: Conclusion) -> Option<Event> {
        let done = conclusion.clone();
        let (number, outcome) = match conclusion {
            Conclusion::Down => {
                self.begin(Effect::Conclude(conclusion));
                return None;
            }
            Conclusion::Stayed { .. } => return Some(Event::Concluded { conclusion }),
            Conclusion::Proven { release } => (release, Outcome::Proven),
            Conclusion::Failed { release, cause, .. } => (release, Outcome::Failed { cause }),
        };
        if self.disk.full.get() {
            self.fail(EffectKey::Conclude);
            return None;
        }
        let outcome = match outcome {
            Outcome::Failed { .. } if self.plant == Some(Plant::CallItProven) => Outcome::Proven,
            outcome => outcome,
        };
        match outcome {
            Outcome::Proven => self.summary.proven += 1,
            _ => self.summary.failed += 1,
        }
        if self.plant != Some(Plant::ForgetOutcome) {
            self.disk.outcomes.insert(number, outcome);
        }
        if done.empties() {
            self.begin(Effect::Conclude(done));
            return None;
        }
        Some(Event::Concluded { conclusion: done })
    }
}
