//! `x-kiln.image`: a whole image declared, in place of a Containerfile. What stands below
//! it is a base (any image, as FROM takes it), Debian packages of its own, or nothing.

use std::collections::BTreeMap;

use kiln_model::ServiceName;
use kiln_model::spec::{
    Build, DebianBase, DeclaredContent, DeclaredEntry, DeclaredGroup, DeclaredImage, DeclaredPlace,
    DeclaredUser, ExposedPort, ImageSource, Protocol,
};

use super::{Lowering, text};
use crate::diag::{Code, Diagnostic};
use crate::node::Node;
use crate::span::Span;
use crate::{paths, short, values};

/// What `x-kiln.bases` entries also have.
const PACKAGES: [&str; 5] = ["suite", "packages", "components", "essential", "distroless"];
const OWN: [&str; 15] = [
    "base",
    "platforms",
    "groups",
    "users",
    "folders",
    "files",
    "links",
    "entrypoint",
    "cmd",
    "env",
    "labels",
    "workdir",
    "user",
    "expose",
    "stop_signal",
];
/// Where nobody logs in and nothing is kept.
const HOME: &str = "/nonexistent";
const SHELL: &str = "/usr/sbin/nologin";
/// As Debian's useradd, and what fits into a line of passwd.
const LONGEST_NAME: usize = 32;

/// The name that packages of its own have in kiln.lock.
pub(super) fn base_name(service: &ServiceName) -> String {
    format!("services.{service}.x-kiln.image")
}

impl Lowering<'_> {
    /// A service's image where `x-kiln.image` declares it; also its base, if that is of
    /// packages of its own.
    pub(super) fn declared(&mut self, service: &ServiceName, node: &Node) -> Option<ImageSource> {
        let image = node.at(&["x-kiln", "image"])?;
        let path = base_name(service);
        if let Some(build) = node.get("build") {
            let what = format!("services.{service}: `build` and `x-kiln.image` exclude each other");
            self.diagnostics.push(
                Diagnostic::error(Code::Conflict, image.key, what)
                    .also(build.key, "the other")
                    .hint("both say how the image is made: take one of them out"),
            );
        }
        let (mut declared, own) = self.image(&path, image);
        if let Some(base) = own {
            if self.project.tree.at(&["x-kiln", "bases", &path]).is_some() {
                self.wrong(image.key, format!("x-kiln.bases has a `{path}`, too"));
            }
            self.bases.insert(path.clone(), base);
            declared.base = Some(path.clone());
        }
        let platforms = image.get("platforms").filter(|node| !node.is_null());
        let platforms = platforms.map(|node| self.strings(node, &format!("{path}.platforms")));
        let build = Build {
            platforms: platforms.unwrap_or_default(),
            context: self.project.folder.clone(),
            declared: Some(Box::new(declared)),
            ..Build::default()
        };
        Some(ImageSource::Build {
            build: Box::new(build),
            tag: text(node, "image"),
        })
    }

    fn image(&mut self, path: &str, node: &Node) -> (DeclaredImage, Option<DebianBase>) {
        let mut out = DeclaredImage {
            place: self.place(node.key),
            ..DeclaredImage::default()
        };
        if node.as_map().is_none_or(|map| map.is_empty()) {
            self.wrong(node.span, format!("{path} says nothing of the image"));
            return (out, None);
        }
        let said = |key: &str| node.get(key).filter(|node| !node.is_null());
        let packages = PACKAGES.into_iter().find_map(said);
        if let (Some(base), Some(other)) = (said("base"), packages) {
            let what = format!("{path}: `base` already says what the image stands on");
            self.diagnostics.push(
                Diagnostic::error(Code::Conflict, other.key, what)
                    .also(base.key, "the base")
                    .hint("name the packages in an entry of `x-kiln.bases`, and that as `base`"),
            );
        }
        let own = packages.map(|_| self.packages(path, node));
        let known: Vec<&str> = OWN.into_iter().chain(PACKAGES).collect();
        for (key, value) in self.known(node, path, &known) {
            if !value.is_null() {
                self.image_key(&mut out, &format!("{path}.{key}"), key, value);
            }
        }
        out.entries = self.entries(path, node);
        (out, own)
    }

    /// The part that an entry of `x-kiln.bases` would have.
    fn packages(&mut self, path: &str, node: &Node) -> DebianBase {
        let mut part = node.clone();
        if let Some(map) = part.as_map_mut() {
            map.retain(|key, _| PACKAGES.contains(&key.as_str()));
        }
        self.base(path, &part)
    }

    fn image_key(&mut self, out: &mut DeclaredImage, path: &str, key: &str, value: &Node) {
        match key {
            "base" => out.base = self.string(value, path).filter(|base| !base.is_empty()),
            "groups" => out.groups = self.declared_groups(value, path),
            "users" => out.users = self.declared_users(value, path),
            "entrypoint" => out.entrypoint = self.take(values::command(value), value.span),
            "cmd" => out.cmd = self.take(values::command(value), value.span),
            "env" => out.env = self.assigned(value, path),
            "labels" => out.labels = self.assigned(value, path),
            "workdir" => out.working_dir = self.absolute(value, path),
            "user" => out.user = self.declared_owner(value, path),
            "expose" => out.exposed = self.exposed_ports(value, path),
            "stop_signal" => out.stop_signal = self.string(value, path),
            // What is in the image, and the packages: read for themselves.
            _ => {}
        }
    }

    /// Whatever the order of the keys: files go into folders, links may stand over files.
    fn entries(&mut self, path: &str, node: &Node) -> Vec<DeclaredEntry> {
        let mut found: Vec<(Span, DeclaredEntry)> = vec![];
        for key in ["folders", "files"] {
            let Some(list) = node.get(key).filter(|node| !node.is_null()) else {
                continue;
            };
            let path = format!("{path}.{key}");
            for (at, item) in self.list(list, &path).iter().enumerate() {
                let path = format!("{path}[{at}]");
                let entry = match key {
                    "folders" => self.declared_folder(item, &path),
                    _ => self.declared_file(item, &path),
                };
                found.extend(entry.map(|entry| (item.span, entry)));
            }
        }
        if let Some(links) = node.get("links").filter(|node| !node.is_null()) {
            found.extend(self.declared_links(links, &format!("{path}.links")));
        }
        let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
        for (span, entry) in &found {
            // What goes into a folder has its name from elsewhere.
            if entry.path.ends_with('/') {
                continue;
            }
            if let Some(first) = seen.insert(&entry.path, *span) {
                let what = format!("{path}: {} is declared twice", entry.path);
                self.diagnostics
                    .push(Diagnostic::error(Code::Conflict, *span, what).also(first, "the first"));
            }
        }
        found.into_iter().map(|(_, entry)| entry).collect()
    }

    fn exposed_ports(&mut self, node: &Node, path: &str) -> Vec<ExposedPort> {
        let mut out = vec![];
        for item in self.list(node, path) {
            let said = item.text().unwrap_or_default();
            let (range, protocol) = said.split_once('/').unwrap_or((&said, "tcp"));
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => {
                    self.wrong(
                        item.span,
                        format!("{path}: `{said}` is neither tcp nor udp"),
                    );
                    continue;
                }
            };
            let range = short::port_range(&said, range);
            if let Some((first, last)) = self.take(range, item.span) {
                out.extend((first..=last).map(|port| ExposedPort { port, protocol }));
            }
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// Names with values; one without is an error, as there is no environment to take it
    /// from in an image.
    fn assigned(&mut self, node: &Node, path: &str) -> BTreeMap<String, String> {
        if node.as_map().is_none() && node.as_seq().is_none() {
            let what = format!("{path} must be a mapping or a list, not {}", node.kind());
            self.wrong(node.span, what);
        }
        let pairs = self.take(values::key_values(node), node.span);
        let mut out = BTreeMap::new();
        for (name, value) in pairs.unwrap_or_default() {
            match value {
                Some(value) if !name.is_empty() && !name.contains(['=', '\0']) => {
                    out.insert(name, value);
                }
                Some(_) => self.wrong(node.span, format!("{path}: `{name}` is not a name")),
                None => self.wrong(node.span, format!("{path}: `{name}` has no value")),
            }
        }
        out
    }

    fn declared_groups(&mut self, node: &Node, path: &str) -> Vec<DeclaredGroup> {
        let mut out = vec![];
        for (name, said) in self.named(node, path) {
            let here = format!("{path}.{name}");
            let gid = match said.as_map() {
                None => self.account_number(said, &here),
                Some(_) => {
                    let inner = self.known(said, &here, &["gid"]);
                    let gid = inner.first().map(|(_, gid)| *gid);
                    self.needed(gid, said.key, &here, "gid")
                        .and_then(|gid| self.account_number(gid, &format!("{here}.gid")))
                }
            };
            out.extend(gid.map(|gid| DeclaredGroup {
                name: name.to_owned(),
                gid,
                place: self.place(said.key),
            }));
        }
        out
    }

    fn declared_users(&mut self, node: &Node, path: &str) -> Vec<DeclaredUser> {
        let mut out = vec![];
        for (name, said) in self.named(node, path) {
            let here = format!("{path}.{name}");
            let mut user = DeclaredUser {
                name: name.to_owned(),
                uid: 0,
                group: None,
                groups: vec![],
                home: HOME.into(),
                shell: SHELL.into(),
                place: self.place(said.key),
            };
            if said.as_map().is_none() {
                if let Some(uid) = self.account_number(said, &here) {
                    out.push(DeclaredUser { uid, ..user });
                }
                continue;
            }
            let known = ["uid", "group", "groups", "home", "shell"];
            let mut uid = None;
            for (key, value) in self.known(said, &here, &known) {
                let here = format!("{here}.{key}");
                match key {
                    "uid" => uid = Some(value),
                    "group" => user.group = self.account_name(value, &here),
                    "groups" => {
                        for item in self.list(value, &here) {
                            user.groups.extend(self.account_name(item, &here));
                        }
                    }
                    "home" => user.home = self.passwd_path(value, &here).unwrap_or_default(),
                    _ => user.shell = self.passwd_path(value, &here).unwrap_or_default(),
                }
            }
            let uid = self.needed(uid, said.key, &here, "uid");
            if let Some(uid) = uid.and_then(|n| self.account_number(n, &format!("{here}.uid"))) {
                out.push(DeclaredUser { uid, ..user });
            }
        }
        out
    }

    /// Entries of a mapping by names that users and groups may have.
    fn named<'n>(&mut self, node: &'n Node, path: &str) -> Vec<(&'n str, &'n Node)> {
        let Some(map) = node.as_map() else {
            let what = format!("{path} must be a mapping of names, not {}", node.kind());
            self.wrong(node.span, what);
            return vec![];
        };
        let mut out = vec![];
        for (name, value) in map {
            match is_account_name(name) {
                true => out.push((name.as_str(), value)),
                false => self.wrong(
                    value.key,
                    format!(
                        "{path}: `{name}` is no name: small letters, digits, - and _, at most \
                         {LONGEST_NAME}"
                    ),
                ),
            }
        }
        out
    }

    /// A uid or gid; the last number stands for none.
    fn account_number(&mut self, node: &Node, path: &str) -> Option<u32> {
        let number: u32 = self.number(node, path)?;
        if number == u32::MAX {
            self.wrong(node.span, format!("{path}: {number} is out of range"));
            return None;
        }
        Some(number)
    }

    /// A name, or a number.
    fn account_name(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.string(node, path)?;
        if is_account_name(&text) || text.parse::<u32>().is_ok_and(|n| n != u32::MAX) {
            return Some(text);
        }
        self.wrong(node.span, format!("{path}: `{text}` is no name or number"));
        None
    }

    /// A path that fits into a line of passwd.
    fn passwd_path(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.absolute(node, path)?;
        if text.contains([':', '\n']) {
            let what = format!("{path}: a colon or line's end can't stand in /etc/passwd");
            self.wrong(node.span, what);
            return None;
        }
        Some(text)
    }

    /// `user[:group]`, by names or numbers.
    fn declared_owner(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.string(node, path)?;
        let mut parts = text.split(':');
        let fine = |part: &str| is_account_name(part) || part.parse::<u32>().is_ok();
        let all = parts.clone().count() <= 2 && parts.all(fine);
        if !all {
            let what = format!("{path}: `{text}` is not `user` or `user:group`");
            self.wrong(node.span, what);
            return None;
        }
        Some(text)
    }

    fn declared_folder(&mut self, node: &Node, path: &str) -> Option<DeclaredEntry> {
        if node.as_str().is_some() {
            let folder = self.image_path(node, path)?;
            return Some(self.entry(folder, DeclaredContent::Folder, node.span));
        }
        let said = self.known(node, path, &["path", "owner", "mode"]);
        let target = said.iter().find(|(key, _)| *key == "path");
        let target = self.needed(target.map(|(_, n)| *n), node.span, path, "path")?;
        let folder = self.image_path(target, &format!("{path}.path"))?;
        let entry = self.entry(folder, DeclaredContent::Folder, node.span);
        Some(self.permissions(entry, &said, path))
    }

    fn declared_file(&mut self, node: &Node, path: &str) -> Option<DeclaredEntry> {
        let known = ["source", "content", "target", "owner", "mode"];
        let said = self.known(node, path, &known);
        let find = |wanted: &str| said.iter().find(|(key, _)| *key == wanted).map(|(_, n)| *n);
        let what = match (find("source"), find("content")) {
            (Some(source), None) => {
                let text = self.string(source, &format!("{path}.source"))?;
                if text.is_empty() {
                    self.wrong(source.span, format!("{path}.source is empty"));
                    return None;
                }
                DeclaredContent::Copy(paths::join(&self.project.folder, &text))
            }
            (None, Some(content)) => {
                DeclaredContent::Text(self.string(content, &format!("{path}.content"))?)
            }
            _ => {
                let what = format!("{path} needs exactly one of source, content");
                self.wrong(node.span, what);
                return None;
            }
        };
        let target = self.needed(find("target"), node.span, path, "target")?;
        let here = format!("{path}.target");
        let mut place = self.image_path(target, &here)?;
        // Cleaning a path takes the slash away, which says that it is a folder.
        if target.text().is_some_and(|text| text.ends_with('/')) && place != "/" {
            place.push('/');
        }
        if matches!(what, DeclaredContent::Text(_)) && place.ends_with('/') {
            self.wrong(
                target.span,
                format!("{here}: a content needs a file's name"),
            );
            return None;
        }
        let entry = self.entry(place, what, node.span);
        Some(self.permissions(entry, &said, path))
    }

    /// A mapping: where a link is, and where it leads.
    fn declared_links(&mut self, node: &Node, path: &str) -> Vec<(Span, DeclaredEntry)> {
        let Some(map) = node.as_map() else {
            let what = format!("{path} must be a mapping of links to where they lead");
            self.wrong(node.span, what);
            return vec![];
        };
        let mut out = vec![];
        for (link, target) in map {
            let here = format!("{path}.{link}");
            let name = Node::str(link.clone(), target.key);
            let place = self.image_path(&name, &here);
            let leads = self.string(target, &here);
            let (Some(place), Some(leads)) = (place, leads) else {
                continue;
            };
            if leads.is_empty() || place == "/" {
                self.wrong(
                    target.span,
                    format!("{here}: a link needs a name and a target"),
                );
                continue;
            }
            let entry = self.entry(place, DeclaredContent::Link(leads), target.key);
            out.push((target.key, entry));
        }
        out
    }

    fn entry(&self, path: String, what: DeclaredContent, span: Span) -> DeclaredEntry {
        DeclaredEntry {
            path,
            what,
            owner: None,
            mode: None,
            place: self.place(span),
        }
    }

    fn permissions(
        &mut self,
        mut entry: DeclaredEntry,
        said: &[(&str, &Node)],
        path: &str,
    ) -> DeclaredEntry {
        for (key, value) in said {
            let here = format!("{path}.{key}");
            match *key {
                "owner" => entry.owner = self.declared_owner(value, &here),
                "mode" => {
                    let bits = values::mode(value).and_then(|bits| {
                        u32::try_from(bits)
                            .ok()
                            .filter(|bits| *bits <= 0o7777)
                            .ok_or_else(|| format!("{here}: a mode is 0 to 07777"))
                    });
                    entry.mode = self.take(bits, value.span);
                }
                _ => {}
            }
        }
        entry
    }

    /// An absolute path in the image.
    fn image_path(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.absolute(node, path)?;
        if text.contains('\0') {
            self.wrong(node.span, format!("{path}: no path holds a zero byte"));
            return None;
        }
        Some(text)
    }

    fn needed<'n>(
        &mut self,
        node: Option<&'n Node>,
        span: Span,
        path: &str,
        key: &str,
    ) -> Option<&'n Node> {
        if node.is_none() {
            self.wrong(span, format!("{path}: the key `{key}` is missing"));
        }
        node
    }

    fn place(&self, span: Span) -> DeclaredPlace {
        let Some(place) = self.sources.place(span) else {
            return DeclaredPlace::default();
        };
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let path = place.path.strip_prefix(&self.project.folder);
        DeclaredPlace {
            file: path.unwrap_or(&place.path).display().to_string(),
            line: number(place.line),
            column: number(place.column),
        }
    }
}

/// As Debian's useradd takes it.
fn is_account_name(text: &str) -> bool {
    let first = text.bytes().next();
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
    first.is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
        && text.len() <= LONGEST_NAME
        && text.bytes().all(fine)
}
