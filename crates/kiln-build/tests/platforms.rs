//! Images for other platforms than this machine's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use kiln_build::build::runs_here;

use kiln_build::lock::Lock;
use kiln_build::resolve::ResolveError;
use kiln_model::spec::DebianBase;
use kiln_oci::manifest::Index;
use kiln_oci::testing::SampleImage;
use kiln_oci::testing::registry::{Login, TestRegistry};
use kiln_testkit::emulator::{self, Emulator};
use world::{World, busybox, context, now, resolver, sandboxes, world};

/// One that is not run here; `None`, and a word about it, where all are.
fn foreign() -> Option<&'static str> {
    let all = [
        "linux/s390x",
        "linux/ppc64le",
        "linux/riscv64",
        "linux/arm64",
    ];
    let found = all.into_iter().find(|platform| !runs_here(platform));
    if found.is_none() {
        eprintln!("SKIPPED: this machine runs programs of every platform");
    }
    found
}

fn build(world: &World, folder: &Path, text: &str, platform: &str) -> Result<String, String> {
    let digest = world.build_with(folder, text, |r| r.platform = platform.into())?;
    let config = world.builder.store.image(&digest).unwrap().unwrap().config;
    let labels: Vec<String> = config.labels.into_values().collect();
    Ok(format!("{} {}", config.platform, labels.join(" ")))
}

#[test]
fn what_runs_nothing_is_built_for_any_platform() {
    let folder = context(&[("f", "x")]);
    let text = "FROM --platform=$BUILDPLATFORM scratch AS tools\nCOPY f /f\nFROM scratch\n\
                ARG TARGETPLATFORM TARGETARCH TARGETVARIANT BUILDPLATFORM\n\
                LABEL a=$TARGETPLATFORM b=$TARGETARCH c=$TARGETVARIANT d=$BUILDPLATFORM\n\
                COPY --from=tools f /";
    let host = kiln_oci::host_platform();
    for (platform, arch, variant) in [
        ("linux/arm64", "arm64", ""),
        ("linux/arm/v7", "arm", "v7"),
        ("linux/s390x", "s390x", ""),
    ] {
        assert_eq!(
            build(&world(), folder.path(), text, platform).unwrap(),
            format!("{platform} {platform} {arch} {variant} {host}")
        );
    }
}

#[test]
fn a_foreign_command_is_refused_before_anything_is_done() {
    let Some(platform) = foreign() else { return };
    let folder = context(&[("f", "x")]);
    let world = world();
    let text = "FROM scratch\nCOPY f /f\nRUN [\"/x\"]";
    let told = build(&world, folder.path(), text, platform).unwrap_err();
    let place =
        format!("dockerfile_inline: line 3: RUN [\"/x\"]: it would have to be run for {platform}");
    assert!(told.starts_with(&place), "{told}");
    assert!(told.contains("--platform=$BUILDPLATFORM"), "{told}");
    assert_eq!(world.seen.counts(), (0, 0));
    // It is not needed for this target.
    let text = "FROM scratch AS unused\nRUN [\"/x\"]\nFROM scratch\nCOPY f /f";
    build(&world, folder.path(), text, platform).unwrap();
}

#[test]
fn a_stage_of_this_machine_makes_what_is_for_another() {
    let Some(platform) = foreign().filter(|_| sandboxes()) else {
        return;
    };
    let (folder, text) = busybox();
    let base = text.replace("FROM scratch", "FROM --platform=$BUILDPLATFORM scratch");
    let text = format!(
        "{base}FROM base AS made\nARG TARGETARCH\nRUN echo \"for $TARGETARCH\" > /made\n\
         FROM scratch\nCOPY --from=made /made /made"
    );
    let world = world();
    for wanted in [platform, &kiln_oci::host_platform()] {
        let digest = world
            .build_with(folder.path(), &text, |r| r.platform = wanted.into())
            .unwrap();
        let arch = wanted.trim_start_matches("linux/");
        assert_eq!(world.text(&digest, "made"), format!("for {arch}\n"));
    }
}

const BINFMT: &str = "/proc/sys/fs/binfmt_misc";
/// Set in a process that has mounts of its own.
const WITHIN: &str = "KILN_TEST_WITHIN";

/// Runs the test of this name once more, where binfmt_misc is mounted for it alone; false:
/// this is that process.
fn mounts_of_its_own(test: &str) -> bool {
    if std::env::var_os(WITHIN).is_some() {
        return false;
    }
    let script = "mount -t binfmt_misc binfmt_misc \"$0\" || exit 77; exec \"$@\"";
    let own = std::env::current_exe().unwrap();
    let status = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            BINFMT,
        ])
        .arg(own)
        .args(["--exact", test, "--nocapture"])
        .env(WITHIN, "1")
        .status();
    match status.unwrap().code() {
        Some(77) => eprintln!("SKIPPED: the kernel has no binfmt_misc"),
        code => assert_eq!(code, Some(0)),
    }
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_command_runs_where_an_emulator_is_registered() {
    let test = "a_foreign_command_runs_where_an_emulator_is_registered";
    if !sandboxes() || mounts_of_its_own(test) {
        return;
    }
    let platform = emulator::PLATFORM;
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let there = runs_here(platform);
    let registered = (!there).then(|| Emulator::register(kept, Path::new(BINFMT)).unwrap());
    assert!(runs_here(platform));

    let base = DebianBase {
        suite: "bookworm".into(),
        packages: vec!["busybox-static".into()],
        distroless: true,
        ..DebianBase::default()
    };
    let world = world();
    let mut resolver = resolver(&world, [("small".to_owned(), base)].into());
    resolver.debian.cache = kept.join("apt-cache");
    resolver.debian.machine.now = now();
    let mut lock = Lock::default();
    let found = resolver.resolve_for("small", platform, false, &mut lock);
    let found = found.await.map_err(|e| world::chain(&e)).unwrap();
    world.images.lock().unwrap().insert("small".into(), found);

    // A program that starts others, in a shell; beside it a stage of this machine's.
    let (folder, host) = busybox();
    let host = host.replace("FROM scratch", "FROM --platform=$BUILDPLATFORM scratch");
    let text = format!(
        "{host}FROM base AS here\nRUN uname -m > /here\nFROM small\nARG TARGETARCH\n\
         RUN [\"/bin/busybox\", \"sh\", \"-c\", \"/bin/busybox uname -m > /there; \
         for i in 1 2 3; do /bin/busybox echo $i $TARGETARCH; done | /bin/busybox tac >> /there\"]\n\
         COPY --from=here /here /\n"
    );
    let build = || {
        let digest = world.build_with(folder.path(), &text, |r| {
            r.platform = platform.into();
            r.build.no_cache = true;
        });
        digest.unwrap()
    };
    let image = build();
    let arch = platform.trim_start_matches("linux/");
    let expected = format!("{}\n3 {arch}\n2 {arch}\n1 {arch}\n", emulator::MACHINE);
    assert_eq!(world.text(&image, "there"), expected);
    assert_ne!(world.text(&image, "here").trim(), emulator::MACHINE);
    assert_eq!(build(), image);
    drop(registered);
    assert_eq!(runs_here(platform), there);
}

/// Seconds.
#[tokio::test(flavor = "multi_thread")]
async fn each_platform_gets_its_image_of_an_index_under_one_pin() {
    let registry = TestRegistry::start(Login::None).await;
    let images = ["linux/amd64", "linux/arm64"].map(|p| SampleImage::new(p, p));
    let mut entries = Vec::new();
    for image in &images {
        registry.put_image("app", &image.platform.replace('/', "-"), image);
        let mut entry = image.descriptor();
        entry.platform = Some(image.platform.parse().unwrap());
        entries.push(entry);
    }
    registry.put_manifest("app", "1", &Index::new(entries).to_bytes());
    let world = world();
    let resolver = resolver(&world, BTreeMap::new());
    let reference = format!("{}/app:1", registry.host());
    let mut lock = Lock::default();
    for _ in 0..2 {
        for image in &images {
            let found = resolver.resolve_for(&reference, &image.platform, false, &mut lock);
            assert_eq!(found.await.unwrap(), image.digest());
        }
        assert_eq!(lock.images.len(), 1);
    }
    let asked = registry.seen().len();
    for image in &images {
        let found = resolver.resolve_for(&reference, &image.platform, true, &mut lock);
        assert_eq!(found.await.unwrap(), image.digest());
    }
    assert_eq!(registry.seen().len(), asked, "both are here");
    let other = resolver.resolve_for(&reference, "linux/s390x", false, &mut lock);
    let told = world::chain(&other.await.unwrap_err());
    assert!(told.contains("linux/amd64, linux/arm64"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_whose_scripts_can_not_be_run_is_refused() {
    let Some(platform) = foreign() else { return };
    let base = DebianBase {
        suite: "bookworm".into(),
        essential: true,
        ..DebianBase::default()
    };
    let world = world();
    let resolver = resolver(&world, [("whole".to_owned(), base)].into());
    let mut lock = Lock::default();
    let error = resolver.resolve_for("whole", platform, false, &mut lock);
    let error = error.await.unwrap_err();
    assert!(matches!(error, ResolveError::Foreign(_)), "{error}");
    assert!(error.to_string().contains("distroless: true"), "{error}");
    assert_eq!(lock, Lock::default());
}
