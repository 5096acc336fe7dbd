//! The simulator: kiln-plan's loop, planner and checker exactly as shipped, against a
//! machine that is made up and everything that can go wrong with it. One seed gives one
//! run, always the same.
//!
//! A run has a restless part (random commands and faults), after which the faults stop
//! and kiln must come to rest: first by itself, then with a good release, then, in half
//! of the runs, with nothing. The laws ([`Broken`]) are looked at in the world outside,
//! never in what kiln believes.

mod chance;
mod hands;
mod laws;
mod memory;
mod outside;
mod project;
mod rng;
mod run;
mod traffic;

use kiln_model::ServiceName;
use kiln_model::release::Outcome;
use kiln_plan::{Goal, RolloutState, jobs};

pub use laws::{Broken, Plant};
pub use run::Summary;

use outside::Outside;
use project::LONGEST_AGE;
use run::Sim;

/// Events that the loop takes in until kiln must have come to rest after the last fault:
/// one that goes round in circles lets no time go by. How many callers come meanwhile says
/// nothing about it.
const PATIENCE: u64 = 20_000;
/// Virtual milliseconds for the same.
const PATIENCE_MS: u64 = 3_600_000;

/// Rest is what lasts this long: late events arrive, and kiln looks around once more.
const REST: u64 = 70_000;

/// A broken law, and how it came about.
#[derive(Debug)]
pub struct Failure {
    pub seed: u64,
    pub broken: Broken,
    pub steps: u64,
    /// The last things that happened.
    pub trace: Vec<String>,
}

/// Runs one seed to its end.
///
/// # Errors
/// When a law was broken.
pub fn simulate(seed: u64, plant: Option<Plant>) -> Result<Summary, Box<Failure>> {
    let mut sim = Sim::new(seed, plant).map_err(|broken| {
        Box::new(Failure {
            seed,
            broken,
            steps: 0,
            trace: Vec::new(),
        })
    })?;
    match whole(&mut sim) {
        Ok(()) => {
            sim.summary.requests = sim.outside.tally.sent;
            sim.summary.answered = sim.outside.tally.answered;
            Ok(sim.summary)
        }
        Err(broken) => Err(Box::new(Failure {
            seed,
            broken,
            steps: sim.summary.steps,
            trace: sim.trace.iter().cloned().chain(state(&sim)).collect(),
        })),
    }
}

/// What kiln believed at the end.
fn state(sim: &Sim) -> Vec<String> {
    let Some(world) = sim.keeper.as_ref().map(|k| &k.world) else {
        return Vec::new();
    };
    let mut lines = vec![format!(
        "goal {:?}, proven {:?}, rollout {:?}, concluding {:?}",
        world.goal, world.proven, world.rollout, world.concluding
    )];
    lines.extend(world.instances.iter().map(|(id, i)| {
        format!(
            "{id}: {:?} {:?}, release {}, copy {}",
            i.phase, i.health, i.release, i.index
        )
    }));
    lines.extend(sim.outside.processes.iter().map(|(id, p)| {
        let behaviour = sim.project.behaviour(&p.image);
        format!(
            "really: {id}: {:?}, {behaviour:?}, since {}",
            p.run, p.since
        )
    }));
    lines.extend(world.attempts.iter().map(|a| format!("{a:?}")));
    lines.extend(sim.report.iter().cloned());
    lines.push(format!("under way {:?}", world.under_way));
    lines
}

fn whole(sim: &mut Sim) -> Result<(), Broken> {
    while sim.now < Sim::restless_until() {
        sim.advance()?;
    }
    sim.restless = false;
    sim.disk.tear.set(None);
    sim.note(|| "==== faults stop".into());
    rest(sim, "what was begun", rollout_over)?;
    let nothing = sim.keeper.as_ref().map(|k| k.world.goal) == Some(Goal::Nothing);
    if nothing {
        nothing_is_left(&sim.outside)?;
    }
    sim.up(true)?;
    rest(sim, "a good release", settled)?;
    all_is_well(sim)?;
    nothing_is_dropped(sim)?;
    nothing_gets_too_old(sim)?;
    a_failure_is_returned_from(sim)?;
    sim.busy = true;
    bad_traffic_is_returned_from(sim)?;
    a_canary_survives_a_crash(sim)?;
    sim.busy = false;
    if sim.rng.permille(500) {
        sim.down()?;
        rest(sim, "taking everything down", settled)?;
        nothing_is_left(&sim.outside)?;
    }
    recorded(sim)
}

/// From one good release to the next, with nothing going wrong.
fn nothing_is_dropped(sim: &mut Sim) -> Result<(), Broken> {
    let before = sim.wanted();
    sim.outside.lost.clear();
    sim.up(true)?;
    rest(sim, "the next good release", settled)?;
    all_is_well(sim)?;
    let lost = sim.wanted().into_iter().find(|name| {
        let some = sim.outside.lost.contains_key(name);
        some && before.contains(name) && !sim.project.ends_well(name)
    });
    match lost {
        Some(service) => Err(Broken::RequestLost(service)),
        None => Ok(()),
    }
}

/// Time goes by; nothing else happens.
fn nothing_gets_too_old(sim: &mut Sim) -> Result<(), Broken> {
    sim.outside.lost.clear();
    let until = sim.now + LONGEST_AGE + REST;
    while sim.now < until {
        sim.advance()?;
    }
    rest(sim, "growing old", settled)?;
    all_is_well(sim)?;
    let Some(release) = sim.disk.outcomes.keys().next_back().copied() else {
        return Ok(());
    };
    let Some(release) = sim.disk.content(release) else {
        return Ok(());
    };
    let age = |name| {
        let released = release.services.get(name)?;
        Some(released.service.kiln.max_age?.0)
    };
    let old = sim.outside.processes.iter().find(|(_, p)| {
        let limit = age(&p.service).map(|age| p.since + age + REST);
        limit.is_some_and(|limit| sim.now > limit)
    });
    if let Some((id, _)) = old {
        return Err(Broken::TooOld(id.clone()));
    }
    let mut lost = sim.outside.lost.keys();
    match lost.find(|name| !sim.project.ends_well(name)) {
        Some(service) => Err(Broken::RequestLost(service.clone())),
        None => Ok(()),
    }
}

/// From a good release to one of which a service ends soon after its switch, and back.
fn a_failure_is_returned_from(sim: &mut Sim) -> Result<(), Broken> {
    let Some(spoilt) = sim.project.spoil(&mut sim.rng) else {
        return Ok(());
    };
    is_returned_from(sim, spoilt, "a release that fails after its switch")
}

/// A release whose answers are errors never ends as what serves.
fn bad_traffic_is_returned_from(sim: &mut Sim) -> Result<(), Broken> {
    // What the last phase has left is good again.
    sim.up(true)?;
    rest(sim, "a good release again", settled)?;
    let Some(spoilt) = sim.project.change_traffic(&mut sim.rng, true) else {
        return Ok(());
    };
    is_returned_from(sim, spoilt, "a release that answers with errors")
}

/// The daemon dies while traffic moves step by step, and the next one comes to the end.
fn a_canary_survives_a_crash(sim: &mut Sim) -> Result<(), Broken> {
    sim.up(true)?;
    rest(sim, "a good release once more", settled)?;
    if sim.project.change_traffic(&mut sim.rng, false).is_none() {
        return Ok(());
    }
    let release = sim.project.release().map_err(run::simulator)?;
    sim.roll_out(release, false)?;
    // Or to its end, where it has no steps.
    let proving = |sim: &Sim| {
        let rollout = sim.keeper.as_ref().and_then(|k| k.world.rollout.as_ref());
        rollout.is_some_and(|r| r.state == RolloutState::Proving && r.canary.since.is_none())
    };
    let until = sim.now + PATIENCE_MS;
    while proving(sim) && sim.now < until {
        sim.advance()?;
    }
    sim.crash();
    rest(sim, "a canary with a crash", settled)?;
    all_is_well(sim)
}

fn is_returned_from(sim: &mut Sim, spoilt: ServiceName, what: &str) -> Result<(), Broken> {
    let before = sim.keeper.as_ref().and_then(|k| k.world.proven);
    let release = sim.project.release().map_err(run::simulator)?;
    sim.roll_out(release, false)?;
    rest(sim, what, decided)?;
    let newest = sim.disk.outcomes.keys().next_back().copied();
    let newest = newest.map_or(0, |n| n.0);
    let back = sim.keeper.as_ref().and_then(|k| k.world.goal.release());
    if back != before {
        return Err(Broken::NotReturned(newest));
    }
    match sim.disk.outcomes.values().next_back() {
        Some(Outcome::Failed { .. }) => {}
        Some(Outcome::Proven) => return Err(Broken::BadReleaseProven(newest, spoilt)),
        _ => return Err(Broken::NotRecorded(newest)),
    }
    let Some(release) = before.and_then(|n| sim.disk.content(n)) else {
        return Ok(());
    };
    let mut servers = release
        .services
        .iter()
        .filter(|(name, _)| !sim.project.ends_well(name));
    let served = servers.all(|(name, s)| {
        let table = sim.outside.table.as_ref();
        let backends = table.and_then(|t| t.services.get(name));
        let mut backends = backends.into_iter().flat_map(|r| &r.backends);
        backends.all(|b| {
            let process = sim.outside.processes.get(&b.instance);
            process.is_some_and(|p| p.running() && p.image == s.image.digest)
        })
    });
    match served {
        true => Ok(()),
        false => Err(Broken::NotReturned(newest)),
    }
}

fn rest(sim: &mut Sim, what: &str, over: fn(&Sim) -> bool) -> Result<(), Broken> {
    let until = sim.now + PATIENCE_MS;
    let enough = sim.summary.steps + PATIENCE;
    let mut since = None;
    while sim.summary.steps < enough {
        since = over(sim).then(|| since.unwrap_or(sim.now));
        if since.is_some_and(|at| sim.now > at + REST) {
            return Ok(());
        }
        if sim.now > until {
            break;
        }
        sim.answer_pause()?;
        sim.advance()?;
    }
    Err(Broken::NoRest(what.into()))
}

/// Also when the release that won crashes ever after.
fn rollout_over(sim: &Sim) -> bool {
    sim.outside.proxy_up
        && !sim.disk.full.get()
        && sim.keeper.as_ref().is_some_and(|k| {
            let emptied = k.world.goal != Goal::Nothing || k.world.instances.is_empty();
            k.world.rollout.is_none() && k.world.concluding.is_none() && emptied
        })
}

fn decided(sim: &Sim) -> bool {
    rollout_over(sim) && sim.keeper.as_ref().is_some_and(|k| k.world.watch.is_none())
}

fn settled(sim: &Sim) -> bool {
    sim.keeper.as_ref().is_some_and(|k| k.world.settled())
}

/// The newest release is good: it serves, wholly, and nothing else is left.
fn all_is_well(sim: &Sim) -> Result<(), Broken> {
    let Some(keeper) = &sim.keeper else {
        return Err(Broken::WrongEnd("no daemon".into()));
    };
    let newest = sim.disk.outcomes.keys().next_back().copied();
    if keeper.world.goal.release() != newest || keeper.world.proven != newest {
        let goal = keeper.world.goal;
        return Err(Broken::WrongEnd(format!(
            "{goal:?} is wanted instead of {newest:?}"
        )));
    }
    let known = keeper.world.instances.len();
    let real = sim.outside.processes.len();
    if known != real || !sim.outside.processes.values().all(|p| p.running()) {
        return Err(Broken::Leak(format!(
            "{real} instances, of which {known} are known"
        )));
    }
    let Some(release) = newest.and_then(|n| sim.disk.content(n)) else {
        return Ok(());
    };
    for name in sim.wanted() {
        let released = release.services.get(&name);
        let replicas = released.map_or(0, |s| s.service.replicas as usize);
        if sim.project.ends_well(&name) {
            continue;
        }
        let table = sim.outside.table.as_ref();
        let serving = table.and_then(|t| t.services.get(&name)).map_or(0, |r| {
            r.backends
                .iter()
                .filter(|b| sim.outside.runs(&b.instance))
                .count()
        });
        if serving != replicas {
            return Err(Broken::WrongEnd(format!(
                "{serving} of {replicas} instances of `{name}` serve"
            )));
        }
    }
    let mut outside_requests = sim.outside.requests.values();
    match outside_requests.find(|r| matches!(r.held, outside::Held::Parked { .. })) {
        Some(request) => Err(Broken::RequestLost(request.service.clone())),
        None => Ok(()),
    }
}

fn nothing_is_left(outside: &Outside) -> Result<(), Broken> {
    let table = outside.table.as_ref();
    let routed = table.is_some_and(|t| !t.services.is_empty());
    if !outside.processes.is_empty() || outside.networks || routed {
        return Err(Broken::Leak("after everything was taken down".into()));
    }
    Ok(())
}

fn recorded(sim: &Sim) -> Result<(), Broken> {
    let open = sim
        .disk
        .outcomes
        .iter()
        .find(|(_, outcome)| **outcome == Outcome::RollingOut);
    if let Some((number, _)) = open {
        return Err(Broken::NotRecorded(number.0));
    }
    none_was_called_proven_wrongly(sim)?;
    let proven = sim.keeper.as_ref().and_then(|k| k.world.proven);
    let goal = sim.keeper.as_ref().map(|k| k.world.goal);
    match goal {
        Some(Goal::Release(number)) if Some(number) != proven => {
            Err(Broken::WrongEnd(format!("release {number} is not proven")))
        }
        _ => Ok(()),
    }
}

fn none_was_called_proven_wrongly(sim: &Sim) -> Result<(), Broken> {
    let proven = sim
        .disk
        .outcomes
        .iter()
        .filter(|(_, o)| **o == Outcome::Proven);
    for (number, _) in proven {
        let Some(release) = sim.disk.content(*number) else {
            continue;
        };
        let jobs = jobs(release);
        let hopeless = release.services.iter().find(|(name, s)| {
            let job = jobs.contains(*name);
            sim.project.behaviour(&s.image.digest).hopeless(job)
        });
        if let Some((name, _)) = hopeless {
            return Err(Broken::BadReleaseProven(number.0, name.clone()));
        }
    }
    Ok(())
}
