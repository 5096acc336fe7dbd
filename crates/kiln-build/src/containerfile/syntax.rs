//! What a file says, whatever comes of it: instructions with their flags, arguments and
//! heredocs. This is what BuildKit's parser accepts; what no build can be made of (no FROM,
//! instructions and flags that nobody knows) is accepted here and refused by [`parse`].
//!
//! [`parse`]: super::parse

use super::heredoc::Heredoc;
use super::instruction::{Pair, keyword};
use super::lines::{self, Line};
use super::{Cause, ParseErrors, Problem, Span, words};

/// A file's text in its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Syntax {
    /// `# syntax=`, as written.
    pub syntax: Option<String>,
    /// `# check=`, as written.
    pub check: Option<String>,
    /// `# escape=`: a backslash or a backtick.
    pub escape: char,
    pub statements: Vec<Statement>,
    /// What is accepted but likely meant otherwise.
    pub warnings: Vec<Problem>,
}

/// One instruction's text in its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    pub span: Span,
    /// As written, continuation lines joined; heredoc bodies left out.
    pub text: String,
    pub keyword: String,
    /// With their dashes, quotes taken away.
    pub flags: Vec<String>,
    /// What stands behind the flags.
    pub arguments: String,
    pub form: Form,
    pub heredocs: Vec<Heredoc>,
}

/// What the arguments are, where the keyword says how they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    Text,
    /// A JSON array; in HEALTHCHECK, behind its first word.
    Json(Vec<String>),
    /// ENV and LABEL.
    Pairs(Vec<Pair>),
    /// What ONBUILD has others do.
    Trigger(Box<Statement>),
}

/// Reads a whole file; all that is wrong with it is told at once.
pub fn syntax(content: &[u8]) -> Result<Syntax, ParseErrors> {
    match read(content) {
        (syntax, problems) if problems.is_empty() => Ok(syntax),
        (_, problems) => Err(ParseErrors::sorted(problems)),
    }
}

/// What could be read, and what could not.
pub(super) fn read(content: &[u8]) -> (Syntax, Vec<Problem>) {
    let (read, mut problems) = lines::read(content);
    let mut statements = Vec::new();
    for line in read.lines {
        let span = line.span;
        match statement(line, read.escape) {
            Ok(statement) => statements.push(statement),
            Err(cause) => problems.push(Problem { span, cause }),
        }
    }
    let syntax = Syntax {
        syntax: read.syntax,
        check: read.check,
        escape: read.escape,
        statements,
        warnings: read.warnings,
    };
    (syntax, problems)
}

fn statement(line: Line, escape: char) -> Result<Statement, Cause> {
    let text = line.text.trim().to_owned();
    let mut whole = part(&text, &line, escape)?;
    if whole.keyword.eq_ignore_ascii_case("onbuild") && !whole.arguments.is_empty() {
        let trigger = part(&whole.arguments, &line, escape)?;
        whole.form = Form::Trigger(Box::new(trigger));
    }
    Ok(Statement {
        heredocs: line.heredocs,
        ..whole
    })
}

/// A statement, or what it triggers, without what that would trigger.
fn part(text: &str, line: &Line, escape: char) -> Result<Statement, Cause> {
    let split = words::split(text, escape);
    Ok(Statement {
        span: line.span,
        text: text.to_owned(),
        keyword: split.keyword.to_owned(),
        form: form(split.keyword, split.rest, escape)?,
        arguments: split.rest.to_owned(),
        flags: split.flags,
        heredocs: line.heredocs.clone(),
    })
}

fn form(written: &str, arguments: &str, escape: char) -> Result<Form, Cause> {
    let Some(name) = keyword(written) else {
        return Ok(Form::Text);
    };
    let json = match name {
        "ENV" | "LABEL" => return pairs(name, arguments, escape).map(Form::Pairs),
        "ADD" | "CMD" | "COPY" | "ENTRYPOINT" | "RUN" | "SHELL" | "VOLUME" => arguments,
        "HEALTHCHECK" => behind_first(arguments),
        _ => return Ok(Form::Text),
    };
    Ok(words::json(json, name)?.map_or(Form::Text, Form::Json))
}

/// What stands behind the first word.
pub(super) fn behind_first(text: &str) -> &str {
    let rest = text.split_once(char::is_whitespace);
    rest.map_or("", |(_, rest)| rest.trim_start())
}

fn pairs(instruction: &'static str, text: &str, escape: char) -> Result<Vec<Pair>, Cause> {
    let words = words::quoted(text, escape);
    let pair = |key: &str, value: &str| Pair {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    if words.first().is_some_and(|first| !first.contains('=')) {
        // The old form: one name, and the rest of the line is its value.
        let Some((key, value)) = text.split_once(char::is_whitespace) else {
            return Err(Cause::Arguments {
                instruction,
                rule: "needs a name and a value: NAME=value",
            });
        };
        return Ok(vec![pair(key, value.trim_start())]);
    }
    let pair = |word: &String| match word.split_once('=') {
        Some((key, value)) => Ok(pair(key, value)),
        None => Err(Cause::Value {
            instruction,
            text: word.clone(),
            rule: "has no `=`: write NAME=value",
        }),
    };
    words.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// One line for each statement: `keyword[flags](arguments)`, as they are understood.
    fn shown(text: &str) -> String {
        fn one(s: &Statement) -> String {
            let flags = match s.flags.is_empty() {
                true => String::new(),
                false => format!("{:?}", s.flags),
            };
            let arguments = match &s.form {
                Form::Text => s.arguments.clone(),
                Form::Json(words) => format!("{words:?}"),
                Form::Pairs(pairs) => {
                    let pairs = pairs.iter().map(|p| format!("{}={}", p.key, p.value));
                    pairs.collect::<Vec<_>>().join("; ")
                }
                Form::Trigger(trigger) => one(trigger),
            };
            let docs: Vec<&str> = s.heredocs.iter().map(|d| d.content.as_str()).collect();
            let docs = docs.concat().replace('\n', "/");
            format!("{}{flags}({arguments}){docs}", s.keyword)
        }
        let read = syntax(text.as_bytes()).map_err(|e| format!("{text}: {e}"));
        let statements = read.unwrap().statements;
        statements.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    /// The shapes of the files that BuildKit's parser is tested with, in words of our own.
    #[test]
    fn what_is_no_build_is_understood_all_the_same() {
        for (text, meant) in [
            // No FROM.
            ("COPY [\"a\", \"b c\"]\n", "COPY([\"a\", \"b c\"])"),
            ("ADD x /y", "ADD(x /y)"),
            ("CMD [\"echo\", \"\\u0041\"]", "CMD([\"echo\", \"A\"])"),
            ("CMD [ ]\nCMD []", "CMD([])\nCMD([])"),
            (
                "VOLUME /a /b\nvolume [\"/c\"]",
                "VOLUME(/a /b)\nvolume([\"/c\"])",
            ),
            // What is no JSON is text.
            ("CMD \"[\\\"a\\\"]\"", "CMD(\"[\\\"a\\\"]\")"),
            ("CMD ['a', 'b']", "CMD(['a', 'b'])"),
            ("CMD [\"a\", \"b\"", "CMD([\"a\", \"b\")"),
            ("CMD [\"a\", \"b]", "CMD([\"a\", \"b])"),
            ("ENTRYPOINT [ \"a\" ] b", "ENTRYPOINT([ \"a\" ] b)"),
            // Names and flags that nobody has.
            ("INSERT a b", "INSERT(a b)"),
            ("FROM a\nRUNX [1]", "FROM(a)\nRUNX([1])"),
            ("ADD --mine=1 --so a b", "ADD[\"--mine=1\", \"--so\"](a b)"),
            ("RUN --a=\"b c\" -- --d", "RUN[\"--a=b c\"](--d)"),
            ("COPY --a\\ b c d", "COPY[\"--a b\"](c d)"),
            ("CMD --flag", "CMD[\"--flag\"]()"),
            ("CMD a --flag", "CMD(a --flag)"),
            // Pairs in both forms, quoted and continued.
            ("ENV a b c", "ENV(a=b c)"),
            (
                "ENV a=1 b=\"x y\" c='z'\\ w",
                "ENV(a=1; b=\"x y\"; c='z'\\ w)",
            ),
            ("ENV a=1 \\\n  b=2", "ENV(a=1; b=2)"),
            ("LABEL =x", "LABEL(=x)"),
            ("ENV", "ENV()"),
            // Nothing, or anything, behind a keyword.
            ("FROM\nEXPOSE\nRUN", "FROM()\nEXPOSE()\nRUN()"),
            ("FROM a b c d", "FROM(a b c d)"),
            ("HEALTHCHECK NONE", "HEALTHCHECK(NONE)"),
            ("HEALTHCHECK CMD [\"a\"]", "HEALTHCHECK([\"a\"])"),
            (
                "HEALTHCHECK --interval=x --timeout=3s CMD a | b",
                "HEALTHCHECK[\"--interval=x\", \"--timeout=3s\"](CMD a | b)",
            ),
            ("ONBUILD ENV a=1", "ONBUILD(ENV(a=1))"),
            ("ONBUILD ONBUILD ENV a", "ONBUILD(ONBUILD(ENV a))"),
            ("ONBUILD FROM x", "ONBUILD(FROM(x))"),
            ("ONBUILD", "ONBUILD()"),
            // Lines that go on, to the very end.
            ("RUN a \\\n  # no\n\\\n  b", "RUN(a   b)"),
            ("RUN a \\", "RUN(a)"),
            ("RUN a \\\n\n", "RUN(a)"),
            ("# escape=`\nCOPY c:\\ `\n d\n", "COPY(c:\\  d)"),
            ("# x\n# escape=`\nRUN a `", "RUN(a `)"),
            ("\u{feff}# syntax=x\n# escape=`\nRUN a `\nb", "RUN(a b)"),
            ("RUN a\\\\\nRUN b", "RUN(a\\\\)\nRUN(b)"),
            // Heredocs.
            ("RUN <<E cat\nx\nE\n", "RUN(<<E cat)x/"),
            (
                "ONBUILD COPY <<-E /y\n\tx\n\tE",
                "ONBUILD(COPY(<<-E /y)\tx/)\tx/",
            ),
            ("CMD <<E\nE", "CMD(<<E)\nE()"),
            ("RUN [\"<<E\"]", "RUN([\"<<E\"])"),
        ] {
            assert_eq!(shown(text), meant, "{text}");
        }
    }

    #[test]
    fn what_can_not_be_read_is_refused_with_line_and_cause() {
        for (text, told) in [
            ("", "line 0: the file has no instructions"),
            ("# a\n\n# b\n", "line 3: the file has no instructions"),
            (
                "FROM a\n\nENV PATH",
                "line 3: ENV needs a name and a value: NAME=value",
            ),
            (
                "LABEL a=1 b",
                "line 1: LABEL: `b` has no `=`: write NAME=value",
            ),
            (
                "\nCMD [\"a\", [\"b\"]]",
                "line 2: CMD in JSON form takes an array of texts only",
            ),
            (
                "ONBUILD VOLUME [1]",
                "line 1: VOLUME in JSON form takes an array of texts only",
            ),
            (
                "HEALTHCHECK CMD [null]",
                "line 1: HEALTHCHECK in JSON form takes an array of texts only",
            ),
            (
                "RUN a\nRUN <<E\nx",
                "line 2: the heredoc `<<E` is never ended by a line `E`",
            ),
            (
                "# escape=x\nRUN a",
                "line 1: `x` can't be the escape character: only \\ and ` can",
            ),
            (
                "# escape=`\n# escape=`\nRUN a",
                "line 2: the parser directive `escape` is given twice",
            ),
            (
                "ENV A\nADD [1]",
                "line 1: ENV needs a name and a value: NAME=value\n\
                 line 2: ADD in JSON form takes an array of texts only",
            ),
        ] {
            assert_eq!(
                syntax(text.as_bytes()).unwrap_err().to_string(),
                told,
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_build_is_refused_by_the_next_step_with_line_and_cause() {
        for (text, told) in [
            (
                "COPY a b",
                "line 1: `COPY` stands before the first FROM; only ARG may",
            ),
            ("ARG a\n", "line 1: there is no FROM"),
            ("FROM a\nINSERT a", "line 2: unknown instruction `INSERT`"),
            ("FROM a\nADD --so a b", "line 2: ADD has no flag `--so`"),
            ("FROM a\nCMD --so", "line 2: CMD has no flag `--so`"),
            ("FROM a\nENV", "line 2: ENV needs at least one argument"),
            ("FROM a\nLABEL =x", "line 2: LABEL can't take an empty name"),
            (
                "FROM a\nHEALTHCHECK --interval=x CMD a",
                "line 2: HEALTHCHECK: the flag `--interval` `x` ",
            ),
        ] {
            assert!(syntax(text.as_bytes()).is_ok(), "{text}");
            let error = super::super::parse(text.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(told), "{text}: {error}");
        }
    }
}
