#![allow(clippy::unwrap_used)]

use super::*;
use crate::containerfile::parse;

fn with(text: &str, args: &[(&str, &str)]) -> Vec<Finding> {
    let args = args.iter().map(|(k, v)| ((*k).into(), (*v).into()));
    let file = parse(text.as_bytes()).unwrap();
    let around = Around {
        args: &args.collect(),
        contexts: &["extra"],
        ignored: &Patterns::parse_file("*.log\nsecret\n").unwrap(),
        pinned: &|name| name.contains("pinned"),
    };
    let directive = Directive::parse(file.check.as_deref()).unwrap();
    lint(text, &file, &around, &directive)
}

/// `Rule line`, those that are notes with a `?`.
fn found(text: &str) -> Vec<String> {
    let shown = |f: &Finding| {
        let mark = if f.uncertain { "?" } else { "" };
        format!("{} {}{mark}", f.rule, f.span.start)
    };
    with(text, &[]).iter().map(shown).collect()
}

/// What strikes, and what is like it and doesn't.
#[test]
fn every_rule_strikes_where_buildkits_does_and_nowhere_else() {
    let cases: [(&str, &[&str]); 64] = [
        ("FROM scratch AS Base", &["StageNameCasing 1"]),
        ("FROM scratch AS base", &[]),
        ("FROM scratch as base", &["FromAsCasing 1"]),
        ("from scratch as base", &[]),
        ("from scratch AS base", &["FromAsCasing 1"]),
        (
            "FROM scratch\nLABEL a=b \\\n\n c=d",
            &["NoEmptyContinuation 2"],
        ),
        ("FROM scratch\nLABEL a=b \\\n# no\n c=d", &[]),
        (
            "FROM scratch\nlabel a=b\nLABEL c=d",
            &["ConsistentInstructionCasing 2"],
        ),
        (
            "from scratch\nlabel a=b\nLABEL c=d",
            &["ConsistentInstructionCasing 3"],
        ),
        (
            "FROM scratch\nLabel a=b\nLABEL c=d",
            &["ConsistentInstructionCasing 2"],
        ),
        (
            "FROM scratch AS a\nFROM scratch AS A",
            &["DuplicateStageName 2", "StageNameCasing 2"],
        ),
        ("FROM scratch AS a\nFROM scratch AS b", &[]),
        ("FROM scratch AS context", &["ReservedStageName 1"]),
        ("FROM scratch AS scratch", &["ReservedStageName 1"]),
        ("FROM scratch\nCMD a b", &["JSONArgsRecommended 2"]),
        ("FROM scratch\nENTRYPOINT a b", &["JSONArgsRecommended 2"]),
        ("FROM scratch\nCMD [\"a\", \"b\"]", &[]),
        ("FROM scratch\nSHELL [\"/x\"]\nCMD a b", &[]),
        ("FROM scratch\nMAINTAINER me", &["MaintainerDeprecated 2"]),
        (
            "ARG V=1\nFROM pinned:$W",
            &["InvalidDefaultArgInFrom 2", "UndefinedArgInFrom 2"],
        ),
        ("ARG V=1\nFROM pinned:$V", &[]),
        ("ARG V\nFROM pinned:${V:-2}", &[]),
        ("FROM scratch\nWORKDIR x", &["WorkdirRelativePath 2"]),
        ("FROM scratch\nWORKDIR /x\nWORKDIR y", &[]),
        ("FROM scratch AS a\nWORKDIR /x\nFROM a\nWORKDIR y", &[]),
        ("FROM scratch\nARG W=/x\nWORKDIR $W", &[]),
        ("FROM scratch\nCOPY $foo .", &["UndefinedVar 2"]),
        ("FROM scratch\nARG foo\nCOPY $foo .", &[]),
        ("FROM scratch\nCOPY ${foo:-x} .", &[]),
        ("FROM scratch\nENV a=1 b=$a", &["UndefinedVar 2"]),
        ("FROM scratch\nENV a=1\nENV b=$a PATH=/x:$PATH", &[]),
        ("FROM scratch AS s\nENV a=1\nFROM s\nENV b=$a", &[]),
        ("FROM pinned\nCOPY $foo .", &["UndefinedVar 2?"]),
        ("FROM scratch\nRUN echo $foo", &[]),
        ("FROM scratch\nCOPY <<E /x\n'$foo\nE", &["UndefinedVar 2"]),
        ("FROM scratch\nCOPY <<'E' /x\n$foo\nE", &[]),
        ("ARG G=1\nFROM scratch\nENV a=$G", &["UndefinedVar 3"]),
        ("ARG G=1\nFROM scratch\nARG G\nENV a=$G", &[]),
        (
            "FROM scratch\nCMD [\"a\"]\nCMD [\"b\"]\nFROM scratch\nCMD [\"c\"]",
            &["MultipleInstructionsDisallowed 2"],
        ),
        (
            "FROM scratch\nHEALTHCHECK NONE\nHEALTHCHECK NONE",
            &["MultipleInstructionsDisallowed 2"],
        ),
        ("FROM scratch\nENV a b c", &["LegacyKeyValueFormat 2"]),
        ("FROM scratch\nLABEL a b", &["LegacyKeyValueFormat 2"]),
        ("FROM scratch\nENV a=b \"c d\"=e", &[]),
        ("FROM scratch\nENV \"c d\"=e", &[]),
        (
            "FROM --platform=$TARGETPLATFORM scratch",
            &["RedundantTargetPlatform 1"],
        ),
        ("FROM --platform=$BUILDPLATFORM scratch", &[]),
        (
            "FROM --platform=linux/amd64 scratch",
            &["FromPlatformFlagConstDisallowed 1"],
        ),
        ("FROM --platform=linux/amd64 scratch AS one-amd64", &[]),
        ("FROM scratch\nARG API_TOKEN", &["SecretsUsedInArgOrEnv 2"]),
        (
            "FROM scratch\nENV Password=x PUBLIC_KEY=y KEYS=z",
            &["SecretsUsedInArgOrEnv 2"],
        ),
        ("ARG V\nFROM pinned:$V", &["InvalidDefaultArgInFrom 2"]),
        ("ARG V=1\nFROM $V", &["UnpinnedBase 2"]),
        ("FROM scratch\nCOPY a.log /", &["CopyIgnoredFile 2"]),
        ("FROM scratch\nADD ./secret/x /", &["CopyIgnoredFile 2"]),
        (
            "FROM scratch\nCOPY --from=extra a.log /\nCOPY a b *.log /",
            &[],
        ),
        ("FROM scratch\n# the port\nARG P=1", &[]),
        (
            "# check=experimental=InvalidDefinitionDescription\nFROM scratch\n# the port\nARG P=1\n# Q is\nARG Q\n# no\n\nARG R",
            &["InvalidDefinitionDescription 4"],
        ),
        ("FROM scratch\nEXPOSE 80/TCP", &["ExposeProtoCasing 2"]),
        ("FROM scratch\nEXPOSE 80/tcp 8000-8010", &[]),
        (
            "FROM scratch\nEXPOSE 127.0.0.1:80:80",
            &["ExposeInvalidFormat 2"],
        ),
        (
            "FROM pinned\nFROM x@sha256:0\nFROM debian:12",
            &["UnpinnedBase 3"],
        ),
        (
            "FROM scratch\nADD https://h/x /\nADD https://pinned/x /\nADD --checksum=sha256:0 https://h/x /",
            &["UncheckedAdd 2"],
        ),
        (
            "FROM scratch\nRUN set -e; curl -fsSL https://h/x | sudo bash -s && true",
            &["PipeToShell 2"],
        ),
        (
            "FROM scratch\nRUN wget -q https://h/x -O- | tar x\nRUN wget -q ftp://h/x\n\
             RUN curl --noproxy '*' https://h/x -o x",
            &["UnrecordedDownload 3?", "UnrecordedDownload 4?"],
        ),
    ];
    let mut wrong = Vec::new();
    for (text, expected) in cases {
        let found = found(text);
        if found != expected {
            wrong.push(format!("{text}\n  {found:?}\n  {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn given_arguments_count_but_not_for_defaults() {
    let rules = |args: &[(&str, &str)]| -> Vec<Rule> {
        let text = "ARG BASE\nFROM $BASE\nARG X\nLABEL a=$X b=$Y";
        let found = with(text, args);
        found.iter().map(|finding| finding.rule).collect()
    };
    let empty = Rule::InvalidDefaultArgInFrom;
    // A base without a name can't be pinned, and Y is no ARG, whatever is given for it.
    assert_eq!(rules(&[]), [empty, Rule::UndefinedVar]);
    let given = [("BASE", "a:1"), ("X", "2"), ("Y", "3")];
    let expected = [empty, Rule::UnpinnedBase, Rule::UndefinedVar];
    assert_eq!(rules(&given), expected);
}

#[test]
fn a_file_says_what_it_does_not_want_to_hear() {
    let text = "FROM scratch AS B\nMAINTAINER me";
    let skipped = |check: &str| found(&format!("# check={check}\n{text}"));
    assert_eq!(skipped("skip=stagenamecasing"), ["MaintainerDeprecated 3"]);
    assert_eq!(skipped("error=true;skip=all"), [""; 0]);
    assert_eq!(skipped("error=true").len(), 2);
    let parse = |text| Directive::parse(Some(text));
    assert!(parse("error=true").unwrap().error && !parse("skip=all").unwrap().error);
    for (text, cause) in [
        ("skip=Nope", "# check=skip=Nope: there is no rule `Nope`"),
        ("error=yes", "error takes true or false, not `yes`"),
        ("all", "`all` has no `=`"),
        ("x=y", "`x` is not skip, error or experimental"),
    ] {
        let told = parse(text).unwrap_err().to_string();
        assert!(told.ends_with(cause), "{told}");
    }
}

#[test]
fn messages_name_what_is_meant() {
    let text = "FROM scratch\nENV VERSION=1\nLABEL a=$VERSON";
    assert_eq!(
        with(text, &[])[0].message,
        "`$VERSON` is not set (did you mean `VERSION`?)"
    );
    assert_eq!(Rule::JSONArgsRecommended.to_string(), "JSONArgsRecommended");
}
