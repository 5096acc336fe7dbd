use std::collections::BTreeMap;

use super::lookup::components;
use super::{
    Inode, InodeId, Kind, LookupError, MAX_DEVICE, MAX_ENTRIES, MAX_FILE_BYTES, MAX_METADATA_BYTES,
    MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_XATTR_VALUE_BYTES, MAX_XATTRS_BYTES, Metadata, Node, ROOT,
    Tree,
};

/// Why something can't be put into a tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeEditError {
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error("`{}` is no path that an image can have: {problem}", path.escape_ascii())]
    Path {
        path: Vec<u8>,
        problem: &'static str,
    },
    #[error("`{}` can't be in an image: {problem}", path.escape_ascii())]
    Node {
        path: Vec<u8>,
        problem: &'static str,
    },
    #[error("`{}` is a hard link to `{}`, which does not exist", path.escape_ascii(), target.escape_ascii())]
    LinkTargetMissing { path: Vec<u8>, target: Vec<u8> },
    #[error("`{}` is a hard link to `{}`, which is a directory", path.escape_ascii(), target.escape_ascii())]
    LinkToDirectory { path: Vec<u8>, target: Vec<u8> },
    #[error("the image has more than the {MAX_ENTRIES} files that are allowed")]
    TooManyEntries,
    #[error(
        "the image's names, links and attributes take more than the {MAX_METADATA_BYTES} bytes that are allowed"
    )]
    TooMuchMetadata,
}

impl Tree {
    /// Puts `node` at `path`. Missing directories on the way are made (0755, root, time
    /// 0) and symbolic links on the way are followed. What was there is replaced, but a
    /// directory put over a directory keeps its content and only gets the metadata.
    pub fn insert(&mut self, path: impl AsRef<[u8]>, node: Node) -> Result<(), TreeEditError> {
        let path = path.as_ref();
        check_path(path)?;
        check_node(path, &node)?;
        if components(path).next().is_none() {
            if !node.is_dir() {
                return Err(problem(path, "the root is always a directory"));
            }
            return self.replace_metadata(ROOT, node.meta);
        }
        let (parent, name) = self.place(path)?;
        if let Some(id) = self.inode(parent).children.get(name).copied()
            && node.is_dir()
            && self.inode(id).node.is_dir()
        {
            return self.replace_metadata(id, node.meta);
        }
        let cost = node_cost(&node.meta, &node.kind);
        self.charge(1, cost + name.len())?;
        self.detach(parent, name);
        let id = self.allocate(node)?;
        let children = &mut self.inodes[parent.index()].children;
        children.insert(name.into(), id);
        Ok(())
    }

    /// Sees to it that `path` leads to a directory (mount points): makes what is missing,
    /// follows links, changes nothing that is there.
    pub fn make_dirs(&mut self, path: impl AsRef<[u8]>) -> Result<(), TreeEditError> {
        let path = path.as_ref();
        check_path(path)?;
        self.directory(path, path).map(drop)
    }

    /// Makes `path` another name of what is at `target` (a hard link). Symbolic links on
    /// the way to either are followed, the last ones are not.
    pub fn link(
        &mut self,
        path: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
    ) -> Result<(), TreeEditError> {
        let (path, target) = (path.as_ref(), target.as_ref());
        check_path(path)?;
        let id = match self.lookup(target) {
            Ok(id) => id,
            Err(LookupError::NotFound { .. }) => {
                return Err(TreeEditError::LinkTargetMissing {
                    path: path.into(),
                    target: target.into(),
                });
            }
            Err(error) => return Err(error.into()),
        };
        if self.inode(id).node.is_dir() {
            return Err(TreeEditError::LinkToDirectory {
                path: path.into(),
                target: target.into(),
            });
        }
        let (parent, name) = self.place(path)?;
        if self.inode(parent).children.get(name) == Some(&id) {
            return Ok(());
        }
        self.charge(1, name.len())?;
        // Counted before the old name goes, which may hold the last way to `id`.
        self.inodes[id.index()].links += 1;
        self.detach(parent, name);
        let children = &mut self.inodes[parent.index()].children;
        children.insert(name.into(), id);
        Ok(())
    }

    /// Takes `path` and all below it away; symbolic links on the way are followed, the
    /// last one is not. Says whether there was anything. The root itself stays, empty.
    pub fn remove(&mut self, path: impl AsRef<[u8]>) -> Result<bool, TreeEditError> {
        let path = path.as_ref();
        check_path(path)?;
        let reached = match self.reach(path, false) {
            Ok(reached) if reached.missing.is_empty() => reached,
            Ok(_) | Err(LookupError::NotADirectory { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let Some(((name, _), parents)) = reached.found.split_last() else {
            let had = !self.is_empty();
            self.clear_children(ROOT);
            return Ok(had);
        };
        let parent = parents.last().map_or(ROOT, |(_, id)| *id);
        self.detach(parent, name);
        Ok(true)
    }

    /// Empties the directory at `path`; nothing happens if there is none.
    pub fn clear(&mut self, path: impl AsRef<[u8]>) -> Result<(), TreeEditError> {
        let path = path.as_ref();
        check_path(path)?;
        match self.reach(path, false) {
            Ok(reached) if reached.missing.is_empty() => self.clear_children(reached.last()),
            Ok(_) | Err(LookupError::NotADirectory { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The directory that is to hold `path`, made where missing, and the last name.
    fn place<'p>(&mut self, path: &'p [u8]) -> Result<(InodeId, &'p [u8]), TreeEditError> {
        let mut parents = components(path);
        let Some(name) = parents.next_back() else {
            return Err(TreeEditError::Path {
                path: path.into(),
                problem: "it is the root",
            });
        };
        let there = self.direct(parents.clone());
        let parent = match there.filter(|id| self.inode(*id).node.is_dir()) {
            // As short as `path`, whose length has been looked at.
            Some(parent) => parent,
            None => self.directory(&parents.collect::<Vec<_>>().join(&b'/'), path)?,
        };
        Ok((parent, name))
    }

    /// The directory at `path`, made where missing, on the way to `target`.
    fn directory(&mut self, path: &[u8], target: &[u8]) -> Result<InodeId, TreeEditError> {
        let reached = self.reach(path, true)?;
        let names = reached.found.iter().map(|(name, _)| name);
        let length: usize = names
            .chain(&reached.missing)
            .map(|name| name.len() + 1)
            .sum();
        let name = components(target).next_back().map_or(0, <[u8]>::len);
        if length + name > MAX_PATH_BYTES {
            let path = target.into();
            return Err(LookupError::TooLong { path }.into());
        }
        let mut parent = reached.last();
        if !self.inode(parent).node.is_dir() {
            let path = target.into();
            return Err(LookupError::NotADirectory { path }.into());
        }
        for missing in reached.missing {
            check_name(target, &missing)?;
            self.charge(1, missing.len())?;
            let id = self.allocate(Node::dir(0o755))?;
            self.inodes[parent.index()].children.insert(missing, id);
            parent = id;
        }
        Ok(parent)
    }

    fn allocate(&mut self, node: Node) -> Result<InodeId, TreeEditError> {
        let inode = Inode {
            node,
            children: BTreeMap::new(),
            links: 1,
        };
        if let Some(id) = self.free.pop() {
            self.inodes[id.index()] = inode;
            return Ok(id);
        }
        let id = u32::try_from(self.inodes.len()).map_err(|_| TreeEditError::TooManyEntries)?;
        self.inodes.push(inode);
        Ok(InodeId(id))
    }

    fn charge(&mut self, entries: usize, bytes: usize) -> Result<(), TreeEditError> {
        if self.entries + entries > MAX_ENTRIES {
            return Err(TreeEditError::TooManyEntries);
        }
        if self.metadata_bytes + bytes > MAX_METADATA_BYTES {
            return Err(TreeEditError::TooMuchMetadata);
        }
        self.entries += entries;
        self.metadata_bytes += bytes;
        Ok(())
    }

    fn replace_metadata(&mut self, id: InodeId, meta: Metadata) -> Result<(), TreeEditError> {
        let before = node_cost(&self.inode(id).node.meta, &Kind::Dir);
        self.metadata_bytes -= before;
        if let Err(error) = self.charge(0, node_cost(&meta, &Kind::Dir)) {
            self.metadata_bytes += before;
            return Err(error);
        }
        self.inodes[id.index()].node.meta = meta;
        Ok(())
    }

    fn clear_children(&mut self, id: InodeId) {
        let children = std::mem::take(&mut self.inodes[id.index()].children);
        for (name, child) in children {
            self.release(&name, child);
        }
    }

    fn detach(&mut self, parent: InodeId, name: &[u8]) {
        if let Some(id) = self.inodes[parent.index()].children.remove(name) {
            self.release(name, id);
        }
    }

    /// One name of `id` is gone; with the last one goes what is below.
    fn release(&mut self, name: &[u8], id: InodeId) {
        let mut gone: Vec<(Box<[u8]>, InodeId)> = vec![(name.into(), id)];
        while let Some((name, id)) = gone.pop() {
            self.entries -= 1;
            self.metadata_bytes -= name.len();
            let inode = &mut self.inodes[id.index()];
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            let node = std::mem::replace(&mut inode.node, Node::dir(0));
            gone.extend(std::mem::take(&mut inode.children));
            self.metadata_bytes -= node_cost(&node.meta, &node.kind);
            self.free.push(id);
        }
    }
}

fn problem(path: &[u8], problem: &'static str) -> TreeEditError {
    TreeEditError::Node {
        path: path.into(),
        problem,
    }
}

fn node_cost(meta: &Metadata, kind: &Kind) -> usize {
    let xattrs: usize = meta.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum();
    match kind {
        Kind::Symlink { target } => xattrs + target.len(),
        _ => xattrs,
    }
}

fn check_path(path: &[u8]) -> Result<(), TreeEditError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(TreeEditError::Path {
            path: path.into(),
            problem: "it is longer than 4095 bytes",
        });
    }
    components(path).try_for_each(|name| check_name(path, name))
}

fn check_name(path: &[u8], name: &[u8]) -> Result<(), TreeEditError> {
    let problem = if name == b".." {
        "it has a `..` component"
    } else if name.contains(&0) {
        "it holds a NUL byte"
    } else if name.len() > MAX_NAME_BYTES {
        "one of its names is longer than 255 bytes"
    } else {
        return Ok(());
    };
    Err(TreeEditError::Path {
        path: path.into(),
        problem,
    })
}

fn check_node(path: &[u8], node: &Node) -> Result<(), TreeEditError> {
    if node.meta.mode > 0o7777 {
        return Err(problem(path, "its mode has more than permission bits"));
    }
    if node.meta.mtime.nanos >= 1_000_000_000 {
        return Err(problem(
            path,
            "its time has a second or more of nanoseconds",
        ));
    }
    check_xattrs(path, &node.meta)?;
    let device = |(major, minor)| major <= MAX_DEVICE.0 && minor <= MAX_DEVICE.1;
    match &node.kind {
        Kind::File { size, .. } if *size > MAX_FILE_BYTES => {
            Err(problem(path, "it is larger than 8 TiB"))
        }
        Kind::Symlink { target } if target.is_empty() || target.contains(&0) => Err(problem(
            path,
            "its link target is empty or holds a NUL byte",
        )),
        Kind::Symlink { target } if target.len() > MAX_PATH_BYTES => {
            Err(problem(path, "its link target is longer than 4095 bytes"))
        }
        Kind::Char { major: 0, minor: 0 } => Err(problem(
            path,
            "the character device 0:0 is overlayfs's mark of a deleted file",
        )),
        Kind::Char { major, minor } | Kind::Block { major, minor } if !device((*major, *minor)) => {
            Err(problem(path, "its device number is more than Linux has"))
        }
        _ => Ok(()),
    }
}

fn check_xattrs(path: &[u8], meta: &Metadata) -> Result<(), TreeEditError> {
    let mut total = 0;
    for (name, value) in &meta.xattrs {
        // Escaping may add the 8 bytes of a second `overlay.`.
        if name.is_empty() || name.len() > MAX_NAME_BYTES - 8 || name.contains(&0) {
            return Err(problem(
                path,
                "the name of an extended attribute is empty, longer than 247 bytes or holds a NUL byte",
            ));
        }
        if value.len() > MAX_XATTR_VALUE_BYTES {
            return Err(problem(
                path,
                "an extended attribute is longer than 65535 bytes",
            ));
        }
        if !is_linux_xattr(name) {
            return Err(problem(
                path,
                "it has an extended attribute outside Linux's namespaces user, trusted, security and system.posix_acl",
            ));
        }
        total += name.len() + value.len() + 16;
    }
    if total > MAX_XATTRS_BYTES {
        return Err(problem(
            path,
            "its extended attributes take more than 128 KiB",
        ));
    }
    Ok(())
}

/// Can a Linux file system hold an attribute of this name?
pub(super) fn is_linux_xattr(name: &[u8]) -> bool {
    let prefixed = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
    prefixed(b"user.")
        || prefixed(b"trusted.")
        || prefixed(b"security.")
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}
