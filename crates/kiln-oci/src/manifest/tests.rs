#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kiln_model::spec::{ExposedPort, HealthTest, Healthcheck, Protocol};
use kiln_model::{ImageConfig, Millis};
use serde_json::json;

use super::*;

fn descriptor(media_type: &str) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": Digest::of("x"), "size": 1})
}

fn manifest_json() -> serde_json::Value {
    json!({
        "schemaVersion": 2,
        "mediaType": media_type::DOCKER_MANIFEST,
        "config": descriptor(media_type::DOCKER_CONFIG),
        "layers": [descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip")],
        "annotations": null,
    })
}

fn parse_json(value: &serde_json::Value) -> Result<Document, ManifestError> {
    parse(value.to_string().as_bytes(), None)
}

#[test]
fn docker_and_oci_manifests_parse() {
    let Document::Manifest(docker) = parse_json(&manifest_json()).unwrap() else {
        panic!("not a manifest");
    };
    docker.check_runnable().unwrap();

    let ours = Manifest::new(
        Descriptor::new(media_type::OCI_CONFIG, Digest::of("c"), 1),
        vec![Descriptor::new(
            media_type::OCI_LAYER_ZSTD,
            Digest::of("l"),
            2,
        )],
    );
    ours.check_runnable().unwrap();
    let bytes = ours.to_bytes();
    assert_eq!(
        parse(&bytes, Some(media_type::OCI_MANIFEST)).unwrap(),
        Document::Manifest(Box::new(ours))
    );
    // A golden: other tools and other kilns must get this very digest.
    assert_eq!(
        Digest::of(&bytes).to_string(),
        "sha256:55051e5500aedcc3dd4f5c41b926e352766563e49e2a81fe250bc121152bd6c1"
    );
}

#[test]
fn unusable_manifests_are_refused_by_name() {
    let mut both = manifest_json();
    both["manifests"] = json!([]);
    assert!(matches!(parse_json(&both), Err(ManifestError::Ambiguous)));

    let mut liar = manifest_json();
    liar["mediaType"] = media_type::OCI_INDEX.into();
    assert!(matches!(
        parse_json(&liar),
        Err(ManifestError::MediaTypeMismatch { .. })
    ));
    let honest = manifest_json().to_string();
    let transport_liar = parse(honest.as_bytes(), Some(media_type::OCI_INDEX));
    assert!(matches!(
        transport_liar,
        Err(ManifestError::MediaTypeMismatch { .. })
    ));
    // A registry that doesn't know what it serves is no liar.
    assert!(parse(honest.as_bytes(), Some("application/json")).is_ok());

    let schema1 = json!({"schemaVersion": 1, "fsLayers": []});
    assert!(matches!(parse_json(&schema1), Err(ManifestError::Schema1)));
    assert!(matches!(
        parse_json(&json!({"schemaVersion": 2})),
        Err(ManifestError::Neither { .. })
    ));
    let mut sha512 = manifest_json();
    sha512["config"]["digest"] = "sha512:00".into();
    let message = parse_json(&sha512).unwrap_err().to_string();
    assert!(message.contains("sha512:00"), "{message}");

    let mut negative = manifest_json();
    negative["config"]["size"] = json!(-1);
    assert!(matches!(parse_json(&negative), Err(ManifestError::Json(_))));

    let mut many = manifest_json();
    many["layers"] = vec![descriptor(media_type::OCI_LAYER); MAX_LAYERS + 1].into();
    assert!(matches!(
        parse_json(&many),
        Err(ManifestError::TooMany { .. })
    ));

    let large = vec![b' '; MAX_MANIFEST_BYTES as usize + 1];
    assert!(matches!(
        parse(&large, None),
        Err(ManifestError::TooLarge { .. })
    ));
    assert!(parse(&[b'['; 100_000], None).is_err(), "deep nesting");
    assert!(parse(br#"{"schemaVersion":2,"layers":[],"layers":[]}"#, None).is_err());
}

#[test]
fn what_is_no_container_image_is_refused() {
    let mut chart = manifest_json();
    chart["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    let mut encrypted = manifest_json();
    encrypted["layers"][0]["mediaType"] =
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    for (value, name) in [(chart, "helm"), (encrypted, "encrypted")] {
        let Document::Manifest(manifest) = parse_json(&value).unwrap() else {
            panic!("not a manifest");
        };
        let message = manifest.check_runnable().unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn an_index_gives_the_entry_that_suits_best() {
    let entry = |name: &str, platform: &str| {
        let mut entry = Descriptor::new(media_type::OCI_MANIFEST, Digest::of(name), 1);
        entry.platform = Some(platform.parse().unwrap());
        entry
    };
    let mut attestation = entry("attestation", "linux/amd64");
    attestation.annotations.insert(
        "vnd.docker.reference.type".into(),
        "attestation-manifest".into(),
    );
    let index = Index::new(vec![
        attestation,
        entry("v6", "linux/arm/v6"),
        entry("v7", "linux/arm/v7"),
        entry("amd64", "linux/amd64"),
        entry("unknown", "unknown/unknown"),
    ]);
    let chosen = |platform: &str| index.select(&platform.parse().unwrap()).map(|d| d.digest);
    assert_eq!(chosen("linux/amd64"), Some(Digest::of("amd64")));
    assert_eq!(chosen("linux/arm/v7"), Some(Digest::of("v7")));
    assert_eq!(chosen("linux/arm/v6"), Some(Digest::of("v6")));
    assert_eq!(chosen("linux/s390x"), None);
    assert_eq!(
        index.platforms(),
        "linux/amd64, linux/arm/v6, linux/arm/v7, linux/amd64"
    );
}

/// As `docker build` writes it.
const DOCKER_CONFIG: &str = r#"{
  "architecture":"arm64","variant":"v8","os":"linux","created":"2024-01-02T03:04:05.678Z",
  "config":{
    "User":"app:app","ExposedPorts":{"8080/tcp":{},"53/udp":{},"9/tcp":{}},
    "Env":["PATH=/usr/bin:/bin","EMPTY=","A=b=c"],"Entrypoint":["/entry"],"Cmd":null,
    "Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":5000000000,"Timeout":1500000,"Retries":4},
    "Volumes":{"/var/lib/x":{},"/data":{}},"WorkingDir":"/srv","Labels":{"b":"2","a":"1"},
    "StopSignal":"SIGQUIT","ArgsEscaped":true,"OnBuild":["RUN make"],"Shell":["/bin/bash","-c"]},
  "rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},
  "history":[{"created_by":"COPY x /"},{"created_by":"CMD []","empty_layer":true}]}"#;

#[test]
fn a_docker_configuration_is_read_whole_and_survives_writing() {
    let document = parse_config(DOCKER_CONFIG.as_bytes()).unwrap();
    let port = |port, protocol| ExposedPort { port, protocol };
    assert_eq!(
        document.config,
        ImageConfig {
            platform: "linux/arm64/v8".into(),
            user: "app:app".into(),
            env: [("PATH", "/usr/bin:/bin"), ("EMPTY", ""), ("A", "b=c")]
                .map(|(k, v)| (k.into(), v.into()))
                .to_vec(),
            entrypoint: vec!["/entry".into()],
            cmd: vec![],
            working_dir: "/srv".into(),
            exposed: vec![
                port(9, Protocol::Tcp),
                port(53, Protocol::Udp),
                port(8080, Protocol::Tcp)
            ],
            volumes: vec!["/data".into(), "/var/lib/x".into()],
            labels: [("a", "1"), ("b", "2")]
                .map(|(k, v)| (k.into(), v.into()))
                .into(),
            stop_signal: Some("SIGQUIT".into()),
            healthcheck: Some(Healthcheck {
                test: Some(HealthTest::Shell("true".into())),
                interval: Some(Millis(5000)),
                timeout: Some(Millis(2)),
                start_period: None,
                start_interval: None,
                retries: Some(4),
            }),
            shell: vec!["/bin/bash".into(), "-c".into()],
        }
    );
    assert_eq!(document.diff_ids, [Digest::of("")]);
    assert_eq!(document.on_build, ["RUN make"]);
    assert!(document.history[1].empty_layer);

    let written = write_config(&document);
    assert_eq!(parse_config(&written).unwrap(), document);
    assert_eq!(
        Digest::of(&written).to_string(),
        "sha256:40208267081c22519ed26b49c583ab7e022cfa6de9e69f4440c60758c421952b",
        "{}",
        String::from_utf8_lossy(&written)
    );
}

#[test]
fn unusable_configurations_are_refused_by_name() {
    let with = |process: serde_json::Value| {
        json!({"os": "linux", "architecture": "amd64", "config": process,
               "rootfs": {"type": "layers", "diff_ids": null}})
        .to_string()
    };
    for (process, cause) in [
        (json!({"ExposedPorts": {"80/sctp": {}}}), "80/sctp"),
        (json!({"ExposedPorts": {"0": {}}}), "`0`"),
        (json!({"ExposedPorts": {"70000/tcp": {}}}), "70000/tcp"),
        (json!({"Healthcheck": {"Test": ["WHAT", "x"]}}), "WHAT x"),
        (
            json!({"Healthcheck": {"Test": ["CMD", "x"], "Interval": -5}}),
            "-5",
        ),
        (json!({"Env": ["A=\u{0}"]}), "NUL"),
    ] {
        let message = parse_config(with(process).as_bytes())
            .unwrap_err()
            .to_string();
        assert!(message.contains(cause), "{message} lacks {cause}");
    }
    let none = with(json!({"Healthcheck": {"Test": ["NONE"]}}));
    assert_eq!(
        parse_config(none.as_bytes()).unwrap().config.healthcheck,
        None
    );
    assert!(parse_config(with(json!(null)).as_bytes()).is_ok());
    assert!(parse_config(b"{}").is_err());
}

#[test]
fn timestamps_are_rfc_3339() {
    assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
    assert_eq!(timestamp(1_700_000_000), "2023-11-14T22:13:20Z");
    assert!(timestamp(i64::MAX).starts_with("9999-"));
}
