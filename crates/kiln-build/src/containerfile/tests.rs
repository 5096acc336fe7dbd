#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::collections::BTreeMap;

use super::expand::{ExpandError, Lexer, NoVariables};
use super::*;

fn stage(text: &str) -> Vec<Kind> {
    let file = parse(format!("FROM scratch\n{text}").as_bytes()).unwrap();
    let stage = file.stages.into_iter().next().unwrap();
    stage.instructions.into_iter().map(|i| i.kind).collect()
}

fn one(text: &str) -> Kind {
    let mut kinds = stage(text);
    assert_eq!(kinds.len(), 1, "{text}");
    kinds.remove(0)
}

fn problem(text: &str) -> String {
    parse(text.as_bytes()).unwrap_err().to_string()
}

fn shell(text: &str) -> CommandLine {
    CommandLine::Shell(text.into())
}

fn run(kind: Kind) -> Run {
    match kind {
        Kind::Run(run) => run,
        other => panic!("{other:?}"),
    }
}

#[test]
fn continued_lines_join_and_comments_between_them_vanish() {
    let file = parse(
        b"\xEF\xBB\xBF# syntax=docker/dockerfile:1\n# a comment\n\nFROM a:1 AS Base\n\
          RUN one \\\n  # inner\n  two \\  \n\\\n  three\nRUN x \\\n\n  y\nRUN end \\",
    )
    .unwrap();
    assert_eq!(file.syntax.as_deref(), Some("docker/dockerfile:1"));
    let stage = &file.stages[0];
    assert_eq!(
        (stage.name.as_deref(), stage.base.as_str()),
        (Some("base"), "a:1")
    );
    let texts: Vec<_> = stage.instructions.iter().map(|i| i.text.as_str()).collect();
    assert_eq!(texts, ["RUN one   two   three", "RUN x   y", "RUN end"]);
    assert_eq!(stage.instructions[0].span, Span { start: 5, end: 9 });
    assert_eq!(file.warnings.len(), 1, "the empty continuation line");
    assert_eq!(file.warnings[0].cause, Cause::EmptyContinuation);
}

#[test]
fn an_escaped_escape_character_does_not_continue_a_line() {
    assert_eq!(stage("RUN a\\\\\nRUN b").len(), 2);
    let file = parse(b"# escape=`\nFROM scratch\nRUN a `\n b\nCOPY c:\\x\\ d\n").unwrap();
    assert_eq!(file.escape, '`');
    assert_eq!(file.stages[0].instructions[0].text, "RUN a  b");
    assert_eq!(file.stages[0].instructions[1].text, "COPY c:\\x\\ d");
}

#[test]
fn directives_count_only_at_the_very_top() {
    assert_eq!(parse(b"\n# escape=`\nFROM a").unwrap().escape, '\\');
    assert_eq!(parse(b"# hi\n# escape=`\nFROM a").unwrap().escape, '\\');
    assert!(problem("# escape=x\nFROM a").contains("line 1"));
    assert!(problem("# escape=\\\n# escape=`\nFROM a").contains("twice"));
    assert!(problem("# syntax=a\n# SYNTAX=b\nFROM a").contains("line 2"));
}

#[test]
fn shell_and_exec_forms_are_told_apart_by_their_json() {
    assert_eq!(run(one("RUN echo  hi")).command, shell("echo  hi"));
    let exec = |words: &[&str]| CommandLine::Exec(words.iter().map(|w| (*w).into()).collect());
    assert_eq!(
        run(one("RUN [ \"a\",\"b c\" ]")).command,
        exec(&["a", "b c"])
    );
    for not_json in [
        "RUN ['a']",
        "RUN [\"a\"",
        "RUN [\"a\"] b",
        "RUN [ -f x ] && y",
    ] {
        assert!(
            matches!(run(one(not_json)).command, CommandLine::Shell(_)),
            "{not_json}"
        );
    }
    assert!(problem("FROM a\nRUN [\"a\", 1]").contains("line 2: RUN in JSON form"));
    assert_eq!(one("CMD"), Kind::Cmd(shell("")));
    assert_eq!(one("ENTRYPOINT []"), Kind::Entrypoint(exec(&[])));
}

#[test]
fn heredocs_carry_their_bodies_names_and_quoting() {
    let heredoc = |text: &str| run(one(text)).heredocs;
    let doc = &heredoc("RUN <<EOF\n\tfoo # not a comment\n\nEOF")[0];
    assert_eq!(
        (doc.name.as_str(), doc.expand, doc.chomp),
        ("EOF", true, false)
    );
    assert_eq!(doc.content, "\tfoo # not a comment\n\n");
    let doc = &heredoc("RUN 3<<-'E F' cat\n\ta\n\tE F")[0];
    assert_eq!(
        (doc.name.as_str(), doc.expand, doc.chomp),
        ("E F", false, true)
    );
    assert_eq!((doc.file_descriptor, doc.content.as_str()), (3, "\ta\n"));
    assert_eq!(heredoc("RUN <<eo'f'\neof")[0].name, "eof");
    let escaped = &heredoc("RUN <<eo\\'f\neo'f")[0];
    assert_eq!((escaped.name.as_str(), escaped.expand), ("eo'f", true));
    assert!(!heredoc("RUN <<'e'o\\'f\neo'f")[0].expand);
    assert_eq!(heredoc("RUN <<$EOF\n$EOF")[0].name, "$EOF");
    assert_eq!(heredoc("RUN <<  EOF  > foo\nEOF")[0].name, "EOF");
    assert_eq!(heredoc("RUN <<A <<B\nB\nA\nA\nB")[1].content, "A\n");
    for none in [
        "RUN \"<<NO\"",
        "RUN [\"<<NO\"]",
        "RUN a <<<b",
        "RUN it's <<E",
        "USER <<E",
    ] {
        assert_eq!(stage(none).len(), 1, "{none}");
    }
    assert!(problem("FROM a\nRUN <<EOF\nx\n").contains("line 2: the heredoc `<<EOF`"));
}

#[test]
fn copies_take_heredocs_as_files() {
    let Kind::Copy(copy) = one("COPY --chown=1 <<-A <<'B' c /d/\n\tone\n\tA\n$x\nB") else {
        panic!()
    };
    let inline = |name: &str, content: &str, expand| Source::Inline {
        name: name.into(),
        content: content.into(),
        expand,
    };
    assert_eq!(
        copy.sources,
        [
            inline("A", "one\n", true),
            inline("B", "$x\n", false),
            Source::Path("c".into())
        ]
    );
    assert_eq!(copy.destination, "/d/");
    assert!(problem("FROM a\nCOPY a <<E\nE").contains("can't take a heredoc"));
    let Kind::Onbuild(text, inner) = one("ONBUILD COPY <<A /x\nbody\nA") else {
        panic!()
    };
    assert_eq!(text, "COPY <<A /x\nbody\nA");
    assert!(matches!(inner.kind, Kind::Copy(_)));
}

#[test]
fn flags_are_known_unique_and_may_be_quoted() {
    let Kind::Copy(copy) = one(
        "COPY --from=x --link --parents=false --exclude=a --exclude=\"b c\" --chmod=u+x -- a --b",
    ) else {
        panic!()
    };
    assert_eq!(copy.from.as_deref(), Some("x"));
    assert!(copy.link && !copy.parents);
    assert_eq!(copy.exclude, ["a", "b c"]);
    assert_eq!(copy.destination, "--b");
    let cases = [
        ("COPY --form=x a b", "did you mean `from`"),
        ("COPY --from=x --from=y a b", "twice"),
        ("COPY --from a b", "needs a value"),
        ("COPY --link=maybe a b", "true or false"),
        ("CMD --x a", "CMD has no flag"),
        ("RUN --network=bridge a", "default, none or host"),
        ("RUN --security=root a", "sandbox or insecure"),
        ("RUN --mount=type=bnd,target=/x a", ""),
        ("RUN --mount=typ=bind,target=/x a", "did you mean `type`"),
        ("RUN --mount=from=$x,target=/y a", "can't hold a variable"),
        ("COPY a", "at least one source"),
    ];
    for (text, expected) in cases {
        let result = parse(format!("FROM a\n{text}").as_bytes());
        match expected {
            "" => assert!(result.is_ok(), "{text}: checked when variables are known"),
            _ => {
                let error = result.unwrap_err().to_string();
                assert!(
                    error.starts_with("line 2: ") && error.contains(expected),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn pairs_have_an_old_and_a_new_form() {
    let pairs = |text: &str| match one(text) {
        Kind::Env(pairs) | Kind::Label(pairs) => pairs
            .into_iter()
            .map(|p| (p.key, p.value))
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    assert_eq!(pairs("ENV a  b=c  d"), [pair("a", "b=c  d")]);
    assert_eq!(
        pairs("ENV a=b 'c'=\"d e\" f=g\\ h i="),
        [
            pair("a", "b"),
            pair("'c'", "\"d e\""),
            pair("f", "g\\ h"),
            pair("i", "")
        ]
    );
    assert_eq!(pairs("LABEL x=\"a\\\" b\""), [pair("x", "\"a\\\" b\"")]);
    assert!(problem("FROM a\nENV a").contains("needs a name and a value"));
    assert!(problem("FROM a\nENV a=b c").contains("`c` has no `=`"));
    assert!(problem("FROM a\nENV =b").contains("empty name"));
    assert_eq!(
        one("ARG a b=\"c d\" e="),
        Kind::Arg(vec![
            Arg {
                name: "a".into(),
                default: None
            },
            Arg {
                name: "b".into(),
                default: Some("\"c d\"".into())
            },
            Arg {
                name: "e".into(),
                default: Some(String::new())
            },
        ])
    );
}

#[test]
fn health_checks_are_typed() {
    for none in ["HEALTHCHECK none", "HEALTHCHECK --interval=5s NONE"] {
        assert_eq!(one(none), Kind::Healthcheck(Health::None));
    }
    let Kind::Healthcheck(Health::Check {
        test,
        interval,
        retries,
        ..
    }) = one("HEALTHCHECK --interval=1m30s --retries=5 cmd curl  -f x")
    else {
        panic!()
    };
    assert_eq!(test, HealthCommand::Shell("curl  -f x".into()));
    assert_eq!((interval.unwrap().0, retries), (90_000, Some(5)));
    for (text, expected) in [
        ("HEALTHCHECK", "needs CMD"),
        ("HEALTHCHECK CMD", "needs a command"),
        ("HEALTHCHECK NONE x", "takes no arguments"),
        ("HEALTHCHECK --interval=5 CMD x", "needs a unit"),
        ("HEALTHCHECK --retries=-1 CMD x", "whole number"),
    ] {
        assert!(
            problem(&format!("FROM a\n{text}")).contains(expected),
            "{text}"
        );
    }
}

#[test]
fn every_problem_is_told_with_its_line() {
    let errors = parse(b"RUN early\nFROM a b\nFRMO x\nFROM a AS 1x\n\nSHELL sh -c\n")
        .unwrap_err()
        .0;
    let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(told[0].starts_with("line 1: `RUN` stands before"));
    assert!(told[1].starts_with("line 2: FROM takes"));
    assert_eq!(
        told[2],
        "line 3: unknown instruction `FRMO`; did you mean `FROM`?"
    );
    assert!(told[3].starts_with("line 4: FROM: `1x` can't name a stage"));
    assert!(told[4].starts_with("line 6: "));
    assert!(problem("").contains("no instructions"));
    assert!(problem("# only\n\n").contains("no instructions"));
    assert!(problem("ARG a\n").contains("there is no FROM"));
    assert!(problem(&format!("FROM a\nRUN {}", "x".repeat(MAX_LINE))).contains("line 2: the line"));
    for chained in ["ONBUILD ONBUILD RUN a", "ONBUILD FROM a", "ONBUILD"] {
        assert!(
            parse(format!("FROM a\n{chained}").as_bytes()).is_err(),
            "{chained}"
        );
    }
}

fn variables() -> BTreeMap<String, String> {
    [
        ("PWD", "/home"),
        ("SHELL", "bash"),
        ("NULL", ""),
        ("V", "a.tar.gz"),
        ("W", "x y"),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .collect()
}

#[test]
fn words_are_expanded_as_the_reference_says() {
    let lexer = Lexer::new('\\');
    let cases = [
        ("hello", "hello"),
        ("he'll'o", "hello"),
        (r"he\'llo", "he'llo"),
        (r"abc\tdef", "abctdef"),
        (r#""abc\tdef""#, r"abc\tdef"),
        (r#""abc\\tdef""#, r"abc\tdef"),
        (r"'abc\\tdef'", r"abc\\tdef"),
        (r"hello\", "hello"),
        (r"'hello\'", r"hello\"),
        ("$.", "$."),
        ("he$1x", "hex"),
        ("he$PWD", "he/home"),
        (r"he\$PWD", "he$PWD"),
        (r"he\\$PWD", r"he\/home"),
        (r#""he\$PWD""#, "he$PWD"),
        ("'$PWD'", "$PWD"),
        (r"\${}", "${}"),
        ("he${hi}xx", "hexx"),
        ("he${XXX:-000}xx", "he000xx"),
        ("he${XXX:-${YYY:-yyy}}xx", "heyyyxx"),
        ("he${PWD:+${PWD}:}xx", "he/home:xx"),
        ("${NULL-x}${NULL:-y}", "y"),
        ("${NULL+x}${NULL:+y}", "x"),
        ("he${NULL?}", "he"),
        (r"he${XXX:-\${PWD}z}xx", "he${PWDz}xx"),
        ("${aaa}}", "}"),
        ("${999:-bbb}aaa", "bbbaaa"),
        ("$001aaa", "aaa"),
        ("$@@@", "@@"),
        ("${#:-b}", "b"),
        ("$$", ""),
        ("안녕$PWD", "안녕/home"),
        ("${V#*.}", "tar.gz"),
        ("${V##*.}", "gz"),
        ("${V%.*}", "a.tar"),
        ("${V%%.*}", "a"),
        ("${V#?.}", "tar.gz"),
        (r"${V#\*}", "a.tar.gz"),
        ("${V/./-}", "a-tar.gz"),
        ("${V//./-}", "a-tar-gz"),
        ("${V/t*r/Z}", "a.Z.gz"),
        (r"${PWD/\//_}", "_home"),
        ("${XXX#a}", ""),
    ];
    for (text, expected) in cases {
        assert_eq!(lexer.word(text, &variables()).unwrap(), expected, "{text}");
    }
    let bad = [
        "he'llo",
        r"he\\'llo",
        "\"hello",
        r#""hello\""#,
        "${}",
        "he${}xx",
        "he${.}",
        "he${XXX:YYY}",
        "he${XXX?}",
        "he${NULL:?}",
        "he${PWD",
        "he${PWD:=0}",
        "${{a}",
        "${a:-b",
        "${:}",
        "${:-b}",
        "${V:#a}",
        r"${V#\a}",
        "${V/a}",
    ];
    for text in bad {
        assert!(lexer.word(text, &variables()).is_err(), "{text}");
    }
    let deep = format!("{}{}", "${a:-".repeat(100), "}".repeat(100));
    assert_eq!(lexer.word(&deep, &NoVariables), Err(ExpandError::TooDeep));
}

#[test]
fn words_split_after_expansion_but_not_within_quotes() {
    let lexer = Lexer::new('\\');
    let words = |text: &str| lexer.words(text, &variables()).unwrap();
    assert_eq!(words("a$W\"$W\"b  c\\ d"), ["ax", "yx yb", "c d"]);
    assert_eq!(words("  \" x \" "), [" x "]);
    let kept = Lexer {
        keep_unset: true,
        ..lexer
    };
    assert_eq!(
        kept.word("$a ${b:-c} $PWD", &variables()).unwrap(),
        "$a ${b:-c} /home"
    );
}

#[test]
fn mounts_are_checked_once_their_variables_are_known() {
    let lexer = Lexer::new('\\');
    let parse = |text: &str| mount::parse(text, &lexer, &variables());
    let mount = parse("type=cache,target=$PWD/x,sharing=locked,mode=0700,\"id=a,b\"").unwrap();
    assert_eq!(
        (mount.target.as_str(), mount.mode),
        ("/home/x", Some(0o700))
    );
    assert_eq!(mount.id.as_deref(), Some("a,b"));
    assert!(!mount.read_only && mount.sharing == mount::Sharing::Locked);
    assert!(parse("target=/a").unwrap().read_only);
    assert_eq!(
        parse("type=tmpfs,target=/a,size=64m").unwrap().size,
        Some(64 << 20)
    );
    for bad in [
        "type=nope,target=/a",
        "type=secret",
        "type=secret,id=a,src=b",
        "type=bind",
        "type=bind,target=/a,mode=7",
        "type=bind,target=/a,size=1",
        "type=cache,target=/a,required",
        "type=bind,target=/a,sharing=shared",
        "ro=maybe,target=/a",
        "target=/a,\"x",
        "target",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    assert_eq!(
        mount::from("type=bind,from=base,target=/x").as_deref(),
        Some("base")
    );
}

proptest::proptest! {
    #[test]
    fn a_literal_stands_for_itself(text in "(?s)([$'\"\\\\<>{}`]|.){0,20}", tick in proptest::bool::ANY) {
        let escape = if tick { '`' } else { '\\' };
        let lexer = expand::Lexer::new(escape);
        let word = lexer.word(&expand::literal(&text, escape), &expand::NoVariables);
        proptest::prop_assert_eq!(word, Ok(text));
    }

    #[test]
    fn any_bytes_end_in_a_file_or_in_problems(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
        let mut text = b"FROM a\n".to_vec();
        text.extend(bytes);
        let _ = parse(&text);
    }

    #[test]
    fn any_text_expands_or_is_refused(text in "[a-z${}:#%/+?\\\\'\"<\\-* ]{0,60}") {
        let _ = Lexer::new('\\').words(&text, &variables());
    }
}
