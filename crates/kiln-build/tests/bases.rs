//! Bases of Debian packages, composed several at a time. The machine must be a Debian.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;
use std::path::Path;

use kiln_build::graph::Wanted;
use kiln_build::lock::Lock;
use kiln_build::resolve::Resolver;
use kiln_model::Digest;
use kiln_model::spec::DebianBase;
use world::{World, chain, now, resolver, world};

fn base(packages: &[&str]) -> DebianBase {
    DebianBase {
        suite: "bookworm".into(),
        packages: packages.iter().map(|name| (*name).into()).collect(),
        distroless: true,
        ..DebianBase::default()
    }
}

fn bases(world: &World, bases: &[(&str, DebianBase)]) -> Resolver {
    let named = bases
        .iter()
        .map(|(name, base)| ((*name).to_owned(), base.clone()));
    let mut resolver = resolver(world, named.collect());
    // Package files are fetched once.
    resolver.debian.cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("apt-cache");
    resolver.debian.machine.now = now();
    resolver
}

fn wanted(names: &[&str]) -> impl Iterator<Item = Wanted> {
    names.iter().map(|name| Wanted {
        reference: (*name).into(),
        platform: kiln_oci::host_platform(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn bases_composed_at_once_are_those_composed_one_after_the_other() {
    let names = ["shell", "zones", "both"];
    let all = [
        ("shell", base(&["busybox-static"])),
        ("zones", base(&["tzdata"])),
        ("both", base(&["busybox-static", "tzdata"])),
    ];
    let platform = kiln_oci::host_platform();
    let (one, other) = (world(), world());
    let (at_once, singly) = (bases(&one, &all), bases(&other, &all));
    let mut lock = Lock::default();
    let there = |lock: &Lock| names.map(|name| at_once.is_composed(name, &platform, lock));
    assert_eq!(there(&lock), [false; 3]);
    let composed = at_once.compose(wanted(&names).collect(), &mut lock).await;
    composed.map_err(|e| chain(&e)).unwrap();
    assert_eq!(there(&lock), [true; 3]);
    assert_eq!(there(&Lock::default()), [false; 3], "nothing is locked");
    let (mut found, mut expected) = (BTreeMap::new(), BTreeMap::<&str, Digest>::new());
    let (learned, mut fresh) = (lock.clone(), Lock::default());
    for name in names {
        let digest = at_once.resolve_for(name, &platform, true, &mut lock);
        found.insert(name, digest.await.unwrap());
        let digest = singly.resolve_for(name, &platform, false, &mut fresh);
        expected.insert(name, digest.await.unwrap());
    }
    assert_eq!(found, expected);
    assert_eq!((&lock, &fresh), (&learned, &learned));
    for digest in found.values() {
        assert!(one.builder.store.image(digest).unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_one_that_cannot_be_locked_is_named() {
    let all = [
        ("good", base(&["busybox-static"])),
        ("wrong", base(&["there-is-no-such-package"])),
    ];
    let world = world();
    let resolver = bases(&world, &all);
    let mut lock = Lock::default();
    let composed = resolver.compose(wanted(&["good", "wrong"]).collect(), &mut lock);
    let error = chain(&composed.await.unwrap_err());
    assert!(error.contains("`wrong`"), "{error}");
    assert!(error.contains("there-is-no-such-package"), "{error}");
}
