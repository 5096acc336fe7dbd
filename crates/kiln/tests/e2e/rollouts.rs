//! After the switch: a release that fails then is returned from, old instances that are
//! kept ready serve again at once, and people have a word in it.

use kiln_testkit::load::Mode;

use crate::common::{Kiln, Page, Project, wait_until};
use crate::load::under_load;

/// Serves in the isolated test, and in earnest for a while.
const DIES_LATER: &str = "test \"$(hostname)\" = kiln-test || \
     { httpd -f -p 8000 -h /www & sleep 3; echo broken on purpose; exit 7; }";

/// Release 1 serves; the next `up` is of a program that ends soon after its switch.
fn about_to_fail<'k>(kiln: &'k Kiln, name: &str, keys: &str) -> Project<'k> {
    let project = kiln.page(name, &Page::default());
    project.up().ok();
    let bad = Page {
        before: DIES_LATER,
        keys,
        ..Page::default()
    };
    project.write("compose.yaml", &bad.compose());
    project.write("run", &bad.program());
    project.write("www/index.html", "two");
    project
}

#[test]
fn a_program_that_ends_while_it_is_watched_gives_traffic_back_to_the_same_instances() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    deploy: {update_config: {monitor: 60s}}";
    let project = about_to_fail(&kiln, "watched", keys);
    let before = project.instances(None);
    let ran = project.run("up", &[]);
    ran.code(&[1]).says(&[
        "after traffic had moved",
        "broken on purpose",
        "release 1 serves",
    ]);
    assert_eq!(project.page(), "one");
    wait_until("only the old instances", || {
        project.instances(None) == before
    });
    let expected = [(1, "proven".into()), (2, "failed".into())];
    assert_eq!(project.releases(), expected);
}

#[test]
fn without_a_word_up_returns_at_once_and_the_release_is_watched_all_the_same() {
    let Some(kiln) = Kiln::new() else { return };
    let project = about_to_fail(&kiln, "unasked", "");
    project.up().ok();
    assert_eq!(project.page(), "two");
    let watch = project.status()["watch"].clone();
    assert_eq!((&watch["release"], &watch["back"]), (&2.into(), &1.into()));
    project.wait_for_page("one");
    wait_until("the outcome", || {
        project.releases() == [(1, "proven".into()), (2, "failed".into())]
    });
    assert_eq!(project.status()["serving"], 1);
    let said = project.kiln(&["events", "-e", "unasked"]).ok().stdout;
    assert!(said.contains("after traffic had moved"), "{said}");
}

#[test]
fn a_paused_rollout_waits_for_a_word() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    deploy: {update_config: {failure_action: pause, monitor: 60s}}";
    let project = about_to_fail(&kiln, "paused", keys);
    let rollout = |word: &str| project.kiln(&["rollout", word, "-e", "paused"]);
    rollout("pause").code(&[7]).says(&["no rollout"]);
    rollout("abort").code(&[7]).says(&["no rollout"]);
    rollout("promote").code(&[7]).says(&["no rollout"]);
    project
        .run("up", &[])
        .code(&[1])
        .says(&["release 2 is paused", "kiln rollout resume"]);
    let status = project.status();
    assert_eq!(status["serving"], 2, "{status}");
    assert_eq!(status["rollout"]["state"], "paused", "{status}");
    let shown = rollout("status").ok().stdout;
    assert!(shown.contains("release 2 is paused"), "{shown}");
    project.run("up", &[]).code(&[7]);
    rollout("abort").ok();
    project.wait_for_page("one");
    wait_until("the outcome", || {
        project.releases() == [(1, "proven".into()), (2, "failed".into())]
    });
}

#[test]
fn a_promoted_release_is_proven_and_the_old_instances_go() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {rollout: {monitor: 1h}}";
    let page = Page {
        keys,
        ..Page::default()
    };
    let project = kiln.page("promoted", &Page::default());
    project.up().ok();
    let before = project.instances(None);
    project.write("compose.yaml", &page.compose());
    project.write("www/index.html", "two");
    project.run("up", &["--detach"]).ok();
    project.wait_for_page("two");
    wait_until("the watch", || {
        project.status()["rollout"]["state"] == "watching"
    });
    let now = project.instances(None);
    assert!(before.iter().all(|i| now.iter().any(|n| n.id == i.id)));
    project.kiln(&["rollout", "promote", "-e", "promoted"]).ok();
    wait_until("the old ones' end", || {
        let now = project.instances(None);
        before.iter().all(|i| now.iter().all(|n| n.id != i.id))
    });
    let proven = [(1, "proven".into()), (2, "proven".into())];
    assert_eq!(project.releases(), proven);
}

#[test]
fn a_rollback_to_what_is_warm_starts_nothing_and_drops_nothing() {
    let Some(kiln) = Kiln::new() else { return };
    let keys = "    x-kiln: {rollout: {strategy: blue-green, keep_warm: 1h}}\n    scale: 2";
    let page = Page {
        keys,
        ..Page::default()
    };
    let project = kiln.page("warm", &page);
    project.up().ok();
    let mut before: Vec<String> = ids(&project);
    project.write("www/index.html", "two");
    project.up().ok();
    assert_eq!(project.page(), "two");
    let (report, ran) = under_load(project.port, Mode::NewConnection, 50, || {
        project.kiln(&["rollback", "-e", "warm"])
    });
    ran.ok();
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.page(), "one");
    let mut serving = project.instances(None);
    serving.retain(|i| i.serving);
    let mut serving: Vec<String> = serving.into_iter().map(|i| i.id).collect();
    before.sort();
    serving.sort();
    assert_eq!(before, serving);
}

fn ids(project: &Project) -> Vec<String> {
    project.instances(None).into_iter().map(|i| i.id).collect()
}
