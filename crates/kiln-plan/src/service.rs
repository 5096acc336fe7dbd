//! What a service's own definition says about how it may be replaced.

use std::collections::BTreeSet;

use kiln_model::release::{Release, ReleasedService};
use kiln_model::spec::{
    Condition, MountSource, NamespaceMode, NetworkMode, Order, RestartPolicy, Service, ServiceMode,
    Strategy, UpdateConfig,
};
use kiln_model::{Millis, ServiceName};

use crate::world::World;

/// What runs once to its end: jobs by mode, and what others wait for to complete.
pub fn jobs(release: &Release) -> BTreeSet<ServiceName> {
    let by_mode = |(name, s): (&ServiceName, &ReleasedService)| {
        (s.service.mode == ServiceMode::Job).then(|| name.clone())
    };
    let awaited = release.services.values().flat_map(|s| {
        let all = s.service.depends_on.iter();
        all.filter(|(_, d)| d.condition == Condition::CompletedSuccessfully)
            .map(|(name, _)| name.clone())
    });
    release
        .services
        .iter()
        .filter_map(by_mode)
        .chain(awaited)
        .collect()
}

/// Two copies must not overlap: a single copy that writes to a volume or to a folder
/// of the host, or holds host ports itself. `x-kiln.exclusive` and an explicit
/// `update_config.order` decide otherwise. A service with several replicas shares its
/// volume between copies anyway.
pub fn is_exclusive(released: &ReleasedService) -> bool {
    let service = &released.service;
    if let Some(stated) = service.kiln.exclusive {
        return stated;
    }
    if service.replicas != 1 {
        return false;
    }
    let way_back = service.rollback.as_ref().and_then(|r| r.order);
    match (service.update.order, way_back) {
        (Some(Order::StartFirst), _) => return false,
        (Some(Order::StopFirst), None | Some(Order::StopFirst)) => return true,
        _ => {}
    }
    let writes = service.mounts.iter().any(|m| {
        !m.read_only
            && matches!(
                m.source,
                MountSource::Volume { .. } | MountSource::Bind { .. }
            )
            && !is_socket_of_the_host(m)
    });
    let holds_host_ports =
        service.network == NetworkMode::Host || !service.security.devices.is_empty();
    writes || holds_host_ports
}

/// `rollback_config` on the way back, where the file has one, else `update_config`: of the
/// release that is on its way in.
pub(crate) fn manner<'r>(world: &World, released: &'r ReleasedService) -> &'r UpdateConfig {
    let back = released.service.rollback.as_ref();
    let back = back.filter(|_| world.goes_back());
    back.unwrap_or(&released.service.update)
}

/// Old copies make room before new ones come, as many as may be begun at once.
pub(crate) fn stops_first(world: &World, released: &ReleasedService) -> bool {
    let stated = manner(world, released).order;
    let recreated = strategy(released) == Some(&Strategy::Recreate);
    let first = stated.map_or(recreated, |order| order == Order::StopFirst);
    first && !is_exclusive(released)
}

pub(crate) fn strategy(released: &ReleasedService) -> Option<&Strategy> {
    released.service.kiln.rollout.as_ref()?.strategy.as_ref()
}

/// A socket is spoken to, not written: `/var/run/docker.sock` and its like.
fn is_socket_of_the_host(mount: &kiln_model::spec::Mount) -> bool {
    matches!(&mount.source, MountSource::Bind { path, .. }
        if path.extension().is_some_and(|e| e == "sock"))
}

/// Services whose instances' namespaces an instance of this one shares.
pub fn joins(service: &Service) -> impl Iterator<Item = &ServiceName> {
    let network = match &service.network {
        NetworkMode::Service(other) => Some(other),
        _ => None,
    };
    let namespaces = &service.namespaces;
    let others = [&namespaces.pid, &namespaces.ipc]
        .into_iter()
        .filter_map(|mode| match mode {
            NamespaceMode::Service(other) => Some(other),
            _ => None,
        });
    network.into_iter().chain(others)
}

/// How many new copies may be unproven at once; all of them unless the file says less.
pub(crate) fn batch(world: &World, released: &ReleasedService) -> u32 {
    let stated = manner(world, released).parallelism;
    let all = released.service.replicas;
    match (stated, strategy(released)) {
        (None, Some(Strategy::Rolling)) => all.min(1),
        (None | Some(0), _) => all,
        (Some(n), _) => n.min(all),
    }
}

/// How long what an old instance still holds may keep it.
pub(crate) fn drain_limit(released: Option<&ReleasedService>) -> Millis {
    const DEFAULT: Millis = Millis(60_000);
    released
        .and_then(|r| r.service.kiln.drain)
        .unwrap_or(DEFAULT)
}

/// `(signal, grace)`.
pub(crate) fn stop_of(released: Option<&ReleasedService>) -> (String, Millis) {
    const GRACE: Millis = Millis(10_000);
    let process = released.map(|r| &r.service.process);
    let signal = process
        .and_then(|p| p.stop_signal.clone())
        .or_else(|| released.and_then(|r| r.image.config.stop_signal.clone()))
        .unwrap_or_else(|| "SIGTERM".into());
    (signal, process.and_then(|p| p.stop_grace).unwrap_or(GRACE))
}

/// May a copy that has ended be started anew outside of a rollout?
pub(crate) fn restarts(policy: &RestartPolicy, failed: bool, failures: u32) -> bool {
    match policy {
        RestartPolicy::No => false,
        RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
        RestartPolicy::OnFailure { max_retries } => {
            failed && max_retries.is_none_or(|max| failures <= max)
        }
    }
}

/// Failures in a row after which a new release's copy is given up. With a restart
/// policy a program may count on being started again (waiting for a peer, say).
pub(crate) fn tries_in_rollout(policy: &RestartPolicy) -> u32 {
    match policy {
        RestartPolicy::No => 1,
        RestartPolicy::OnFailure {
            max_retries: Some(max),
        } => (*max + 1).min(4),
        _ => 4,
    }
}

/// How long to wait after the `failures`th failure in a row: 0.5 s doubling to 60 s.
pub(crate) fn backoff(failures: u32) -> Millis {
    const FIRST: u64 = 500;
    const LONGEST: u64 = 60_000;
    if failures == 0 {
        return Millis(0);
    }
    Millis((FIRST << (failures - 1).min(7)).min(LONGEST))
}
