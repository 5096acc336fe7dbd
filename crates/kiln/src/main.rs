//! The command line: parse, call, print, exit code. Whatever decides or does something
//! is in the other crates.

// Its macros are for all that follow.
#[macro_use]
mod output;

mod assemble;
mod build;
mod cache;
mod check;
mod cli;
mod config;
mod context;
mod failure;
mod init;
mod junit;
mod live;
mod machine;
mod named;
mod ops;
mod packages;
mod progress;
mod project;
mod report;
mod rollout;
mod see;
mod snapshots;
mod stack;
mod steer;
mod terminal;
mod test;
mod tested;
mod up;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::in_order(std::env::args_os()));
    // The shim is single-threaded: nothing else may be set up before it.
    if let Command::Shim { args } = cli.command {
        return kiln_runtime::shim::main(args);
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("KILN_LOG")
                .unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match start(&cli) {
        Ok(code) => code,
        Err(failure) => {
            failure.tell(cli.json);
            failure.exit_code()
        }
    }
}

fn start(cli: &Cli) -> Result<ExitCode, Failure> {
    let context = Context::new(cli)?;
    if let Command::Proxy { take_over } = cli.command {
        return machine::proxy(&context, take_over).map(|()| ExitCode::SUCCESS);
    }
    let mut runtime = match cli.command {
        // They only read and print.
        Command::Config(_) | Command::Check(_) | Command::Init(_) => {
            tokio::runtime::Builder::new_current_thread()
        }
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    // Two threads: the daemon must stay small, and the work itself is on others.
    let runtime = runtime
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failure::machine)?;
    let result = runtime.block_on(run(&context, &cli.command));
    // A download that hangs must not keep an interrupted command alive.
    runtime.shutdown_background();
    result
}

async fn run(context: &Context, command: &Command) -> Result<ExitCode, Failure> {
    if speaks_with_the_daemon(command) {
        context.need_daemon().await?;
    }
    match command {
        Command::Up(args) => up::up(context, args).await?,
        Command::Watch(args) => watch::watch(context, args).await?,
        Command::Plan(args) => up::plan(context, args).await?,
        Command::Build(args) => build::build(context, args).await?,
        Command::Test(args) => test::test(context, args).await?,
        Command::Down(args) => up::down(context, args).await?,
        Command::Lock(args) => up::lock(context, args).await?,
        Command::Rollback(args) => up::rollback(context, args).await?,
        Command::Rollout(args) => steer::rollout(context, args).await?,
        Command::Status(args) => see::status(context, args).await?,
        Command::Releases(args) => see::releases(context, args).await?,
        Command::Diff(args) => see::diff(context, args).await?,
        Command::Events(args) => see::events(context, args).await?,
        Command::Explain(args) => see::explain(context, args).await?,
        Command::Audit(args) => see::audit(context, args)?,
        Command::Logs(args) => ops::logs(context, args).await?,
        Command::Exec(args) => return ops::exec(context, args).await,
        Command::Images => ops::images(context)?,
        Command::Packages(args) => packages::packages(context, args).await?,
        Command::Gc(args) => ops::gc(context, args).await?,
        Command::Fsck(args) => ops::fsck(context, args)?,
        Command::Check(args) => check::check(context, args)?,
        Command::Init(args) => init::init(args)?,
        Command::Config(args) => config::config(context, args).await?,
        Command::Configs(args) => named::configs(context, &args.command)?,
        Command::Secrets(args) => named::secrets(context, &args.command)?,
        Command::Networks(args) => ops::networks(context, &args.command).await?,
        Command::Snapshots(args) => snapshots::snapshots(context, &args.command).await?,
        Command::Daemon(args) => machine::daemon(context, &args.command).await?,
        Command::Doctor => machine::doctor(context)?,
        Command::Completion { shell } => machine::completion(*shell),
        Command::Man { folder } => machine::man(folder)?,
        // Taken before: they are processes of their own kind.
        Command::Shim { .. } | Command::Proxy { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// These start it if none answers: whoever asks what runs after a crash wants an answer.
/// `up` does so itself, after building; `gc` and `daemon` must see what there is.
fn speaks_with_the_daemon(command: &Command) -> bool {
    matches!(
        command,
        Command::Status(_)
            | Command::Releases(_)
            | Command::Diff(_)
            | Command::Events(_)
            | Command::Explain(_)
            | Command::Logs(_)
            | Command::Exec(_)
            | Command::Rollback(_)
            | Command::Rollout(_)
            | Command::Down(_)
            | Command::Networks(_)
            | Command::Snapshots(_)
    )
}
