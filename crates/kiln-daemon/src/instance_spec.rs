//! From a released service and a planned instance to what the runtime starts: every
//! path, address and digest filled in.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use kiln_model::instance::{
    InstanceMount, InstanceMountSource, InstanceNetwork, InstanceSpec, Interface, Membership,
    Purpose, Resolver, Root, SharedNamespace, SharedNamespaces,
};
use kiln_model::release::{Release, ReleasedService};
use kiln_model::spec::{
    FileKind, FileVersion, Hook, MountSource, Names, NamespaceMode, NetworkMode, RootSetting,
    Service, Volume,
};
use kiln_model::{InstanceId, Millis, NetworkName, ServiceName};
use kiln_plan::{Goal, Instance, Layout, Releases, RolloutState, World, process};

use crate::shared::Shared;
use crate::snapshots::Wish;

const DEFAULT_GRACE: Millis = Millis(10_000);

/// An instance's spec, the volumes that must be there before it starts, and what is run in
/// it before it counts as started.
pub struct Built {
    pub spec: InstanceSpec,
    pub volumes: Vec<VolumeUse>,
    /// Copies that are made of volumes before.
    pub snapshots: Vec<Wish>,
    pub post_start: Vec<Hook>,
}

/// A named volume that is mounted at `target`, whose image content a new volume gets.
#[derive(Clone, Debug)]
pub struct VolumeUse {
    pub name: kiln_model::VolumeName,
    pub external: bool,
    pub target: String,
    pub tree: kiln_model::Digest,
    pub nocopy: bool,
    /// Options of the tmpfs that it is in; `None`: it is on disk.
    pub memory: Option<Vec<(String, String)>>,
}

pub fn build(
    shared: &Shared,
    world: &World,
    releases: &Releases,
    id: &InstanceId,
) -> Result<Built, String> {
    let instance = world
        .instances
        .get(id)
        .ok_or("the instance is not in the plan")?;
    let prepared = releases
        .get(instance.release)
        .ok_or("its release is not known")?;
    let released = prepared
        .release
        .services
        .get(&instance.service)
        .ok_or("its service is not in its release")?;
    let service = &released.service;
    let image = &released.image.config;
    let argv = process::command(service, image);
    if argv.is_empty() {
        return Err("neither the image nor the compose file says what to run (command)".into());
    }
    let (mounts, volumes) = mounts(shared, &prepared.release, released)?;
    let hostname = service.names.hostname.clone().unwrap_or_else(|| {
        format!(
            "{}-{}",
            instance.service.as_str().replace(['_', '.'], "-"),
            instance.index
        )
    });
    let (network, resolver) = network(world, service, instance)?;
    let spec = InstanceSpec {
        format: InstanceSpec::FORMAT,
        id: id.clone(),
        purpose: purpose(world, instance, released),
        argv,
        env: process::environment(service, image, &hostname),
        cwd: service
            .process
            .working_dir
            .clone()
            .or_else(|| non_empty(&image.working_dir))
            .unwrap_or_else(|| "/".into()),
        user: service
            .process
            .user
            .clone()
            .unwrap_or_else(|| image.user.clone()),
        group_add: service.process.group_add.clone(),
        hosts: hosts(world, &world.layout, service),
        hostname,
        domainname: service.names.domainname.clone(),
        root: root(shared, released),
        mounts,
        network,
        resolver,
        namespaces: namespaces(service, instance)?,
        security: process::security(service),
        limits: process::limits(&service.limits),
        stop_signal: service
            .process
            .stop_signal
            .clone()
            .or_else(|| image.stop_signal.clone())
            .unwrap_or_else(|| "SIGTERM".into()),
        stop_grace: service.process.stop_grace.unwrap_or(DEFAULT_GRACE),
        init: service.process.init,
        tty: service.process.tty,
        stdin_open: service.process.stdin_open,
        logging: service.logging.clone(),
    };
    Ok(Built {
        spec,
        volumes,
        snapshots: snapshots(world, &prepared.release, instance),
        post_start: service.post_start.clone(),
    })
}

/// Only a rollout that moves forward touches data for the first time.
fn snapshots(world: &World, release: &Release, instance: &Instance) -> Vec<Wish> {
    let coming = world.rollout.as_ref().filter(|r| {
        let proving = r.state == RolloutState::Proving && r.from.is_some();
        proving && r.to == Goal::Release(instance.release)
    });
    let (Some(rollout), Some(released)) = (coming, release.services.get(&instance.service)) else {
        return Vec::new();
    };
    let wanted = released.service.kiln.snapshot.iter();
    wanted
        .filter_map(|key| release.volumes.get(key))
        .map(|volume| Wish {
            volume: volume.name.clone(),
            environment: world.environment.clone(),
            service: instance.service.clone(),
            release: instance.release,
            rollout: rollout.started,
        })
        .collect()
}

fn purpose(world: &World, instance: &Instance, released: &ReleasedService) -> Purpose {
    let membership = Membership {
        environment: world.environment.clone(),
        service: instance.service.clone(),
        release: instance.release,
        revision: instance.revision,
        index: instance.index,
        image: released.image.digest,
    };
    match instance.job {
        true => Purpose::Job(membership),
        false => Purpose::Service(membership),
    }
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn root(shared: &Shared, released: &ReleasedService) -> Root {
    let tree = shared.store.tree_paths(&released.image.tree);
    match released.service.kiln.root {
        RootSetting::Sealed => Root::Sealed {
            tree,
            scratch: released.scratch.clone(),
        },
        RootSetting::Scratch => Root::Unsealed { tree },
    }
}

fn mounts(
    shared: &Shared,
    release: &Release,
    released: &ReleasedService,
) -> Result<(Vec<InstanceMount>, Vec<VolumeUse>), String> {
    let mut mounts = Vec::new();
    let mut volumes = Vec::new();
    for mount in &released.service.mounts {
        let source = match &mount.source {
            MountSource::Bind {
                path,
                create,
                propagation,
            } => {
                let path = host_path(path, *create)?;
                let propagation = propagation.clone();
                InstanceMountSource::Bind {
                    path,
                    recursive: true,
                    propagation,
                }
            }
            MountSource::Volume {
                volume,
                subpath,
                nocopy,
            } => {
                let volume = release
                    .volumes
                    .get(volume)
                    .ok_or_else(|| format!("volume `{volume}` is not in the release"))?;
                volumes.push(VolumeUse {
                    name: volume.name.clone(),
                    external: volume.external,
                    target: mount.target.clone(),
                    tree: released.image.tree,
                    nocopy: *nocopy || subpath.is_some(),
                    memory: memory(volume),
                });
                let data = crate::volumes::data_folder(&shared.root, &volume.name);
                part_of_volume(data, subpath.as_deref())?
            }
            MountSource::Anonymous => InstanceMountSource::Tmpfs {
                size: None,
                mode: None,
                uid: None,
                gid: None,
            },
            MountSource::Tmpfs { size, mode } => InstanceMountSource::Tmpfs {
                size: *size,
                mode: *mode,
                uid: None,
                gid: None,
            },
            MountSource::Image { reference, subpath } => {
                let digest = released
                    .mounted_images
                    .get(reference)
                    .ok_or_else(|| format!("image `{reference}` is not in the release"))?;
                let image = shared
                    .store
                    .image(digest)
                    .map_err(|e| e.to_string())?
                    .ok_or_else(|| format!("image {digest} is not in the store"))?;
                let tree = shared.store.tree_paths(&image.tree);
                InstanceMountSource::Tree {
                    tree,
                    subpath: subpath.clone(),
                }
            }
        };
        mounts.push(InstanceMount {
            source,
            target: mount.target.clone(),
            read_only: mount.read_only,
            exec: mount.exec || mount.read_only,
            dev: released.service.security.privileged,
        });
    }
    for file in &released.service.files {
        mounts.push(file_mount(shared, released, file)?);
    }
    Ok((mounts, volumes))
}

/// Lowering lets no other options through than those of a tmpfs.
fn memory(volume: &Volume) -> Option<Vec<(String, String)>> {
    let options = (volume.driver_opts.get("type")? == "tmpfs").then_some(&volume.driver_opts)?;
    let words = options.get("o").map_or("", String::as_str).split(',');
    let pairs = words.filter_map(|word| word.split_once('='));
    Some(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
}

fn part_of_volume(data: PathBuf, subpath: Option<&str>) -> Result<InstanceMountSource, String> {
    match subpath {
        Some(sub) if is_plain(sub) => Ok(InstanceMountSource::Volume {
            path: data,
            subpath: sub.to_owned(),
        }),
        Some(sub) => Err(format!("volume subpath `{sub}` leaves the volume")),
        None => Ok(InstanceMountSource::Bind {
            path: data,
            recursive: false,
            propagation: None,
        }),
    }
}

fn is_plain(subpath: &str) -> bool {
    Path::new(subpath)
        .components()
        .all(|c| matches!(c, std::path::Component::Normal(_)))
}

fn host_path(path: &Path, create: bool) -> Result<PathBuf, String> {
    if !path.exists() {
        if !create {
            return Err(format!(
                "the bind mount's source {} is not there",
                path.display()
            ));
        }
        std::fs::create_dir_all(path)
            .map_err(|e| format!("the bind mount's source {}: {e}", path.display()))?;
    }
    Ok(path.to_owned())
}

fn file_mount(
    shared: &Shared,
    released: &ReleasedService,
    file: &kiln_model::spec::FileMount,
) -> Result<InstanceMount, String> {
    let version = released
        .files
        .get(&file.key())
        .ok_or_else(|| format!("`{}` has no content in the release", file.source))?;
    let path = match version {
        FileVersion::Config(digest) => shared.store.blob_path(digest),
        FileVersion::Secret(id) => shared.secrets.path(id),
    };
    Ok(InstanceMount {
        source: InstanceMountSource::File {
            path,
            uid: file.uid,
            gid: file.gid,
            mode: file.mode,
            secret: file.kind == FileKind::Secret,
        },
        target: file.target.clone(),
        read_only: true,
        exec: false,
        dev: false,
    })
}

fn network(
    world: &World,
    service: &Service,
    instance: &Instance,
) -> Result<(InstanceNetwork, Option<Resolver>), String> {
    let resolver = |gateway| resolver(&service.names, gateway);
    match &service.network {
        NetworkMode::None => Ok((InstanceNetwork::Isolated, None)),
        NetworkMode::Host => Ok((InstanceNetwork::Host, None)),
        NetworkMode::Service(other) => {
            let id = joined(instance, other, "network_mode")?;
            // Names resolve as for the one whose network it shares.
            let resolver = resolver(gateway_of(world, &id));
            Ok((InstanceNetwork::Join(id), Some(resolver)))
        }
        NetworkMode::Networks(attached) => {
            let mut interfaces = Vec::new();
            let known = |key: &&NetworkName| world.layout.networks.get(*key);
            let gateway = attached
                .keys()
                .find_map(|key| known(&key))
                .map(|n| n.gateway());
            // The way out is over the first that has one, by name; names of interfaces go by
            // priority.
            let way_out = attached
                .keys()
                .find(|key| known(key).is_some_and(|n| !n.internal));
            let mut ordered: Vec<_> = attached.iter().collect();
            ordered.sort_by_key(|(_, attachment)| std::cmp::Reverse(attachment.priority));
            for (n, (key, attachment)) in ordered.into_iter().enumerate() {
                let bridge = world
                    .layout
                    .networks
                    .get(key)
                    .ok_or_else(|| format!("network `{key}` is not laid out"))?;
                let address = instance
                    .addresses
                    .get(key)
                    .ok_or_else(|| format!("no address on network `{key}`"))?;
                interfaces.push(Interface {
                    name: attachment
                        .interface_name
                        .clone()
                        .unwrap_or_else(|| format!("eth{n}")),
                    bridge: bridge.bridge.clone(),
                    address: *address,
                    prefix: bridge.subnet.prefix(),
                    gateway: (way_out == Some(key)).then(|| bridge.gateway()),
                    mtu: bridge.mtu,
                    mac: attachment.mac_address.clone(),
                });
            }
            Ok((
                InstanceNetwork::Bridged(interfaces),
                Some(resolver(gateway)),
            ))
        }
    }
}

/// Names of services must resolve; what kiln doesn't know goes on to the host's resolvers,
/// and to the stated ones first.
fn resolver(names: &Names, gateway: Option<Ipv4Addr>) -> Resolver {
    let gateway = gateway.into_iter().map(IpAddr::V4);
    Resolver {
        nameservers: gateway.chain(names.dns.iter().copied()).collect(),
        search: names.dns_search.clone(),
        options: names.dns_opt.clone(),
    }
}

/// `extra_hosts` and `links`.
fn hosts(world: &World, layout: &Layout, service: &Service) -> Vec<(IpAddr, String)> {
    let NetworkMode::Networks(attached) = &service.network else {
        return service
            .names
            .extra_hosts
            .iter()
            .filter_map(|(name, address)| Some((address.parse().ok()?, name.clone())))
            .collect();
    };
    let gateway = attached
        .keys()
        .find_map(|k| world.layout.networks.get(k))
        .map(|n| n.gateway());
    let extra = service
        .names
        .extra_hosts
        .iter()
        .filter_map(|(name, address)| {
            let address = match address.as_str() {
                "host-gateway" => gateway.map(IpAddr::V4),
                other => other.parse().ok(),
            };
            Some((address?, name.clone()))
        });
    let links = service.names.links.iter().filter_map(|(other, alias)| {
        let address = attached
            .keys()
            .find_map(|network| layout.services.get(network)?.get(other))?;
        Some((IpAddr::V4(*address), alias.clone()))
    });
    extra.chain(links).collect()
}

fn namespaces(service: &Service, instance: &Instance) -> Result<SharedNamespaces, String> {
    let one = |mode: &NamespaceMode, what: &str| -> Result<SharedNamespace, String> {
        Ok(match mode {
            NamespaceMode::Private => SharedNamespace::Private,
            NamespaceMode::Host => SharedNamespace::Host,
            NamespaceMode::Service(other) => SharedNamespace::Of(joined(instance, other, what)?),
        })
    };
    Ok(SharedNamespaces {
        pid: one(&service.namespaces.pid, "pid")?,
        ipc: one(&service.namespaces.ipc, "ipc")?,
        uts: one(&service.namespaces.uts, "uts")?,
        cgroup: one(&service.namespaces.cgroup, "cgroup")?,
    })
}

/// The planner's choice among `other`'s instances.
fn joined(instance: &Instance, other: &ServiceName, what: &str) -> Result<InstanceId, String> {
    let id = instance.joined.get(other).cloned();
    id.ok_or_else(|| format!("{what}: service `{other}` has no instance"))
}

fn gateway_of(world: &World, id: &InstanceId) -> Option<Ipv4Addr> {
    let (network, _) = world.instances.get(id)?.addresses.first_key_value()?;
    Some(world.layout.networks.get(network)?.gateway())
}
