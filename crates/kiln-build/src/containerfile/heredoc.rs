//! Heredocs of RUN, COPY and ADD: `[fd]<<[-]word`.

use super::Cause;
use super::expand::{Lexer, NoVariables};

/// One heredoc with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    pub name: String,
    pub file_descriptor: u32,
    /// No part of the word was quoted: variables in the body are expanded.
    pub expand: bool,
    /// `<<-`: leading tabs go away.
    pub chomp: bool,
    pub content: String,
}

/// Removes the leading tabs of every line.
pub fn chomp(content: &str) -> String {
    content
        .split_inclusive('\n')
        .map(|line| line.trim_start_matches('\t'))
        .collect()
}

/// The heredocs that start on a line, in order, with empty bodies.
pub(super) fn starts(line: &str) -> Result<Vec<Heredoc>, Cause> {
    let lexer = Lexer {
        raw_quotes: true,
        raw_escapes: true,
        keep_unset: true,
        ..Lexer::new('\\')
    };
    // A line whose quotes don't match is the shell's business: no heredocs then.
    let words = lexer.words(line, &NoVariables).unwrap_or_default();
    let mut found = Vec::new();
    for word in words {
        found.extend(parse(&word)?);
    }
    Ok(found)
}

/// Recognises one word as a heredoc's start.
pub(super) fn parse(word: &str) -> Result<Option<Heredoc>, Cause> {
    let digits = word.bytes().take_while(u8::is_ascii_digit).count();
    let Some(rest) = word[digits..].strip_prefix("<<") else {
        return Ok(None);
    };
    let (rest, chomp) = match rest.strip_prefix('-') {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.contains('<') {
        return Ok(None);
    }
    let fail = |cause| Cause::Expansion {
        text: word.to_owned(),
        cause,
    };
    let lexer = Lexer {
        keep_unset: true,
        ..Lexer::new('\\')
    };
    let plain = lexer.words(rest, &NoVariables).map_err(fail)?;
    let raw = Lexer {
        raw_quotes: true,
        ..lexer
    };
    let raw = raw.words(rest, &NoVariables).map_err(fail)?;
    let ([name], [quoted]) = (plain.as_slice(), raw.as_slice()) else {
        return Ok(None);
    };
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    Ok(Some(Heredoc {
        name: name.clone(),
        file_descriptor: word[..digits].parse().unwrap_or(0),
        expand: quotes(name) == quotes(quoted),
        chomp,
        content: String::new(),
    }))
}
