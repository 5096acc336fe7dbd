//! From package files to a finished root folder: unpack, configure, clean.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use kiln_model::instance::ExitStatus;

use super::clean;
use super::database::{self, Unpacked};
use super::deb::{Deb, DebError};
use super::edit::Edit;
use super::relation;
use super::resolve::install_order;
use super::root::{ConffilePlace, Holder, Root, RootError, Writer};
use super::scripts::{self, Step};
use super::settings;

/// Threads that unpack: decompression is the bottleneck, and memory is bounded by it.
const MAX_THREADS: usize = 8;
/// Lines of output shown when configuring fails.
const TAIL_LINES: usize = 60;

/// Why a root could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error(transparent)]
    Deb(#[from] DebError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("cannot prepare the new root in {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the file of {path} holds package `{found}`, not `{wanted}`")]
    WrongPackage {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error(
        "maintainer scripts need the essential packages: leave out `essential: false`, or set `distroless: true` to run no scripts"
    )]
    NoDpkg,
    #[error("cannot run the maintainer scripts: {problem}")]
    Sandbox { problem: String },
    #[error("configuring the packages {status}; its last output:\n{tail}")]
    Scripts { status: ExitStatus, tail: String },
    #[error("dpkg left packages unconfigured: {}", packages.join(", "))]
    Unconfigured { packages: Vec<String> },
}

/// What a sandbox must do to run the maintainer scripts: `argv` with `env` only, in the
/// root `upper`, as root, without network, [`scripts::STAGE`] showing `stage`.
pub struct ScriptRun<'a> {
    pub upper: &'a Path,
    /// A folder beside `upper` for the overlay's own use.
    pub work: &'a Path,
    pub stage: &'a Path,
    pub stage_target: &'static str,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
}

/// Runs it, giving each line of output to the second argument.
pub type RunScripts<'a> = dyn Fn(
        &ScriptRun,
        &mut dyn FnMut(&str),
    ) -> Result<ExitStatus, Box<dyn std::error::Error + Send + Sync>>
    + 'a;

/// One package file of the base.
#[derive(Clone, Debug)]
pub struct PackageFile {
    pub name: String,
    pub path: PathBuf,
    pub digest: Digest,
}

/// Builds the root in `folder` (empty), and gives back the path of the finished root
/// below it. `run` `None`: distroless. Times later than `epoch` (seconds) become
/// `epoch`. Blocking.
pub fn build(
    folder: &Path,
    files: &[PackageFile],
    epoch: i64,
    run: Option<&RunScripts>,
    on_line: &mut dyn FnMut(&str),
) -> Result<PathBuf, BaseError> {
    let io = |source| BaseError::Io {
        path: folder.into(),
        source,
    };
    let [upper, work, stage] = ["upper", "work", "stage"].map(|name| folder.join(name));
    for path in [&upper, &work, &stage] {
        std::fs::create_dir(path).map_err(io)?;
    }
    std::fs::set_permissions(&upper, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(io)?;
    let debs = open_all(files)?;
    let graph = Graph::new(&debs);
    let plan = match run {
        Some(_) => graph.plan(&debs).ok_or(BaseError::NoDpkg)?,
        None => Plan::default(),
    };
    let root = Root::create(&upper).map_err(io)?;
    let unpacked = unpack(&root, &debs, &plan, epoch, run.is_some())?;
    let edit = Edit::open(&upper).map_err(io)?;
    let Some(run) = run else {
        finish_distroless(&edit, &unpacked).map_err(io)?;
        return Ok(upper);
    };
    prepare(&edit, &unpacked).map_err(io)?;
    for index in &plan.staged {
        let path = debs[*index].path();
        let target = stage.join(stage_name(&debs[*index]));
        std::fs::hard_link(path, &target)
            .or_else(|_| std::fs::copy(path, &target).map(drop))
            .map_err(io)?;
    }
    std::fs::write(stage.join("configure"), scripts::script(&plan.steps)).map_err(io)?;
    configure(run, [&upper, &work, &stage], epoch, on_line)?;
    finish(&edit).map_err(io)?.map_or(Ok(upper), Err)
}

fn open_all(files: &[PackageFile]) -> Result<Vec<Deb>, BaseError> {
    let opened = parallel(files.len(), &|index| {
        let file = &files[index];
        let deb = Deb::open(&file.path, &file.digest)?;
        if deb.field("Package") != file.name {
            return Err(BaseError::WrongPackage {
                path: file.path.clone(),
                found: deb.field("Package").into(),
                wanted: file.name.clone(),
            });
        }
        Ok(deb)
    })?;
    Ok(opened)
}

/// `job` for every index, on several threads; results in order, or the first error by
/// index.
fn parallel<T: Send>(
    count: usize,
    job: &(dyn Fn(usize) -> Result<T, BaseError> + Sync),
) -> Result<Vec<T>, BaseError> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<T, BaseError>>>> =
        Mutex::new((0..count).map(|_| None).collect());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let result = job(index);
                    let failed = result.is_err();
                    results.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
                    if failed {
                        next.store(count, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().flatten().collect()
}

/// Who depends on whom among the chosen.
struct Graph {
    depends: Vec<Vec<usize>>,
    pre_depends: Vec<Vec<usize>>,
}

/// How the packages come in and are configured.
#[derive(Default)]
struct Plan {
    /// Configured first; others' scripts rely on them.
    essential: BTreeSet<usize>,
    /// Left to dpkg to unpack, in this order.
    staged: Vec<usize>,
    steps: Vec<Step>,
}

impl Graph {
    fn new(debs: &[Deb]) -> Self {
        let mut names: HashMap<&str, Vec<usize>> = HashMap::new();
        for (index, deb) in debs.iter().enumerate() {
            names.entry(deb.field("Package")).or_default().push(index);
            for provided in relation::parse(deb.field("Provides")).flatten() {
                names.entry(provided.name).or_default().push(index);
            }
        }
        let targets = |field: &str| -> Vec<usize> {
            let all = relation::parse(field).flatten();
            all.flat_map(|r| names.get(r.name).into_iter().flatten().copied())
                .collect()
        };
        let pre_depends: Vec<Vec<usize>> = debs
            .iter()
            .map(|d| targets(d.field("Pre-Depends")))
            .collect();
        let depends = debs
            .iter()
            .zip(&pre_depends)
            .map(|(deb, pre)| [pre.clone(), targets(deb.field("Depends"))].concat())
            .collect();
        Self {
            depends,
            pre_depends,
        }
    }

    fn closure(&self, start: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let mut open: Vec<usize> = start.into_iter().collect();
        while let Some(index) = open.pop() {
            if found.insert(index) {
                open.extend(&self.depends[index]);
            }
        }
        found
    }

    /// `None`: there is no dpkg to configure with.
    fn plan(&self, debs: &[Deb]) -> Option<Plan> {
        let named = |name: &str| debs.iter().position(|d| d.field("Package") == name);
        let dpkg = named("dpkg")?;
        let essential = (0..debs.len()).filter(|i| debs[*i].field("Essential") == "yes");
        let essential = self.closure(essential.chain([dpkg]));
        let order = install_order(debs.len(), |i| self.depends[i].clone());
        let with_preinst = |i: &usize| {
            let preinst = debs[*i].info("preinst").map(String::from_utf8_lossy);
            preinst.is_some_and(|text| !scripts::idle_on_install(&text))
        };
        let (mut first, staged): (Vec<usize>, Vec<usize>) = order
            .iter()
            .copied()
            .filter(with_preinst)
            .partition(|i| essential.contains(i));
        // It makes the users and groups that all others' scripts name.
        first.sort_by_key(|i| debs[*i].field("Package") != "base-passwd");
        let mut steps: Vec<Step> = first
            .iter()
            .map(|i| Step::Preinst {
                package: debs[*i].field("Package").into(),
                arch: debs[*i].field("Architecture").into(),
                info_name: database::info_name(&debs[*i]),
            })
            .collect();
        let names = |set: &BTreeSet<usize>| {
            set.iter()
                .map(|i| debs[*i].field("Package").to_string())
                .collect()
        };
        steps.push(Step::Configure(names(&essential)));
        let mut configured = essential.clone();
        let mut batch: Vec<String> = Vec::new();
        let mut coming: BTreeSet<usize> = staged.iter().copied().collect();
        for index in &staged {
            let mut needed = self.closure(self.pre_depends[*index].iter().copied());
            needed.retain(|i| !configured.contains(i) && i != index);
            if !needed.is_empty() {
                if !batch.is_empty() {
                    steps.push(Step::Unpack(std::mem::take(&mut batch)));
                }
                needed.retain(|i| !coming.contains(i));
                steps.push(Step::Configure(names(&needed)));
                configured.extend(needed);
            }
            batch.push(stage_name(&debs[*index]));
            coming.remove(index);
        }
        if !batch.is_empty() {
            steps.push(Step::Unpack(batch));
        }
        steps.push(Step::ConfigureAll);
        Some(Plan {
            essential,
            staged,
            steps,
        })
    }
}

fn stage_name(deb: &Deb) -> String {
    format!("{}.deb", deb.field("Package"))
}

fn unpack<'d>(
    root: &Root,
    debs: &'d [Deb],
    plan: &Plan,
    epoch: i64,
    configured: bool,
) -> Result<Vec<Unpacked<'d>>, BaseError> {
    let mut wanted: Vec<usize> = (0..debs.len())
        .filter(|i| !plan.staged.contains(i))
        .collect();
    // The longest first, so that no thread ends alone with it.
    wanted.sort_by_key(|i| std::cmp::Reverse(debs[*i].data_size()));
    let mut unpacked = parallel(wanted.len(), &|position| {
        let index = wanted[position];
        let deb = &debs[index];
        let name = deb.field("Package");
        let replaces = relation::parse(deb.field("Replaces")).flatten();
        let holder = Holder {
            // base-files knows best what the common folders are to be like.
            order: if name == "base-files" { 0 } else { index + 1 },
            name: name.into(),
            replaces: replaces.map(|r| r.name.to_string()).collect(),
            conffiles: deb.conffiles(),
            conffile_place: match (configured, plan.essential.contains(&index)) {
                (false, _) => ConffilePlace::Own,
                (true, false) => ConffilePlace::New,
                (true, true) => ConffilePlace::Both,
            },
        };
        let paths = Writer::new(root).package(holder, &mut deb.data()?, epoch)?;
        Ok((index, Unpacked { deb, paths }))
    })?;
    root.finish()?;
    unpacked.sort_by_key(|(index, _)| *index);
    Ok(unpacked.into_iter().map(|(_, unpacked)| unpacked).collect())
}

/// What must be there before the first script runs.
fn prepare(edit: &Edit, unpacked: &[Unpacked]) -> io::Result<()> {
    database::write(edit, unpacked)?;
    for folder in ["dev", "proc", "sys", "run", "tmp", "var/tmp", "root", "etc"] {
        edit.folder(folder, 0o755)?;
    }
    edit.put("usr/sbin/policy-rc.d", scripts::POLICY_RC_D, 0o755)?;
    edit.put_if_missing("etc/hostname", "kiln\n", 0o644)?;
    edit.put_if_missing("etc/resolv.conf", "", 0o644)?;
    edit.put_if_missing("etc/hosts", "127.0.0.1 localhost kiln\n", 0o644)
}

fn configure(
    run: &RunScripts,
    [upper, work, stage]: [&Path; 3],
    epoch: i64,
    on_line: &mut dyn FnMut(&str),
) -> Result<(), BaseError> {
    let request = ScriptRun {
        upper,
        work,
        stage,
        stage_target: scripts::STAGE,
        argv: vec!["/bin/sh".into(), format!("{}/configure", scripts::STAGE)],
        env: scripts::environment(epoch),
    };
    let mut tail = std::collections::VecDeque::with_capacity(TAIL_LINES);
    let status = run(&request, &mut |line| {
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line.to_string());
        on_line(line);
    })
    .map_err(|error| BaseError::Sandbox {
        problem: error.to_string(),
    })?;
    if status.success() {
        return Ok(());
    }
    Err(BaseError::Scripts {
        status,
        tail: Vec::from(tail).join("\n"),
    })
}

fn finish(edit: &Edit) -> io::Result<Option<BaseError>> {
    let status = edit.read("var/lib/dpkg/status")?.unwrap_or_default();
    let packages = database::not_installed(&String::from_utf8_lossy(&status));
    if !packages.is_empty() {
        return Ok(Some(BaseError::Unconfigured { packages }));
    }
    edit.remove(scripts::STAGE)?;
    settings::write(edit)?;
    clean::clean(edit, true)?;
    Ok(None)
}

/// Debian's fixed users that programs without scripts may need (base-passwd), and
/// `nonroot` as distroless images have it.
const PASSWD: &str = "\
root:x:0:0:root:/root:/usr/sbin/nologin
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nonroot:x:65532:65532:nonroot:/home/nonroot:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
";
const GROUP: &str = "\
root:x:0:
daemon:x:1:
adm:x:4:
tty:x:5:
mail:x:8:
www-data:x:33:
shadow:x:42:
utmp:x:43:
staff:x:50:
users:x:100:
nonroot:x:65532:
nogroup:x:65534:
";

fn finish_distroless(edit: &Edit, unpacked: &[Unpacked]) -> io::Result<()> {
    database::write_distroless(edit, unpacked)?;
    for (folder, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("etc", 0o755),
    ] {
        edit.folder(folder, mode)?;
    }
    edit.put_if_missing("etc/passwd", PASSWD, 0o644)?;
    edit.put_if_missing("etc/group", GROUP, 0o644)?;
    // Without it the C library asks DNS before /etc/hosts.
    edit.put_if_missing(
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\n",
        0o644,
    )?;
    for path in ["etc/hostname", "etc/hosts", "etc/resolv.conf"] {
        edit.put_if_missing(path, "", 0o644)?;
    }
    certificates(edit)?;
    clean::clean(edit, false)
}

/// The one file most programs look for, which a script of ca-certificates makes.
fn certificates(edit: &Edit) -> io::Result<()> {
    const SHIPPED: &str = "usr/share/ca-certificates/mozilla";
    let mut bundle = Vec::new();
    for name in edit.names(SHIPPED)? {
        bundle.extend(edit.read(&format!("{SHIPPED}/{name}"))?.unwrap_or_default());
    }
    if bundle.is_empty() {
        return Ok(());
    }
    edit.folder("etc/ssl/certs", 0o755)?;
    edit.put_if_missing(
        "etc/ssl/certs/ca-certificates.crt",
        &String::from_utf8_lossy(&bundle),
        0o644,
    )
}
