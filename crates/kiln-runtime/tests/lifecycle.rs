//! Starting, ending, observing and removing real instances.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Fixture, can_run, until};
use kiln_model::Millis;
use kiln_model::instance::*;

#[test]
fn a_program_runs_to_its_end_with_its_output_and_exit_code() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(f.layered(), "echo $GREETING; echo oops >&2; exit 3");
    let (status, out) = f.run(&spec);
    assert_eq!(status, ExitStatus::Code(3), "{out}");
    assert!(out.contains("hello\n") && out.contains("E:oops\n"), "{out}");
    assert!(f.runtime.observe(&spec.id).is_none());
}

#[test]
fn a_sealed_instance_is_observed_stopped_and_removed() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let spec = f.spec(
        f.sealed(&[]),
        "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done",
    );
    let began = std::time::Instant::now();
    let started = f.runtime.start(&spec).unwrap();
    eprintln!("started in {:?}", began.elapsed());
    assert_eq!(
        f.runtime.start(&spec).unwrap(),
        started,
        "the same spec again"
    );
    let observed = f.runtime.observe(&spec.id).unwrap();
    assert_eq!(
        observed.state,
        ObservedState::Running {
            pid: started.pid,
            since: started.since
        }
    );
    until("output", || f.log_text(&spec.id).contains("up"));
    assert!(f.runtime.seal_state(&spec.id).unwrap().read_only);
    assert_eq!(
        f.runtime.stop(&spec.id, "TERM", Millis(5000)).unwrap(),
        ExitStatus::Code(7)
    );
    assert!(f.log_text(&spec.id).contains("bye"));
    f.runtime.remove(&spec.id).unwrap();
    f.runtime.remove(&spec.id).unwrap();
    assert!(f.runtime.observe(&spec.id).is_none());
}
