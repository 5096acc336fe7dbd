//! Top-level volumes: kiln's own folders, and what the `local` driver mounts in their place.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kiln_model::VolumeName;
use kiln_model::spec::{MountSource, Volume};

use super::{Lowering, flag, text};
use crate::node::{Map, Node};

/// `driver: local` with `o: bind`: a folder of the host under a volume's name.
pub(super) struct Bound {
    folder: PathBuf,
    pub read_only: bool,
}

impl Lowering<'_> {
    /// The volumes that kiln keeps. Those that are folders of the host are bind mounts of
    /// the services that use them.
    pub(super) fn volumes(&mut self) -> BTreeMap<String, Volume> {
        let mut out = BTreeMap::new();
        for (key, node) in self.project.section("volumes") {
            let mut driver_opts = BTreeMap::new();
            if let Some(driver) = node.get("driver")
                && !is_local(node)
            {
                self.refuse_value("volumes.*.driver", driver, "kiln has local volumes only");
            } else if let Some(options) = said_options(node) {
                if bound(node).is_some() {
                    continue;
                }
                match memory(options) {
                    Some(options) => driver_opts = options,
                    None => self.refuse(
                        "volumes.*.driver_opts",
                        "driver_opts",
                        options.key,
                        "kiln knows `o: bind` with an absolute `device`, and `type: tmpfs` with \
                         size, mode, uid, gid and nr_inodes; mount other file systems (nfs, cifs, \
                         ext4…) on the host and bind them",
                    ),
                }
            }
            let name = node.get("name");
            let text = name.and_then(Node::text).unwrap_or_else(|| key.to_owned());
            let span = name.map_or(node.key, |node| node.span);
            let Some(name) = self.id::<VolumeName>(&text, span) else {
                continue;
            };
            out.insert(
                key.to_owned(),
                Volume {
                    name,
                    external: flag(node, "external"),
                    driver_opts,
                    labels: self.pairs(node.get("labels")),
                },
            );
        }
        out
    }

    /// The folder that the volume with this key stands for, if it stands for one.
    pub(super) fn bound_volume(&self, key: &str) -> Option<Bound> {
        bound(self.project.tree.at(&["volumes", key])?)
    }
}

impl Bound {
    pub(super) fn source(self, subpath: Option<String>) -> MountSource {
        MountSource::Bind {
            path: match subpath {
                Some(subpath) => self.folder.join(subpath),
                None => self.folder,
            },
            // As Docker, which makes no folder here.
            create: false,
            propagation: None,
        }
    }
}

fn is_local(node: &Node) -> bool {
    matches!(
        node.get("driver").map(Node::as_str),
        None | Some(Some("local" | ""))
    )
}

fn said_options(node: &Node) -> Option<&Node> {
    node.get("driver_opts")
        .filter(|options| options.as_map().is_some_and(|map| !map.is_empty()))
}

/// `type: tmpfs` with options that a tmpfs knows.
fn memory(options: &Node) -> Option<BTreeMap<String, String>> {
    let map = options.as_map()?;
    let known = |key: &str| matches!(key, "type" | "o" | "device");
    if text(options, "type")? != "tmpfs" || !map.keys().all(|key| known(key)) {
        return None;
    }
    let mut kept = BTreeMap::from([("type".to_owned(), "tmpfs".to_owned())]);
    let said = text(options, "o").unwrap_or_default();
    let mut words = Vec::new();
    for word in said.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        match word.split_once('=').unwrap_or((word, "")) {
            ("size" | "mode" | "uid" | "gid" | "nr_inodes", value) if !value.is_empty() => {
                words.push(word);
            }
            // As kiln mounts it anyway.
            ("rw" | "nosuid" | "nodev" | "noexec", "") => {}
            _ => return None,
        }
    }
    if !words.is_empty() {
        kept.insert("o".into(), words.join(","));
    }
    Some(kept)
}

fn bound(node: &Node) -> Option<Bound> {
    let options = said_options(node).filter(|_| is_local(node))?;
    let known = |map: &Map| {
        map.keys()
            .all(|key| matches!(key.as_str(), "type" | "o" | "device"))
    };
    let kind = text(options, "type");
    if !options.as_map().is_some_and(known) || !matches!(kind.as_deref(), None | Some("none")) {
        return None;
    }
    let flags = text(options, "o")?;
    let flags: Vec<&str> = flags.split(',').map(str::trim).collect();
    let all_known = flags
        .iter()
        .all(|word| matches!(*word, "bind" | "rbind" | "ro" | "rw" | "nosuid" | "nodev"));
    let binds = flags.contains(&"bind") || flags.contains(&"rbind");
    let folder = text(options, "device").filter(|device| device.starts_with('/'))?;
    (all_known && binds).then(|| Bound {
        folder: folder.into(),
        read_only: flags.contains(&"ro"),
    })
}
