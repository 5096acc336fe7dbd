//! Caches that are shared with others, in registries and folders: named by the command beside those of
//! the project, and exported once everything is built.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use kiln_build::build::{BuildRequest, targets};
use kiln_build::secrets::Allowed;
use kiln_build::shared::{Results, Target, rooted};
use kiln_model::ProgressEvent;
use kiln_model::spec::Build;

use super::{Assembler, build_error};
use crate::failure::{Failure, Kind};

/// `--cache-from` and `--cache-to`.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    pub from: Vec<String>,
    pub to: Vec<String>,
    /// Nothing is exported, whatever the project says.
    pub no_export: bool,
}

impl Shares {
    /// The project's entries count from its folder, those of the command from where it is.
    pub(super) fn added_to(&self, mut build: Build, project: &Path) -> Build {
        for entry in build.cache_from.iter_mut().chain(&mut build.cache_to) {
            *entry = rooted(entry, project);
        }
        build.cache_from.extend(self.from.iter().cloned());
        build.cache_to.extend(self.to.iter().cloned());
        if self.no_export {
            build.cache_to.clear();
        }
        build
    }
}

/// Builds whose results go to one place: several services may name the same.
pub(super) type Outgoing = BTreeMap<Target, Vec<(Arc<Results>, Arc<Allowed>)>>;

impl Assembler<'_> {
    /// Remembers where this build's results are to go.
    pub(super) fn to_export(&self, request: &BuildRequest) -> Result<(), Failure> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        for target in targets(&request.build).map_err(build_error)? {
            let results = (request.results.clone(), request.allowed.clone());
            outgoing.entry(target).or_default().push(results);
        }
        Ok(())
    }

    /// Exports what has been built since the last time.
    pub(super) async fn export(&self) -> Result<(), Failure> {
        let outgoing = {
            let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *outgoing)
        };
        for (target, builds) in outgoing {
            let task = format!("export {}", target.place);
            let tell = |text| {
                let task = task.clone();
                self.progress.event(ProgressEvent::Warning { task, text });
            };
            let client = &self.builder.registry;
            let exported = target.export(client, &self.store, &*self.progress, &builds);
            match exported.await {
                Ok(exported) if exported.withheld > 0 => tell(format!(
                    "{} results stay here: secrets were found in them",
                    exported.withheld
                )),
                Ok(_) => {}
                Err(error) if target.forgiving => tell(error.to_string()),
                Err(error) => {
                    let failure = Failure::with_causes(Kind::Build, &error);
                    return Err(failure.hint(
                        "the images are built; with `,ignore-error=true` after this place, kiln \
                         goes on without the export",
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_project_count_from_it_and_those_of_the_command_from_where_it_is() {
        let list = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        let build = Build {
            cache_from: list(&["type=local,src=c", "a/b"]),
            cache_to: list(&["type=local,dest=/d"]),
            ..Build::default()
        };
        let mut shares = Shares {
            from: list(&["type=local,src=e"]),
            to: list(&["type=local,dest=f"]),
            no_export: false,
        };
        let added = shares.added_to(build.clone(), Path::new("/p"));
        let from = ["type=local,src=/p/c", "a/b", "type=local,src=e"];
        assert_eq!(added.cache_from, from);
        assert_eq!(added.cache_to, ["type=local,dest=/d", "type=local,dest=f"]);
        shares.no_export = true;
        let added = shares.added_to(build, Path::new("/p"));
        assert_eq!((added.cache_from.len(), added.cache_to.len()), (3, 0));
    }
}
