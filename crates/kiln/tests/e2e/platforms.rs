//! Images for several platforms, what they consist of, and how they are taken out.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::Kiln;

const COMPOSE: &str = "\
services:
  web:
    image: shop/web:1
    x-kiln:
      image:
        suite: bookworm
        packages: [busybox-static]
        distroless: true
        platforms: [linux/amd64, linux/arm64]
        cmd: [/bin/busybox, sleep, '600']
";

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn blob(layout: &Path, descriptor: &Value) -> Value {
    let digest = descriptor["digest"].as_str().unwrap();
    json(&layout.join("blobs").join(digest.replace(':', "/")))
}

#[test]
fn several_platforms_become_an_index_that_is_taken_out_and_up_runs_ones_own() {
    let Some(kiln) = Kiln::new() else { return };
    let project = kiln.project("platforms", &[("compose.yaml", COMPOSE)]);
    let out = project.folder.join("web.tar");
    let words = ["--output", out.to_str().unwrap()];
    project.run("build", &words).ok();
    let layout = project.folder.join("layout");
    fs::create_dir(&layout).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(&out).arg("-C").arg(&layout);
    assert!(tar.status().unwrap().success());
    let entry = &json(&layout.join("index.json"))["manifests"][0];
    assert_eq!(
        entry["annotations"]["org.opencontainers.image.ref.name"],
        "shop/web:1"
    );
    let index = blob(&layout, entry);
    let images = index["manifests"].as_array().unwrap();
    assert_eq!(images.len(), 2, "{index}");
    let mut own = String::new();
    for (image, arch) in images.iter().zip(["amd64", "arm64"]) {
        assert_eq!(image["platform"]["architecture"], arch, "{index}");
        let config = blob(&layout, &blob(&layout, image)["config"]);
        assert_eq!(config["architecture"], arch, "{config}");
        // The packages are of that architecture, and `kiln packages` knows them.
        let digest = image["digest"].as_str().unwrap();
        let found = project.kiln(&["packages", digest, "--json"]).ok().json();
        let all = found["packages"].as_array().unwrap();
        let busybox = all.iter().find(|p| p["name"] == "busybox-static").unwrap();
        assert_eq!(
            (&busybox["architecture"], &busybox["ecosystem"]),
            (&arch.into(), &"deb".into())
        );
        assert_eq!(busybox["place"], "/var/lib/dpkg/status.d/busybox-static");
        assert_eq!(found["unread"], serde_json::json!([]));
        if std::env::consts::ARCH == (if arch == "amd64" { "x86_64" } else { "aarch64" }) {
            own = digest.to_owned();
        }
    }
    // Again, from the cache, it is the same to the last bit.
    let first = fs::read(&out).unwrap();
    project.run("build", &words).ok();
    assert!(fs::read(&out).unwrap() == first);

    project.up().ok();
    let packages = project.kiln(&["packages", "web", "-e", "@"]).ok();
    for name in ["busybox-static", "base-files"] {
        assert!(packages.stdout.contains(name), "{packages}");
    }
    let ran = project.kiln(&["packages", "nothing", "-e", "@"]);
    ran.code(&[7]).says(&["neither an image nor a service"]);
    if !own.is_empty() {
        let status = project.run("status", &["--json"]).ok().json().to_string();
        let short = &own["sha256:".len()..][..12];
        assert!(status.contains(short), "{status}");
    }
    // A newer list of packages tells what came; the files come after it.
    project.edit(
        "compose.yaml",
        "[busybox-static]",
        "[busybox-static, tzdata]",
    );
    project.up().ok();
    let told = project.run("diff", &["1", "2"]).ok();
    let tzdata = told
        .stdout
        .lines()
        .find(|line| line.contains("package deb tzdata"));
    assert!(
        tzdata.is_some_and(|line| line.ends_with("is new")),
        "{told}"
    );

    project.edit(
        "compose.yaml",
        "platforms: [linux/amd64, linux/arm64]",
        "platforms: [linux/s390x]",
    );
    let refused = project.run("up", &[]).code(&[3]);
    refused.says(&["platforms has linux/s390x", "kiln build --platform"]);
    project.edit("compose.yaml", "    image: shop/web:1\n", "");
    let refused = project
        .run("build", &["--platform", "linux/arm64", "--push"])
        .code(&[3]);
    refused.says(&["services.web has no `image`"]);
}
