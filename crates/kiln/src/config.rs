//! `config`: prints the project, or a part of it, as `docker compose config` does.

use std::collections::BTreeMap;

use kiln_build::lock::Lock;
use kiln_compose::disk::{DiskOptions, resolve_from_disk};
use kiln_compose::node::Node;
use kiln_compose::template::Variable;
use kiln_compose::{ConfigFormat as Format, Project, Skip, lint, select};
use kiln_model::EnvironmentName;
use kiln_oci::reference::Reference;

use crate::cli::{ConfigArgs, ConfigFormat};
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::project;

/// Columns are at least so wide, with so much between them, as docker compose's are.
const COLUMN: usize = 20;
const GAP: usize = 3;

pub async fn config(context: &Context, args: &ConfigArgs) -> Result<(), Failure> {
    let folder = args.project.project.display();
    if !args.project.project.exists() {
        return Err(
            Failure::new(Kind::Input, format!("there is no {folder}")).hint(format!(
                "services stand behind the project's folder: kiln config . {folder}"
            )),
        );
    }
    let resolved = resolve_from_disk(&options(args)).map_err(|e| project::failure(&e))?;
    project::print_notes(&resolved.notes, &resolved.sources);
    let mut project = resolved.project;
    if args.select.quiet {
        return Ok(());
    }
    if args.resolve_image_digests && !project.raw {
        for (service, image) in pinned(&project)? {
            set_image(&mut project, &service, image);
        }
    }
    let format = match args.format {
        ConfigFormat::Json => Format::Json,
        ConfigFormat::Yaml if context.json => Format::Json,
        ConfigFormat::Yaml => Format::Yaml,
    };
    let selected = selected(args, &project, format)?;
    let whole = selected.is_none();
    let text = selected.unwrap_or_else(|| project.config(format));
    let text = text.trim_end();
    if let Some(path) = &args.output {
        return std::fs::write(path, format!("{text}\n"))
            .map_err(|e| Failure::new(Kind::Input, format!("{}: {e}", path.display())));
    }
    if !text.is_empty() {
        outln!("{text}");
    }
    match whole && format == Format::Yaml && !project.raw {
        true => print_write_sets(context, &project.name).await,
        false => Ok(()),
    }
}

fn options(args: &ConfigArgs) -> DiskOptions {
    let select = &args.select;
    // These are about the whole project, whatever services are named.
    let of_all = select.services
        || select.volumes
        || select.networks
        || select.models
        || select.profiles
        || select.environment
        || select.hash.is_some();
    DiskOptions {
        keep_env_files: args.no_env_resolution,
        services: match of_all {
            true => vec![],
            false => args.only.clone(),
        },
        skip: Skip {
            interpolation: args.no_interpolate || select.variables,
            normalization: args.no_normalize,
            paths: args.no_path_resolution,
            consistency: args.no_consistency,
        },
        ..project::options(&args.project)
    }
}

/// What was asked for instead of the whole model.
fn selected(
    args: &ConfigArgs,
    project: &Project,
    format: Format,
) -> Result<Option<String>, Failure> {
    let select = &args.select;
    let lines = if select.services {
        select::services(project)
    } else if select.images {
        images(args, project)
    } else if select.volumes {
        select::keys(project, "volumes")
    } else if select.networks {
        select::keys(project, "networks")
    } else if select.models {
        select::keys(project, "models")
    } else if select.profiles {
        select::profiles(project).into_iter().collect()
    } else if let Some(services) = &select.hash {
        hashes(project, services)?
    } else if select.environment {
        let variables = project.environment.iter();
        variables
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    } else if select.variables {
        let variables = select::variables(project);
        return match format {
            Format::Json => variables_json(&variables).map(Some),
            Format::Yaml => Ok(Some(variables_table(&variables))),
        };
    } else if select.lock_image_digests {
        return pinned(project).map(|images| Some(lock_override(&images)));
    } else {
        return Ok(None);
    };
    Ok(Some(lines.join("\n")))
}

fn images(args: &ConfigArgs, project: &Project) -> Vec<String> {
    select::images(project)
        .into_iter()
        .filter(|(service, _)| args.only.is_empty() || args.only.contains(service))
        .map(|(_, image)| image)
        .collect()
}

fn hashes(project: &Project, services: &str) -> Result<Vec<String>, Failure> {
    let names: Vec<String> = match services {
        "*" => select::services(project),
        list => list.split(',').map(|name| name.trim().to_owned()).collect(),
    };
    let one = |name: String| match select::hash(project, &name) {
        Some(digest) => Ok(format!("{name} {}", digest.hex())),
        None => Err(
            Failure::new(Kind::Input, format!("there is no service `{name}`"))
                .hint("kiln config --services lists them"),
        ),
    };
    names.into_iter().map(one).collect()
}

fn variables_table(variables: &[Variable]) -> String {
    let head = ["NAME", "REQUIRED", "DEFAULT VALUE", "ALTERNATE VALUE"].map(str::to_owned);
    let rows = variables.iter().map(|v| {
        let required = v.required.to_string();
        [
            v.name.clone(),
            required,
            v.default.clone(),
            v.alternate.clone(),
        ]
    });
    let rows: Vec<[String; 4]> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count() + GAP);
        cells.max().unwrap_or(0).max(COLUMN)
    };
    let widths = [width(0), width(1), width(2)];
    let line = |row: &[String; 4]| {
        let padded: String = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        format!("{padded}{}", row[3])
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// In docker compose's words.
fn variables_json(variables: &[Variable]) -> Result<String, Failure> {
    let map: BTreeMap<&str, serde_json::Value> = variables
        .iter()
        .map(|v| {
            let value = serde_json::json!({
                "Name": v.name, "DefaultValue": v.default,
                "PresenceValue": v.alternate, "Required": v.required,
            });
            (v.name.as_str(), value)
        })
        .collect();
    serde_json::to_string_pretty(&map).map_err(machine)
}

/// Every image that a registry serves, by service, with the digest that kiln.lock pins.
/// Nothing is fetched: what the lock doesn't know is an error.
fn pinned(project: &Project) -> Result<BTreeMap<String, String>, Failure> {
    let wrong = |text: String| Failure::new(Kind::Input, text);
    let lock = Lock::load(&project.folder.join("kiln.lock")).map_err(|e| wrong(e.to_string()))?;
    let mut out = BTreeMap::new();
    for (service, node) in project.services() {
        let Some(image) = node.get("image").and_then(Node::text) else {
            continue;
        };
        if lint::is_built(node) || lint::is_local(project, &image) {
            continue;
        }
        let reference: Reference = image
            .parse()
            .map_err(|e| wrong(format!("services.{service}.image: {e}")))?;
        let reference = reference.with_default_tag();
        if reference.digest().is_some() {
            out.insert(service.to_owned(), reference.to_string());
            continue;
        }
        let Some(digest) = lock.images.get(&reference.to_string()) else {
            return Err(
                wrong(format!("kiln.lock has no digest of {image} ({service})"))
                    .hint("`kiln lock` asks the registry and writes it"),
            );
        };
        out.insert(service.to_owned(), format!("{reference}@{digest}"));
    }
    Ok(out)
}

fn set_image(project: &mut Project, service: &str, image: String) {
    let services = project
        .tree
        .as_map_mut()
        .and_then(|map| map.get_mut("services"));
    let service = services
        .and_then(Node::as_map_mut)
        .and_then(|map| map.get_mut(service));
    if let Some(node) = service
        .and_then(Node::as_map_mut)
        .and_then(|map| map.get_mut("image"))
    {
        *node = Node::str(image, node.span);
    }
}

fn lock_override(images: &BTreeMap<String, String>) -> String {
    let lines = images
        .iter()
        .map(|(service, image)| format!("  {service}:\n    image: {image}"));
    let lines: Vec<String> = std::iter::once("services:".to_owned())
        .chain(lines)
        .collect();
    match images.is_empty() {
        true => "services: {}".into(),
        false => lines.join("\n"),
    }
}

/// What the isolated tests have learned, as comments behind the YAML.
async fn print_write_sets(context: &Context, project: &str) -> Result<(), Failure> {
    let Ok(environment) = project.parse::<EnvironmentName>() else {
        return Ok(());
    };
    // Before the first release, or without a daemon, nothing has been learned yet.
    let Ok(status) = context.client.brief(&environment).await else {
        return Ok(());
    };
    let Some(number) = status.goal else {
        return Ok(());
    };
    let release = context.client.release(&environment, number).await?;
    outln!("# scratch (learned in the isolated test, release {number}):");
    for (name, service) in &release.services {
        let paths: Vec<&str> = service.scratch.iter().map(|s| s.path.as_str()).collect();
        outln!("#   {name}: {}", paths.join(" "));
    }
    Ok(())
}
