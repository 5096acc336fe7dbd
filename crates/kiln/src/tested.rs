//! How the images of a release were tested: every test is in the audit log with the image's
//! digest and its counts, and the name of each check is in the cache, while that has it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;

use kiln_build::test::{self, Case, CaseResult};
use kiln_daemon::api::types::ReleaseLine;
use kiln_model::{Digest, EnvironmentName, Millis, ReleaseNumber, ServiceName};
use kiln_trust::Fact;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Failure, machine};
use crate::output;

/// So many checks are named for people.
const NAMED: usize = 4;

type Images = BTreeMap<ServiceName, Digest>;

/// All tests that were ever carried out here.
pub struct History {
    facts: Vec<Fact>,
    cache: PathBuf,
}

/// How a release was tested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tests {
    /// Of each service; `None`: its image was never tested as this service runs it.
    pub tests: BTreeMap<ServiceName, Option<Tested>>,
    /// Of the whole stack, if it was.
    pub stack: Option<StackTested>,
}

/// How an image was tested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tested {
    pub image: Digest,
    /// Since the epoch.
    pub when: Millis,
    /// `passed`, or `inconclusive: …`.
    pub verdict: String,
    /// How many `passed` and were `skipped`.
    pub checks: BTreeMap<String, u64>,
    /// Each check; `None`: the cache does not have them any more.
    pub cases: Option<Vec<Case>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StackTested {
    /// The service whose exit code was the verdict.
    pub service: String,
    pub when: Millis,
    pub verdict: String,
}

/// Something with how it was tested beside it.
#[derive(Serialize)]
pub struct With<'a, T> {
    #[serde(flatten)]
    pub of: &'a T,
    #[serde(flatten)]
    pub tests: Option<Tests>,
}

impl History {
    pub fn read(context: &Context) -> Result<Self, Failure> {
        Ok(Self {
            facts: context.audit()?.facts("test").map_err(machine)?,
            cache: context.root.join("cache"),
        })
    }

    /// Of every release in these lines; each content is asked for once.
    pub async fn of_releases(
        &self,
        context: &Context,
        environment: &EnvironmentName,
        lines: &[ReleaseLine],
    ) -> Result<BTreeMap<ReleaseNumber, Tests>, Failure> {
        let mut contents: BTreeMap<Digest, (String, Images)> = BTreeMap::new();
        let mut all = BTreeMap::new();
        for line in lines {
            let content = match contents.entry(line.digest) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let release = context.client.release(environment, line.number).await?;
                    let services = release.services.into_iter();
                    let images = services.map(|(name, service)| (name, service.image.digest));
                    new.insert((release.project.to_string(), images.collect()))
                }
            };
            let (project, images) = &*content;
            all.insert(line.number, self.of(project, images, Millis(line.created)));
        }
        Ok(all)
    }

    /// The tests that a release of these images, made then, went by.
    fn of(&self, project: &str, images: &Images, until: Millis) -> Tests {
        let tests = images.iter().map(|(name, image)| {
            let fact = self.of_image(name, image, until);
            (name.clone(), fact.map(|fact| self.tested(fact, *image)))
        });
        Tests {
            tests: tests.collect(),
            stack: self.stack(project, images, until),
        }
    }

    /// The newest of those that stopped nothing. What was tested in another project as the
    /// same is not tested again, so the project does not matter.
    fn of_image(&self, name: &ServiceName, image: &Digest, until: Millis) -> Option<&Fact> {
        let image = image.to_string();
        self.facts.iter().rev().find(|fact| {
            fact.time <= until
                && fact.details.contains_key("verdict")
                && fact.details.get("digest") == Some(&image)
                && fact.subject.rsplit('/').next() == Some(name.as_str())
        })
    }

    fn tested(&self, fact: &Fact, image: Digest) -> Tested {
        let detail = |key: &str| fact.details.get(key).map(String::as_str);
        let request = detail("request").and_then(|text| text.parse().ok());
        Tested {
            image,
            when: fact.time,
            verdict: detail("verdict").unwrap_or_default().to_owned(),
            checks: counts(detail("checks").unwrap_or_default()),
            cases: request
                .and_then(|request| test::remembered(&self.cache, &request))
                .map(|verdict| verdict.cases),
        }
    }

    /// The newest one in which every image was one of these.
    fn stack(&self, project: &str, images: &Images, until: Millis) -> Option<StackTested> {
        let own = |listed: &str| {
            let Some((name, digest)) = listed.split_once('@') else {
                return false;
            };
            // What only tests is no part of the release.
            let mut named = images.iter().filter(|(own, _)| own.as_str() == name);
            named.all(|(_, image)| image.to_string() == digest)
        };
        self.facts.iter().rev().find_map(|fact| {
            let service = fact.subject.strip_prefix(project)?.strip_prefix('/')?;
            let verdict = fact.details.get("verdict")?;
            fact.details.get("stack")?;
            let listed = fact.details.get("images")?;
            let same = fact.time <= until && listed.split(' ').all(own);
            same.then(|| StackTested {
                service: service.to_owned(),
                when: fact.time,
                verdict: verdict.clone(),
            })
        })
    }
}

/// `11 passed, 1 skipped`, as the log has it.
fn counts(text: &str) -> BTreeMap<String, u64> {
    let parts = text.split(", ").filter_map(|part| part.split_once(' '));
    let counted = parts.filter_map(|(count, word)| Some((word.to_owned(), count.parse().ok()?)));
    counted.collect()
}

impl Tests {
    /// `all 3`, `2 of 3`, and whether the whole stack was, too.
    pub fn summary(&self) -> String {
        let tested = self.tests.values().flatten().count();
        let mut text = match (tested, self.tests.len()) {
            (0, _) => "never".to_owned(),
            (tested, all) if tested == all => format!("all {all}"),
            (tested, all) => format!("{tested} of {all}"),
        };
        if self.stack.is_some() {
            text.push_str(", and as a whole");
        }
        text
    }

    pub fn print(&self) {
        let rows = self.rows(&|when| output::ago(when.0));
        if !rows.is_empty() {
            outln!("");
            output::table(&["IMAGE OF", "TESTED", "CHECKS"], &rows);
        }
    }

    fn rows(&self, ago: &dyn Fn(Millis) -> String) -> Vec<Vec<String>> {
        let service = |(name, tested): (&ServiceName, &Option<Tested>)| match tested {
            None => vec![name.to_string(), "never".into(), String::new()],
            Some(tested) => vec![
                name.to_string(),
                format!("{}, {}", tested.word(), ago(tested.when)),
                tested.checks(),
            ],
        };
        let stack = self.stack.iter().map(|stack| {
            let how = format!("{}, {}", stack.verdict, ago(stack.when));
            vec![
                "(all)".into(),
                how,
                format!("the service {}", stack.service),
            ]
        });
        self.tests.iter().map(service).chain(stack).collect()
    }
}

impl Tested {
    fn word(&self) -> &str {
        self.verdict.split(':').next().unwrap_or_default()
    }

    /// Counts, and names where they are known.
    fn checks(&self) -> String {
        let counts = self.checks.iter();
        let mut parts: Vec<String> = counts.map(|(word, n)| format!("{n} {word}")).collect();
        let named = |is: fn(&CaseResult) -> bool| -> Vec<&str> {
            let cases = self.cases.iter().flatten();
            let cases = cases.filter(|case| is(&case.result));
            cases.map(|case| case.name.as_str()).collect()
        };
        let passed = named(|result| matches!(result, CaseResult::Passed));
        let skipped = named(|result| matches!(result, CaseResult::Skipped(_)));
        for (word, names) in [("passed", passed), ("skipped", skipped)] {
            let more = names.len().saturating_sub(NAMED);
            let shown = names.iter().take(NAMED).copied().collect::<Vec<_>>();
            let shown = match more {
                0 => shown.join(", "),
                more => format!("{} and {more} more", shown.join(", ")),
            };
            if let Some(part) = parts.iter_mut().find(|part| part.ends_with(word))
                && !shown.is_empty()
            {
                part.push_str(&format!(" ({shown})"));
            }
        }
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fact(time: u64, subject: &str, details: &[(&str, &str)]) -> Fact {
        let details = details.iter();
        Fact {
            time: Millis(time),
            actor: "ada".into(),
            action: "test".into(),
            subject: subject.into(),
            details: details
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        }
    }

    fn images(all: &[(&str, &str)]) -> Images {
        let all = all.iter();
        all.map(|(name, image)| (name.parse().unwrap(), Digest::of(image)))
            .collect()
    }

    fn history(facts: Vec<Fact>) -> History {
        let cache = PathBuf::from("/nowhere");
        History { facts, cache }
    }

    #[test]
    fn the_newest_verdict_of_the_same_image_and_service_counts_if_the_release_is_not_older() {
        let (old, new) = (Digest::of("old").to_string(), Digest::of("new").to_string());
        let passed = ("verdict", "passed");
        let history = history(vec![
            fact(
                1,
                "shop/web",
                &[("digest", &old), passed, ("checks", "1 passed")],
            ),
            fact(
                2,
                "other/web",
                &[("digest", &new), passed, ("checks", "2 passed, 1 skipped")],
            ),
            fact(
                3,
                "shop/db",
                &[("digest", &new), passed, ("checks", "3 passed")],
            ),
            fact(
                4,
                "shop/web",
                &[("digest", &new), ("failed", "no"), ("checks", "1 failed")],
            ),
            fact(
                5,
                "shop/web",
                &[("digest", &new), ("verdict", "inconclusive: alone")],
            ),
        ]);
        let of = |services: &[(&str, &str)], until: u64| {
            history.of("shop", &images(services), Millis(until)).tests
        };
        let tests = of(&[("web", "new"), ("db", "old")], 4);
        let web = tests["web"].clone().unwrap();
        assert_eq!((web.when, web.verdict.as_str()), (Millis(2), "passed"));
        let checks = [("passed", 2), ("skipped", 1)];
        assert_eq!(web.checks, checks.map(|(w, n)| (w.to_owned(), n)).into());
        assert_eq!((web.image, web.cases), (Digest::of("new"), None));
        assert_eq!(tests["db"], None);
        let later = of(&[("web", "new")], 5);
        let later = later.values().next().unwrap().clone().unwrap();
        assert_eq!(
            (later.word(), later.checks()),
            ("inconclusive", String::new())
        );
        assert_eq!(of(&[("web", "new")], 1).values().next().unwrap(), &None);
    }

    #[test]
    fn a_stacks_test_is_the_releases_if_all_that_both_have_are_the_same() {
        let listed = |web: &str| {
            let of = |name: &str, image: &str| format!("{name}@{}", Digest::of(image));
            format!("{} {}", of("smoke", "tester"), of("web", web))
        };
        let stack = |time: u64, project: &str, web: &str, how: (&str, &str)| {
            let images = listed(web);
            let details = [("stack", "sha256:00"), ("images", images.as_str()), how];
            fact(time, &format!("{project}/smoke"), &details)
        };
        let passed = ("verdict", "passed");
        let history = history(vec![
            stack(1, "shop", "new", passed),
            stack(2, "shop", "old", passed),
            stack(3, "other", "new", passed),
            stack(4, "shop", "new", ("failed", "exit 1")),
        ]);
        let of = |web: &str, until: u64| {
            let images = images(&[("web", web), ("db", "x")]);
            history.of("shop", &images, Millis(until)).stack
        };
        let found = of("new", 9).unwrap();
        assert_eq!((found.service.as_str(), found.when), ("smoke", Millis(1)));
        assert_eq!(of("old", 9).unwrap().when, Millis(2));
        assert_eq!(of("old", 1), None);
        assert_eq!(of("third", 9), None);
    }

    #[test]
    fn people_are_told_how_many_and_a_few_names() {
        let case = |name: &str, result| Case {
            name: name.into(),
            result,
            took: Millis(1),
        };
        let passed = ["a", "b", "c", "d", "e"].map(|n| case(n, CaseResult::Passed));
        let skipped = case("f", CaseResult::Skipped("no server".into()));
        let tested = Tested {
            image: Digest::of("x"),
            when: Millis(7),
            verdict: "passed".into(),
            checks: counts("5 passed, 1 skipped"),
            cases: Some(passed.into_iter().chain([skipped]).collect()),
        };
        let stack = StackTested {
            service: "smoke".into(),
            when: Millis(8),
            verdict: "passed".into(),
        };
        let mut tests = Tests::default();
        assert_eq!(tests.summary(), "never");
        tests.tests.insert("web".parse().unwrap(), Some(tested));
        assert_eq!(tests.summary(), "all 1");
        tests.tests.insert("db".parse().unwrap(), None);
        tests.stack = Some(stack);
        assert_eq!(tests.summary(), "1 of 2, and as a whole");
        let rows = tests.rows(&|when| when.0.to_string());
        let rows: Vec<String> = rows.iter().map(|row| row.join("|")).collect();
        assert_eq!(
            rows,
            [
                "db|never|",
                "web|passed, 7|5 passed (a, b, c, d and 1 more), 1 skipped (f)",
                "(all)|passed, 8|the service smoke",
            ]
        );
    }
}
