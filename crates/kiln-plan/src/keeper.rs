//! The loop without hands: takes an event in, plans, checks, and has the new world
//! stored before anything is done about it. kiln-daemon runs it with a database and a
//! clock, the simulator with fakes; nothing else turns events into effects.

use kiln_model::{EnvironmentName, Millis, Release, ReleaseNumber};

use crate::check::{Violation, check};
use crate::effect::{Event, Plan};
use crate::world::{Releases, World};
use crate::{apply, step};

/// After a refused step the caller feeds [`Event::Tick`] in this much later.
pub const TRY_AGAIN: Millis = Millis(1000);

/// What the loop remembers over restarts. Every call is durable when it returns.
pub trait Memory {
    fn save(&self, world: &World) -> Result<(), String>;
    fn release(
        &self,
        environment: &EnvironmentName,
        number: ReleaseNumber,
    ) -> Result<Option<Release>, String>;
}

/// Why a step was not taken. What the event says has been taken note of all the same,
/// unless it was a wish.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{violation}")]
    Unlawful {
        violation: Violation,
        plan: Box<Plan>,
    },
    /// Effects without a stored intent would be forgotten by a crash.
    #[error("the environment's state could not be stored: {0}")]
    NotStored(String),
    #[error("a release could not be read: {0}")]
    Unreadable(String),
}

/// One environment's loop.
#[derive(Clone, Debug)]
pub struct Keeper {
    pub world: World,
    pub releases: Releases,
}

impl Keeper {
    /// Goes on where an earlier process stopped; the caller feeds [`Event::Found`] next.
    pub fn resume(world: World) -> Self {
        Self {
            world: world.recovered(),
            releases: Releases::default(),
        }
    }

    /// Takes one event in. The effects returned are to be carried out: the world that
    /// wants them is stored.
    ///
    /// # Errors
    /// Nothing is to be done now; a [`Event::Tick`] after [`TRY_AGAIN`] plans anew.
    pub fn take(
        &mut self,
        memory: &dyn Memory,
        event: Event,
        now: Millis,
    ) -> Result<Plan, Refused> {
        let wanted = match &event {
            Event::Desired { goal, .. } => goal.release(),
            _ => None,
        };
        if let Err(cause) = self.load(memory, wanted) {
            self.note(event, now);
            return Err(Refused::Unreadable(cause));
        }
        let before = self.world.clone();
        let plan = step(&mut self.world, &self.releases, event.clone(), now);
        if let Err(violation) = check(&self.world, &self.releases, &plan) {
            self.world = before;
            self.note(event, now);
            let plan = Box::new(plan);
            return Err(Refused::Unlawful { violation, plan });
        }
        if !self.world.stored_alike(&before)
            && let Err(cause) = memory.save(&self.world)
        {
            self.world = before;
            self.note(event, now);
            return Err(Refused::NotStored(cause));
        }
        Ok(plan)
    }

    /// Facts are believed even if nothing can be done about them now: they come once.
    /// A wish that could not be stored was not granted.
    fn note(&mut self, event: Event, now: Millis) {
        let wish = matches!(
            event,
            Event::Desired { .. }
                | Event::Abandoned { .. }
                | Event::Paused { .. }
                | Event::Resumed
                | Event::Promoted
        );
        if !wish {
            apply(&mut self.world, event, now);
        }
    }

    /// Has at hand the releases the world refers to, and the one about to be wanted.
    ///
    /// # Errors
    /// When one can't be read.
    pub fn load(
        &mut self,
        memory: &dyn Memory,
        wanted: Option<ReleaseNumber>,
    ) -> Result<(), String> {
        let mut needed = self.world.needed_releases();
        needed.extend(wanted);
        self.releases.retain(|number| needed.contains(&number));
        for number in needed {
            if self.releases.get(number).is_some() {
                continue;
            }
            let release = memory
                .release(&self.world.environment, number)?
                .ok_or_else(|| format!("release {number} is not in the database"))?;
            self.releases
                .insert(number, release)
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
