//! A bounded number of simulated runs in every test run (`cargo xtask simulate` makes any
//! number), and proof that each law can be seen broken.

#![allow(clippy::unwrap_used, clippy::panic)]

use kiln_testkit::sim::{Broken, Plant, Summary, simulate};

/// Seeds of every test run, and of CI's, which lasts about two minutes: two and a half
/// million steps.
fn seeds() -> u64 {
    match std::env::var_os("KILN_TEST_STRICT").is_some() {
        true => 3_000,
        false => 40,
    }
}

#[test]
fn faults_break_no_law() {
    let mut sum = Summary::default();
    let seeds = seeds();
    for seed in 1..=seeds {
        match simulate(seed, None) {
            Ok(summary) => sum.add(&summary),
            Err(failure) => {
                let trace = failure.trace.join("\n");
                panic!(
                    "{trace}\nseed {seed}, step {}: {}",
                    failure.steps, failure.broken
                );
            }
        }
    }
    // A simulator in which nothing happens finds nothing.
    assert!(
        sum.proven > seeds && sum.failed > seeds && sum.faults > seeds,
        "{sum:?}"
    );
    assert!(sum.answered > sum.requests / 2, "{sum:?}");
}

/// Programs that take long to start, one copy after the other, under many callers.
#[test]
fn many_callers_do_not_count_as_unrest() {
    simulate(852, None).unwrap();
}

/// A copy too old is being drained when the next release is wanted.
#[test]
fn who_is_leaving_need_not_be_kept() {
    simulate(8761, None).unwrap();
}

#[test]
fn equal_seeds_give_equal_runs() {
    assert_eq!(simulate(3, None).unwrap(), simulate(3, None).unwrap());
}

/// A planted bug breaks this law in one of a few seeds; in others it may break another.
fn caught(plant: Plant, law: fn(&Broken) -> bool) {
    let broken = (1..=30).filter_map(|seed| Some(simulate(seed, Some(plant)).err()?.broken));
    let mut others = Vec::new();
    for broken in broken {
        if law(&broken) {
            return;
        }
        others.push(broken.to_string());
    }
    panic!("{plant:?} was not caught: {others:?}");
}

macro_rules! is_caught {
    ($($name:ident: $plant:ident as $law:pat,)*) => {$(
        #[test]
        fn $name() {
            caught(Plant::$plant, |broken| matches!(broken, $law));
        }
    )*};
}

is_caught! {
    a_skipped_drain: SkipDrain as Broken::NotDrained(_),
    a_stop_instead_of_a_drain: StopInsteadOfDrain as Broken::NotDrained(_),
    a_second_writer: SecondWriter as Broken::TwoWriters(_),
    an_end_that_is_none: SayExited as Broken::RemovedAlive(_),
    lost_backends: LoseBackends as Broken::NobodyServes(_),
    an_old_generation: OldGeneration as Broken::GenerationWentBack { .. },
    a_forgotten_instance: ForgetToRemove as Broken::Leak(_),
    callers_who_are_not_parked: NoParking as Broken::NobodyServes(_),
    an_instance_that_is_never_ready: SwallowReady as Broken::NoRest(_),
    a_forgotten_outcome: ForgetOutcome as Broken::NotRecorded(_),
    a_disk_that_lies: LyingDisk as Broken::NoIntent(_),
    traffic_to_the_unproven: EagerReady as Broken::UnprovenServes(_),
    traffic_to_the_ended: SwallowEnd as Broken::EndedServes(_),
    an_end_under_traffic: StaleBackends as Broken::EndedWhileRouted(_),
    an_instance_without_traffic: OneFewer as Broken::WrongEnd(_),
    forgotten_callers: LoseParked as Broken::RequestLost(_),
    a_bad_release_called_proven: CallItProven as Broken::BadReleaseProven(..),
    a_failed_release_that_stays: KeepFailed as Broken::NotTurnedBack(_),
    an_unwatched_release: NoWatch as Broken::NotReturned(_),
    old_instances_that_go_too_soon: NothingWarm as Broken::NotKeptWarm(_),
    instances_that_stay_for_ever: NoAge as Broken::TooOld(_),
    a_canary_with_too_much_weight: HeavyCanary as Broken::TooMuchWeight(_),
    a_proxy_that_splits_nothing: IgnoreSplit as Broken::TooMuchWeight(_),
    failures_that_nobody_counts: CountNoFailure as Broken::NotReturned(_),
    a_step_that_never_ends: EndlessStep as Broken::NoRest(_),
}
