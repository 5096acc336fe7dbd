//! What is running and how it compares with what should be: read-only views.

use std::collections::BTreeMap;

use kiln_model::instance::{InstanceMountSource, InstanceNetwork, ObservedState, Root};
use kiln_model::route::RouteMode;
use kiln_model::spec::{Protocol, RootSetting};
use kiln_model::{InstanceId, ServiceName};
use kiln_plan::{Goal, Health, Instance, Phase, Prepared, Releases, World};

use crate::api::error::ApiError;
use crate::api::types::{EnvironmentStatus, Explanation, InstanceStatus, ServiceStatus, Traffic};
use crate::narrate::phase_name;
use crate::rollouts;
use crate::shared::Shared;

/// What the engine itself knows; the rest is [`with_traffic`]'s and [`look_inside`]'s.
pub fn environment(world: &World, releases: &Releases, report: Vec<String>) -> EnvironmentStatus {
    let goal = world.goal.release().and_then(|n| releases.get(n));
    let mut names: Vec<ServiceName> = goal
        .map(|g| g.release.services.keys().cloned().collect())
        .unwrap_or_default();
    for instance in world.instances.values() {
        if !names.contains(&instance.service) {
            names.push(instance.service.clone());
        }
    }
    let services = names
        .iter()
        .map(|n| service(world, releases, goal, n))
        .collect();
    EnvironmentStatus {
        environment: world.environment.clone(),
        goal: world.goal.release(),
        proven: world.proven,
        serving: rollouts::serving(world),
        rollout: rollouts::status(world, releases, report),
        watch: rollouts::watch(world),
        services,
        problem: world.ports_failed.clone(),
    }
}

fn service(
    world: &World,
    releases: &Releases,
    goal: Option<&Prepared>,
    name: &ServiceName,
) -> ServiceStatus {
    let released = goal.and_then(|g| g.release.services.get(name));
    let route = world.routes.as_ref().and_then(|t| t.services.get(name));
    let instances: Vec<InstanceStatus> = world
        .of_service(name)
        .map(|(id, i)| instance(world, releases, goal, id, i))
        .collect();
    let job = goal.is_some_and(|g| g.is_job(name));
    let completed = goal.is_some_and(|g| {
        world.jobs_done.contains(&(g.digest, name.clone())) || kiln_plan::rests(world, g, name, 1)
    });
    let state = match route {
        _ if completed => "completed",
        Some(route) if !route.backends.is_empty() => "serving",
        Some(route) if matches!(route.mode, RouteMode::Park { .. }) => "parked",
        _ if instances.iter().any(|i| i.phase == "ready") => "running",
        _ if !instances.is_empty() || job => "starting",
        _ => "down",
    };
    let ports = world
        .routes
        .iter()
        .flat_map(|t| &t.published)
        .filter(|p| &p.service == name)
        .map(|p| {
            let protocol = match p.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            format!("{} → {}/{protocol}", p.listen, p.target)
        })
        .collect();
    ServiceStatus {
        service: name.clone(),
        state: state.into(),
        image: released
            .map(|r| format!("{}@{}", r.image.name, r.image.digest.short()))
            .unwrap_or_default(),
        ports,
        instances,
    }
}

fn instance(
    world: &World,
    releases: &Releases,
    goal: Option<&Prepared>,
    id: &InstanceId,
    instance: &Instance,
) -> InstanceStatus {
    let released = releases.service_of(instance);
    let since = match instance.phase {
        Phase::Warming { since } | Phase::Ready { since } => since,
        Phase::Ended { at, .. } => at,
        _ => instance.created,
    };
    InstanceStatus {
        id: id.clone(),
        release: instance.release,
        current: goal
            .is_some_and(|g| g.revisions.get(&instance.service) == Some(&instance.revision)),
        phase: phase_name(&instance.phase).into(),
        health: match &instance.health {
            Health::Unknown => "unknown".into(),
            Health::Healthy => "healthy".into(),
            Health::Unhealthy { reason } => format!("unhealthy: {reason}"),
        },
        serving: world.routed(id),
        traffic: None,
        since: since.0,
        pid: None,
        sealed: released.is_some_and(|r| r.service.kiln.root == RootSetting::Sealed),
        tainted: instance.tainted,
        drift: Vec::new(),
        warnings: Vec::new(),
    }
}

/// What the proxy has counted. A proxy that does not answer is no reason to say nothing.
pub async fn with_traffic(shared: &Shared, mut status: EnvironmentStatus) -> EnvironmentStatus {
    let proxy = match shared.proxy.status().await {
        Ok(proxy) => proxy,
        Err(error) => {
            tracing::debug!(%error, "the proxy's counters are not known");
            return status;
        }
    };
    let routed = proxy
        .environments
        .get(&status.environment)
        .into_iter()
        .flat_map(|e| e.services.values())
        .flat_map(|s| &s.instances);
    let counted: BTreeMap<&InstanceId, Traffic> = routed
        .chain(&proxy.draining)
        .map(|i| {
            let traffic = Traffic {
                served: i.requests.saturating_add(i.connections),
                in_flight: i.in_flight,
            };
            (&i.instance, traffic)
        })
        .collect();
    for instance in status.services.iter_mut().flat_map(|s| &mut s.instances) {
        instance.traffic = counted.get(&instance.id).copied();
    }
    status
}

/// Compares each running instance with what it was started as.
pub fn look_inside(shared: &Shared, mut status: EnvironmentStatus) -> EnvironmentStatus {
    for instance in status.services.iter_mut().flat_map(|s| &mut s.instances) {
        if let Some(observed) = shared.runtime.observe(&instance.id) {
            instance.warnings = observed.warnings;
            if let ObservedState::Running { pid, .. } = observed.state {
                instance.pid = Some(pid);
            }
        }
        if instance.pid.is_none() {
            continue;
        }
        match shared.runtime.seal_state(&instance.id) {
            Ok(seal) => {
                if instance.sealed && !seal.read_only {
                    instance.drift.push("its root is not read-only".into());
                }
                instance.drift.extend(
                    seal.foreign.iter().map(|p| {
                        format!("process {} runs {}, not from the image", p.pid, p.program)
                    }),
                );
            }
            Err(error) => instance.warnings.push(format!("not looked into: {error}")),
        }
        if instance.tainted {
            instance
                .drift
                .push("someone ran a command in it (kiln exec)".into());
        }
    }
    status
}

/// Why an instance is as it is.
pub fn explain(
    shared: &Shared,
    world: &World,
    releases: &Releases,
    id: &InstanceId,
) -> Result<Explanation, ApiError> {
    let not_found = || {
        ApiError::not_found(
            format!("there is no instance `{id}`"),
            "kiln status lists them",
        )
    };
    let instance = world.instances.get(id).ok_or_else(not_found)?;
    let spec = shared.runtime.spec(id).ok_or_else(not_found)?;
    let mut facts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut fact = |key: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            facts.insert(key.into(), lines);
        }
    };
    fact("release", vec![instance.release.to_string()]);
    fact(
        "service",
        vec![format!("{} (copy {})", instance.service, instance.index)],
    );
    fact("revision", vec![instance.revision.to_string()]);
    fact("phase", vec![phase_name(&instance.phase).to_owned()]);
    if let Goal::Release(n) = world.goal {
        fact("wanted release", vec![n.to_string()]);
    }
    if let Some(released) = releases.service_of(instance) {
        fact(
            "image",
            vec![
                released.image.name.clone(),
                released.image.digest.to_string(),
            ],
        );
        fact("image tree", vec![released.image.tree.to_string()]);
        let files = released
            .files
            .iter()
            .map(|(key, version)| format!("{key}: {version:?}"))
            .collect();
        fact("configs and secrets", files);
    }
    fact("command", vec![spec.argv.join(" ")]);
    fact(
        "user",
        vec![if spec.user.is_empty() {
            "root".into()
        } else {
            spec.user.clone()
        }],
    );
    fact("environment", spec.env.keys().cloned().collect());
    fact("root", root_lines(&spec.root));
    fact("mounts", spec.mounts.iter().map(mount_line).collect());
    fact("network", network_lines(&spec.network));
    let limits = serde_json::to_value(&spec.limits).unwrap_or_default();
    let set = limits.as_object().into_iter().flatten().filter(|(_, v)| {
        !(v.is_null() || *v == &serde_json::json!({}) || *v == &serde_json::json!(false))
    });
    fact("limits", set.map(|(k, v)| format!("{k} = {v}")).collect());
    let s = &spec.security;
    let mut security = vec![format!("no_new_privileges = {}", s.no_new_privileges)];
    security.extend(s.cap_add.iter().map(|c| format!("added capability {c}")));
    security.extend(s.cap_drop.iter().map(|c| format!("dropped capability {c}")));
    if s.privileged {
        security.push("privileged".into());
    }
    fact("security", security);
    Ok(Explanation {
        id: id.clone(),
        facts,
    })
}

fn root_lines(root: &Root) -> Vec<String> {
    match root {
        Root::Sealed { scratch, .. } => std::iter::once("sealed (read-only)".to_owned())
            .chain(
                scratch
                    .iter()
                    .map(|s| format!("scratch {} (at most {} MiB)", s.path, s.size / (1 << 20))),
            )
            .collect(),
        Root::Unsealed { .. } => vec!["unsealed: a throw-away writable layer".into()],
        Root::Layered { .. } => vec!["a builder's layer".into()],
    }
}

fn mount_line(mount: &kiln_model::instance::InstanceMount) -> String {
    let source = match &mount.source {
        InstanceMountSource::Bind { path, .. } => path.display().to_string(),
        InstanceMountSource::Volume { path, subpath } => path.join(subpath).display().to_string(),
        InstanceMountSource::File { secret: true, .. } => "a secret".into(),
        InstanceMountSource::File { path, .. } => path.display().to_string(),
        InstanceMountSource::Tmpfs { .. } => "tmpfs".into(),
        InstanceMountSource::Tree { .. } => "an image".into(),
    };
    let mode = if mount.read_only {
        "read-only"
    } else {
        "writable"
    };
    let exec = if mount.exec { "" } else { ", noexec" };
    format!("{} ← {source} ({mode}{exec})", mount.target)
}

fn network_lines(network: &InstanceNetwork) -> Vec<String> {
    match network {
        InstanceNetwork::Isolated => vec!["none".into()],
        InstanceNetwork::Host => vec!["the host's".into()],
        InstanceNetwork::Join(id) => vec![format!("that of {id}")],
        InstanceNetwork::Bridged(interfaces) => interfaces
            .iter()
            .map(|i| format!("{}: {}/{} on {}", i.name, i.address, i.prefix, i.bridge))
            .collect(),
    }
}
