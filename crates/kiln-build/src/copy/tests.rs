#![allow(clippy::unwrap_used, clippy::panic)]
use std::collections::BTreeMap;

use kiln_model::Digest;

use super::*;

/// Files in memory, by path; contents are kept beside.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    pub entries: BTreeMap<Names, (Meta, Shape)>,
    pub contents: BTreeMap<Digest, Vec<u8>>,
}

impl Memory {
    /// `path` alone: a folder (ends with `/`) or an empty file; `path=text`: a file;
    /// `path->target`: a link.
    pub fn new(lines: &[&str]) -> Self {
        let mut memory = Self::default();
        for line in lines {
            let (path, shape) = if let Some((path, to)) = line.split_once("->") {
                (path, Shape::Link(to.into()))
            } else if let Some(path) = line.strip_suffix('/') {
                (path, Shape::Folder)
            } else {
                let (path, text) = line.split_once('=').unwrap_or((line, ""));
                let digest = Digest::of(text);
                memory.contents.insert(digest, text.into());
                let size = text.len() as u64;
                (path, Shape::File { digest, size })
            };
            let path = files::names(path.as_bytes());
            let made = Changes::default().made();
            make_folders(&mut memory, &path[..path.len() - 1], &made).unwrap();
            let mode = if shape == Shape::Folder { 0o755 } else { 0o644 };
            memory
                .put(
                    &path,
                    Meta {
                        mode,
                        mtime: 77,
                        ..Meta::default()
                    },
                    shape,
                )
                .unwrap();
        }
        memory
    }

    pub fn list(&self) -> Vec<String> {
        self.entries
            .iter()
            .map(|(path, (_, shape))| match shape {
                Shape::Folder => format!("{}/", shown(path)),
                Shape::Link(to) => format!("{}->{}", shown(path), String::from_utf8_lossy(to)),
                Shape::File { digest, .. } => {
                    let text = String::from_utf8_lossy(&self.contents[digest]);
                    format!("{}={text}", shown(path))
                }
                other => format!("{} {other:?}", shown(path)),
            })
            .collect()
    }

    fn meta(&self, path: &str) -> &Meta {
        &self.entries[&files::names(path.as_bytes())].0
    }
}

impl Source for Memory {
    fn kind(&self, path: &[Vec<u8>]) -> Option<Kind> {
        if path.is_empty() {
            return Some(Kind::Folder);
        }
        Some(match &self.entries.get(path)?.1 {
            Shape::Folder => Kind::Folder,
            Shape::File { .. } => Kind::File,
            Shape::Link(to) => Kind::Link(to.clone()),
            _ => Kind::Other,
        })
    }

    fn list(&self, path: &[Vec<u8>]) -> Vec<(Vec<u8>, bool)> {
        let below = |p: &Names| p.len() == path.len() + 1 && p.starts_with(path);
        self.entries
            .iter()
            .filter(|(p, _)| below(p))
            .filter_map(|(p, (_, shape))| Some((p.last()?.clone(), *shape == Shape::Folder)))
            .collect()
    }

    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError> {
        match path {
            [] => Ok((Meta::default(), Shape::Folder)),
            path => Ok(self.entries[path].clone()),
        }
    }
}

impl Target for Memory {
    fn put(&mut self, path: &[Vec<u8>], meta: Meta, shape: Shape) -> Result<(), FilesError> {
        assert_eq!(self.kind(&path[..path.len() - 1]), Some(Kind::Folder));
        if shape != Shape::Folder {
            self.entries.retain(|p, _| !p.starts_with(path));
        }
        let entry = match shape {
            Shape::Same(first) => self.entries[&first].clone(),
            shape => (meta, shape),
        };
        self.entries.insert(path.to_vec(), entry);
        Ok(())
    }

    fn read(&self, path: &[Vec<u8>], _: u64) -> Result<Option<Vec<u8>>, FilesError> {
        Ok(match self.entries.get(path) {
            Some((_, Shape::File { digest, .. })) => Some(self.contents[digest].clone()),
            _ => None,
        })
    }
}

fn copied(
    source: &[&str],
    target: &[&str],
    from: &[&str],
    to: &str,
) -> Result<Vec<String>, String> {
    let source = Memory::new(source);
    let mut target = Memory::new(target);
    target.contents.extend(source.contents.clone());
    for pattern in from {
        let picked =
            pick(&source, pattern, &Patterns::default(), false).map_err(|e| e.to_string())?;
        for picked in picked {
            place(&mut target, &picked, to, &Changes::default()).map_err(|e| e.to_string())?;
        }
    }
    Ok(target.list())
}

const TREE: &[&str] = &[
    "f=1", "d/a=a", "d/s/b=b", "d/l->a", "to->d", "x.py=x", "y.py=y",
];

#[test]
fn a_file_lands_at_a_name_or_in_a_folder() {
    let copied = |target: &[&str], from: &[&str], to| copied(TREE, target, from, to).unwrap();
    assert_eq!(copied(&[], &["f"], "/new"), ["/new=1"]);
    assert_eq!(
        copied(&[], &["f"], "/p/q/new"),
        ["/p/", "/p/q/", "/p/q/new=1"]
    );
    assert_eq!(copied(&[], &["/f"], "/new/"), ["/new/", "/new/f=1"]);
    assert_eq!(copied(&["new/"], &["./f"], "/new"), ["/new/", "/new/f=1"]);
    assert_eq!(copied(&["new=old"], &["../f"], "/new"), ["/new=1"]);
    assert_eq!(
        copied(&["r/", "l->r"], &["f"], "/l"),
        ["/l->r", "/r/", "/r/f=1"]
    );
    assert_eq!(
        copied(&["r/", "l->/r"], &["f"], "/l/n"),
        ["/l->/r", "/r/", "/r/n=1"]
    );
    assert_eq!(copied(&["l->t"], &["f"], "/l"), ["/l->t", "/t=1"]);
    assert_eq!(
        copied(&["l->../../../t"], &["f"], "/l"),
        ["/l->../../../t", "/t=1"]
    );
    assert_eq!(copied(&[], &["f"], "/"), ["/f=1"]);
    assert_eq!(
        copied(&[], &["d/l"], "/n"),
        ["/n=a"],
        "a named link is followed"
    );
}

#[test]
fn a_folder_gives_its_content_and_merges() {
    let all = ["/n/", "/n/a=a", "/n/l->a", "/n/s/", "/n/s/b=b"];
    for to in ["/n", "/n/"] {
        assert_eq!(copied(TREE, &[], &["d"], to).unwrap(), all);
        assert_eq!(
            copied(TREE, &[], &["to"], to).unwrap(),
            all,
            "through a link"
        );
        assert_eq!(copied(TREE, &["n/a=old"], &["d/"], to).unwrap(), all);
    }
    assert_eq!(
        copied(TREE, &["n/keep"], &["d/s"], "/n").unwrap(),
        ["/n/", "/n/b=b", "/n/keep="]
    );
    let fails = |target: &[&str], from: &[&str], to| copied(TREE, target, from, to).unwrap_err();
    assert_eq!(fails(&["n=x"], &["d"], "/n"), "/n is not a folder");
    assert_eq!(
        fails(&["n/a/x"], &["d"], "/n"),
        "/n/a is a folder, a file can't take its place"
    );
    assert_eq!(fails(&["n/s=x"], &["d"], "/n"), "/n/s is not a folder");
    assert_eq!(fails(&[], &["nope"], "/n"), "/nope: not found");
    assert_eq!(fails(&["n=x"], &["f"], "/n/y"), "/n is not a folder");
}

#[test]
fn wildcards_name_many_and_links_in_a_circle_are_refused() {
    assert_eq!(
        copied(TREE, &[], &["*.py"], "/n/").unwrap(),
        ["/n/", "/n/x.py=x", "/n/y.py=y"]
    );
    assert_eq!(
        copied(TREE, &[], &["d/*"], "/n/").unwrap(),
        ["/n/", "/n/a=a", "/n/b=b", "/n/l=a"]
    );
    assert_eq!(
        copied(TREE, &[], &["*/s"], "/n").unwrap(),
        ["/n/", "/n/b=b"]
    );
    assert_eq!(
        copied(TREE, &[], &["no*"], "/n").unwrap(),
        Vec::<String>::new()
    );
    assert!(
        copied(&["a->b", "b->a"], &[], &["a"], "/n")
            .unwrap_err()
            .contains("links follow")
    );
}

#[test]
fn parents_and_exclude_select_within_the_source() {
    let source = Memory::new(&["a/b/x.txt=1", "a/b/y.md=2", "a/c/z.md=3", "top=4"]);
    let run = |pattern: &str, exclude: &[&str], parents| {
        let exclude = Patterns::new(exclude.iter().copied()).unwrap();
        let mut target = Memory {
            contents: source.contents.clone(),
            ..Memory::default()
        };
        for picked in pick(&source, pattern, &exclude, parents).unwrap() {
            place(&mut target, &picked, "/n/", &Changes::default()).unwrap();
        }
        target.list().join(" ")
    };
    assert_eq!(
        run("a/b/x.txt", &[], true),
        "/n/ /n/a/ /n/a/b/ /n/a/b/x.txt=1"
    );
    assert_eq!(run("a/./*/z.md", &[], true), "/n/ /n/c/ /n/c/z.md=3");
    assert_eq!(
        run("a", &["**/*.md"], false),
        "/n/ /n/b/ /n/b/x.txt=1 /n/c/"
    );
    assert_eq!(run("a", &["*", "!b/y.md"], false), "/n/ /n/b/ /n/b/y.md=2");
    assert_eq!(
        run("t*", &["top"], false),
        "/n/ /n/top=4",
        "as docker has it"
    );
    assert!(pick(&source, "a/nope", &Patterns::default(), true).is_err());
}

#[test]
fn owner_mode_and_time_change_on_the_way() {
    let source = Memory::new(TREE);
    let mut target = Memory::default();
    let changes = Changes {
        owner: Some(Owner { uid: 3, gid: 4 }),
        mode: Some(mode::parse("0750").unwrap()),
        mtime: Some(0),
        made: 0,
    };
    for picked in pick(&source, "d", &Patterns::default(), false).unwrap() {
        place(&mut target, &picked, "/p/q", &changes).unwrap();
    }
    for path in ["p", "p/q", "p/q/a", "p/q/s"] {
        let meta = target.meta(path);
        assert_eq!(
            (meta.mode, meta.uid, meta.gid, meta.mtime),
            (0o750, 3, 4, 0),
            "{path}"
        );
    }
    assert_eq!(
        target.meta("p/q/l").mode,
        0o644,
        "links have no mode of their own"
    );
    let hash = |picked: &[Picked]| {
        let mut hasher = Hasher::new();
        picked.iter().for_each(|p| p.hash_into(&mut hasher));
        hasher.finish()
    };
    let first = pick(&source, "d", &Patterns::default(), false).unwrap();
    let mut other = source.clone();
    other.entries.get_mut(&files::names(b"d/a")).unwrap().0.mode = 0o600;
    assert_ne!(
        hash(&first),
        hash(&pick(&other, "d", &Patterns::default(), false).unwrap())
    );
}

fn tar(build: impl Fn(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    build(&mut builder);
    builder.into_inner().unwrap()
}

fn add(
    builder: &mut tar::Builder<Vec<u8>>,
    name: &str,
    kind: tar::EntryType,
    link: &str,
    text: &str,
) {
    let mut header = tar::Header::new_gnu();
    // The builder refuses `..`, a bad archive doesn't.
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_size(text.len() as u64);
    header.set_mode(0o640);
    header.set_mtime(9);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    builder.append(&header, text.as_bytes()).unwrap();
}

fn unpacked(bytes: &[u8], target: &mut Memory) -> Result<bool, String> {
    let contents = &mut target.contents;
    let mut sink = |reader: &mut dyn std::io::Read, _| {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        let digest = Digest::of(&bytes);
        let size = bytes.len() as u64;
        contents.insert(digest, bytes);
        Ok((digest, size))
    };
    match archive::read(bytes, &mut sink).map_err(|e| e.to_string())? {
        None => Ok(false),
        Some(items) => archive::place(target, &items, "/n", &Changes::default())
            .map(|()| true)
            .map_err(|e| e.to_string()),
    }
}

#[test]
fn archives_unpack_whatever_compresses_them() {
    use std::io::Write;
    use tar::EntryType::{Link, Regular, Symlink};
    let plain = tar(|b| {
        add(b, "./a/f", Regular, "", "text");
        add(b, "a/hard", Link, "a/f", "");
        add(b, "a/soft", Symlink, "/etc/x", "");
    });
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&plain).unwrap();
    let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
    for bytes in [plain, gzip.finish().unwrap(), xz.finish().unwrap(), zstd] {
        let mut target = Memory::new(&["n/a=old"]);
        // A file in a folder's place is in the way of what is below it.
        assert_eq!(
            unpacked(&bytes, &mut target),
            Err("/n/a is not a folder".into())
        );
        let mut target = Memory::new(&["n/a/keep"]);
        assert!(unpacked(&bytes, &mut target).unwrap());
        let expected = [
            "/n/",
            "/n/a/",
            "/n/a/f=text",
            "/n/a/hard=text",
            "/n/a/keep=",
            "/n/a/soft->/etc/x",
        ];
        assert_eq!(target.list(), expected);
        assert_eq!(target.meta("n/a/f").mtime, 9);
    }
    assert_eq!(
        unpacked(b"no archive at all", &mut Memory::default()),
        Ok(false)
    );
    assert_eq!(unpacked(b"", &mut Memory::default()), Ok(false));
    let bzip2 = b"BZh91AY&SY........";
    assert_eq!(unpacked(bzip2, &mut Memory::default()), Ok(false));
}

#[test]
fn archives_never_leave_their_folder() {
    use tar::EntryType::{Link, Regular, Symlink};
    for (name, kind, link) in [
        ("../x", Regular, ""),
        ("a/../../x", Regular, ""),
        ("l", Link, "../../etc/passwd"),
        ("l", Link, "missing"),
    ] {
        let bytes = tar(|b| add(b, name, kind, link, ""));
        assert!(
            unpacked(&bytes, &mut Memory::default()).is_err(),
            "{name} {link}"
        );
    }
    let bytes = tar(|b| {
        add(b, "l", Symlink, "../../../../out", "");
        add(b, "l/f", Regular, "", "x");
        add(b, "/abs", Regular, "", "y");
    });
    let mut target = Memory::new(&["out/"]);
    let told = unpacked(&bytes, &mut target).unwrap_err();
    assert!(
        told.contains("leads to /out, out of the destination"),
        "{told}"
    );
    let bytes = tar(|b| {
        add(b, "in/l", Symlink, "../to", "");
        add(b, "in/l/f", Regular, "", "x");
        add(b, "/abs", Regular, "", "y");
    });
    let mut target = Memory::default();
    assert!(unpacked(&bytes, &mut target).unwrap());
    let expected = [
        "/n/",
        "/n/abs=y",
        "/n/in/",
        "/n/in/l->../to",
        "/n/to/",
        "/n/to/f=x",
    ];
    assert_eq!(target.list(), expected);
}

#[test]
fn an_archive_may_leave_owner_and_time_empty() {
    let mut header = tar::Header::new_ustar();
    header.set_path("package/x").unwrap();
    header.set_size(1);
    header.set_mode(0o644);
    header.as_old_mut().uid = [0; 8];
    header.as_old_mut().gid = [b' '; 8];
    header.as_old_mut().mtime = [0; 12];
    header.set_cksum();
    let bytes = tar(|b| b.append(&header, &b"x"[..]).unwrap());
    let mut target = Memory::default();
    assert!(unpacked(&bytes, &mut target).unwrap());
    assert_eq!(target.list(), ["/n/", "/n/package/", "/n/package/x=x"]);
    // What stands there must be a number.
    header.as_old_mut().uid = *b"someone\0";
    header.set_cksum();
    let bytes = tar(|b| b.append(&header, &b"x"[..]).unwrap());
    let told = unpacked(&bytes, &mut Memory::default()).unwrap_err();
    assert!(told.contains("can't be read"), "{told}");
}

#[test]
fn an_archive_may_not_fill_the_memory_with_headers() {
    let extended = |bytes: usize| {
        tar(|b| {
            add(b, "first", tar::EntryType::Regular, "", "x");
            let value = vec![b'v'; bytes];
            let pair = [("SCHILY.xattr.user.x", value.as_slice())];
            b.append_pax_extensions(pair).unwrap();
            add(b, "second", tar::EntryType::Regular, "", "y");
        })
    };
    assert_eq!(
        unpacked(&extended(1 << 16), &mut Memory::default()),
        Ok(true)
    );
    let told = unpacked(&extended(2 << 20), &mut Memory::default()).unwrap_err();
    assert!(told.contains("can't be read"), "{told}");
    // What is stated counts before it is read.
    let mut header = tar::Header::new_gnu();
    header.set_path("huge").unwrap();
    header.set_size(65 << 30);
    header.set_cksum();
    let mut bytes = extended(1);
    bytes.truncate(1024);
    bytes.extend(header.as_bytes());
    let told = unpacked(&bytes, &mut Memory::default()).unwrap_err();
    assert!(told.contains("larger than"), "{told}");
}
