//! What serves while the next release is on its way stays whole.

use kiln_model::spec::*;
use kiln_model::*;
use kiln_plan::{Event, Health, Phase};

use crate::support::{Outside, name};
use crate::watching::{crash, ids, proven, routed, second, wait, web};

const SECOND: u64 = 1_000;
/// Longer than any backoff after a first failure.
const SOON: u64 = 30 * SECOND;

fn pause(outside: &mut Outside) {
    let why = "asked".into();
    outside.happened(Event::Paused { why });
    outside.carry_all_out();
}

/// The numbers of the release's copies that are ready.
fn ready(outside: &Outside, number: u64) -> Vec<u32> {
    let copies = outside.world.of_service(&name("web"));
    let ready = copies.filter(|(_, i)| i.phase.ready() && i.release == ReleaseNumber(number));
    let mut numbers: Vec<u32> = ready.map(|(_, i)| i.index).collect();
    numbers.sort_unstable();
    numbers
}

/// A first of ten steps that lasts an hour.
fn slow_canary(service: &mut Service) {
    service.kiln.rollout = Some(RolloutOptions {
        strategy: Some(Strategy::Canary),
        steps: vec![CanaryStep {
            weight: 10,
            duration: Millis::from_secs(3600),
        }],
        ..RolloutOptions::default()
    });
}

#[test]
fn an_old_copy_that_ends_beside_a_canary_is_replaced_by_one_of_its_own_release() {
    let mut outside = second(web("1", 3, |_| ()), web("2", 3, slow_canary));
    let old = ids(&outside, 1);
    crash(&mut outside, &old[1]);
    outside.carry_all_out();
    assert_eq!(ready(&outside, 1), [1, 3]);
    wait(&mut outside, SOON);
    assert_eq!(ready(&outside, 1), [1, 2, 3]);
    assert_eq!(routed(&outside).len(), 6);
    outside.happened(Event::Promoted);
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));
    assert_eq!((ready(&outside, 1).len(), ready(&outside, 2).len()), (0, 3));
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn what_ends_before_the_switch_is_replaced_while_the_rollout_is_paused() {
    let mut outside = Outside::new(7);
    outside.up(1, web("1", 2, |_| ()));
    outside.settle();
    outside.up(2, web("2", 2, |_| ()));
    pause(&mut outside);
    let old = ids(&outside, 1);
    crash(&mut outside, &old[0]);
    wait(&mut outside, SOON);
    assert_eq!(ready(&outside, 1), [1, 2]);
    assert_eq!(routed(&outside), ids(&outside, 1));
    outside.happened(Event::Resumed);
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));
    assert_eq!(ids(&outside, 1), []);
}

#[test]
fn a_sick_copy_gets_no_traffic_beside_well_ones_and_is_replaced_before_the_switch() {
    let mut outside = Outside::new(7);
    outside.up(1, web("1", 2, |_| ()));
    outside.settle();
    outside.up(2, web("2", 2, |_| ()));
    pause(&mut outside);
    let sick = ids(&outside, 1)[0].clone();
    outside.happened(Event::Unhealthy {
        id: sick.clone(),
        reason: "it hangs".into(),
    });
    outside.carry_all_out();
    assert!(!routed(&outside).contains(&sick));
    wait(&mut outside, SOON);
    assert_eq!(ready(&outside, 1), [1, 2]);
    assert!(!ids(&outside, 1).contains(&sick));
}

/// One copy at a time, each ten minutes after the one before.
fn slowly(service: &mut Service) {
    service.update.parallelism = Some(1);
    service.update.delay = Some(Millis::from_secs(600));
}

#[test]
fn half_way_through_each_copy_is_replaced_by_one_of_its_own_revision() {
    let mut outside = second(web("1", 3, |_| ()), web("2", 3, slowly));
    assert_eq!((ready(&outside, 1).len(), ready(&outside, 2).len()), (2, 1));
    pause(&mut outside);
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    crash(&mut outside, &old[0]);
    outside.carry_all_out();
    crash(&mut outside, &new[0]);
    wait(&mut outside, 601 * SECOND);
    wait(&mut outside, 601 * SECOND);
    // The next batch has to wait all the same.
    assert_eq!((ready(&outside, 1).len(), ready(&outside, 2).len()), (2, 1));
    assert_eq!(routed(&outside).len(), 3);
}

#[test]
fn what_an_old_copy_does_says_nothing_of_the_new_release() {
    let mut outside = Outside::new(7);
    outside.broken.insert(Digest::of("web 2"));
    outside.up(1, web("1", 1, |_| ()));
    outside.settle();
    outside.up(2, web("2", 1, |_| ()));
    // Between any two failures of the new one, the old one ends.
    for _ in 0..20 {
        outside.carry_for(1);
        let old = ids(&outside, 1).into_iter().find(|id| {
            let old = outside.world.instances.get(id);
            old.is_some_and(|i| matches!(i.phase, Phase::Ready { .. }))
        });
        let Some(old) = old else { continue };
        crash(&mut outside, &old);
    }
    outside.carry_for(60);
    let failed = outside.concluded.get(1).map(|c| format!("{c:?}"));
    assert!(
        failed.is_some_and(|f| f.contains("Failed")),
        "{:?}",
        outside.concluded
    );
    assert_eq!(outside.world.goal.release(), Some(ReleaseNumber(1)));
    let copies: Vec<_> = outside.world.instances.values().collect();
    assert!(
        copies.iter().all(|i| i.health == Health::Healthy),
        "{copies:?}"
    );
}
