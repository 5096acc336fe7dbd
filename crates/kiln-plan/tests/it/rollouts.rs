//! Whole rollouts, and what happens between them.

use std::collections::BTreeSet;

use kiln_model::instance::ExitStatus;
use kiln_model::network::BridgeNetwork;
use kiln_model::spec::*;
use kiln_model::*;
use kiln_plan::{Conclusion, Effect, Event, Goal, Layout, assign_service_addresses};

use crate::support::{Outside, name, needs, only, released, revision, shop};

#[test]
fn a_first_release_comes_up_in_order_and_a_second_replaces_it_without_a_gap() {
    for seed in 1..200 {
        let mut outside = Outside::new(seed);
        outside.up(1, shop("1"));
        outside.settle();
        outside.up(2, shop("2"));
        outside.settle();
        let expected: Vec<_> = [1, 2]
            .map(|n| Conclusion::Proven {
                release: ReleaseNumber(n),
            })
            .into();
        assert_eq!(outside.concluded, expected);
        assert_eq!(outside.serving("web"), vec![revision(&shop("2"), "web"); 3]);
        assert_eq!(outside.serving("db"), vec![revision(&shop("2"), "db")]);
        assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
        assert_eq!(outside.world.instances.len(), 4);
    }
}

#[test]
fn a_release_that_never_gets_ready_leaves_the_old_one_serving() {
    for seed in 1..200 {
        let mut outside = Outside::new(seed);
        outside.up(1, shop("1"));
        outside.settle();
        let bad = shop("2");
        outside
            .broken
            .insert(bad.services[&name("web")].image.digest);
        outside.up(2, bad);
        outside.settle();
        assert!(
            matches!(&outside.concluded[1], Conclusion::Failed { release, cause, .. }
                if release.0 == 2 && cause.contains("never answered")),
            "{:?}",
            outside.concluded
        );
        assert_eq!(outside.serving("web"), vec![revision(&shop("1"), "web"); 3]);
        assert_eq!(outside.serving("db"), vec![revision(&shop("1"), "db")]);
        assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
    }
}

#[test]
fn a_copy_that_had_all_its_time_gets_no_second_try() {
    let mut outside = Outside::new(11);
    outside.up(1, shop("1"));
    outside.settle();
    let bad = shop("2");
    outside
        .broken
        .insert(bad.services[&name("web")].image.digest);
    let before = outside.started.len();
    outside.up(2, bad);
    outside.settle();
    assert!(matches!(&outside.concluded[1], Conclusion::Failed { .. }));
    let web = |id: &&InstanceId| id.as_str().contains("-web-");
    let tried = outside.started[before..].iter().filter(web).count();
    assert!((1..=3).contains(&tried), "{tried} of 3 copies were tried");
    assert_eq!(outside.serving("web"), vec![revision(&shop("1"), "web"); 3]);
}

#[test]
fn a_failing_job_stops_the_rollout_before_web_is_touched() {
    let mut outside = Outside::new(7);
    outside.up(1, shop("1"));
    outside.settle();
    outside.jobs_fail = true;
    outside.up(2, shop("2"));
    outside.settle();
    assert!(
        matches!(&outside.concluded[1], Conclusion::Failed { cause, .. }
        if cause.contains("migrate"))
    );
    assert_eq!(outside.serving("web"), vec![revision(&shop("1"), "web"); 3]);
}

#[test]
fn an_unchanged_release_replaces_nothing() {
    let mut outside = Outside::new(3);
    outside.up(1, shop("1"));
    outside.settle();
    let before: Vec<_> = outside.world.instances.keys().cloned().collect();
    outside.up(2, shop("1"));
    outside.settle();
    assert_eq!(
        before,
        outside.world.instances.keys().cloned().collect::<Vec<_>>()
    );
}

#[test]
fn fewer_replicas_end_the_surplus_and_leave_the_others_alone() {
    let mut outside = Outside::new(11);
    outside.up(1, shop("1"));
    outside.settle();
    let all = |outside: &Outside| -> Vec<(InstanceId, u32)> {
        let web = name("web");
        let of_web = outside
            .world
            .of_service(&web)
            .filter(|(_, i)| i.phase.alive());
        of_web.map(|(id, i)| (id.clone(), i.index)).collect()
    };
    let before = all(&outside);
    assert_eq!(before.len(), 3);
    let mut fewer = shop("1");
    fewer
        .services
        .get_mut(&name("web"))
        .unwrap()
        .service
        .replicas = 1;
    outside.up(2, fewer);
    outside.settle();
    let first: Vec<_> = before
        .into_iter()
        .filter(|(_, index)| *index == 1)
        .collect();
    assert_eq!(all(&outside), first);
    assert_eq!(outside.serving("web").len(), 1);
}

#[test]
fn a_crash_at_any_step_converges_to_the_new_release() {
    for seed in 1..400 {
        let mut outside = Outside::new(seed);
        outside.up(1, shop("1"));
        outside.settle();
        outside.up(2, shop("2"));
        for _ in 0..(seed % 40) {
            if outside.pending.is_empty() {
                break;
            }
            let n = outside.below(outside.pending.len());
            let effect = outside.pending.remove(n);
            outside.carry_out(effect);
        }
        outside.crash();
        outside.settle();
        assert_eq!(
            outside.serving("web"),
            vec![revision(&shop("2"), "web"); 3],
            "seed {seed}"
        );
        assert_eq!(outside.serving("db").len(), 1);
        assert_eq!(outside.world.instances.len(), 4, "seed {seed}");
        let known: BTreeSet<_> = outside.world.instances.keys().cloned().collect();
        assert_eq!(outside.running, known, "seed {seed}");
    }
}

#[test]
fn down_ends_everything_and_a_reboot_brings_everything_back() {
    let mut outside = Outside::new(11);
    outside.up(1, shop("1"));
    outside.settle();
    outside.running.clear();
    outside.crash();
    outside.settle();
    assert_eq!(outside.serving("web").len(), 3);
    let layout = Layout {
        ..outside.world.layout.clone()
    };
    outside.happened(Event::Desired {
        goal: Goal::Nothing,
        layout,
        rollback: false,
    });
    outside.settle();
    assert_eq!(outside.concluded.last(), Some(&Conclusion::Down));
    assert!(outside.world.instances.is_empty() && outside.running.is_empty());
}

#[test]
fn an_unhealthy_copy_is_replaced_by_a_new_one() {
    let mut outside = Outside::new(5);
    outside.up(1, shop("1"));
    outside.settle();
    let sick = outside
        .world
        .instances
        .iter()
        .find(|(_, i)| i.service.as_str() == "web")
        .map(|(id, _)| id.clone())
        .unwrap();
    outside.happened(Event::Unhealthy {
        id: sick.clone(),
        reason: "hangs".into(),
    });
    outside.settle();
    assert!(!outside.world.instances.contains_key(&sick));
    assert_eq!(outside.serving("web").len(), 3);
}

/// vpn ← side, which shares its network; app restarts with vpn.
fn shared(version: &str) -> Release {
    let mut release = shop(version);
    let vpn = released(&format!("vpn {version}"), |s| {
        s.restart = RestartPolicy::Always
    });
    let side = released("side", |s| s.network = NetworkMode::Service(name("vpn")));
    let app = released("app", |s| {
        needs(s, "vpn", Condition::Started);
        s.depends_on.get_mut(&name("vpn")).unwrap().restart = true;
    });
    release.services = [
        (name("vpn"), vpn),
        (name("side"), side),
        (name("app"), app),
        (name("other"), released("other", |_| {})),
    ]
    .into();
    release
}

#[test]
fn what_shares_a_namespace_or_restarts_with_a_service_is_replaced_with_it() {
    for seed in 1..30 {
        let mut outside = Outside::new(seed);
        outside.up(1, shared("1"));
        outside.settle();
        let ids = |outside: &Outside, of: &str| -> Vec<InstanceId> {
            let of = name(of);
            outside
                .world
                .of_service(&of)
                .map(|(id, _)| id.clone())
                .collect()
        };
        let before: Vec<_> = ["vpn", "side", "app", "other"]
            .map(|s| ids(&outside, s))
            .into();
        outside.up(2, shared("2"));
        outside.settle();
        let after: Vec<_> = ["vpn", "side", "app", "other"]
            .map(|s| ids(&outside, s))
            .into();
        for n in 0..3 {
            assert_ne!(before[n], after[n], "seed {seed}");
        }
        assert_eq!(before[3], after[3]);
        let joined = |outside: &Outside| {
            let side = &outside
                .world
                .instances
                .get(&ids(outside, "side")[0])
                .unwrap();
            (side.joined[&name("vpn")].clone(), ids(outside, "vpn"))
        };
        let (with, vpn) = joined(&outside);
        assert_eq!(vpn, std::slice::from_ref(&with));
        // Its end ends what shares its network, and only that.
        outside.running.remove(&with);
        let status = ExitStatus::Code(1);
        outside.happened(Event::Exited {
            id: with.clone(),
            status,
        });
        outside.settle();
        let (now, vpn) = joined(&outside);
        assert_ne!(now, with);
        assert_eq!(vpn, [now], "seed {seed}");
        assert_eq!(ids(&outside, "app"), after[2]);
        assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
    }
}

#[test]
fn no_two_services_have_one_address() {
    let network: NetworkName = "default".parse().unwrap();
    let at = |address: &str| {
        released("x", |s| {
            let attachment = Attachment {
                ipv4_address: Some(address.parse().unwrap()),
                ..Attachment::default()
            };
            s.network = NetworkMode::Networks([("default".parse().unwrap(), attachment)].into());
        })
    };
    let mut layout = Layout::default();
    let bridge = BridgeNetwork {
        name: "n".into(),
        bridge: "b".into(),
        subnet: "10.9.0.0/24".parse().unwrap(),
        internal: false,
        mtu: None,
    };
    layout.networks.insert(network.clone(), bridge);
    let mut release = shop("1");
    release.services = [
        (name("a"), released("a", |_| {})),
        (name("b"), at("10.9.0.128")),
    ]
    .into();
    assert!(assign_service_addresses(&mut layout, &release).is_empty());
    let given: Vec<String> = layout.services[&network]
        .values()
        .map(|a| a.to_string())
        .collect();
    assert_eq!(given, ["10.9.0.129", "10.9.0.128"]);
    // Of one that runs, of one that is gone, and of nobody on this network.
    release.services.insert(name("c"), at("10.9.0.129"));
    assert_eq!(assign_service_addresses(&mut layout, &release).len(), 1);
    release.services.remove(&name("a"));
    assert!(assign_service_addresses(&mut layout, &release).is_empty());
    release.services.insert(name("c"), at("10.9.0.5"));
    assert_eq!(assign_service_addresses(&mut layout, &release).len(), 1);
}

#[test]
fn a_sick_single_writer_is_replaced_as_well() {
    let mut outside = Outside::new(5);
    outside.up(1, shop("1"));
    outside.settle();
    let sick = only(&outside, "db");
    outside.happened(Event::Unhealthy {
        id: sick.clone(),
        reason: "hangs".into(),
    });
    outside.settle();
    assert_ne!(only(&outside, "db"), sick);
    assert_eq!(outside.serving("db").len(), 1);
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn a_service_that_becomes_a_single_writer_keeps_no_surplus_copy() {
    let with = |replicas: u32| {
        let mut release = shop("1");
        let db = release.services.get_mut(&name("db")).unwrap();
        db.service.replicas = replicas;
        db.service.restart = RestartPolicy::Always;
        release
    };
    let mut outside = Outside::new(7);
    outside.up(1, with(2));
    outside.settle();
    // Only the copy with the higher number is left when one is wanted.
    let db = name("db");
    let first = outside.world.of_service(&db).find(|(_, i)| i.index == 1);
    let first = first.map(|(id, _)| id.clone()).unwrap();
    outside.up(2, with(1));
    outside.running.remove(&first);
    let status = ExitStatus::Code(1);
    outside.happened(Event::Exited { id: first, status });
    outside.settle();
    let left = only(&outside, "db");
    assert_eq!(outside.world.instances.get(&left).unwrap().index, 1);
}

#[test]
fn orders_of_different_releases_do_not_keep_each_other_from_going_down() {
    let pair = |version: &str, needed: Option<(&str, &str)>| {
        let mut release = shop(version);
        release.services = ["one", "two"]
            .map(|n| (name(n), released(n, |_| {})))
            .into();
        if let Some((who, other)) = needed {
            let who = release.services.get_mut(&name(who)).unwrap();
            needs(&mut who.service, other, Condition::Started);
        }
        release
    };
    let mut outside = Outside::new(9);
    outside.up(1, pair("1", Some(("one", "two"))));
    outside.settle();
    // Two is made anew by a release in which the order is the other way round.
    let mut second = pair("1", Some(("two", "one")));
    second.services.get_mut(&name("two")).unwrap().image.digest = Digest::of("two anew");
    outside.up(2, second);
    outside.settle();
    let layout = outside.world.layout.clone();
    outside.happened(Event::Desired {
        goal: Goal::Nothing,
        layout,
        rollback: false,
    });
    outside.settle();
    assert!(outside.world.instances.is_empty());
}

#[test]
fn a_start_that_failed_is_ended_before_another_writer_begins() {
    let mut outside = Outside::new(3);
    outside.up(1, shop("1"));
    while !outside
        .pending
        .iter()
        .any(|e| matches!(e, Effect::Start { .. }))
    {
        let effect = outside.pending.remove(0);
        outside.carry_out(effect);
    }
    let id = only(&outside, "db");
    // It runs, although its start came to no good end.
    outside.pending.clear();
    outside.running.insert(id.clone());
    outside.happened(Event::StartFailed {
        id: id.clone(),
        cause: "no space left on device".into(),
    });
    outside.now += 100_000;
    outside.happened(Event::Tick);
    let stops = |e: &Effect| matches!(e, Effect::Stop { id: stopped, .. } if *stopped == id);
    assert!(outside.pending.iter().any(stops), "{:?}", outside.pending);
    assert_eq!(only(&outside, "db"), id);
}

#[test]
fn an_answer_about_networks_that_have_gone_since_is_not_believed() {
    let mut outside = Outside::new(3);
    outside.up(1, shop("1"));
    let Some(Effect::EnsureNetworks { wish, .. }) = outside.pending.first().cloned() else {
        panic!("{:?}", outside.pending);
    };
    outside.settle();
    let layout = outside.world.layout.clone();
    outside.happened(Event::Desired {
        goal: Goal::Nothing,
        layout,
        rollback: false,
    });
    outside.settle();
    outside.happened(Event::NetworksReady { wish });
    assert!(!outside.world.networks_ready);
}

#[test]
fn what_has_served_before_waits_less_once_it_has_answered() {
    let settled = |outside: &Outside| {
        let settle = |e: &Effect| match e {
            Effect::Observe { probe, .. } => Some(probe.settle),
            _ => None,
        };
        outside.pending.iter().find_map(settle)
    };
    let mut outside = Outside::new(5);
    outside.up(1, shop("1"));
    outside.settle();
    let mut on_the_way = |number, to: Release, back| {
        match back {
            true => outside.roll_back(number, to),
            false => outside.up(number, to),
        }
        while settled(&outside).is_none() {
            outside.carry_one_out();
        }
        let seen = settled(&outside);
        outside.settle();
        seen
    };
    let forward = on_the_way(2, shop("2"), false);
    let back = on_the_way(3, shop("1"), true);
    assert_eq!((forward, back), (Some(Millis(200)), Some(Millis(50))));
}
