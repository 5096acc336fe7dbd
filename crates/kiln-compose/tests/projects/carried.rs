//! What a file says is what the Spec has.

use std::path::Path;

use kiln_compose::ConfigFormat;
use kiln_model::Millis;
use kiln_model::spec::{
    Analysis, CanaryStep, Check, FailureAction, FileSource, HealthTest, HealthcheckSetting, Hook,
    ImageSource, MountSource, NetworkMode, Number, Prometheus, PullPolicy, Ready, RestartPolicy,
    RolloutOptions, RootSetting, Seccomp, Strategy, WatchAction,
};

use super::*;

const EVERYTHING: &str = r#"
name: shop
x-kiln:
  rollout: blue-green
  debian: {mirror: "http://mirror.example/debian"}
  allow_secrets: [/app/tests/*.pem, BUILD_TOKEN]
  bases:
    python: {suite: bookworm, packages: [python3], env: {PATH: /usr/bin}}
    tiny: {suite: trixie, packages: busybox-static, distroless: true}
services:
  web:
    build: {context: app, dockerfile: Containerfile, args: {A: 1, HOST: , NONE: }, target: prod, secrets: [{source: key, target: id}], ulimits: {nofile: {soft: 7, hard: 9}, core: 0}}
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
    deploy: {replicas: 2, labels: {d: 1}, update_config: {parallelism: 1, delay: 2s, order: start-first, max_failure_ratio: 0.25, monitor: 7s, failure_action: pause}, rollback_config: {parallelism: 3, failure_action: continue}}
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
      max_age: 1w
      snapshot: true
      exclusive: false
      rollout: {strategy: rolling, keep_warm: 10m, monitor: 9s}
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
    let ulimits = [("core", (0, 0)), ("nofile", (7, 9))];
    assert_eq!(build.ulimits, ulimits.map(|(n, l)| (n.into(), l)).into());
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
    assert_eq!(
        web.update.monitor,
        Some(Millis(9_000)),
        "x-kiln has the last word"
    );
    assert_eq!(web.update.failure_action, Some(FailureAction::Pause));
    let back = web.rollback.as_ref().unwrap();
    assert_eq!(back.parallelism, Some(3));
    assert_eq!(back.failure_action, Some(FailureAction::Continue));
    let rollout = web.kiln.rollout.as_ref().unwrap();
    assert_eq!(rollout.strategy, Some(Strategy::Rolling));
    assert_eq!(rollout.keep_warm, Some(Millis(600_000)));
    let of_db = loaded.spec.services["db"].kiln.rollout.as_ref().unwrap();
    assert_eq!(of_db.strategy, Some(Strategy::BlueGreen), "the project's");
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
    assert!(web.kiln.snapshot.contains("data"));
    assert_eq!(web.kiln.max_age, Some(Millis(7 * 86_400_000)));
    assert_eq!(web.kiln.exclusive, Some(false));
    let tiny = &loaded.spec.bases["tiny"];
    assert_eq!((tiny.essential, tiny.distroless), (false, true));
    assert!(loaded.spec.bases["python"].essential);
    assert_eq!(
        loaded.spec.debian_mirror.as_deref(),
        Some("http://mirror.example/debian")
    );
    let allowed = ["/app/tests/*.pem", "BUILD_TOKEN"];
    assert_eq!(loaded.spec.allow_secrets, allowed);
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

#[test]
fn watch_rules_are_carried_beside_the_services() {
    let files = Files::new(&[
        (
            "compose.yaml",
            "include: [sub/compose.yaml]\nservices: {a: {image: x}}",
        ),
        (
            "sub/compose.yaml",
            "services:
  web:
    image: x
    develop:
      watch:
        - {path: src, action: sync, target: /app, ignore: node_modules/, initial_sync: true}
        - {path: ./a/../b.conf, action: sync+exec, target: /b.conf, include: ['*.c', '*.h'],
           exec: {command: make all, user: app, working_dir: /app, environment: {A: 1}}}
        - {path: /abs, action: rebuild}
        - {path: src, action: sync+restart, target: /app, exec: {command: x}}
        - {path: src, action: restart, target: /app}
",
        ),
    ]);
    let loaded = files.load().expect("valid");
    assert_eq!(loaded.spec.watch.len(), 1);
    let rules = &loaded.spec.watch["web"];
    let paths: Vec<&Path> = rules.iter().map(|rule| &*rule.path).collect();
    let expected = [
        "/p/sub/src",
        "/p/sub/b.conf",
        "/abs",
        "/p/sub/src",
        "/p/sub/src",
    ];
    assert_eq!(paths, expected.map(Path::new));
    assert_eq!(rules[0].ignore, ["node_modules/"]);
    assert_eq!(rules[1].include, ["*.c", "*.h"]);
    let sync = |target: &str, initial, exec| WatchAction::Sync {
        target: target.into(),
        initial,
        exec,
    };
    let hook = Hook {
        command: vec!["make".into(), "all".into()],
        user: Some("app".into()),
        privileged: false,
        working_dir: Some("/app".into()),
        environment: [("A".into(), "1".into())].into(),
    };
    let actions: Vec<WatchAction> = rules.iter().map(|rule| rule.action.clone()).collect();
    assert_eq!(
        actions,
        [
            sync("/app", true, None),
            sync("/b.conf", false, Some(hook)),
            WatchAction::Rebuild,
            sync("/app", false, None),
            WatchAction::Restart,
        ]
    );
    let notes: Vec<&str> = loaded.notes.iter().map(|n| n.message.as_str()).collect();
    assert_eq!(
        notes,
        [
            "`exec` has no effect with the action `sync+restart`",
            "`target` has no effect with the action `restart`",
        ]
    );
}

#[test]
fn limits_of_nothing_are_printed_as_docker_compose_prints_them() {
    let text = "services: {a: {image: x, build: {context: ., ulimits: {nproc: 0}}, \
         ulimits: {nofile: 0, core: {soft: 0, hard: 5}, as: 7}}}";
    let files = Files::new(&[("compose.yaml", text)]);
    let loaded = files.load().expect("valid");
    let yaml = loaded.config(ConfigFormat::Yaml);
    for text in [
        "    ulimits:\n      as: 7\n      core:\n        soft: 0\n        hard: 5\n      \
         nofile:\n        soft: 0\n        hard: 0\n",
        "      ulimits:\n        nproc:\n          soft: 0\n          hard: 0\n",
    ] {
        assert!(yaml.contains(text), "{yaml}");
    }
    // Its JSON leaves them out.
    let json = loaded.project.config_json();
    assert_eq!(
        json["services"]["a"]["ulimits"]["nofile"],
        serde_json::json!({})
    );
}

#[test]
fn a_canary_with_all_that_it_is_judged_by() {
    let text = "services: {a: {image: x, x-kiln: {rollout: {strategy: canary, \
        steps: [{weight: 5%, duration: 30s}, {weight: 25, duration: 1m}], \
        analysis: {max_error_rate: 1%, max_error_rate_increase: 0.005, max_latency_p99: 250ms, \
        max_latency_p99_increase: 20%, min_requests: 50, \
        prometheus: {url: 'http://127.0.0.1:9090/', query: up, max: 0.5}}}}}}";
    let loaded = one(text);
    let rollout = loaded.spec.services["a"].kiln.rollout.clone().unwrap();
    let step = |weight, seconds| CanaryStep {
        weight,
        duration: Millis::from_secs(seconds),
    };
    let expected = RolloutOptions {
        strategy: Some(Strategy::Canary),
        keep_warm: None,
        steps: vec![step(5, 30), step(25, 60)],
        analysis: Some(Analysis {
            max_error_rate: Some(10_000),
            max_error_rate_increase: Some(5_000),
            max_latency_p99: Some(Millis(250)),
            max_latency_p99_increase: Some(200_000),
            min_requests: Some(50),
            prometheus: Some(Prometheus {
                url: "http://127.0.0.1:9090".into(),
                query: "up".into(),
                min: None,
                max: Number::new(0.5),
            }),
        }),
    };
    assert_eq!(rollout, expected);
}
