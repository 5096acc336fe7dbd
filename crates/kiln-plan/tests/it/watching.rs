//! What the file says of how traffic moves, and of the time after it has moved.

use kiln_model::instance::ExitStatus;
use kiln_model::spec::*;
use kiln_model::*;
use kiln_plan::{Conclusion, Effect, Event, Goal, Phase, RolloutState};

use crate::support::{Outside, name, only, released, revision, shop};

/// One service `web` with as many copies.
pub fn web(version: &str, replicas: u32, change: impl FnOnce(&mut Service)) -> Release {
    let mut release = shop(version);
    let web = released(&format!("web {version}"), |s| {
        s.replicas = replicas;
        s.restart = RestartPolicy::Always;
        change(s);
    });
    release.services = [(name("web"), web)].into();
    release
}

fn monitor(seconds: u64) -> impl Fn(&mut Service) {
    move |s| s.update.monitor = Some(Millis::from_secs(seconds))
}

pub fn ids(outside: &Outside, number: u64) -> Vec<InstanceId> {
    let of = outside.world.instances.iter();
    of.filter(|(_, i)| i.release == ReleaseNumber(number))
        .map(|(id, _)| id.clone())
        .collect()
}

pub fn routed(outside: &Outside) -> Vec<InstanceId> {
    let table = outside.world.routes.as_ref().unwrap();
    let backends = &table.services[&name("web")].backends;
    backends.iter().map(|b| b.instance.clone()).collect()
}

pub fn crash(outside: &mut Outside, id: &InstanceId) {
    outside.running.remove(id);
    let status = ExitStatus::Code(3);
    let id = id.clone();
    outside.happened(Event::Exited { id, status });
}

pub fn proven(number: u64) -> Conclusion {
    let release = ReleaseNumber(number);
    Conclusion::Proven { release }
}

/// Release 1, then this one until nothing is left to do at once.
pub fn second(first: Release, second: Release) -> Outside {
    let mut outside = Outside::new(7);
    outside.up(1, first);
    outside.settle();
    outside.up(2, second);
    outside.carry_all_out();
    outside
}

pub fn wait(outside: &mut Outside, millis: u64) {
    outside.now += millis;
    outside.happened(Event::Tick);
    outside.carry_all_out();
}

#[test]
fn until_the_verdict_the_old_ones_are_ready_without_traffic() {
    let mut outside = second(web("1", 3, monitor(30)), web("2", 3, monitor(30)));
    assert_eq!(outside.concluded, [proven(1)]);
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    assert_eq!((old.len(), routed(&outside)), (3, new));
    let ready = |id| outside.world.instances.get(id).unwrap().phase.ready();
    assert!(old.iter().all(ready));
    wait(&mut outside, 29_000);
    assert_eq!((outside.concluded.len(), ids(&outside, 1).len()), (1, 3));
    wait(&mut outside, 2_000);
    assert_eq!(outside.concluded, [proven(1), proven(2)]);
    assert_eq!(ids(&outside, 1), []);
}

#[test]
fn a_failure_before_the_verdict_returns_with_one_table_to_the_same_instances() {
    let mut outside = second(web("1", 3, monitor(30)), web("2", 3, monitor(30)));
    let (old, new) = (ids(&outside, 1), ids(&outside, 2));
    let started = outside.started.len();
    let tables = outside.world.generation;
    wait(&mut outside, 5_000);
    crash(&mut outside, &new[1]);
    let Some(Effect::Route(table)) = outside.pending.first() else {
        panic!("{:?}", outside.pending);
    };
    assert_eq!(table.generation, tables.next());
    let backends = &table.services[&name("web")].backends;
    assert!(backends.iter().map(|b| &b.instance).eq(&old));
    outside.settle();
    assert_eq!(routed(&outside), old);
    assert_eq!((outside.started.len(), ids(&outside, 2)), (started, vec![]));
    let Conclusion::Failed {
        release,
        cause,
        instance,
        back,
    } = &outside.concluded[1]
    else {
        panic!("{:?}", outside.concluded);
    };
    assert_eq!((release.0, back.unwrap().0), (2, 1));
    assert_eq!(instance.as_ref(), Some(&new[1]));
    assert!(cause.contains("web") && cause.contains("code 3"), "{cause}");
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn without_a_word_the_old_ones_go_at_once_and_a_failure_starts_them_anew() {
    for (after, returns) in [(5_000, true), (11_000, false)] {
        let mut outside = second(web("1", 2, |_| ()), web("2", 2, |_| ()));
        assert_eq!(outside.concluded, [proven(1), proven(2)]);
        assert_eq!(ids(&outside, 1), []);
        wait(&mut outside, after);
        let failing = ids(&outside, 2)[0].clone();
        crash(&mut outside, &failing);
        outside.settle();
        let serves = if returns { "1" } else { "2" };
        let expected = vec![revision(&web(serves, 2, |_| ()), "web"); 2];
        assert_eq!(outside.serving("web"), expected);
        assert_eq!(outside.concluded.len(), if returns { 3 } else { 2 });
        assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
    }
}

#[test]
fn sickness_counts_as_failure_and_what_did_its_work_does_not() {
    let mut outside = second(web("1", 1, monitor(30)), web("2", 1, monitor(30)));
    let id = ids(&outside, 2)[0].clone();
    let reason = "hangs".to_owned();
    outside.happened(Event::Unhealthy { id, reason });
    outside.settle();
    assert!(
        matches!(&outside.concluded[1], Conclusion::Failed { cause, .. }
        if cause.contains("hangs"))
    );

    let task = |version: &str| {
        let mut release = web(version, 1, |s| {
            s.restart = RestartPolicy::No;
            s.update.monitor = Some(Millis::from_secs(30));
        });
        let task = release.services.get_mut(&name("web")).unwrap();
        task.listens.clear();
        release
    };
    let mut outside = second(task("1"), task("2"));
    let id = ids(&outside, 2)[0].clone();
    outside.running.remove(&id);
    let status = ExitStatus::Code(0);
    outside.happened(Event::Exited { id, status });
    outside.carry_all_out();
    wait(&mut outside, 40_000);
    assert_eq!(outside.concluded[1], proven(2));
}

#[test]
fn the_time_before_a_first_release_is_proven_is_waited_for_as_well() {
    let mut outside = Outside::new(3);
    outside.up(1, web("1", 1, monitor(30)));
    outside.carry_all_out();
    assert_eq!((outside.concluded.len(), routed(&outside).len()), (0, 1));
    let id = ids(&outside, 1)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert!(matches!(
        &outside.concluded[0],
        Conclusion::Failed { back: None, .. }
    ));
    assert_eq!(outside.world.goal, Goal::Nothing);
    // Unasked for, there is nothing to return to.
    let mut outside = Outside::new(3);
    outside.up(1, web("1", 1, |_| ()));
    outside.carry_all_out();
    let id = ids(&outside, 1)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert_eq!(outside.concluded, [proven(1)]);
    assert_eq!(routed(&outside).len(), 1);
}

#[test]
fn fewer_failures_than_the_file_bears_are_borne() {
    let change = |ratio| {
        move |s: &mut Service| {
            monitor(30)(s);
            s.update.max_failure_ratio = Some(ratio);
        }
    };
    for (ratio, borne) in [(249, false), (250, true)] {
        let mut outside = second(web("1", 4, change(ratio)), web("2", 4, change(ratio)));
        let id = ids(&outside, 2)[0].clone();
        crash(&mut outside, &id);
        outside.settle();
        assert_eq!(outside.concluded[1] == proven(2), borne, "{ratio}");
    }
}

#[test]
fn a_copy_that_is_never_ready_is_borne_as_well() {
    for (ratio, borne) in [(333, false), (334, true)] {
        let release = |version: &str| web(version, 3, |s| s.update.max_failure_ratio = Some(ratio));
        let mut outside = Outside::new(5);
        outside.up(1, release("1"));
        outside.settle();
        outside.stubborn = Some(2);
        outside.up(2, release("2"));
        outside.carry_for(60);
        let expected = if borne {
            proven(2)
        } else {
            outside.concluded[1].clone()
        };
        assert_eq!(outside.concluded[1], expected, "{ratio}");
        assert_eq!(outside.concluded[1] == proven(2), borne, "{ratio}");
    }
}

#[test]
fn failure_action_continue_only_goes_on() {
    let change = |s: &mut Service| s.update.failure_action = Some(FailureAction::Continue);
    let mut outside = second(web("1", 1, change), web("2", 1, change));
    assert_eq!(outside.concluded.len(), 1, "its verdict is waited for");
    let id = ids(&outside, 2)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));
}

fn paused() -> Outside {
    let change = |s: &mut Service| s.update.failure_action = Some(FailureAction::Pause);
    let mut outside = second(web("1", 1, change), web("2", 1, change));
    let id = ids(&outside, 2)[0].clone();
    crash(&mut outside, &id);
    outside.carry_all_out();
    wait(&mut outside, 60_000);
    let rollout = outside.world.rollout.as_ref().unwrap();
    assert_eq!(rollout.state, RolloutState::Watching);
    assert!(rollout.paused.as_ref().unwrap().contains("code 3"));
    assert_eq!(outside.concluded.len(), 1);
    assert_eq!(ids(&outside, 1).len(), 1, "the old one is still ready");
    outside
}

#[test]
fn failure_action_pause_waits_for_somebody() {
    let mut outside = paused();
    outside.happened(Event::Resumed);
    outside.carry_all_out();
    assert_eq!(outside.concluded.len(), 1, "its time begins anew");
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));

    let mut outside = paused();
    outside.happened(Event::Promoted);
    outside.carry_all_out();
    assert_eq!(outside.concluded[1], proven(2));
    assert_eq!(ids(&outside, 1), []);

    let mut outside = paused();
    let old = ids(&outside, 1);
    outside.happened(Event::Abandoned { why: "bad".into() });
    outside.carry_all_out();
    assert!(matches!(&outside.concluded[1], Conclusion::Failed { .. }));
    assert_eq!(routed(&outside), old);
}

#[test]
fn a_pause_before_the_switch_keeps_traffic_where_it_is() {
    let mut outside = Outside::new(7);
    outside.up(1, web("1", 2, |_| ()));
    outside.settle();
    let old = routed(&outside);
    outside.up(2, web("2", 2, |_| ()));
    outside.happened(Event::Paused {
        why: "asked".into(),
    });
    outside.carry_all_out();
    wait(&mut outside, 60_000);
    assert_eq!(routed(&outside), old);
    assert_eq!(outside.concluded.len(), 1);
    outside.happened(Event::Resumed);
    outside.settle();
    assert_eq!(outside.concluded[1], proven(2));
    assert!(routed(&outside).iter().all(|id| !old.contains(id)));
}

#[test]
fn a_single_writer_is_handed_back() {
    let writer = |version: &str| {
        web(version, 1, |s| {
            monitor(30)(s);
            s.kiln.exclusive = Some(true);
        })
    };
    let mut outside = second(writer("1"), writer("2"));
    assert_eq!(ids(&outside, 1), [], "two writers must not be");
    let id = ids(&outside, 2)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert!(matches!(&outside.concluded[1], Conclusion::Failed { .. }));
    only(&outside, "web");
    assert_eq!(outside.serving("web"), [revision(&writer("1"), "web")]);
    assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
}

#[test]
fn a_rollback_while_the_old_ones_are_warm_starts_nothing() {
    let warm = |s: &mut Service| {
        s.kiln.rollout = Some(RolloutOptions {
            strategy: Some(Strategy::BlueGreen),
            keep_warm: Some(Millis::from_secs(600)),
            ..RolloutOptions::default()
        });
    };
    let mut outside = second(web("1", 2, warm), web("2", 2, warm));
    assert_eq!(outside.concluded, [proven(1), proven(2)]);
    wait(&mut outside, 500_000);
    let old = ids(&outside, 1);
    assert_eq!(old.len(), 2);
    let started = outside.started.len();
    outside.roll_back(3, web("1", 2, warm));
    outside.carry_all_out();
    assert_eq!((routed(&outside), outside.started.len()), (old, started));
    // Who was left is kept in turn, until its time is over.
    assert_eq!(ids(&outside, 2).len(), 2);
    wait(&mut outside, 601_000);
    assert_eq!(ids(&outside, 2), []);
}

#[test]
fn what_was_warm_gets_no_traffic_when_the_next_release_comes() {
    let warm = |s: &mut Service| {
        s.kiln.rollout = Some(RolloutOptions {
            keep_warm: Some(Millis::from_secs(600)),
            ..RolloutOptions::default()
        });
    };
    let mut outside = second(web("1", 2, warm), web("2", 2, warm));
    let serving = routed(&outside);
    assert_eq!(ids(&outside, 1).len(), 2);
    outside.up(3, web("3", 2, warm));
    while ids(&outside, 3)
        .iter()
        .any(|id| !outside.world.instances.get(id).unwrap().phase.ready())
    {
        assert_eq!(routed(&outside), serving);
        outside.carry_one_out();
    }
    outside.carry_all_out();
    assert_eq!(ids(&outside, 1), []);
    assert_eq!(ids(&outside, 2).len(), 2, "it is their turn to be warm");
}

#[test]
fn who_goes_back_by_hand_is_not_sent_forward_again() {
    let mut outside = second(web("1", 1, |_| ()), web("2", 1, |_| ()));
    outside.roll_back(3, web("1", 1, |_| ()));
    outside.carry_all_out();
    let id = ids(&outside, 3)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert_eq!(outside.concluded.last(), Some(&proven(3)));
    assert_eq!(outside.world.goal, Goal::Release(ReleaseNumber(3)));
}

/// The most and the fewest instances that were alive, and the fewest that served, on the
/// way.
fn extent(outside: &mut Outside) -> (usize, usize) {
    let (mut most, mut fewest) = (0, usize::MAX);
    while !outside.pending.is_empty() {
        let alive = outside.world.instances.values().filter(|i| i.phase.alive());
        most = most.max(alive.count());
        fewest = fewest.min(routed(outside).len());
        outside.carry_one_out();
    }
    (most, fewest)
}

#[test]
fn stop_first_makes_room_a_batch_at_a_time() {
    for (parallelism, fewest) in [(Some(1), 2), (Some(2), 1), (None, 0)] {
        for seed in 1..30 {
            let change = |s: &mut Service| {
                s.update.order = Some(Order::StopFirst);
                s.update.parallelism = parallelism;
            };
            let mut outside = Outside::new(seed);
            outside.up(1, web("1", 3, change));
            outside.settle();
            outside.up(2, web("2", 3, change));
            assert_eq!(extent(&mut outside), (3, fewest), "{parallelism:?}");
            outside.settle();
            assert_eq!(outside.concluded[1], proven(2));
            assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
        }
    }
}

#[test]
fn strategies_say_how_many_move_at_once() {
    for (strategy, most, fewest) in [
        (Strategy::Rolling, 4, 3),
        (Strategy::BlueGreen, 6, 3),
        (Strategy::Recreate, 3, 0),
    ] {
        let change = |s: &mut Service| {
            s.kiln.rollout = Some(RolloutOptions {
                strategy: Some(strategy.clone()),
                ..RolloutOptions::default()
            });
        };
        for seed in 1..30 {
            let mut outside = Outside::new(seed);
            outside.up(1, web("1", 3, change));
            outside.settle();
            outside.up(2, web("2", 3, change));
            let (alive, served) = extent(&mut outside);
            // Those on their way out may still be there.
            assert!(
                alive >= most && (most == 4 || alive == most),
                "{strategy:?} {alive}"
            );
            assert_eq!(served, fewest, "{strategy:?}");
            outside.settle();
            assert_eq!(outside.concluded[1], proven(2));
            assert!(outside.gaps.is_empty(), "{:?}", outside.gaps);
        }
    }
}

#[test]
fn rollback_config_says_how_to_go_back() {
    let change = |s: &mut Service| {
        s.rollback = Some(UpdateConfig {
            parallelism: Some(1),
            order: Some(Order::StopFirst),
            monitor: Some(Millis::from_secs(20)),
            ..UpdateConfig::default()
        });
    };
    let mut outside = Outside::new(9);
    outside.up(1, web("1", 3, change));
    outside.settle();
    outside.up(2, web("2", 3, change));
    assert_eq!(extent(&mut outside), (6, 3), "all at once");
    outside.settle();
    outside.roll_back(3, web("1", 3, change));
    assert_eq!(extent(&mut outside), (3, 2), "one after the other");
    assert_eq!(outside.concluded.len(), 2, "its own verdict is waited for");
    let id = ids(&outside, 3)[0].clone();
    crash(&mut outside, &id);
    outside.settle();
    assert!(
        matches!(&outside.concluded[2], Conclusion::Failed { release, .. }
        if release.0 == 3)
    );
}

#[test]
fn a_crash_of_the_caller_does_not_end_the_watch() {
    let mut outside = second(web("1", 2, monitor(30)), web("2", 2, monitor(30)));
    let old = ids(&outside, 1);
    outside.crash();
    outside.carry_all_out();
    assert_eq!(ids(&outside, 1), old);
    let new = ids(&outside, 2);
    assert!(new.iter().all(|id| matches!(
        outside.world.instances.get(id).unwrap().phase,
        Phase::Ready { .. }
    )));
    crash(&mut outside, &new[0]);
    outside.settle();
    assert_eq!(routed(&outside), old);
    let stops = |e: &&Effect| matches!(e, Effect::Stop { .. });
    assert_eq!(outside.pending.iter().filter(stops).count(), 0);
}
