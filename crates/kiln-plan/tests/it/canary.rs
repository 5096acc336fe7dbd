//! Traffic that moves step by step, and what releases are judged by.

use kiln_model::spec::*;
use kiln_model::*;
use kiln_plan::{Conclusion, Effect, Event, Plan, RolloutState, Violation, check, stage};

use crate::support::{Outside, name};
use crate::watching::{crash, ids, proven, routed, second, wait, web};

const SECOND: u64 = 1_000;

fn steps(steps: &[(u8, u64)]) -> Vec<CanaryStep> {
    let step = |(weight, seconds): &(u8, u64)| CanaryStep {
        weight: *weight,
        duration: Millis::from_secs(*seconds),
    };
    steps.iter().map(step).collect()
}

/// 5 % for ten seconds, 50 % for twenty.
fn canary(service: &mut Service) {
    service.kiln.rollout = Some(RolloutOptions {
        strategy: Some(Strategy::Canary),
        steps: steps(&[(5, 10), (50, 20)]),
        ..RolloutOptions::default()
    });
}

fn judged(analysis: Analysis) -> impl Fn(&mut Service) {
    move |service| {
        canary(service);
        service.kiln.rollout.as_mut().unwrap().analysis = Some(analysis.clone());
    }
}

fn at_most(rate: u32, requests: Option<u64>) -> Analysis {
    Analysis {
        max_error_rate: Some(rate),
        min_requests: requests,
        ..Analysis::default()
    }
}

/// The table's split of `web`.
fn split(outside: &Outside) -> Option<(u8, Vec<InstanceId>)> {
    let table = outside.world.routes.as_ref().unwrap();
    let split = table.services[&name("web")].split.as_ref()?;
    Some((split.weight, split.to.iter().cloned().collect()))
}

/// Each instance of the release has so many more requests, and failures.
fn traffic(outside: &mut Outside, number: u64, requests: u64, failed: u64) {
    for id in ids(outside, number) {
        let counted = outside.traffic.entry(id).or_default();
        counted.0 += requests;
        counted.1 += failed;
    }
}

fn cause(outside: &Outside) -> &str {
    match outside.concluded.last() {
        Some(Conclusion::Failed { cause, .. }) => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn weights_rise_step_by_step_and_then_all_traffic_moves() {
    let mut outside = second(web("1", 2, canary), web("2", 2, canary));
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    let all: Vec<_> = old.iter().chain(&new).cloned().collect();
    assert_eq!(split(&outside), Some((5, new.clone())));
    assert!(all.iter().all(|id| routed(&outside).contains(id)));
    let now = stage(&outside.world, &outside.releases).unwrap();
    assert_eq!((now.step, now.steps, now.weights[&name("web")]), (1, 2, 5));
    traffic(&mut outside, 2, 30, 0);
    wait(&mut outside, 9 * SECOND);
    assert_eq!(split(&outside), Some((5, new.clone())));
    wait(&mut outside, 2 * SECOND);
    assert_eq!(split(&outside), Some((50, new.clone())));
    wait(&mut outside, 15 * SECOND);
    assert_eq!(split(&outside), Some((50, new.clone())));
    assert_eq!(outside.concluded.len(), 1);
    let verdicts = outside
        .world
        .rollout
        .as_ref()
        .unwrap()
        .canary
        .verdicts
        .clone();
    assert_eq!(verdicts.len(), 1);
    assert!(verdicts[0].good, "{verdicts:?}");
    assert_eq!(verdicts[0].text, "web: 0 of 60 requests failed");
    wait(&mut outside, 6 * SECOND);
    assert_eq!((split(&outside), routed(&outside)), (None, new));
    assert_eq!(outside.concluded[1], proven(2));
    assert_eq!(ids(&outside, 1), []);
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn bad_traffic_returns_with_one_table_to_the_same_instances() {
    let change = judged(at_most(10_000, None));
    let mut outside = second(web("1", 2, &change), web("2", 2, &change));
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    let started = outside.started.len();
    traffic(&mut outside, 2, 60, 0);
    wait(&mut outside, 2 * SECOND);
    assert!(split(&outside).is_some());
    outside.traffic.get_mut(&new[1]).unwrap().1 += 6;
    wait(&mut outside, SECOND);
    outside.settle();
    assert_eq!((routed(&outside), outside.started.len()), (old, started));
    let expected = "service `web`, at 5 % of its traffic: \
                    0.05 of 120 requests failed, the limit is 0.01";
    assert_eq!(cause(&outside), expected);
    let Some(Conclusion::Failed { instance, .. }) = outside.concluded.last() else {
        panic!();
    };
    assert_eq!(instance.as_ref(), Some(&new[1]), "its log is shown");
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn each_step_is_judged_by_itself() {
    let change = judged(at_most(100_000, None));
    let mut outside = second(web("1", 1, &change), web("2", 1, &change));
    traffic(&mut outside, 2, 1000, 50);
    wait(&mut outside, 5 * SECOND);
    wait(&mut outside, 6 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 50);
    // A tenth of all there ever was, and half of what there is now.
    traffic(&mut outside, 2, 100, 50);
    wait(&mut outside, SECOND);
    outside.settle();
    assert!(cause(&outside).contains("at 50 %"), "{}", cause(&outside));
    assert!(
        cause(&outside).contains("0.5 of 100"),
        "{}",
        cause(&outside)
    );
}

#[test]
fn without_limits_a_canary_must_not_do_worse_than_what_serves_beside_it() {
    for (of_old, returns) in [(0, true), (10, false)] {
        let mut outside = second(web("1", 1, canary), web("2", 1, canary));
        traffic(&mut outside, 1, 100, of_old);
        traffic(&mut outside, 2, 100, 10);
        wait(&mut outside, SECOND);
        assert_eq!(split(&outside).is_none(), returns, "{of_old}");
    }
}

#[test]
fn too_few_requests_are_waited_for_and_then_somebody() {
    let change = judged(at_most(10_000, Some(40)));
    let mut outside = second(web("1", 1, &change), web("2", 1, &change));
    traffic(&mut outside, 2, 10, 0);
    wait(&mut outside, 50 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 5);
    wait(&mut outside, 55 * SECOND);
    let why = outside
        .world
        .rollout
        .as_ref()
        .unwrap()
        .paused
        .clone()
        .unwrap();
    assert!(why.contains("10 of the 40 requests"), "{why}");
    outside.happened(Event::Resumed);
    outside.carry_all_out();
    traffic(&mut outside, 2, 40, 0);
    wait(&mut outside, 9 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 5, "its time begins anew");
    wait(&mut outside, 2 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 50);
}

#[test]
fn people_have_a_word_in_it() {
    let mut outside = second(web("1", 1, canary), web("2", 1, canary));
    let why = "asked".to_owned();
    outside.happened(Event::Paused { why });
    wait(&mut outside, 100 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 5);
    outside.happened(Event::Promoted);
    outside.carry_all_out();
    assert_eq!(outside.concluded[1], proven(2));
    assert_eq!(routed(&outside), ids(&outside, 2));

    let mut outside = second(web("1", 1, canary), web("2", 1, canary));
    let old = ids(&outside, 1);
    outside.happened(Event::Abandoned { why: "bad".into() });
    outside.carry_all_out();
    assert_eq!(routed(&outside), old);
    assert!(cause(&outside).contains("bad"));
}

#[test]
fn a_crash_of_the_caller_in_mid_step_costs_no_time() {
    let change = judged(at_most(10_000, None));
    let mut outside = second(web("1", 1, &change), web("2", 1, &change));
    wait(&mut outside, 8 * SECOND);
    outside.crash();
    outside.carry_all_out();
    assert_eq!(split(&outside).unwrap().0, 5);
    wait(&mut outside, 3 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 50);
    outside.crash();
    outside.carry_all_out();
    traffic(&mut outside, 2, 100, 100);
    wait(&mut outside, SECOND);
    outside.settle();
    assert!(cause(&outside).contains("1 of 100 requests failed"));
}

#[test]
fn an_instance_of_the_canary_that_ends_gives_its_part_back() {
    let mut outside = second(web("1", 1, canary), web("2", 1, canary));
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    wait(&mut outside, 5 * SECOND);
    crash(&mut outside, &new[0]);
    let Some(Effect::Route(table)) = outside.pending.first() else {
        panic!("{:?}", outside.pending);
    };
    let backends = &table.services[&name("web")].backends;
    assert!(backends.iter().map(|b| &b.instance).eq(&old));
    for _ in 0..10 {
        wait(&mut outside, SECOND);
    }
    // Another has taken its place, and the step has begun anew.
    assert_eq!(split(&outside).unwrap().0, 5);
    wait(&mut outside, 11 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 50);
}

#[test]
fn where_no_old_instance_is_left_the_new_ones_have_all() {
    let mut outside = second(web("1", 1, canary), web("2", 1, canary));
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    crash(&mut outside, &old[0]);
    outside.carry_all_out();
    assert_eq!((split(&outside), routed(&outside)), (None, new));
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn prometheus_is_asked_at_the_end_of_a_step() {
    let change = judged(Analysis {
        prometheus: Some(Prometheus {
            url: "http://127.0.0.1:9090".into(),
            query: "errors".into(),
            min: None,
            max: Number::new(1.0),
        }),
        ..Analysis::default()
    });
    let mut outside = second(web("1", 1, &change), web("2", 1, &change));
    wait(&mut outside, 11 * SECOND);
    wait(&mut outside, 11 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 5, "nobody has answered");
    outside.value = Ok(0.5);
    wait(&mut outside, 6 * SECOND);
    assert_eq!(split(&outside).unwrap().0, 50);
    outside.value = Ok(1.5);
    wait(&mut outside, 21 * SECOND);
    outside.settle();
    let expected = "at 50 % of its traffic: `errors` is 1.5, the limit is 1";
    assert!(cause(&outside).contains(expected), "{}", cause(&outside));
}

#[test]
fn first_releases_rollbacks_and_single_writers_take_no_steps() {
    let outside = second(
        web("1", 1, canary),
        web("2", 1, |s| {
            canary(s);
            s.kiln.exclusive = Some(true);
        }),
    );
    assert_eq!(outside.concluded, [proven(1), proven(2)]);

    let mut outside = Outside::new(3);
    outside.up(1, web("1", 1, canary));
    outside.carry_all_out();
    outside.settle();
    outside.up(2, web("2", 1, |_| ()));
    outside.settle();
    outside.roll_back(3, web("1", 1, canary));
    outside.carry_all_out();
    assert_eq!(outside.concluded, [proven(1), proven(2), proven(3)]);
}

#[test]
fn errors_after_the_switch_bring_the_old_release_back() {
    for (monitor, after, returns) in [
        (None, SECOND, true),
        (None, 11 * SECOND, false),
        (Some(0), SECOND, false),
        (Some(60), 30 * SECOND, true),
    ] {
        let change = |s: &mut Service| s.update.monitor = monitor.map(Millis::from_secs);
        let mut outside = second(web("1", 2, change), web("2", 2, change));
        wait(&mut outside, after);
        traffic(&mut outside, 2, 10, 10);
        wait(&mut outside, SECOND);
        outside.settle();
        let failed = matches!(outside.concluded.last(), Some(Conclusion::Failed { .. }));
        assert_eq!(failed, returns, "{monitor:?} {after}");
        if returns {
            let why = cause(&outside);
            assert!(why.contains("after traffic had moved: 1 of 20"), "{why}");
        }
    }
}

#[test]
fn errors_that_were_there_before_are_borne() {
    let change = |s: &mut Service| s.update.monitor = Some(Millis::from_secs(30));
    for (before, returns) in [(0, true), (50, false)] {
        let mut outside = Outside::new(7);
        outside.up(1, web("1", 1, change));
        outside.settle();
        traffic(&mut outside, 1, 100, before);
        outside.up(2, web("2", 1, change));
        outside.carry_all_out();
        assert_eq!(
            outside.world.rollout.as_ref().unwrap().state,
            RolloutState::Watching
        );
        traffic(&mut outside, 2, 100, 50);
        wait(&mut outside, SECOND);
        outside.settle();
        let failed = matches!(outside.concluded.last(), Some(Conclusion::Failed { .. }));
        assert_eq!(failed, returns, "{before}");
    }
}

#[test]
fn errors_of_the_first_of_many_bring_it_back_before_the_rest_has_moved() {
    let change = |s: &mut Service| {
        s.update.parallelism = Some(1);
        s.update.delay = Some(Millis::from_secs(60));
    };
    let mut outside = second(web("1", 3, change), web("2", 3, change));
    assert_eq!(ids(&outside, 2).len(), 1);
    traffic(&mut outside, 2, 5, 5);
    wait(&mut outside, SECOND);
    outside.settle();
    assert!(
        cause(&outside).contains("while traffic moved"),
        "{}",
        cause(&outside)
    );
}

#[test]
fn a_table_with_more_than_the_step_says_is_refused() {
    let outside = second(web("1", 1, canary), web("2", 1, canary));
    for (weight, refused) in [(5, false), (6, true)] {
        let mut table = kiln_model::RoutingTable::clone(outside.world.routes.as_ref().unwrap());
        let route = table.services.get_mut(&name("web")).unwrap();
        route.split.as_mut().unwrap().weight = weight;
        let plan = Plan {
            effects: vec![Effect::Route(table)],
            ..Plan::default()
        };
        let checked = check(&outside.world, &outside.releases, &plan);
        let violation = Violation::TooMuchWeight(name("web"));
        assert_eq!(checked.err(), refused.then_some(violation), "{weight}");
    }
}
