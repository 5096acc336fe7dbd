//! What configs and secrets hold: read where the project says, and kept.

use std::collections::BTreeMap;

use kiln_model::spec::{FileKind, FileSource, FileVersion, Service};
use kiln_oci::BlobWrite;
use kiln_trust::SecretStore;

use super::{Assembler, input};
use crate::failure::{Failure, Kind, machine};
use crate::named;

/// Largest config, as in Docker Swarm and Kubernetes' order of size.
const LARGEST_CONFIG: u64 = 1 << 20;

impl Assembler<'_> {
    /// Reads and keeps the contents of the service's configs and secrets.
    pub(super) fn files(
        &self,
        service: &Service,
    ) -> Result<BTreeMap<String, FileVersion>, Failure> {
        let mut versions = BTreeMap::new();
        for file in &service.files {
            let version = match file.kind {
                FileKind::Config => {
                    let source = self.spec().configs.get(&file.source);
                    if let Some(FileSource::External(name)) = source {
                        let digest = named::config(&self.store, name)?;
                        versions.insert(file.key(), FileVersion::Config(digest));
                        continue;
                    }
                    let bytes = self.content(&file.source, "config", source)?;
                    let (digest, _) = self
                        .store
                        .write(None, &mut bytes.as_slice())
                        .map_err(machine)?;
                    FileVersion::Config(digest)
                }
                FileKind::Secret => {
                    let value = self.secret_value(&file.source)?;
                    let secrets = SecretStore::open(&self.context.root).map_err(machine)?;
                    FileVersion::Secret(secrets.put(&value).map_err(input)?)
                }
            };
            versions.insert(file.key(), version);
        }
        Ok(versions)
    }

    pub(super) fn secret_value(&self, key: &str) -> Result<zeroize::Zeroizing<Vec<u8>>, Failure> {
        self.content(key, "secret", self.spec().secrets.get(key))
            .map(zeroize::Zeroizing::new)
    }

    fn content(
        &self,
        key: &str,
        what: &str,
        source: Option<&FileSource>,
    ) -> Result<Vec<u8>, Failure> {
        let wrong = |text: String| Failure::new(Kind::Input, format!("{what} `{key}`: {text}"));
        match source {
            None => Err(wrong("it is not declared".into())),
            Some(FileSource::Content(text)) => Ok(text.clone().into_bytes()),
            Some(FileSource::Environment(name)) => self
                .loaded
                .project
                .environment
                .get(name)
                .map(|value| value.clone().into_bytes())
                .ok_or_else(|| wrong(format!("the variable {name} is not set"))),
            Some(FileSource::External(name)) => named::secret(self.context, name),
            Some(FileSource::File(path)) => {
                let size = std::fs::metadata(path)
                    .map_err(|e| wrong(format!("{}: {e}", path.display())))?
                    .len();
                if size > LARGEST_CONFIG {
                    return Err(wrong(format!("{} is larger than 1 MiB", path.display())));
                }
                std::fs::read(path).map_err(|e| wrong(format!("{}: {e}", path.display())))
            }
        }
    }
}
