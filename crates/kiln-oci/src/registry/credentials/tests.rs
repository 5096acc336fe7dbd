#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn basic(user: &str, password: &str) -> Found {
    Found::Credential(Credential::Basic {
        user: user.into(),
        password: password.into(),
    })
}

fn find(config: &str, registry: &str) -> Result<Found, CredentialError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), config).unwrap();
    look_up(file.path(), registry)
}

#[test]
fn entries_are_found_by_every_way_to_write_a_registry() {
    let config = r#"{"auths": {
        "https://index.docker.io/v1/": {"auth": "aHViOnNlY3JldDp4"},
        "localhost:5000": {"username": "u", "password": "p"},
        "https://h.example/v2": {"identitytoken": "id"},
        "t.example": {"registrytoken": "reg"},
        "n.example/only/here": {"username": "u", "password": "p"},
        "empty.example": {}
    }, "HttpHeaders": {"x": "y"}}"#;
    assert_eq!(find(config, "docker.io").unwrap(), basic("hub", "secret:x"));
    assert_eq!(find(config, "localhost:5000").unwrap(), basic("u", "p"));
    assert_eq!(find(config, "localhost").unwrap(), Found::Nothing);
    let id = Found::Credential(Credential::IdentityToken("id".into()));
    assert_eq!(find(config, "h.example").unwrap(), id);
    let reg = Found::Credential(Credential::RegistryToken("reg".into()));
    assert_eq!(find(config, "t.example").unwrap(), reg);
    for none in ["n.example", "empty.example", "unknown.example", "example"] {
        assert_eq!(find(config, none).unwrap(), Found::Nothing, "{none}");
    }
    for nothing in ["", " \n", "{}"] {
        assert_eq!(find(nothing, "docker.io").unwrap(), Found::Nothing);
    }
}

#[test]
fn helpers_come_in_their_order() {
    let config = r#"{"auths": {"a.example": {}, "b.example": {"auth": "dTpw"}, "c.example": {"auth": "dTpw"}},
        "credHelpers": {"c.example": "special"}, "credsStore": "general"}"#;
    let helper = |name: &str| Found::Helper(name.into());
    assert_eq!(find(config, "a.example").unwrap(), helper("general"));
    assert_eq!(find(config, "b.example").unwrap(), basic("u", "p"));
    assert_eq!(find(config, "c.example").unwrap(), helper("special"));
    assert_eq!(find(config, "docker.io").unwrap(), helper("general"));
}

#[test]
fn bad_files_are_named_and_no_secret_is_shown() {
    for (config, cause) in [
        (r#"{"auths": {"a": {"auth": "%secret%"}}}"#, "base64"),
        (r#"{"auths": {"a": {"auth": "c2VjcmV0"}}}"#, "user:password"),
        ("{\n\"auths\": \"secret\"}", "line 2"),
        ("secret", "line 1"),
    ] {
        let text = find(config, "a").unwrap_err().to_string();
        assert!(text.contains(cause), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }
    let secret = Credential::IdentityToken("secret".into());
    assert_eq!(format!("{secret:?}"), "IdentityToken");
}

/// A program can't be run while a file descriptor writes it, and a child being made
/// by another test could hold one.
static SPAWNING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn sources(script: &str) -> (tempfile::TempDir, CredentialSources) {
    let folder = tempfile::tempdir().unwrap();
    let helper = folder.path().join("docker-credential-test");
    fs::write(&helper, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.path().join("config.json");
    fs::write(&config, r#"{"credsStore": "test"}"#).unwrap();
    let sources = CredentialSources {
        files: vec![folder.path().join("absent.json"), config],
        helper_folder: Some(folder.path().into()),
    };
    (folder, sources)
}

#[tokio::test]
async fn a_helper_is_asked_with_the_registrys_name() {
    let _alone = SPAWNING.lock().await;
    let (_folder, basic) = sources(
        r#"read -r server; echo "{\"ServerURL\":\"$server\",\"Username\":\"$1\",\"Secret\":\"$server\"}""#,
    );
    let answer = |server: &str| {
        Some(Credential::Basic {
            user: "get".into(),
            password: server.into(),
        })
    };
    assert_eq!(basic.find("h.example").await.unwrap(), answer("h.example"));
    assert_eq!(
        basic.find("docker.io").await.unwrap(),
        answer(DOCKER_HUB_KEY)
    );

    let (_folder, token) = sources(r#"echo '{"Username":"<token>","Secret":"s"}'"#);
    let expected = Some(Credential::IdentityToken("s".into()));
    assert_eq!(token.find("h.example").await.unwrap(), expected);

    let (_folder, unknown) = sources("echo 'credentials not found in native keychain'; exit 1");
    assert_eq!(unknown.find("h.example").await.unwrap(), None);
}

#[tokio::test]
async fn a_helper_that_fails_is_named() {
    let _alone = SPAWNING.lock().await;
    for (script, cause) in [
        ("echo locked; exit 1", "failed: locked"),
        ("echo garbage", "agreed form"),
        ("head -c 100000 /dev/zero", "more than 65536 bytes"),
    ] {
        let (_folder, sources) = sources(script);
        let text = sources.find("h.example").await.unwrap_err().to_string();
        assert!(
            text.contains(cause) && text.contains("docker-credential-test"),
            "{text}"
        );
    }
    let (folder, sources) = sources("");
    fs::remove_file(folder.path().join("docker-credential-test")).unwrap();
    let text = sources.find("h.example").await.unwrap_err().to_string();
    assert!(text.contains("could not be run"), "{text}");
    for name in ["../evil", "a b", ""] {
        let text = sources
            .ask_helper(name, "h", HELPER_TIMEOUT)
            .await
            .unwrap_err()
            .to_string();
        assert!(text.contains("no name of a program"), "{text}");
    }
}

#[tokio::test]
async fn a_helper_that_hangs_is_ended() {
    let _alone = SPAWNING.lock().await;
    let (folder, sources) = sources(r#"echo $$ > "${0%/*}/pid"; exec sleep 1000"#);
    let limit = Duration::from_millis(300);
    let error = sources.ask_helper("test", "h.example", limit).await;
    let text = error.unwrap_err().to_string();
    assert!(text.contains("did not answer within 300ms"), "{text}");
    let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
    for _ in 0..100 {
        let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        if state.is_err() || state.is_ok_and(|s| s.contains(") Z ")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the helper still runs");
}
