//! `kiln watch`'s syncs: files of the host put over an image as one more layer, without
//! building it. The same image, paths and contents give the same result; where they are
//! what the image has already, that is the image itself.

use std::collections::BTreeSet;

use kiln_model::{Digest, Hasher};
use kiln_oci::manifest::{History, timestamp};

use super::{BuildError, Builder, now_nanos};
use crate::context::Context;
use crate::context::source::ContextSource;
use crate::copy;
use crate::exec::ExecError;
use crate::exec::layer::Delta;
use crate::files::{self, FilesError, Kind, Meta, Names, Shape, Source, Target};
use crate::rootfs::Rootfs;

/// Some paths below a watched one.
#[derive(Clone, Copy, Debug)]
pub struct Synced<'a> {
    /// What was there when it was last looked at; `None`: nothing.
    pub context: Option<&'a Context>,
    /// Put into the image where they are in `context`, and taken out where they are not.
    pub paths: &'a BTreeSet<Names>,
    /// Where the watched path is in the image.
    pub target: &'a str,
}

impl Builder {
    /// Puts `parts` over the image `base`. `epoch`: seconds.
    pub fn sync(
        &self,
        name: &str,
        base: &Digest,
        parts: &[Synced<'_>],
        epoch: i64,
    ) -> Result<Digest, BuildError> {
        let fail = |cause: ExecError| BuildError::Sync {
            name: name.to_owned(),
            cause,
        };
        let keep = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: name.to_owned(),
            cause,
        };
        let _lease = self.store.lease().map_err(|e| keep(Box::new(e)))?;
        let image = self.image(name, base)?;
        let before = image.files.tree(&self.store).map_err(fail)?;
        let mut target = Rootfs {
            tree: (*before).clone(),
            store: self.store.clone(),
        };
        for part in parts {
            self.lay(&mut target, part, epoch)
                .map_err(|e| fail(e.into()))?;
        }
        let delta = Delta::between(&before, &target.tree);
        let Some(part) = delta.whole() else {
            return Ok(*base);
        };
        let layer = part.write(&self.store, None);
        let (layer, _) = layer.map_err(|e| fail(e.into()))?;
        let mut document = image.document;
        document.diff_ids.push(layer.diff_id);
        document.history.push(History {
            created: Some(timestamp(epoch)),
            created_by: Some("kiln watch: sync".into()),
            comment: None,
            author: None,
            empty_layer: false,
        });
        let mut layers = image.layers;
        layers.push(layer);
        self.keep((document, layers), None).map_err(keep)
    }

    /// A digest of what is at these paths: their names and contents, and no times.
    pub fn digest_of(&self, parts: &[Synced<'_>]) -> Result<Digest, FilesError> {
        let mut hasher = Hasher::new();
        for part in parts {
            hasher.update(&(part.paths.len() as u64).to_le_bytes());
            let source = part.context.map(|context| self.content_of(context));
            for path in part.paths {
                match present(source.as_ref(), path)? {
                    Some((meta, shape)) => files::hash_entry(&mut hasher, path, &meta, &shape),
                    None => hasher.update(b"nothing"),
                }
            }
        }
        Ok(hasher.finish())
    }

    fn content_of(&self, context: &Context) -> ContextSource {
        ContextSource::new(
            context.clone(),
            &self.cache,
            self.store.clone(),
            now_nanos(),
        )
    }

    fn lay(&self, into: &mut Rootfs, part: &Synced<'_>, epoch: i64) -> Result<(), FilesError> {
        let source = part.context.map(|context| self.content_of(context));
        let made = Meta {
            mode: copy::FOLDER_MODE,
            mtime: epoch,
            ..Meta::default()
        };
        let target = files::names(part.target.as_bytes());
        for path in part.paths {
            let full = [target.as_slice(), path].concat();
            // The root is there as it is, whatever happens to the folder out here.
            let Some((name, parent)) = full.split_last() else {
                continue;
            };
            let Some((mut meta, shape)) = present(source.as_ref(), path)? else {
                remove(into, &full)?;
                continue;
            };
            meta.mtime = epoch;
            copy::make_folders(into, parent, &made)?;
            let mut real = files::resolve(into, parent, true)?;
            real.push(name.clone());
            let folder = into.kind(&real) == Some(Kind::Folder);
            if folder != (shape == Shape::Folder) {
                remove(into, &real)?;
            }
            into.put(&real, meta, shape)?;
        }
        if let Some(source) = source
            && let Err(cause) = source.save()
        {
            tracing::debug!(%cause, "the digests of synced files were not remembered");
        }
        Ok(())
    }
}

fn present(
    source: Option<&ContextSource>,
    path: &[Vec<u8>],
) -> Result<Option<(Meta, Shape)>, FilesError> {
    match source {
        Some(source) if source.kind(path).is_some() => source.entry(path).map(Some),
        _ => Ok(None),
    }
}

fn remove(from: &mut Rootfs, path: &[Vec<u8>]) -> Result<(), FilesError> {
    let removed = from.tree.remove(path.join(&b'/'));
    removed.map(drop).map_err(|cause| FilesError::Write {
        path: files::shown(path),
        cause: Box::new(cause),
    })
}
