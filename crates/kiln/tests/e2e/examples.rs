//! The examples in `examples/`, as a newcomer starts them.

use std::fs;
use std::path::Path;

use kiln_testkit::load::Mode;
use serde_json::Value;

use crate::common::{Answer, Kiln, Project, get, request, wait_until};
use crate::load::under_load;

/// A copy of an example, so that nothing is written where it is.
fn example<'k>(kiln: &'k Kiln, name: &str, port: &str) -> Project<'k> {
    let mut project = kiln.project(name, &[]);
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name);
    copy(&source, &project.folder);
    let port_number = project.port;
    project.set(port, port_number);
    project
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn scratch_serves_and_has_nothing_else_in_it() {
    let Some(kiln) = Kiln::new() else { return };
    let project = example(&kiln, "scratch", "SCRATCH_PORT");
    project.up().ok();
    assert!(project.page().contains("One file serves this page"));
    let ran = project.kiln(&[
        "exec",
        "-T",
        "-e",
        "@",
        "web",
        "/bin/busybox",
        "find",
        "/bin",
        "/www",
    ]);
    let mut files: Vec<&str> = ran.stdout.lines().collect();
    files.sort_unstable();
    assert_eq!(
        files,
        ["/bin", "/bin/busybox", "/www", "/www/index.html"],
        "{ran}"
    );
}

#[test]
fn a_declared_image_serves_and_is_built_once() {
    let Some(kiln) = Kiln::new() else { return };
    let project = example(&kiln, "distroless", "DISTROLESS_PORT");
    project.up().ok();
    assert!(project.page().contains("only its own files"));
    // No change: no work. One of its files: a new release.
    let before = project.instances(None);
    project.up().ok();
    assert_eq!(project.instances(None), before);
    project.edit("pages/index.html", "only its own", "only its very own");
    project.edit(
        "compose.yaml",
        "body: only its own",
        "body: only its very own",
    );
    project.up().ok();
    assert!(project.page().contains("only its very own"));
    // A place for what only the build finds.
    project.edit("compose.yaml", "owner: www-data", "owner: nobody-here");
    let told = project.run("up", &[]).code(&[4]);
    told.says(&["compose.yaml:", "/var/lib/nginx", "nobody-here"]);
}

#[test]
fn the_site_is_replaced_under_load_and_rolled_back() {
    let Some(kiln) = Kiln::new() else { return };
    let project = example(&kiln, "site", "SITE_PORT");
    project.up().ok();
    assert!(project.page().contains("It is fired"));
    project.edit("pages/index.html", "It is fired", "It is fired again");
    let mode = Mode::KeepAlive { connections: 8 };
    let (report, ()) = under_load(project.port, mode, 500, || {
        project.up().ok();
        assert!(project.page().contains("It is fired again"));
        project.kiln(&["rollback", "-e", "@"]).ok();
        assert!(!project.page().contains("It is fired again"));
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(project.instances(None).len(), 1);
}

fn json(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|e| panic!("{e}: {answer:?}"))
}

fn version(project: &Project) -> String {
    json(&project.get("/version"))["version"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn the_shop_takes_orders_and_keeps_them_through_replacements() {
    let Some(kiln) = Kiln::new() else { return };
    let mut project = example(&kiln, "shop", "SHOP_PORT");
    project.up().ok();
    assert!(project.page().contains("The kiln shop"));
    assert_eq!(version(&project), "1");
    let order = |text: &str| {
        let answer = request(project.port, "POST", "/orders", text).unwrap();
        assert_eq!(answer.status, 201, "{answer:?}");
        json(&answer)["receipt"].as_str().unwrap().to_owned()
    };
    let receipt = order("a cup");
    assert_eq!(receipt, order("a cup"), "the same order, the same secret");
    let done = |project: &Project| json(&project.get("/orders"))["done"].as_u64();
    wait_until("both orders done", || done(&project) == Some(2));

    let before = project.instances(None);
    let of = |list: &[crate::common::Instance], service: &str| -> Vec<String> {
        list.iter()
            .filter(|i| i.service == service)
            .map(|i| i.id.clone())
            .collect()
    };
    project.set("SHOP_VERSION", 2);
    let (report, ()) = under_load(project.port, Mode::NewConnection, 50, || {
        project.up().ok();
    });
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(version(&project), "2");
    let after = project.instances(None);
    // Only what the variable concerns was replaced.
    for service in ["front", "redis", "worker"] {
        assert_eq!(of(&before, service), of(&after, service), "{service}");
    }
    assert_ne!(of(&before, "web"), of(&after, "web"));

    // The front's config is part of the release, the secret too.
    project.edit(
        "compose.yaml",
        "access_log off;",
        "access_log off;\n        # changed",
    );
    project.write("secrets/cashier.txt", "another");
    project.up().ok();
    assert_ne!(
        receipt,
        json(&request(project.port, "POST", "/orders", "a cup").unwrap())["receipt"]
    );
    assert_ne!(of(&project.instances(None), "front"), of(&before, "front"));
    assert_eq!(of(&project.instances(None), "redis"), of(&before, "redis"));

    project.kiln(&["rollback", "1", "-e", "@"]).ok();
    assert_eq!(version(&project), "1");
    wait_until("orders outlive it all", || done(&project) == Some(3));
}

#[test]
fn the_shops_redis_is_handed_over_while_it_is_used() {
    let Some(kiln) = Kiln::new() else { return };
    let project = example(&kiln, "shop", "SHOP_PORT");
    project.up().ok();
    let visits = || {
        let page = project.page();
        let number = page.rsplit("number ").next().unwrap_or_default();
        number
            .trim_end_matches('.')
            .parse::<u64>()
            .unwrap_or_else(|e| panic!("{e}: {page}"))
    };
    let before = visits();
    project.edit(
        "compose.yaml",
        "--appendonly, \"yes\"",
        "--appendonly, \"yes\", --hz, \"20\"",
    );
    let (report, ()) = under_load(project.port, Mode::NewConnection, 20, || {
        project.up().ok();
    });
    assert_eq!(report.failed(), 0, "{report}");
    // Each answered request counted once, none was lost with the old redis.
    assert_eq!(visits(), before + report.succeeded + 1);
}

#[test]
fn the_shops_bad_releases_leave_it_serving() {
    let Some(kiln) = Kiln::new() else { return };
    let project = example(&kiln, "shop", "SHOP_PORT");
    project.up().ok();
    let before = project.instances(None);
    // A broken program, found by the isolated test.
    project.edit(
        "app/web.py",
        "def main():",
        "def main():\n    raise RuntimeError('bad glaze')",
    );
    project
        .run("up", &[])
        .code(&[5])
        .says(&["bad glaze", "web"]);
    project.edit("app/web.py", "\n    raise RuntimeError('bad glaze')", "");
    // A migration that fails only beside its peers.
    let bad = "def main():\n    resp.ask(\"PING\")\n    raise RuntimeError('cold kiln')";
    project.edit("app/migrate.py", "def main():", bad);
    project
        .run("up", &[])
        .code(&[1])
        .says(&["cold kiln", "migrate"]);
    assert_eq!(version(&project), "1");
    assert!(
        get(project.port, "/")
            .unwrap()
            .body
            .contains("The kiln shop")
    );
    wait_until("only the old instances", || {
        project.instances(None) == before
    });
}
