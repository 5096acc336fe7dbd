//! Results of instructions that other machines take from a registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kiln_build::build::{prepare, targets};
use kiln_build::shared::{Exported, Results};
use kiln_model::Digest;
use kiln_model::ProgressEvent;
use kiln_model::progress::{Finish, Silent};
use kiln_oci::testing::registry::{Failure, Login, TestRegistry};
use world::{World, chain, context, world};

/// Two stages of which only one's file is in the image.
const FILE: &str = "FROM scratch AS tools\nCOPY a /a\nCOPY b /b\n\
                    FROM scratch\nCOPY c /c\nCOPY --from=tools /a /taken\n";

fn files() -> tempfile::TempDir {
    context(&[("a", "one"), ("b", "two"), ("c", "three")])
}

/// Builds with these caches of others; gives what it came to, too.
async fn build(world: &World, folder: &Path, file: &str, from: &[&str]) -> (Digest, Arc<Results>) {
    let mut request = world.request(folder, file);
    request.build.cache_from = from.iter().map(|text| (*text).to_owned()).collect();
    let results = request.results.clone();
    let prepared = prepare(request).unwrap();
    let built = world.builder.build(prepared, BTreeMap::new()).await;
    (built.map_err(|e| chain(&e)).unwrap(), results)
}

async fn export(world: &World, results: Arc<Results>, to: &str) -> Result<Exported, String> {
    let mut request = world.request(Path::new("/"), FILE);
    request.build.cache_to = vec![to.to_owned()];
    let target = targets(&request.build).unwrap().remove(0);
    let (client, store) = (&world.builder.registry, &world.builder.store);
    let builds = [(results, Arc::default())];
    let exported = target.export(client, store, &Silent, &builds).await;
    exported.map_err(|e| chain(&e))
}

/// Steps from a cache, those carried out, the caches they were taken from, and warnings.
fn seen(world: &World) -> (usize, usize, Vec<String>, Vec<String>) {
    let (mut cached, mut done) = (0, 0);
    let (mut from, mut told) = (Vec::new(), Vec::new());
    for event in world.seen.take() {
        match event {
            ProgressEvent::Finished {
                how: Finish::Cached,
                ..
            } => cached += 1,
            ProgressEvent::Finished {
                how: Finish::Done, ..
            } => done += 1,
            ProgressEvent::Taken { from: cache, .. } => from.push(cache),
            ProgressEvent::Warning { text, .. } => told.push(text),
            _ => {}
        }
    }
    (cached, done, from, told)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_root_builds_everything_from_the_cache() {
    let registry = TestRegistry::start(Login::None).await;
    let cache = format!("{}/team/app:cache", registry.host());
    let (one, folder) = (world(), files());
    let (first, results) = build(&one, folder.path(), FILE, &[]).await;
    let to = format!("type=registry,ref={cache},mode=max");
    let exported = export(&one, results, &to).await.unwrap();
    assert_eq!((exported.steps, exported.withheld), (4, 0));

    // An ordinary manifest: a configuration of kiln's own, and every layer once.
    let bytes = registry.manifest("team/app:cache").unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(manifest["artifactType"], manifest["config"]["mediaType"]);
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 4);

    let two = world();
    let (second, _) = build(&two, folder.path(), FILE, &[&cache]).await;
    assert_eq!(second, first);
    assert_eq!(seen(&two), (4, 0, vec![cache.clone(); 4], vec![]));
    assert_eq!(two.text(&second, "taken"), "one");
    // Its own cache has it all now.
    let asked = registry.count("GET");
    build(&two, folder.path(), FILE, &[]).await;
    assert_eq!(seen(&two), (4, 0, vec![], vec![]));
    assert_eq!(registry.count("GET"), asked);

    // What has changed is made, and only what is needed is moved.
    let three = world();
    std::fs::write(folder.path().join("b"), "other").unwrap();
    let layers = registry.count("GET /v2/team/app/blobs");
    build(&three, folder.path(), FILE, &[&cache]).await;
    let (cached, done, from, told) = seen(&three);
    assert_eq!((cached, done, from.len(), told.len()), (3, 1, 3, 0));
    // The configuration and three layers.
    assert_eq!(registry.count("GET /v2/team/app/blobs") - layers, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_a_cache_as_a_registry_is() {
    let kept = tempfile::tempdir().unwrap();
    let cache = kept.path().join("new/cache").display().to_string();
    let (one, folder) = (world(), files());
    let (first, results) = build(&one, folder.path(), FILE, &[]).await;
    let to = format!("type=local,dest={cache}");
    let exported = export(&one, results, &to).await.unwrap();
    assert_eq!((exported.steps, exported.withheld), (4, 0));
    // A layout that others read: its index names the manifest.
    let read = |path: &str| std::fs::read(Path::new(&cache).join(path)).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&read("index.json")).unwrap();
    let (entry, name) = (&index["manifests"][0], "org.opencontainers.image.ref.name");
    assert_eq!(entry["annotations"][name], "latest");
    assert_eq!(entry["digest"], exported.manifest.to_string());
    let blobs = || std::fs::read_dir(Path::new(&cache).join("blobs/sha256"));
    assert_eq!(blobs().unwrap().count(), 6);

    let two = world();
    let from = format!("type=local,src={cache}");
    let (second, again) = build(&two, folder.path(), FILE, &[&from]).await;
    assert_eq!(second, first);
    assert_eq!(seen(&two), (4, 0, vec![cache.clone(); 4], vec![]));
    assert_eq!(two.text(&second, "taken"), "one");
    // The same again: nothing comes, nothing goes.
    let before = exported.manifest;
    let exported = export(&two, again, &to).await.unwrap();
    assert_eq!((exported.manifest, blobs().unwrap().count()), (before, 6));

    // Under another name beside it; damaged, it is told and the build goes on.
    let three = world();
    let other = format!("type=local,src={cache},tag=main");
    let (_, results) = build(&three, folder.path(), FILE, &[&other]).await;
    let (cached, done, _, told) = seen(&three);
    assert_eq!((cached, done, told.len()), (0, 4, 1));
    assert!(
        told[0].contains(&format!("the cache {cache} (main): ")),
        "{told:?}"
    );
    assert!(
        told[0].contains("no image `main` in it; it has: latest"),
        "{told:?}"
    );
    let tagged = format!("type=local,dest={cache},tag=main,mode=min");
    assert_eq!(export(&three, results, &tagged).await.unwrap().steps, 2);
    for blob in blobs().unwrap() {
        let path = blob.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes[0] != b'{' {
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let four = world();
    let (built, _) = build(&four, folder.path(), FILE, &[&from]).await;
    let (cached, _, _, told) = seen(&four);
    assert_eq!((built, cached), (first, 0));
    assert!(
        told.len() == 1 && told[0].contains("blobs/sha256"),
        "{told:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_something_else_is_no_place_for_a_cache() {
    let (one, folder) = (world(), files());
    let (_, results) = build(&one, folder.path(), FILE, &[]).await;
    let to = format!("type=local,dest={}", folder.path().display());
    let error = export(&one, results, &to).await.unwrap_err();
    assert!(
        error.contains("no OCI layout; name another folder"),
        "{error}"
    );
    assert!(
        error.contains(&folder.path().display().to_string()),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn least_is_what_the_image_came_of() {
    let registry = TestRegistry::start(Login::None).await;
    let (one, folder) = (world(), files());
    let (_, results) = build(&one, folder.path(), FILE, &[]).await;
    let to = format!("type=registry,ref={}/a:least,mode=min", registry.host());
    assert_eq!(export(&one, results, &to).await.unwrap().steps, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_missing_or_damaged_is_told_and_the_build_goes_on() {
    let registry = TestRegistry::start(Login::None).await;
    let cache = format!("{}/team/app:cache", registry.host());
    let (one, folder) = (world(), files());
    let (first, results) = build(&one, folder.path(), FILE, &[]).await;
    export(&one, results, &cache).await.unwrap();

    let missing = format!("{}/team/none:cache", registry.host());
    let two = world();
    let (built, _) = build(&two, folder.path(), FILE, &[&missing, &cache]).await;
    let (cached, done, _, told) = seen(&two);
    assert_eq!((built, cached, done), (first, 4, 0));
    assert!(told.len() == 1 && told[0].contains(&missing), "{told:?}");

    // One byte of every layer is another, or its uncompressed content is not what is said.
    let config = {
        let bytes = registry.manifest("team/app:cache").unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let digest = manifest["config"]["digest"].as_str().unwrap().to_owned();
        (manifest, digest)
    };
    let said = String::from_utf8(registry.blob(&config.1.parse().unwrap()).unwrap()).unwrap();
    let diff_id = said.split("\"diff_id\":\"").nth(1).unwrap();
    let diff_id = &diff_id[..diff_id.find('"').unwrap()];
    let false_one = said.replace(diff_id, &Digest::of("other").to_string());
    registry.put_blob(false_one.as_bytes());
    let text = config
        .0
        .to_string()
        .replace(&config.1, &Digest::of(&false_one).to_string());
    registry.put_manifest("team/app", "false", text.as_bytes());
    let false_cache = format!("{}/team/app:false", registry.host());
    let lies = world();
    let (built, _) = build(&lies, folder.path(), FILE, &[&false_cache]).await;
    let (_, done, _, told) = seen(&lies);
    assert!(built == first && done > 0, "{done}");
    assert!(
        told.len() == 1 && told[0].contains("its content has digest"),
        "{told:?}"
    );

    // The manifest says another size of a layer than the result: it is not even asked for.
    let size = config.0["layers"][0]["size"].as_u64().unwrap();
    let text = config.0.to_string();
    let other = text.replace(
        &format!("\"size\":{size}"),
        &format!("\"size\":{}", size + 1),
    );
    assert_ne!(other, text);
    registry.put_manifest("team/app", "sizes", other.as_bytes());
    let sizes = format!("{}/team/app:sizes", registry.host());
    let four = world();
    let asked = registry.count("GET /v2/team/app/blobs");
    let (built, _) = build(&four, folder.path(), FILE, &[&sizes]).await;
    let (cached, done, _, told) = seen(&four);
    assert!(built == first && done > 0, "{cached} {done}");
    let told_of_size = told.len() == 1 && told[0].contains("does not have the layer");
    assert!(told_of_size, "{told:?}");
    // Neither is anything else, once something was wrong with it.
    let asked = registry.count("GET /v2/team/app/blobs") - asked;
    assert!(asked <= 1 + cached, "{asked} of {cached}");

    let layer = config.0["layers"][0]["digest"].as_str().unwrap();
    registry.fail(
        &format!("GET /v2/team/app/blobs/{layer}"),
        9,
        Failure::Corrupt,
    );
    let three = world();
    let (built, _) = build(&three, folder.path(), FILE, &[&cache]).await;
    let (_, done, _, told) = seen(&three);
    assert!(built == first && done > 0, "{done}");
    assert!(told.len() == 1 && told[0].contains("digest"), "{told:?}");

    // A cache that has failed is asked for nothing more: of two stages, each has asked once.
    let layers = config.0["layers"].as_array().unwrap();
    let layers: Vec<String> = layers
        .iter()
        .map(|layer| {
            format!(
                "GET /v2/team/app/blobs/{}",
                layer["digest"].as_str().unwrap()
            )
        })
        .collect();
    for layer in &layers {
        registry.fail(layer, 99, Failure::Corrupt);
    }
    let before: Vec<usize> = layers.iter().map(|layer| registry.count(layer)).collect();
    build(&world(), folder.path(), FILE, &[&cache]).await;
    let asked = layers.iter().zip(before);
    let asked = asked.filter(|(layer, before)| registry.count(layer) > *before);
    let asked = asked.count();
    assert!((1..=2).contains(&asked), "{asked} of {}", layers.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_holds_a_secret_stays_at_home() {
    let registry = TestRegistry::start(Login::None).await;
    let line = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n";
    let frame = |word: &str| format!("-----{word} PRIVATE KEY-----\n");
    let key = format!("{}{}{}", frame("BEGIN"), line.repeat(3), frame("END"));
    let folder = context(&[("key", &key), ("c", "three")]);
    let file = "FROM scratch AS uses\nCOPY key /key\nCOPY c /c\n\
                FROM scratch\nCOPY --from=uses /c /c\n";
    let one = world();
    let (_, results) = build(&one, folder.path(), file, &[]).await;
    let cache = format!("{}/a:cache", registry.host());
    let exported = export(&one, results, &cache).await.unwrap();
    assert_eq!((exported.steps, exported.withheld), (2, 1));
    let bytes = registry.manifest("a:cache").unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        let digest = layer["digest"].as_str().unwrap().parse().unwrap();
        let blob = registry.blob(&digest).unwrap();
        let content = zstd::decode_all(blob.as_slice()).unwrap();
        assert!(
            !content
                .windows(20)
                .any(|part| part == &line.as_bytes()[..20])
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_kinds_of_caches_are_refused_by_name() {
    let (one, folder) = (world(), files());
    for (kind, rest) in [("gha", ""), ("inline", ""), ("s3", ",bucket=x")] {
        let mut request = one.request(folder.path(), FILE);
        let entry = format!("type={kind}{rest}");
        request.build.cache_from = vec![entry.clone()];
        let error = prepare(request).err().unwrap().to_string();
        let expected = format!(
            "build.cache_from: `{entry}`: the type {kind} is not supported; use \
             type=registry,ref=… or type=local,src=…"
        );
        assert_eq!(error, expected);
    }
}
