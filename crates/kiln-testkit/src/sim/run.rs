//! One run: virtual time, one queue of what will happen, kiln's loop as shipped, and
//! faults. Everything follows from the seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kiln_model::network::BridgeNetwork;
use kiln_model::{InstanceId, Millis, ServiceName};
use kiln_plan::{
    Effect, Event, Goal, Keeper, Layout, Plan, Refused, TRY_AGAIN, World, assign_service_addresses,
    is_job,
};

use super::laws::{Broken, Plant};
use super::memory::{Disk, Tear};
use super::outside::Outside;
use super::project::Project;
use super::rng::Rng;

/// What can be waited for.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// Reaches the loop of this life of the daemon.
    Tell(u32, Event),
    /// An effect is carried out, and then told of.
    Act(u32, Effect),
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
    skew: i64,
    pub summary: Summary,
    pub trace: VecDeque<String>,
    pub broken: Option<Broken>,
    wake: Option<u64>,
    /// What was wanted when the last table was sent.
    pub sent: BTreeSet<ServiceName>,
    /// What the last plan said.
    pub report: Vec<String>,
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
        };
        sim.outside.proxy_up = true;
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
        match self.broken.take() {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    fn happen(&mut self, item: Item) -> Result<(), Broken> {
        match item {
            Item::Tell(life, event) if life == self.life => self.take(event)?,
            Item::Act(life, effect) if life == self.life => self.act(effect)?,
            Item::Draining(life, id, until) if life == self.life => self.drain(id, until),
            Item::Observe(life, id, event) if life == self.life => self.observed(&id, event),
            Item::Wake(life) if life == self.life => {
                if self.wake.is_some_and(|at| at <= self.now) {
                    self.wake = None;
                    self.take(Event::Tick)?;
                }
            }
            Item::LookAgain(life) if life == self.life => {
                self.look()?;
                self.after(60_000, Item::LookAgain(life));
            }
            Item::Ends(id, code) => self.ends(&id, code),
            Item::Arrive => self.arrive(),
            Item::Answer(number) => self.outside.answer(number),
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
            let taken = keeper.take(&self.disk, event, clock);
            self.note(|| shown);
            if self.disk.torn.take() {
                self.note(|| "power lost while writing".into());
                self.host_goes_down();
                return Ok(());
            }
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
                Effect::Conclude(conclusion) => follows = self.conclude(conclusion),
                Effect::Observe { id, probe } => self.watch(id, &probe),
                Effect::Route(table) => {
                    let table = self.planted_table(table);
                    self.outside.sent(&table)?;
                    self.sent = self.wanted();
                    self.begin(Effect::Route(table));
                }
                effect => {
                    self.intent_is_stored(&effect)?;
                    self.begin(effect);
                }
            }
        }
        Ok(follows)
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
        self.after(delay, Item::Act(self.life, effect));
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
            .filter(|n| !is_job(&goal.release, n))
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
            .filter(|id| !known.contains(*id))
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
        // What was begun is finished by the kernel, or it never happens.
        let begun: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, item)| matches!(item, Item::Act(..)))
            .map(|(at, _)| *at)
            .collect();
        for at in begun {
            if let Some(Item::Act(_, effect)) = self.queue.remove(&at)
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
        let gap = self.rng.between(20, 1_500);
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

    /// Somebody wants something.
    fn command(&mut self) -> Result<(), Broken> {
        if !self.restless {
            return Ok(());
        }
        let gap = self.rng.between(200, 40_000);
        self.after(gap, Item::Command);
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        if keeper.world.rollout.is_some() {
            if self.rng.permille(150) {
                let why = "asked".into();
                return self.take(Event::Abandoned { why });
            }
            return Ok(());
        }
        match self.rng.below(20) {
            0 => self.down(),
            1..=3 => self.rollback(),
            4 => self.taint(),
            _ => self.up(false),
        }
    }

    pub fn down(&mut self) -> Result<(), Broken> {
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        let layout = keeper.world.layout.clone();
        self.take(Event::Desired {
            goal: Goal::Nothing,
            layout,
        })
    }

    fn rollback(&mut self) -> Result<(), Broken> {
        let proven: Vec<_> = self
            .disk
            .outcomes
            .iter()
            .filter(|(_, o)| **o == kiln_model::release::Outcome::Proven)
            .map(|(n, _)| *n)
            .collect();
        let to = self.rng.pick(&proven).copied();
        match to.and_then(|n| self.disk.content(n)).cloned() {
            Some(release) => self.roll_out(release),
            None => Ok(()),
        }
    }

    fn taint(&mut self) -> Result<(), Broken> {
        let ids: Vec<InstanceId> = self.outside.processes.keys().cloned().collect();
        match self.rng.pick(&ids).cloned() {
            Some(id) => self.take(Event::Tainted { id }),
            None => Ok(()),
        }
    }

    pub fn up(&mut self, good: bool) -> Result<(), Broken> {
        if !self.disk.outcomes.is_empty() {
            self.project.edit(&mut self.rng, good);
        }
        let release = self.project.release().map_err(simulator)?;
        self.roll_out(release)
    }

    fn roll_out(&mut self, release: kiln_model::Release) -> Result<(), Broken> {
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        let layout = lay_out(keeper.world.layout.clone(), &release).map_err(simulator)?;
        if self.disk.full.get() {
            return Ok(());
        }
        let number = self.disk.add_release(release);
        self.summary.rollouts += 1;
        self.note(|| format!("==== rolling out {number}"));
        let goal = Goal::Release(number);
        self.take(Event::Desired { goal, layout })?;
        // What was not stored was not begun; kiln says so in the release's record.
        let begun = self
            .keeper
            .as_ref()
            .is_some_and(|k| k.world.goal == goal || k.world.rollout.is_some());
        if !begun {
            let cause = "not begun".into();
            let outcome = kiln_model::release::Outcome::Failed { cause };
            self.disk.outcomes.insert(number, outcome);
        }
        Ok(())
    }

    /// Something goes wrong.
    fn fault(&mut self) -> Result<(), Broken> {
        if !self.restless {
            return Ok(());
        }
        let gap = self.rng.between(500, 40_000);
        self.after(gap, Item::Fault);
        self.summary.faults += 1;
        match self.rng.below(10) {
            0 | 1 if self.keeper.is_some() => {
                self.note(|| "**** the daemon is killed".into());
                self.crash();
            }
            2 if self.keeper.is_some() => {
                let tear = match self.rng.permille(500) {
                    true => Tear::Before,
                    false => Tear::After,
                };
                self.disk.tear.set(Some(tear));
            }
            3 if self.keeper.is_some() => {
                self.note(|| "**** the host is restarted".into());
                self.host_goes_down();
            }
            4 if self.outside.proxy_up => {
                self.note(|| "**** the proxy is killed".into());
                self.outside.proxy_ends();
                let delay = self.rng.between(20, 2_000);
                self.after(delay, Item::ProxyStarts);
            }
            5 => {
                self.note(|| "**** the disk is full".into());
                self.disk.full.set(true);
                let delay = self.rng.between(500, 30_000);
                self.after(delay, Item::DiskFree);
            }
            6..=7 => {
                let ids: Vec<InstanceId> = self.outside.processes.keys().cloned().collect();
                if let Some(id) = self.rng.pick(&ids).cloned() {
                    self.note(|| format!("**** {id} crashes"));
                    self.ends(&id, 139);
                }
            }
            _ => self.lie_about_health(),
        }
        Ok(())
    }

    /// A check that fails once or says nonsense.
    fn lie_about_health(&mut self) {
        let ids: Vec<InstanceId> = self.outside.processes.keys().cloned().collect();
        let Some(id) = self.rng.pick(&ids).cloned() else {
            return;
        };
        let event = match self.rng.below(3) {
            0 => Event::Healthy { id },
            _ => Event::Unhealthy {
                id,
                reason: "it flaps".into(),
            },
        };
        self.tell(0, event);
    }

    pub fn restless_until() -> u64 {
        1_000_000_000 + RESTLESS
    }
}

fn lay_out(mut layout: Layout, release: &kiln_model::Release) -> Result<Layout, String> {
    let name = "default"
        .parse()
        .map_err(|e: kiln_model::IdError| e.to_string())?;
    let subnet = "10.9.0.0/20"
        .parse()
        .map_err(|e: kiln_model::network::SubnetError| e.to_string())?;
    layout.networks.entry(name).or_insert(BridgeNetwork {
        name: "shop_default".into(),
        bridge: "kn0".into(),
        subnet,
        internal: false,
        mtu: None,
    });
    match assign_service_addresses(&mut layout, release).pop() {
        Some(problem) => Err(problem),
        None => Ok(layout),
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
