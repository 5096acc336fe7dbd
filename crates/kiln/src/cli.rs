//! The command line: what can be asked, and nothing of how it is answered.

mod build;
mod files;
mod order;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kiln_model::Millis;

pub use build::{BuildArgs, Fetching, SharedCacheArgs, TestArgs, UpArgs, WatchArgs};
pub use files::{CheckArgs, CheckFormat, ConfigArgs, ConfigFormat, FailOn, InitArgs};
pub use order::in_order;

/// Immutable infrastructure: every change is a new release, put in place by replacement.
#[derive(Parser, Debug)]
#[command(name = "kiln", version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "What says which project it is (-f, -p, -e, --profile, --env-file, \
    --project-directory) may stand before the command, too."
)]
pub struct Cli {
    /// Where kiln keeps everything
    #[arg(
        long,
        env = "KILN_ROOT",
        default_value = "/var/lib/kiln",
        global = true
    )]
    pub root: PathBuf,
    /// The most that the build cache may take on disk, such as 10GiB
    ///
    /// Kept after every image that is built, and by `kiln gc`: what saves the least time for
    /// its size goes first, the sooner the longer it was not used. Default: a tenth of the
    /// file system, at most 20 GiB.
    #[arg(long, env = "KILN_CACHE_SIZE", global = true, value_name = "SIZE", value_parser = bytes)]
    pub cache_size: Option<u64>,
    /// The most time that one RUN of a build may take, such as 30m
    ///
    /// One that takes longer is ended, and the build fails. Default: 6 hours.
    #[arg(long, env = "KILN_RUN_TIMEOUT", global = true, value_name = "TIME", value_parser = time)]
    pub run_timeout: Option<Millis>,
    /// Print JSON for machines: results as one value, progress as one event a line
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Build, test and roll out a project, replacing what runs without dropping a request
    Up(UpArgs),
    /// Roll out anew whenever files change, in a throw-away environment
    ///
    /// The rules are those of `develop.watch`. Everything happens in the environment
    /// PROJECT-watch, which has networks and volumes of its own and is taken down at the
    /// end (Ctrl-C). rebuild: the service is built and rolled out as by `up`. sync: the
    /// changed files are put over the image as one more layer, without building it.
    /// sync+exec: the command runs in each new instance after its start. restart: the
    /// instances are replaced. Every change is a release, tested like any other; what
    /// fails is told, the release before goes on, and so does the watching.
    Watch(WatchArgs),
    /// Show what `up` would do, and why
    Plan(ProjectArgs),
    /// Build and test the images, and roll nothing out
    Build(BuildArgs),
    /// Build the images, test each and the whole stack, and roll nothing out
    ///
    /// What was tested before as it is, is not tested again. Exit code 5: a test failed.
    Test(TestArgs),
    /// Stop and remove everything that runs of a project; volumes and releases stay
    Down(EnvironmentArgs),
    /// Show what serves, since when, from which release, and what has drifted
    Status(StatusArgs),
    /// Show what instances print
    Logs(LogsArgs),
    /// List an environment's releases
    Releases(EnvironmentArgs),
    /// Show what differs between two releases
    Diff(DiffArgs),
    /// Go back to an earlier release: offline, without building
    Rollback(RollbackArgs),
    /// Show how far a rollout is, or have a word in it
    Rollout(RolloutArgs),
    /// List the images in the store
    Images,
    /// List the packages that an image, or a service that runs, consists of
    ///
    /// As dpkg, apk, pip, npm, cargo and gem recorded them in its files, and as Go and
    /// cargo-auditable have put them into programs.
    Packages(PackagesArgs),
    /// Remove what no retained release or running instance needs; cut the build cache
    Gc(GcArgs),
    /// Check every byte of the store against its digest
    Fsck(FsckArgs),
    /// Show the audit log, or verify that nobody has changed it
    Audit(AuditArgs),
    /// Show what happens in an environment
    Events(EventsArgs),
    /// Run a command in an instance; recorded, and the instance is marked tainted
    Exec(ExecArgs),
    /// Show why an instance is as it is: mounts, digests, limits, write set
    Explain(ExplainArgs),
    /// Print the project as kiln understands it
    Config(ConfigArgs),
    /// Say what is wrong with a project, or hurts immutability
    ///
    /// Exit code 0: nothing at or above --fail-on; 3: something. Errors of the files
    /// themselves always count.
    Check(CheckArgs),
    /// Make a project of a folder: write compose.yaml, or say what to change in the one there
    ///
    /// A folder without a compose file gets one, and a Containerfile if it has none. A file
    /// that is there is never overwritten; with --write, the changes shown are made in the
    /// compose files.
    Init(InitArgs),
    /// Keep configs under a name, for `external: true` in compose files
    Configs(NamedArgs),
    /// Keep secrets under a name, for `external: true` in compose files
    Secrets(NamedArgs),
    /// Make networks that several projects join with `external: true`
    Networks(NetworksArgs),
    /// See and restore copies of volumes that `x-kiln.snapshot` has made
    Snapshots(SnapshotsArgs),
    /// Write kiln.lock, or move what it pins
    Lock(LockArgs),
    /// Run or control the daemon
    Daemon(DaemonArgs),
    /// Say what this machine lacks, and what that costs
    Doctor,
    /// Print a completion script for a shell
    Completion { shell: clap_complete::Shell },
    /// Write manual pages into a folder
    Man { folder: PathBuf },
    /// An instance's supervisor (internal)
    #[command(hide = true, disable_help_flag = true)]
    Shim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// The proxy's process (internal)
    #[command(hide = true)]
    Proxy {
        /// Take the place of the one that there is
        #[arg(long)]
        take_over: bool,
    },
}

/// Which project, and which environment.
#[derive(Args, Debug, Clone)]
pub struct ProjectArgs {
    #[command(flatten)]
    pub read: ReadArgs,
    /// The environment to act on (default: the project's name)
    #[arg(short, long, env = "KILN_ENVIRONMENT")]
    pub environment: Option<String>,
}

/// Which project, and how it is read.
#[derive(Args, Debug, Clone, Default)]
pub struct ReadArgs {
    /// The project's folder, or its compose file
    #[arg(default_value = ".")]
    pub project: PathBuf,
    /// Compose files, merged in this order; `-` is standard input
    #[arg(short, long = "file", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The project's name
    #[arg(short, long, env = "COMPOSE_PROJECT_NAME")]
    pub project_name: Option<String>,
    /// Enable a profile
    #[arg(long, value_name = "PROFILE")]
    pub profile: Vec<String>,
    /// Read variables from this file instead of .env
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Count relative paths from this folder instead of the first compose file's
    #[arg(long, value_name = "FOLDER")]
    pub project_directory: Option<PathBuf>,
    /// Go on although this key can't be honoured; the warning is recorded
    #[arg(long, value_name = "KEY")]
    pub allow_ignored: Vec<String>,
}

#[derive(Args, Debug)]
pub struct PackagesArgs {
    /// A service, or an image as `kiln images` shows it
    #[arg(value_name = "IMAGE|SERVICE")]
    pub of: String,
    #[command(flatten)]
    pub at: AtArgs,
}

/// Which environment: by name, or that of the project here.
#[derive(Args, Debug, Clone)]
pub struct EnvironmentArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
}

#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Every environment of this root
    #[arg(short, long)]
    pub all: bool,
}

#[derive(Args, Debug)]
pub struct LogsArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Only this service or instance
    #[arg(short, long, value_name = "NAME")]
    pub service: Vec<String>,
    /// Go on with what is printed from now on
    #[arg(short = 'F', long)]
    pub follow: bool,
    /// Only the last lines of each instance
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
}

#[derive(Args, Debug)]
pub struct DiffArgs {
    /// Older release
    pub a: u64,
    /// Newer release
    pub b: u64,
    #[command(flatten)]
    pub project: ProjectArgs,
}

#[derive(Args, Debug)]
pub struct RollbackArgs {
    /// The release to return to (default: the one proven before this one)
    pub release: Option<u64>,
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Return as soon as the rollout has begun
    #[arg(short, long)]
    pub detach: bool,
}

#[derive(Args, Debug)]
pub struct RolloutArgs {
    #[command(subcommand)]
    pub command: RolloutCommand,
    #[command(flatten)]
    pub at: AtArgs,
}

#[derive(Subcommand, Clone, Copy, Debug)]
pub enum RolloutCommand {
    /// Show how far it is, a canary's steps and how they ended, and what the release is still
    /// held to
    Status,
    /// Move no more traffic and give no verdict until it is resumed
    Pause,
    /// Go on; what failed before is not held against the release any more
    Resume,
    /// Give it up: what served before serves again
    Abort,
    /// Take no more steps, and wait no longer for the verdict: the release takes all traffic
    /// and is proven, and the old instances go
    Promote,
}

#[derive(Args, Debug)]
pub struct GcArgs {
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Releases to keep in each environment beside the one that serves
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub keep: usize,
}

#[derive(Args, Debug)]
pub struct FsckArgs {
    /// Move damaged files aside, so that they are fetched or built anew
    #[arg(long)]
    pub repair: bool,
}

#[derive(Args, Debug)]
pub struct AuditArgs {
    #[command(subcommand)]
    pub command: Option<AuditCommand>,
}

#[derive(Subcommand, Debug)]
pub enum AuditCommand {
    /// Check every entry's hash and its link to the one before
    Verify,
}

#[derive(Args, Debug)]
pub struct EventsArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Go on with what happens from now on
    #[arg(short = 'F', long)]
    pub follow: bool,
}

#[derive(Args, Debug)]
pub struct ExecArgs {
    /// The instance, or a service (its first instance)
    pub target: String,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    #[command(flatten)]
    pub at: AtArgs,
    /// Run as this user
    #[arg(short, long)]
    pub user: Option<String>,
    /// No terminal, even when there is one
    #[arg(short = 'T', long)]
    pub no_tty: bool,
}

#[derive(Args, Debug)]
pub struct ExplainArgs {
    pub instance: String,
    #[command(flatten)]
    pub at: AtArgs,
}

/// The environment, for commands whose arguments are taken otherwise.
#[derive(Args, Debug)]
pub struct AtArgs {
    /// The environment (default: that of the project in this folder, or the only one)
    #[arg(short, long, env = "KILN_ENVIRONMENT", global = true)]
    pub environment: Option<String>,
}

#[derive(Args, Debug)]
pub struct NamedArgs {
    #[command(subcommand)]
    pub command: NamedCommand,
}

#[derive(Subcommand, Debug)]
pub enum NamedCommand {
    /// Keep a content under a name; the next `kiln up` takes it
    Set {
        name: String,
        /// Read it from this file instead of standard input
        file: Option<PathBuf>,
    },
    /// List the names
    List,
    /// Forget a name; releases keep what they have
    Remove { name: String },
}

#[derive(Args, Debug)]
pub struct NetworksArgs {
    #[command(subcommand)]
    pub command: NetworksCommand,
}

#[derive(Subcommand, Debug)]
pub enum NetworksCommand {
    /// Make a network that belongs to no project
    Create {
        name: kiln_model::NetworkName,
        /// Its subnet, like 10.20.0.0/20 (default: a free one)
        #[arg(long)]
        subnet: Option<kiln_model::network::Subnet>,
        /// Give it no way out
        #[arg(long)]
        internal: bool,
    },
    /// List all networks, whose they are and who uses them
    List,
    /// Remove a network that belongs to no project and that nobody uses
    Remove { name: kiln_model::NetworkName },
}

#[derive(Args, Debug)]
pub struct SnapshotsArgs {
    #[command(subcommand)]
    pub command: SnapshotsCommand,
}

#[derive(Subcommand, Debug)]
pub enum SnapshotsCommand {
    /// List the snapshots of all volumes
    List,
    /// Put a snapshot in its volume's place; what was there becomes a snapshot itself
    Restore {
        volume: kiln_model::VolumeName,
        number: u32,
    },
    /// Remove a snapshot
    Remove {
        volume: kiln_model::VolumeName,
        number: u32,
    },
}

#[derive(Args, Debug)]
pub struct LockArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Look for newer packages and images
    #[arg(long)]
    pub update: bool,
}

#[derive(Args, Debug)]
pub struct DaemonArgs {
    #[command(subcommand)]
    pub command: DaemonCommand,
}

#[derive(Subcommand, Debug)]
pub enum DaemonCommand {
    /// Run the daemon in the foreground
    Run,
    /// Stop the daemon; services go on serving
    Stop,
    /// Put this kiln's daemon and proxy in the place of those that run, as after an update
    ///
    /// No connection is closed: the new proxy is given the sockets of the old one, which
    /// lives on until its last connection has ended.
    Restart,
    /// Say whether it runs
    Status,
    /// Install a systemd unit, so that services come back after a reboot
    Install {
        /// Print the unit instead
        #[arg(long)]
        print: bool,
    },
}

/// Go's durations, as compose has them.
fn time(text: &str) -> Result<Millis, String> {
    let nanos = kiln_compose::parse_duration(text)?;
    match u64::try_from(nanos / 1_000_000) {
        Ok(millis) if millis > 0 => Ok(Millis(millis)),
        _ => Err("a time must be 1ms at least".into()),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let bytes = kiln_compose::parse_bytes(text)?;
    u64::try_from(bytes).map_err(|_| "a size must not be negative".into())
}
