//! `x-kiln.image`: what is carried into the Spec, and what is refused, with its place.

use std::path::Path;

use kiln_model::spec::{DeclaredContent, DeclaredImage, ImageSource};

use super::{Files, errors, one};

const WHOLE: &str = "\
services:
  web:
    image: shop/web:1
    x-kiln:
      image:
        links: {/log/access: /dev/stdout}
        files:
          - {source: conf/nginx.conf, target: /etc/nginx/, owner: 'web:adm', mode: 0640}
          - content: |
              hello ${HOST}
            target: /srv/../www/index.html
        folders: [/www, {path: /var/x, owner: '7', mode: '1777'}]
        suite: bookworm
        packages: [nginx-light]
        distroless: true
        groups: {adm2: 900, ops: {gid: 901}}
        users:
          web: {uid: 1000, group: ops, groups: [adm2], home: /www, shell: /bin/sh}
          two: 1001
        entrypoint: [nginx, -g, daemon off;]
        cmd: a 'b c'
        env: {A: '$$x'}
        labels: [\"team=front\"]
        workdir: /www
        user: web
        expose: [80, 8000-8001, 53/udp]
        stop_signal: SIGQUIT
        platforms: [linux/arm64]
";

fn declared(loaded: &kiln_compose::Loaded, service: &str) -> DeclaredImage {
    match &loaded.spec.services[service].image {
        ImageSource::Build { build, .. } => (**build.declared.as_ref().unwrap()).clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_of_it_is_carried_and_stands_in_its_order() {
    let loaded = one(WHOLE);
    let image = declared(&loaded, "web");
    let name = "services.web.x-kiln.image";
    assert_eq!(image.base.as_deref(), Some(name));
    let base = &loaded.spec.bases[name];
    assert!(base.distroless && !base.essential && base.packages == ["nginx-light"]);
    let service = &loaded.spec.services["web"];
    let ImageSource::Build { tag, build } = &service.image else {
        panic!("{:?}", service.image);
    };
    assert_eq!(tag.as_deref(), Some("shop/web:1"));
    assert_eq!(build.context, Path::new("/p"));
    assert_eq!(build.platforms, ["linux/arm64"]);

    let paths: Vec<(&str, String)> = image
        .entries
        .iter()
        .map(|e| (e.path.as_str(), e.place.to_string()))
        .collect();
    let places = [
        ("/www", "compose.yaml:12:19"),
        ("/var/x", "compose.yaml:12:25"),
        ("/etc/nginx/", "compose.yaml:8:13"),
        ("/www/index.html", "compose.yaml:9:13"),
        ("/log/access", "compose.yaml:6:17"),
    ];
    assert_eq!(paths, places.map(|(path, place)| (path, place.to_owned())));
    let copied = &image.entries[2];
    assert_eq!(
        copied.what,
        DeclaredContent::Copy("/p/conf/nginx.conf".into())
    );
    assert_eq!(
        (copied.owner.as_deref(), copied.mode),
        (Some("web:adm"), Some(0o640))
    );
    assert_eq!(image.entries[1].mode, Some(0o1777));
    let text = DeclaredContent::Text("hello h\n".into());
    assert_eq!(image.entries[3].what, text);
    assert_eq!(image.env["A"], "$x");
    assert_eq!(image.cmd.unwrap(), ["a", "b c"]);
    assert_eq!(image.entrypoint.unwrap(), ["nginx", "-g", "daemon off;"]);
    assert_eq!(image.labels["team"], "front");
    assert_eq!(image.exposed.len(), 4);
    assert_eq!(image.groups.len(), 2);
    assert_eq!(
        (image.users[1].uid, &*image.users[1].shell),
        (1001, "/usr/sbin/nologin")
    );
    assert_eq!(image.place.to_string(), "compose.yaml:5:7");
}

#[test]
fn a_base_may_be_any_image_or_nothing() {
    let text = "services:\n  a: {x-kiln: {image: {base: 'debian:12', cmd: [x]}}}\n  \
                b: {x-kiln: {image: {cmd: [x]}}}";
    let loaded = one(text);
    assert_eq!(declared(&loaded, "a").base.as_deref(), Some("debian:12"));
    assert_eq!(declared(&loaded, "b").base, None);
    assert!(loaded.spec.bases.is_empty());
}

#[test]
fn a_source_counts_from_the_file_that_names_it() {
    let files = [
        ("compose.yaml", "include: [sub/compose.yaml]"),
        (
            "sub/compose.yaml",
            "services: {a: {x-kiln: {image: {files: [{source: f, target: /f}]}}}}",
        ),
    ];
    let loaded = Files::new(&files).load().unwrap();
    let image = declared(&loaded, "a");
    assert_eq!(
        image.entries[0].what,
        DeclaredContent::Copy("/p/sub/f".into())
    );
}

#[test]
fn what_can_not_be_is_refused_where_it_stands() {
    for (image, expected) in [
        ("null", "says nothing of the image"),
        ("{}", "says nothing of the image"),
        ("[a]", "says nothing of the image"),
        ("{command: [x]}", "unknown key `command`"),
        ("{packages: [a]}", "the key `suite` is missing"),
        ("{base: a, suite: bookworm}", "`base` already says"),
        ("{files: [{target: /x}]}", "exactly one of source, content"),
        (
            "{files: [{target: /x, source: a, content: b}]}",
            "exactly one of source, content",
        ),
        ("{files: [{content: b}]}", "the key `target` is missing"),
        ("{files: [{content: b, target: x}]}", "not an absolute path"),
        (
            "{files: [{content: b, target: /x/}]}",
            "needs a file's name",
        ),
        (
            "{files: [{content: b, target: /x, mode: 99999}]}",
            "0 to 07777",
        ),
        (
            "{files: [{content: b, target: /x, owner: 'a:b:c'}]}",
            "user:group",
        ),
        (
            "{files: [{content: b, target: /x}], links: {/x: y}}",
            "/x is declared twice",
        ),
        ("{folders: /x}", "must be a list"),
        ("{links: [a]}", "must be a mapping of links"),
        ("{users: {Web: 1}}", "`Web` is no name"),
        ("{users: {web: {home: /x}}}", "the key `uid` is missing"),
        ("{users: {web: -1}}", "out of range"),
        ("{users: {web: 4294967295}}", "out of range"),
        ("{users: {web: {uid: 1, shell: '/a:b'}}}", "a colon"),
        ("{groups: {g: {}}}", "the key `gid` is missing"),
        ("{env: [A]}", "`A` has no value"),
        ("{expose: [80/sctp]}", "neither tcp nor udp"),
        ("{expose: [x]}", "not a port"),
        ("{workdir: x}", "not an absolute path"),
        ("{platforms: {}}", "must be a list"),
    ] {
        let text = format!("services:\n  a:\n    x-kiln:\n      image: {image}\n");
        let told = errors(&[("compose.yaml", &text)]);
        assert!(
            told.iter().any(|d| d.message.contains(expected)),
            "{image}: {told:?}"
        );
        assert!(told.iter().all(|d| !d.span.is_none()), "{image}: {told:?}");
    }
    let both = "services: {a: {build: ., x-kiln: {image: {cmd: [x]}}}}";
    let told = errors(&[("compose.yaml", both)]);
    assert!(told[0].message.contains("exclude each other"), "{told:?}");
    let twice = "x-kiln: {bases: {services.a.x-kiln.image: {suite: s}}}\n\
                 services: {a: {x-kiln: {image: {suite: bookworm}}}}";
    let told = errors(&[("compose.yaml", twice)]);
    assert!(told[0].message.contains("x-kiln.bases has a"), "{told:?}");
}
