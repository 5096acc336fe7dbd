//! Finding a project on a real disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use kiln_compose::Environment;
use kiln_compose::disk::{DiskOptions, load_from_disk, prepare};

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn options(folder: &Path) -> DiskOptions {
    DiskOptions {
        folder: folder.to_owned(),
        ..DiskOptions::default()
    }
}

#[test]
fn files_are_found_above_with_their_override_and_env() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    write(
        root,
        "docker-compose.yml",
        "services: {a: {image: 'x:${TAG}'}}",
    );
    write(
        root,
        "docker-compose.override.yml",
        "services: {a: {hostname: h}}",
    );
    write(root, ".env", "TAG=1\nCOMPOSE_PROFILES=p, q\n");
    write(root, "deep/er/keep", "");
    let prepared = prepare(&options(&root.join("deep/er"))).unwrap();
    assert_eq!(prepared.files.len(), 2);
    assert_eq!(prepared.folder, root);
    assert_eq!(prepared.profiles, ["p", "q"]);
    assert_eq!(prepared.environment["TAG"], "1");
    let loaded = load_from_disk(&options(&root.join("deep/er"))).unwrap();
    let a = &loaded.spec.services["a"];
    assert_eq!(a.names.hostname.as_deref(), Some("h"));
    assert_eq!(
        a.image,
        kiln_model::spec::ImageSource::Reference("x:1".into())
    );
}

#[test]
fn named_files_env_files_and_variables() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    write(root, "one.yaml", "services: {a: {image: 'x:${TAG}-${B}'}}");
    write(root, "sub/two.yaml", "services: {a: {hostname: h}}");
    write(root, ".env", "TAG=wrong\n");
    write(root, "a.env", "TAG=1\nB=1\n");
    write(root, "b.env", "B=2\n");
    let mut said = options(root);
    said.files = vec!["one.yaml".into(), "sub/two.yaml".into()];
    said.env_files = vec!["a.env".into(), "b.env".into()];
    said.environment = Environment::from([("TAG".into(), "env".into())]);
    said.project_name = Some("named".into());
    let loaded = load_from_disk(&said).unwrap();
    assert_eq!(loaded.spec.project.as_str(), "named");
    let image = kiln_model::spec::ImageSource::Reference("x:env-2".into());
    assert_eq!(loaded.spec.services["a"].image, image);
    said.files.clear();
    said.environment
        .insert("COMPOSE_FILE".into(), "one.yaml:sub/two.yaml".into());
    assert_eq!(prepare(&said).unwrap().files.len(), 2);
    // A compose file may be named instead of its folder.
    assert_eq!(
        prepare(&options(&root.join("one.yaml"))).unwrap().folder,
        root
    );
}

#[test]
fn what_is_missing_is_said() {
    let temp = tempfile::tempdir().unwrap();
    let mut said = options(temp.path());
    said.files = vec!["no.yaml".into()];
    let text = load_from_disk(&said).unwrap_err().to_string();
    assert!(text.contains("no.yaml not found"), "{text}");
    said.env_files = vec!["no.env".into()];
    let text = load_from_disk(&said).unwrap_err().to_string();
    assert!(text.contains("no.env"), "{text}");
    write(temp.path(), "big.yaml", &"#".repeat(20 << 20));
    said.env_files.clear();
    said.files = vec!["big.yaml".into()];
    let text = load_from_disk(&said).unwrap_err().to_string();
    assert!(text.contains("more than"), "{text}");
}

#[test]
fn what_is_named_is_not_looked_for_elsewhere() {
    let temp = tempfile::tempdir().unwrap();
    write(temp.path(), "compose.yaml", "services: {a: {image: x}}");
    let told = |said: &DiskOptions| load_from_disk(said).unwrap_err().to_string();
    // There is a file above it, but that is another project.
    let text = told(&options(&temp.path().join("web")));
    assert!(
        text.contains("there is no") && text.contains("/web"),
        "{text}"
    );
    for remote in [
        "https://example.test/c.yaml",
        "oci://example.test/c",
        "git@example.test:a/b",
    ] {
        let mut said = options(temp.path());
        said.files = vec![remote.into()];
        let text = told(&said);
        assert!(
            text.contains(remote) && text.contains("fetches no"),
            "{text}"
        );
    }
}

#[test]
fn env_files_may_be_named_by_a_variable() {
    let temp = tempfile::tempdir().unwrap();
    write(temp.path(), "compose.yaml", "services: {a: {image: x}}");
    for (name, text) in [(".env", "T=0"), ("a.env", "T=1\nA=1"), ("b.env", "T=2")] {
        write(temp.path(), name, text);
    }
    let mut said = options(temp.path());
    let variable = ("COMPOSE_ENV_FILES".into(), "a.env, b.env".into());
    said.environment = Environment::from([variable]);
    let environment = prepare(&said).unwrap().environment;
    assert_eq!((&*environment["T"], &*environment["A"]), ("2", "1"));
    said.env_files = vec!["a.env".into()];
    assert_eq!(prepare(&said).unwrap().environment["T"], "1");
}
