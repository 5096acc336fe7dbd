//! Files of tests, carried out on real images.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use kiln_build::test::{Case, CaseResult, TestFailure, TestRequest};
use kiln_model::spec::Check;
use kiln_model::suite::{
    CommandTest, Comparison, ContentTest, ExecutableBy, ExistenceTest, Goss, HttpProbe,
    LicenseTest, LinePattern, Matcher, MetadataTest, Pattern, PortProtocol, Probe, Resource,
    Structure, Suite, SuiteKind, Wanted,
};
use kiln_model::{Digest, Millis};
use world::{World, busybox, request, sandboxes, world};

fn naming(request: TestRequest, kind: SuiteKind, suite: Suite) -> TestRequest {
    let digest = Digest::of_json(&suite).unwrap();
    let check = Check::Suite {
        kind,
        path: "t.yaml".into(),
        digest,
    };
    TestRequest {
        checks: vec![check],
        suites: BTreeMap::from([(digest, suite)]),
        ..request
    }
}

fn cases(one: &World, request: &TestRequest) -> Vec<Case> {
    match one.tester().test_image(request, &AtomicBool::new(false)) {
        Ok(verdict) => verdict.cases,
        Err(TestFailure::Failed(failed)) => failed.cases,
        Err(other) => panic!("{other}"),
    }
}

/// Each case's cause, where it failed, without the file's name.
fn causes(cases: &[Case]) -> Vec<(&str, &str)> {
    let of_file = cases.iter().filter_map(|case| {
        let name = case.name.strip_prefix("t.yaml: ")?;
        Some((name, case.cause().unwrap_or("")))
    });
    of_file.collect()
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

fn patterns(all: &[&str]) -> Vec<Pattern> {
    all.iter().map(|text| Pattern((*text).into())).collect()
}

fn command(name: &str, argv: &[&str]) -> CommandTest {
    CommandTest {
        name: name.into(),
        setup: vec![],
        teardown: vec![],
        env: vec![],
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        exit: 0,
        expected_output: vec![],
        excluded_output: vec![],
        expected_error: vec![],
        excluded_error: vec![],
    }
}

#[test]
fn commands_of_a_structure_file_each_begin_with_the_image_as_it_is() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let text = format!("{base}ENV NAME=kiln\nWORKDIR /srv\nRUN echo v1.2 > /srv/version\n");
    let image = one.build(folder.path(), &text).unwrap();
    let commands = vec![
        CommandTest {
            setup: vec![words("touch /made"), words("false")],
            teardown: vec![words("rm /made")],
            expected_output: patterns(&[r"^/made\n$"]),
            ..command("sees its setup", &["ls", "/made"])
        },
        CommandTest {
            exit: 1,
            expected_output: patterns(&["^$"]),
            expected_error: patterns(&["/made"]),
            ..command("sees nobody else's", &["ls", "/made"])
        },
        CommandTest {
            env: vec![("OWN".into(), "$NAME/${GLOBAL}".into())],
            expected_output: patterns(&[r"^kiln kiln/g /srv v\d+\.\d+ end$"]),
            excluded_output: patterns(&[r"\n"]),
            ..command(
                "variables, folder and exact output",
                &[
                    "sh",
                    "-c",
                    "printf \"$NAME %s %s %s end\" $(env | sed -n s/^OWN=//p) $(pwd) $(cat version)",
                ],
            )
        },
        CommandTest {
            excluded_output: patterns(&["hel+o"]),
            ..command("excluded", &["echo", "hello"])
        },
        command("nothing there", &["/nope"]),
        CommandTest {
            expected_output: patterns(&["^bye$"]),
            ..command("another output", &["echo", "hello"])
        },
        CommandTest {
            expected_error: patterns(&["^bye$"]),
            ..command("another error output", &["sh", "-c", "echo hello >&2"])
        },
        CommandTest {
            teardown: vec![vec!["/bin/nowhere".into()]],
            ..command("a teardown that is no program", &["true"])
        },
        CommandTest {
            exit: 2,
            ..command("another code", &["sh", "-c", "echo why; exit 3"])
        },
    ];
    let suite = Structure {
        env: vec![("GLOBAL".into(), "g".into())],
        commands,
        ..Structure::default()
    };
    // The program itself is good: what the file says alone decides.
    let request = naming(
        request(image, "sleep 60"),
        SuiteKind::Structure,
        Suite::Structure(Box::new(suite)),
    );
    let cases = cases(&one, &request);
    let causes = causes(&cases);
    let failing: Vec<_> = causes
        .iter()
        .filter(|(_, cause)| !cause.is_empty())
        .collect();
    let [excluded, missing, output, error, teardown, code] = failing.as_slice() else {
        panic!("{causes:?}")
    };
    let told = "the output doesn't match `^bye$`: hello";
    assert!(output.1.contains(told), "{output:?}");
    let told = "the error output doesn't match `^bye$`: hello";
    assert!(error.1.contains(told), "{error:?}");
    assert!(
        teardown.1.starts_with("teardown: `/bin/nowhere`: "),
        "{teardown:?}"
    );
    assert_eq!(excluded.0, "Command Test: excluded");
    assert!(
        excluded
            .1
            .contains("matches `hel+o`, which it must not: hello")
    );
    assert!(missing.1.starts_with("`/nope`: "), "{missing:?}");
    let told = "exited with code 3 instead of 2: why";
    assert!(code.1.contains(told), "{code:?}");
    assert_eq!(cases.last().unwrap().name, "start");
    assert_eq!(cases.last().unwrap().result, CaseResult::Passed);
    let told = one
        .tester()
        .test_image(&request, &AtomicBool::new(false))
        .unwrap_err()
        .to_string();
    assert!(
        told.starts_with("app: 6 of 10 checks failed:\n  t.yaml: "),
        "{told}"
    );
    assert!(one.builder.runtime.list().is_empty(), "nothing is left");
}

#[test]
fn how_commands_are_run_is_as_the_file_says() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let image = one
        .build(folder.path(), &format!("{base}USER 5\n"))
        .unwrap();
    let told = [
        "sh",
        "-c",
        "id -u; tty; grep CapBnd /proc/self/status; true",
    ];
    let run = |suite: Structure, expected: &str| {
        let commands = vec![CommandTest {
            expected_output: patterns(&[expected]),
            ..command("told", &told)
        }];
        let suite = Structure { commands, ..suite };
        let suite = Suite::Structure(Box::new(suite));
        let request = naming(request(image, "sleep 60"), SuiteKind::Structure, suite);
        let cases = cases(&one, &request);
        assert_eq!(causes(&cases), [("Command Test: told", "")]);
    };
    let plain = "^5\nnot a tty\nCapBnd:\t00000000a80425fb\n$";
    run(Structure::default(), plain);
    let other = Structure {
        user: Some("33".into()),
        tty: true,
        capabilities: vec!["SYS_PTRACE".into()],
        ..Structure::default()
    };
    run(
        other,
        r"^33\r?\n/dev/.*\r?\nCapBnd:\t00000000a80c25fb\r?\n$",
    );
}

fn existence(name: &str, path: &str) -> ExistenceTest {
    ExistenceTest {
        name: name.into(),
        path: path.into(),
        exists: true,
        permissions: None,
        uid: None,
        gid: None,
        executable_by: None,
    }
}

/// The wrong ones among them are told, and no others.
#[test]
fn files_and_configuration_are_looked_at_without_a_run() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let text = format!(
        "{base}RUN mkdir -p -m 1777 /tmp /usr/share/doc/a /usr/share/doc/libgnutls30 && \
         echo 'AGPL' > /usr/share/doc/a/copyright && echo text > /t && chown 5:6 /t && \
         chmod 4750 /t && ln -s ../t /etc/link && ln -s /nope /dangling\n\
         ENV A=1\nLABEL l=m\nEXPOSE 80 53/udp\nVOLUME /data\nWORKDIR /srv\nUSER 5\nCMD [\"x\"]\n"
    );
    let image = one.build(folder.path(), &text).unwrap();
    let suite = Structure {
        existence: vec![
            ExistenceTest {
                permissions: Some("urwxr-x---".into()),
                uid: Some(5),
                gid: Some(6),
                executable_by: Some(ExecutableBy::Group),
                ..existence("right", "/t")
            },
            ExistenceTest {
                permissions: Some("dtrwxrwxrwx".into()),
                ..existence("folder", "/tmp")
            },
            ExistenceTest {
                permissions: Some("Lrwxrwxrwx".into()),
                ..existence("a link is itself", "/dangling")
            },
            ExistenceTest {
                exists: false,
                ..existence("absent", "/$A/nope")
            },
            ExistenceTest {
                permissions: Some("-rw-r--r--".into()),
                ..existence("mode", "/t")
            },
            ExistenceTest {
                executable_by: Some(ExecutableBy::Other),
                ..existence("executable", "/t")
            },
            ExistenceTest {
                gid: Some(7),
                ..existence("group", "/t")
            },
            existence("missing", "/nope"),
            ExistenceTest {
                exists: false,
                ..existence("present", "/t")
            },
        ],
        contents: vec![
            ContentTest {
                name: "through a link".into(),
                path: "/etc/link".into(),
                expected: patterns(&["(?m)^text$"]),
                excluded: patterns(&["nope"]),
            },
            ContentTest {
                name: "a folder".into(),
                path: "/tmp".into(),
                expected: vec![],
                excluded: vec![],
            },
        ],
        licenses: vec![LicenseTest {
            debian: true,
            files: vec!["/t".into()],
        }],
        metadata: Some(MetadataTest {
            env: BTreeMap::from([("A".into(), Wanted::Match(Pattern(r"^\d$".into())))]),
            unbound: vec!["A".into(), "B".into()],
            labels: BTreeMap::from([("l".into(), Wanted::Equal("other".into()))]),
            exposed: words("80 53/udp 53 80/tcp 81"),
            unexposed: words("22 80/udp 80"),
            volumes: words("/data /other"),
            unmounted: words("/tmp"),
            entrypoint: Some(vec![]),
            cmd: Some(words("y")),
            workdir: Some("/srv".into()),
            user: Some("root".into()),
        }),
        ..Structure::default()
    };
    let request = naming(
        request(image, "sleep 60"),
        SuiteKind::Structure,
        Suite::Structure(Box::new(suite)),
    );
    let cases = cases(&one, &request);
    let causes = causes(&cases);
    let failing = causes.into_iter().filter(|(_, cause)| !cause.is_empty());
    let failing: Vec<_> = failing.collect();
    assert_eq!(
        failing,
        [
            ("File Content Test: a folder", "/tmp is not a file"),
            (
                "File Existence Test: mode",
                "/t has the permissions urwxr-x---, not -rw-r--r--"
            ),
            (
                "File Existence Test: executable",
                "/t is not executable by whom it should be: urwxr-x---"
            ),
            (
                "File Existence Test: group",
                "/t belongs to the group 6, not 7"
            ),
            ("File Existence Test: missing", "/nope does not exist"),
            ("File Existence Test: present", "/t exists"),
            (
                "License Test",
                "/usr/share/doc/a/copyright names the licence AGPL"
            ),
            (
                "Metadata Test",
                "the label l is `m`, not `other`; the variable A is set; the port 81 is not \
                 exposed; the port 80 is exposed; /other is not a volume; the cmd is [\"x\"], not [\"y\"]; the user is \
                 `5`, not `root`"
            ),
        ]
    );
}

fn resource(id: &str, probe: Probe, attributes: &[(&str, Matcher)]) -> Resource {
    let attributes = attributes.iter();
    Resource {
        id: id.into(),
        skip: false,
        probe,
        attributes: attributes
            .map(|(name, matcher)| ((*name).to_owned(), matcher.clone()))
            .collect(),
    }
}

fn lines(all: &[&str]) -> Matcher {
    Matcher::HavePatterns(all.iter().map(|p| LinePattern::new(p)).collect())
}

fn is(value: bool) -> Matcher {
    Matcher::Bool(value)
}

fn text(text: &str) -> Matcher {
    Matcher::Text(text.into())
}

/// What of the running program is as it must be, and what is not there.
fn good() -> Vec<Resource> {
    let file = |path: &str| Probe::File { path: path.into() };
    let http = HttpProbe {
        host: "localhost".into(),
        port: 8080,
        path: "/".into(),
        method: "GET".into(),
        headers: vec![],
        login: None,
        body: String::new(),
        follow: true,
        timeout: Millis(5000),
    };
    let elsewhere = HttpProbe {
        host: "192.0.2.1".into(),
        ..http.clone()
    };
    let name = |text: &str| text.to_owned();
    let length = |n| Matcher::HaveLen(n);
    vec![
        resource(
            "page",
            file("/www/index.html"),
            &[
                ("exists", is(true)),
                ("mode", text("0640")),
                ("owner", text("app")),
                ("uid", Matcher::Number(7.0)),
                ("group", text("crew")),
                ("filetype", text("file")),
                ("contents", lines(&["hello", "!bye", "/^h.l+o$/"])),
                ("size", Matcher::Number(6.0)),
                (
                    "sha256",
                    text("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
                ),
                ("sha512", length(128)),
            ],
        ),
        resource(
            "link",
            file("/link"),
            &[
                ("exists", is(true)),
                ("filetype", text("symlink")),
                ("linked-to", text("www/index.html")),
                ("contents", text("hello\n")),
            ],
        ),
        resource(
            "nothing",
            file("/nope"),
            &[("exists", is(false)), ("mode", text("0644"))],
        ),
        resource(
            "command",
            Probe::Command {
                exec: "printf 'a\\nb'; echo e >&2; exit 3".into(),
                timeout: Millis(5000),
            },
            &[
                ("exit-status", Matcher::Number(3.0)),
                ("stdout", text("a\nb")),
                ("stderr", lines(&["e"])),
            ],
        ),
        resource(
            "answer",
            Probe::Http(http),
            &[
                ("status", Matcher::Number(200.0)),
                ("headers", lines(&["/^Content-Type: text/html/"])),
                ("body", lines(&["hello"])),
            ],
        ),
        resource(
            "port",
            Probe::Port {
                protocol: PortProtocol::Tcp6,
                port: 8080,
            },
            &[
                ("listening", is(true)),
                ("ip", Matcher::ContainElement(Box::new(text("::")))),
            ],
        ),
        resource(
            "process",
            Probe::Process {
                comm: name("httpd"),
            },
            &[("running", is(true))],
        ),
        resource(
            "no process",
            Probe::Process { comm: name("sshd") },
            &[("running", is(false))],
        ),
        resource(
            "user",
            Probe::User { name: name("app") },
            &[
                ("exists", is(true)),
                ("uid", Matcher::Number(7.0)),
                ("home", text("/www")),
                (
                    "groups",
                    Matcher::ConsistOf(vec![text("crew"), text("more")]),
                ),
                ("shell", text("/bin/sh")),
            ],
        ),
        resource(
            "group",
            Probe::Group { name: name("crew") },
            &[("exists", is(true)), ("gid", Matcher::Number(8.0))],
        ),
        resource(
            "package",
            Probe::Package { name: name("a") },
            &[
                ("installed", is(true)),
                ("versions", Matcher::ContainElements(vec![text("1-2")])),
            ],
        ),
        resource(
            "dns",
            Probe::Dns {
                host: name("localhost"),
            },
            &[
                ("resolvable", is(true)),
                (
                    "addrs",
                    Matcher::ContainElement(Box::new(text("127.0.0.1"))),
                ),
            ],
        ),
        resource(
            "addr",
            Probe::Addr {
                host: name("localhost"),
                port: 8080,
                timeout: Millis(500),
            },
            &[("reachable", is(true))],
        ),
        resource(
            "outside",
            Probe::Addr {
                host: elsewhere.host.clone(),
                port: 8080,
                timeout: Millis(500),
            },
            &[("reachable", is(false))],
        ),
        resource(
            "interface",
            Probe::Interface { name: name("lo") },
            &[
                ("exists", is(true)),
                ("addrs", Matcher::ContainElements(vec![text("127.0.0.1/8")])),
                (
                    "mtu",
                    Matcher::Compare {
                        than: Comparison::Ge,
                        number: 1500.0,
                    },
                ),
            ],
        ),
        resource(
            "parameter",
            Probe::KernelParam {
                name: name("kernel.ostype"),
            },
            &[("value", text("Linux"))],
        ),
        resource(
            "mount",
            Probe::Mount {
                path: name("/proc"),
            },
            &[
                ("exists", is(true)),
                ("filesystem", text("proc")),
                ("opts", Matcher::ContainElement(Box::new(text("nosuid")))),
            ],
        ),
        resource(
            "elsewhere",
            Probe::Matching {
                content: serde_json::json!({"a": 1}),
            },
            &[("matches", Matcher::HaveKey(Box::new(text("a"))))],
        ),
    ]
}

#[test]
fn resources_of_a_goss_file_are_looked_at_in_what_runs() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let build = format!(
        "{base}RUN mkdir -p /www /etc /var/lib/dpkg && echo hello > /www/index.html && \
         chown 7:8 /www/index.html && chmod 640 /www/index.html && ln -s www/index.html /link && \
         echo 'app:x:7:8::/www:/bin/sh' > /etc/passwd && \
         printf 'crew:x:8:\\nmore:x:9:other,app\\nnot:x:7:\\n' > /etc/group && \
         printf 'Package: a\\nStatus: install ok installed\\nVersion: 1-2\\n' > /var/lib/dpkg/status\n"
    );
    let image = one.build(folder.path(), &build).unwrap();
    let with = |resources: Vec<Resource>, settle: &str| {
        let goss = Goss { resources };
        naming(request(image, settle), SuiteKind::Goss, Suite::Goss(goss))
    };
    let serves = "exec httpd -f -p 8080 -h /www";
    let cases_of_good = cases(&one, &with(good(), serves));
    let wrong: Vec<&Case> = cases_of_good
        .iter()
        .filter(|c| c.result != CaseResult::Passed)
        .collect();
    // What is not there, as it should not be, has no other attributes.
    let [absent] = wrong.as_slice() else {
        panic!("{wrong:#?}")
    };
    assert_eq!(absent.name, "t.yaml: nothing: mode");
    assert!(
        matches!(absent.result, CaseResult::Skipped(_)),
        "{absent:?}"
    );
    let attributes: usize = good().iter().map(|one| one.attributes.len()).sum();
    assert_eq!(
        cases_of_good.len(),
        1 + attributes,
        "start, and each attribute"
    );

    // Without anything that runs, nothing can be said.
    let ended = cases(&one, &with(good(), "exit 0"));
    assert_eq!(ended[0].cause().map(|c| c.contains("exited")), Some(true));
    assert!(
        ended[1..]
            .iter()
            .all(|c| matches!(c.result, CaseResult::Skipped(_)))
    );
}

#[test]
fn resources_that_are_not_as_they_must_be_are_named() {
    if !sandboxes() {
        return;
    }
    let (folder, base) = busybox();
    let one = world();
    let image = one.build(folder.path(), &base).unwrap();
    let mut skipped = resource(
        "skipped",
        Probe::Process { comm: "x".into() },
        &[("running", is(true))],
    );
    skipped.skip = true;
    let goss = Goss {
        resources: vec![
            resource(
                "late",
                Probe::File {
                    path: "/late".into(),
                },
                &[("exists", is(true)), ("contents", lines(&["now"]))],
            ),
            resource(
                "file",
                Probe::File {
                    path: "/bin/busybox".into(),
                },
                &[("exists", is(false)), ("mode", text("0644"))],
            ),
            resource(
                "package",
                Probe::Package { name: "a".into() },
                &[("installed", is(true))],
            ),
            skipped,
        ],
    };
    let request = naming(
        request(image, "(sleep 2; echo now > /late) & exec sleep 60"),
        SuiteKind::Goss,
        Suite::Goss(goss),
    );
    let cases = cases(&one, &request);
    let told: Vec<(&str, Option<&str>)> =
        cases.iter().map(|c| (c.name.as_str(), c.cause())).collect();
    assert_eq!(
        told,
        [
            ("start", None),
            ("t.yaml: late: exists", None),
            ("t.yaml: late: contents", None),
            ("t.yaml: file: exists", Some("it is true, not false")),
            ("t.yaml: file: mode", None),
            (
                "t.yaml: package: installed",
                Some("the image has no records of dpkg or apk")
            ),
            ("t.yaml: skipped: running", None),
        ]
    );
}
