//! Mounts: binds, volumes, tmpfs, images; configs and secrets as files.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kiln_model::Spec;
use kiln_model::spec::{FileKind, FileMount, Mount, MountSource};

use super::{Lowering, flag, integer, items, text, unsigned_bytes};
use crate::canonical::clean_path;
use crate::node::Node;
use crate::project::Project;
use crate::units;
use crate::values;

impl Lowering<'_> {
    pub(super) fn mounts(&mut self, node: &Node) -> Vec<Mount> {
        let mut mounts: Vec<Mount> = items(node, "volumes")
            .iter()
            .filter_map(|volume| self.mount(volume))
            .collect();
        let tmpfs = node.get("tmpfs");
        let entries = match tmpfs.and_then(Node::as_seq) {
            Some(list) => list,
            None => tmpfs.map(std::slice::from_ref).unwrap_or_default(),
        };
        for entry in entries {
            mounts.extend(self.tmpfs(entry));
        }
        for from in items(node, "volumes_from") {
            let said = from.as_str().unwrap_or_default();
            if said.starts_with("container:") {
                self.refuse_value(
                    "services.*.volumes_from",
                    from,
                    "kiln knows services only: write the service's name",
                );
                continue;
            }
            let mode = said.split_once(':').map_or("", |(_, mode)| mode);
            if !matches!(mode, "" | "ro" | "rw") {
                self.wrong(
                    from.span,
                    format!("volumes_from: `{mode}` is neither ro nor rw"),
                );
            }
            let name = said.split(':').next().unwrap_or_default();
            self.service_ref(name, from.span);
        }
        mounts
    }

    fn mount(&mut self, node: &Node) -> Option<Mount> {
        let target = self.target(node)?;
        let mut read_only = flag(node, "read_only");
        let bound = match (
            node.get("type").and_then(Node::as_str),
            text(node, "source"),
        ) {
            (Some("volume"), Some(key)) => self.bound_volume(&key),
            _ => None,
        };
        let source = match bound {
            Some(bound) => {
                read_only |= bound.read_only;
                bound.source(
                    node.get("volume")
                        .and_then(|volume| text(volume, "subpath")),
                )
            }
            None => self.mount_source(node)?,
        };
        Some(Mount {
            source,
            target,
            read_only,
            exec: self.mount_extension(node.get("x-kiln")),
        })
    }

    fn target(&mut self, node: &Node) -> Option<String> {
        let said = node.get("target");
        let target = said.and_then(Node::text).unwrap_or_default();
        if target.starts_with('/') {
            return Some(clean_path(&target));
        }
        let hint = if target.contains(':') {
            "; a name of one letter before the colon is read as a Windows drive: use a longer one"
        } else {
            ""
        };
        let span = said.map_or(node.span, |node| node.span);
        self.wrong(
            span,
            format!("the mount's target `{target}` is not an absolute path{hint}"),
        );
        None
    }

    fn mount_source(&mut self, node: &Node) -> Option<MountSource> {
        let source = text(node, "source");
        match node.get("type").and_then(Node::as_str) {
            Some("bind") => {
                let bind = node.get("bind");
                let recursive = bind.and_then(|bind| bind.get("recursive"));
                if let Some(said) = recursive.filter(|n| n.as_str() != Some("enabled")) {
                    self.refuse_value(
                        "services.*.volumes.[].bind.recursive",
                        said,
                        "kiln's bind mounts bring what is mounted below (enabled)",
                    );
                }
                let source = source?;
                if !source.starts_with('/') {
                    if let Some(said) = node.get("source") {
                        self.refuse_value(
                            "services.*.volumes.[].source",
                            said,
                            "kiln runs on Linux only: use an absolute or relative Linux path",
                        );
                    }
                    return None;
                }
                Some(MountSource::Bind {
                    path: PathBuf::from(source),
                    // The specification's default, where `bind` is said at all.
                    create: bind.is_some_and(|bind| {
                        bind.get("create_host_path").is_none() || flag(bind, "create_host_path")
                    }),
                    propagation: bind.and_then(|bind| text(bind, "propagation")),
                })
            }
            Some("volume") => {
                let options = node.get("volume");
                Some(match source {
                    Some(volume) => MountSource::Volume {
                        volume,
                        subpath: options.and_then(|options| text(options, "subpath")),
                        nocopy: options.is_some_and(|options| flag(options, "nocopy")),
                    },
                    None => MountSource::Anonymous,
                })
            }
            Some("tmpfs") => {
                let options = node.get("tmpfs");
                let mode = options
                    .and_then(|options| integer(options, "mode"))
                    .and_then(|mode| u32::try_from(mode).ok());
                Some(MountSource::Tmpfs {
                    size: options.and_then(|options| unsigned_bytes(options, "size")),
                    mode,
                })
            }
            Some("image") => Some(MountSource::Image {
                reference: source?,
                subpath: node.get("image").and_then(|image| text(image, "subpath")),
            }),
            _ => {
                if let Some(kind) = node.get("type") {
                    self.refuse_value(
                        "services.*.volumes.[].type",
                        kind,
                        "kiln mounts bind, volume, tmpfs and image",
                    );
                }
                None
            }
        }
    }

    /// `tmpfs: /path[:options]`
    fn tmpfs(&mut self, node: &Node) -> Option<Mount> {
        let said = node.as_str()?;
        let (target, options) = said.split_once(':').unwrap_or((said, ""));
        if !target.starts_with('/') {
            self.wrong(
                node.span,
                format!("tmpfs: `{target}` is not an absolute path"),
            );
            return None;
        }
        let (mut size, mut mode, mut read_only, mut exec) = (None, None, false, false);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("size", value) => {
                    let bytes = units::parse_bytes(value).and_then(|n| {
                        u64::try_from(n).map_err(|_| "a size must be positive".into())
                    });
                    size = self.take(bytes, node.span);
                }
                ("mode", value) => {
                    let bits = u32::from_str_radix(value, 8)
                        .map_err(|_| format!("tmpfs: `{value}` is not a file mode"));
                    mode = self.take(bits, node.span);
                }
                ("ro", "") => read_only = true,
                ("exec", "") => exec = true,
                ("rw" | "noexec" | "nosuid" | "nodev", "") => {}
                _ => self.refuse(
                    "services.*.tmpfs",
                    &format!("tmpfs option {option}"),
                    node.span,
                    "kiln knows size, mode, ro, rw, exec and noexec",
                ),
            }
        }
        Some(Mount {
            source: MountSource::Tmpfs { size, mode },
            target: clean_path(target),
            read_only,
            exec,
        })
    }

    pub(super) fn file_mounts(&mut self, node: &Node) -> Vec<FileMount> {
        let mut out = vec![];
        for (key, kind, folder) in [
            ("configs", FileKind::Config, "/"),
            ("secrets", FileKind::Secret, "/run/secrets/"),
        ] {
            for item in items(node, key) {
                let Some(source) = text(item, "source") else {
                    self.wrong(item.span, format!("{key}: an entry needs a `source`"));
                    continue;
                };
                let target = text(item, "target").unwrap_or_else(|| source.clone());
                let target = if target.starts_with('/') {
                    target
                } else {
                    format!("{folder}{target}")
                };
                let mode = item.get("mode").filter(|n| !n.is_null()).map(values::mode);
                let mode = mode
                    .and_then(Result::ok)
                    .and_then(|mode| u32::try_from(mode).ok());
                out.push(FileMount {
                    kind,
                    source,
                    target: clean_path(&target),
                    uid: self.owner(item, "uid"),
                    gid: self.owner(item, "gid"),
                    mode: mode.unwrap_or(0o444) & 0o7777,
                });
            }
        }
        out
    }

    fn owner(&mut self, node: &Node, key: &str) -> u32 {
        let Some(said) = node.get(key).filter(|n| n.as_str() != Some("")) else {
            return 0;
        };
        let text = said.text().unwrap_or_default();
        let number = text
            .parse()
            .map_err(|_| format!("{key}: `{text}` is not a number"));
        self.take(number, said.span).unwrap_or(0)
    }
}

/// Gives services the mounts of those they say in `volumes_from`, where their own don't
/// cover the target. The circle check came before.
pub(super) fn volumes_from(project: &Project, spec: &mut Spec) {
    let mut done = BTreeSet::new();
    let names: Vec<String> = project
        .services()
        .map(|(name, _)| name.to_owned())
        .collect();
    for name in names {
        inherit(project, spec, &name, &mut done);
    }
}

fn inherit(project: &Project, spec: &mut Spec, name: &str, done: &mut BTreeSet<String>) {
    if !done.insert(name.to_owned()) {
        return;
    }
    let Some(node) = project.tree.at(&["services", name]) else {
        return;
    };
    for from in items(node, "volumes_from").iter().filter_map(Node::as_str) {
        let (other, mode) = from.split_once(':').unwrap_or((from, ""));
        inherit(project, spec, other, done);
        let Some(mounts) = spec
            .services
            .get(other)
            .map(|service| service.mounts.clone())
        else {
            continue;
        };
        let Some(service) = spec.services.get_mut(name) else {
            return;
        };
        for mut mount in mounts {
            let covered = service.mounts.iter().any(|own| own.target == mount.target);
            let shared = !matches!(mount.source, MountSource::Tmpfs { .. });
            if shared && !covered {
                mount.read_only |= mode == "ro";
                service.mounts.push(mount);
            }
        }
    }
}
