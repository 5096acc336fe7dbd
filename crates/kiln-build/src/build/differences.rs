//! What two images that came of the same instructions differ in: layer by layer, so that each
//! file is told of the instruction that made it, and only once, where it began to differ.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Read};

use kiln_model::Digest;
use kiln_oci::manifest::History;
use kiln_store::Store;
use kiln_store::tree::{Aspect, ChangeKind, Kind, Node, Tree, diff};
use serde::Serialize;

use super::image::{self, Image};
use super::{BuildError, why};
use crate::exec::ExecError;
use crate::files::{names, shown};

/// So much of two contents is shown where they begin to differ.
const SHOWN: usize = 40;
/// Of longer contents only the beginning is looked at for why they differ.
const LOOKED_INTO: u64 = 4 << 20;

/// A file that two builds made differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Where the file has several: what people call it.
    pub stage: Option<String>,
    /// What brought it into the image.
    pub instruction: String,
    pub path: String,
    pub how: String,
    /// What it comes from, where that can be told from the contents.
    pub why: Option<&'static str>,
}

/// One of the two images, and where it is.
pub(super) struct Side<'a> {
    pub store: &'a Store,
    pub image: &'a Image,
}

/// Compares images of two stores, or of one; empty: they are the same.
pub fn differences(
    one: (&Store, &Digest),
    other: (&Store, &Digest),
) -> Result<Vec<Difference>, BuildError> {
    const NAME: &str = "that is compared";
    let images = (
        image::read(one.0, NAME, one.1)?,
        image::read(other.0, NAME, other.1)?,
    );
    let side = |store, image| Side { store, image };
    let found = compare(&side(one.0, &images.0), &side(other.0, &images.1), "");
    found.map_err(|cause| BuildError::Keep {
        name: NAME.into(),
        cause: Box::new(cause),
    })
}

/// `stage`: its name for people; may be empty.
pub(super) fn compare(
    a: &Side<'_>,
    b: &Side<'_>,
    stage: &str,
) -> Result<Vec<Difference>, ExecError> {
    let (mut one, mut two) = (Layers::of(a), Layers::of(b));
    let mut told = BTreeSet::new();
    let mut found = Vec::new();
    // A base's layers may have no history; they are the same in both.
    one.step(one.untold())?;
    two.step(two.untold())?;
    let left = instructions(&a.image.document.history);
    let right = instructions(&b.image.document.history);
    for ((text, count), (_, other)) in left.into_iter().zip(right) {
        one.step(count)?;
        two.step(other)?;
        if one.last == two.last {
            continue;
        }
        for change in diff(&one.tree, &two.tree) {
            if told.insert(change.path.clone()) {
                let (how, why) = told_of(&change.kind, a.store, b.store)?;
                found.push(Difference {
                    stage: Some(stage.trim_end().to_owned()).filter(|name| !name.is_empty()),
                    instruction: text.to_owned(),
                    path: shown(&names(&change.path)),
                    how,
                    why: why.or_else(|| named(&change.kind, &change.path)),
                });
            }
        }
    }
    Ok(found)
}

/// What the configurations and names of two images that have the same files differ in.
pub(super) fn of_configuration() -> Difference {
    Difference {
        stage: None,
        instruction: "the image".into(),
        path: "its configuration".into(),
        how: "differs, and no file does".into(),
        why: None,
    }
}

/// What each instruction says, and how many layers it has made.
fn instructions(history: &[History]) -> Vec<(&str, usize)> {
    let mut all: Vec<(&str, usize)> = Vec::new();
    for entry in history {
        let text = entry.created_by.as_deref().unwrap_or_default();
        let comment = entry.comment.as_deref().unwrap_or_default();
        let more = comment.starts_with("part ") && !comment.starts_with("part 1 ");
        match all.last_mut().filter(|_| more) {
            Some(last) => last.1 += 1,
            None => all.push((text, usize::from(!entry.empty_layer))),
        }
    }
    all
}

fn told_of(
    kind: &ChangeKind,
    one: &Store,
    two: &Store,
) -> Result<(String, Option<&'static str>), ExecError> {
    let (before, after, what) = match kind {
        ChangeKind::Added(_) => return Ok(("is there only the second time".into(), None)),
        ChangeKind::Removed(_) => return Ok(("is there only the first time".into(), None)),
        ChangeKind::Modified {
            before,
            after,
            what,
        } => (before, after, what),
    };
    let mut told = Vec::new();
    let mut why = None;
    for aspect in what {
        told.push(match aspect {
            Aspect::Kind => "is of another kind".into(),
            Aspect::Content => {
                let (how, cause) = content((before, one), (after, two))?;
                why = cause;
                how
            }
            Aspect::Mode => format!("mode {:o}, {:o}", before.meta.mode, after.meta.mode),
            Aspect::Owner => {
                let owner = |n: &Node| format!("{}:{}", n.meta.uid, n.meta.gid);
                format!("owner {}, {}", owner(before), owner(after))
            }
            Aspect::Xattrs => "extended attributes".into(),
            Aspect::Mtime => {
                let time = |n: &Node| n.meta.mtime.seconds;
                why = why.or(Some(why::OWN_TIME));
                format!("time {}, {}", time(before), time(after))
            }
        });
    }
    Ok((told.join("; "), why))
}

/// What a name that is there only once tells.
fn named(kind: &ChangeKind, path: &[u8]) -> Option<&'static str> {
    match kind {
        ChangeKind::Modified { .. } => None,
        ChangeKind::Added(_) | ChangeKind::Removed(_) => why::of_name(path),
    }
}

/// Where two contents begin to differ, and why.
fn content(
    (before, one): (&Node, &Store),
    (after, two): (&Node, &Store),
) -> Result<(String, Option<&'static str>), ExecError> {
    let (Kind::File { digest: a, .. }, Kind::File { digest: b, .. }) = (&before.kind, &after.kind)
    else {
        return Ok(("what it leads to".into(), None));
    };
    let open = |store: &Store, digest: &Digest| -> Result<_, ExecError> {
        let object = store.open_object(digest).map_err(ExecError::store)?;
        Ok(io::BufReader::new(object.ok_or(ExecError::Lost(*digest))?))
    };
    let how = first_difference(open(one, a)?, open(two, b)?).map_err(ExecError::store)?;
    let begin = |store, digest| -> Result<Vec<u8>, ExecError> {
        let mut bytes = Vec::new();
        let mut part = open(store, digest)?.take(LOOKED_INTO);
        part.read_to_end(&mut bytes).map_err(ExecError::store)?;
        Ok(bytes)
    };
    Ok((how, why::of_contents(&begin(one, a)?, &begin(two, b)?)))
}

/// `content from byte 7: "a…", "b…"`.
fn first_difference(one: impl BufRead, two: impl BufRead) -> io::Result<String> {
    let (mut one, mut two) = (one.bytes(), two.bytes());
    let mut at = 0_u64;
    loop {
        let (left, right) = (one.next().transpose()?, two.next().transpose()?);
        if left != right || left.is_none() {
            let rest = |first: Option<u8>, rest: &mut dyn Iterator<Item = io::Result<u8>>| {
                let rest = rest.take(SHOWN).map_while(Result::ok);
                let bytes: Vec<u8> = first.into_iter().chain(rest).take(SHOWN).collect();
                format!("{:?}", String::from_utf8_lossy(&bytes))
            };
            let (left, right) = (rest(left, &mut one), rest(right, &mut two));
            return Ok(format!("content from byte {at}: {left}, {right}"));
        }
        at += 1;
    }
}

/// An image's layers while they are gone through.
struct Layers<'a> {
    side: &'a Side<'a>,
    next: usize,
    tree: Tree,
    /// What the last step brought.
    last: Vec<Digest>,
}

impl<'a> Layers<'a> {
    fn of(side: &'a Side<'a>) -> Self {
        Self {
            side,
            next: 0,
            tree: Tree::new(),
            last: Vec::new(),
        }
    }

    /// How many layers the history does not tell of.
    fn untold(&self) -> usize {
        let history = self.side.image.document.history.iter();
        let told = history.filter(|entry| !entry.empty_layer).count();
        self.side.image.layers.len().saturating_sub(told)
    }

    fn step(&mut self, layers: usize) -> Result<(), ExecError> {
        self.last.clear();
        for layer in self.side.image.layers.iter().skip(self.next).take(layers) {
            let tree = self.side.store.layer_tree(&self.tree, &layer.digest, None);
            self.tree = tree.map_err(ExecError::store)?;
            self.last.push(layer.diff_id);
            self.next += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn contents_are_shown_from_where_they_differ() {
        let told = |a: &str, b: &str| first_difference(a.as_bytes(), b.as_bytes()).unwrap();
        assert_eq!(told("abc", "abd"), "content from byte 2: \"c\", \"d\"");
        assert_eq!(told("abc", "ab"), "content from byte 2: \"c\", \"\"");
        let long = told(&"x".repeat(100), "y");
        assert_eq!(long.matches('x').count(), SHOWN);
    }

    #[test]
    fn an_instruction_has_all_of_its_parts() {
        let entry = |text: &str, comment: Option<&str>, empty_layer| History {
            created: None,
            created_by: Some(text.into()),
            comment: comment.map(str::to_owned),
            author: None,
            empty_layer,
        };
        let history = [
            entry("ENV", None, true),
            entry("RUN a", Some("part 1 of 2"), false),
            entry("RUN a", Some("part 2 of 2"), false),
            entry("RUN a", Some("part 1 of 2"), false),
            entry("RUN a", Some("part 2 of 2"), false),
            entry("RUN b", None, false),
        ];
        assert_eq!(
            instructions(&history),
            [("ENV", 0), ("RUN a", 2), ("RUN a", 2), ("RUN b", 1)]
        );
    }
}
