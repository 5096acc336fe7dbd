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

/// The names of all variables a template uses, in order, with those of nested defaults.
pub fn variables(template: &str) -> Vec<String> {
    let names = std::cell::RefCell::new(vec![]);
    let lookup = |name: &str| {
        names.borrow_mut().push(name.to_owned());
        None
    };
    let mut unset = vec![];
    // A required variable ends the walk early, which is enough for a listing.
    let _ = substitute(template, &lookup, &mut unset);
    names.into_inner()
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
    fn names_are_listed() {
        assert_eq!(variables("${N:-$A} ${B2?x}"), ["N", "A", "B2"]);
    }
}
