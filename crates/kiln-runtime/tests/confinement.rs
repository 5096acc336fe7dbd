//! What an instance can't do, and what it sees.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use common::{Fixture, can_run, sh};
use kiln_model::Millis;
use kiln_model::instance::*;
use kiln_model::spec::Seccomp;

fn mount(source: InstanceMountSource, target: &str) -> InstanceMount {
    InstanceMount {
        source,
        target: target.into(),
        read_only: false,
        exec: false,
        dev: false,
    }
}

fn bind(path: PathBuf, target: &str) -> InstanceMount {
    mount(
        InstanceMountSource::Bind {
            path,
            recursive: false,
            propagation: None,
        },
        target,
    )
}

#[test]
fn a_sealed_root_is_read_only_and_scratch_is_writable_but_not_executable() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let root = f.sealed(&[
        ("/tmp", false),
        ("/data", false),
        ("/new/dir", false),
        ("/opt/run", true),
    ]);
    let spec = f.spec(
        root,
        "touch /x 2>&1; touch /bin/x 2>&1; rm /etc/passwd 2>&1; mkdir /data/sub/n && echo more >> /data/file && cat /data/file; \
         rm /data/sub/other && ls /data/sub; \
         for d in /tmp /data /new/dir /opt/run; do cp /bin/busybox $d/echo; $d/echo ran $d 2>&1; done; \
         dd if=/dev/zero of=/tmp/big bs=1M count=6 2>&1 | grep -c 'No space'; stat -c '%a' /tmp /new/dir /data",
    );
    let (_, out) = f.run(&spec);
    assert_eq!(out.matches("Read-only file system").count(), 3, "{out}");
    assert!(out.contains("from the image\nmore\nn\n"), "{out}");
    assert!(out.contains("ran /opt/run"), "{out}");
    assert_eq!(out.matches("Permission denied").count(), 3, "{out}");
    assert!(!out.contains("ran /tmp"), "{out}");
    assert!(out.ends_with("1\n1777\n755\n755\n"), "{out}");
}

#[test]
fn capabilities_are_dockers_and_privileges_cannot_be_gained() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let status = "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status";
    let (_, out) = f.run(&f.spec(f.sealed(&[]), status));
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(out.contains(line), "{line} in {out}");
    }
    let mut spec = f.spec(f.sealed(&[]), status);
    spec.user = "web".into();
    spec.security.cap_drop = vec!["ALL".into()];
    spec.security.cap_add = vec!["NET_ADMIN".into()];
    spec.security.no_new_privileges = false;
    let (_, out) = f.run(&spec);
    assert!(out.contains("CapEff:\t0000000000000000"), "{out}");
    assert!(out.contains("CapBnd:\t0000000000001000"), "{out}");
    assert!(
        out.contains("NoNewPrivs:\t0") && out.contains("Seccomp:\t2"),
        "{out}"
    );
}

#[test]
fn seccomp_refuses_what_docker_refuses_and_what_a_profile_says() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let script = "unshare -U true 2>&1; mount -t tmpfs x /tmp 2>&1; echo done";
    let (_, out) = f.run(&f.spec(f.sealed(&[]), script));
    assert_eq!(
        out.matches("not permitted").count() + out.matches("denied").count(),
        2,
        "{out}"
    );
    let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28},
        {"names":["kill"],"action":"SCMP_ACT_KILL_PROCESS","args":[{"index":1,"value":10,"op":"SCMP_CMP_EQ"}]}]}"#;
    let mut spec = f.spec(
        f.sealed(&[("/tmp", false)]),
        "mkdir /tmp/a 2>&1; kill -0 $$ && echo alive; kill -USR1 $$; echo not reached",
    );
    spec.security.seccomp = Seccomp::Profile(profile.into());
    let (status, out) = f.run(&spec);
    assert!(
        out.contains("No space left") && out.contains("alive") && !out.contains("not reached"),
        "{out}"
    );
    assert_eq!(status, ExitStatus::Signal(31));
    // Unconfined, a root without SYS_ADMIN still may make a user namespace.
    let mut spec = f.spec(f.sealed(&[]), "unshare -U true && echo allowed");
    spec.security.seccomp = Seccomp::Unconfined;
    assert!(f.run(&spec).1.contains("allowed"));
}

#[test]
fn files_of_etc_and_the_name_are_the_instances_own() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(
        f.sealed(&[]),
        "cat /etc/hosts /etc/resolv.conf /etc/hostname; hostname; echo x 2>&1 >/etc/hosts; ls -a /etc",
    );
    spec.hosts = vec![("10.9.8.7".parse().unwrap(), "db".into())];
    spec.resolver = Some(Resolver {
        nameservers: vec!["10.9.8.1".parse().unwrap()],
        search: vec!["clay".into()],
        options: vec!["ndots:0".into()],
    });
    let (_, out) = f.run(&spec);
    for line in [
        "127.0.0.1\tlocalhost",
        "10.9.8.7\tdb",
        "127.0.0.1\tpot",
        "search clay\nnameserver 10.9.8.1\noptions ndots:0\n",
        "pot\npot\n",
        "ead-only file system",
        "passwd",
    ] {
        assert!(out.contains(line), "{line} in {out}");
    }
}

#[test]
fn configs_secrets_volumes_and_tmpfs_are_mounted_as_said() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let secret = f.root.join("secret-source");
    std::fs::write(&secret, "hush\n").unwrap();
    let volume = f.root.join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    let mut spec = f.spec(
        f.sealed(&[]),
        "cat /run/secrets/key; stat -c '%u:%g %a' /run/secrets/key; echo no 2>&1 >/run/secrets/key; \
         cp /bin/busybox /vol/echo; /vol/echo ran 2>&1; echo kept > /vol/kept; \
         echo x 2>&1 > /ro/x; stat -c '%a' /t; cat /var/link/in-tmp; grep -c ' /run/secrets/key .*tmpfs' /proc/self/mountinfo",
    );
    spec.user = "web".into();
    std::os::unix::fs::chown(&volume, Some(33), Some(34)).unwrap();
    let file = |path: &std::path::Path| InstanceMountSource::File {
        path: path.to_owned(),
        uid: 33,
        gid: 34,
        mode: 0o400,
        secret: true,
    };
    let mut read_only = bind(volume.clone(), "/ro");
    read_only.read_only = true;
    spec.mounts = vec![
        mount(file(&secret), "/run/secrets/key"),
        bind(volume.clone(), "/vol"),
        read_only,
        mount(
            InstanceMountSource::Tmpfs {
                size: Some(1 << 20),
                mode: Some(0o700),
                uid: Some(33),
                gid: None,
            },
            "/t",
        ),
        mount(file(&secret), "/var/link/in-tmp"),
    ];
    let (_, out) = f.run(&spec);
    assert!(out.starts_with("hush\n33:34 400\n"), "{out}");
    assert!(!out.contains("\nran\n"), "{out}");
    assert!(out.contains("700\nhush\n1\n"), "{out}");
    assert_eq!(out.matches("ead-only file system").count(), 2, "{out}");
    assert_eq!(
        std::fs::read_to_string(volume.join("kept")).unwrap(),
        "kept\n"
    );
    assert!(!volume.join("x").exists());
}

#[test]
fn kernel_file_systems_are_masked_and_devices_are_few() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let (_, out) = f.run(&f.spec(
        f.sealed(&[]),
        "ls /dev; echo x 2>&1 >/proc/sysrq-trigger; echo 1 2>&1 >/proc/sys/kernel/panic; echo x 2>&1 >/sys/kernel/x; \
         head -c 1 /proc/kcore | stat -c %s - ; ls /sys/firmware; stat -c '%a' /dev/shm; \
         mknod /dev/disk b 254 0 && head -c 1 /dev/disk 2>&1; ls /sys/fs/cgroup > /dev/null && for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x 2>&1; done; ls -d /sys/fs/cgroup/x /sys/fs/cgroup/*/x; ps | grep -c sh; echo x > /dev/null && echo null",
    ));
    for name in [
        "null\n",
        "urandom\n",
        "ptmx\n",
        "mqueue\n",
        "shm\n",
        "stdout\n",
    ] {
        assert!(out.contains(name), "{name} in {out}");
    }
    assert!(!out.contains("vda") && !out.contains("kvm"), "{out}");
    assert!(!out.contains("\n/sys/fs/cgroup/"), "{out}");
    assert!(out.contains("panic: Read-only file system"), "{out}");
    assert!(
        out.contains("/sys/kernel/x: Read-only file system"),
        "{out}"
    );
    assert!(out.contains("1777"), "{out}");
    assert!(
        out.contains("not permitted") || out.contains("denied"),
        "{out}"
    );
}

#[test]
fn users_groups_home_and_working_folder_come_from_the_image() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(
        f.sealed(&[]),
        "id -u; id -G; echo $HOME $PATH; cd .; env | grep PWD; echo out > /dev/stdout",
    );
    spec.user = "web".into();
    spec.group_add = vec!["77".into()];
    spec.cwd = "/srv/app".into();
    let (_, out) = f.run(&spec);
    assert!(
        out.starts_with("33\n34 50 77\n/var/www /usr/local/sbin:"),
        "{out}"
    );
    assert!(
        out.contains("PWD=/srv/app") && out.ends_with("out\n"),
        "{out}"
    );
}

#[test]
fn a_start_that_fails_says_why_and_leaves_its_word_in_the_log() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let tree = f.sealed(&[]);
    let cause = |change: &dyn Fn(&mut kiln_model::InstanceSpec)| {
        let mut spec = f.spec(tree.clone(), "true");
        change(&mut spec);
        let error = f.runtime.start(&spec).unwrap_err().to_string();
        let observed = f.runtime.observe(&spec.id).map(|o| o.state);
        if let Some(ObservedState::Exited { status, .. }) = observed {
            assert_eq!(status, ExitStatus::StartFailed);
            assert!(!f.log_text(&spec.id).is_empty(), "{error}");
        }
        f.runtime.remove(&spec.id).unwrap();
        error
    };
    let contains = |text: String, part: &str| assert!(text.contains(part), "`{part}` in `{text}`");
    contains(
        cause(&|s| s.argv = vec!["/bin/foo".into()]),
        "exec /bin/foo: no such file",
    );
    contains(
        cause(&|s| s.argv = vec!["foo".into()]),
        "exec foo: not found in PATH",
    );
    contains(
        cause(&|s| s.argv = vec!["/data/file".into()]),
        "not executable",
    );
    contains(cause(&|s| s.argv = vec!["/data".into()]), "it is a folder");
    contains(cause(&|s| s.user = "nobody".into()), "no user `nobody`");
    contains(cause(&|s| s.cwd = "/data/file".into()), "/data/file");
    contains(
        cause(&|s| s.mounts = vec![bind("/nowhere".into(), "/x")]),
        "/nowhere",
    );
    contains(
        cause(&|s| s.mounts = vec![bind("/etc/passwd".into(), "/data")]),
        "folder in the image",
    );
    contains(
        cause(&|s| s.security.cap_add = vec!["NOPE".into()]),
        "`NOPE` is no capability",
    );
    contains(
        cause(&|s| s.security.seccomp = Seccomp::Profile("{".into())),
        "seccomp profile is not valid",
    );
    contains(
        cause(&|s| s.limits.ulimits = BTreeMap::from([("nope".into(), (1, 1))])),
        "`nope` is no ulimit",
    );
    contains(
        cause(&|s| s.security.sysctls = BTreeMap::from([("net.nope".into(), "1".into())])),
        "has no sysctl `net.nope`",
    );
    contains(
        cause(&|s| s.security.sysctls = BTreeMap::from([("vm.swappiness".into(), "1".into())])),
        "`vm.swappiness` belongs to the whole machine",
    );
    contains(cause(&|s| s.argv = vec![]), "no program");
    contains(
        cause(&|s| s.cwd = "relative".into()),
        "not an absolute path",
    );
    contains(
        cause(&|s| {
            s.mounts = vec![mount(
                InstanceMountSource::Bind {
                    path: "/tmp".into(),
                    recursive: true,
                    propagation: Some("rshared".into()),
                },
                "/x",
            )]
        }),
        "`rshared` is not supported",
    );
}

#[test]
fn a_script_without_its_interpreter_is_explained() {
    if !can_run() {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let f = Fixture::new();
    let root = f.layered();
    let Root::Layered { upper, .. } = &root else {
        unreachable!()
    };
    std::fs::write(upper.join("bin/run"), "#!/usr/bin/python3 -u\n").unwrap();
    std::fs::set_permissions(upper.join("bin/run"), PermissionsExt::from_mode(0o755)).unwrap();
    let mut spec = f.spec(root, "");
    spec.argv = vec!["run".into()];
    let error = f.runtime.start(&spec).unwrap_err().to_string();
    assert!(
        error.contains("needs the interpreter /usr/bin/python3"),
        "{error}"
    );
}

#[test]
fn exec_joins_the_instance_with_its_rights() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let mut spec = f.spec(
        f.sealed(&[("/tmp", false)]),
        "echo mine > /tmp/mine; while :; do sleep 0.1; done",
    );
    spec.user = "web".into();
    f.runtime.start(&spec).unwrap();
    common::until("file", || {
        f.exec(&spec.id, &sh("cat /tmp/mine")).1 == "mine\n"
    });
    let (status, out) = f.exec(
        &spec.id,
        &sh("id -u; echo $GREETING $EXTRA; hostname; grep -E 'NoNewPrivs|Seccomp:|CapBnd' /proc/self/status; unshare -U true 2>&1; grep -c kiln /proc/self/cgroup; exit 4"),
    );
    assert_eq!(status, ExitStatus::Code(4), "{out}");
    assert!(out.starts_with("33\nhello\npot\n"), "{out}");
    assert!(
        out.contains("CapBnd:\t00000000a80425fb")
            && out.contains("NoNewPrivs:\t1")
            && out.contains("Seccomp:\t2"),
        "{out}"
    );
    assert!(out.contains("not permitted"), "{out}");
    let mut privileged = sh(
        "grep CapEff /proc/self/status; id -u; echo $EXTRA; mount -t tmpfs x /tmp && echo mounted",
    );
    privileged.privileged = true;
    privileged.user = Some("0".into());
    privileged.env = BTreeMap::from([("EXTRA".into(), "more".into())]);
    let (_, out) = f.exec(&spec.id, &privileged);
    assert!(out.contains("0\nmore\nmounted\n"), "{out}");
    let (error, _) = f.try_exec(
        &spec.id,
        &kiln_runtime::ExecSpec {
            argv: vec!["nope".into()],
            ..Default::default()
        },
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("exec nope: not found in PATH")
    );
    let mut slow = sh("sleep 30 & sleep 30");
    slow.timeout = Some(Millis(200));
    let began = std::time::Instant::now();
    let (error, _) = f.try_exec(&spec.id, &slow);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("did not end within 200ms")
    );
    assert!(began.elapsed() < std::time::Duration::from_secs(5));
    let mut terminal = sh("tty; echo $TERM");
    terminal.tty = true;
    let (_, out) = f.exec(&spec.id, &terminal);
    assert!(out.contains("/dev/pts/") && out.contains("xterm"), "{out}");
}

#[test]
fn each_instance_has_an_identity_of_its_own_where_the_image_has_an_empty_file() {
    if !can_run() {
        return;
    }
    let f = Fixture::new();
    let show = "cd /etc; cat machine-id; head -n 1 ssh/*; stat -c '%a %g' machine-id ssh/*";
    let of = |spec: &InstanceSpec| f.run(spec).1.lines().map(str::to_owned).collect::<Vec<_>>();
    let tree = f.tree();
    let sealed = |tree: &TreePaths| Root::Sealed {
        tree: tree.clone(),
        scratch: vec![],
    };
    let (one, other) = (f.spec(sealed(&tree), show), f.spec(sealed(&tree), show));
    let (one, other) = (of(&one), of(&other));
    let told = ["-----BEGIN OPENSSH PRIVATE KEY-----", "444 50", "640 50"];
    assert_eq!(one[1..], told);
    assert_eq!((one[0].len(), other[1..].len()), (32, 3), "{one:?}");
    assert_ne!(one[0], other[0]);
    // What may be written to is an ordinary file.
    let free = f.spec(
        Root::Unsealed { tree: tree.clone() },
        &format!("{show}; rm ssh/*"),
    );
    assert_eq!(of(&free)[1..], told);
    // A build is given keys to work with, but no id that would get into what it makes.
    let mut build = f.spec(f.layered(), show);
    build.purpose = Purpose::Build;
    assert_eq!(of(&build), told);
    // What the user mounts there is the user's.
    let own = f.files().join("etc");
    let mut mounted = f.spec(
        sealed(&tree),
        "cat /etc/machine-id; cat /etc/ssh/*; echo end",
    );
    mounted.mounts.push(bind(own, "/etc"));
    assert_eq!(of(&mounted), ["end"]);
}
