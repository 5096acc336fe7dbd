//! For tests: the daemon dies, as by `kill -9`, where `KILN_CRASH_AT` says.
//! `before-start` is right before the first start of an instance, `after-route:2` right
//! after the second routing table was applied and before that is known. The points are
//! around every effect (networks, start, route, measure, query, drain, stop, remove,
//! conclude), around
//! storing a world (save) and around storing a release (release).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_plan::EffectKey;

struct Wanted {
    point: String,
    /// Passings left, this one included.
    left: AtomicU32,
}

/// Does not return from the point that is wanted.
pub fn point(when: &str, what: &str) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    let Some(wanted) = WANTED.get_or_init(wanted) else {
        return;
    };
    if wanted.point.split_once('-') == Some((when, what))
        && wanted.left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        tracing::error!(point = wanted.point, "dying as KILN_CRASH_AT asks");
        std::process::abort();
    }
}

fn wanted() -> Option<Wanted> {
    let text = std::env::var("KILN_CRASH_AT").ok()?;
    let (point, count) = text.split_once(':').unwrap_or((&text, "1"));
    Some(Wanted {
        point: point.to_owned(),
        left: AtomicU32::new(count.parse().unwrap_or(1)),
    })
}

/// The effect's name in a point.
pub fn name(key: &EffectKey) -> &'static str {
    match key {
        EffectKey::Networks => "networks",
        EffectKey::Start(_) => "start",
        EffectKey::Observe(_) => "observe",
        EffectKey::Route => "route",
        EffectKey::Measure => "measure",
        EffectKey::Query(_) => "query",
        EffectKey::Drain(_) => "drain",
        EffectKey::Stop(_) => "stop",
        EffectKey::Remove(_) => "remove",
        EffectKey::Conclude => "conclude",
    }
}
