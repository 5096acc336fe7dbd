//! Behaves as docker does: cases over every instruction and flag, and what docker made of
//! them ([`golden`]), recorded by `cargo xtask goldens`.
//!
//! `KILN_CASES=add/` looks at those whose `set/name` has this only; `KILN_GOLDENS=record` asks docker again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod archive;
mod case;
mod docker;
mod golden;
mod place;
#[path = "../world/mod.rs"]
mod world;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_model::Digest;
use kiln_store::tree::{InodeId, Kind, Tree};

use case::Case;
use golden::{Node, Nodes, content, difference, lines, shown};
use place::{Place, Server};
use world::{World, sandboxes, world};

/// Cases compared at the same time: they wait for their commands, mostly.
const THREADS: usize = 4;

/// Given to every build, as `key`.
pub const SECRET: &[u8] = b"hush";

/// What most cases are built on: everything that their commands need.
const BASE: &str = "\
FROM scratch
COPY busybox /bin/busybox
RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]
COPY <<E /etc/passwd
root:x:0:0::/root:/bin/sh
web:x:33:34::/home/web:/bin/sh
E
COPY <<E /etc/group
root:x:0:
www:x:34:
staff:x:50:web
E
RUN mkdir -m 1777 /tmp && mkdir -m 700 /root && mkdir -p /var/data/sub /usr && \\
    echo one > /var/data/one && echo two > /var/data/sub/two && ln -s data /var/link
";

/// What is built, for both sides.
pub struct Input<'a> {
    pub name: &'a str,
    pub text: String,
    pub context: PathBuf,
    pub dockerfile: Option<PathBuf>,
    pub args: BTreeMap<String, String>,
    pub target: Option<String>,
    pub others: BTreeMap<String, PathBuf>,
}

fn input<'a>(case: &'a Case, place: &Place, url: &str) -> Input<'a> {
    let pair = |part: &case::Part| {
        let (name, value) = part.rest.split_once('=').unwrap();
        (name.to_owned(), value.replace("{url}", url))
    };
    let dockerfile = case.one("dockerfile");
    Input {
        name: &case.name,
        text: case.text.replace("{url}", url),
        context: place.context(),
        dockerfile: dockerfile.map(|part| place.context().join(&part.rest)),
        args: case.all("arg").map(pair).collect(),
        target: case.one("target").map(|part| part.rest.clone()),
        others: place.others.clone(),
    }
}

/// Images that a case needs are built by `build` from the same context, under their names.
fn images(case: &Case, input: &Input<'_>, build: &mut dyn FnMut(&Input<'_>, &str)) {
    for part in case.all("image") {
        let image = Input {
            name: input.name,
            text: part.text(),
            context: input.context.clone(),
            dockerfile: None,
            args: BTreeMap::new(),
            target: None,
            others: BTreeMap::new(),
        };
        build(&image, &part.rest);
    }
}

fn kiln(world: &World, input: &Input<'_>) -> Result<Digest, String> {
    world.build_with(&input.context, &input.text, |request| {
        let build = &mut request.build;
        if input.text.is_empty() {
            build.inline = None;
            build.containerfile.clone_from(&input.dockerfile);
        }
        build.args.clone_from(&input.args);
        build.target.clone_from(&input.target);
        let others = input.others.iter();
        let text = |path: &Path| path.display().to_string();
        build.additional_contexts = others.map(|(n, p)| (n.clone(), text(p))).collect();
    })
}

/// The image's configuration as others read it, and its files.
fn result(world: &World, image: &Digest) -> (serde_json::Value, Nodes) {
    let store = &world.builder.store;
    let stored = store.image(image).unwrap().unwrap();
    let bytes = fs::read(store.blob_path(&stored.config_digest)).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    (document["config"].clone(), nodes(world, &world.tree(image)))
}

fn nodes(world: &World, tree: &Tree) -> Nodes {
    let mut nodes = Nodes::new();
    let mut first: BTreeMap<InodeId, Vec<u8>> = BTreeMap::new();
    for item in tree.walk().skip(1) {
        let meta = &item.node.meta;
        let (kind, rest) = match &item.node.kind {
            Kind::Dir => ('d', String::new()),
            Kind::File { digest, .. } => {
                let object = world.builder.store.object_path(digest);
                ('f', content(&fs::read(object).unwrap()))
            }
            Kind::Symlink { target } => ('l', target.escape_ascii().to_string()),
            Kind::Char { major, minor } => ('c', format!("{major}:{minor}")),
            Kind::Block { major, minor } => ('b', format!("{major}:{minor}")),
            Kind::Fifo => ('p', String::new()),
            Kind::Socket => ('s', String::new()),
        };
        let mut node = Node {
            kind,
            mode: meta.mode,
            owner: (meta.uid.into(), meta.gid.into()),
            rest,
            xattrs: BTreeMap::new(),
        };
        for (name, value) in &meta.xattrs {
            let name = String::from_utf8_lossy(name).into_owned();
            node.xattrs.insert(name, value.clone());
        }
        // The archive that tells of docker's image names every link for itself.
        if item.links > 1 && !matches!(kind, 'd' | 'l') {
            match first.get(&item.inode) {
                Some(first) => {
                    node.kind = 'h';
                    node.rest = shown(first);
                }
                None => drop(first.insert(item.inode, item.path.clone())),
            }
        }
        nodes.insert(item.path, node);
    }
    nodes
}

/// A file of cases, and what is expected of them.
struct Set {
    name: String,
    cases: Vec<Case>,
    goldens: BTreeMap<String, Vec<String>>,
}

impl Set {
    fn wanted(&self) -> impl Iterator<Item = &Case> {
        let part = std::env::var("KILN_CASES").unwrap_or_default();
        let name = move |case: &&Case| format!("{}/{}", self.name, case.name).contains(&part);
        self.cases.iter().filter(name)
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance")
}

fn golden_path(set: &str) -> PathBuf {
    folder().join("goldens").join(format!("{set}.txt"))
}

fn sets() -> Vec<Set> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder().join("cases"))
        .unwrap()
        .map(|item| item.unwrap().path())
        .collect();
    files.sort();
    let set = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let goldens = fs::read_to_string(golden_path(&name)).unwrap_or_default();
        Set {
            cases: case::parse(&fs::read_to_string(path).unwrap()),
            goldens: golden::parse(&goldens),
            name,
        }
    };
    files.into_iter().map(set).collect()
}

fn base_input(context: &Path) -> Input<'static> {
    Input {
        name: "base",
        text: BASE.to_owned(),
        context: context.to_owned(),
        dockerfile: None,
        args: BTreeMap::new(),
        target: None,
        others: BTreeMap::new(),
    }
}

#[test]
fn what_is_built_is_what_docker_makes_of_it() {
    if !sandboxes() {
        return;
    }
    match std::env::var("KILN_GOLDENS").as_deref() {
        Ok("record") => record(),
        _ => compare(),
    }
}

fn record() {
    let server = Server::new();
    let (context, _) = world::busybox();
    let base = docker::build(&base_input(context.path()), "kiln-base");
    let base = base.unwrap().1;
    let mut made = vec!["kiln-base".to_owned()];
    for mut set in sets() {
        let mut results = Vec::new();
        for case in set.wanted() {
            let place = Place::new(case);
            let input = input(case, &place, &server.serve(case));
            images(case, &input, &mut |image, name| {
                docker::build(image, name).unwrap();
                made.push(name.to_owned());
            });
            results.push((case.name.clone(), docker::result(&input, &base)));
        }
        set.goldens.extend(results);
        let mut text = String::new();
        for case in &set.cases {
            let Some(lines) = set.goldens.get(&case.name) else {
                continue;
            };
            writeln!(text, "=== {}\n{}", case.name, lines.join("\n")).unwrap();
        }
        fs::create_dir_all(folder().join("goldens")).unwrap();
        fs::write(golden_path(&set.name), text).unwrap();
    }
    docker::forget(&made);
}

fn compare() {
    let world = world();
    let server = Server::new();
    let (context, _) = world::busybox();
    let built = kiln(&world, &base_input(context.path())).unwrap();
    let base = result(&world, &built).1;
    let images = &world.images;
    images.lock().unwrap().insert("kiln-base".into(), built);
    let sets = sets();
    let all: Vec<_> = sets
        .iter()
        .flat_map(|set| set.wanted().map(move |case| (set, case)))
        .collect();
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(String::new());
    let work = || {
        while let Some((set, case)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let told = match set.goldens.get(&case.name) {
                Some(golden) => judge(&world, &server, case, golden, &base),
                None => "  docker was not asked: cargo xtask goldens\n".to_owned(),
            };
            if !told.is_empty() {
                let wrong = &mut wrong.lock().unwrap();
                writeln!(wrong, "{}/{}:\n{told}", set.name, case.name).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
    println!("{} cases compared", all.len());
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong}");
}

/// What is wrong about a case; empty: nothing.
fn judge(world: &World, server: &Server, case: &Case, golden: &[String], base: &Nodes) -> String {
    let place = Place::new(case);
    let input = input(case, &place, &server.serve(case));
    images(case, &input, &mut |image, name| {
        let built = kiln(world, image).unwrap();
        world.images.lock().unwrap().insert(name.to_owned(), built);
    });
    let differs = case.one("differs");
    let expected = differs.map_or(golden, |part| part.body.as_slice());
    let refusal = expected == ["refused"];
    let mut told = match kiln(world, &input) {
        Ok(image) => {
            let (config, nodes) = result(world, &image);
            difference(expected, &lines(&config, &nodes, base))
        }
        Err(why) if !refusal => format!("  refused: {why}\n"),
        Err(why) => {
            let says = case.one("says").map_or("", |part| part.rest.as_str());
            match why.contains(says) {
                true => String::new(),
                false => format!("  refused, but without `{says}`: {why}\n"),
            }
        }
    };
    if differs.is_some() && expected == golden {
        told.push_str("  is as docker's, though it says that it differs\n");
    }
    told
}
