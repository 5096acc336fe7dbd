//! A store of state whose disk may be full and whose last write may be torn off.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use kiln_model::release::Outcome;
use kiln_model::{EnvironmentName, Release, ReleaseNumber};
use kiln_plan::{Memory, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// The write is lost.
    Before,
    /// It is durable, but the caller never learns it.
    After,
}

#[derive(Default)]
pub struct Disk {
    stored: RefCell<Option<World>>,
    pub full: Cell<bool>,
    /// The power goes at the next write.
    pub tear: Cell<Option<Tear>>,
    pub torn: Cell<bool>,
    /// Planted: claims to store.
    pub lies: Cell<bool>,
    releases: BTreeMap<ReleaseNumber, Release>,
    pub outcomes: BTreeMap<ReleaseNumber, Outcome>,
}

impl Disk {
    /// As it is read back: through its written form.
    pub fn world(&self) -> Result<Option<World>, serde_json::Error> {
        let stored = self.stored.borrow();
        let Some(world) = stored.as_ref() else {
            return Ok(None);
        };
        serde_json::from_str(&serde_json::to_string(world)?).map(Some)
    }

    pub fn holds(&self, id: &kiln_model::InstanceId) -> bool {
        let stored = self.stored.borrow();
        stored
            .as_ref()
            .is_some_and(|w| w.instances.contains_key(id))
    }

    pub fn add_release(&mut self, release: Release) -> ReleaseNumber {
        let number = self
            .releases
            .keys()
            .next_back()
            .map_or(ReleaseNumber(1), |n| n.next());
        self.releases.insert(number, release);
        self.outcomes.insert(number, Outcome::RollingOut);
        number
    }

    pub fn content(&self, number: ReleaseNumber) -> Option<&Release> {
        self.releases.get(&number)
    }
}

impl Memory for Disk {
    fn save(&self, world: &World) -> Result<(), String> {
        if self.lies.get() {
            return Ok(());
        }
        match self.tear.take() {
            Some(tear) => {
                self.torn.set(true);
                if tear == Tear::After {
                    *self.stored.borrow_mut() = Some(world.clone());
                }
                Err("the power went".into())
            }
            None if self.full.get() => Err("no space left on device".into()),
            None => {
                *self.stored.borrow_mut() = Some(world.clone());
                Ok(())
            }
        }
    }

    fn release(
        &self,
        _: &EnvironmentName,
        number: ReleaseNumber,
    ) -> Result<Option<Release>, String> {
        Ok(self.releases.get(&number).cloned())
    }
}
