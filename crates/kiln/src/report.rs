//! Problems for other programs: SARIF 2.1.0 (OASIS), annotations of GitHub Actions, JSON.
//! Pure: problems in, text out.

use std::path::Path;

use kiln_compose::lint::RULES;
use kiln_compose::{Diagnostic, Severity, Sources};
use serde::Serialize;
use serde_json::{Value, json};

/// One problem, with its place as other programs want it.
#[derive(Debug, Serialize)]
pub struct Problem {
    pub rule: String,
    #[serde(serialize_with = "as_level")]
    pub severity: Severity,
    pub message: String,
    pub hint: Option<String>,
    /// None: it is about the options, or about no place in particular.
    pub at: Option<Region>,
}

/// Lines and columns count from 1, columns in characters; the end is behind the last one.
#[derive(Debug, Serialize)]
pub struct Region {
    /// Relative to the present folder, where it is below it.
    pub file: String,
    pub line: usize,
    pub column: usize,
    pub end_line: usize,
    pub end_column: usize,
}

impl Region {
    /// Whole lines of a file.
    pub fn lines(file: &str, span: kiln_build::containerfile::Span) -> Self {
        let here = std::env::current_dir().unwrap_or_default();
        let path = Path::new(file).strip_prefix(&here);
        Self {
            file: path.unwrap_or(Path::new(file)).display().to_string(),
            line: span.start as usize,
            column: 1,
            end_line: span.end as usize + 1,
            end_column: 1,
        }
    }
}

impl Problem {
    pub fn new(rule: &str, diagnostic: &Diagnostic, sources: &Sources) -> Self {
        let start = sources.place(diagnostic.span);
        let at = start.zip(sources.end(diagnostic.span)).map(|(start, end)| {
            let here = std::env::current_dir().unwrap_or_default();
            let path = start.path.strip_prefix(&here).unwrap_or(&start.path);
            Region {
                file: path.display().to_string(),
                line: start.line,
                column: start.column,
                end_line: end.line,
                end_column: end.column,
            }
        });
        Self {
            rule: rule.replace("::", "-"),
            severity: diagnostic.severity,
            message: diagnostic.message.clone(),
            hint: diagnostic.hint.clone(),
            at,
        }
    }

    fn text(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{} ({hint})", self.message),
            None => self.message.clone(),
        }
    }
}

fn as_level<S: serde::Serializer>(severity: &Severity, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(level(*severity))
}

/// SARIF's words.
pub fn level(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "note",
    }
}

/// `::warning file=…,line=…::message`
pub fn github(problem: &Problem) -> String {
    let command = match problem.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "notice",
    };
    let mut properties = vec![];
    if let Some(at) = &problem.at {
        properties.push(format!("file={}", property(&at.file)));
        properties.push(format!("line={}", at.line));
        properties.push(format!("endLine={}", at.end_line));
        // GitHub takes columns only within one line.
        if at.line == at.end_line {
            properties.push(format!("col={}", at.column));
            properties.push(format!("endColumn={}", at.end_column));
        }
    }
    properties.push(format!("title={}", property(&problem.rule)));
    let message = data(&problem.text());
    format!("::{command} {}::{message}", properties.join(","))
}

fn data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// A whole SARIF 2.1.0 log.
pub fn sarif(problems: &[Problem]) -> Value {
    let mut rules: Vec<Value> = RULES
        .iter()
        .map(|rule| {
            json!({
                "id": rule.id,
                "shortDescription": {"text": rule.title},
                "fullDescription": {"text": rule.why},
                "defaultConfiguration": {"level": level(rule.severity)},
            })
        })
        .collect();
    let mut ids: Vec<String> = RULES.iter().map(|rule| rule.id.to_owned()).collect();
    // What the files themselves have has no rule of its own.
    for problem in problems {
        if !ids.contains(&problem.rule) {
            ids.push(problem.rule.clone());
            rules.push(json!({"id": problem.rule}));
        }
    }
    let results: Vec<Value> = problems
        .iter()
        .map(|problem| result(problem, &ids))
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "kiln",
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            }},
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

fn result(problem: &Problem, ids: &[String]) -> Value {
    let mut result = json!({
        "ruleId": problem.rule,
        "ruleIndex": ids.iter().position(|id| *id == problem.rule),
        "level": level(problem.severity),
        "message": {"text": problem.text()},
    });
    if let (Some(at), Some(map)) = (&problem.at, result.as_object_mut()) {
        let location = json!([{"physicalLocation": {
            "artifactLocation": {"uri": uri(&at.file)},
            "region": {
                "startLine": at.line,
                "startColumn": at.column,
                "endLine": at.end_line,
                "endColumn": at.end_column,
            },
        }}]);
        map.insert("locations".into(), location);
    }
    result
}

/// A path as a URI reference: absolute ones get their scheme, odd bytes their escapes.
fn uri(path: &str) -> String {
    let escaped: String = path
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    match Path::new(path).is_absolute() {
        true => format!("file://{escaped}"),
        false => escaped,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn problem(file: &str) -> Problem {
        Problem {
            rule: "code-bind".into(),
            severity: Severity::Note,
            message: "50%\nof it".into(),
            hint: Some("do".into()),
            at: Some(Region {
                file: file.into(),
                line: 3,
                column: 4,
                end_line: 3,
                end_column: 9,
            }),
        }
    }

    #[test]
    fn annotations_are_escaped() {
        assert_eq!(
            github(&problem("a,b:c/d.yaml")),
            "::notice file=a%2Cb%3Ac/d.yaml,line=3,endLine=3,col=4,endColumn=9,title=code-bind::50%25%0Aof it (do)"
        );
        let mut nowhere = problem("");
        nowhere.at = None;
        assert_eq!(
            github(&nowhere),
            "::notice title=code-bind::50%25%0Aof it (do)"
        );
    }

    #[test]
    fn sarif_names_every_rule_it_uses() {
        let mut other = problem("/etc/x y.yaml");
        other.rule = "compose-schema".into();
        let log = sarif(&[problem("a.yaml"), other]);
        let run = &log["runs"][0];
        let results = run["results"].as_array().unwrap();
        for result in results {
            let index = usize::try_from(result["ruleIndex"].as_u64().unwrap()).unwrap();
            let rule = &run["tool"]["driver"]["rules"][index];
            assert_eq!(rule["id"], result["ruleId"]);
        }
        let uri =
            |at: usize| &results[at]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
        assert_eq!(
            (uri(0), uri(1)),
            (&json!("a.yaml"), &json!("file:///etc/x%20y.yaml"))
        );
    }
}
