//! Forgetting an environment that was only made to be thrown away: nothing is left of it but
//! its entries in the audit log. Only one that is down can be forgotten.
//!
//! What goes: releases and their refs, events, the world, and volumes that are its own by
//! name (`<environment>_…`). What must not: volumes that belong to somebody else.

use std::io;
use std::sync::PoisonError;

use kiln_plan::Goal;

use crate::api::error::ApiError;
use crate::engine::Engine;
use crate::shared::{Shared, blocking};

impl Engine {
    pub(crate) async fn forget(&self, by: &str) -> Result<(), ApiError> {
        let world = &self.keeper.world;
        let name = &world.environment;
        let down = world.goal == Goal::Nothing
            && world.rollout.is_none()
            && world.concluding.is_none()
            && world.instances.is_empty();
        if !down {
            return Err(ApiError::conflict(
                format!("`{name}` is not down"),
                "only an environment without instances can be forgotten",
            ));
        }
        let internal = |e: String| ApiError::internal(e);
        let mut volumes = Vec::new();
        for record in self.records()? {
            let release = self.shared.state.release(name, record.number);
            let release = release.map_err(|e| internal(e.to_string()))?;
            let all = release.into_iter().flat_map(|release| release.volumes);
            volumes.extend(all.map(|(_, volume)| volume));
        }
        let own = format!("{name}_");
        volumes.retain(|v| !v.external && v.name.as_str().starts_with(&own));
        let prefix = format!("release/{name}/");
        let (shared, environment) = (self.shared.clone(), name.clone());
        let forgotten = blocking(move || {
            for volume in volumes {
                let folder = shared.root.join("volumes").join(volume.name.as_str());
                match std::fs::remove_dir_all(&folder) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    other => other.map_err(|e| format!("{}: {e}", folder.display()))?,
                }
            }
            forget_refs(&shared, &prefix)?;
            shared.state.forget(&environment).map_err(|e| e.to_string())
        });
        forgotten.await.and_then(|done| done).map_err(internal)?;
        let engines = self.shared.engines.lock();
        engines.unwrap_or_else(PoisonError::into_inner).remove(name);
        self.shared.record(by, "forget", name.as_str(), &[]);
        Ok(())
    }
}

fn forget_refs(shared: &Shared, prefix: &str) -> Result<(), String> {
    let refs = shared.store.refs(prefix).map_err(|e| e.to_string())?;
    for (name, _) in refs {
        shared.store.remove_ref(&name).map_err(|e| e.to_string())?;
    }
    Ok(())
}
