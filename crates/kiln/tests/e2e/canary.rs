//! Traffic that moves step by step, and releases that are judged by what the proxy counts.

use std::io::{Read, Write};
use std::net::TcpListener;

use kiln_testkit::load::Mode;

use crate::common::{App, Kiln, Project, get, wait_until};
use crate::load::under_load;

const KEPT: Mode = Mode::KeepAlive { connections: 8 };
/// The program fails as often as `FAIL` says, at first never. What fails every request gets
/// traffic only where its port alone is asked.
const FAILS: &str = "      APP_FAIL_PERCENT: \"${FAIL}\"";

fn app<'k>(kiln: &'k Kiln, name: &str, keys: &str) -> Project<'k> {
    let app = App {
        environment: FAILS,
        keys,
        ..App::default()
    };
    let mut project = kiln.app(name, &app);
    project.set("FAIL", 0);
    project.up().ok();
    project
}

/// Traffic is split as this step says.
fn wait_for_step(project: &Project, step: u64) {
    wait_until(&format!("step {step}"), || {
        let ran = project.run("status", &["--json"]);
        let status: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap_or_default();
        let canary = &status["rollout"]["canary"];
        canary["step"] == step && !canary["verdict_in"].is_null()
    });
}

/// Of so many requests, those that `version` answered.
fn answered_by(project: &Project, version: &str, requests: usize) -> usize {
    let answers = (0..requests).map(|_| get(project.port, "/").unwrap());
    answers.filter(|answer| answer.body == version).count()
}

fn outcomes(project: &Project) -> Vec<(u64, String)> {
    project.releases()
}

#[test]
fn a_good_canary_goes_through_its_steps_with_its_share_of_the_requests() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    deploy: {replicas: 2}\n    x-kiln: {rollout: {strategy: canary, \
                steps: [{weight: 10, duration: 8s}, {weight: 50%, duration: 8s}]}}";
    let mut project = app(&kiln, "steps", keys);
    project.set("VERSION", 2);
    let plan = project.run("plan", &[]).ok().stdout;
    for line in ["10 % of its traffic for 8s", "50 % of its traffic for 8s"] {
        assert!(plan.contains(line), "{plan}");
    }
    let up = project.start("up", &[]);
    for (step, weight) in [(1, 10), (2, 50)] {
        wait_for_step(&project, step);
        let share = answered_by(&project, "2", 200);
        let wanted = 2 * weight;
        assert!(share.abs_diff(wanted) <= 4, "{share} of 200 in step {step}");
        let shown = project
            .kiln(&["rollout", "status", "-e", "steps"])
            .ok()
            .stdout;
        assert!(
            shown.contains(&format!("step {step} of 2: {weight} % of web")),
            "{shown}"
        );
    }
    up.end().ok().says(&[
        "release 2 gets 10 % of web for 8s (step 1 of 2)",
        "canary step 1 of release 2 is good: web: ",
        "canary step 2 of release 2 is good: web: 0 of ",
        "release 2 is proven",
    ]);
    assert_eq!(answered_by(&project, "2", 50), 50);
    let expected = [(1, "proven".into()), (2, "proven".into())];
    assert_eq!(outcomes(&project), expected);
    let audit = kiln.run(&["audit", "--json"]).ok().stdout;
    assert_eq!(audit.matches("\"canary\"").count(), 2, "{audit}");
}

#[test]
fn a_canary_that_answers_500_is_taken_back_and_nothing_fails_after_that() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {ready: {tcp: 8000}, rollout: {strategy: canary, \
                steps: [{weight: 20, duration: 1h}], \
                analysis: {max_error_rate: 1%, min_requests: 50}}}";
    let mut project = app(&kiln, "taken-back", keys);
    let before = project.instances(None);
    project.set("VERSION", 2);
    project.set("FAIL", 100);
    let (during, ran) = under_load(project.port, KEPT, 100, || project.run("up", &[]));
    ran.code(&[1]).says(&[
        "canary step 1 of release 2 is bad: web: 1 of",
        "at 20 % of its traffic",
        "requests failed, the limit is 0.01",
        "release 1 serves",
    ]);
    let failed = during.failed();
    assert!(failed > 0 && failed * 3 < during.requests(), "{during}");
    let (after, ()) = under_load(project.port, KEPT, 100, || ());
    assert_eq!(after.failed(), 0, "{after}");
    wait_until("only the old instances", || {
        project.instances(None) == before
    });
    let expected = [(1, "proven".into()), (2, "failed".into())];
    assert_eq!(outcomes(&project), expected);
}

#[test]
fn a_step_that_too_few_ask_waits_for_more_and_then_for_somebody() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {rollout: {strategy: canary, steps: [{weight: 50, duration: 500ms}], \
                analysis: {min_requests: 30}}}";
    let mut project = app(&kiln, "few", keys);
    project.set("VERSION", 2);
    project.run("up", &[]).code(&[1]).says(&[
        "release 2 is paused: step 1 of the canary can't be judged",
        "0 of the 30 requests",
    ]);
    project.kiln(&["rollout", "resume", "-e", "few"]).ok();
    wait_for_step(&project, 1);
    answered_by(&project, "2", 80);
    wait_until("the outcome", || {
        outcomes(&project).last() == Some(&(2, "proven".into()))
    });
}

#[test]
fn a_daemon_killed_in_a_canary_comes_back_and_goes_on() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {rollout: {strategy: canary, steps: [{weight: 10, duration: 6s}]}}";
    let mut project = app(&kiln, "killed", keys);
    project.set("VERSION", 2);
    let (report, ()) = under_load(project.port, KEPT, 100, || {
        let up = project.start("up", &[]);
        wait_for_step(&project, 1);
        kiln.kill_daemon();
        up.end().ok();
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.page(), "2");
    let expected = [(1, "proven".into()), (2, "proven".into())];
    assert_eq!(outcomes(&project), expected);
}

#[test]
fn a_rolling_release_that_answers_500_goes_back_by_itself() {
    let Some(kiln) = Kiln::new() else { return };
    let keys =
        "    deploy: {replicas: 3}\n    x-kiln: {ready: {tcp: 8000}, rollout: {strategy: rolling}}";
    let mut project = app(&kiln, "rolling", keys);
    project.edit("compose.yaml", "rolling}", "rolling, monitor: 60s}");
    project.set("VERSION", 2);
    project.set("FAIL", 100);
    let (_, ran) = under_load(project.port, KEPT, 100, || project.run("up", &[]));
    ran.code(&[1])
        .says(&["requests failed, the limit is", "release 1 serves"]);
    let (after, ()) = under_load(project.port, KEPT, 100, || ());
    assert_eq!(after.failed(), 0, "{after}");
    let expected = [(1, "proven".into()), (2, "failed".into())];
    assert_eq!(outcomes(&project), expected);
}

#[test]
fn without_a_word_a_release_that_answers_500_goes_back_as_well() {
    let Some(kiln) = Kiln::new() else { return };
    let mut project = app(&kiln, "errors", "    x-kiln: {ready: {tcp: 8000}}");
    project.set("VERSION", 2);
    project.set("FAIL", 100);
    under_load(project.port, KEPT, 100, || {
        project.run("up", &[]).code(&[0, 1]);
        project.wait_for_page("1");
    });
    wait_until("the outcome", || {
        outcomes(&project) == [(1, "proven".into()), (2, "failed".into())]
    });
    let said = project.kiln(&["events", "-e", "errors"]).ok().stdout;
    assert!(said.contains("requests failed, the limit is"), "{said}");
}

#[test]
fn prometheus_has_a_say_at_the_end_of_a_step() {
    let Some(kiln) = Kiln::new() else { return };
    let (address, _server) = prometheus("5");
    let keys = format!(
        "    x-kiln: {{rollout: {{strategy: canary, steps: [{{weight: 50, duration: 1s}}], \
         analysis: {{prometheus: {{url: 'http://{address}', query: errors, max: 1}}}}}}}}"
    );
    let mut project = app(&kiln, "asked", &keys);
    project.set("VERSION", 2);
    project
        .run("up", &[])
        .code(&[1])
        .says(&["`errors` is 5, the limit is 1", "release 1 serves"]);
    assert_eq!(project.page(), "1");
}

/// Answers every query with this value. Who asks may die before it has the answer.
pub fn prometheus(value: &'static str) -> (std::net::SocketAddr, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let Ok(read @ 1..) = stream.read(&mut request) else {
                continue;
            };
            let asked = String::from_utf8_lossy(&request[..read]).into_owned();
            assert!(
                asked.starts_with("GET /api/v1/query?query=errors "),
                "{asked}"
            );
            let body = format!(
                r#"{{"status":"success","data":{{"resultType":"vector","result":[{{"metric":{{}},"value":[1,"{value}"]}}]}}}}"#
            );
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
            );
        }
    });
    (address, server)
}
