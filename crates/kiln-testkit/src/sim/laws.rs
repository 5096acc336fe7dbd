//! What must never happen, whatever else does.

use kiln_model::{InstanceId, ServiceName};
use kiln_plan::Violation;

/// A broken law, as found by looking at the world outside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("`{0}` was served, and kiln took its last instance from traffic")]
    NobodyServes(ServiceName),
    #[error("`{0}` was ended before what it held had drained")]
    NotDrained(InstanceId),
    #[error("`{0}` was ended while traffic was still sent to it")]
    EndedWhileRouted(InstanceId),
    #[error("`{0}` was removed while it ran")]
    RemovedAlive(InstanceId),
    #[error("two instances of `{0}` wrote at once")]
    TwoWriters(ServiceName),
    #[error("a table of generation {now} was sent after one of {before}")]
    GenerationWentBack { before: u64, now: u64 },
    #[error("a request to `{0}` was lost in a replacement in which nothing went wrong")]
    RequestLost(ServiceName),
    #[error("traffic was to go to `{0}`, which never proved itself")]
    UnprovenServes(InstanceId),
    #[error("traffic was to go to `{0}` after kiln had been told of its end")]
    EndedServes(InstanceId),
    #[error("release {0} was called proven although `{1}` in it can't serve")]
    BadReleaseProven(u64, ServiceName),
    #[error("release {0} has failed and is still wanted")]
    NotTurnedBack(u64),
    #[error("`{0}` was started without being stored first")]
    NoIntent(InstanceId),
    #[error("left over when nothing was to be done any more: {0}")]
    Leak(String),
    #[error("no rest after {0}")]
    NoRest(String),
    #[error("not where it should be: {0}")]
    WrongEnd(String),
    #[error("`{0}` was drained although it was to be kept ready until the verdict")]
    NotKeptWarm(InstanceId),
    #[error("release {0} failed after the switch and did not return")]
    NotReturned(u64),
    #[error("the new instances of `{0}` got more of its traffic than their step says")]
    TooMuchWeight(ServiceName),
    #[error("`{0}` serves for longer than it may")]
    TooOld(InstanceId),
    #[error("how release {0} ended was not recorded")]
    NotRecorded(u64),
    #[error("the planner made an unlawful plan: {0}")]
    Unlawful(#[from] Violation),
    #[error("the simulator itself failed: {0}")]
    Simulator(String),
}

/// A bug put in on purpose, to see that it is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Says "drained" at once.
    SkipDrain,
    /// Stops where it should drain, and says that it drained.
    StopInsteadOfDrain,
    /// Says "exited" without ending an exclusive instance.
    SecondWriter,
    /// Says "exited" without ending any other.
    SayExited,
    /// Sends every fourth table without the backends of its last service.
    LoseBackends,
    /// Sends old generations.
    OldGeneration,
    /// Says "removed" without removing, and never finds what is left.
    ForgetToRemove,
    /// Serves where callers should be parked.
    NoParking,
    /// Never tells that an instance is ready.
    SwallowReady,
    /// Never records how a rollout ended.
    ForgetOutcome,
    /// Says "stored" without storing.
    LyingDisk,
    /// Says "ready" of what has only just begun.
    EagerReady,
    /// Never tells the planner's memory that an instance has ended.
    SwallowEnd,
    /// The proxy goes on using what was taken from its table.
    StaleBackends,
    /// The proxy uses one instance fewer than the table has.
    OneFewer,
    /// The proxy forgets callers who wait.
    LoseParked,
    /// Records failed releases as proven.
    CallItProven,
    /// The goal does not turn back when a release fails.
    KeepFailed,
    /// The time after a switch is over as soon as it has begun.
    NoWatch,
    /// After a switch nothing is known to be kept ready.
    NothingWarm,
    /// Instances never get older.
    NoAge,
    /// The new instances get twice the part that their step says.
    HeavyCanary,
    /// The proxy does not know of parts.
    IgnoreSplit,
    /// The proxy does not count failures.
    CountNoFailure,
    /// A canary's step never gets older.
    EndlessStep,
}
