//! `snapshots`: copies of volumes, and what a rollback has to say about data.

use kiln_daemon::api::types::ReleaseAnswer;
use kiln_daemon::snapshots::{Snapshot, Why};
use kiln_model::{EnvironmentName, ReleaseNumber};

use crate::cli::SnapshotsCommand;
use crate::context::{Context, who};
use crate::failure::Failure;
use crate::output;
use crate::progress::human_bytes;

pub async fn snapshots(context: &Context, command: &SnapshotsCommand) -> Result<(), Failure> {
    match command {
        SnapshotsCommand::List => list(context).await,
        SnapshotsCommand::Restore { volume, number } => {
            let client = &context.client;
            let before = client.restore_snapshot(volume, *number, &who()).await?;
            if context.json {
                return output::json(&before);
            }
            outln!(
                "the volume `{volume}` is as it was in snapshot {number}; what it had is \
                 snapshot {}",
                before.number
            );
            Ok(())
        }
        SnapshotsCommand::Remove { volume, number } => {
            let client = &context.client;
            Ok(client.remove_snapshot(volume, *number, &who()).await?)
        }
    }
}

async fn list(context: &Context) -> Result<(), Failure> {
    let all = context.client.snapshots().await?;
    if context.json {
        return output::json(&all);
    }
    let row = |s: &Snapshot| {
        let why = match &s.why {
            Why::Release {
                environment,
                service,
                release,
                ..
            } => format!("before {service} of {environment}'s release {release}"),
            Why::Replaced { by } => format!("before snapshot {by} was restored"),
        };
        let size = s.bytes.map_or("-".into(), human_bytes);
        let taken = output::time(s.taken.0);
        vec![s.volume.to_string(), s.number.to_string(), taken, size, why]
    };
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    output::table(&["VOLUME", "SNAPSHOT", "TAKEN", "SIZE", "WHY"], &rows);
    Ok(())
}

/// A rollback brings code back, not data: says where data has moved on, and the way back.
pub async fn moved_on(
    context: &Context,
    environment: &EnvironmentName,
    answer: &ReleaseAnswer,
) -> Result<(), Failure> {
    let releases = context.client.releases(environment).await?;
    let earlier = releases.iter().filter(|r| r.number < answer.number);
    let same = earlier.filter(|r| r.digest == answer.digest);
    let Some(to) = same.map(|r| r.number).max() else {
        return Ok(());
    };
    let mut all = context.client.snapshots().await?;
    // Its own, of how it found the data, is no way further back.
    all.retain(|s| !matches!(s.why, Why::Release { release, .. } if release >= answer.number));
    for snapshot in oldest_after(&all, environment, to) {
        if let Why::Release { release, .. } = &snapshot.why {
            let (volume, number) = (&snapshot.volume, snapshot.number);
            errln!(
                "warning: data in the volume `{volume}` has moved past release {to}: release \
                 {release} has had it. As it was before: kiln down, kiln snapshots restore \
                 {volume} {number}, kiln rollback {to}"
            );
        }
    }
    Ok(())
}

/// Of each volume, what comes nearest to how the release `to` left it.
fn oldest_after<'a>(
    all: &'a [Snapshot],
    environment: &EnvironmentName,
    to: ReleaseNumber,
) -> Vec<&'a Snapshot> {
    let mut found: Vec<&Snapshot> = Vec::new();
    for snapshot in all {
        let after = matches!(&snapshot.why, Why::Release { environment: e, release, .. }
            if e == environment && *release > to);
        if after && found.last().is_none_or(|f| f.volume != snapshot.volume) {
            found.push(snapshot);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::Millis;

    fn snapshot(volume: &str, number: u32, release: u64) -> Snapshot {
        Snapshot {
            format: 1,
            volume: volume.parse().unwrap(),
            number,
            taken: Millis(1),
            bytes: Some(1),
            why: Why::Release {
                environment: "shop".parse().unwrap(),
                service: "migrate".parse().unwrap(),
                release: ReleaseNumber(release),
                rollout: Millis(release),
            },
        }
    }

    #[test]
    fn the_oldest_snapshot_after_the_release_is_offered_for_each_volume() {
        let mut all = vec![
            snapshot("a", 1, 2),
            snapshot("a", 2, 3),
            snapshot("a", 3, 4),
        ];
        all.push(Snapshot {
            why: Why::Replaced { by: 1 },
            ..snapshot("b", 1, 9)
        });
        all.push(snapshot("b", 2, 5));
        let offered = |to| {
            let environment = "shop".parse().unwrap();
            let found = oldest_after(&all, &environment, ReleaseNumber(to));
            let name = |s: &&Snapshot| format!("{}{}", s.volume, s.number);
            found.iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(offered(2), ["a2", "b2"]);
        assert_eq!(offered(4), ["b2"]);
        assert_eq!(offered(5), [""; 0]);
        let other = "other".parse().unwrap();
        assert!(oldest_after(&all, &other, ReleaseNumber(1)).is_empty());
    }
}
