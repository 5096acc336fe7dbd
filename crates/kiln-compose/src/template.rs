//! `${…}` in one text: names, defaults, alternatives, required values, nested. Pure.
//!
//! `$$` is a dollar sign; a `$` that no name or brace follows stays as it is.

/// Nested `${a:-${b:-…}}`; nobody writes more than three.
pub const MAX_NESTING: usize = 32;
/// Text that one value may become.
pub const MAX_RESULT_BYTES: usize = 1 << 20;

/// Why a template cannot be filled in. Offsets are bytes of the template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("`{template}` is not a valid template")]
    Invalid { template: String },
    #[error("the variable {name} is required{}", reason(.message))]
    Required { name: String, message: String },
    #[error("variables are nested deeper than {MAX_NESTING}")]
    TooDeep,
    #[error("the text grows beyond {MAX_RESULT_BYTES} bytes")]
    TooLong,
}

fn reason(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(": {message}")
    }
}

/// The variables that were asked for but not set, without a default.
pub type Unset = Vec<String>;

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Fills `template` in; names that are not set become empty and go to `unset`.
pub fn substitute(
    template: &str,
    lookup: Lookup<'_>,
    unset: &mut Unset,
) -> Result<String, TemplateError> {
    let mut out = String::with_capacity(template.len());
    expand(template, lookup, unset, 0, &mut out)?;
    Ok(out)
}

fn expand(
    template: &str,
    lookup: Lookup<'_>,
    unset: &mut Unset,
    depth: usize,
    out: &mut String,
) -> Result<(), TemplateError> {
    if depth > MAX_NESTING {
        return Err(TemplateError::TooDeep);
    }
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        rest = match after.as_bytes().first() {
            Some(b'$') => {
                out.push('$');
                &after[1..]
            }
            Some(b'{') => braced(template, &after[1..], lookup, unset, depth, out)?,
            _ => {
                let name = name_of(after);
                if name.is_empty() {
                    out.push('$');
                } else {
                    push_value(name, lookup, unset, out);
                }
                &after[name.len()..]
            }
        };
        if out.len() > MAX_RESULT_BYTES {
            return Err(TemplateError::TooLong);
        }
    }
    out.push_str(rest);
    Ok(())
}

fn push_value(name: &str, lookup: Lookup<'_>, unset: &mut Unset, out: &mut String) {
    match lookup(name) {
        Some(value) => out.push_str(&value),
        None => unset.push(name.to_owned()),
    }
}

/// The variable name that `text` begins with; may be empty.
fn name_of(text: &str) -> &str {
    let letters = text
        .bytes()
        .take_while(|b| b.is_ascii_alphanumeric() || *b == b'_')
        .count();
    match text.as_bytes().first() {
        Some(b) if !b.is_ascii_digit() => &text[..letters],
        _ => "",
    }
}

/// `text` follows `${`; returns what follows the closing brace.
fn braced<'t>(
    template: &str,
    text: &'t str,
    lookup: Lookup<'_>,
    unset: &mut Unset,
    depth: usize,
    out: &mut String,
) -> Result<&'t str, TemplateError> {
    let invalid = || TemplateError::Invalid {
        template: template.to_owned(),
    };
    let name = name_of(text);
    if name.is_empty() {
        return Err(invalid());
    }
    let after = &text[name.len()..];
    if let Some(rest) = after.strip_prefix('}') {
        push_value(name, lookup, unset, out);
        return Ok(rest);
    }
    let (strict, operator) = match after.strip_prefix(':') {
        Some(more) => (true, more),
        None => (false, after),
    };
    let kind = operator.chars().next().filter(|c| "-?+".contains(*c));
    let (Some(kind), Some(end)) = (kind, closing(operator)) else {
        return Err(invalid());
    };
    let (word, rest) = (&operator[1..end], &operator[end + 1..]);
    if word.contains('\n') {
        return Err(invalid());
    }
    // `:` makes empty count as unset.
    let value = lookup(name).filter(|value| !(strict && value.is_empty()));
    match (kind, value) {
        ('-' | '?', Some(value)) => out.push_str(&value),
        ('-', None) | ('+', Some(_)) => expand(word, lookup, unset, depth + 1, out)?,
        ('+', None) => {}
        _ => {
            let mut message = String::new();
            expand(word, lookup, unset, depth + 1, &mut message)?;
            return Err(TemplateError::Required {
                name: name.to_owned(),
                message,
            });
        }
    }
    Ok(rest)
}

/// Where the brace that is already open closes; braces inside are counted. When they don't
/// match up, the last brace closes.
fn closing(text: &str) -> Option<usize> {
    let mut open = 1usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' => {
                open -= 1;
                if open == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    text.rfind('}')
}

/// A variable as a template asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    /// `?`: without a value it is an error.
    pub required: bool,
    /// What follows `-`; empty where nothing does.
    pub default: String,
    /// What follows `+`.
    pub alternate: String,
}

/// All variables a template asks for, in order, with those in their defaults. Those deeper
/// than [`MAX_NESTING`], and what is no template, are left out.
pub fn variables(template: &str) -> Vec<Variable> {
    let mut out = vec![];
    collect(template, 0, &mut out);
    out
}

fn collect(template: &str, depth: usize, out: &mut Vec<Variable>) {
    if depth > MAX_NESTING {
        return;
    }
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        let after = &rest[at + 1..];
        rest = if let Some(after) = after.strip_prefix('$') {
            after
        } else if let Some(text) = after.strip_prefix('{') {
            let Some(rest) = collect_braced(text, depth, out) else {
                return;
            };
            rest
        } else {
            let name = name_of(after);
            if !name.is_empty() {
                out.push(variable(name));
            }
            &after[name.len()..]
        };
    }
}

fn variable(name: &str) -> Variable {
    Variable {
        name: name.to_owned(),
        required: false,
        default: String::new(),
        alternate: String::new(),
    }
}

/// `text` follows `${`; returns what follows the closing brace. `None`: not a template.
fn collect_braced<'t>(text: &'t str, depth: usize, out: &mut Vec<Variable>) -> Option<&'t str> {
    let name = name_of(text);
    let after = &text[name.len()..];
    if name.is_empty() {
        return None;
    }
    let mut found = variable(name);
    if let Some(rest) = after.strip_prefix('}') {
        out.push(found);
        return Some(rest);
    }
    let operator = after.strip_prefix(':').unwrap_or(after);
    let end = closing(operator)?;
    let word = operator.get(1..end)?;
    match operator.as_bytes().first() {
        Some(b'-') => found.default = word.to_owned(),
        Some(b'+') => found.alternate = word.to_owned(),
        Some(b'?') => found.required = true,
        _ => return None,
    }
    out.push(found);
    if operator.as_bytes().first() != Some(&b'?') {
        collect(word, depth + 1, out);
    }
    operator.get(end + 1..)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn fill(template: &str) -> Result<String, TemplateError> {
        let lookup = |name: &str| match name {
            "A" => Some("a".to_owned()),
            "E" => Some(String::new()),
            "B2" => Some("b".to_owned()),
            _ => None,
        };
        substitute(template, &lookup, &mut vec![])
    }

    #[test]
    fn every_form() {
        for (template, text) in [
            ("x$A-y", "xa-y"),
            ("${A}${B2}", "ab"),
            ("$$A $${A}", "$A ${A}"),
            ("${N}|$N|", "||"),
            ("${N-d}${N:-d}${E-d}${E:-d}${A:-d}", "ddda"),
            ("${A+y}${A:+y}${E+y}${E:+y}${N+y}${N:+y}", "yyy"),
            ("${A?no}${A:?no}${E?no}", "aa"),
            ("${N:-${E:-${A}}}!", "a!"),
            ("${N:-{\"k\": \"$A\"}}", "{\"k\": \"a\"}"),
            ("cost: 5$ $1 $ ", "cost: 5$ $1 $ "),
            ("${N:-a:-b}${N:-?}", "a:-b?"),
            ("${N:-$$x}", "$x"),
            ("é${A}é", "éaé"),
        ] {
            assert_eq!(fill(template).as_deref(), Ok(text), "{template}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for bad in [
            "${",
            "${}",
            "${1}",
            "${A",
            "${A!}",
            "${A:}",
            "${ A}",
            "${A:-x\ny}",
            "${N:-${}",
        ] {
            assert!(
                matches!(fill(bad), Err(TemplateError::Invalid { .. })),
                "{bad}"
            );
        }
        let required = fill("${N:?set N to $A}").unwrap_err();
        assert_eq!(
            required.to_string(),
            "the variable N is required: set N to a"
        );
        assert!(fill("${E:?}").is_err());
    }

    #[test]
    fn nesting_and_growth_are_bounded() {
        let deep = format!("{}x{}", "${N:-".repeat(100), "}".repeat(100));
        assert_eq!(fill(&deep), Err(TemplateError::TooDeep));
        let big = "x".repeat(1000);
        let lookup = |_: &str| Some(big.clone());
        let long = "$A".repeat(2000);
        assert_eq!(
            substitute(&long, &lookup, &mut vec![]),
            Err(TemplateError::TooLong)
        );
    }

    #[test]
    fn variables_are_listed_as_they_are_asked_for() {
        let found = variables("${N:-$A} ${B2?x} ${Y:+alt${Z-zz}} $$no ${é");
        let shown: Vec<_> = found
            .iter()
            .map(|v| {
                let (default, alternate) = (v.default.as_str(), v.alternate.as_str());
                (v.name.as_str(), v.required, default, alternate)
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("N", false, "$A", ""),
                ("A", false, "", ""),
                ("B2", true, "", ""),
                ("Y", false, "", "alt${Z-zz}"),
                ("Z", false, "zz", ""),
            ]
        );
        let deep = format!("{}x{}", "${N:-".repeat(500), "}".repeat(500));
        assert_eq!(variables(&deep).len(), MAX_NESTING + 1);
    }
}
