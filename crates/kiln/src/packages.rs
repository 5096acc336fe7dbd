//! `packages`: what an image, or a service that runs, consists of; and what has changed.

use kiln_build::packages::{self, Package, Packages};
use kiln_model::{Digest, ServiceName};
use kiln_store::Store;

use crate::cli::PackagesArgs;
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::output;

/// Fewer digits of a digest could mean any word.
const LEAST_DIGITS: usize = 6;
/// Changes of packages that are shown of one service.
const SHOWN: usize = 40;

pub async fn packages(context: &Context, args: &PackagesArgs) -> Result<(), Failure> {
    let store = context.store()?;
    let manifest = match image(&store, &args.of)? {
        Some(manifest) => manifest,
        None => of_service(context, args).await?,
    };
    let found = of(&store, &manifest)?;
    if context.json {
        return output::json(&found);
    }
    let rows: Vec<Vec<String>> = found.packages.iter().map(row).collect();
    output::table(
        &["TYPE", "NAME", "VERSION", "ARCH", "SOURCE", "FROM"],
        &rows,
    );
    for unread in &found.unread {
        errln!("not read: {}: {}", unread.place, unread.why);
    }
    errln!("{} packages in image {}", rows.len(), manifest.short());
    Ok(())
}

fn row(package: &Package) -> Vec<String> {
    vec![
        package.ecosystem.name().into(),
        package.name.clone(),
        package.version.clone(),
        package.architecture.clone().unwrap_or_default(),
        package.source.clone().unwrap_or_default(),
        package.place.clone(),
    ]
}

/// The record of an image; made now for one that an earlier kiln has built.
fn of(store: &Store, manifest: &Digest) -> Result<Packages, Failure> {
    let fail = |error| Failure::with_causes(Kind::Damage, &error);
    let _lease = store.lease().map_err(machine)?;
    let image = packages::attach(store, manifest).map_err(fail)?;
    let found = packages::of(store, &image).map_err(fail)?;
    found.ok_or_else(|| machine(format!("nothing is known of the image {manifest}")))
}

/// An image by the digest's first digits, as `kiln images` shows them; `None`: there is none.
fn image(store: &Store, text: &str) -> Result<Option<Digest>, Failure> {
    let digits = text.rsplit('@').next().unwrap_or(text);
    let digits = digits.trim_start_matches("sha256:");
    let is_digest = digits.len() >= LEAST_DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_digest {
        return Ok(None);
    }
    let images = store.images().map_err(machine)?;
    let mut fitting = images
        .iter()
        .filter(|i| i.manifest.hex().starts_with(digits));
    match (fitting.next(), fitting.next()) {
        (None, _) => Ok(None),
        (Some(one), None) => Ok(Some(one.manifest)),
        _ => Err(Failure::new(
            Kind::Conflict,
            format!("several images begin with {digits}: write more of it"),
        )),
    }
}

/// The image of a service in the release that serves, or is on its way.
async fn of_service(context: &Context, args: &PackagesArgs) -> Result<Digest, Failure> {
    context.need_daemon().await?;
    let environment = context.environment_at(&args.at).await?;
    let status = context.client.brief(&environment).await?;
    let number = status.serving.or(status.goal);
    let nothing = |what: String| {
        Failure::new(Kind::Conflict, what)
            .hint("name a service that runs, or an image as `kiln images` shows it")
    };
    let Some(number) = number else {
        return Err(nothing(format!("{environment} has no release")));
    };
    let release = context.client.release(&environment, number).await?;
    let service: Option<ServiceName> = args.of.parse().ok();
    let service = service.and_then(|name| release.services.get(&name));
    match service {
        Some(service) => Ok(service.image.digest),
        None => Err(nothing(format!(
            "`{}` is neither an image nor a service of {environment}",
            args.of
        ))),
    }
}

/// What differs between the packages of two images, one line each; nothing of images that
/// are not there any more.
pub fn differences(store: &Store, old: &Digest, new: &Digest) -> Result<Vec<String>, Failure> {
    let record = |manifest| {
        let image = store.image(manifest).map_err(machine)?;
        image.map(|_| of(store, manifest)).transpose()
    };
    let (Some(old), Some(new)) = (record(old)?, record(new)?) else {
        return Ok(Vec::new());
    };
    let mut lines = changes(&old.packages, &new.packages);
    let more = lines.len().saturating_sub(SHOWN);
    lines.truncate(SHOWN);
    if more > 0 {
        lines.push(format!("… and {more} more packages"));
    }
    Ok(lines)
}

/// By type and name: versions that came, went, or took another's place.
fn changes(old: &[Package], new: &[Package]) -> Vec<String> {
    type Versions<'p> = std::collections::BTreeMap<(&'static str, &'p str), Vec<&'p str>>;
    fn versions(packages: &[Package]) -> Versions<'_> {
        let mut versions = Versions::new();
        for package in packages {
            let key = (package.ecosystem.name(), package.name.as_str());
            let all = versions.entry(key).or_default();
            if !all.contains(&package.version.as_str()) {
                all.push(&package.version);
            }
        }
        versions
    }
    let (old, new) = (versions(old), versions(new));
    let mut keys: Vec<_> = old.keys().chain(new.keys()).collect();
    keys.sort();
    keys.dedup();
    let line = |key: &(&str, &str)| {
        let (kind, name) = key;
        match (old.get(key), new.get(key)) {
            (Some(a), Some(b)) if a == b => None,
            (Some(a), Some(b)) => Some(format!(
                "package {kind} {name}: {} → {}",
                a.join(", "),
                b.join(", ")
            )),
            (Some(a), None) => Some(format!("package {kind} {name}: {} is gone", a.join(", "))),
            (None, Some(b)) => Some(format!("package {kind} {name}: {} is new", b.join(", "))),
            (None, None) => None,
        }
    };
    keys.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_build::packages::Ecosystem;

    fn package(name: &str, version: &str) -> Package {
        Package {
            ecosystem: Ecosystem::Deb,
            name: name.into(),
            version: version.into(),
            architecture: None,
            source: None,
            place: "/x".into(),
        }
    }

    #[test]
    fn versions_that_changed_came_and_went_are_told() {
        let old = [package("a", "1"), package("b", "1"), package("c", "1")];
        let new = [package("a", "1"), package("b", "2"), package("d", "1")];
        assert_eq!(
            changes(&old, &new),
            [
                "package deb b: 1 → 2",
                "package deb c: 1 is gone",
                "package deb d: 1 is new",
            ]
        );
        assert_eq!(changes(&old, &old), Vec::<String>::new());
    }
}
