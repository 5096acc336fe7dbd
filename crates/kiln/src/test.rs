//! `test`: everything that `up` asks of a candidate before it touches what serves, and the
//! report of it (`--junit`).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_build::test::CaseResult;
use kiln_model::{EnvironmentName, Release};

use crate::assemble::{Assembled, Over, Shares};
use crate::cli::{ProjectArgs, TestArgs};
use crate::context::Context;
use crate::failure::{Failure, machine};
use crate::junit::{self, Suite};
use crate::stack::{self, Candidate};
use crate::{output, project, up};

pub async fn test(context: &Context, args: &TestArgs) -> Result<(), Failure> {
    context.need_root()?;
    context.make_root()?;
    let _lease = context.store()?.lease().map_err(machine)?;
    let proven = Proven::of(context, &args.project, Asked::whole(args.junit.as_deref())).await?;
    if context.json {
        return output::json(&proven.release);
    }
    for suite in &proven.suites {
        let passed = |result: &CaseResult| matches!(result, CaseResult::Passed);
        let all = suite.cases.len();
        let passed = suite.cases.iter().filter(|c| passed(&c.result)).count();
        outln!("{}: {passed} of {all} checks passed", suite.name);
        for case in &suite.cases {
            if let CaseResult::Skipped(why) = &case.result {
                outln!("  {} says nothing: {why}", case.name);
            }
        }
    }
    Ok(())
}

/// How much is asked.
#[derive(Default)]
pub struct Asked<'a> {
    /// The whole stack, too, where the project has a test of it.
    pub stack: bool,
    /// What RUNs fetch is fetched and recorded anew.
    pub live: bool,
    /// Caches of others.
    pub shares: Shares,
    /// Where the report goes.
    pub junit: Option<&'a Path>,
}

impl<'a> Asked<'a> {
    pub fn whole(junit: Option<&'a Path>) -> Self {
        Self {
            stack: true,
            junit,
            ..Self::default()
        }
    }
}

/// A candidate that has passed its tests.
pub struct Proven {
    pub environment: EnvironmentName,
    pub release: Release,
    pub suites: Vec<Suite>,
}

impl Proven {
    /// Builds and tests. The report is written whether they pass or not.
    pub async fn of(
        context: &Context,
        args: &ProjectArgs,
        asked: Asked<'_>,
    ) -> Result<Self, Failure> {
        let mut suites = Vec::new();
        let junit = asked.junit;
        let result = prove(context, args, asked, &mut suites).await;
        let written = match junit {
            Some(path) => junit::write(path, &suites),
            None => Ok(()),
        };
        let (environment, release) = result?;
        written?;
        Ok(Self {
            environment,
            release,
            suites,
        })
    }
}

async fn prove(
    context: &Context,
    args: &ProjectArgs,
    asked: Asked<'_>,
    suites: &mut Vec<Suite>,
) -> Result<(EnvironmentName, Release), Failure> {
    let options = project::options(&args.read);
    let loaded = project::load_with(&options)?;
    let environment = up::environment(args, &loaded)?;
    let cancel = Arc::new(AtomicBool::new(false));
    let assembler = up::assembler(context, &loaded, &cancel)?;
    let assembler = assembler.live(asked.live).shares(asked.shares);
    let assembled = up::assemble(&assembler, &cancel, &environment, &Over::default()).await;
    *suites = assembler.suites();
    let assembled: Assembled = assembled?;
    if let Some(test) = loaded.spec.stack.as_ref().filter(|_| asked.stack) {
        let candidate = Candidate {
            options: &options,
            test,
            assembled: &assembled,
        };
        stack::prove(context, &candidate, suites).await?;
    }
    Ok((environment, assembled.release))
}
