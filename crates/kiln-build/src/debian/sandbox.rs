//! The sandbox maintainer scripts run in, in the runtime's own words.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_model::instance::{
    InstanceLimits, InstanceMount, InstanceMountSource, InstanceNetwork, InstanceSecurity, Purpose,
    Root, SharedNamespaces,
};
use kiln_model::spec::Logging;
use kiln_model::{InstanceId, InstanceSpec, Millis};
use kiln_runtime::Runtime;

use super::RunScripts;
use super::base::ScriptRun;

/// Before the six letters and digits that a base's folder and instance are named by.
pub(crate) const PREFIX: &str = "base-";

/// Runs maintainer scripts as instances of `runtime`; setting `cancel` kills them.
pub fn runner(runtime: Arc<Runtime>, cancel: Arc<AtomicBool>) -> Arc<RunScripts> {
    Arc::new(move |run, on_line| {
        // The folder is new for every build, and whoever finds it abandoned knows by its
        // name what may still run in it.
        let folder = run.upper.parent().and_then(Path::file_name);
        let id = InstanceId::new(folder.unwrap_or_default().to_string_lossy())?;
        let status =
            runtime.run_to_end(&instance(run, id), &mut |_, line| on_line(line), &cancel)?;
        Ok(status)
    })
}

/// The instance that does `run`: root inside, all namespaces of its own, only a
/// loopback interface, Docker's default capabilities, nothing of the host but the
/// package files.
pub fn instance(run: &ScriptRun, id: InstanceId) -> InstanceSpec {
    InstanceSpec {
        format: InstanceSpec::FORMAT,
        id,
        purpose: Purpose::Build,
        argv: run.argv.clone(),
        env: run.env.iter().cloned().collect::<BTreeMap<_, _>>(),
        cwd: "/".into(),
        user: "0:0".into(),
        group_add: Vec::new(),
        // The same on every machine: scripts write it into files.
        hostname: "kiln".into(),
        domainname: None,
        root: Root::Layered {
            tree: None,
            upper: run.upper.into(),
            work: run.work.into(),
        },
        mounts: vec![InstanceMount {
            source: InstanceMountSource::Bind {
                path: run.stage.into(),
                recursive: false,
                propagation: None,
            },
            target: run.stage_target.into(),
            read_only: true,
            exec: true,
            dev: false,
        }],
        network: InstanceNetwork::Isolated,
        resolver: None,
        hosts: Vec::new(),
        namespaces: SharedNamespaces::default(),
        security: InstanceSecurity::default(),
        limits: InstanceLimits::default(),
        stop_signal: "SIGKILL".into(),
        stop_grace: Millis(0),
        init: false,
        tty: false,
        stdin_open: false,
        logging: Logging::default(),
    }
}
