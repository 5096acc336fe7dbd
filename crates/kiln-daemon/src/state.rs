//! What the daemon must remember: one SQLite file, `state.db`, WAL, every commit
//! durable. Everything about instances that the runtime knows better is not here.
//!
//! Tables (`user_version` 1): `environments(name, world)` – the planner's world as
//! JSON; `releases(environment, number, digest, release, record)` – append-only but
//! for a record's outcome; `events(id, environment, time, event)` – the newest
//! [`KEPT_EVENTS`]; `networks(name, network)` – those that belong to no environment.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kiln_model::network::BridgeNetwork;
use kiln_model::release::Outcome;
use kiln_model::{EnvironmentName, Release, ReleaseNumber, ReleaseRecord};
use kiln_plan::World;
use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::types::EventRecord;
use crate::crash;

/// Older events are forgotten; the audit log keeps what matters.
const KEPT_EVENTS: i64 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state database {path}: {source}")]
    Sqlite {
        path: PathBuf,
        source: rusqlite::Error,
    },
    #[error("the state database {path} holds something unreadable in {what}: {source}")]
    Json {
        path: PathBuf,
        what: &'static str,
        source: serde_json::Error,
    },
    #[error(
        "the state database {path} was written by a newer kiln (format {found}, this one knows {known}); use that kiln"
    )]
    TooNew {
        path: PathBuf,
        found: i64,
        known: i64,
    },
}

/// The daemon's memory.
pub struct State {
    path: PathBuf,
    connection: Mutex<Connection>,
}

const FORMAT: i64 = 1;

impl State {
    /// Opens `<root>/state.db`, making it if need be.
    pub fn open(root: &Path) -> Result<Self, StateError> {
        let path = root.join("state.db");
        let sqlite = |source| StateError::Sqlite {
            path: path.clone(),
            source,
        };
        let connection = Connection::open(&path).map_err(sqlite)?;
        connection
            .execute_batch(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-512;",
            )
            .map_err(sqlite)?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(sqlite)?;
        if found > FORMAT {
            return Err(StateError::TooNew {
                path,
                found,
                known: FORMAT,
            });
        }
        if found == 0 {
            connection.execute_batch(SCHEMA).map_err(sqlite)?;
        }
        connection.execute_batch(NETWORKS).map_err(sqlite)?;
        Ok(Self {
            path,
            connection: Mutex::new(connection),
        })
    }

    /// A poisoned lock only says that another thread panicked between two statements;
    /// SQLite's own transactions keep the data whole.
    fn with<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StateError> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        work(&mut connection).map_err(|source| StateError::Sqlite {
            path: self.path.clone(),
            source,
        })
    }

    pub fn environments(&self) -> Result<Vec<World>, StateError> {
        let rows = self.with(|c| {
            c.prepare("SELECT world FROM environments ORDER BY name")?
                .query_map([], |row| row.get::<_, String>(0))?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.iter()
            .map(|text| self.decode("environments", text))
            .collect()
    }

    pub fn save_world(&self, world: &World) -> Result<(), StateError> {
        let text = self.encode("environments", world)?;
        self.with(|c| {
            c.prepare_cached(
                "INSERT INTO environments(name, world) VALUES (?1, ?2)
                 ON CONFLICT(name) DO UPDATE SET world = excluded.world",
            )?
            .execute(params![world.environment.as_str(), text])
        })?;
        Ok(())
    }

    pub fn networks(&self) -> Result<Vec<BridgeNetwork>, StateError> {
        let rows = self.with(|c| {
            c.prepare("SELECT network FROM networks ORDER BY name")?
                .query_map([], |row| row.get::<_, String>(0))?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.iter()
            .map(|text| self.decode("networks", text))
            .collect()
    }

    pub fn add_network(&self, network: &BridgeNetwork) -> Result<(), StateError> {
        let text = self.encode("networks", network)?;
        self.with(|c| {
            c.execute(
                "INSERT INTO networks(name, network) VALUES (?1, ?2)",
                params![network.name, text],
            )
        })?;
        Ok(())
    }

    pub fn remove_network(&self, name: &str) -> Result<(), StateError> {
        self.with(|c| c.execute("DELETE FROM networks WHERE name = ?1", [name]))?;
        Ok(())
    }

    pub fn add_release(&self, release: &Release, record: &ReleaseRecord) -> Result<(), StateError> {
        let text = self.encode("releases", release)?;
        let line = self.encode("releases", record)?;
        self.with(|c| {
            c.execute(
                "INSERT INTO releases(environment, number, digest, release, record)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    release.environment.as_str(),
                    record.number.0 as i64,
                    record.digest.to_string(),
                    text,
                    line
                ],
            )
        })?;
        Ok(())
    }

    pub fn set_outcome(
        &self,
        environment: &EnvironmentName,
        number: ReleaseNumber,
        outcome: Outcome,
    ) -> Result<(), StateError> {
        let Some(mut record) = self
            .records(environment)?
            .into_iter()
            .find(|r| r.number == number)
        else {
            return Ok(());
        };
        record.outcome = outcome;
        let line = self.encode("releases", &record)?;
        self.with(|c| {
            c.execute(
                "UPDATE releases SET record = ?3 WHERE environment = ?1 AND number = ?2",
                params![environment.as_str(), number.0 as i64, line],
            )
        })?;
        Ok(())
    }

    /// An environment's history, oldest first.
    pub fn records(&self, environment: &EnvironmentName) -> Result<Vec<ReleaseRecord>, StateError> {
        let rows = self.with(|c| {
            c.prepare("SELECT record FROM releases WHERE environment = ?1 ORDER BY number")?
                .query_map([environment.as_str()], |row| row.get::<_, String>(0))?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.iter()
            .map(|text| self.decode("releases", text))
            .collect()
    }

    pub fn release(
        &self,
        environment: &EnvironmentName,
        number: ReleaseNumber,
    ) -> Result<Option<Release>, StateError> {
        let row = self.with(|c| {
            c.query_row(
                "SELECT release FROM releases WHERE environment = ?1 AND number = ?2",
                params![environment.as_str(), number.0 as i64],
                |row| row.get::<_, String>(0),
            )
            .optional()
        })?;
        row.map(|text| self.decode("releases", &text)).transpose()
    }

    /// Everything of an environment but what the audit log says.
    pub fn forget(&self, environment: &EnvironmentName) -> Result<(), StateError> {
        self.with(|c| {
            let all = c.transaction()?;
            for (table, key) in [
                ("environments", "name"),
                ("releases", "environment"),
                ("events", "environment"),
            ] {
                let delete = format!("DELETE FROM {table} WHERE {key} = ?1");
                all.execute(&delete, [environment.as_str()])?;
            }
            all.commit()
        })
    }

    /// Returns the event's id: greater than every earlier one's.
    pub fn add_event(&self, event: &EventRecord) -> Result<u64, StateError> {
        let text = self.encode("events", event)?;
        let id = self.with(|c| {
            c.prepare_cached("INSERT INTO events(environment, time, event) VALUES (?1, ?2, ?3)")?
                .execute(params![
                    event.environment.as_str(),
                    event.time.0 as i64,
                    text
                ])?;
            let id = c.last_insert_rowid();
            if id % 1000 == 0 {
                c.execute("DELETE FROM events WHERE id <= ?1", [id - KEPT_EVENTS])?;
            }
            Ok(id)
        })?;
        Ok(id as u64)
    }

    /// Events after `after`, oldest first, at most `limit`.
    pub fn events(
        &self,
        environment: &EnvironmentName,
        after: u64,
        limit: u32,
    ) -> Result<Vec<EventRecord>, StateError> {
        let rows = self.with(|c| {
            c.prepare(
                "SELECT id, event FROM events WHERE environment = ?1 AND id > ?2
                 ORDER BY id LIMIT ?3",
            )?
            .query_map(params![environment.as_str(), after as i64, limit], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
            })?
            .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.iter()
            .map(|(id, text)| {
                let mut event: EventRecord = self.decode("events", text)?;
                event.id = *id as u64;
                Ok(event)
            })
            .collect()
    }

    pub fn last_event(&self) -> Result<u64, StateError> {
        let id = self.with(|c| {
            c.query_row("SELECT coalesce(max(id), 0) FROM events", [], |row| {
                row.get::<_, i64>(0)
            })
        })?;
        Ok(id as u64)
    }

    fn encode<T: Serialize>(&self, what: &'static str, value: &T) -> Result<String, StateError> {
        serde_json::to_string(value).map_err(|source| StateError::Json {
            path: self.path.clone(),
            what,
            source,
        })
    }

    fn decode<T: DeserializeOwned>(&self, what: &'static str, text: &str) -> Result<T, StateError> {
        serde_json::from_slice(text.as_bytes()).map_err(|source| StateError::Json {
            path: self.path.clone(),
            what,
            source,
        })
    }
}

impl kiln_plan::Memory for State {
    fn save(&self, world: &World) -> Result<(), String> {
        crash::point("before", "save");
        let saved = self.save_world(world).map_err(|e| e.to_string());
        crash::point("after", "save");
        saved
    }

    fn release(
        &self,
        environment: &EnvironmentName,
        number: ReleaseNumber,
    ) -> Result<Option<Release>, String> {
        State::release(self, environment, number).map_err(|e| e.to_string())
    }
}

const SCHEMA: &str = "
BEGIN;
CREATE TABLE environments (name TEXT PRIMARY KEY, world TEXT NOT NULL) STRICT;
CREATE TABLE releases (
    environment TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL,
    release TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (environment, number)
) STRICT;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, environment TEXT NOT NULL, time INTEGER NOT NULL,
    event TEXT NOT NULL
) STRICT;
CREATE INDEX events_of ON events(environment, id);
PRAGMA user_version = 1;
COMMIT;
";

/// Came later than the others, and older kilns don't mind it.
const NETWORKS: &str = "CREATE TABLE IF NOT EXISTS networks (
    name TEXT PRIMARY KEY, network TEXT NOT NULL) STRICT;";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use kiln_model::Millis;

    #[test]
    fn worlds_and_events_survive_reopening() {
        let root = tempfile::tempdir().unwrap();
        let name: EnvironmentName = "shop".parse().unwrap();
        let event = EventRecord {
            id: 0,
            time: Millis(5),
            environment: name.clone(),
            service: None,
            instance: None,
            kind: crate::api::types::EventKind::Note,
            text: "hello".into(),
        };
        {
            let state = State::open(root.path()).unwrap();
            let mut world = World::new(name.clone());
            state.save_world(&world).unwrap();
            world.counter = 7;
            state.save_world(&world).unwrap();
            state.add_event(&event).unwrap();
            state.add_event(&event).unwrap();
        }
        let state = State::open(root.path()).unwrap();
        assert_eq!(state.environments().unwrap()[0].counter, 7);
        let after_first = state.events(&name, 1, 10).unwrap();
        assert_eq!(after_first.len(), 1);
        assert_eq!((after_first[0].id, state.last_event().unwrap()), (2, 2));
    }

    #[test]
    fn a_newer_format_is_refused() {
        let root = tempfile::tempdir().unwrap();
        drop(State::open(root.path()).unwrap());
        Connection::open(root.path().join("state.db"))
            .unwrap()
            .execute_batch("PRAGMA user_version = 99")
            .unwrap();
        assert!(matches!(
            State::open(root.path()),
            Err(StateError::TooNew { found: 99, .. })
        ));
    }
}
