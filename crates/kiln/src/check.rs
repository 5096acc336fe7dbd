//! `check`: what is wrong with a project, and what hurts immutability, without building.

use kiln_compose::disk::{load_from_disk, resolve_from_disk};
use kiln_compose::lint::{self, Finding, RULES};
use kiln_compose::{Diagnostic, RenderOptions, Severity, Sources, render};

use crate::cli::{CheckArgs, CheckFormat, FailOn, ReadArgs};
use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::output;
use crate::project;
use crate::report::{self, Problem};

/// Everything there is to say of a project.
pub struct Checked {
    /// What the files themselves have, by severity, then what the rules found.
    pub diagnostics: Vec<Diagnostic>,
    pub findings: Vec<Finding>,
    pub sources: Sources,
}

pub fn check(context: &Context, args: &CheckArgs) -> Result<(), Failure> {
    if args.rules {
        return rules(context);
    }
    known_rules(&args.skip)?;
    let mut checked = look(&args.project);
    checked
        .findings
        .retain(|found| !args.skip.iter().any(|id| id == found.rule.id));
    let problems = checked.problems();
    match args.format {
        CheckFormat::Sarif => output::json(&report::sarif(&problems))?,
        CheckFormat::Github => problems
            .iter()
            .for_each(|p| outln!("{}", report::github(p))),
        CheckFormat::Text if context.json => output::json(&problems)?,
        CheckFormat::Text => out!("{}", checked.text()),
    }
    verdict(&problems, args.fail_on)
}

/// Reads a project and applies every rule. A project that cannot be read has errors only.
pub fn look(args: &ReadArgs) -> Checked {
    let options = project::options(args);
    let (diagnostics, refused) = match load_from_disk(&options) {
        Ok(loaded) => (loaded.notes, None),
        Err(error) => (error.diagnostics, Some(error.sources)),
    };
    // What kiln refuses to run can be looked at all the same, if it can be read at all.
    match (resolve_from_disk(&options), refused) {
        (Ok(resolved), _) => Checked {
            findings: lint::lint(&resolved.project, &resolved.sources),
            diagnostics,
            sources: resolved.sources,
        },
        (Err(error), sources) => Checked {
            findings: vec![],
            diagnostics,
            sources: sources.unwrap_or(error.sources),
        },
    }
}

impl Checked {
    fn problems(&self) -> Vec<Problem> {
        let own = self.diagnostics.iter().map(|d| (d.code.as_str(), d));
        let found = self.findings.iter().map(|f| (f.rule.id, &f.diagnostic));
        own.chain(found)
            .map(|(rule, diagnostic)| Problem::new(rule, diagnostic, &self.sources))
            .collect()
    }

    /// With the source text; the worst last, where it is seen.
    pub fn text(&self) -> String {
        let found = self.findings.iter().map(|found| {
            let hint = found.diagnostic.hint.as_deref().unwrap_or_default();
            let hint = format!("{hint}\nrule: {}", found.rule.id);
            found.diagnostic.clone().hint(hint)
        });
        let mut all: Vec<Diagnostic> = self.diagnostics.iter().cloned().chain(found).collect();
        all.sort_by_key(|d| d.severity);
        let texts = all
            .iter()
            .map(|d| render(d, &self.sources, RenderOptions::default()));
        texts.collect()
    }
}

pub fn verdict(problems: &[Problem], fail_on: FailOn) -> Result<(), Failure> {
    let least = match fail_on {
        FailOn::Error => Severity::Error,
        FailOn::Warning => Severity::Warning,
        FailOn::Note => Severity::Note,
    };
    let count = |severity| problems.iter().filter(|p| p.severity == severity).count();
    let said = format!(
        "{} errors, {} warnings, {} notes",
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note)
    );
    if problems.iter().any(|p| p.severity >= least) {
        return Err(Failure::new(Kind::Input, said));
    }
    errln!("{said}");
    Ok(())
}

fn known_rules(ids: &[String]) -> Result<(), Failure> {
    let known = RULES.iter().map(|rule| rule.id);
    match ids.iter().find(|id| !known.clone().any(|rule| rule == *id)) {
        None => Ok(()),
        Some(id) => {
            let hint = kiln_compose::diag::did_you_mean(id, known);
            let failure = Failure::new(Kind::Input, format!("there is no rule `{id}`"));
            Err(failure.hint(hint.unwrap_or_else(|| "kiln check --rules lists them".into())))
        }
    }
}

fn rules(context: &Context) -> Result<(), Failure> {
    if context.json {
        let all: Vec<_> = RULES
            .iter()
            .map(|rule| {
                serde_json::json!({
                    "rule": rule.id, "severity": report::level(rule.severity),
                    "title": rule.title, "why": rule.why,
                })
            })
            .collect();
        return serde_json::to_value(all)
            .map_err(machine)
            .and_then(|v| output::json(&v));
    }
    let rows: Vec<Vec<String>> = RULES
        .iter()
        .map(|rule| {
            let level = report::level(rule.severity).to_owned();
            vec![
                rule.id.into(),
                level,
                format!("{}. {}", rule.title, rule.why),
            ]
        })
        .collect();
    output::table(&["RULE", "SEVERITY", "WHAT IT FINDS"], &rows);
    Ok(())
}
