//! The candidates' isolated tests: what is asked of each, a few at a time, every one
//! recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::Instant;

use kiln_build::test::{Case, CaseResult, Outcome, TestFailure, TestRequest, Verdict};
use kiln_model::instance::{InstanceMount, InstanceMountSource};
use kiln_model::progress::Finish;
use kiln_model::spec::{FileKind, FileVersion, Mount, MountSource, Service, Spec};
use kiln_model::{Millis, ProgressEvent, ServiceName};
use kiln_plan::process;
use kiln_store::Image;
use kiln_trust::SecretStore;

use super::{Assembler, Candidate};
use crate::failure::{Failure, Kind, machine};
use crate::junit::Suite;

/// How long a service must stay up in its test; how long a job may take.
const SETTLE: Millis = Millis(1500);
const JOB_LIMIT: Millis = Millis(60_000);
const TEST_GRACE: Millis = Millis(500);
const TESTS_AT_A_TIME: usize = 4;

struct Tested {
    verdict: Verdict,
    /// Tested now, and not known from before.
    fresh: bool,
}

impl Assembler<'_> {
    /// A few tests at a time: mostly they wait. All of them are recorded, in the services'
    /// order; the first that failed stops the release.
    pub(super) fn test_all(
        &self,
        candidates: &[Candidate],
        proven: &BTreeMap<ServiceName, Verdict>,
    ) -> Result<Vec<Verdict>, Failure> {
        let mut verdicts = Vec::new();
        for few in candidates.chunks(TESTS_AT_A_TIME) {
            let results: Vec<_> = std::thread::scope(|scope| {
                let running: Vec<_> = few
                    .iter()
                    .map(|one| scope.spawn(|| self.test(one, proven.get(&one.name))))
                    .collect();
                running
                    .into_iter()
                    .map(|test| test.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                    .collect()
            });
            let mut failed = None;
            for (one, tested) in few.iter().zip(results) {
                let recorded = self.record_test(one, &tested);
                match tested {
                    Ok(Tested { verdict, .. }) => verdicts.push(verdict),
                    Err(error) => failed = failed.or_else(|| Some(test_failure(&error))),
                }
                recorded?;
            }
            if let Some(failure) = failed {
                return Err(failure);
            }
        }
        Ok(verdicts)
    }

    fn test(&self, candidate: &Candidate, proven: Option<&Verdict>) -> Result<Tested, TestFailure> {
        if let Some(verdict) = proven {
            return Ok(Tested {
                verdict: verdict.clone(),
                fresh: false,
            });
        }
        let task = format!("test {}", candidate.name);
        let began = Instant::now();
        let finished = |how| {
            let (task, took) = (task.clone(), began.elapsed().into());
            self.progress
                .event(ProgressEvent::Finished { task, how, took });
        };
        if let Some(verdict) = self.tester.known(&candidate.request) {
            finished(Finish::Cached);
            return Ok(Tested {
                verdict,
                fresh: false,
            });
        }
        self.progress.event(ProgressEvent::Started {
            task: task.clone(),
            detail: "in isolation".into(),
        });
        let verdict = self.tester.test_image(&candidate.request, &self.cancel);
        finished(match &verdict {
            Ok(_) => Finish::Done,
            Err(_) => Finish::Failed {
                cause: "it did not prove itself".into(),
            },
        });
        let verdict = verdict?;
        for text in &verdict.warnings {
            let (task, text) = (task.clone(), text.clone());
            self.progress.event(ProgressEvent::Warning { task, text });
        }
        Ok(Tested {
            verdict,
            fresh: true,
        })
    }

    fn record_test(
        &self,
        candidate: &Candidate,
        tested: &Result<Tested, TestFailure>,
    ) -> Result<(), Failure> {
        self.report(candidate, tested);
        let result = match tested {
            Ok(Tested { fresh: false, .. }) => return Ok(()),
            Ok(Tested { verdict, .. }) => match &verdict.outcome {
                Outcome::Passed => ("verdict", "passed".to_owned()),
                Outcome::Inconclusive(why) => ("verdict", format!("inconclusive: {why}")),
            },
            Err(error) => {
                let cause = error.to_string();
                (
                    "failed",
                    cause.lines().next().unwrap_or_default().to_owned(),
                )
            }
        };
        let subject = format!("{}/{}", self.spec().project, candidate.name);
        let digest = ("digest", candidate.image.manifest.to_string());
        let mut details = vec![digest, result];
        // By which the record of all its checks is found, while the cache has it.
        let request = candidate.request.digest().map_err(machine)?;
        details.push(("request", request.to_string()));
        if let Some(cases) = cases(tested) {
            details.push(("checks", counted(cases)));
        }
        self.context.record("test", &subject, &details)
    }

    /// For `--junit`.
    fn report(&self, candidate: &Candidate, tested: &Result<Tested, TestFailure>) {
        let cases = match (cases(tested), tested) {
            (Some([]), _) => return,
            (Some(cases), _) => cases.to_vec(),
            (None, Err(error)) => vec![Case {
                name: "test".into(),
                result: CaseResult::Failed(error.to_string()),
                took: Millis(0),
            }],
            (None, Ok(_)) => return,
        };
        let log = match tested {
            Ok(Tested { verdict, .. }) => verdict.log.clone(),
            Err(TestFailure::Failed(failed)) => failed.log.clone(),
            Err(_) => Vec::new(),
        };
        let image = candidate.image.manifest.to_string();
        let mut properties = vec![("image".to_owned(), image)];
        let request = candidate.request.digest();
        properties.extend(request.map(|digest| ("request".to_owned(), digest.to_string())));
        let suite = Suite {
            name: candidate.name.to_string(),
            properties,
            cases,
            log,
        };
        let suites = self.suites.lock();
        suites.unwrap_or_else(PoisonError::into_inner).push(suite);
    }

    pub(super) fn test_request(
        &self,
        name: &ServiceName,
        service: &Service,
        image: &Image,
        files: &BTreeMap<String, FileVersion>,
    ) -> Result<TestRequest, Failure> {
        let argv = process::command(service, &image.config);
        if argv.is_empty() {
            return Err(Failure::new(
                Kind::Input,
                format!("service `{name}`: neither its image nor the file says what to run"),
            )
            .hint("add `command:`"));
        }
        let spec = self.spec();
        let completes = spec.services.values().any(|other| {
            other
                .depends_on
                .get(name)
                .is_some_and(|d| d.condition == kiln_model::spec::Condition::CompletedSuccessfully)
        }) || service.mode == kiln_model::spec::ServiceMode::Job;
        let mounts = service.mounts.iter();
        let mut mounts: Vec<InstanceMount> = mounts
            .filter_map(|mount| stand_in(mount, self.file_of_volume(mount)))
            .collect();
        mounts.extend(self.file_mounts(service, files)?);
        Ok(TestRequest {
            name: name.to_string(),
            image: image.manifest,
            argv,
            env: process::environment(service, &image.config, name.as_str()),
            cwd: service
                .process
                .working_dir
                .clone()
                .or_else(|| Some(image.config.working_dir.clone()).filter(|d| !d.is_empty()))
                .unwrap_or_else(|| "/".into()),
            user: service
                .process
                .user
                .clone()
                .unwrap_or_else(|| image.config.user.clone()),
            group_add: service.process.group_add.clone(),
            stop_signal: service
                .process
                .stop_signal
                .clone()
                .or_else(|| image.config.stop_signal.clone())
                .unwrap_or_else(|| "SIGTERM".into()),
            // Nothing depends on how a test instance ends.
            stop_grace: TEST_GRACE,
            init: service.process.init,
            mounts,
            volumes: image.config.volumes.clone(),
            security: process::security(service),
            limits: process::limits(&service.limits),
            healthcheck: kiln_plan::merged_check(
                &service.health,
                image.config.healthcheck.as_ref(),
            ),
            shell: image.config.shell.clone(),
            checks: service.kiln.test.clone(),
            suites: spec.suites_of(&service.kiln.test),
            post_start: service.post_start.clone(),
            completes,
            peers: spec.services.len() > 1,
            hosts: peer_names(spec, name),
            settle: if completes { JOB_LIMIT } else { SETTLE },
        })
    }

    /// The file that a part of a volume is, if it is there and is one.
    fn file_of_volume(&self, mount: &Mount) -> Option<PathBuf> {
        let MountSource::Volume {
            volume,
            subpath: Some(subpath),
            ..
        } = &mount.source
        else {
            return None;
        };
        let name = &self.spec().volumes.get(volume)?.name;
        let volumes = self.context.root.join("volumes");
        let path = volumes.join(name.as_str()).join("data").join(subpath);
        // Only to be looked at in a test: a link is nothing to follow.
        std::fs::symlink_metadata(&path)
            .ok()?
            .is_file()
            .then_some(path)
    }

    fn file_mounts(
        &self,
        service: &Service,
        files: &BTreeMap<String, FileVersion>,
    ) -> Result<Vec<InstanceMount>, Failure> {
        let secrets = SecretStore::open(&self.context.root).map_err(machine)?;
        let mounts = service.files.iter().filter_map(|file| {
            let path = match files.get(&file.key())? {
                FileVersion::Config(digest) => self.store.blob_path(digest),
                FileVersion::Secret(id) => secrets.path(id),
            };
            let (uid, gid, mode) = (file.uid, file.gid, file.mode);
            let secret = file.kind == FileKind::Secret;
            Some(InstanceMount {
                source: InstanceMountSource::File {
                    path,
                    uid,
                    gid,
                    mode,
                    secret,
                },
                target: file.target.clone(),
                read_only: true,
                exec: false,
                dev: false,
            })
        });
        Ok(mounts.collect())
    }
}

/// Every check, where it could be found out how they went.
fn cases(tested: &Result<Tested, TestFailure>) -> Option<&[Case]> {
    match tested {
        Ok(Tested { verdict, .. }) => Some(&verdict.cases),
        Err(TestFailure::Failed(failed)) => Some(&failed.cases),
        Err(TestFailure::Machine { .. } | TestFailure::Cancelled) => None,
    }
}

/// `11 passed, 1 skipped`
fn counted(cases: &[Case]) -> String {
    let of = |is: fn(&CaseResult) -> bool| cases.iter().filter(|c| is(&c.result)).count();
    let counts = [
        (of(|r| matches!(r, CaseResult::Passed)), "passed"),
        (of(|r| matches!(r, CaseResult::Skipped(_))), "skipped"),
        (of(|r| matches!(r, CaseResult::Failed(_))), "failed"),
    ];
    let said = counts.iter().filter(|(count, _)| *count > 0);
    let said: Vec<String> = said
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    said.join(", ")
}

/// The names of the other services. Programs like nginx won't start when a peer's name
/// doesn't resolve; connecting is refused at once.
fn peer_names(spec: &Spec, name: &ServiceName) -> Vec<(std::net::IpAddr, String)> {
    let nobody = std::net::IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
    let mut names = BTreeSet::new();
    for (other, service) in spec.services.iter().filter(|(other, _)| *other != name) {
        names.insert(other.to_string());
        names.extend(service.names.container_name.clone());
        if let kiln_model::spec::NetworkMode::Networks(networks) = &service.network {
            names.extend(networks.values().flat_map(|n| n.aliases.clone()));
        }
    }
    names.into_iter().map(|name| (nobody, name)).collect()
}

/// Something harmless in place of what the test must not touch: of a `file`, a copy.
fn stand_in(mount: &Mount, file: Option<PathBuf>) -> Option<InstanceMount> {
    let source = match &mount.source {
        MountSource::Volume { .. } if file.is_some() => InstanceMountSource::File {
            path: file?,
            uid: 0,
            gid: 0,
            mode: 0o644,
            secret: false,
        },
        // One that is yet to be made is empty.
        MountSource::Bind { path, create, .. } if mount.read_only && (!create || path.exists()) => {
            InstanceMountSource::Bind {
                path: path.clone(),
                recursive: true,
                propagation: None,
            }
        }
        // What the program finds of a host's folder it would also write to.
        MountSource::Bind { path, .. } if path.is_file() => return None,
        MountSource::Image { .. } => return None,
        _ => InstanceMountSource::Tmpfs {
            size: None,
            mode: Some(0o1777),
            uid: None,
            gid: None,
        },
    };
    Some(InstanceMount {
        source,
        target: mount.target.clone(),
        read_only: mount.read_only,
        exec: mount.exec || mount.read_only,
        dev: false,
    })
}

fn test_failure(error: &TestFailure) -> Failure {
    let failure = Failure::with_causes(Kind::Test, error);
    if failure.hint.is_some() {
        return failure;
    }
    failure.hint("nothing that runs was touched; fix the image, or the checks under x-kiln.test")
}
