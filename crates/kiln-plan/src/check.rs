//! Validates every plan, whoever made it: a wrong plan is refused, not carried out.

use std::collections::BTreeMap;

use kiln_model::ServiceName;
use kiln_model::route::RouteMode;

use crate::canary;
use crate::effect::{Effect, Plan};
use crate::service::is_exclusive;
use crate::world::{Goal, Releases, World};

/// A law of replacement that a plan would break.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("service `{0}` would lose its last healthy instance while another release is unproven")]
    NobodyServes(ServiceName),
    #[error("instance `{0}` would be drained while traffic is still sent to it")]
    DrainedWhileServing(String),
    #[error("instance `{0}` would be stopped before it has been drained")]
    StoppedWhileServing(String),
    #[error("two instances of `{0}`, which must not overlap, would run at once")]
    TwoWriters(ServiceName),
    #[error("the new instances of `{0}` would get more traffic than their step says")]
    TooMuchWeight(ServiceName),
    #[error("the routing table's generation would go back")]
    GenerationWentBack,
}

/// Checks `plan` against the world as it is after [`crate::step`] has marked it.
pub fn check(world: &World, releases: &Releases, plan: &Plan) -> Result<(), Violation> {
    for effect in &plan.effects {
        match effect {
            Effect::Route(table) => {
                if world
                    .routes
                    .as_ref()
                    .is_some_and(|old| old.generation > table.generation)
                {
                    return Err(Violation::GenerationWentBack);
                }
                keeps_serving(world, table)?;
                keeps_to_the_step(world, releases, table)?;
            }
            Effect::Drain { id, .. } if world.routed(id) => {
                return Err(Violation::DrainedWhileServing(id.to_string()));
            }
            Effect::Stop { id, .. } if world.routed(id) => {
                return Err(Violation::StoppedWhileServing(id.to_string()));
            }
            _ => {}
        }
    }
    one_writer(world, releases)
}

/// A service that has a healthy instance keeps one in the table, unless it is handed
/// over (its requests wait) or is to go.
fn keeps_serving(world: &World, table: &kiln_model::RoutingTable) -> Result<(), Violation> {
    if world.goal == Goal::Nothing {
        return Ok(());
    }
    for (name, route) in &table.services {
        let waits = matches!(route.mode, RouteMode::Park { .. });
        let has_ready = world
            .of_service(name)
            .any(|(_, i)| i.phase.ready() && !i.job);
        if route.backends.is_empty() && !waits && has_ready {
            return Err(Violation::NobodyServes(name.clone()));
        }
    }
    Ok(())
}

/// As long as an old instance is there to take the rest.
fn keeps_to_the_step(
    world: &World,
    releases: &Releases,
    table: &kiln_model::RoutingTable,
) -> Result<(), Violation> {
    let Some(canary) = canary::under_way(world, releases) else {
        return Ok(());
    };
    for (name, route) in &table.services {
        let Some(weight) = canary.weight(name) else {
            continue;
        };
        let gets = route.split.as_ref().map(|split| split.weight);
        if gets.is_some_and(|gets| gets > weight) {
            return Err(Violation::TooMuchWeight(name.clone()));
        }
    }
    Ok(())
}

fn one_writer(world: &World, releases: &Releases) -> Result<(), Violation> {
    let mut alive: BTreeMap<&ServiceName, u32> = BTreeMap::new();
    for instance in world
        .instances
        .values()
        .filter(|i| i.phase.alive() && !i.job)
    {
        if releases.service_of(instance).is_some_and(is_exclusive) {
            *alive.entry(&instance.service).or_default() += 1;
        }
    }
    match alive.into_iter().find(|(_, count)| *count > 1) {
        Some((service, _)) => Err(Violation::TwoWriters(service.clone())),
        None => Ok(()),
    }
}
