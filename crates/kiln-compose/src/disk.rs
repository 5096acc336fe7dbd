//! The one module that touches the machine: finds compose files, reads `.env` and the
//! environment, and hands them to the pure core.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::dotenv::{self, Variables};
use crate::interpolate::Environment;
use crate::load::{Loaded, load};
use crate::paths;
use crate::project::{LoadError, LoadOptions, Resolved, Skip, resolve};
use crate::units;

/// In order of preference.
pub const FILE_NAMES: [&str; 4] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yaml",
    "docker-compose.yml",
];
/// Laid over the file that was found, where there is one.
pub const OVERRIDE_NAMES: [&str; 4] = [
    "compose.override.yaml",
    "compose.override.yml",
    "docker-compose.override.yaml",
    "docker-compose.override.yml",
];
/// As a file: what comes on standard input.
const STDIN: &str = "-";
/// No file is read beyond this.
pub const MAX_READ_BYTES: u64 = 16 << 20;

/// What a command line says.
#[derive(Clone, Debug, Default)]
pub struct DiskOptions {
    /// Where to begin: the current folder, or the one that was named. A compose file, too.
    pub folder: PathBuf,
    /// `-f`, in order; relative ones count from `folder`.
    pub files: Vec<PathBuf>,
    /// `--project-directory`.
    pub project_directory: Option<PathBuf>,
    pub project_name: Option<String>,
    /// `--env-file`, in order; the later wins.
    pub env_files: Vec<PathBuf>,
    /// `--profile`.
    pub profiles: Vec<String>,
    pub services: Vec<String>,
    pub keep_env_files: bool,
    pub skip: Skip,
    pub allow_ignored: Vec<String>,
    /// The caller's environment.
    pub environment: Environment,
}

impl DiskOptions {
    /// From `folder`, with this process's environment.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self {
            folder: folder.into(),
            environment,
            ..Self::default()
        }
    }
}

/// Reads a file, up to [`MAX_READ_BYTES`].
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    read_bounded(file)
}

/// It ends but once: whoever asks again gets the same.
fn read_stdin() -> io::Result<Vec<u8>> {
    static READ: Mutex<Option<Vec<u8>>> = Mutex::new(None);
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bytes) = &*read {
        return Ok(bytes.clone());
    }
    let bytes = read_bounded(io::stdin().lock())?;
    *read = Some(bytes.clone());
    Ok(bytes)
}

fn read_bounded(file: impl io::Read) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = vec![];
    file.take(MAX_READ_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_READ_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {MAX_READ_BYTES} bytes"),
        ));
    }
    Ok(bytes)
}

/// Finds, reads and lowers a project.
pub fn load_from_disk(options: &DiskOptions) -> Result<Loaded, LoadError> {
    let prepared = prepare(options)?;
    load(&prepared, &|path: &Path| read(options, &prepared, path))
}

/// Finds, reads and resolves a project: for printing it.
pub fn resolve_from_disk(options: &DiskOptions) -> Result<Resolved, LoadError> {
    let prepared = prepare(options)?;
    resolve(&prepared, &|path: &Path| read(options, &prepared, path))
}

/// `-f -` is a file of this name beside the others, whose content is standard input.
fn read(options: &DiskOptions, prepared: &LoadOptions, path: &Path) -> io::Result<Vec<u8>> {
    let named = options.files.iter().zip(&prepared.files);
    match named
        .into_iter()
        .any(|(said, file)| said.as_os_str() == STDIN && file == path)
    {
        true => read_stdin(),
        false => read_file(path),
    }
}

/// Finds the files and the environment of a project.
pub fn prepare(options: &DiskOptions) -> Result<LoadOptions, LoadError> {
    let start = absolute(&options.folder)?;
    if !start.exists() {
        return Err(LoadError::usage(format!("there is no {}", start.display())));
    }
    if let Some(remote) = options.files.iter().find(|file| is_remote(file)) {
        return Err(LoadError::usage(format!(
            "`{}`: kiln fetches no compose files; copy it into the project",
            remote.display()
        )));
    }
    let (start, named) = if start.is_file() {
        (paths::parent(&start), vec![start])
    } else {
        let named = options
            .files
            .iter()
            .map(|file| join(&start, file))
            .collect();
        (start, named)
    };
    let mut environment = options.environment.clone();
    let env_files = env_files(options);
    let explicit = !env_files.is_empty();
    if explicit {
        let mut found = Variables::new();
        for file in &env_files {
            read_env(&join(&start, file), &environment, &mut found, true)?;
        }
        add(&mut environment, found);
    } else if env_file_allowed(&environment) {
        // Also says COMPOSE_FILE, so it comes before the files are known.
        default_env(&start, &mut environment)?;
    }
    let files = files(&start, named, &environment)?;
    let folder = match &options.project_directory {
        Some(folder) => absolute(&join(&start, folder))?,
        None => files
            .first()
            .map_or_else(|| start.clone(), |file| paths::parent(file)),
    };
    if !explicit && env_file_allowed(&environment) && folder != start {
        default_env(&folder, &mut environment)?;
    }
    let mut profiles = options.profiles.clone();
    if profiles.is_empty() {
        let said = environment.get("COMPOSE_PROFILES").map(String::as_str);
        let names = said.unwrap_or_default().split(',').map(str::trim);
        profiles.extend(names.filter(|name| !name.is_empty()).map(str::to_owned));
    }
    Ok(LoadOptions {
        files,
        folder,
        project_name: options.project_name.clone(),
        environment,
        profiles,
        services: options.services.clone(),
        keep_env_files: options.keep_env_files,
        skip: options.skip,
        allow_ignored: options.allow_ignored.clone(),
    })
}

/// `--env-file`, or else COMPOSE_ENV_FILES.
fn env_files(options: &DiskOptions) -> Vec<PathBuf> {
    if !options.env_files.is_empty() {
        return options.env_files.clone();
    }
    let said = options.environment.get("COMPOSE_ENV_FILES");
    let names = said.map_or("", String::as_str).split(',').map(str::trim);
    names
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .collect()
}

fn is_remote(file: &Path) -> bool {
    let text = file.to_string_lossy();
    text.contains("://") || text.starts_with("git@")
}

fn absolute(path: &Path) -> Result<PathBuf, LoadError> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let absolute = std::path::absolute(path)
        .map_err(|error| LoadError::usage(format!("{}: {error}", path.display())))?;
    Ok(paths::join(Path::new("/"), &absolute.to_string_lossy()))
}

fn join(folder: &Path, path: &Path) -> PathBuf {
    paths::join(folder, &path.to_string_lossy())
}

fn env_file_allowed(environment: &Environment) -> bool {
    environment
        .get("COMPOSE_DISABLE_ENV_FILE")
        .and_then(|text| match text.as_str() {
            "1" => Some(true),
            other => units::parse_bool(other),
        })
        != Some(true)
}

fn default_env(folder: &Path, environment: &mut Environment) -> Result<(), LoadError> {
    let mut found = Variables::new();
    read_env(&folder.join(".env"), environment, &mut found, false)?;
    add(environment, found);
    Ok(())
}

fn add(environment: &mut Environment, found: Variables) {
    for (name, value) in found {
        environment.entry(name).or_insert(value);
    }
}

fn read_env(
    path: &Path,
    outer: &Environment,
    found: &mut Variables,
    required: bool,
) -> Result<(), LoadError> {
    let bytes = match read_file(path) {
        Ok(bytes) => bytes,
        Err(error)
            if !required
                && matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::IsADirectory
                ) =>
        {
            return Ok(());
        }
        Err(error) => {
            let message = format!("the env file {} cannot be read: {error}", path.display());
            return Err(LoadError::usage(message));
        }
    };
    let lookup = |name: &str| outer.get(name).cloned();
    dotenv::parse(&bytes, found, &lookup)
        .map_err(|error| LoadError::usage(format!("{}: {error}", path.display())))
}

/// `-f`, COMPOSE_FILE, or what lies in the folder or the nearest one above it.
fn files(
    start: &Path,
    named: Vec<PathBuf>,
    environment: &Environment,
) -> Result<Vec<PathBuf>, LoadError> {
    if !named.is_empty() {
        return named.iter().map(|file| absolute(file)).collect();
    }
    if let Some(said) = environment
        .get("COMPOSE_FILE")
        .filter(|text| !text.is_empty())
    {
        let separator = environment
            .get("COMPOSE_PATH_SEPARATOR")
            .filter(|text| !text.is_empty())
            .map_or(":", String::as_str);
        return Ok(said
            .split(separator)
            .map(|file| paths::join(start, file))
            .collect());
    }
    let mut folder = Some(start);
    while let Some(here) = folder {
        if let Some(found) = first_file(here, &FILE_NAMES) {
            let over = first_file(here, &OVERRIDE_NAMES);
            return Ok(std::iter::once(found).chain(over).collect());
        }
        folder = here.parent();
    }
    Err(LoadError::usage(format!(
        "no compose file found in {} or above it; kiln looks for {}",
        start.display(),
        FILE_NAMES.join(", ")
    )))
}

fn first_file(folder: &Path, names: &[&str]) -> Option<PathBuf> {
    names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
}
