//! Volumes, mounts, configs and secrets.

use std::fs;

use super::{Case, Has, Is, check, look, project};
use crate::common::Kiln;

const CASES: &[Case] = &[
    Case {
        name: "files",
        keys: "configs:
  - inline
  - {source: from_env, target: /etc/x.conf, uid: '1000', gid: '2000', mode: 0440}
  - from_file
  - kept
secrets:
  - from_file
  - {source: from_env, target: word, uid: '1000', gid: '2000', mode: 0400}
  - {source: kept, target: /etc/key}",
        looks: &[
            look("configs configs.[].source /configs /configs.*.content", "cat /inline", Is("hello outer")),
            look("configs.[].target /configs.*.environment", "cat /etc/x.conf", Is("outer")),
            look("configs.[].uid configs.[].gid configs.[].mode", "stat -c '%u %g %a' /etc/x.conf", Is("1000 2000 440")),
            look("/configs.*.file", "cat /from_file", Is("of a file")),
            look("/configs.*.external /configs.*.name /configs.*.external.name", "cat /kept", Is("kept config")),
            look("secrets secrets.[].source /secrets /secrets.*.file", "cat /run/secrets/from_file", Is("secret of a file")),
            look("secrets.[].target /secrets.*.environment", "cat /run/secrets/word", Is("outer")),
            look("secrets.[].uid secrets.[].gid secrets.[].mode", "stat -c '%u %g %a' /run/secrets/word", Is("1000 2000 400")),
            look("/secrets.*.external /secrets.*.name /secrets.*.external.name", "cat /etc/key", Is("kept secret")),
            look("secrets", "echo x > /etc/key", Has("Read-only file system")),
        ],
    },
    Case {
        name: "mounts",
        keys: "tmpfs: ['/mem:size=1m,mode=1700', /plain]
volumes:
  - data:/data
  - named:/named
  - outer:/outer
  - bound:/bound
  - memory:/memory
  - ./host:/host
  - ./host:/read:ro
  - fresh:/www
  - {type: bind, source: ./made, target: /made, bind: {create_host_path: true, propagation: rslave, recursive: enabled}}
  - {type: tmpfs, target: /small, tmpfs: {size: 2m, mode: 0700}}
  - {type: volume, source: data, target: /below, read_only: true, volume: {subpath: sub}}
  - {type: volume, source: data, target: /etc/one.conf, volume: {subpath: sub/file}}
  - {type: volume, source: bare, target: /etc/bare, volume: {nocopy: true}}
  - {type: volume, target: /anonymous}
  - {type: image, source: busybox, target: /image, image: {subpath: bin}}",
        looks: &[
            look("tmpfs", "df -k /mem | tail -n 1 | awk '{print $2}'; stat -c %a /mem", Is("1024\n1700")),
            look("tmpfs", "echo x > /plain/x && cat /plain/x", Is("x")),
            look("volumes /volumes volumes.[].source volumes.[].target volumes.[].type", "echo kept > /data/x; cat /data/sub/file", Is("of the volume")),
            look("/volumes.*.name", "echo x > /named/x; cat /named/x", Is("x")),
            look("/volumes.*.external /volumes.*.external.name", "cat /outer/was", Is("there before")),
            look("/volumes.*.driver /volumes.*.driver_opts", "cat /bound/x", Is("a folder of the host")),
            look("/volumes.*.driver_opts", "grep ' /memory ' /proc/mounts", Has("tmpfs")),
            look("/volumes.*.driver_opts", "grep ' /memory ' /proc/mounts", Has("size=1024k")),
            look("/volumes.*.driver_opts", "stat -c '%u %a' /memory; echo shared > /memory/x", Is("1000 750")),
            look("volumes.[].bind", "cat /host/x; echo new > /host/y", Is("of the host")),
            look("volumes.[].read_only", "touch /read/z", Has("Read-only file system")),
            look("volumes", "cat /www/index.html", Is("storage")),
            look("volumes.[].bind.create_host_path volumes.[].bind.recursive", "echo made > /made/x; cat /made/x", Is("made")),
            look("volumes.[].tmpfs volumes.[].tmpfs.size volumes.[].tmpfs.mode", "df -k /small | tail -n 1 | awk '{print $2}'; stat -c %a /small", Is("2048\n700")),
            look("volumes.[].volume volumes.[].volume.subpath", "ls /below; touch /below/x", Has("file\n")),
            look("volumes.[].volume.subpath", "cat /etc/one.conf; echo new > /etc/one.conf; cat /below/file", Is("of the volume\nnew")),
            look("volumes.[].volume.nocopy", "ls -A /etc/bare", Is("")),
            look("volumes.[].type", "echo x > /anonymous/x && cat /anonymous/x", Is("x")),
            look("volumes.[].image volumes.[].image.subpath", "ls /image", Has("busybox")),
            look("volumes", "grep ' /data ' /proc/mounts", Has("noexec")),
        ],
    },
    Case {
        name: "second",
        keys: "volumes_from: ['mounts:ro']\ndepends_on: [mounts]",
        looks: &[
            look("volumes_from", "cat /data/x; touch /data/y", Has("kept\ntouch: /data/y: Read-only file system")),
            look("/volumes.*.driver_opts", "cat /memory/x", Is("shared")),
        ],
    },
];

const TOP: &str = "configs:
  inline: {content: 'hello ${OUTER}'}
  from_env: {environment: OUTER}
  from_file: {file: conf.txt}
  kept: {external: true, name: the-config}
secrets:
  from_file: {file: key.txt}
  from_env: {environment: OUTER}
  kept: {external: {name: the/secret}}
volumes:
  data: {labels: {a: b}}
  named: {name: a-name}
  outer: {external: true, name: made-before}
  bound: {driver: local, driver_opts: {type: none, o: bind, device: '${HERE}/bound'}}
  memory: {driver_opts: {type: tmpfs, device: tmpfs, o: 'size=1m,mode=0750,uid=1000'}}
  fresh: {}
  bare: {}
";

pub const OTHER: &[&str] = &["volumes.[].bind.propagation"];

pub fn keys() -> impl Iterator<Item = &'static str> {
    let looks = CASES.iter().flat_map(|c| c.looks).map(|l| l.of);
    looks.chain(OTHER.iter().copied())
}

#[test]
fn volumes_configs_and_secrets_are_mounted_as_said() {
    let Some(kiln) = Kiln::new() else { return };
    let files = [
        ("conf.txt", "of a file"),
        ("key.txt", "secret of a file"),
        ("host/x", "of the host"),
        ("bound/x", "a folder of the host"),
    ];
    let mut project = project(&kiln, "storage", CASES, TOP, &files);
    project.set("OUTER", "outer");
    let here = project.folder.display().to_string();
    project.set("HERE", here);
    let volume = |name: &str, file: &str, text: &str| {
        let path = kiln.root.join("volumes").join(name).join("data").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    volume("storage_data", "sub/file", "of the volume\n");
    volume("made-before", "was", "there before");
    // What is not there is asked for, and nothing is begun.
    project
        .up()
        .code(&[3])
        .says(&["the-config", "kiln configs set"]);
    project.write("config", "kept config");
    project.write("secret", "kept secret");
    let file = |name: &str| project.folder.join(name).display().to_string();
    kiln.run(&["configs", "set", "the-config", &file("config")])
        .ok();
    project
        .up()
        .code(&[3])
        .says(&["the/secret", "kiln secrets set"]);
    kiln.run(&["secrets", "set", "the/secret", &file("secret")])
        .ok();
    let listed = kiln.run(&["secrets", "list"]).ok();
    assert!(listed.stdout.contains("the/secret"), "{listed}");
    project.up().ok();
    check(&project, CASES);
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // Where the host's mounts are nobody's to follow, there is nothing to be seen.
    if own.lines().all(|line| line.contains(" shared:")) {
        let line = "grep ' /made ' /proc/self/mountinfo";
        let shown = project.inside("mounts", line).ok().stdout;
        assert!(shown.contains("master:"), "{shown}");
    }
    assert!(kiln.root.join("volumes/a-name/data/x").exists());
    assert!(project.folder.join("made/x").exists() && project.folder.join("host/y").exists());
    // Another content under the name is a change like any other.
    project.write("config", "another config");
    kiln.run(&["configs", "set", "the-config", &file("config")])
        .ok();
    project.up().ok();
    let shown = project.inside("files", "cat /kept").ok().stdout;
    assert_eq!(shown.trim(), "another config");
    project.run("down", &[]).ok();
    super::nothing_is_left(&kiln);
}
