//! Shell words: quotes, escapes and variables (`$x`, `${x:-y}`, `${x#p}`, `${x/p/r}` …)
//! as the Dockerfile reference has them.

use std::collections::BTreeMap;

use super::pattern::Pattern;

/// `${a:-${b:-…}}` deeper than this is refused: it bounds the stack.
const MAX_DEPTH: usize = 64;

/// `${x/p/r}` over longer values is refused: its time grows with the square.
const MAX_REPLACE: usize = 8192;

/// A text's greatest length after expansion, in bytes.
const MAX_EXPANDED: usize = 16 << 20;

/// Where variables' values come from.
pub trait Variables {
    fn get(&self, name: &str) -> Option<String>;
    /// Is told of a name without a value, for which the text says nothing else either.
    fn missed(&self, _name: &str) {}
}

/// Knows no variable.
pub struct NoVariables;

impl Variables for NoVariables {
    fn get(&self, _: &str) -> Option<String> {
        None
    }
}

impl Variables for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<String> {
        BTreeMap::get(self, name).cloned()
    }
}

/// Why a text can't be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    #[error("a {0} quote is never closed")]
    Quote(&'static str),
    #[error("a `${{` is never closed")]
    Unclosed,
    #[error("`${{` needs a variable's name after it")]
    BadSubstitution,
    #[error("`{0}` is not a way to use a variable (:-, -, :+, +, :?, ?, #, ##, %, %%, /, //)")]
    Modifier(String),
    #[error("{name}: {message}")]
    Required { name: String, message: String },
    #[error("`\\{0}` is not an escape in a pattern (\\*, \\?, \\\\, \\}}, \\/)")]
    PatternEscape(char),
    #[error("more than {MAX_DEPTH} `${{` within each other")]
    TooDeep,
    #[error("the value of {0} is longer than the {MAX_REPLACE} characters that ${{x/p/r}} takes")]
    TooLong(String),
    #[error("the expanded text is longer than {MAX_EXPANDED} bytes")]
    TooBig,
}

/// How words are read.
#[derive(Clone, Copy, Debug)]
pub struct Lexer {
    pub escape: char,
    /// Leave quotes in the result.
    pub raw_quotes: bool,
    /// Leave escape characters in the result.
    pub raw_escapes: bool,
    /// Quotes mean nothing (bodies of heredocs).
    pub ignore_quotes: bool,
    /// Leave variables without a value as they are written.
    pub keep_unset: bool,
}

impl Lexer {
    pub fn new(escape: char) -> Self {
        Self {
            escape,
            raw_quotes: false,
            raw_escapes: false,
            ignore_quotes: false,
            keep_unset: false,
        }
    }

    /// Expands a text as one word.
    pub fn word(&self, text: &str, variables: &dyn Variables) -> Result<String, ExpandError> {
        let mut run = Run::new(self, text, variables);
        let (word, _) = run.until(None, self.raw_escapes)?;
        Ok(word)
    }

    /// Expands a text, then splits it at white space outside quotes.
    pub fn words(&self, text: &str, variables: &dyn Variables) -> Result<Vec<String>, ExpandError> {
        let mut run = Run::new(self, text, variables);
        let (_, words) = run.until(None, self.raw_escapes)?;
        Ok(words.finish())
    }
}

/// Writes `text` so that it stands for itself, as a word with this escape character.
pub fn literal(text: &str, escape: char) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == escape || matches!(c, '$' | '"' | '\'' | '<') {
            out.push(escape);
        }
        out.push(c);
    }
    out
}

#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn raw(&mut self, text: &str) {
        self.current.push_str(text);
    }

    fn split(&mut self, text: &str) {
        for c in text.chars() {
            if !c.is_whitespace() {
                self.current.push(c);
            } else if !self.current.is_empty() {
                self.done.push(std::mem::take(&mut self.current));
            }
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.done.push(self.current);
        }
        self.done
    }
}

struct Run<'a> {
    lexer: &'a Lexer,
    chars: Vec<char>,
    at: usize,
    depth: usize,
    raw_escapes: bool,
    variables: &'a dyn Variables,
}

impl<'a> Run<'a> {
    fn new(lexer: &'a Lexer, text: &str, variables: &'a dyn Variables) -> Self {
        Self {
            lexer,
            chars: text.chars().collect(),
            at: 0,
            depth: 0,
            raw_escapes: lexer.raw_escapes,
            variables,
        }
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    /// Reads up to `stop` (which is taken) or the end.
    fn until(
        &mut self,
        stop: Option<char>,
        raw_escapes: bool,
    ) -> Result<(String, Words), ExpandError> {
        let outer = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let mut result = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if result.len() > MAX_EXPANDED {
                return Err(ExpandError::TooBig);
            }
            let quotes = !self.lexer.ignore_quotes;
            match c {
                c if Some(c) == stop => {
                    self.at += 1;
                    self.raw_escapes = outer;
                    return Ok((result, words));
                }
                '\'' if quotes => {
                    let text = self.single()?;
                    result.push_str(&text);
                    words.raw(&text);
                }
                '"' if quotes => {
                    let text = self.double()?;
                    result.push_str(&text);
                    words.raw(&text);
                }
                '$' => {
                    let text = self.dollar()?;
                    result.push_str(&text);
                    words.split(&text);
                }
                '<' => {
                    let text = self.angle();
                    result.push_str(&text);
                    words.raw(&text);
                }
                _ => self.plain(&mut result, &mut words),
            }
        }
        if stop.is_some() {
            return Err(ExpandError::Unclosed);
        }
        self.raw_escapes = outer;
        Ok((result, words))
    }

    fn plain(&mut self, result: &mut String, words: &mut Words) {
        let Some(c) = self.next() else { return };
        if c != self.lexer.escape {
            result.push(c);
            words.split(c.encode_utf8(&mut [0; 4]));
            return;
        }
        if self.raw_escapes {
            result.push(c);
            words.current.push(c);
        }
        // At the very end it stands for nothing.
        if let Some(escaped) = self.next() {
            result.push(escaped);
            words.current.push(escaped);
        }
    }

    fn single(&mut self) -> Result<String, ExpandError> {
        let from = self.at;
        self.at += 1;
        while let Some(c) = self.next() {
            if c == '\'' {
                let (start, end) = if self.lexer.raw_quotes {
                    (from, self.at)
                } else {
                    (from + 1, self.at - 1)
                };
                return Ok(self.chars[start..end].iter().collect());
            }
        }
        Err(ExpandError::Quote("single"))
    }

    fn double(&mut self) -> Result<String, ExpandError> {
        let mut result = String::new();
        self.at += 1;
        if self.lexer.raw_quotes {
            result.push('"');
        }
        while let Some(c) = self.peek() {
            if c == '$' {
                result.push_str(&self.dollar()?);
                continue;
            }
            self.at += 1;
            if c == '"' {
                if self.lexer.raw_quotes {
                    result.push('"');
                }
                return Ok(result);
            }
            if c != self.lexer.escape {
                result.push(c);
                continue;
            }
            if self.raw_escapes {
                result.push(c);
            }
            match self.peek() {
                None => {}
                // Only these can be escaped between double quotes.
                Some(next) if next == '"' || next == '$' || next == self.lexer.escape => {
                    self.at += 1;
                    result.push(next);
                }
                Some(_) => result.push(c),
            }
        }
        Err(ExpandError::Quote("double"))
    }

    /// A possible heredoc start stays one word with the blanks after it.
    fn angle(&mut self) -> String {
        self.at += 1;
        if self.peek() != Some('<') {
            return "<".into();
        }
        self.at += 1;
        let mut text = String::from("<<");
        while let Some(c @ (' ' | '\t' | '\r')) = self.peek() {
            text.push(c);
            self.at += 1;
        }
        text
    }

    fn dollar(&mut self) -> Result<String, ExpandError> {
        self.at += 1;
        if self.peek() == Some('{') {
            self.at += 1;
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err(ExpandError::TooDeep);
            }
            let text = self.braces();
            self.depth -= 1;
            return text;
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".into());
        }
        match self.variables.get(&name) {
            Some(value) => Ok(value),
            None if self.lexer.keep_unset => Ok(format!("${name}")),
            None => Ok(self.unset(&name)),
        }
    }

    fn unset(&self, name: &str) -> String {
        self.variables.missed(name);
        String::new()
    }

    /// Letters, digits and `_`; or digits only; or one special parameter.
    fn name(&mut self) -> String {
        let start = self.at;
        match self.peek() {
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!' | '0') if self.peek() != Some('0') => {
                self.at += 1;
            }
            Some(c) if c.is_numeric() => {
                while self.peek().is_some_and(char::is_numeric) {
                    self.at += 1;
                }
            }
            _ => {
                while self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_') {
                    self.at += 1;
                }
            }
        }
        self.chars[start..self.at].iter().collect()
    }

    fn braces(&mut self) -> Result<String, ExpandError> {
        match self.peek() {
            None => return Err(ExpandError::Unclosed),
            Some('{' | '}' | ':') => return Err(ExpandError::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        let value = self.variables.get(&name);
        let Some(mut operator) = self.next() else {
            return Err(ExpandError::Unclosed);
        };
        if operator == '}' {
            return Ok(match value {
                Some(value) => value,
                None if self.lexer.keep_unset => format!("${{{name}}}"),
                None => self.unset(&name),
            });
        }
        let mut written = String::from(operator);
        let colon = operator == ':';
        if colon {
            operator = self.next().ok_or(ExpandError::Unclosed)?;
            written.push(operator);
        }
        match operator {
            '-' | '+' | '?' => {}
            '#' | '%' | '/' if !colon => {}
            _ => return Err(ExpandError::Modifier(written)),
        }
        if operator == '/' {
            return self.replacement(&name, value);
        }
        let (word, _) = self.until(Some('}'), matches!(operator, '#' | '%'))?;
        match value {
            None if self.lexer.keep_unset => Ok(format!("${{{name}{written}{word}}}")),
            value => apply(operator, colon, &name, value, word),
        }
    }

    fn replacement(&mut self, name: &str, value: Option<String>) -> Result<String, ExpandError> {
        let all = self.peek() == Some('/');
        if all {
            self.at += 1;
        }
        let (pattern, _) = self.until(Some('/'), true)?;
        let (with, _) = self.until(Some('}'), true)?;
        let Some(value) = value else {
            return Ok(match self.lexer.keep_unset {
                true => format!("${{{name}/{pattern}/{with}}}"),
                false => self.unset(name),
            });
        };
        if value.chars().count() > MAX_REPLACE {
            return Err(ExpandError::TooLong(name.to_owned()));
        }
        let pattern = Pattern::parse(&pattern).map_err(ExpandError::PatternEscape)?;
        Ok(pattern.replace(&value, &with, all))
    }
}

fn apply(
    operator: char,
    colon: bool,
    name: &str,
    value: Option<String>,
    word: String,
) -> Result<String, ExpandError> {
    let present = value.as_ref().is_some_and(|v| !colon || !v.is_empty());
    match operator {
        '-' if present => Ok(value.unwrap_or_default()),
        '-' => Ok(word),
        '+' if present => Ok(word),
        '+' => Ok(String::new()),
        '?' if present => Ok(value.unwrap_or_default()),
        '?' => Err(ExpandError::Required {
            name: name.to_owned(),
            message: match (word.is_empty(), value) {
                (false, _) => word,
                (true, None) => "is not allowed to be unset".into(),
                (true, Some(_)) => "is not allowed to be empty".into(),
            },
        }),
        _ => {
            let longest = word.starts_with(operator);
            let pattern = if longest { &word[1..] } else { &word };
            let pattern = Pattern::parse(pattern).map_err(ExpandError::PatternEscape)?;
            let value = value.unwrap_or_default();
            Ok(match operator {
                '#' => pattern.trim_start(&value, longest),
                _ => pattern.trim_end(&value, longest),
            })
        }
    }
}
