//! `daemon`, `doctor`, `completion`, `man`: around this machine.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::CommandFactory;
use kiln_daemon::{DaemonConfig, lock_path};
use kiln_runtime::doctor::State;
use rustix::fs::{FlockOperation, flock};

use crate::cli::{Cli, DaemonCommand};
use crate::context::{Context, runs_this_program, this_program};
use crate::failure::{Failure, Kind, machine};
use crate::output;

const UNIT_PATH: &str = "/etc/systemd/system/kiln.service";

/// What a daemon is given to end; it has nothing to wait for itself.
const END_LIMIT: Duration = Duration::from_secs(10);
const END_LOOK: Duration = Duration::from_millis(10);
/// The unit's `RestartSec`, and what a new daemon may take to answer.
const SUPERVISED_LIMIT: Duration = Duration::from_secs(20);

pub async fn daemon(context: &Context, command: &DaemonCommand) -> Result<(), Failure> {
    match command {
        DaemonCommand::Run => run_daemon(context).await,
        DaemonCommand::Stop => {
            context.client.stop().await?;
            ended(&context.root).await?;
            outln!("the daemon has stopped; services, if any, go on serving");
            Ok(())
        }
        DaemonCommand::Restart => restart(context).await,
        DaemonCommand::Status => {
            let status = context.client.daemon().await?;
            if context.json {
                return output::json(&status);
            }
            outln!(
                "kiln {} (pid {}, since {}) on {}",
                status.version,
                status.pid,
                output::time(status.since),
                status.root
            );
            match status.proxy_pid {
                Some(pid) => outln!("proxy: pid {pid}"),
                None => outln!("proxy: not running"),
            }
            for environment in status.environments {
                outln!("environment {environment}");
            }
            Ok(())
        }
        DaemonCommand::Install { print } => install(context, *print),
    }
}

/// Who supervises the daemon starts it; else this program does.
async fn restart(context: &Context) -> Result<(), Failure> {
    let before = context.client.daemon().await.ok();
    if before.is_some() {
        context.client.stop().await?;
        ended(&context.root).await?;
    }
    let supervised = before.is_some_and(|daemon| daemon.supervised);
    if supervised {
        answers(context).await?;
    } else {
        context.need_daemon().await?;
    }
    let now = context.client.daemon().await?;
    if supervised && !runs_this_program(now.pid) {
        let text = "the daemon that systemd has started runs another kiln than this one";
        return Err(Failure::new(Kind::Conflict, text)
            .hint("`kiln daemon install` writes a unit for this one"));
    }
    outln!("the daemon runs as pid {}", now.pid);
    match now.proxy_pid {
        Some(pid) if !runs_this_program(pid) => Err(machine(format!(
            "the proxy (pid {pid}) of the earlier kiln goes on; {} says why",
            context.root.join("run/daemon.log").display()
        ))),
        _ => Ok(()),
    }
}

/// Waits for the daemon that systemd starts again.
async fn answers(context: &Context) -> Result<(), Failure> {
    let limit = Instant::now() + SUPERVISED_LIMIT;
    while context.client.daemon().await.is_err() {
        if Instant::now() >= limit {
            return Err(
                machine("systemd has not started the daemon again").hint("systemctl status kiln")
            );
        }
        tokio::time::sleep(END_LOOK).await;
    }
    Ok(())
}

/// Waits until the daemon has let go of its root: a new one may be started then.
async fn ended(root: &Path) -> Result<(), Failure> {
    let path = lock_path(root);
    let limit = Instant::now() + END_LIMIT;
    loop {
        let lock = File::open(&path).map_err(|e| machine(format!("{}: {e}", path.display())))?;
        if flock(&lock, FlockOperation::NonBlockingLockShared).is_ok() {
            return Ok(());
        }
        if Instant::now() >= limit {
            return Err(machine(format!(
                "the daemon has not ended within {} s; its pid is in {}",
                END_LIMIT.as_secs(),
                path.display()
            )));
        }
        tokio::time::sleep(END_LOOK).await;
    }
}

async fn run_daemon(context: &Context) -> Result<(), Failure> {
    context.need_root()?;
    context.make_root()?;
    // Started by `kiln up`, it must not end with that terminal. A session leader (started
    // by systemd or a shell's job) stays one.
    let _ = rustix::process::setsid();
    let mut proxy = this_program(&["--root"])?;
    proxy.push(context.root.clone().into_os_string());
    proxy.push("proxy".into());
    let config = DaemonConfig {
        root: context.root.clone(),
        shim: this_program(&["shim"])?,
        proxy,
    };
    kiln_daemon::run(config).await.map_err(|e| match e {
        kiln_daemon::DaemonError::AlreadyRunning { .. } => {
            Failure::new(Kind::Conflict, e.to_string())
        }
        other => machine(other),
    })
}

fn unit(context: &Context) -> Result<String, Failure> {
    let exe = std::env::current_exe().map_err(machine)?;
    Ok(format!(
        "[Unit]\n\
         Description=kiln: immutable infrastructure\n\
         Documentation=man:kiln(1)\n\
         After=network-online.target\n\
         Wants=network-online.target\n\n\
         [Service]\n\
         ExecStart={} --root {} daemon run\n\
         # Instances and the proxy are this unit's processes too and must outlive the daemon.\n\
         KillMode=process\n\
         Restart=always\n\
         RestartSec=1\n\
         Delegate=yes\n\
         LimitNOFILE=1048576\n\
         TasksMax=infinity\n\n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        exe.display(),
        context.root.display()
    ))
}

fn install(context: &Context, print: bool) -> Result<(), Failure> {
    let text = unit(context)?;
    if print {
        out!("{text}");
        return Ok(());
    }
    context.need_root()?;
    std::fs::write(UNIT_PATH, text).map_err(|e| {
        Failure::new(Kind::Machine, format!("{UNIT_PATH}: {e}"))
            .hint("kiln daemon install --print shows the unit")
    })?;
    outln!("{UNIT_PATH} written; now: systemctl daemon-reload && systemctl enable --now kiln");
    Ok(())
}

/// The proxy's process.
pub fn proxy(context: &Context, take_over: bool) -> Result<(), Failure> {
    let _ = rustix::process::setsid();
    let run = context.root.join("run");
    let config = kiln_proxy::ProxyConfig {
        take_over,
        ..kiln_proxy::ProxyConfig::new(run.join("proxy.sock"), run.join("proxy.json"))
    };
    kiln_proxy::run_blocking(config).map_err(machine)
}

pub fn doctor(context: &Context) -> Result<(), Failure> {
    let mut findings = kiln_runtime::doctor::examine();
    let conflicts = [
        (
            "another firewall's forwarding policy",
            kiln_runtime::net::forward_policy_conflict(),
            "let that firewall forward kiln's bridges (kn*)",
        ),
        (
            "another firewall's policy for this host",
            kiln_runtime::net::input_policy_conflict(),
            "let that firewall accept what comes from kiln's bridges (kn*)",
        ),
    ];
    for (what, conflict, hint) in conflicts {
        findings.extend(conflict.map(|cost| kiln_runtime::doctor::Finding {
            what: what.into(),
            state: State::Degraded,
            cost,
            hint: hint.into(),
        }));
    }
    findings.push(signature_tool());
    if context.json {
        let all: Vec<serde_json::Value> = findings
            .iter()
            .map(|f| {
                serde_json::json!({
                    "what": f.what, "state": state(&f.state), "cost": f.cost, "hint": f.hint,
                })
            })
            .collect();
        return output::json(&all);
    }
    for finding in &findings {
        outln!("{:<8} {}", state(&finding.state), finding.what);
        if !finding.cost.is_empty() {
            outln!("         {}", finding.cost);
        }
        if !finding.hint.is_empty() {
            outln!("         → {}", finding.hint);
        }
    }
    match findings.iter().any(|f| matches!(f.state, State::Missing)) {
        true => Err(Failure::new(
            Kind::Machine,
            "this machine lacks something kiln needs",
        )),
        false => Ok(()),
    }
}

fn state(state: &State) -> &'static str {
    match state {
        State::Good => "good",
        State::Degraded => "less",
        State::Missing => "MISSING",
    }
}

fn signature_tool() -> kiln_runtime::doctor::Finding {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = ["gpgv", "sqv"]
        .iter()
        .find(|tool| std::env::split_paths(&paths).any(|p| p.join(tool).is_file()));
    let (state, cost, hint) = match found {
        Some(_) => (State::Good, String::new(), String::new()),
        None => (
            State::Degraded,
            "Debian bases can't be verified, so they can't be made".to_owned(),
            "apt-get install gpgv".to_owned(),
        ),
    };
    let what = format!("Debian signatures ({})", found.unwrap_or(&"gpgv or sqv"));
    kiln_runtime::doctor::Finding {
        what,
        state,
        cost,
        hint,
    }
}

pub fn completion(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut std::io::stdout());
}

pub fn man(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(machine)?;
    clap_mangen::generate_to(Cli::command(), folder)
        .map_err(|e| machine(format!("{}: {e}", folder.display())))
}
