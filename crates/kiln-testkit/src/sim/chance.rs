//! What people want of kiln, and what goes wrong for them, at random.

use kiln_model::InstanceId;
use kiln_model::network::BridgeNetwork;
use kiln_plan::{Event, Goal, Layout, assign_service_addresses};

use super::laws::Broken;
use super::memory::Tear;
use super::run::{Item, Sim, simulator};

impl Sim {
    /// Somebody wants something.
    pub(super) fn command(&mut self) -> Result<(), Broken> {
        if !self.restless {
            return Ok(());
        }
        let gap = self.rng.between(200, 40_000);
        self.after(gap, Item::Command);
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        if keeper.world.rollout.is_some() {
            return self.meddle();
        }
        match self.rng.below(20) {
            0 => self.down(),
            1..=3 => self.rollback(),
            4 => self.taint(),
            _ => self.up(false),
        }
    }

    /// Somebody has a say in what is under way.
    fn meddle(&mut self) -> Result<(), Broken> {
        let why = "asked".to_owned();
        let event = match self.rng.below(12) {
            0 | 1 => Event::Abandoned { why },
            2 | 3 => Event::Paused { why },
            4 | 5 => Event::Resumed,
            6 => Event::Promoted,
            _ => return Ok(()),
        };
        self.undisturbed = None;
        self.take(event)
    }

    /// A paused rollout waits for somebody.
    pub(super) fn answer_pause(&mut self) -> Result<(), Broken> {
        let rollout = self.keeper.as_ref().and_then(|k| k.world.rollout.as_ref());
        if rollout.is_none_or(|r| r.paused.is_none()) {
            return Ok(());
        }
        self.undisturbed = None;
        match self.rng.below(3) {
            0 => self.take(Event::Resumed),
            1 => self.take(Event::Promoted),
            _ => {
                let why = "it does not do".into();
                self.take(Event::Abandoned { why })
            }
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
            rollback: false,
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
            Some(release) => self.roll_out(release, true),
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
        self.roll_out(release, false)
    }

    pub(super) fn roll_out(
        &mut self,
        release: kiln_model::Release,
        rollback: bool,
    ) -> Result<(), Broken> {
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
        self.undisturbed = self.keeper.as_ref().and_then(|k| k.world.proven);
        self.take(Event::Desired {
            goal,
            layout,
            rollback,
        })?;
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
    pub(super) fn fault(&mut self) -> Result<(), Broken> {
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
