//! One run: virtual time, one queue of what will happen, kiln's loop as shipped, and
//! faults. Everything follows from the seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kiln_model::{InstanceId, Millis, ReleaseNumber, RoutingTable, ServiceName};
use kiln_plan::{Conclusion, Effect, Event, Goal, Keeper, Phase, Plan, Refused, TRY_AGAIN, World};

use super::laws::{Broken, Plant};
use super::memory::Disk;
use super::outside::Outside;
use super::project::Project;
use super::rng::Rng;

/// What can be waited for.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// Reaches the loop of this life of the daemon.
    Tell(u32, Event),
    /// An effect is carried out, and then told of. Last: the wish about networks it is.
    Act(u32, Effect, u64),
    /// A drain that goes on until this time.
    Draining(u32, InstanceId, u64),
    Wake(u32),
    LookAgain(u32),
    /// A program ends by itself.
    Ends(InstanceId, i32),
    Observe(u32, InstanceId, Event),
    Arrive,
    Answer(u64),
    Command,
    Fault,
    DaemonStarts,
    ProxyStarts,
    DiskFree,
}

/// How a run went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events taken in by the loop; after each the laws were checked.
    pub steps: u64,
    pub rollouts: u64,
    pub proven: u64,
    pub failed: u64,
    pub faults: u64,
    pub requests: u64,
    pub answered: u64,
}

impl Summary {
    pub fn add(&mut self, other: &Summary) {
        self.steps += other.steps;
        self.rollouts += other.rollouts;
        self.proven += other.proven;
        self.failed += other.failed;
        self.faults += other.faults;
        self.requests += other.requests;
        self.answered += other.answered;
    }
}

/// Faults stop after this much virtual time.
const RESTLESS: u64 = 240_000;
/// Lines of the trace that are kept.
const TRACE: usize = 80;

pub(super) struct Sim {
    pub rng: Rng,
    pub now: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Item>,
    /// Counts the daemon's lives.
    pub life: u32,
    pub keeper: Option<Keeper>,
    pub disk: Disk,
    pub outside: Outside,
    pub project: Project,
    pub plant: Option<Plant>,
    pub restless: bool,
    /// The daemon's clock against true time; changes only between its lives.
    pub skew: i64,
    pub summary: Summary,
    pub trace: VecDeque<String>,
    pub broken: Option<Broken>,
    wake: Option<u64>,
    /// What was wanted when the last table was sent.
    pub sent: BTreeSet<ServiceName>,
    /// What the last plan said.
    pub report: Vec<String>,
    /// Instances of whose end this life of the daemon has been told.
    told_ended: BTreeSet<InstanceId>,
    /// Instances that kiln was told were unwell.
    pub told_unwell: BTreeSet<InstanceId>,
    /// Instances of which kiln has decided that they go; it may say so again.
    leaving: BTreeSet<InstanceId>,
    /// What was proven when the last release was wanted, unless somebody has had a say since.
    pub undisturbed: Option<ReleaseNumber>,
    /// Many callers come while a release is judged.
    pub busy: bool,
    /// The release that got a part of a service's traffic first, when, and what the clock
    /// was wrong by then.
    pub canary: Option<(ReleaseNumber, u64, i64)>,
}

impl Sim {
    pub fn new(seed: u64, plant: Option<Plant>) -> Result<Self, Broken> {
        let mut rng = Rng::new(seed);
        let project = Project::random(&mut rng).map_err(simulator)?;
        let environment = "shop".parse().map_err(simulator)?;
        let mut sim = Self {
            rng,
            now: 1_000_000_000,
            sequence: 0,
            queue: BTreeMap::new(),
            life: 0,
            keeper: Some(Keeper::resume(World::new(environment))),
            disk: Disk::default(),
            outside: Outside::default(),
            project,
            plant,
            restless: true,
            skew: 0,
            summary: Summary::default(),
            trace: VecDeque::new(),
            broken: None,
            wake: None,
            sent: BTreeSet::new(),
            report: Vec::new(),
            told_ended: BTreeSet::new(),
            told_unwell: BTreeSet::new(),
            leaving: BTreeSet::new(),
            undisturbed: None,
            busy: false,
            canary: None,
        };
        sim.outside.proxy_up = true;
        sim.outside.forgetful = plant == Some(Plant::LoseParked);
        sim.outside.even = plant == Some(Plant::IgnoreSplit);
        sim.disk.lies.set(plant == Some(Plant::LyingDisk));
        sim.after(0, Item::Command);
        sim.after(0, Item::Arrive);
        sim.after(60_000, Item::LookAgain(0));
        let first = sim.rng.between(500, 20_000);
        sim.after(first, Item::Fault);
        Ok(sim)
    }

    /// The daemon's idea of the time.
    pub fn clock(&self, at: u64) -> Millis {
        Millis(at.saturating_add_signed(self.skew))
    }

    pub fn after(&mut self, delay: u64, item: Item) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), item);
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.trace.len() == TRACE {
            self.trace.pop_front();
        }
        let line = format!("{:>9} {}", self.now - 1_000_000_000, line());
        self.trace.push_back(line);
    }

    /// Takes the next thing that happens.
    pub fn advance(&mut self) -> Result<(), Broken> {
        let Some(((at, _), item)) = self.queue.pop_first() else {
            return Err(Broken::Simulator("nothing is left to happen".into()));
        };
        self.now = self.now.max(at);
        self.happen(item)?;
        self.outside.give_up_waiting(self.now);
        self.outside.all_accounted_for()?;
        self.outside.keeps_to_the_weights()?;
        match self.broken.take() {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    fn happen(&mut self, item: Item) -> Result<(), Broken> {
        match item {
            Item::Tell(life, event) if life == self.life => self.take(event)?,
            Item::Act(life, effect, wish) if life == self.life => self.act(effect, wish)?,
            Item::Draining(life, id, until) if life == self.life => self.drain(id, until),
            Item::Observe(life, id, event) if life == self.life => self.observed(&id, event),
            Item::Wake(life) if life == self.life && self.wake.is_some_and(|at| at <= self.now) => {
                self.wake = None;
                self.take(Event::Tick)?;
            }
            Item::LookAgain(life) if life == self.life => {
                self.look()?;
                self.after(60_000, Item::LookAgain(life));
            }
            Item::Ends(id, code) => self.ends(&id, code),
            Item::Arrive => self.arrive(),
            Item::Answer(number) => self.answer(number),
            Item::Command => self.command()?,
            Item::Fault => self.fault()?,
            Item::DaemonStarts => self.start_daemon()?,
            Item::ProxyStarts => {
                self.outside.proxy_up = true;
                self.tell(20, Event::ProxyRestarted);
            }
            Item::DiskFree => self.disk.full.set(false),
            // Of an earlier life.
            _ => {}
        }
        Ok(())
    }

    /// Sends an event to the loop, which may meet faults on its way.
    pub fn tell(&mut self, delay: u64, event: Event) {
        let outcome = !matches!(event, Event::ProxyRestarted);
        let mut delay = delay + self.rng.below(4);
        if self.restless && outcome {
            if self.rng.permille(4) {
                self.note(|| format!("lost: {event:?}"));
                return;
            }
            if self.rng.permille(15) {
                let again = delay + self.rng.below(8_000);
                self.after(again, Item::Tell(self.life, event.clone()));
            }
            if self.rng.permille(20) {
                delay += self.rng.below(5_000);
            }
        }
        self.after(delay, Item::Tell(self.life, event));
    }

    /// The loop takes an event in; what follows is begun.
    pub fn take(&mut self, event: Event) -> Result<(), Broken> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let clock = self.clock(self.now);
            let Some(keeper) = &mut self.keeper else {
                return Ok(());
            };
            self.summary.steps += 1;
            let shown = brief(&event);
            if let Event::Exited { id, .. } | Event::StartFailed { id, .. } = &event {
                self.told_ended.insert(id.clone());
            }
            if let Event::Unhealthy { id, .. } = &event {
                self.told_unwell.insert(id.clone());
            }
            let event = match (self.plant, event) {
                (Some(Plant::SwallowEnd), Event::Exited { .. }) => Event::Tick,
                (_, event) => event,
            };
            let taken = keeper.take(&self.disk, event, clock);
            self.note(|| shown);
            if self.disk.torn.take() {
                self.note(|| "power lost while writing".into());
                self.host_goes_down();
                return Ok(());
            }
            self.spoil_if_planted();
            next = match taken {
                Ok(plan) => self.carry_out(plan)?,
                Err(Refused::Unlawful { violation, plan }) => {
                    self.note(|| format!("UNLAWFUL {plan:?}"));
                    return Err(violation.into());
                }
                Err(_) => {
                    self.wake_in(TRY_AGAIN.0);
                    None
                }
            };
        }
        Ok(())
    }

    fn spoil_if_planted(&mut self) {
        let Some(world) = self.keeper.as_mut().map(|k| &mut k.world) else {
            return;
        };
        match self.plant {
            Some(Plant::KeepFailed) => {
                if let Some(Conclusion::Failed { release, .. }) = &world.concluding {
                    world.goal = Goal::Release(*release);
                }
            }
            Some(Plant::NoWatch) => {
                if let Some(watch) = &mut world.watch {
                    watch.until = watch.since;
                    watch.rollback = true;
                }
            }
            Some(Plant::NoAge) => {
                for instance in world.instances.values_mut() {
                    if let Phase::Ready { since } = &mut instance.phase {
                        *since = Millis(u64::MAX);
                    }
                }
            }
            Some(Plant::EndlessStep) => {
                if let Some(rollout) = &mut world.rollout {
                    rollout.canary.since = None;
                }
            }
            Some(Plant::NothingWarm) => {
                if let (Some(watch), Some(_)) = (&mut world.watch, &world.rollout) {
                    watch.back = None;
                }
            }
            _ => {}
        }
    }

    fn wake_in(&mut self, ahead: u64) {
        let at = self.now + ahead;
        if self.wake.is_none_or(|w| at < w) {
            self.wake = Some(at);
            self.after(ahead, Item::Wake(self.life));
        }
    }

    fn carry_out(&mut self, plan: Plan) -> Result<Option<Event>, Broken> {
        let mut follows = None;
        if let Some(at) = plan.wake {
            // A wait that a test can't wait for would be a hang.
            let ahead = at.saturating_sub(self.clock(self.now)).0.min(3_600_000);
            self.wake_in(ahead.max(1));
        }
        self.report = plan
            .report
            .iter()
            .map(|l| format!("{:?} {}", l.service.as_ref().map(|s| s.as_str()), l.text))
            .collect();
        for effect in plan.effects {
            self.note(|| match &effect {
                Effect::Route(table) => route_line(table),
                other => format!("    → {other:?}").chars().take(200).collect(),
            });
            match effect {
                Effect::Conclude(conclusion) => follows = self.conclude(conclusion)?,
                Effect::Observe { id, probe } => self.watch(id, &probe),
                Effect::Route(table) => {
                    let table = self.planted_table(table);
                    self.outside.sent(&table)?;
                    self.none_has_ended(&table)?;
                    self.keeps_to_the_steps(&table)?;
                    self.sent = self.wanted();
                    self.begin(Effect::Route(table));
                }
                effect => {
                    self.intent_is_stored(&effect)?;
                    if let Effect::Drain { id, .. } = &effect
                        && self.leaving.insert(id.clone())
                    {
                        self.may_be_drained(id)?;
                    }
                    self.begin(effect);
                }
            }
        }
        Ok(follows)
    }

    fn none_has_ended(&self, table: &RoutingTable) -> Result<(), Broken> {
        let mut backends = table.services.values().flat_map(|s| &s.backends);
        match backends.find(|b| self.told_ended.contains(&b.instance)) {
            Some(backend) => Err(Broken::EndedServes(backend.instance.clone())),
            None => Ok(()),
        }
    }

    /// A crash between an effect and its record must not make anybody forget it.
    fn intent_is_stored(&self, effect: &Effect) -> Result<(), Broken> {
        match effect {
            Effect::Start { id } if !self.disk.holds(id) => Err(Broken::NoIntent(id.clone())),
            _ => Ok(()),
        }
    }

    pub fn begin(&mut self, effect: Effect) {
        let mut delay = self.rng.between(1, 30);
        if self.restless {
            if self.rng.permille(20) {
                delay = self.rng.between(1_000, 10_000);
            } else if self.rng.permille(3) {
                delay = self.rng.between(60_000, 400_000);
                self.note(|| format!("    hangs for {delay} ms"));
            }
        }
        if matches!(effect, Effect::EnsureNetworks { .. } | Effect::Conclude(_)) {
            self.outside.networks_wish += 1;
        }
        let wish = self.outside.networks_wish;
        self.after(delay, Item::Act(self.life, effect, wish));
    }

    /// Services the goal wants, but for jobs: nobody may take them from traffic.
    pub fn wanted(&self) -> BTreeSet<ServiceName> {
        let Some(keeper) = &self.keeper else {
            return BTreeSet::new();
        };
        let Some(goal) = keeper
            .world
            .goal
            .release()
            .and_then(|n| keeper.releases.get(n))
        else {
            return BTreeSet::new();
        };
        goal.release
            .services
            .keys()
            .filter(|n| !goal.is_job(n))
            .cloned()
            .collect()
    }

    /// What the runtime holds; strays that the world does not know are removed.
    pub fn look(&mut self) -> Result<(), Broken> {
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        let known: BTreeSet<InstanceId> = keeper.world.instances.keys().cloned().collect();
        let strays: Vec<InstanceId> = self
            .outside
            .processes
            .keys()
            .filter(|id| !known.contains(*id) && self.plant != Some(Plant::ForgetToRemove))
            .cloned()
            .collect();
        for id in strays {
            self.outside
                .end(&id, kiln_model::instance::ExitStatus::Signal(9), self.now);
            self.outside.remove(&id)?;
        }
        let instances = self.outside.observed(|at| self.clock(at));
        self.take(Event::Found { instances })
    }

    pub fn crash(&mut self) {
        self.life += 1;
        self.keeper = None;
        self.wake = None;
        self.told_ended.clear();
        // What was begun is finished by the kernel, or it never happens.
        let begun: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, item)| matches!(item, Item::Act(..)))
            .map(|(at, _)| *at)
            .collect();
        for at in begun {
            if let Some(Item::Act(_, effect, _)) = self.queue.remove(&at)
                && self.rng.permille(400)
            {
                self.half_done(effect);
            }
        }
        let delay = self.rng.between(20, 4_000);
        self.after(delay, Item::DaemonStarts);
    }

    pub fn host_goes_down(&mut self) {
        self.outside.host_goes_down(self.now);
        self.crash();
        self.after(10, Item::ProxyStarts);
    }

    fn start_daemon(&mut self) -> Result<(), Broken> {
        if self.keeper.is_some() {
            return Ok(());
        }
        if self.restless && self.rng.permille(200) {
            self.skew = self.rng.below(172_800_000) as i64 - 86_400_000;
        }
        let world = match self.disk.world().map_err(simulator)? {
            Some(world) => world,
            None => World::new("shop".parse().map_err(simulator)?),
        };
        self.note(|| "the daemon starts".into());
        self.keeper = Some(Keeper::resume(world));
        let life = self.life;
        self.after(60_000, Item::LookAgain(life));
        self.look()
    }

    fn arrive(&mut self) {
        let judged = self.keeper.as_ref().map(|k| &k.world);
        let judged = judged.is_some_and(|w| w.rollout.is_some() || w.watch.is_some());
        let gap = match self.busy && judged {
            true => self.rng.between(2, 20),
            false => self.rng.between(20, 1_500),
        };
        self.after(gap, Item::Arrive);
        let services: Vec<ServiceName> = self
            .outside
            .table
            .iter()
            .flat_map(|t| t.services.keys().cloned())
            .collect();
        let Some(service) = self.rng.pick(&services).cloned() else {
            return;
        };
        if let Some(number) = self.outside.arrive(&service, self.now) {
            let long = self.rng.permille(40);
            let takes = match long {
                true => self.rng.between(1_000, 9_000),
                false => self.rng.between(2, 60),
            };
            self.after(takes, Item::Answer(number));
        }
    }

    pub fn restless_until() -> u64 {
        1_000_000_000 + RESTLESS
    }
}

/// One line of the trace.
fn brief(event: &Event) -> String {
    match event {
        Event::Found { instances } => format!("Found {}", instances.len()),
        Event::Routed { table, .. } => format!("Routed {}", table.generation.0),
        Event::NetworksReady { .. } => "NetworksReady".into(),
        Event::Desired { goal, .. } => format!("Desired {goal:?}"),
        other => format!("{other:?}"),
    }
}

fn route_line(table: &kiln_model::RoutingTable) -> String {
    let services: Vec<String> = table
        .services
        .iter()
        .map(|(name, route)| {
            let backends: Vec<&str> = route.backends.iter().map(|b| b.instance.as_str()).collect();
            format!("{name} {:?} {backends:?}", route.mode)
        })
        .collect();
    format!(
        "    → Route {}: {}",
        table.generation.0,
        services.join("; ")
    )
}

pub(super) fn simulator(error: impl ToString) -> Broken {
    Broken::Simulator(error.to_string())
}
