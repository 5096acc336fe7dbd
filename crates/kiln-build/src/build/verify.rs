//! Whether a build gives the same image once more: nothing comes from the cache, another
//! folder is worked in, commands have one processor, and the stages take turns, the later
//! ones first.
//!
//! What the sandbox fixes for every RUN (host name, umask, environment) is the same on every
//! machine and is not varied. The clock can't be set for one command alone: it is only later.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead};
use std::time::Duration;

use kiln_model::Digest;
use kiln_store::tree::{Aspect, ChangeKind, Kind, Node, Tree, diff};
use serde::Serialize;

use super::image::Image;
use super::{BuildError, Builder, Prepared};
use crate::exec::{Conditions, ExecError, VERIFY_PREFIX};
use crate::files::{names, shown};
use crate::held::Held;

/// The second build begins in another second: times have that resolution.
const LATER: Duration = Duration::from_millis(1100);
/// So much of two contents is shown where they begin to differ.
const SHOWN: usize = 40;

/// A file that two builds made differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What brought it into the image.
    pub instruction: String,
    pub path: String,
    pub how: String,
}

impl Builder {
    /// Builds again what `first` came of, and compares; empty: bit for bit the same.
    pub async fn verify(
        &self,
        prepared: Prepared,
        images: BTreeMap<String, Digest>,
        first: Digest,
    ) -> Result<Vec<Difference>, BuildError> {
        let builder = self.clone();
        let verify = move || builder.build_again(&prepared, &images, &first);
        tokio::task::spawn_blocking(verify)
            .await
            .map_err(|_| BuildError::Lost)?
    }

    /// The same, on the caller's thread.
    pub fn build_again(
        &self,
        prepared: &Prepared,
        images: &BTreeMap<String, Digest>,
        first: &Digest,
    ) -> Result<Vec<Difference>, BuildError> {
        let name = &prepared.request.name;
        let keep = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: name.clone(),
            cause,
        };
        let _lease = self.store.lease().map_err(|e| keep(Box::new(e)))?;
        let scratch = crate::exec::scratch(&self.cache).map_err(|e| keep(Box::new(e)))?;
        let folder = Held::new(&scratch, VERIFY_PREFIX).map_err(|e| keep(Box::new(e)))?;
        let elsewhere = Builder {
            cache: folder.path().to_owned(),
            ..self.clone()
        };
        std::thread::sleep(LATER);
        let second = elsewhere.carry_out_under(prepared, images, None, Conditions::Other)?;
        if second == *first {
            return Ok(Vec::new());
        }
        let images = (self.image(name, first)?, self.image(name, &second)?);
        let compared = self.compare(&images.0, &images.1);
        compared.map_err(|cause| keep(Box::new(cause)))
    }

    /// Layer by layer, so that each difference is told of the instruction that made it.
    fn compare(&self, a: &Image, b: &Image) -> Result<Vec<Difference>, ExecError> {
        let (mut one, mut two) = (Layers::of(a), Layers::of(b));
        let mut told = BTreeSet::new();
        let mut found = Vec::new();
        // A base's layers may have no history; they are the same in both.
        let base = a.layers.len().saturating_sub(one.made());
        for _ in 0..base {
            one.step(self, true)?;
            two.step(self, true)?;
        }
        for (left, right) in a.document.history.iter().zip(&b.document.history) {
            one.step(self, !left.empty_layer)?;
            two.step(self, !right.empty_layer)?;
            if one.last == two.last {
                continue;
            }
            for change in diff(&one.tree, &two.tree) {
                if told.insert(change.path.clone()) {
                    found.push(Difference {
                        instruction: left.created_by.clone().unwrap_or_default(),
                        path: shown(&names(&change.path)),
                        how: self.how(&change.kind)?,
                    });
                }
            }
        }
        if found.is_empty() {
            found.push(Difference {
                instruction: "the image".into(),
                path: "its configuration".into(),
                how: "differs, and no file does".into(),
            });
        }
        Ok(found)
    }

    fn how(&self, kind: &ChangeKind) -> Result<String, ExecError> {
        let (before, after, what) = match kind {
            ChangeKind::Added(_) => return Ok("is there only the second time".into()),
            ChangeKind::Removed(_) => return Ok("is there only the first time".into()),
            ChangeKind::Modified {
                before,
                after,
                what,
            } => (before, after, what),
        };
        let mut told = Vec::new();
        for aspect in what {
            told.push(match aspect {
                Aspect::Kind => "is of another kind".into(),
                Aspect::Content => self.content(before, after)?,
                Aspect::Mode => format!("mode {:o}, {:o}", before.meta.mode, after.meta.mode),
                Aspect::Owner => {
                    let owner = |n: &Node| format!("{}:{}", n.meta.uid, n.meta.gid);
                    format!("owner {}, {}", owner(before), owner(after))
                }
                Aspect::Xattrs => "extended attributes".into(),
                Aspect::Mtime => {
                    let time = |n: &Node| n.meta.mtime.seconds;
                    format!("time {}, {}", time(before), time(after))
                }
            });
        }
        Ok(told.join("; "))
    }

    /// Where two contents begin to differ.
    fn content(&self, before: &Node, after: &Node) -> Result<String, ExecError> {
        let (Kind::File { digest: a, .. }, Kind::File { digest: b, .. }) =
            (&before.kind, &after.kind)
        else {
            return Ok("what it leads to".into());
        };
        let open = |digest: &Digest| -> Result<_, ExecError> {
            let object = self.store.open_object(digest).map_err(ExecError::store)?;
            Ok(io::BufReader::new(object.ok_or(ExecError::Lost(*digest))?))
        };
        let (one, two) = (open(a)?, open(b)?);
        first_difference(one, two).map_err(ExecError::store)
    }
}

/// `from byte 7: "a…", "b…"`.
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
    image: &'a Image,
    next: usize,
    tree: Tree,
    /// What the last step brought.
    last: Option<Digest>,
}

impl<'a> Layers<'a> {
    fn of(image: &'a Image) -> Self {
        Self {
            image,
            next: 0,
            tree: Tree::new(),
            last: None,
        }
    }

    /// How many layers the history tells of.
    fn made(&self) -> usize {
        let history = self.image.document.history.iter();
        history.filter(|entry| !entry.empty_layer).count()
    }

    fn step(&mut self, builder: &Builder, has_layer: bool) -> Result<(), ExecError> {
        self.last = None;
        let Some(layer) = self.image.layers.get(self.next).filter(|_| has_layer) else {
            return Ok(());
        };
        let tree = builder.store.layer_tree(&self.tree, &layer.digest, None);
        self.tree = tree.map_err(ExecError::store)?;
        self.last = Some(layer.diff_id);
        self.next += 1;
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
}
