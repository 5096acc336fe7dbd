//! What an instance may do, and which namespaces it shares.

use std::path::PathBuf;

use kiln_model::spec::{Device, NamespaceMode, Namespaces, Seccomp, Security};

use super::{Lowering, flag, items, text, texts};
use crate::diag::Diagnostic;
use crate::node::Node;
use crate::paths;

impl Lowering<'_> {
    pub(super) fn security(&mut self, node: &Node) -> Security {
        let mut security = Security {
            cap_add: capabilities(node, "cap_add"),
            cap_drop: capabilities(node, "cap_drop"),
            privileged: flag(node, "privileged"),
            devices: items(node, "devices").iter().map(device).collect(),
            device_cgroup_rules: texts(node, "device_cgroup_rules"),
            sysctls: self.pairs(node.get("sysctls")),
            read_only: flag(node, "read_only"),
            ..Security::default()
        };
        for option in items(node, "security_opt") {
            self.security_option(&mut security, option);
        }
        if let Some(mode) = node.get("userns_mode")
            && !matches!(mode.as_str(), Some("host" | ""))
        {
            self.refuse_value(
                "services.*.userns_mode",
                mode,
                "kiln's instances share the host's user namespace (host)",
            );
        }
        security
    }

    fn security_option(&mut self, security: &mut Security, node: &Node) {
        let said = node.as_str().unwrap_or_default();
        let (name, value) = said.split_once([':', '=']).unwrap_or((said, ""));
        match (name, value) {
            ("no-new-privileges", "" | "true") => security.no_new_privileges = Some(true),
            ("no-new-privileges", "false") => security.no_new_privileges = Some(false),
            ("seccomp", "unconfined") => security.seccomp = Seccomp::Unconfined,
            ("seccomp", "builtin") => security.seccomp = Seccomp::Default,
            ("seccomp", path) if !path.is_empty() => {
                let path: PathBuf = paths::join(&self.project.folder, path);
                if let Some(profile) = self.read(&path, node.span) {
                    security.seccomp = Seccomp::Profile(profile);
                }
            }
            ("apparmor", profile) if !profile.is_empty() => {
                security.apparmor = Some(profile.to_owned());
            }
            ("label", _) => self.diagnostics.push(
                Diagnostic::note(
                    node.span,
                    format!("`{said}` has no effect: it only matters where SELinux is enforced"),
                )
                .key("services.*.security_opt"),
            ),
            _ => self.refuse_value(
                "services.*.security_opt",
                node,
                "kiln knows no-new-privileges, seccomp and apparmor",
            ),
        }
    }

    pub(super) fn namespaces(&mut self, node: &Node) -> Namespaces {
        Namespaces {
            pid: self.namespace(node, "pid"),
            ipc: self.namespace(node, "ipc"),
            uts: self.namespace(node, "uts"),
            cgroup: self.namespace(node, "cgroup"),
        }
    }

    fn namespace(&mut self, node: &Node, key: &str) -> NamespaceMode {
        let Some(said) = node.get(key) else {
            return NamespaceMode::Private;
        };
        match said.as_str().unwrap_or_default() {
            "" | "private" | "shareable" => NamespaceMode::Private,
            "host" => NamespaceMode::Host,
            text => {
                if let Some(name) = text.strip_prefix("service:") {
                    let other = self.service_ref(name, said.span);
                    if let ("pid" | "ipc", Some(other)) = (key, other) {
                        return NamespaceMode::Service(other);
                    }
                }
                let hint = match key {
                    "pid" | "ipc" => "use host, private or service:<name>",
                    _ => "instances share this with the host or with nobody: use host or private",
                };
                self.refuse_value(&format!("services.*.{key}"), said, hint);
                NamespaceMode::Private
            }
        }
    }
}

/// Upper case, without `CAP_`.
fn capabilities(node: &Node, key: &str) -> Vec<String> {
    texts(node, key)
        .into_iter()
        .map(|name| {
            let name = name.to_ascii_uppercase();
            name.strip_prefix("CAP_").map(str::to_owned).unwrap_or(name)
        })
        .collect()
}

fn device(node: &Node) -> Device {
    let source = text(node, "source").unwrap_or_default();
    Device {
        target: text(node, "target").unwrap_or_else(|| source.clone()),
        permissions: text(node, "permissions").unwrap_or_else(|| "rwm".into()),
        source,
    }
}
