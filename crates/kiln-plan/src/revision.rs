//! The revisions of a release's services: what an instance is made of, and the instances
//! it can't outlive.

use std::collections::BTreeMap;

use kiln_model::release::Release;
use kiln_model::{Digest, ServiceName};

use crate::service::joins;

type Revisions = BTreeMap<ServiceName, Digest>;

/// A service that is to be replaced with another (`depends_on.restart`), or shares its
/// namespaces, has that one's revision in its own.
///
/// # Errors
/// When a service can't be serialised.
pub(crate) fn of(release: &Release) -> Result<Revisions, serde_json::Error> {
    let mut own = Revisions::new();
    for (name, service) in &release.services {
        own.insert(name.clone(), service.revision()?);
    }
    let mut done = Revisions::new();
    for name in release.services.keys() {
        fold(release, name, &own, &mut done, &mut Vec::new())?;
    }
    Ok(done)
}

/// `above`: who is asking. Circles are refused in compose files; here they end.
fn fold<'r>(
    release: &'r Release,
    name: &'r ServiceName,
    own: &Revisions,
    done: &mut Revisions,
    above: &mut Vec<&'r ServiceName>,
) -> Result<Option<Digest>, serde_json::Error> {
    if let Some(known) = done.get(name) {
        return Ok(Some(*known));
    }
    let (Some(released), Some(mine)) = (release.services.get(name), own.get(name)) else {
        return Ok(None);
    };
    if above.contains(&name) {
        return Ok(Some(*mine));
    }
    above.push(name);
    let mut others = Revisions::new();
    for other in replaced_with(&released.service) {
        if let Some(revision) = fold(release, other, own, done, above)? {
            others.insert(other.clone(), revision);
        }
    }
    above.pop();
    let revision = match others.is_empty() {
        true => *mine,
        false => Digest::of_json(&(mine, others))?,
    };
    done.insert(name.clone(), revision);
    Ok(Some(revision))
}

/// The services whose replacement takes this one with it.
pub(crate) fn replaced_with(
    service: &kiln_model::spec::Service,
) -> impl Iterator<Item = &ServiceName> {
    let restart = service.depends_on.iter().filter(|(_, how)| how.restart);
    restart.map(|(name, _)| name).chain(joins(service))
}
