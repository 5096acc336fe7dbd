//! What the command gives to registries and takes from them: images, and the results of
//! instructions.

use kiln_model::Digest;
use kiln_oci::manifest::{Document, parse};
use kiln_oci::testing::registry::{Failure, Login, TestRegistry};
use tokio::runtime::Runtime;

use crate::common::{Kiln, Page, Project};

/// A registry that serves as long as its runtime lives.
fn registry() -> (Runtime, TestRegistry) {
    let runtime = Runtime::new().unwrap();
    let registry = runtime.block_on(TestRegistry::start(Login::None));
    (runtime, registry)
}

/// What no two runs of a command give the same of.
const ONCE: &str = "RUN [\"/bin/cp\", \"/proc/sys/kernel/random/uuid\", \"/www/index.html\"]\nCMD";

fn page<'k>(kiln: &'k Kiln, keys: &str) -> Project<'k> {
    let page = Page {
        keys,
        ..Page::default()
    };
    let project = kiln.page("shop", &page);
    project.edit("Containerfile", "CMD", ONCE);
    project
}

/// The digest of the only image that a build tells.
#[track_caller]
fn digest(ran: &str) -> Digest {
    let line = ran.lines().next().unwrap();
    let (_, digest) = line.rsplit_once('@').unwrap();
    digest.parse().unwrap()
}

#[test]
fn a_second_machine_takes_results_from_the_registry_and_runs_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let (_runtime, registry) = registry();
    let cache = format!("{}/shop/web:cache", registry.host());
    let first = page(&kiln, "");
    let built = first.run("build", &["--cache-to", &cache]).ok();
    assert!(registry.manifest("shop/web:cache").is_some());

    let other = kiln.another();
    let second = page(&other, "");
    // As what is fetched is in it, a lock belongs to what is shared.
    std::fs::copy(
        first.folder.join("kiln.lock"),
        second.folder.join("kiln.lock"),
    )
    .unwrap();
    let taken = second.run("build", &["--cache-from", &cache, "--progress", "plain"]);
    let taken = taken.ok().says(&[&cache]);
    assert_eq!(digest(&taken.stdout), digest(&built.stdout), "{taken}");
    // What it has taken, it has.
    let asked = registry.count("GET");
    let again = second.run("build", &[]).ok();
    assert_eq!(digest(&again.stdout), digest(&built.stdout));
    assert_eq!(registry.count("GET"), asked);
    second.up().ok();
    let served = second.page();
    first.up().ok();
    assert_eq!(first.page(), served, "one command's words, on both");

    // Without it, the command runs, and says something else.
    let third = kiln.another();
    let third = page(&third, "");
    std::fs::copy(
        first.folder.join("kiln.lock"),
        third.folder.join("kiln.lock"),
    )
    .unwrap();
    let alone = third.run("build", &[]).ok();
    assert_ne!(digest(&alone.stdout), digest(&built.stdout));

    // A registry that takes nothing fails the command, and the images are there.
    registry.fail("POST /v2/shop/full", 100, refusal());
    let full = format!("{}/shop/full:cache", registry.host());
    let refused = third.run("build", &["--cache-to", &full]);
    refused
        .code(&[4])
        .says(&["shop/full", "the images are built"]);
    let to = format!("type=registry,ref={full},ignore-error=true");
    let told = third.run("build", &["--cache-to", &to]).ok();
    assert_eq!(digest(&told.stdout), digest(&alone.stdout));
}

fn refusal() -> Failure {
    Failure::Status {
        code: 403,
        retry_after: None,
        body: "{\"errors\":[{\"code\":\"DENIED\",\"message\":\"no room for you\"}]}".into(),
    }
}

#[test]
fn an_image_is_pushed_whole_and_runs_on_another_machine() {
    let Some(kiln) = Kiln::new() else { return };
    let (_runtime, registry) = registry();
    let name = format!("{}/shop/web:1", registry.host());
    let project = page(&kiln, &format!("    image: {name}\n"));
    let built = project.run("build", &["--push"]).ok();
    let bytes = registry.manifest("shop/web:1").unwrap();
    assert_eq!(Digest::of(&bytes), digest(&built.stdout));
    let Ok(Document::Manifest(manifest)) = parse(&bytes, None) else {
        panic!("no manifest: {}", String::from_utf8_lossy(&bytes));
    };
    assert!(manifest.layers.len() > 2, "{manifest:?}");
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let there = registry.blob(&blob.digest).unwrap();
        assert_eq!(Digest::of(&there), blob.digest);
    }
    // What is there is not sent again.
    let sent = registry.count("POST");
    project.run("build", &["--push"]).ok();
    assert_eq!(registry.count("POST"), sent);

    let other = kiln.another();
    let compose =
        format!("services:\n  web:\n    image: {name}\n    ports: [\"${{PORT}}:8000\"]\n");
    let pulled = other.project("pulled", &[("compose.yaml", &compose)]);
    pulled.up().ok();
    let lock = std::fs::read_to_string(pulled.folder.join("kiln.lock")).unwrap();
    assert!(lock.contains(&digest(&built.stdout).to_string()), "{lock}");
    project.up().ok();
    assert_eq!(pulled.page(), project.page());

    registry.fail("PUT /v2/shop/web/manifests", 100, refusal());
    project.write("www/more", "x");
    let refused = project.run("build", &["--push"]);
    refused.code(&[4]).says(&["shop/web", "no room for you"]);
    assert_eq!(registry.manifest("shop/web:1"), Some(bytes));
}
