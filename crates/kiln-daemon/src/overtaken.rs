//! Calls that hang and go on after a later one has decided otherwise: they are refused, so
//! that an instance that was given up is not started after all, and networks that were
//! taken down do not come back. Threads end with the daemon, and so does what is kept here.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_model::InstanceId;

#[derive(Default)]
pub struct Overtaken {
    /// The number of the latest wish about networks.
    networks: Mutex<u64>,
    /// Starts that have not begun their work.
    starts: Mutex<BTreeMap<InstanceId, Starts>>,
}

#[derive(Default)]
struct Starts {
    /// A start may be called again while an earlier call of it hangs.
    calls: u32,
    given_up: bool,
}

impl Overtaken {
    /// A new wish about the environment's networks: earlier ones lapse.
    pub fn wish(&self) -> u64 {
        let mut latest = self.networks();
        *latest += 1;
        *latest
    }

    /// Holds others off while a wish is carried out. `None`: a later one has come.
    pub fn turn(&self, wish: u64) -> Option<MutexGuard<'_, u64>> {
        Some(self.networks()).filter(|latest| **latest == wish)
    }

    fn networks(&self) -> MutexGuard<'_, u64> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn start_begins(&self, id: &InstanceId) {
        self.starts().entry(id.clone()).or_default().calls += 1;
    }

    /// It is to end: what would still start it may not.
    pub fn no_start(&self, id: &InstanceId) {
        if let Some(starts) = self.starts().get_mut(id) {
            starts.given_up = true;
        }
    }

    /// Asked once by each call, right before the start.
    pub fn may_start(&self, id: &InstanceId) -> bool {
        let mut all = self.starts();
        let Some(starts) = all.get_mut(id) else {
            return false;
        };
        let may = !starts.given_up;
        starts.calls = starts.calls.saturating_sub(1);
        if starts.calls == 0 {
            all.remove(id);
        }
        may
    }

    fn starts(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Starts>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_later_wish_refuses_an_earlier_one() {
        let overtaken = Overtaken::default();
        let first = overtaken.wish();
        assert!(overtaken.turn(first).is_some());
        let second = overtaken.wish();
        assert!(overtaken.turn(first).is_none());
        assert!(overtaken.turn(second).is_some());
    }

    #[test]
    fn what_was_given_up_is_not_started() {
        let overtaken = Overtaken::default();
        let id: InstanceId = "shop-web-1".parse().unwrap();
        overtaken.start_begins(&id);
        overtaken.start_begins(&id);
        assert!(overtaken.may_start(&id));
        overtaken.no_start(&id);
        assert!(!overtaken.may_start(&id));
        assert!(overtaken.starts().is_empty());
    }
}
