//! What commands are asked that only read a project's files, or write them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::ReadArgs;

#[derive(Args, Debug)]
pub struct ConfigArgs {
    #[command(flatten)]
    pub project: ReadArgs,
    /// Only these services, and what they depend on
    #[arg(value_name = "SERVICE")]
    pub only: Vec<String>,
    #[arg(long, value_enum, default_value_t = ConfigFormat::Yaml)]
    pub format: ConfigFormat,
    #[command(flatten)]
    pub select: SelectArgs,
    /// Write to this file instead of printing
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Leave env_file keys as they are
    #[arg(long)]
    pub no_env_resolution: bool,
    /// Leave variables as they are
    #[arg(long)]
    pub no_interpolate: bool,
    /// Leave out what is filled in: default networks, names, dependencies
    #[arg(long)]
    pub no_normalize: bool,
    /// Leave relative paths as they are
    #[arg(long)]
    pub no_path_resolution: bool,
    /// Do not check that what is referred to exists
    #[arg(long)]
    pub no_consistency: bool,
    /// Pin images to the digests of kiln.lock
    #[arg(long)]
    pub resolve_image_digests: bool,
}

/// What to print instead of the whole model; one of them.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub struct SelectArgs {
    /// Only the services' names
    #[arg(long)]
    pub services: bool,
    /// Only the images
    #[arg(long)]
    pub images: bool,
    /// Only the volumes' names
    #[arg(long)]
    pub volumes: bool,
    /// Only the networks' names
    #[arg(long)]
    pub networks: bool,
    /// Only the language models' names
    #[arg(long)]
    pub models: bool,
    /// Only the profiles' names
    #[arg(long)]
    pub profiles: bool,
    /// A hash of each of these services' configuration (`a,b`, or `*`)
    #[arg(long, value_name = "SERVICES")]
    pub hash: Option<String>,
    /// The variables that the files are read with
    #[arg(long)]
    pub environment: bool,
    /// The variables that the files ask for
    #[arg(long)]
    pub variables: bool,
    /// An override file that pins images to the digests of kiln.lock
    #[arg(long)]
    pub lock_image_digests: bool,
    /// Print nothing; only say what is wrong
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    pub project: ReadArgs,
    /// How to say it
    #[arg(long, value_enum, default_value_t = CheckFormat::Text)]
    pub format: CheckFormat,
    /// The least severity that makes the exit code 3
    #[arg(long, value_enum, default_value_t = FailOn::Warning)]
    pub fail_on: FailOn,
    /// Leave this rule out
    #[arg(long, value_name = "RULE")]
    pub skip: Vec<String>,
    /// List the rules and end
    #[arg(long)]
    pub rules: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFormat {
    /// With the source text, for people
    Text,
    /// Annotations of GitHub Actions
    Github,
    /// SARIF 2.1.0, for code scanners
    Sarif,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailOn {
    Error,
    Warning,
    Note,
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// The folder
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// Make the changes that are shown
    #[arg(long)]
    pub write: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigFormat {
    Yaml,
    Json,
}
