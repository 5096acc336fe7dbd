//! A project as its whole-stack test has it: nothing of the host's but what is read, nothing
//! of other environments', and no way out. Pure.

use kiln_model::release::Release;
use kiln_model::spec::{
    ExposedPort, HealthcheckSetting, Mount, MountSource, NetworkMode, RestartPolicy, RootSetting,
    Service, ServiceMode, Spec, Volume,
};
use kiln_model::{EnvironmentName, Millis, ServiceName};

use crate::failure::{Failure, Kind};

/// Nobody misses what is thrown away.
const GRACE: Millis = Millis(1000);

/// Takes away what leads out, and makes `test` a job.
pub fn alone(spec: &mut Spec, test: &ServiceName) -> Result<(), Failure> {
    let project = spec.project.clone();
    for network in spec.networks.values_mut() {
        network.external = false;
        network.internal = true;
        // Those that the file chooses may be in use.
        network.subnet = None;
        network.gateway = None;
    }
    for volume in spec.volumes.values_mut() {
        volume.external = false;
        // `o: bind` is a folder of the host's.
        if volume.driver_opts.get("type").map(String::as_str) != Some("tmpfs") {
            volume.driver_opts.clear();
        }
    }
    let mut folders = Vec::new();
    for (name, service) in &mut spec.services {
        inside(name, service)?;
        for mount in &mut service.mounts {
            instead_of_the_host(mount, &mut folders);
        }
    }
    for key in folders {
        let name = format!("{project}_{key}").parse().map_err(wrong)?;
        let volume = Volume {
            name,
            external: false,
            driver_opts: Default::default(),
            labels: Default::default(),
        };
        spec.volumes.insert(key, volume);
    }
    if let Some(service) = spec.services.get_mut(test) {
        service.mode = ServiceMode::Job;
        service.replicas = 1;
        service.restart = RestartPolicy::No;
        service.health = HealthcheckSetting::Disabled;
        // What it writes is thrown away with it.
        service.kiln.root = RootSetting::Scratch;
    }
    Ok(())
}

fn wrong(what: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Input, what.to_string())
}

/// What concerns callers from outside and later releases.
fn inside(name: &ServiceName, service: &mut Service) -> Result<(), Failure> {
    match &mut service.network {
        NetworkMode::Host => {
            return Err(wrong(format!(
                "service `{name}` has the host's network, which a whole-stack test can't give it"
            )));
        }
        NetworkMode::Networks(networks) => {
            for attachment in networks.values_mut() {
                attachment.ipv4_address = None;
            }
        }
        NetworkMode::None | NetworkMode::Service(_) => {}
    }
    // Ports that are not published still say where it listens.
    for port in std::mem::take(&mut service.ports) {
        let exposed = ExposedPort {
            port: port.target,
            protocol: port.protocol,
        };
        if !service.expose.contains(&exposed) {
            service.expose.push(exposed);
        }
    }
    let grace = service.process.stop_grace.unwrap_or(GRACE);
    service.process.stop_grace = Some(grace.min(GRACE));
    service.update = Default::default();
    service.rollback = None;
    service.kiln.rollout = None;
    service.kiln.max_age = None;
    service.kiln.snapshot.clear();
    // Its image has passed them already.
    service.kiln.test.clear();
    Ok(())
}

/// A folder that it would write to is a new volume, the same for all that mount it; a file
/// is only read.
fn instead_of_the_host(mount: &mut Mount, folders: &mut Vec<String>) {
    let MountSource::Bind { path, .. } = &mount.source else {
        return;
    };
    if mount.read_only {
        return;
    }
    if path.is_file() {
        mount.read_only = true;
        return;
    }
    let digest = kiln_model::Digest::of(path.to_string_lossy().as_bytes());
    let key = format!("host-{}", digest.short());
    if !folders.contains(&key) {
        folders.push(key.clone());
    }
    mount.source = MountSource::Volume {
        volume: key,
        subpath: None,
        nocopy: false,
    };
}

/// The same release for a throw-away environment of this name; its volumes and networks
/// are called after it.
pub fn named(mut release: Release, environment: &EnvironmentName) -> Result<Release, Failure> {
    for (key, network) in &mut release.networks {
        network.name = format!("{environment}_{key}");
    }
    for (key, volume) in &mut release.volumes {
        volume.name = format!("{environment}_{key}").parse().map_err(wrong)?;
    }
    release.project = environment.as_str().parse().map_err(wrong)?;
    release.environment = environment.clone();
    Ok(release)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_compose::{LoadOptions, load};

    const PROJECT: &str = "
name: shop
services:
  check: {image: x, profiles: [t], depends_on: [web], restart: always, deploy: {replicas: 3}}
  web:
    image: x
    ports: ['8080:80']
    networks: {front: {ipv4_address: 10.1.0.200}, out: {}}
    volumes: [data:/d, kept:/k, ./both:/b, ./read:/r:ro]
    x-kiln: {max_age: 1h}
  other: {image: x, volumes: [./both:/x]}
networks:
  front: {ipam: {config: [{subnet: 10.1.0.0/16}]}}
  out: {external: true, name: shared}
volumes:
  data: {}
  kept: {external: true, name: precious}
";

    fn spec(text: &str) -> Spec {
        let reader = |_: &std::path::Path| Ok(text.as_bytes().to_vec());
        let options = LoadOptions {
            files: vec!["/p/compose.yaml".into()],
            folder: "/p".into(),
            profiles: vec!["*".into()],
            ..LoadOptions::default()
        };
        load(&options, &reader).unwrap().spec
    }

    #[test]
    fn nothing_of_the_hosts_or_of_others_is_left() {
        let mut spec = spec(PROJECT);
        let test: ServiceName = "check".parse().unwrap();
        alone(&mut spec, &test).unwrap();
        for network in spec.networks.values() {
            assert!(network.internal && !network.external, "{network:?}");
            assert_eq!(network.subnet, None);
        }
        assert!(spec.volumes.values().all(|v| !v.external));
        let web = &spec.services["web"];
        assert!(web.ports.is_empty() && web.kiln.max_age.is_none());
        assert_eq!(web.expose[0].port, 80);
        let NetworkMode::Networks(networks) = &web.network else {
            unreachable!("{:?}", web.network)
        };
        assert!(networks.values().all(|a| a.ipv4_address.is_none()));
        let volume = |mount: &Mount| match &mount.source {
            MountSource::Volume { volume, .. } => Some(volume.clone()),
            _ => None,
        };
        let at = |service: &str, target: &str| {
            let mut all = spec.services[service].mounts.iter();
            all.find(|m| m.target == target).unwrap().clone()
        };
        let both = volume(&at("web", "/b")).unwrap();
        assert_eq!(
            volume(&at("other", "/x")),
            Some(both.clone()),
            "still the same"
        );
        assert!(spec.volumes.contains_key(&both));
        assert!(matches!(at("web", "/r").source, MountSource::Bind { .. }));
        let check = &spec.services["check"];
        assert_eq!((check.mode, check.replicas), (ServiceMode::Job, 1));
        assert_eq!(check.kiln.root, RootSetting::Scratch);
    }

    #[test]
    fn the_hosts_network_is_refused() {
        let mut spec = spec("name: p\nservices: {a: {image: x, network_mode: host}}");
        let test: ServiceName = "check".parse().unwrap();
        let refused = alone(&mut spec, &test).unwrap_err();
        assert!(
            refused
                .message
                .starts_with("service `a` has the host's network")
        );
    }
}
