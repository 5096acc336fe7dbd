//! How a full base is configured: the script that runs inside the sandbox, and the
//! environment it runs in. Pure.
//!
//! dpkg does the configuring. What it does not do here is unpack: kiln wrote most
//! packages' files itself (fast, in parallel), so their `preinst` has not run.
//! - Packages of the essential set: their `preinst` runs first of all, over the
//!   unpacked root, as debootstrap does.
//! - Others with a `preinst`: these are left to `dpkg --unpack`, so that the script runs
//!   before the files come, with its pre-dependencies configured.
//! - All others have none.

use std::fmt::Write as _;

/// Where the script and the package files are inside the sandbox.
pub const STAGE: &str = "/.kiln-stage";

/// A step of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Run the `preinst` of a package whose files are there already.
    Preinst {
        package: String,
        arch: String,
        info_name: String,
    },
    /// Configure these.
    Configure(Vec<String>),
    /// Unpack these files (names in [`STAGE`]).
    Unpack(Vec<String>),
    /// Configure all that is left.
    ConfigureAll,
}

/// Whether a `preinst` does nothing when a package is installed for the first time:
/// only calls of `dpkg-maintscript-helper`, which then have no old version to act on.
pub fn idle_on_install(preinst: &str) -> bool {
    preinst.lines().map(str::trim).all(|line| {
        line.is_empty()
            || line.starts_with('#')
            || matches!(line, "set -e" | "set -eu" | "exit 0" | ":")
            || (line.starts_with("dpkg-maintscript-helper ")
                && line.ends_with("-- \"$@\"")
                && !line.contains([';', '&', '|', '`']))
    })
}

/// The shell script of these steps. Names come from checked packages: plain words.
pub fn script(steps: &[Step]) -> String {
    let mut text = String::from("#!/bin/sh\nset -e\ncd /\n");
    for step in steps {
        let line = match step {
            Step::Preinst {
                package,
                arch,
                info_name,
            } => format!(
                "DPKG_MAINTSCRIPT_PACKAGE={package} DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_MAINTSCRIPT_ARCH={arch} \
                 DPKG_MAINTSCRIPT_NAME=preinst DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= \
                 /var/lib/dpkg/info/{info_name}.preinst install </dev/null"
            ),
            Step::Configure(names) => format!(
                "dpkg --configure --force-confold -- {} </dev/null",
                names.join(" ")
            ),
            Step::Unpack(files) => {
                let files: Vec<String> =
                    files.iter().map(|file| format!("{STAGE}/{file}")).collect();
                format!(
                    "dpkg --unpack --force-unsafe-io --force-confold -- {} </dev/null",
                    files.join(" ")
                )
            }
            Step::ConfigureAll => "dpkg --configure --force-confold -a </dev/null".into(),
        };
        let _ = writeln!(text, "{line}");
    }
    text
}

/// The sandbox's environment; `epoch` in seconds.
pub fn environment(epoch: i64) -> Vec<(String, String)> {
    let epoch = epoch.to_string();
    [
        (
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("TZ", "UTC"),
        ("DEBIAN_FRONTEND", "noninteractive"),
        ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
        ("DEBCONF_NOWARNINGS", "yes"),
        ("SOURCE_DATE_EPOCH", epoch.as_str()),
        ("PYTHONHASHSEED", "0"),
        ("PERL_HASH_SEED", "0"),
    ]
    .map(|(key, value)| (key.into(), value.into()))
    .into()
}

/// Services are not to be started while a base is built (invoke-rc.d(8)).
pub const POLICY_RC_D: &str = "#!/bin/sh\nexit 101\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preinst_for_upgrades_only_is_idle() {
        let helper = "dpkg-maintscript-helper rm_conffile /etc/x 1.0~ -- \"$@\"";
        assert!(idle_on_install(&format!(
            "#!/bin/sh\nset -e\n# Automatically added\n{helper}\n\nexit 0\n"
        )));
        for busy in [
            "adduser x".to_string(),
            format!("{helper}; adduser"),
            "dpkg-divert --add x".into(),
        ] {
            assert!(
                !idle_on_install(&format!("#!/bin/sh\nset -e\n{busy}\n")),
                "{busy}"
            );
        }
    }

    #[test]
    fn steps_become_lines() {
        let text = script(&[
            Step::Preinst {
                package: "a".into(),
                arch: "amd64".into(),
                info_name: "a:amd64".into(),
            },
            Step::Configure(vec!["a".into(), "b".into()]),
            Step::Unpack(vec!["x.deb".into()]),
            Step::ConfigureAll,
        ]);
        assert!(text.contains("info/a:amd64.preinst install"), "{text}");
        assert!(
            text.contains("--configure --force-confold -- a b"),
            "{text}"
        );
        assert!(text.contains("/.kiln-stage/x.deb"), "{text}");
        assert!(text.ends_with("-a </dev/null\n"), "{text}");
    }
}
