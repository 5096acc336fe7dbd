//! Test results in the form that CI servers read: JUnit's XML, one `testsuite` an image (or
//! whole stack), one `testcase` a check, by the schema that Jenkins documents.

use std::fmt::Write as _;
use std::path::Path;

use kiln_build::test::{Case, CaseResult};
use kiln_model::Millis;

use crate::failure::{Failure, Kind};

/// What was tested, and every check of it.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The service, or the test of the whole stack.
    pub name: String,
    /// Digests.
    pub properties: Vec<(String, String)>,
    pub cases: Vec<Case>,
    /// The program's last output.
    pub log: Vec<String>,
}

pub fn write(path: &Path, suites: &[Suite]) -> Result<(), Failure> {
    std::fs::write(path, render(suites))
        .map_err(|e| Failure::new(Kind::Input, format!("--junit {}: {e}", path.display())))
}

pub fn render(suites: &[Suite]) -> String {
    let all = || suites.iter().flat_map(|suite| &suite.cases);
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(out, "<testsuites name=\"kiln\"{}>", counts(all()));
    for suite in suites {
        let name = attribute(&suite.name);
        let _ = writeln!(
            out,
            "  <testsuite name=\"{name}\"{}>",
            counts(suite.cases.iter())
        );
        if !suite.properties.is_empty() {
            out.push_str("    <properties>\n");
            for (key, value) in &suite.properties {
                let (key, value) = (attribute(key), attribute(value));
                let _ = writeln!(out, "      <property name=\"{key}\" value=\"{value}\"/>");
            }
            out.push_str("    </properties>\n");
        }
        for case in &suite.cases {
            testcase(&mut out, &suite.name, case);
        }
        if !suite.log.is_empty() {
            let log = text(&suite.log.join("\n"));
            let _ = writeln!(out, "    <system-out>{log}</system-out>");
        }
        out.push_str("  </testsuite>\n");
    }
    out.push_str("</testsuites>\n");
    out
}

fn counts<'c>(cases: impl Iterator<Item = &'c Case>) -> String {
    let (mut tests, mut failures, mut skipped, mut took) = (0, 0, 0, Millis(0));
    for case in cases {
        tests += 1;
        took = took.saturating_add(case.took);
        match case.result {
            CaseResult::Passed => {}
            CaseResult::Skipped(_) => skipped += 1,
            CaseResult::Failed(_) => failures += 1,
        }
    }
    let time = seconds(took);
    format!(
        " tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\" time=\"{time}\""
    )
}

fn testcase(out: &mut String, suite: &str, case: &Case) {
    let (name, class) = (attribute(&case.name), attribute(suite));
    let time = seconds(case.took);
    let _ = write!(
        out,
        "    <testcase name=\"{name}\" classname=\"{class}\" time=\"{time}\""
    );
    let (element, why) = match &case.result {
        CaseResult::Passed => {
            out.push_str("/>\n");
            return;
        }
        CaseResult::Skipped(why) => ("skipped", why),
        CaseResult::Failed(why) => ("failure", why),
    };
    let message = attribute(why.lines().next().unwrap_or_default());
    let _ = writeln!(
        out,
        ">\n      <{element} message=\"{message}\">{}</{element}>\n    </testcase>",
        text(why)
    );
}

fn seconds(took: Millis) -> String {
    format!("{}.{:03}", took.0 / 1000, took.0 % 1000)
}

/// XML 1.0 has no way to say most control characters (section 2.2): they are replaced.
fn sayable(c: char) -> char {
    match c {
        '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' => c,
        '\u{10000}'..='\u{10ffff}' => c,
        _ => '\u{fffd}',
    }
}

fn text(plain: &str) -> String {
    escaped(plain, false)
}

/// Line breaks are written as references: a reader makes others into spaces (section 3.3.3).
fn attribute(plain: &str) -> String {
    escaped(plain, true)
}

fn escaped(plain: &str, in_attribute: bool) -> String {
    let mut out = String::with_capacity(plain.len());
    for c in plain.chars().map(sayable) {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Also in text: a reader makes it a line feed (section 2.11).
            '\r' => out.push_str("&#13;"),
            '\n' if in_attribute => out.push_str("&#10;"),
            '\t' if in_attribute => out.push_str("&#9;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn case(name: &str, result: CaseResult, took: u64) -> Case {
        Case {
            name: name.into(),
            result,
            took: Millis(took),
        }
    }

    #[test]
    fn what_is_tested_is_told_as_xml() {
        let suites = [Suite {
            name: "web".into(),
            properties: vec![("image".into(), "sha256:ab".into())],
            cases: vec![
                case("start", CaseResult::Passed, 1204),
                case("health", CaseResult::Skipped("alone".into()), 0),
                case(
                    "a \"b\" <c>\n& d",
                    CaseResult::Failed("no\u{1b}[0m\n]]> second\r".into()),
                    9,
                ),
            ],
            log: vec!["<up>".into(), "\u{0}".into()],
        }];
        assert_eq!(
            render(&suites),
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <testsuites name=\"kiln\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"1.213\">\n  \
             <testsuite name=\"web\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"1.213\">\n    \
             <properties>\n      <property name=\"image\" value=\"sha256:ab\"/>\n    </properties>\n    \
             <testcase name=\"start\" classname=\"web\" time=\"1.204\"/>\n    \
             <testcase name=\"health\" classname=\"web\" time=\"0.000\">\n      \
             <skipped message=\"alone\">alone</skipped>\n    </testcase>\n    \
             <testcase name=\"a &quot;b&quot; &lt;c&gt;&#10;&amp; d\" classname=\"web\" time=\"0.009\">\n      \
             <failure message=\"no\u{fffd}[0m\">no\u{fffd}[0m\n]]&gt; second&#13;</failure>\n    </testcase>\n    \
             <system-out>&lt;up&gt;\n\u{fffd}</system-out>\n  </testsuite>\n</testsuites>\n"
        );
    }
}
