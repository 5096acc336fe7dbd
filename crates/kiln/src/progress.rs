//! Draws progress: one renderer for terminals, one for plain text, one for machines.
//! All of it goes to standard error (JSON events too: results own standard output).

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clap::ValueEnum;
use kiln_model::progress::Finish;
use kiln_model::{Millis, Progress, ProgressEvent};

use crate::terminal::{Block, size};

/// Rows of running tasks shown at once on a terminal.
const ROWS: usize = 12;

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// By what standard error is
    #[default]
    Auto,
    /// One line for each beginning and end, with times
    Plain,
    /// One event a line
    Json,
}

/// What is shown of progress.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown {
    pub form: Form,
    /// Also why something was not taken from a cache.
    pub explain: bool,
}

pub fn renderer(shown: &Shown) -> Box<dyn Progress> {
    let explain = shown.explain;
    match shown.form {
        Form::Json => Box::new(JsonLines),
        Form::Auto if std::io::stderr().is_terminal() => Box::new(Terminal {
            explain,
            ..Terminal::default()
        }),
        Form::Auto | Form::Plain => Box::new(Plain { explain }),
    }
}

struct JsonLines;

impl Progress for JsonLines {
    fn event(&self, event: ProgressEvent) {
        if let Ok(line) = serde_json::to_string(&event) {
            errln!("{line}");
        }
    }
}

struct Plain {
    explain: bool,
}

impl Progress for Plain {
    fn event(&self, event: ProgressEvent) {
        if let Some(line) = plain_line(&event, self.explain) {
            errln!("{line}");
        }
    }
}

fn plain_line(event: &ProgressEvent, explain: bool) -> Option<String> {
    Some(match event {
        ProgressEvent::Started { task, detail } if detail.is_empty() => task.clone(),
        ProgressEvent::Started { task, detail } => format!("{task}: {detail}"),
        ProgressEvent::Advanced { .. } => return None,
        ProgressEvent::Output { task, line } => format!("{task} | {line}"),
        ProgressEvent::Finished { task, how, took } => finished_line(task, how, *took),
        ProgressEvent::Explained { .. } if !explain => return None,
        ProgressEvent::Explained { task, why } => format!("{task}: not from the cache: {why}"),
        ProgressEvent::Taken { task, from } => format!("{task}: taken from the cache {from}"),
        ProgressEvent::Warning { task, text } => format!("warning: {task}: {text}"),
    })
}

fn finished_line(task: &str, how: &Finish, took: Millis) -> String {
    match how {
        Finish::Done => format!("{task}: done in {took}"),
        Finish::Cached => format!("{task}: unchanged"),
        Finish::Failed { cause } => format!("{task}: failed: {cause}"),
    }
}

/// Finished tasks scroll away as lines; running ones are redrawn below them.
#[derive(Default)]
struct Terminal {
    explain: bool,
    state: Mutex<Screen>,
}

#[derive(Default)]
struct Screen {
    running: BTreeMap<String, Row>,
    block: Block,
}

struct Row {
    detail: String,
    amount: String,
    since: Instant,
}

impl Progress for Terminal {
    fn event(&self, event: ProgressEvent) {
        let mut screen = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match &event {
            ProgressEvent::Started { task, detail } => {
                let row = Row {
                    detail: detail.clone(),
                    amount: String::new(),
                    since: Instant::now(),
                };
                screen.running.insert(task.clone(), row);
                None
            }
            ProgressEvent::Advanced {
                task,
                done,
                total,
                bytes,
            } => {
                if let Some(row) = screen.running.get_mut(task) {
                    row.amount = amount(*done, *total, *bytes);
                }
                None
            }
            ProgressEvent::Output { task, line } => {
                if let Some(row) = screen.running.get_mut(task) {
                    row.detail = line.clone();
                }
                None
            }
            ProgressEvent::Finished { task, how, took } => {
                screen.running.remove(task);
                // Steps of one build are many; what was cached is not worth a line.
                (*how != Finish::Cached).then(|| finished_line(task, how, *took))
            }
            ProgressEvent::Explained { .. }
            | ProgressEvent::Taken { .. }
            | ProgressEvent::Warning { .. } => plain_line(&event, self.explain),
        };
        screen.draw(line.as_deref());
    }
}

impl Screen {
    /// Prints `line` above the running rows and draws those anew.
    fn draw(&mut self, line: Option<&str>) {
        let (width, _) = size();
        let rows: Vec<String> = self
            .running
            .iter()
            .take(ROWS)
            .map(|(task, row)| {
                let secs = row.since.elapsed().as_secs_f32();
                let text = format!("  {task} {} {}", row.amount, row.detail);
                let room = width.saturating_sub(8);
                format!("{text:.room$} {secs:.1}s")
            })
            .collect();
        self.block.draw(line, &rows);
    }
}

fn amount(done: u64, total: Option<u64>, bytes: bool) -> String {
    let show = |n: u64| if bytes { human_bytes(n) } else { n.to_string() };
    match total {
        Some(total) => format!("{}/{}", show(done), show(total)),
        None => show(done),
    }
}

/// Bytes for people: `1.4 MB`.
pub fn human_bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", units.get(unit).copied().unwrap_or("TB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_a_line_only_where_it_is_asked_for() {
        let event = ProgressEvent::Explained {
            task: "build web: 2/3".into(),
            why: "changed: a".into(),
        };
        assert_eq!(plain_line(&event, false), None);
        let told = plain_line(&event, true);
        let expected = "build web: 2/3: not from the cache: changed: a";
        assert_eq!(told.as_deref(), Some(expected));
    }

    #[test]
    fn bytes_are_shown_in_the_largest_fitting_unit() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(1_400_000), "1.4 MB");
        assert_eq!(human_bytes(u64::MAX), "18446744.1 TB");
    }
}
