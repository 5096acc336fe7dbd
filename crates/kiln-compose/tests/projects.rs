//! Projects of several files, from text to Spec, without a disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_compose::{Code, Diagnostic, Environment, LoadError, LoadOptions, Loaded, Severity, load};
use kiln_model::Millis;
use kiln_model::spec::{
    Check, FileSource, HealthTest, HealthcheckSetting, ImageSource, MountSource, NetworkMode,
    PullPolicy, Ready, RestartPolicy, RootSetting, Seccomp,
};

/// Files by path; the folder is `/p`.
struct Files(BTreeMap<PathBuf, String>);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let path = |name: &str| Path::new("/p").join(name);
        Files(
            files
                .iter()
                .map(|(name, text)| (path(name), (*text).to_owned()))
                .collect(),
        )
    }

    fn options(&self) -> LoadOptions {
        LoadOptions {
            files: vec!["/p/compose.yaml".into()],
            folder: "/p".into(),
            environment: Environment::from([("HOST".into(), "h".into())]),
            ..LoadOptions::default()
        }
    }

    fn load_with(&self, options: &LoadOptions) -> Result<Loaded, LoadError> {
        let reader = |path: &Path| -> io::Result<Vec<u8>> {
            let text = self.0.get(path).ok_or(io::ErrorKind::NotFound)?;
            Ok(text.clone().into_bytes())
        };
        load(options, &reader)
    }

    fn load(&self) -> Result<Loaded, LoadError> {
        self.load_with(&self.options())
    }
}

fn one(text: &str) -> Loaded {
    match Files::new(&[("compose.yaml", text)]).load() {
        Ok(loaded) => loaded,
        Err(error) => panic!("{error}"),
    }
}

fn errors(files: &[(&str, &str)]) -> Vec<Diagnostic> {
    let error = Files::new(files).load().expect_err("is refused");
    error.errors().cloned().collect()
}

fn codes(text: &str) -> Vec<Code> {
    errors(&[("compose.yaml", text)])
        .iter()
        .map(|d| d.code)
        .collect()
}

const EVERYTHING: &str = r#"
name: shop
x-kiln:
  debian: {mirror: "http://mirror.example/debian"}
  bases:
    python: {suite: bookworm, packages: [python3], env: {PATH: /usr/bin}}
    tiny: {suite: trixie, packages: busybox-static, distroless: true}
services:
  web:
    build: {context: app, dockerfile: Containerfile, args: {A: 1, HOST: , NONE: }, target: prod, secrets: [{source: key, target: id}]}
    image: shop/web
    command: serve --port 80
    entrypoint: ["/init"]
    environment: {MODE: prod, HOST: , GONE: }
    env_file: [web.env]
    user: "1000:1000"
    group_add: [mail, 5]
    working_dir: /srv
    stop_signal: SIGINT
    stop_grace_period: 1m30s
    init: true
    ports: ["8080:80", "127.0.0.1:9000-9001:90-91/udp", {target: 70, published: "7000-7009"}, "60"]
    expose: [3000, "4000-4001/udp"]
    networks: {front: {aliases: [w], ipv4_address: 10.5.0.9, priority: 2}, default: {}}
    mac_address: "02:42:ac:11:00:02"
    depends_on: {db: {condition: service_healthy}, extra: {condition: service_started, required: false}}
    links: ["db:database"]
    healthcheck: {test: ["CMD", "curl", "x"], interval: 5s, retries: 4}
    restart: on-failure:3
    volumes:
      - ./static:/static:ro
      - {type: volume, source: data, target: /data, x-kiln: {exec: true}, volume: {subpath: s, nocopy: true}}
      - /anon
      - {type: tmpfs, target: /t, tmpfs: {size: 1m, mode: 0o1777}}
      - {type: image, source: other, target: /i}
    tmpfs: ["/run/x:size=2m,mode=700,exec"]
    configs: [conf, {source: inline, target: /etc/i, uid: "7", mode: 0o400}]
    secrets: [key, {source: token, target: t}]
    cap_add: [CAP_NET_ADMIN, sys_time]
    cap_drop: [all]
    security_opt: ["no-new-privileges:false", "seccomp=sec.json"]
    devices: ["/dev/fuse"]
    sysctls: {net.core.somaxconn: 1024}
    ulimits: {nofile: {soft: 10, hard: 20}, nproc: 5}
    mem_limit: 64m
    cpus: 0.5
    shm_size: 8m
    pids_limit: 100
    pid: host
    ipc: host
    logging: {driver: local, options: {max-size: 1m, max-file: "2"}}
    deploy: {replicas: 2, labels: {d: 1}, update_config: {parallelism: 1, delay: 2s, order: start-first, max_failure_ratio: 0.25}}
    labels: {l: 1}
    extra_hosts: ["gw:host-gateway"]
    dns: [9.9.9.9]
    pull_policy: every_12h
    x-kiln:
      root: scratch
      scratch: [/var/cache, {path: /var/x, size: 3m, exec: true}]
      ready: {http: {port: 80, path: /ok, status: 204}}
      test:
        - http: {port: 80, path: /, body: hello}
        - tcp: {port: 80}
        - exec: {command: "id -u", output: "0"}
        - file: {path: /etc/x, contains: y, mode: "0644"}
      drain: 5s
      exclusive: false
  db:
    image: oci:./db
    network_mode: host
    volumes_from: [web:ro]
    healthcheck: {test: pg_isready}
  extra: {image: x, profiles: [extra]}
networks:
  front: {ipam: {config: [{subnet: 10.5.0.0/16, gateway: 10.5.0.1}]}, internal: true, driver_opts: {com.docker.network.driver.mtu: 1400}}
volumes: {data: {name: real}}
configs: {conf: {file: ./conf}, inline: {content: "a=$${b}"}}
secrets: {key: {environment: KEY}, token: {environment: TOK, name: tok}}
"#;

fn everything() -> Loaded {
    let text = EVERYTHING.replace("    volumes_from: [web:ro]\n", "");
    let files = Files::new(&[
        ("compose.yaml", &text),
        ("web.env", "FROM_FILE=1\nMODE=dev\n"),
        ("sec.json", "{}"),
    ]);
    match files.load() {
        Ok(loaded) => loaded,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_whole_service_is_carried_over() {
    let loaded = everything();
    let web = &loaded.spec.services["web"];
    let ImageSource::Build { build, tag } = &web.image else {
        panic!("{:?}", web.image)
    };
    assert_eq!(tag.as_deref(), Some("shop/web"));
    assert_eq!(build.context, Path::new("/p/app"));
    assert_eq!(
        build.containerfile.as_deref(),
        Some(Path::new("/p/app/Containerfile"))
    );
    assert_eq!(
        build.args,
        BTreeMap::from([("A".into(), "1".into()), ("HOST".into(), "h".into())])
    );
    assert_eq!(build.secrets["id"], "key");
    assert_eq!(
        web.process.command.as_deref().unwrap(),
        ["serve", "--port", "80"]
    );
    let env: Vec<_> = web
        .process
        .environment
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    assert_eq!(env, ["FROM_FILE=1", "HOST=h", "MODE=prod"]);
    assert_eq!(web.process.stop_grace, Some(Millis(90_000)));
    assert_eq!(web.process.group_add, ["mail", "5"]);
    let ports: Vec<_> = web
        .ports
        .iter()
        .map(|p| (p.target, p.published, p.range))
        .collect();
    let expected = [
        (80, Some(8080), None),
        (90, Some(9000), None),
        (91, Some(9001), None),
        (70, None, Some((7000, 7009))),
        (60, None, None),
    ];
    assert_eq!(ports, expected);
    assert_eq!(web.expose.len(), 3);
    assert_eq!(
        web.restart,
        RestartPolicy::OnFailure {
            max_retries: Some(3)
        }
    );
    assert_eq!(web.replicas, 2);
    assert_eq!(web.pull_policy, PullPolicy::Every(Millis(12 * 3_600_000)));
    assert_eq!(web.update.max_failure_ratio, Some(250));
    assert_eq!(web.labels.len(), 2);
    assert_eq!(web.limits.memory, Some(64 << 20));
    assert_eq!(web.limits.nano_cpus, Some(500_000_000));
    assert_eq!(web.limits.ulimits["nproc"], (5, 5));
    assert_eq!(web.logging.max_size, 1 << 20);
    assert_eq!(web.security.cap_add, ["NET_ADMIN", "SYS_TIME"]);
    assert_eq!(web.security.no_new_privileges, Some(false));
    assert_eq!(web.security.seccomp, Seccomp::Profile("{}".into()));
    assert_eq!(web.names.links[0].1, "database");
    // Its profile is not active and it is not required.
    assert_eq!(
        web.depends_on
            .keys()
            .map(|k| k.as_str())
            .collect::<Vec<_>>(),
        ["db"]
    );
    let HealthcheckSetting::Set(health) = &web.health else {
        panic!("{:?}", web.health)
    };
    assert_eq!(
        health.test,
        Some(HealthTest::Exec(vec!["curl".into(), "x".into()]))
    );
    assert!(loaded.files_read.contains(&PathBuf::from("/p/sec.json")));
}

#[test]
fn mounts_files_networks_and_x_kiln_are_carried_over() {
    let loaded = everything();
    let web = &loaded.spec.services["web"];
    let mount = |target: &str| web.mounts.iter().find(|m| m.target == target).unwrap();
    let bind = MountSource::Bind {
        path: "/p/static".into(),
        create: true,
        propagation: None,
    };
    assert_eq!(mount("/static").source, bind);
    assert!(mount("/static").read_only);
    assert!(mount("/data").exec);
    assert_eq!(mount("/anon").source, MountSource::Anonymous);
    assert_eq!(
        mount("/t").source,
        MountSource::Tmpfs {
            size: Some(1 << 20),
            mode: Some(0o1777)
        }
    );
    assert_eq!(
        mount("/run/x").source,
        MountSource::Tmpfs {
            size: Some(2 << 20),
            mode: Some(0o700)
        }
    );
    assert!(mount("/run/x").exec && !mount("/t").exec);
    let files: Vec<_> = web
        .files
        .iter()
        .map(|f| (f.target.as_str(), f.uid, f.mode))
        .collect();
    assert_eq!(
        files,
        [
            ("/conf", 0, 0o444),
            ("/etc/i", 7, 0o400),
            ("/run/secrets/key", 0, 0o444),
            ("/run/secrets/t", 0, 0o444)
        ]
    );
    let NetworkMode::Networks(networks) = &web.network else {
        panic!("{:?}", web.network)
    };
    assert_eq!(networks["front"].aliases, ["w"]);
    assert!(networks["front"].mac_address.is_some() && networks["default"].mac_address.is_none());
    let front = &loaded.spec.networks["front"];
    assert_eq!(front.subnet.as_deref(), Some("10.5.0.0/16"));
    assert_eq!((front.mtu, front.internal), (Some(1400), true));
    assert_eq!(loaded.spec.volumes["data"].name.as_str(), "real");
    assert_eq!(
        loaded.spec.configs["conf"],
        FileSource::File("/p/conf".into())
    );
    assert_eq!(
        loaded.spec.configs["inline"],
        FileSource::Content("a=${b}".into())
    );
    assert_eq!(
        loaded.spec.secrets["token"],
        FileSource::Environment("TOK".into())
    );
    assert_eq!(web.kiln.root, RootSetting::Scratch);
    assert_eq!(web.kiln.scratch[1].size, Some(3 << 20));
    let ready = Ready::Http {
        port: 80,
        path: "/ok".into(),
        status: Some(204),
    };
    assert_eq!(web.kiln.ready, Some(ready));
    assert_eq!(web.kiln.test.len(), 4);
    assert_eq!(web.kiln.test[1], Check::Tcp { port: 80 });
    assert_eq!(web.kiln.drain, Some(Millis(5000)));
    assert_eq!(web.kiln.exclusive, Some(false));
    let tiny = &loaded.spec.bases["tiny"];
    assert_eq!((tiny.essential, tiny.distroless), (false, true));
    assert!(loaded.spec.bases["python"].essential);
    assert_eq!(
        loaded.spec.debian_mirror.as_deref(),
        Some("http://mirror.example/debian")
    );
}

#[test]
fn volumes_from_gives_the_other_services_mounts() {
    let loaded = one(
        "services: {a: {image: x, volumes: ['./d:/d', './e:/e']}, b: {image: y, volumes_from: ['a:ro'], volumes: ['./own:/e']}}",
    );
    let b = &loaded.spec.services["b"];
    let targets: Vec<_> = b
        .mounts
        .iter()
        .map(|m| (m.target.as_str(), m.read_only))
        .collect();
    assert_eq!(targets, [("/e", false), ("/d", true)]);
    assert!(b.depends_on.contains_key("a"));
}

#[test]
fn a_spec_does_not_depend_on_how_it_is_written() {
    let short = one(
        "services: {a: {image: x, ports: ['80:80'], environment: [A=1], volumes: ['./d:/d:ro']}}",
    );
    let long = one(
        "services: {a: {image: x, ports: [{target: 80, published: '80'}], environment: {A: 1}, volumes: [{type: bind, source: ./d, target: /d/, read_only: true, bind: {}}]}}",
    );
    assert_eq!(short.spec, long.spec);
}

#[test]
fn what_is_printed_reads_back_as_the_same_spec() {
    let text = EVERYTHING
        .replace("    volumes_from: [web:ro]\n", "")
        .replace(", extra: {condition: service_started, required: false}", "");
    let extra = [("web.env", ""), ("sec.json", "{}")];
    let files = Files::new(&[("compose.yaml", &text), extra[0], extra[1]]);
    let loaded = files.load().unwrap_or_else(|error| panic!("{error}"));
    let printed = loaded.config(kiln_compose::ConfigFormat::Yaml);
    let files = Files::new(&[("compose.yaml", &printed), ("sec.json", "{}")]);
    let again = files
        .load()
        .unwrap_or_else(|error| panic!("{error}\n{printed}"));
    let mut spec = again.spec.clone();
    // Compose's default Dockerfile is said in what is printed.
    for (name, service) in &loaded.spec.services {
        if let Some(other) = spec.services.get_mut(name) {
            other.image = service.image.clone();
        }
    }
    assert_eq!(spec, loaded.spec);
}

#[test]
fn unsupported_keys_are_refused_with_their_place_and_may_be_allowed() {
    let text = "services:\n  a:\n    image: x\n    gpus: all\n    deploy:\n      placement: {constraints: [x]}\n    network_mode: bridge\n";
    let files = Files::new(&[("compose.yaml", text)]);
    let error = files.load().expect_err("refused");
    let shown: Vec<_> = error
        .errors()
        .map(|d| {
            (
                d.key.clone().unwrap().into_string(),
                error.sources.place(d.span).unwrap().line,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("services.*.gpus".to_owned(), 4),
            ("services.*.deploy.placement".to_owned(), 6),
            ("services.*.network_mode".to_owned(), 7)
        ]
    );
    let mut options = files.options();
    options.allow_ignored = vec![
        "gpus".into(),
        "deploy.placement".into(),
        "services.*.network_mode".into(),
    ];
    let loaded = files.load_with(&options).expect("allowed");
    let warnings = loaded
        .notes
        .iter()
        .filter(|n| n.severity == Severity::Warning)
        .count();
    assert_eq!(warnings, 3);
}

#[test]
fn values_that_cannot_be_honoured_are_refused() {
    for service in [
        "pid: container:x",
        "logging: {driver: syslog}",
        "security_opt: [systempaths=unconfined]",
        "ports: [80/sctp]",
        "volumes: [{type: npipe, source: x, target: /x}]",
        "userns_mode: keep",
        "deploy: {endpoint_mode: dnsrr}",
        "tmpfs: ['/x:uid=5']",
        "volumes_from: ['container:x']",
        "build: 'https://example.com/x.git'",
        "pull_policy: refresh",
        "network_mode: container:x",
    ] {
        let found = codes(&format!("services: {{a: {{image: x, {service}}}}}"));
        assert_eq!(found, [Code::Unsupported], "{service}");
    }
    for network in [
        "driver: overlay",
        "enable_ipv6: true",
        "driver_opts: {x: y}",
        "ipam: {config: [{subnet: 'fd00::/64'}]}",
    ] {
        let found = codes(&format!(
            "services: {{a: {{image: x, networks: [n]}}}}\nnetworks: {{n: {{{network}}}}}"
        ));
        assert_eq!(found, [Code::Unsupported], "{network}");
    }
}

#[test]
fn unknown_x_kiln_keys_are_errors_and_other_extensions_are_not() {
    let found = errors(&[(
        "compose.yaml",
        "x-own: {a: b}\nx-kiln: {basis: {}}\nservices: {a: {image: x, x-team: z, x-kiln: {scrach: [/x], test: [{http: {port: 80}, tcp: 5}]}, volumes: [{type: volume, target: /v, x-kiln: {exe: true}}]}}",
    )]);
    let hints: Vec<_> = found
        .iter()
        .map(|d| d.hint.clone().unwrap_or_default())
        .collect();
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(
        hints[0].contains("bases") && hints[1].contains("scratch"),
        "{hints:?}"
    );
}

#[test]
fn everything_wrong_is_told_at_once() {
    let found = errors(&[(
        "compose.yaml",
        "services:\n  a:\n    imagee: x\n    depends_on: [bb]\n    volumes: [dat:/x]\n    gpus: all\n    x-kiln: {redy: 1}\n  b:\n    image: ${TAG:?}\n    restart: perhaps\n    healthcheck: {interval: 5parsec}\nvolumes: {data: }\n",
    )]);
    assert_eq!(found.len(), 8, "{found:#?}");
}

#[test]
fn an_error_shows_its_source_and_where_the_file_came_from() {
    let files = Files::new(&[
        (
            "compose.yaml",
            "include:\n  - sub/inner.yaml\nservices: {}\n",
        ),
        (
            "sub/inner.yaml",
            "services:\n  a:\n    image: x\n    prts: [80]\n",
        ),
    ]);
    let error = files.load().expect_err("refused");
    let text = error.render(kiln_compose::RenderOptions::default());
    for part in [
        "unknown key `prts`",
        "inner.yaml:4:5",
        "did you mean `ports`?",
        "included from /p/compose.yaml:2:5",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert_eq!(
        error.to_string(),
        "/p/sub/inner.yaml:4:5: error: unknown key `prts` in services.a (did you mean `ports`?)"
    );
}

#[test]
fn circles_are_errors() {
    assert_eq!(
        codes("services: {a: {extends: b}, b: {extends: a}}")[0],
        Code::Cycle
    );
    assert_eq!(
        codes("services: {a: {image: x, depends_on: [b]}, b: {image: x, depends_on: [a]}}"),
        [Code::Cycle]
    );
    let found = errors(&[
        (
            "compose.yaml",
            "include: [b.yaml]\nservices: {a: {image: x}}",
        ),
        ("b.yaml", "include: [c.yaml]"),
        ("c.yaml", "include: [b.yaml]"),
    ]);
    assert_eq!(found[0].code, Code::Cycle);
}

#[test]
fn what_grows_without_end_is_bounded() {
    // Each file includes the next twice.
    let mut files: Vec<(String, String)> = vec![(
        "compose.yaml".into(),
        "include: [f0.yaml]\nservices: {a: {image: x}}".into(),
    )];
    for n in 0..20 {
        let text = format!("include: [f{0}.yaml, f{0}.yaml]", n + 1);
        files.push((format!("f{n}.yaml"), text));
    }
    files.push(("f20.yaml".into(), "services: {z: {image: x}}".into()));
    let files: Vec<_> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    assert_eq!(errors(&files)[0].code, Code::Limit);
    // Each service extends the one before and copies all that it has.
    let list: Vec<String> = (0..2000)
        .map(|n| n.to_string())
        .map(|n| format!("'x{n}'"))
        .collect();
    let list = list.join(", ");
    let mut text = format!("services:\n  s0: {{image: x, security_opt: [{list}]}}\n");
    for n in 1..2000 {
        text.push_str(&format!("  s{n}: {{extends: s{}}}\n", n - 1));
    }
    assert!(codes(&text).contains(&Code::Limit));
}

#[test]
fn profiles_and_chosen_services() {
    let files = Files::new(&[(
        "compose.yaml",
        "services: {a: {image: x, depends_on: [b]}, b: {image: x}, c: {image: x, profiles: [p]}, d: {image: x, networks: [n]}}\nnetworks: {n: }",
    )]);
    let names = |change: &dyn Fn(&mut LoadOptions)| {
        let mut options = files.options();
        change(&mut options);
        let loaded = files.load_with(&options).unwrap();
        let services: Vec<_> = loaded.spec.services.keys().map(|k| k.to_string()).collect();
        let networks: Vec<_> = loaded.spec.networks.keys().map(|k| k.to_string()).collect();
        (services.join(" "), networks.join(" "))
    };
    assert_eq!(names(&|_| {}).0, "a b d");
    assert_eq!(names(&|o| o.profiles = vec!["p".into()]).0, "a b c d");
    assert_eq!(
        names(&|o| o.services = vec!["a".into()]),
        ("a b".into(), "default".into())
    );
    assert_eq!(names(&|o| o.services = vec!["c".into()]).0, "c");
    let mut options = files.options();
    options.services = vec!["aa".into()];
    assert_eq!(files.load_with(&options).unwrap_err().errors().count(), 1);
}

#[test]
fn extends_and_env_files_of_other_folders() {
    let files = Files::new(&[
        (
            "compose.yaml",
            "services:\n  a: {extends: {file: sub/base.yaml, service: b}, environment: {OWN: 1}, ports: !reset []}\n",
        ),
        (
            "sub/base.yaml",
            "services:\n  b: {image: x, volumes: ['./v:/v'], env_file: e.env, ports: ['80:80'], environment: {X: '${Y:-y}'}}\n",
        ),
        ("sub/e.env", "E=1\nOWN=2\n"),
    ]);
    let loaded = files.load().unwrap_or_else(|e| panic!("{e}"));
    let a = &loaded.spec.services["a"];
    let env: Vec<_> = a
        .process
        .environment
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    assert_eq!(env, ["E=1", "OWN=1", "X=y"]);
    assert_eq!(a.ports, []);
    assert!(
        matches!(&a.mounts[0].source, MountSource::Bind { path, .. } if path == Path::new("/p/sub/v"))
    );
    assert_eq!(loaded.files_read.len(), 3);
}

#[test]
fn notes_say_what_has_no_effect() {
    let loaded =
        one("version: '3'\nservices: {a: {image: '${UNSET}x', attach: true, command: a | b}}");
    let text: Vec<_> = loaded.notes.iter().map(|n| n.message.clone()).collect();
    assert_eq!(loaded.notes.len(), 4, "{text:#?}");
}

#[test]
fn broken_files_end_in_one_error() {
    for text in [
        "a: [",
        "\t",
        "a: 'x",
        "services: {a: *x}",
        "- a",
        "x",
        "%YAML 9",
        "{",
        "a: b: c",
        "\u{0}",
        "? [a]\n: b",
    ] {
        let found = errors(&[("compose.yaml", text)]);
        assert!(!found.is_empty(), "{text:?}");
    }
}

/// What the model has a place for, but nothing carries out.
const LATER: &str = r#"
services:
  web:
    image: x
    post_start: [{command: [echo]}]
    cgroup_parent: x
    pid: service:db
    ipc: service:db
    uts: service:db
    networks: {shared: {gw_priority: 1}}
    volumes: ["nfs:/nfs"]
    configs: [conf]
    secrets: [key]
    deploy: {update_config: {failure_action: pause}, rollback_config: {parallelism: 1}}
  db: {image: y}
networks: {shared: {external: true}}
volumes: {nfs: {driver_opts: {type: nfs, o: addr=host, device: ":/x"}}}
configs: {conf: {external: true}}
secrets: {key: {external: {name: other}}}
"#;

#[test]
fn what_is_not_carried_out_is_refused_with_its_line_but_printed() {
    let files = Files::new(&[("compose.yaml", LATER)]);
    let error = files.load().expect_err("refused");
    let mut shown: Vec<_> = error
        .errors()
        .map(|d| {
            assert!(d.hint.is_some(), "{d:?}");
            let place = error.sources.place(d.span).unwrap();
            (place.line, d.key.clone().unwrap_or_default().into_string())
        })
        .collect();
    shown.sort();
    let expected = [
        (6, "services.*.cgroup_parent"),
        (9, "services.*.uts"),
        (10, "services.*.networks.*.gw_priority"),
        (17, "volumes.*.driver_opts"),
    ];
    let shown: Vec<_> = shown.iter().map(|(n, key)| (*n, key.as_str())).collect();
    assert_eq!(shown, expected);
    let options = files.options();
    let reader = |path: &Path| -> io::Result<Vec<u8>> {
        let text = files.0.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.clone().into_bytes())
    };
    let resolved = kiln_compose::resolve(&options, &reader).expect("docker compose prints it");
    let printed = resolved.project.config_json();
    assert_eq!(
        printed["services"]["web"]["post_start"][0]["command"][0],
        "echo"
    );
    assert_eq!(printed["networks"]["shared"]["external"], true);
}

#[test]
fn what_is_not_carried_out_may_be_ignored_unless_something_would_be_missing() {
    let files = Files::new(&[("compose.yaml", LATER)]);
    let mut options = files.options();
    options.allow_ignored = ["cgroup_parent", "uts", "gw_priority", "driver_opts"]
        .map(Into::into)
        .to_vec();
    let text = LATER.replace("cgroup_parent: x", "provider: {type: y}");
    let wrong = Files::new(&[("compose.yaml", &text)]);
    options.allow_ignored.push("provider".into());
    let error = wrong.load_with(&options).expect_err("nothing to run");
    let keys: Vec<_> = error.errors().map(|d| d.key.as_deref()).collect();
    assert_eq!(keys, [Some("services.*.provider")]);
    let loaded = files.load_with(&options).expect("ignored");
    let web = &loaded.spec.services["web"];
    let kept = |name: &str| Some(FileSource::External(name.into()));
    assert_eq!(loaded.spec.configs.get("conf").cloned(), kept("conf"));
    assert_eq!(loaded.spec.secrets.get("key").cloned(), kept("other"));
    assert_eq!(web.post_start[0].command, ["echo"]);
    let of_db = kiln_model::spec::NamespaceMode::Service("db".parse().unwrap());
    assert_eq!(web.namespaces.pid, of_db);
    assert_eq!(web.namespaces.uts, kiln_model::spec::NamespaceMode::Private);
    assert!(loaded.spec.networks["shared"].external);
    assert!(loaded.spec.volumes["nfs"].driver_opts.is_empty());
    let noted = |key: &str| loaded.notes.iter().any(|n| n.key.as_deref() == Some(key));
    assert!(noted("services.*.deploy.update_config.failure_action"));
    assert!(noted("services.*.deploy.rollback_config"));
}

#[test]
fn a_local_volume_that_binds_a_folder_is_a_bind_mount() {
    let loaded = one(
        "services: {a: {image: x, volumes: ['data:/d', {type: volume, source: data, target: /s, volume: {subpath: s}}]}}\nvolumes: {data: {driver: local, driver_opts: {type: none, o: 'bind,ro', device: /srv/d}}}",
    );
    let mounts = &loaded.spec.services["a"].mounts;
    let bind = |path: &str| MountSource::Bind {
        path: path.into(),
        create: false,
        propagation: None,
    };
    assert_eq!(mounts[0].source, bind("/srv/d"));
    assert_eq!(mounts[1].source, bind("/srv/d/s"));
    assert!(mounts.iter().all(|m| m.read_only));
    assert!(loaded.spec.volumes.is_empty());
    let loaded = one(
        "services: {a: {image: x, volumes: ['mem:/m']}}\nvolumes: {mem: {driver_opts: {type: tmpfs, device: tmpfs, o: 'size=1m,nodev,uid=7'}}}",
    );
    let options = &loaded.spec.volumes["mem"].driver_opts;
    assert_eq!(
        (options["type"].as_str(), options["o"].as_str()),
        ("tmpfs", "size=1m,uid=7")
    );
}

#[test]
fn links_say_nothing_of_restarts() {
    let loaded = one("services: {a: {image: x, links: [b]}, b: {image: y}}");
    assert!(loaded.notes.is_empty(), "{:?}", loaded.notes);
    let depends_on = &loaded.spec.services["a"].depends_on;
    assert!(depends_on.values().all(|d| !d.restart));
    let loaded = one(
        "services: {a: {image: x, depends_on: {b: {condition: service_started, restart: true}}}, b: {image: y}}",
    );
    assert!(
        loaded.spec.services["a"]
            .depends_on
            .values()
            .all(|d| d.restart)
    );
}
