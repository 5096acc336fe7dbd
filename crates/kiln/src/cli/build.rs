//! What commands are asked that build, and prove what they have built.

use std::path::PathBuf;

use clap::Args;

use super::{FailOn, ProjectArgs, ReadArgs};
use crate::progress::Form;

#[derive(Args, Debug)]
pub struct UpArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Return as soon as the rollout has begun
    #[arg(short, long)]
    pub detach: bool,
    #[command(flatten)]
    pub shared: SharedCacheArgs,
    /// Write how each check went to FILE, as JUnit's XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct TestArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Write how each check went to FILE, as JUnit's XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
}

/// Results of instructions, shared with other machines.
#[derive(Args, Clone, Debug, Default)]
pub struct SharedCacheArgs {
    /// Take results of instructions from a cache in a registry or a folder (repeatable)
    ///
    /// A reference, `type=registry,ref=REFERENCE`, or `type=local,src=FOLDER` (and `tag=NAME`);
    /// beside `build.cache_from` of the project. Layers are verified, but what an instruction
    /// makes is what the cache says: whoever may write to it decides what is built. What is
    /// taken is told. A cache that can't be used is told, and the build goes on without.
    #[arg(long, value_name = "CACHE")]
    pub cache_from: Vec<String>,
    /// Put the results of all instructions into a registry or a folder (repeatable)
    ///
    /// A reference, `type=registry,ref=REFERENCE`, or `type=local,dest=FOLDER` (and `tag=NAME`):
    /// an OCI layout, in which what had this name before is replaced. Also `mode=min` (only of
    /// the image's own layers; `max`, all stages, unless stated) and `ignore-error=true`; beside
    /// `build.cache_to` of the project. Results in which secrets were found are not exported.
    #[arg(long, value_name = "CACHE")]
    pub cache_to: Vec<String>,
}

#[derive(Args, Debug)]
pub struct BuildArgs {
    #[command(flatten)]
    pub project: ProjectArgs,
    /// Only look: say what is likely wrong in the Containerfiles, or not reproducible
    ///
    /// The rules are BuildKit's, under its names, and kiln's own: PipeToShell, UncheckedAdd,
    /// UnpinnedBase, UnrecordedDownload. A file leaves some out with a first line
    /// `# check=skip=RULE,RULE`. Exit code 0: nothing at or above --fail-on; 3: something.
    #[arg(long)]
    pub check: bool,
    /// The least severity that makes the exit code 3
    #[arg(long, value_enum, default_value_t = FailOn::Warning, requires = "check")]
    pub fail_on: FailOn,
    /// Build everything once more in other conditions, and say which file differs and how
    ///
    /// The second build works in another folder, takes nothing from the cache, has one
    /// processor for each command and builds one stage after the other, the later first.
    /// Exit code 4: something differs.
    #[arg(long, conflicts_with = "check")]
    pub verify: bool,
    /// Build nothing: take the build cache away, or what is beyond --cache-size if that is given
    ///
    /// What a release keeps, or a build under way needs, stays.
    #[arg(long, conflicts_with_all = ["check", "verify", "explain"])]
    pub prune: bool,
    /// What commands fetch: as kiln.lock has recorded it, or anew
    ///
    /// What a RUN fetches over HTTP and HTTPS is recorded: its digest in kiln.lock, the content
    /// below KILN_ROOT. Later builds get the same, without network where the content is there;
    /// what a command asks for beyond that is fetched and recorded. With `live`, everything is
    /// fetched and recorded anew.
    #[arg(long, value_enum, default_value_t = Fetching::Locked, conflicts_with_all = ["check", "prune"])]
    pub network: Fetching,
    /// Say of each instruction that was not taken from the cache why it was not
    #[arg(long)]
    pub explain: bool,
    /// Carry out every instruction anew, whatever the cache has
    ///
    /// What RUNs fetch is still as kiln.lock has recorded it: see --network.
    #[arg(long, conflicts_with_all = ["check", "prune"])]
    pub no_cache: bool,
    /// A value for an ARG of every Containerfile, as NAME=VALUE (repeatable)
    ///
    /// In place of what `build.args` of the project says of it; NAME alone has the value of the
    /// environment's variable, if there is one. `kiln up` goes by the project alone: for it,
    /// write them there.
    #[arg(long, value_name = "NAME=VALUE", value_parser = build_arg, conflicts_with_all = ["check", "prune"])]
    pub build_arg: Vec<(String, Option<String>)>,
    /// Build for these platforms instead of those of `build.platforms`, such as
    /// linux/amd64,linux/arm64
    ///
    /// Several become one OCI index. What is not for this machine is built and not tested;
    /// it may run commands only if an emulator is registered with the kernel.
    #[arg(long, value_name = "PLATFORM", value_delimiter = ',')]
    pub platform: Vec<String>,
    /// A limit of setrlimit(2) for every RUN, such as nofile=1024:4096 (repeatable)
    ///
    /// TYPE=SOFT[:HARD], in place of what `build.ulimits` of the project says of that type.
    /// `kiln up` goes by the project alone, and RUNs with other limits are run anew: for it,
    /// write them there.
    #[arg(long, value_name = "LIMIT", value_parser = kiln_compose::parse_ulimit)]
    pub ulimit: Vec<(String, (i64, i64))>,
    /// Write the images that were built to an OCI layout: a folder, or a file named *.tar
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Push the images that were built to the registries that `image` names
    #[arg(long)]
    pub push: bool,
    /// How to show what is being done
    #[arg(long, value_enum, default_value_t = Form::Auto)]
    pub progress: Form,
    #[command(flatten)]
    pub shared: SharedCacheArgs,
    /// Write how each check of the images went to FILE, as JUnit's XML
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "verify", "prune"])]
    pub junit: Option<PathBuf>,
}

fn build_arg(text: &str) -> Result<(String, Option<String>), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, std::env::var(text).ok()),
    };
    match name.is_empty() {
        true => Err("a name must stand before `=`".into()),
        false => Ok((name.to_owned(), value)),
    }
}

/// Where what a RUN fetches comes from.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetching {
    /// As kiln.lock has it
    Locked,
    /// From the network, and kiln.lock has it from then on
    Live,
}

#[derive(Args, Debug)]
pub struct WatchArgs {
    #[command(flatten)]
    pub project: ReadArgs,
}
