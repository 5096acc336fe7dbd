#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use crate::containerfile::parse;

fn evaluated(text: &str, given: &[(&str, &str)]) -> Result<Evaluated, EvaluateError> {
    let file = parse(format!("FROM scratch\n{text}").as_bytes()).unwrap();
    let pairs = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
        list.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    let start = Start {
        config: ImageConfig {
            cmd: vec!["base".into()],
            ..ImageConfig::default()
        },
        author: None,
        args: BTreeMap::new(),
        given: &pairs(given),
        globals: &pairs(&[("TARGETARCH", "amd64"), ("G", "global")]),
        triggers: &[],
    };
    evaluate(&file, 0, start)
}

fn config(text: &str) -> ImageConfig {
    evaluated(text, &[]).unwrap().config
}

fn run(text: &str, given: &[(&str, &str)]) -> RunAction {
    match evaluated(text, given).unwrap().steps.pop().unwrap().action {
        Action::Run(run) => *run,
        other => panic!("{other:?}"),
    }
}

#[test]
fn variables_come_from_env_args_and_the_request() {
    let text = "ARG A=1\nARG B\nARG G\nARG TARGETARCH\nARG C=$A$B\nENV D=${C}x E=\"$D y\"\nENV D=new\nRUN x";
    let env = run(text, &[("B", "2"), ("TARGETOS", "unasked")]).env;
    let get = |name: &str| env.get(name).map(String::as_str);
    assert_eq!(get("C"), Some("12"));
    assert_eq!(get("D"), Some("new"));
    assert_eq!(
        get("E"),
        Some(" y"),
        "an ENV's own names are not yet known to it"
    );
    assert_eq!(
        (get("G"), get("TARGETARCH")),
        (Some("global"), Some("amd64"))
    );
    assert_eq!(get("TARGETOS"), None, "only what ARG names");
    assert_eq!(get("PATH"), Some(DEFAULT_PATH));
    let kept = evaluated(text, &[]).unwrap().config.env;
    let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["PATH", "D", "E"], "args are no part of the image");
    let proxied = run("RUN x", &[("http_proxy", "p")]);
    assert!(!proxied.env.contains_key("http_proxy") && proxied.proxies["http_proxy"] == "p");
}

#[test]
fn commands_reset_each_other_as_docker_has_it() {
    assert_eq!(config("").cmd, ["base"]);
    assert!(config("ENTRYPOINT [\"e\"]").cmd.is_empty());
    assert_eq!(config("CMD [\"c\"]\nENTRYPOINT e f").cmd, ["c"]);
    assert_eq!(
        config("ENTRYPOINT e f").entrypoint,
        ["/bin/sh", "-c", "e f"]
    );
    let text = "SHELL [\"/bin/bash\",\"-ec\"]\nCMD echo $HOME";
    assert_eq!(config(text).cmd, ["/bin/bash", "-ec", "echo $HOME"]);
}

#[test]
fn folders_build_on_each_other() {
    let text = "WORKDIR /a/../b\nENV X=c\nWORKDIR $X/\nCOPY f g\nCOPY f .\nCOPY f /abs/./x/\nRUN y";
    let all = evaluated(text, &[]).unwrap();
    assert_eq!(all.config.working_dir, "/b/c");
    let to: Vec<String> = all
        .steps
        .iter()
        .filter_map(|s| match &s.action {
            Action::Copy(copy) => Some(copy.destination.clone()),
            Action::Folder { path, .. } => Some(format!("folder {path}")),
            _ => None,
        })
        .collect();
    assert_eq!(
        to,
        ["folder /b", "folder /b/c", "/b/c/g", "/b/c/", "/abs/x/"]
    );
    assert_eq!(run(text, &[]).cwd, "/b/c");
}

#[test]
fn metadata_is_collected() {
    let config = config(
        "EXPOSE 80 53/udp 8000-8002\nEXPOSE 80/tcp\nVOLUME [\"/b\", \"/a\"]\nVOLUME /a\n\
         LABEL a=b c=\"d e\"\nSTOPSIGNAL sigquit\nUSER web:web\nHEALTHCHECK --timeout=2s CMD x y",
    );
    let ports: Vec<u16> = config.exposed.iter().map(|p| p.port).collect();
    assert_eq!(ports, [53, 80, 8000, 8001, 8002]);
    assert_eq!(config.volumes, ["/a", "/b"]);
    assert_eq!(config.labels["c"], "d e");
    assert_eq!(
        (config.user.as_str(), config.stop_signal.as_deref()),
        ("web:web", Some("sigquit"))
    );
    let health = config.healthcheck.unwrap();
    assert_eq!(health.test, Some(HealthTest::Shell("x y".into())));
    assert_eq!(health.timeout.unwrap().0, 2000);
}

#[test]
fn heredocs_become_commands_scripts_or_shell_input() {
    assert_eq!(
        run("RUN <<E\na\nb\nE", &[]).argv,
        ["/bin/sh", "-c", "a\nb\n"]
    );
    assert_eq!(run("RUN <<-'E'\n\ta\nE", &[]).argv[2], "a\n");
    assert_eq!(
        run("RUN <<E cat >/x\na\nE", &[]).argv[2],
        "<<E cat >/x\na\nE"
    );
    assert_eq!(
        run("RUN cat <<A <<B\n1\nA\n2\nB", &[]).argv[2],
        "cat <<A <<B\n1\nA\n2\nB"
    );
    let script = run("RUN <<E\n#!/usr/bin/python3\nx\nE", &[]);
    assert_eq!(
        script.script,
        Some(("E".into(), "#!/usr/bin/python3\nx\n".into()))
    );
    let text = "ARG V=v\nCOPY <<A <<'B' /x/\n\"$V\" \\$V\nA\n$V\nB";
    let Action::Copy(copy) = evaluated(text, &[]).unwrap().steps.pop().unwrap().action else {
        panic!()
    };
    let bodies: Vec<_> = copy
        .sources
        .iter()
        .map(|s| match s {
            Taking::Inline { content, .. } => content.as_str(),
            _ => panic!(),
        })
        .collect();
    assert_eq!(bodies, ["\"v\" $V\n", "$V\n"]);
}

#[test]
fn what_can_not_be_is_refused_by_name_and_line() {
    for (text, expected) in [
        ("ADD ftp://x/y /z", "ADD of `ftp://x/y`"),
        ("ADD --checksum=sha256:0 a b", "goes with exactly one URL"),
        ("ADD --checksum=md5:0 https://x/y b", "of a URL is sha256:"),
        ("ADD --checksum=x https://x/y.git b", "of a git repository"),
        (
            "RUN --security=insecure true",
            "would give the command the rights of root",
        ),
        ("RUN --mount=type=bind,target=/ true", "can't be `/`"),
        ("EXPOSE 99999", "`99999` is not a port"),
        ("STOPSIGNAL SIGNOPE", "no signal"),
        ("COPY --chmod=9 a b", "--chmod: `9`"),
        ("ENV A=\"${X?missing it}\"", "X: missing it"),
        ("VOLUME $nobody", "a path of VOLUME is empty"),
    ] {
        let told = evaluated(text, &[]).unwrap_err().to_string();
        assert!(
            told.starts_with("line 2: ") && told.contains(expected),
            "{told}"
        );
    }
}
