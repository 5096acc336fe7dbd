//! File name patterns: those of COPY's sources (Go's `filepath.Match`) and those of
//! `.dockerignore` and `--exclude` (the same, and `**`).

/// Why a pattern is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a valid pattern")]
pub struct BadPattern(pub String);

#[derive(Clone, Debug)]
enum Token {
    Char(char),
    /// `?`: any character but `/`.
    Any,
    /// `*`: any number of characters but `/`.
    Star,
    /// Any characters.
    All,
    /// `**/`: nothing, or [`Token::DeepLoop`].
    Deep,
    /// Anything that ends with `/`; always follows `Deep`.
    DeepLoop,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

/// A compiled pattern. Matching takes time of at most pattern × text.
#[derive(Clone, Debug)]
pub struct Glob {
    tokens: Vec<Token>,
    /// The plain text that it ends with: most texts end otherwise.
    ending: String,
}

impl Glob {
    /// A pattern in which a star never passes a `/`.
    pub fn path(text: &str) -> Result<Self, BadPattern> {
        Self::compile(text, false)
    }

    /// A pattern that knows `**`.
    pub fn ignore(text: &str) -> Result<Self, BadPattern> {
        Self::compile(text, true)
    }

    fn compile(text: &str, deep: bool) -> Result<Self, BadPattern> {
        let bad = || BadPattern(text.to_owned());
        let mut tokens = Vec::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            let token = match c {
                '*' if deep && chars.next_if_eq(&'*').is_some() => {
                    let slash = chars.next_if_eq(&'/').is_some();
                    // Literal text right after a leading `**` may end a name.
                    let ending =
                        tokens.is_empty() && !slash && !text[2..].contains(['*', '?', '[', '\\']);
                    if chars.peek().is_none() || ending {
                        Token::All
                    } else {
                        tokens.push(Token::Deep);
                        Token::DeepLoop
                    }
                }
                '*' => Token::Star,
                '?' => Token::Any,
                '[' => class(&mut chars).ok_or_else(bad)?,
                '\\' => Token::Char(chars.next().ok_or_else(bad)?),
                c => Token::Char(c),
            };
            tokens.push(token);
        }
        let plain = tokens.iter().rev().map_while(|token| match token {
            Token::Char(c) => Some(*c),
            _ => None,
        });
        let ending: Vec<char> = plain.collect();
        Ok(Self {
            ending: ending.into_iter().rev().collect(),
            tokens,
        })
    }

    pub fn matches(&self, text: &str) -> bool {
        if !text.ends_with(&self.ending) {
            return false;
        }
        let mut places = vec![false; self.tokens.len() + 1];
        let mut next = places.clone();
        places[0] = true;
        self.skip(&mut places);
        for c in text.chars() {
            next.fill(false);
            for (i, token) in self.tokens.iter().enumerate().filter(|(i, _)| places[*i]) {
                match token {
                    Token::Char(x) => next[i + 1] |= *x == c,
                    Token::Any => next[i + 1] |= c != '/',
                    Token::Star => next[i] |= c != '/',
                    Token::All => next[i] = true,
                    Token::Deep => {}
                    Token::DeepLoop => {
                        next[i] = true;
                        next[i + 1] |= c == '/';
                    }
                    Token::Class { negated, ranges } => {
                        let within = ranges.iter().any(|(a, b)| (*a..=*b).contains(&c));
                        next[i + 1] |= within != *negated && c != '/';
                    }
                }
            }
            self.skip(&mut next);
            std::mem::swap(&mut places, &mut next);
        }
        places[self.tokens.len()]
    }

    /// Passes the tokens that may stand for nothing.
    fn skip(&self, places: &mut [bool]) {
        for (i, token) in self
            .tokens
            .iter()
            .enumerate()
            .filter(|(_, t)| !matches!(t, Token::Char(_)))
        {
            if !places[i] {
                continue;
            }
            match token {
                Token::Star | Token::All => places[i + 1] = true,
                Token::Deep => {
                    places[i + 1] = true;
                    places[i + 2] = true;
                }
                _ => {}
            }
        }
    }
}

/// The inside of `[…]`, the opening bracket already taken.
fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<Token> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        let from = match chars.next()? {
            ']' if !ranges.is_empty() => return Some(Token::Class { negated, ranges }),
            ']' | '-' => return None,
            '\\' => chars.next()?,
            c => c,
        };
        let mut to = from;
        if chars.next_if_eq(&'-').is_some() {
            to = match chars.next()? {
                ']' | '-' => return None,
                '\\' => chars.next()?,
                c => c,
            };
        }
        ranges.push((from, to));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn stars_stop_at_slashes_and_double_stars_do_not() {
        let cases = [
            ("*.rs", "a.rs", true),
            ("*.rs", "b/a.rs", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "aXb", false),
            ("**/a", "a", true),
            ("**/a", "x/y/a", true),
            ("**/a", "x/ya", false),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/xb", false),
            ("a/**", "a/x/y", true),
            ("a/**", "ab", false),
            ("**", "x/y", true),
            ("**.go", "x/y.go", true),
            ("a**b", "ax/b", true),
            ("**/*.md", "x/y.md", true),
            ("**/*.md", "y.md", true),
            ("**/*.md/**", "x/y.md/z", true),
            ("**/né", "x/né", true),
            ("**/né", "x/nè", false),
            ("*\\*", "x*", true),
            ("*\\*", "*x", false),
        ];
        for (pattern, text, expected) in cases {
            let glob = Glob::ignore(pattern).unwrap();
            assert_eq!(glob.matches(text), expected, "{pattern} {text}");
        }
        assert!(!Glob::path("a/**/b").unwrap().matches("a/x/y/b"));
        for bad in ["[", "[]a]", "a[-x]", "a\\", "[a-", "[a-]"] {
            assert!(Glob::path(bad).is_err(), "{bad}");
        }
    }
}
