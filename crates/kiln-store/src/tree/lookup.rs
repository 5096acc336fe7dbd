use std::collections::VecDeque;

use super::{InodeId, Kind, MAX_LINK_HOPS, MAX_PATH_BYTES, Node, ROOT, Tree};

/// Why a path leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("`{}` does not exist", path.escape_ascii())]
    NotFound { path: Vec<u8> },
    #[error("`{}` leads through something that is not a directory", path.escape_ascii())]
    NotADirectory { path: Vec<u8> },
    #[error("`{}` leads through more than {MAX_LINK_HOPS} symbolic links, or very long ones", path.escape_ascii())]
    TooManyLinks { path: Vec<u8> },
    #[error("`{}` leads to a path of more than {MAX_PATH_BYTES} bytes", path.escape_ascii())]
    TooLong { path: Vec<u8> },
}

/// Most components one lookup goes through, those of links included; a hostile image
/// could otherwise make each of its millions of lookups forty long paths long.
const MAX_STEPS: usize = 4 * super::MAX_DEPTH;

/// How far a path exists.
pub(super) struct Reached {
    /// From below the root down to the last thing there is.
    pub(super) found: Vec<(Box<[u8]>, InodeId)>,
    /// Names after that which there are not.
    pub(super) missing: Vec<Box<[u8]>>,
}

impl Reached {
    pub(super) fn last(&self) -> InodeId {
        self.found.last().map_or(ROOT, |(_, id)| *id)
    }

    fn path(&self) -> Vec<u8> {
        let names: Vec<&[u8]> = self.found.iter().map(|(name, _)| &**name).collect();
        names.join(&b'/')
    }
}

/// One name of the tree.
#[derive(Clone, Debug)]
pub struct WalkItem<'a> {
    /// Relative to the root, without slashes at the ends; empty: the root.
    pub path: Vec<u8>,
    pub inode: InodeId,
    /// How many names the node has.
    pub links: u32,
    pub node: &'a Node,
}

/// Every name, each directory before what is in it, siblings in the order of their
/// bytes.
pub struct Walk<'a> {
    tree: &'a Tree,
    /// What is still to come, the next last.
    stack: Vec<(Vec<u8>, InodeId)>,
}

impl<'a> Iterator for Walk<'a> {
    type Item = WalkItem<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let (path, id) = self.stack.pop()?;
        let inode = self.tree.inode(id);
        for (name, child) in inode.children.iter().rev() {
            self.stack.push((join(&path, name), *child));
        }
        Some(WalkItem {
            path,
            inode: id,
            links: inode.links,
            node: &inode.node,
        })
    }
}

pub(super) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(folder.len() + 1 + name.len());
    path.extend_from_slice(folder);
    if !folder.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

pub(super) fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> + Clone {
    path.split(|b| *b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
}

impl Tree {
    /// Every name of the tree, the root first.
    pub fn walk(&self) -> Walk<'_> {
        Walk {
            tree: self,
            stack: vec![(Vec::new(), ROOT)],
        }
    }

    /// Every name at and below `path` (not followed if it is a symbolic link).
    pub fn walk_from(&self, path: impl AsRef<[u8]>) -> Result<Walk<'_>, LookupError> {
        let (path, id) = self.find(path.as_ref(), false)?;
        Ok(Walk {
            tree: self,
            stack: vec![(path, id)],
        })
    }

    /// The node at `path`. Symbolic links on the way are followed, the last one is not
    /// (as lstat). `None`: there is nothing, or no way to it.
    pub fn get(&self, path: impl AsRef<[u8]>) -> Option<&Node> {
        let id = self.lookup(path.as_ref()).ok()?;
        Some(&self.inode(id).node)
    }

    /// The node at `path` and its path without symbolic links; the last one is
    /// followed too (as stat).
    pub fn resolve(&self, path: impl AsRef<[u8]>) -> Result<(Vec<u8>, &Node), LookupError> {
        let (path, id) = self.find(path.as_ref(), true)?;
        Ok((path, &self.inode(id).node))
    }

    /// What is at `path`, as [`Tree::get`], if it has several names: a number that they
    /// share.
    pub fn other_names(&self, path: impl AsRef<[u8]>) -> Option<InodeId> {
        let id = self.lookup(path.as_ref()).ok()?;
        let inode = self.inode(id);
        (inode.links > 1 && !inode.node.is_dir()).then_some(id)
    }

    /// Names and nodes directly in the directory `path`, in the order of their bytes;
    /// empty for what is no directory.
    pub fn children(
        &self,
        path: impl AsRef<[u8]>,
    ) -> Result<impl Iterator<Item = (&[u8], &Node)>, LookupError> {
        let (_, id) = self.find(path.as_ref(), true)?;
        let children = self.inode(id).children.iter();
        Ok(children.map(|(name, id)| (&**name, &self.inode(*id).node)))
    }

    /// The inode at `path`, the last link not followed.
    pub(super) fn lookup(&self, path: &[u8]) -> Result<InodeId, LookupError> {
        match self.direct(components(path)) {
            Some(id) => Ok(id),
            None => self.find(path, false).map(|(_, id)| id),
        }
    }

    fn find(&self, path: &[u8], follow: bool) -> Result<(Vec<u8>, InodeId), LookupError> {
        let reached = self.reach(path, follow)?;
        if !reached.missing.is_empty() {
            return Err(LookupError::NotFound { path: path.into() });
        }
        Ok((reached.path(), reached.last()))
    }

    /// What is at `path` where neither a link nor `..` is on the way, which is nearly
    /// always; `None`: ask [`Tree::reach`].
    pub(super) fn direct<'p>(&self, names: impl Iterator<Item = &'p [u8]>) -> Option<InodeId> {
        let mut here = ROOT;
        for name in names {
            // Of what is no directory there are no children; `..` is nobody's name.
            here = *self.inode(here).children.get(name)?;
        }
        Some(here)
    }

    /// Follows `path` as far as it exists. Every lookup and every change that [`Tree::direct`]
    /// knows no answer to goes through here.
    pub(super) fn reach(&self, path: &[u8], follow: bool) -> Result<Reached, LookupError> {
        let mut todo: VecDeque<Box<[u8]>> = components(path).map(Into::into).collect();
        let mut reached = Reached {
            found: Vec::new(),
            missing: Vec::new(),
        };
        let (mut hops, mut steps, mut length) = (0, 0, 0);
        while let Some(name) = todo.pop_front() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(LookupError::TooManyLinks { path: path.into() });
            }
            if &*name == b".." {
                let gone = reached.missing.pop();
                let gone = gone.or_else(|| reached.found.pop().map(|(name, _)| name));
                length -= gone.map_or(0, |name| name.len() + 1);
                continue;
            }
            let here = self.inode(reached.last());
            let child = match &here.node.kind {
                _ if !reached.missing.is_empty() => None,
                Kind::Dir => here.children.get(&name),
                _ => return Err(LookupError::NotADirectory { path: path.into() }),
            };
            if let Some(id) = child
                && let Kind::Symlink { target } = &self.inode(*id).node.kind
                && (follow || !todo.is_empty())
            {
                hops += 1;
                if hops > MAX_LINK_HOPS {
                    return Err(LookupError::TooManyLinks { path: path.into() });
                }
                if target.starts_with(b"/") {
                    reached.found.clear();
                    length = 0;
                }
                for name in components(target).rev() {
                    todo.push_front(name.into());
                }
                continue;
            }
            length += name.len() + 1;
            if length > MAX_PATH_BYTES + 1 {
                return Err(LookupError::TooLong { path: path.into() });
            }
            match child {
                Some(id) => reached.found.push((name, *id)),
                None => reached.missing.push(name),
            }
        }
        Ok(reached)
    }
}
