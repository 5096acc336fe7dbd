//! Commands that the compose file wants run in an instance: health checks and hooks.

use std::io::Read;

use kiln_model::spec::Hook;
use kiln_model::{InstanceId, Millis};
use kiln_runtime::{ExecIo, ExecSpec, Runtime};

/// Output that is kept for the message about a failure, as in Docker.
const KEPT_OUTPUT: u64 = 4096;
/// A hook that takes longer is killed and has failed: nothing else of its instance goes
/// on meanwhile.
const HOOK_LIMIT: Millis = Millis(300_000);

/// Runs a command to its end. The error says how it ended, with the beginning of what it
/// printed.
pub fn run(runtime: &Runtime, id: &InstanceId, spec: &ExecSpec) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let (read, write) = std::io::pipe().map_err(text)?;
    let io = ExecIo {
        stdin: std::fs::File::open("/dev/null").map_err(text)?.into(),
        stderr: write.try_clone().map_err(text)?.into(),
        stdout: write.into(),
    };
    // Read while it runs: a full pipe would stop it.
    let reader = std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut read = read;
        // What can't be read is only missing from the message.
        let _ = (&mut read).take(KEPT_OUTPUT).read_to_end(&mut kept);
        let _ = std::io::copy(&mut read, &mut std::io::sink());
        String::from_utf8_lossy(&kept).trim().to_owned()
    });
    let status = runtime.exec(id, spec, io).map_err(|e| e.to_string())?;
    let output = reader.join().unwrap_or_default();
    let shown = spec.argv.join(" ");
    match status.success() {
        true => Ok(()),
        false if output.is_empty() => Err(format!("`{shown}` {status}")),
        false => Err(format!("`{shown}` {status}: {output}")),
    }
}

/// Runs hooks in their order, up to the first that fails. `when`: the key they are under.
pub fn hooks(runtime: &Runtime, id: &InstanceId, when: &str, hooks: &[Hook]) -> Result<(), String> {
    for hook in hooks {
        let spec = ExecSpec {
            argv: hook.command.clone(),
            env: hook.environment.clone(),
            cwd: hook.working_dir.clone(),
            user: hook.user.clone(),
            tty: false,
            privileged: hook.privileged,
            timeout: Some(HOOK_LIMIT),
        };
        run(runtime, id, &spec).map_err(|cause| format!("{when}: {cause}"))?;
    }
    Ok(())
}
