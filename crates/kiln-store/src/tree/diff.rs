use std::cmp::Ordering;
use std::iter::Peekable;

use super::{Node, Tree, Walk, WalkItem};

/// One path that differs between two trees. There may be as many as files: their nodes stay
/// in the trees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change<'t> {
    /// Relative to the root; empty: the root itself.
    pub path: Vec<u8>,
    pub kind: ChangeKind<'t>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeKind<'t> {
    Added(&'t Node),
    Removed(&'t Node),
    Modified {
        before: &'t Node,
        after: &'t Node,
        /// In the order of [`Aspect`], never empty.
        what: Vec<Aspect>,
    },
}

/// What can differ between two nodes at one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// A directory became a file, and the like.
    Kind,
    /// A file's bytes, a link's target, a device's number.
    Content,
    Mode,
    Owner,
    Xattrs,
    Mtime,
}

/// What leads from `a` to `b`, in the order of a walk. Which names are hard links of
/// each other is not compared.
pub fn diff<'t>(a: &'t Tree, b: &'t Tree) -> Vec<Change<'t>> {
    let (mut a, mut b) = (a.walk().peekable(), b.walk().peekable());
    let mut changes = Vec::new();
    loop {
        let (path, kind) = match order(&mut a, &mut b) {
            None => return changes,
            Some(Ordering::Less) => match a.next() {
                Some(item) => (item.path, ChangeKind::Removed(item.node)),
                None => return changes,
            },
            Some(Ordering::Greater) => match b.next() {
                Some(item) => (item.path, ChangeKind::Added(item.node)),
                None => return changes,
            },
            Some(Ordering::Equal) => match (a.next(), b.next()) {
                (Some(before), Some(after)) => match modified(&before, &after) {
                    Some(kind) => (after.path, kind),
                    None => continue,
                },
                _ => return changes,
            },
        };
        changes.push(Change { path, kind });
    }
}

/// Which of two walks is behind. `None`: both have ended.
fn order(a: &mut Peekable<Walk<'_>>, b: &mut Peekable<Walk<'_>>) -> Option<Ordering> {
    match (a.peek(), b.peek()) {
        (None, None) => None,
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        // A walk is ordered by components, not by the bytes of the whole path: `a/b`
        // comes before `a-c`.
        (Some(a), Some(b)) => Some(components(a).cmp(components(b))),
    }
}

fn components<'a>(item: &'a WalkItem<'_>) -> impl Iterator<Item = &'a [u8]> {
    item.path.split(|b| *b == b'/')
}

fn modified<'t>(before: &WalkItem<'t>, after: &WalkItem<'t>) -> Option<ChangeKind<'t>> {
    let (b, a) = (&before.node.meta, &after.node.meta);
    let same_kind =
        std::mem::discriminant(&before.node.kind) == std::mem::discriminant(&after.node.kind);
    let differs = [
        (Aspect::Kind, !same_kind),
        (
            Aspect::Content,
            same_kind && before.node.kind != after.node.kind,
        ),
        (Aspect::Mode, b.mode != a.mode),
        (Aspect::Owner, (b.uid, b.gid) != (a.uid, a.gid)),
        (Aspect::Xattrs, b.xattrs != a.xattrs),
        (Aspect::Mtime, b.mtime != a.mtime),
    ];
    let what: Vec<Aspect> = differs
        .into_iter()
        .filter_map(|(aspect, differs)| differs.then_some(aspect))
        .collect();
    (!what.is_empty()).then_some(ChangeKind::Modified {
        before: before.node,
        after: after.node,
        what,
    })
}

impl std::fmt::Display for Change<'_> {
    /// `~ /etc/hosts (content, mtime)`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.escape_ascii();
        match &self.kind {
            ChangeKind::Added(_) => write!(f, "+ /{path}"),
            ChangeKind::Removed(_) => write!(f, "- /{path}"),
            ChangeKind::Modified { what, .. } => {
                let what: Vec<String> = what
                    .iter()
                    .map(|w| format!("{w:?}").to_lowercase())
                    .collect();
                write!(f, "~ /{path} ({})", what.join(", "))
            }
        }
    }
}
