//! Files of tests that `x-kiln.test` names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::path::Path;

use kiln_compose::{LoadError, LoadOptions, Loaded, load};
use kiln_model::Millis;
use kiln_model::spec::Check;
use kiln_model::suite::{
    ExecutableBy, Matcher, Pattern, Probe, Resource, Structure, Suite, SuiteKind, Wanted,
};

const PROJECT: &str = "/p/compose.yaml";

/// Loads a project of these files below `/p`.
fn loaded(files: &[(&str, &str)]) -> Result<Loaded, LoadError> {
    let reader = |path: &Path| {
        let found = files
            .iter()
            .find(|(name, _)| Path::new("/p").join(name) == path);
        found
            .map(|(_, text)| text.as_bytes().to_vec())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    let options = LoadOptions {
        files: vec![PROJECT.into()],
        folder: "/p".into(),
        ..LoadOptions::default()
    };
    load(&options, &reader)
}

fn naming(kind: &str, file: &str) -> String {
    format!("services: {{a: {{image: x, x-kiln: {{test: [{{{kind}: {file}}}]}}}}}}")
}

/// What is wrong with a file of tests, one line each.
fn wrong(kind: &str, text: &str) -> Vec<String> {
    let compose = naming(kind, "t/x.yaml");
    let error = loaded(&[("compose.yaml", &compose), ("t/x.yaml", text)]);
    lines(&error.expect_err("is refused"))
}

fn lines(error: &LoadError) -> Vec<String> {
    error.to_string().lines().map(str::to_owned).collect()
}

fn structure(name: &str, text: &str) -> (Check, Structure) {
    let compose = naming("structure", name);
    let loaded = loaded(&[("compose.yaml", &compose), (name, text)]).expect("is read");
    let check = loaded.spec.services["a"].kiln.test[0].clone();
    let Check::Suite { digest, .. } = check else {
        panic!("{check:?}")
    };
    assert!(loaded.files_read.contains(&Path::new("/p").join(name)));
    match &loaded.spec.suites[&digest] {
        Suite::Structure(suite) => (check, *suite.clone()),
        other => panic!("{other:?}"),
    }
}

const WHOLE: &str = r#"
schemaVersion: 2.0.0
globalEnvVars:
  - {key: VIRTUAL_ENV, value: /env}
  - {key: PATH, value: "/env/bin:$PATH"}
commandTests:
  - name: version
    setup: [[virtualenv, /env], [touch, /x]]
    teardown: [[rm, /x]]
    envVars: [{key: A, value: b}]
    exitCode: 3
    command: app
    args: ["--version", 7]
    expectedOutput: ['^v\d+']
    excludedOutput: [beta]
    expectedError: ['\Qa+b\E']
    excludedError: ["{"]
fileExistenceTests:
  - {name: root, path: /, permissions: drwxr-xr-x, uid: 0, gid: -1, isExecutableBy: any}
  - {name: none, path: /nope, shouldExist: false}
fileContentTests:
  - {name: hosts, path: /etc/hosts, expectedContents: [local], excludedContents: [evil]}
metadataTest:
  envVars: [{key: A, value: b}, {key: V, value: '^\d$', isRegex: true}]
  unboundEnvVars: [{key: NOPE}]
  labels: [{key: l, value: m}]
  exposedPorts: [80, "53/udp"]
  unexposedPorts: ["22"]
  volumes: [/data]
  unmountedVolumes: [/tmp]
  entrypoint: []
  cmd: [/bin/sh, -c]
  workdir: /app
  user: luke
licenseTests: [{debian: true, files: [/a]}]
containerRunOptions: {user: nobody, privileged: false, allocateTty: true, capabilities: [NET_RAW], bindMounts: []}
"#;

#[test]
fn a_structure_file_is_read_whole() {
    let (check, suite) = structure("t/image.yaml", WHOLE);
    let Check::Suite { kind, path, .. } = check else {
        panic!("{check:?}")
    };
    assert_eq!(
        (kind, path.as_str()),
        (SuiteKind::Structure, "t/image.yaml")
    );
    assert_eq!(suite.env[1], ("PATH".into(), "/env/bin:$PATH".into()));
    let command = &suite.commands[0];
    assert_eq!(command.argv, ["app", "--version", "7"]);
    assert_eq!(
        command.setup,
        [vec!["virtualenv", "/env"], vec!["touch", "/x"]]
    );
    assert_eq!(command.teardown, [["rm", "/x"]]);
    assert_eq!((command.exit, command.env.len()), (3, 1));
    assert_eq!(command.expected_output, [Pattern(r"^v\d+".into())]);
    assert_eq!(command.excluded_error, [Pattern("{".into())]);
    let [root, none] = suite.existence.as_slice() else {
        panic!("{:?}", suite.existence)
    };
    assert_eq!(root.permissions.as_deref(), Some("drwxr-xr-x"));
    assert_eq!((root.uid, root.gid), (Some(0), None));
    assert_eq!(root.executable_by, Some(ExecutableBy::Any));
    assert!(root.exists && !none.exists);
    let metadata = suite.metadata.unwrap();
    assert_eq!(metadata.env["V"], Wanted::Match(Pattern(r"^\d$".into())));
    assert_eq!(metadata.exposed, ["80", "53/udp"]);
    assert_eq!(metadata.entrypoint, Some(vec![]));
    assert_eq!(metadata.unbound, ["NOPE"]);
    assert!(suite.licenses[0].debian && suite.tty);
    assert_eq!(suite.user.as_deref(), Some("nobody"));
    assert_eq!(suite.capabilities, ["NET_RAW"]);
}

#[test]
fn json_is_read_and_another_content_is_another_digest() {
    let text = "{\n\t\"schemaVersion\": \"2.0.0\",\n\t\"licenseTests\": [{\"debian\": false}]\n}\n";
    let (first, suite) = structure("t/image.json", text);
    assert_eq!(suite.licenses.len(), 1);
    let (second, _) = structure("t/image.json", &text.replace("false", "true"));
    assert_ne!(first, second, "a changed file is tested again");
}

#[test]
fn what_is_wrong_is_told_by_its_place_in_the_file() {
    let told = wrong(
        "structure",
        "schemaVersion: '2.0.0'\ncommandTests:\n- name: a\n  command: b\n  exitcode: 1\n\
         - command: c\n- {name: d, command: e, expectedOutput: ['(?=x)']}\n\
         fileExistenceTests:\n- {name: f, path: /g, isExecutableBy: me}\n\
         metadataTest: {ports: ['80']}\n\
         containerRunOptions:\n  envFile: .env\n  privileged: true\n  bindMounts: ['/a:/b']\n",
    );
    let told = told.join("\n");
    for wanted in [
        "t/x.yaml:5:3: error: unknown key `exitcode` in commandTests[0] (did you mean `exitCode`?)",
        "t/x.yaml:6:3: error: commandTests[1]: the key `name` is missing",
        "t/x.yaml:7:42: error: commandTests[2].expectedOutput[0]: `(?=x)` is not a regular expression: look-around",
        "t/x.yaml:9:39: error: fileExistenceTests[0].isExecutableBy is owner, group, other or any",
        "t/x.yaml:10:16: error: unknown key `ports` in metadataTest",
        "t/x.yaml:12:3: error: kiln does not support `containerRunOptions.envFile`: the verdict",
        "t/x.yaml:13:3: error: kiln does not support `containerRunOptions.privileged`: a test gets",
        "t/x.yaml:14:3: error: kiln does not support `containerRunOptions.bindMounts`: a test of",
    ] {
        assert!(told.contains(wanted), "{wanted}\nis not in\n{told}");
    }
    assert_eq!(told.lines().count(), 8, "{told}");
    for (text, wanted) in [
        ("", "t/x.yaml:1:1: error: the file of tests is empty"),
        ("a: 1", "the key `schemaVersion` is missing"),
        (
            "schemaVersion: 1.0.0",
            "schemaVersion `1.0.0` is not known; kiln reads 2.0.0",
        ),
        (
            "schemaVersion: 2.0.0\n---\n{}",
            "t/x.yaml:3:1: error: a file of tests has one document",
        ),
        ("a: [", "t/x.yaml:1:"),
    ] {
        let told = wrong("structure", text).join("\n");
        assert!(told.contains(wanted), "{text}: {told}");
    }
    let missing = loaded(&[("compose.yaml", &naming("structure", "no.yaml"))]);
    let told = missing.expect_err("is refused").to_string();
    assert!(told.contains("compose.yaml:1:"), "{told}");
    assert!(
        told.contains("the file of tests /p/no.yaml not found"),
        "{told}"
    );
}

fn goss(files: &[(&str, &str)]) -> (Vec<String>, Vec<Resource>) {
    let compose = naming("goss", "t/goss.yaml");
    let mut all = vec![("compose.yaml", compose.as_str())];
    all.extend(files);
    let loaded = loaded(&all).expect("is read");
    let notes = loaded.notes.iter().map(|note| note.message.clone());
    match loaded.spec.suites.values().next() {
        Some(Suite::Goss(goss)) => (notes.collect(), goss.resources.clone()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_goss_file_is_read_whole() {
    let text = r#"
file:
  /etc/passwd:
    exists: true
    mode: "0644"
    size: {lt: 3000}
    contents: [root, "!evil", "/^daemon:/"]
    title: accounts
    meta: {any: thing}
  link: {path: /etc/l, exists: true, linked-to: ../l, skip: true}
command:
  version:
    exec: app --version
    exit-status: 0
    stdout: {and: [{have-prefix: v}, {match-regexp: '\d$'}, {not: {contain-substring: beta}}]}
    stderr: []
    timeout: 200
    retry_count: 2
    retry_delay: 500ms
http:
  http://localhost:8080/a?b:
    status: 200
    body: {gjson: {a.0: {ge: 2.5}}}
    headers: ["/^Content-Type: text/i"]
    request-headers: ["X-A: b: c"]
    username: u
    password: p
    no-follow-redirects: true
    allow-insecure: true
port: {tcp:80: {listening: true, ip: [0.0.0.0]}, udp6:53: {listening: false}}
addr: {tcp://localhost:80: {reachable: true}}
dns: {localhost: {resolvable: true, addrs: {consist-of: [127.0.0.1]}}}
user: {app: {exists: true, uid: 5, groups: [app]}}
matching: {x: {content: [1, {a: b}], matches: {have-len: 2}}}
"#;
    let (notes, resources) = goss(&[("t/goss.yaml", text)]);
    assert_eq!(
        notes,
        ["command.version.stderr: an empty list asks for nothing"]
    );
    let ids: Vec<&str> = resources.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "file /etc/passwd",
            "file link: /etc/l",
            "command version: app --version",
            "http http://localhost:8080/a?b",
            "port tcp:80",
            "port udp6:53",
            "addr tcp://localhost:80",
            "dns localhost",
            "user app",
            "matching x"
        ]
    );
    let [file, link, command, http, ..] = resources.as_slice() else {
        panic!("{resources:?}")
    };
    let names: Vec<&str> = file
        .attributes
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["exists", "mode", "contents", "size"]);
    assert_eq!(file.attributes[1].1, Matcher::Text("0644".into()));
    assert!(!file.skip && link.skip);
    assert_eq!(
        command.probe,
        Probe::Command {
            exec: "app --version".into(),
            timeout: Millis(200)
        }
    );
    let Matcher::And(all) = &command.attributes[1].1 else {
        panic!("{command:?}")
    };
    assert_eq!(all[0], Matcher::HavePrefix("v".into()));
    let Probe::Http(request) = &http.probe else {
        panic!("{http:?}")
    };
    assert_eq!((request.host.as_str(), request.port), ("localhost", 8080));
    assert_eq!((request.path.as_str(), request.follow), ("/a?b", false));
    assert_eq!(request.headers, [("X-A".to_owned(), "b: c".to_owned())]);
    assert_eq!(request.login, Some(("u".into(), "p".into())));
}

#[test]
fn goss_files_include_others_and_the_later_wins() {
    let main = "gossfile: {more.yaml: {}, off: {file: none.yaml, skip: true}}\n\
                process: {a: {running: true}, b: {running: true}}\n";
    let more = "process: {b: {running: false}}\ngossfile: {../up.yaml: {}}\n";
    let files = |up| {
        [
            ("t/goss.yaml", main),
            ("t/more.yaml", more),
            ("up.yaml", up),
        ]
    };
    let (_, resources) = goss(&files("process: {c: {running: true}}"));
    let running: Vec<(&str, bool)> = resources
        .iter()
        .map(|r| (r.id.as_str(), r.attributes[0].1 == Matcher::Bool(true)))
        .collect();
    // What is included is merged where it is named: here before the file's own.
    assert_eq!(
        running,
        [
            ("process b", true),
            ("process c", true),
            ("process a", true)
        ]
    );
    let digest = |up| {
        let compose = naming("goss", "t/goss.yaml");
        let mut all = vec![("compose.yaml", compose.as_str())];
        let files = files(up);
        all.extend(files);
        *loaded(&all).unwrap().spec.suites.keys().next().unwrap()
    };
    assert_ne!(
        digest("process: {c: {running: true}}"),
        digest("process: {c: {running: false}}"),
        "an included file is part of the digest"
    );
    let compose = naming("goss", "t/goss.yaml");
    let own = "gossfile: {goss.yaml: {}}";
    let endless = loaded(&[("compose.yaml", &compose), ("t/goss.yaml", own)]);
    let told = endless.expect_err("is refused").to_string();
    assert!(told.contains("more than 50 files deep"), "{told}");
}

#[test]
fn what_an_instance_has_not_is_refused_by_its_place() {
    let told = wrong(
        "goss",
        "service: {sshd: {running: true}}\n\
         file: {/a: {exists: true, md5: x, moed: 1}, b: {exists: true}}\n\
         command: {x: {stdout: [/(/]}}\n\
         http: {'https://localhost/': {status: 200}, 'http://a/': {status: 1, proxy: p}}\n\
         dns: {a: {resolvable: true, server: 8.8.8.8}}\n\
         gossfile: {'*.yaml': {}}\n\
         user: {u: {exists: {gt: 1, lt: 2}}}\n\
         matching: {m: {content: 1, matches: {xml: {}}}, n: {content: {}, matches: {gjson: {'a.#': 1}}}}\n",
    );
    let told = told.join("\n");
    for wanted in [
        "t/x.yaml:1:1: error: kiln does not support `service`: an instance has no init system",
        "t/x.yaml:2:27: error: kiln does not support `file./a.md5`",
        "unknown key `moed` in file./a (did you mean `mode`?)",
        "file.b: `b` is not an absolute path",
        "t/x.yaml:3:11: error: command.x: the key `exit-status` is missing",
        "command.x.stdout[0]: `(` is not a regular expression",
        "kiln does not support `http.https://localhost/: https://localhost/`: only plain HTTP",
        "kiln does not support `http.http://a/.proxy`",
        "t/x.yaml:5:29: error: kiln does not support `dns.a.server`",
        "kiln does not support `gossfile.*.yaml: *.yaml`: what a pattern finds",
        "user.u.exists needs exactly one of equal",
        "kiln does not support `xml`",
        "kiln does not support `a.#`",
    ] {
        assert!(told.contains(wanted), "{wanted}\nis not in\n{told}");
    }
    let told = wrong("goss", "file:\n  {{.Env.X}}: {exists: true}\n").join("\n");
    assert!(told.contains("t/x.yaml:2:3"), "{told}");
}

#[test]
fn the_service_that_tests_the_whole_stack_is_out_of_releases() {
    let project = |test: &str, keys: &str| {
        let text = format!(
            "x-kiln: {{test: {test}}}\nservices:\n  a: {{image: x}}\n  check: {{image: x{keys}}}\n"
        );
        loaded(&[("compose.yaml", &text)])
    };
    let loaded = project("{service: check, timeout: 5s}", ", profiles: [test]").unwrap();
    let stack = loaded.spec.stack.unwrap();
    assert_eq!(
        (stack.service.as_str(), stack.timeout),
        ("check", Millis(5000))
    );
    assert!(!loaded.spec.services.contains_key("check"));
    for (test, keys, wanted) in [
        (
            "{service: check}",
            "",
            "1:26: error: x-kiln.test.service: `check` would be part of every release (give",
        ),
        (
            "{service: chek}",
            ", profiles: [t]",
            "there is no service `chek` (did you mean `check`?)",
        ),
        ("{timeout: 1s}", "", "the key `service` is missing"),
        ("{servce: check}", "", "unknown key `servce`"),
    ] {
        let told = project(test, keys).expect_err(test).to_string();
        assert!(told.contains(wanted), "{wanted}\nis not in\n{told}");
    }
}
