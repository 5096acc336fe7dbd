//! The machine as it is, whatever anybody believes: processes, the proxy and the
//! requests it holds. It knows the laws and says when one is broken.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::instance::{ExitStatus, Observed, ObservedState};
use kiln_model::route::{RouteMode, RoutingTable, ServiceRoute, Split};
use kiln_model::{Digest, InstanceId, Millis, ServiceName, Traffic};

use super::laws::Broken;

/// A table may be this old when the proxy gets it: calls hang, events are late.
const STALE: u64 = 450_000;

pub struct Process {
    pub service: ServiceName,
    pub image: Digest,
    pub exclusive: bool,
    pub run: Run,
    pub since: u64,
    /// Since when it has shown that it can serve.
    pub proven: Option<u64>,
    /// It was told to drain or stop.
    pub retired: bool,
    pub drained: bool,
    pub in_flight: BTreeSet<u64>,
    /// As the proxy counts.
    pub traffic: Traffic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    Running,
    Exited {
        status: ExitStatus,
        at: u64,
    },
    /// Ended with nobody to see it.
    Dead,
}

impl Process {
    pub fn running(&self) -> bool {
        self.run == Run::Running
    }
}

pub struct Request {
    pub service: ServiceName,
    pub held: Held,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    By(InstanceId),
    Parked { until: u64 },
}

/// How requests ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    /// Nobody was there to answer, and kiln was not the cause.
    pub refused: u64,
    /// Its instance ended by itself, or the proxy did.
    pub broken_off: u64,
    /// Still open at the drain limit.
    pub cut: u64,
    pub parked: u64,
    pub park_ran_out: u64,
}

#[derive(Default)]
pub struct Outside {
    pub processes: BTreeMap<InstanceId, Process>,
    /// Gone for good: a start that hung must not bring it back.
    pub gone: BTreeSet<InstanceId>,
    pub networks: bool,
    /// The latest wish about them: what an earlier one hung for is refused.
    pub networks_wish: u64,
    pub proxy_up: bool,
    /// What the proxy follows; it keeps it over its own restart.
    pub table: Option<RoutingTable>,
    highest_sent: u64,
    /// Planted: callers who wait are forgotten when the table changes.
    pub forgetful: bool,
    /// Planted: all backends get the same.
    pub even: bool,
    /// Callers that were sent on while a split was in force with somebody running in both
    /// its parts: all of them, and those to the part.
    shares: BTreeMap<ServiceName, (Split, u64, u64)>,
    /// Requests that nobody answered, by service.
    pub lost: BTreeMap<ServiceName, u64>,
    pub requests: BTreeMap<u64, Request>,
    pub tally: Tally,
}

impl Outside {
    /// Somebody answers, or callers wait.
    pub fn served(&self, service: &ServiceName) -> bool {
        let Some(route) = self.table.as_ref().and_then(|t| t.services.get(service)) else {
            return false;
        };
        match route.backends.is_empty() {
            true => matches!(route.mode, RouteMode::Park { .. }),
            false => route.backends.iter().any(|b| self.runs(&b.instance)),
        }
    }

    /// Somebody answers now.
    fn answered(&self, service: &ServiceName) -> bool {
        let route = self.table.as_ref().and_then(|t| t.services.get(service));
        route.is_some_and(|r| r.backends.iter().any(|b| self.runs(&b.instance)))
    }

    pub fn runs(&self, id: &InstanceId) -> bool {
        self.processes.get(id).is_some_and(Process::running)
    }

    pub fn routed(&self, id: &InstanceId) -> bool {
        self.table.as_ref().is_some_and(|table| {
            table
                .services
                .values()
                .any(|s| s.backends.iter().any(|b| &b.instance == id))
        })
    }

    /// # Errors
    /// When it would be a second writer.
    pub fn start(&mut self, id: &InstanceId, process: Process) -> Result<(), Broken> {
        if self.runs(id) {
            return Ok(());
        }
        let second = process.exclusive
            && self.processes.iter().any(|(other, p)| {
                other != id && p.exclusive && p.running() && p.service == process.service
            });
        if second {
            return Err(Broken::TwoWriters(process.service));
        }
        self.processes.insert(id.clone(), process);
        Ok(())
    }

    /// Kiln ends it.
    ///
    /// # Errors
    /// When it was not done with its work.
    pub fn stop(
        &mut self,
        id: &InstanceId,
        wanted: &BTreeSet<ServiceName>,
        now: u64,
    ) -> Result<(), Broken> {
        self.gone.insert(id.clone());
        let Some(process) = self.processes.get(id).filter(|p| p.running()) else {
            return Ok(());
        };
        if !process.in_flight.is_empty() && !process.drained {
            return Err(Broken::NotDrained(id.clone()));
        }
        let service = process.service.clone();
        let before = self.served(&service);
        if self.routed(id) && wanted.contains(&service) {
            return Err(Broken::EndedWhileRouted(id.clone()));
        }
        self.end(id, ExitStatus::Code(0), now);
        if before && !self.served(&service) && wanted.contains(&service) {
            return Err(Broken::NobodyServes(service));
        }
        Ok(())
    }

    /// It ends, for whatever reason; what it held is broken off.
    pub fn end(&mut self, id: &InstanceId, status: ExitStatus, now: u64) {
        if let Some(process) = self.processes.get_mut(id).filter(|p| p.running()) {
            process.run = match status {
                ExitStatus::Unknown => Run::Dead,
                status => Run::Exited { status, at: now },
            };
            let service = process.service.clone();
            for request in std::mem::take(&mut process.in_flight) {
                process.traffic.requests += 1;
                process.traffic.failed += 1;
                self.requests.remove(&request);
                self.tally.broken_off += 1;
                *self.lost.entry(service.clone()).or_default() += 1;
            }
        }
    }

    fn loses(&mut self, service: &ServiceName) {
        *self.lost.entry(service.clone()).or_default() += 1;
    }

    /// # Errors
    /// When it still ran.
    pub fn remove(&mut self, id: &InstanceId) -> Result<(), Broken> {
        self.gone.insert(id.clone());
        if self.runs(id) {
            return Err(Broken::RemovedAlive(id.clone()));
        }
        self.processes.remove(id);
        Ok(())
    }

    /// The table is handed to the proxy; false: it follows a newer one already.
    ///
    /// # Errors
    /// When the table takes traffic from who could serve.
    pub fn apply(
        &mut self,
        table: &RoutingTable,
        wanted: &BTreeSet<ServiceName>,
        now: u64,
    ) -> Result<bool, Broken> {
        let current = self.table.as_ref().map_or(0, |t| t.generation.0);
        if table.generation.0 < current {
            return Ok(false);
        }
        let before: Vec<(ServiceName, bool)> = wanted
            .iter()
            .filter(|s| self.served(s))
            .map(|s| (s.clone(), self.answered(s)))
            .collect();
        self.table = Some(table.clone());
        for (service, answered) in before {
            // Those in the table may have ended by themselves since it was made.
            let chosen = table
                .services
                .get(&service)
                .is_some_and(|r| !r.backends.is_empty());
            let able = self.processes.values().any(|p| {
                let since = p.proven.unwrap_or(now);
                let known = answered || now - since > STALE;
                p.service == service && p.running() && !p.retired && p.proven.is_some() && known
            });
            if able && !chosen && !self.served(&service) {
                return Err(Broken::NobodyServes(service));
            }
        }
        self.release_parked(now);
        Ok(true)
    }

    /// Kiln hands a table out.
    ///
    /// # Errors
    /// When an earlier one had as high a generation, or it sends traffic to what never
    /// proved itself.
    pub fn sent(&mut self, table: &RoutingTable) -> Result<(), Broken> {
        let now = table.generation.0;
        if now <= self.highest_sent {
            let before = self.highest_sent;
            return Err(Broken::GenerationWentBack { before, now });
        }
        self.highest_sent = now;
        let backends = table.services.values().flat_map(|s| &s.backends);
        for id in backends.map(|b| &b.instance) {
            let process = self.processes.get(id);
            if process.is_some_and(|p| p.proven.is_none()) {
                return Err(Broken::UnprovenServes(id.clone()));
            }
        }
        Ok(())
    }

    fn release_parked(&mut self, now: u64) {
        let parked: Vec<(u64, ServiceName)> = self
            .requests
            .iter()
            .filter(|(_, r)| matches!(r.held, Held::Parked { .. }))
            .map(|(n, r)| (*n, r.service.clone()))
            .collect();
        for (number, service) in parked {
            let waits = self
                .table
                .as_ref()
                .and_then(|t| t.services.get(&service))
                .is_some_and(|r| r.backends.is_empty() && r.mode != RouteMode::Serve);
            if !waits {
                self.requests.remove(&number);
                if self.forgetful {
                    self.tally.refused += 1;
                    self.loses(&service);
                } else {
                    self.dispatch(number, &service, now);
                }
            }
        }
    }

    /// A caller comes. `Some`: an instance works on it.
    pub fn arrive(&mut self, service: &ServiceName, now: u64) -> Option<u64> {
        self.tally.sent += 1;
        let number = self.tally.sent;
        if !self.proxy_up {
            self.tally.broken_off += 1;
            return None;
        }
        self.dispatch(number, service, now)
    }

    fn dispatch(&mut self, number: u64, service: &ServiceName, now: u64) -> Option<u64> {
        let Some(route) = self.table.as_ref().and_then(|t| t.services.get(service)) else {
            self.tally.refused += 1;
            self.loses(service);
            return None;
        };
        let (mode, parks) = (route.mode, route.backends.is_empty());
        let best = self.choose(service, &route.clone());
        let held = match (best, mode) {
            (Some(id), _) => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.in_flight.insert(number);
                }
                Held::By(id)
            }
            (None, RouteMode::Park { limit }) if parks => {
                self.tally.parked += 1;
                Held::Parked {
                    until: now + limit.0,
                }
            }
            _ => {
                self.tally.refused += 1;
                self.loses(service);
                return None;
            }
        };
        let service = service.clone();
        self.requests.insert(number, Request { service, held });
        Some(number)
    }

    /// The one that runs and has the least to do, of the part whose turn it is.
    fn choose(&mut self, service: &ServiceName, route: &ServiceRoute) -> Option<InstanceId> {
        let running = |to: Option<bool>| {
            let part = |id: &InstanceId| route.split.as_ref().map(|s| s.to.contains(id));
            route
                .backends
                .iter()
                .filter(|b| to.is_none() || part(&b.instance) == to)
                .filter_map(|b| Some((&b.instance, self.processes.get(&b.instance)?)))
                .filter(|(_, p)| p.running())
                .min_by_key(|(_, p)| p.in_flight.len())
                .map(|(id, _)| id.clone())
        };
        let Some(split) = &route.split else {
            self.shares.remove(service);
            return running(None);
        };
        let (Some(part), Some(rest)) = (running(Some(true)), running(Some(false))) else {
            return running(None);
        };
        let any = running(None);
        let fresh = || (split.clone(), 0, 0);
        let share = self.shares.entry(service.clone()).or_insert_with(fresh);
        if share.0 != *split {
            *share = fresh();
        }
        let weight = u64::from(split.weight);
        let turn = (share.1 + 1) * weight / 100 > share.1 * weight / 100;
        let chosen = match turn {
            _ if self.even => any?,
            true => part,
            false => rest,
        };
        share.1 += 1;
        share.2 += u64::from(split.to.contains(&chosen));
        Some(chosen)
    }

    /// Of any number of callers no more than the part's weight were sent to it.
    ///
    /// # Errors
    /// When more were.
    pub fn keeps_to_the_weights(&self) -> Result<(), Broken> {
        let over = self.shares.iter().find(|(_, (split, all, part))| {
            let few = 100;
            part * 100 > all * u64::from(split.weight) + few
        });
        match over {
            Some((service, _)) => Err(Broken::TooMuchWeight(service.clone())),
            None => Ok(()),
        }
    }

    /// Who works on a request.
    pub fn worker(&self, number: u64) -> Option<&Process> {
        match &self.requests.get(&number)?.held {
            Held::By(id) => self.processes.get(id),
            Held::Parked { .. } => None,
        }
    }

    /// Who works on it is done, and says that it went well, or not.
    pub fn answer(&mut self, number: u64, well: bool) {
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if let Held::By(id) = &request.held {
            if let Some(process) = self.processes.get_mut(id) {
                process.in_flight.remove(&number);
                process.traffic.requests += 1;
                process.traffic.failed += u64::from(!well);
            }
            self.requests.remove(&number);
            self.tally.answered += 1;
        }
    }

    /// Callers who have waited for as long as the table says.
    pub fn give_up_waiting(&mut self, now: u64) {
        let over: Vec<(u64, ServiceName)> = self
            .requests
            .iter()
            .filter(|(_, r)| matches!(r.held, Held::Parked { until } if until <= now))
            .map(|(n, r)| (*n, r.service.clone()))
            .collect();
        for (number, service) in over {
            self.requests.remove(&number);
            self.tally.park_ran_out += 1;
            self.loses(&service);
        }
    }

    /// The drain limit: what is still open is closed.
    pub fn cut(&mut self, id: &InstanceId) {
        if let Some(process) = self.processes.get_mut(id) {
            process.drained = true;
            for request in std::mem::take(&mut process.in_flight) {
                self.requests.remove(&request);
                self.tally.cut += 1;
            }
        }
    }

    pub fn proxy_ends(&mut self) {
        self.proxy_up = false;
        for process in self.processes.values_mut() {
            process.in_flight.clear();
            process.traffic = Traffic::default();
        }
        self.tally.broken_off += self.requests.len() as u64;
        self.requests.clear();
    }

    pub fn host_goes_down(&mut self, now: u64) {
        self.proxy_ends();
        self.networks = false;
        let ids: Vec<InstanceId> = self.processes.keys().cloned().collect();
        for id in ids {
            self.end(&id, ExitStatus::Unknown, now);
        }
    }

    /// As the runtime would list them; `offset` is what the clock is wrong by.
    pub fn observed(&self, clock: impl Fn(u64) -> Millis) -> Vec<Observed> {
        self.processes
            .iter()
            .map(|(id, p)| Observed {
                id: id.clone(),
                state: match p.run {
                    Run::Running => ObservedState::Running {
                        pid: 1,
                        since: clock(p.since),
                    },
                    Run::Exited { status, at } => ObservedState::Exited {
                        status,
                        at: clock(at),
                    },
                    Run::Dead => ObservedState::Dead,
                },
                warnings: Vec::new(),
            })
            .collect()
    }

    /// Every request has come to an end of a known kind, or is held.
    ///
    /// # Errors
    /// When one is neither.
    pub fn all_accounted_for(&self) -> Result<(), Broken> {
        let t = &self.tally;
        let ended = t.answered + t.refused + t.broken_off + t.cut + t.park_ran_out;
        match ended + self.requests.len() as u64 == t.sent {
            true => Ok(()),
            false => Err(Broken::Simulator("a request was lost count of".into())),
        }
    }
}
