//! What was checked of an image, one case for each check, in order.

use std::time::Instant;

use kiln_model::Millis;
use serde::{Deserialize, Serialize};

/// One check and how it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// `start`, `healthcheck`, `x-kiln.test[0] (http :80/)`, `tests/image.yaml: …`
    pub name: String,
    pub result: CaseResult,
    pub took: Millis,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaseResult {
    Passed,
    /// It says nothing; why.
    Skipped(String),
    Failed(String),
}

impl Case {
    /// Why it failed, if it did.
    pub fn cause(&self) -> Option<&str> {
        match &self.result {
            CaseResult::Failed(cause) => Some(cause),
            CaseResult::Passed | CaseResult::Skipped(_) => None,
        }
    }
}

/// An image that failed at least one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    pub name: String,
    pub cases: Vec<Case>,
    /// The program's last output.
    pub log: Vec<String>,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let failed: Vec<(&str, &str)> = self
            .cases
            .iter()
            .filter_map(|case| Some((case.name.as_str(), case.cause()?)))
            .collect();
        match failed.as_slice() {
            [(case, cause)] => write!(f, "{}: {case}: {cause}", self.name)?,
            several => {
                let all = self.cases.len();
                write!(
                    f,
                    "{}: {} of {all} checks failed:",
                    self.name,
                    several.len()
                )?;
                for (case, cause) in several {
                    write!(f, "\n  {case}: {cause}")?;
                }
            }
        }
        match self.log.is_empty() {
            true => write!(f, "; it printed nothing"),
            false => write!(f, "; its last output:\n  {}", self.log.join("\n  ")),
        }
    }
}

/// Takes down one case after the other. A case takes what has passed since the one before.
pub(super) struct Sheet {
    cases: Vec<Case>,
    since: Instant,
}

impl Sheet {
    pub fn new() -> Self {
        Self {
            cases: Vec::new(),
            since: Instant::now(),
        }
    }

    pub fn take(&mut self, name: impl Into<String>, result: CaseResult) {
        let now = Instant::now();
        let took = now.duration_since(std::mem::replace(&mut self.since, now));
        self.cases.push(Case {
            name: name.into(),
            result,
            took: took.into(),
        });
    }

    /// A check that says itself what was found instead.
    pub fn checked(&mut self, name: impl Into<String>, result: Result<(), String>) {
        self.take(
            name,
            match result {
                Ok(()) => CaseResult::Passed,
                Err(cause) => CaseResult::Failed(cause),
            },
        );
    }

    pub fn has_failed(&self) -> bool {
        self.cases.iter().any(|case| case.cause().is_some())
    }

    pub fn into_cases(self) -> Vec<Case> {
        self.cases
    }
}
