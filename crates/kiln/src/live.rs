//! The live view of a rollout, on a terminal: old and new instances side by side, with
//! health, their share of the traffic, and what they still hold.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_daemon::api::types::{EnvironmentStatus, InstanceStatus, ServiceStatus};
use kiln_model::{EnvironmentName, InstanceId};
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::progress::Form;
use crate::steer;
use crate::terminal::{Block, size};

/// How often it is drawn.
const TICK: Duration = Duration::from_millis(200);
/// What a share of the traffic is taken over.
const WINDOW: Duration = Duration::from_secs(1);
/// Lines that are left to what scrolls.
const LEFT_FREE: usize = 4;

pub struct Live {
    picture: Arc<Mutex<Picture>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Picture {
    block: Block,
    rows: Vec<String>,
}

impl Live {
    /// `None` where standard error is no terminal, or another form was asked for.
    pub fn begin(context: &Context, environment: &EnvironmentName) -> Option<Self> {
        let wanted = context.shown.form == Form::Auto && !context.json;
        if !wanted || !std::io::stderr().is_terminal() {
            return None;
        }
        let picture = Arc::<Mutex<Picture>>::default();
        let (client, name, shown) = (context.client.clone(), environment.clone(), picture.clone());
        let task = tokio::spawn(async move {
            let mut shares = Shares::default();
            loop {
                // Without an answer the last picture stays: who follows the events says why.
                if let Ok(status) = client.brief(&name).await {
                    shares.take(&status, Instant::now());
                    let (width, height) = size();
                    let rows = rows(&status, &shares, width, height.saturating_sub(LEFT_FREE));
                    lock(&shown).show(rows);
                }
                tokio::time::sleep(TICK).await;
            }
        });
        Some(Self { picture, task })
    }

    /// Above the picture.
    pub fn line(&self, text: &str) {
        let mut picture = lock(&self.picture);
        let Picture { block, rows } = &mut *picture;
        block.draw(Some(text), rows);
    }
}

/// The picture goes; what it led to is said in words.
impl Drop for Live {
    fn drop(&mut self) {
        self.task.abort();
        lock(&self.picture).show(Vec::new());
    }
}

fn lock(picture: &Mutex<Picture>) -> std::sync::MutexGuard<'_, Picture> {
    picture.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Picture {
    fn show(&mut self, rows: Vec<String>) {
        self.rows = rows;
        self.block.draw(None, &self.rows);
    }
}

/// Who got how much of its service's traffic, measured rather than planned.
#[derive(Default)]
struct Shares {
    since: Option<Instant>,
    served: BTreeMap<InstanceId, u64>,
    percent: BTreeMap<InstanceId, u64>,
}

impl Shares {
    fn take(&mut self, status: &EnvironmentStatus, now: Instant) {
        if self.since.is_some_and(|since| now - since < WINDOW) {
            return;
        }
        let first = self.since.is_none();
        self.since = Some(now);
        self.percent.clear();
        for service in &status.services {
            let of = |i: &InstanceStatus| i.traffic.map_or(0, |t| t.served);
            let fresh: Vec<u64> = service
                .instances
                .iter()
                .map(|i| of(i).saturating_sub(self.served.get(&i.id).copied().unwrap_or(0)))
                .collect();
            let all: u64 = fresh.iter().sum();
            for (instance, fresh) in service.instances.iter().zip(fresh) {
                self.served.insert(instance.id.clone(), of(instance));
                if let Some(percent) = fresh.saturating_mul(100).checked_div(all)
                    && !first
                {
                    self.percent.insert(instance.id.clone(), percent);
                }
            }
        }
    }
}

/// At most `height` rows of `width` columns; none where nothing moves.
fn rows(status: &EnvironmentStatus, shares: &Shares, width: usize, height: usize) -> Vec<String> {
    let services: Vec<&ServiceStatus> = status.services.iter().filter(|s| moves(s)).collect();
    let Some(longest) = services.iter().map(|s| s.service.as_str().len()).max() else {
        return Vec::new();
    };
    let name = longest.max("SERVICE".len());
    let any_old = services
        .iter()
        .any(|s| s.instances.iter().any(|i| !i.current));
    let room = width.saturating_sub(name + 1);
    let cell = if any_old {
        room.saturating_sub(4) / 2
    } else {
        room.saturating_sub(2)
    };
    let row = |head: &str, old: &str, new: &str| {
        let old = if any_old {
            format!("  {old:<cell$.cell$}")
        } else {
            String::new()
        };
        format!("{head:<name$}{old}  {new:.cell$}")
            .trim_end()
            .to_owned()
    };
    let rollout = status.rollout.as_ref();
    let from = rollout.and_then(|r| r.from);
    let to = rollout.and_then(|r| r.to).or(status.goal);
    let heads = [from, to].map(|n| steer::release(n).to_uppercase());
    let mut all = vec![row("SERVICE", &heads[0], &heads[1])];
    for service in services {
        let (new, old): (Vec<_>, Vec<_>) = service.instances.iter().partition(|i| i.current);
        for n in 0..new.len().max(old.len()) {
            let head = if n == 0 { service.service.as_str() } else { "" };
            let text = |of: &[&InstanceStatus]| {
                of.get(n).map_or_else(String::new, |i| describe(i, shares))
            };
            all.push(row(head, &text(&old), &text(&new)));
        }
    }
    if all.len() > height {
        let more = all.len() - height + 1;
        all.truncate(height.saturating_sub(1));
        all.push(format!("… and {more} more rows; kiln status shows all"));
    }
    all
}

/// Instances come or go.
fn moves(service: &ServiceStatus) -> bool {
    let settled = |i: &InstanceStatus| i.current && i.phase == "ready";
    !service.instances.iter().all(settled)
}

fn describe(instance: &InstanceStatus, shares: &Shares) -> String {
    let mark = if instance.serving { '●' } else { '○' };
    let mut text = format!("{mark} {} {}", instance.id, instance.phase);
    let ill = instance.health.starts_with("unhealthy");
    if ill || (instance.phase == "ready" && instance.health == "healthy") {
        text.push_str(", ");
        text.push_str(instance.health.split(':').next().unwrap_or_default());
    }
    if let Some(percent) = shares.percent.get(&instance.id) {
        text.push_str(&format!(", {percent} %"));
    }
    let held = instance.traffic.map_or(0, |t| t.in_flight);
    if instance.phase == "draining" || held > 0 {
        text.push_str(&format!(", {held} in flight"));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kiln_daemon::api::types::Traffic;
    use kiln_model::ReleaseNumber;

    use super::*;

    fn instance(id: &str, current: bool, phase: &str, served: u64) -> InstanceStatus {
        InstanceStatus {
            id: id.parse().unwrap(),
            release: ReleaseNumber(if current { 2 } else { 1 }),
            current,
            phase: phase.into(),
            health: "unknown".into(),
            serving: phase == "ready",
            traffic: Some(Traffic {
                served,
                in_flight: 2,
            }),
            since: 0,
            pid: None,
            sealed: true,
            tainted: false,
            drift: vec![],
            warnings: vec![],
        }
    }

    fn status(instances: Vec<InstanceStatus>) -> EnvironmentStatus {
        EnvironmentStatus {
            environment: "shop".parse().unwrap(),
            goal: Some(ReleaseNumber(2)),
            proven: Some(ReleaseNumber(1)),
            serving: Some(ReleaseNumber(1)),
            rollout: None,
            watch: None,
            services: vec![ServiceStatus {
                service: "web".parse().unwrap(),
                state: "serving".into(),
                image: String::new(),
                ports: vec![],
                instances,
            }],
            problem: None,
        }
    }

    #[test]
    fn old_and_new_stand_side_by_side_with_their_measured_shares() {
        let mut shares = Shares::default();
        let start = Instant::now();
        let at = |old, new| {
            status(vec![
                instance("shop-web-1", false, "draining", old),
                instance("shop-web-2", true, "ready", new),
            ])
        };
        shares.take(&at(1000, 0), start);
        let drawn = rows(&at(1000, 0), &shares, 100, 10);
        assert!(
            !drawn[1].contains('%'),
            "nothing is measured yet: {drawn:?}"
        );
        shares.take(&at(1010, 30), start + WINDOW);
        let drawn = rows(&at(1010, 30), &shares, 100, 10);
        assert_eq!(drawn.len(), 2);
        assert!(drawn[0].contains("RELEASE 2"), "{drawn:?}");
        let (old, new) = drawn[1].split_once("shop-web-2").unwrap();
        assert!(
            old.contains("shop-web-1 draining, 25 %, 2 in flight"),
            "{old}"
        );
        assert!(new.contains("ready, 75 %"), "{new}");
    }

    #[test]
    fn it_stays_within_the_terminal_and_away_where_nothing_moves() {
        let many = (0..30).map(|n| instance(&format!("shop-web-{n}"), n > 9, "warming", 0));
        let drawn = rows(&status(many.collect()), &Shares::default(), 60, 8);
        assert_eq!(drawn.len(), 8);
        assert!(
            drawn.iter().all(|row| row.chars().count() <= 60),
            "{drawn:?}"
        );
        assert!(drawn[7].contains("14 more rows"), "{drawn:?}");
        let settled = status(vec![instance("shop-web-1", true, "ready", 0)]);
        assert_eq!(
            rows(&settled, &Shares::default(), 60, 8),
            Vec::<String>::new()
        );
    }
}
