//! The shell patterns of `${x#p}`, `${x%p}` and `${x/p/r}`: `*`, `?` and escapes.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Star,
    Any,
    Char(char),
}

#[derive(Clone, Debug)]
pub(super) struct Pattern(Vec<Token>);

impl Pattern {
    /// Only `*`, `?`, `\`, `}` and `/` may be escaped.
    pub fn parse(text: &str) -> Result<Self, char> {
        let mut tokens = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            tokens.push(match c {
                '*' => Token::Star,
                '?' => Token::Any,
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\' | '}' | '/')) => Token::Char(c),
                    other => return Err(other.unwrap_or('\\')),
                },
                c => Token::Char(c),
            });
        }
        Ok(Self(tokens))
    }

    fn reversed(&self) -> Self {
        Self(self.0.iter().rev().copied().collect())
    }

    /// The lengths of `text`'s prefixes that match, in ascending order: steps through
    /// all places of the pattern at once, so the time is at most text × pattern.
    fn ends(&self, text: &[char]) -> Vec<usize> {
        let mut places = vec![false; self.0.len() + 1];
        places[0] = true;
        self.skip_stars(&mut places);
        let mut ends = Vec::new();
        for at in 0..=text.len() {
            if places[self.0.len()] {
                ends.push(at);
            }
            let Some(c) = text.get(at) else { break };
            let mut next = vec![false; places.len()];
            for (i, token) in self.0.iter().enumerate().filter(|(i, _)| places[*i]) {
                match token {
                    Token::Star => next[i] = true,
                    Token::Any => next[i + 1] = true,
                    Token::Char(x) => next[i + 1] |= x == c,
                }
            }
            if !next.contains(&true) {
                break;
            }
            self.skip_stars(&mut next);
            places = next;
        }
        ends
    }

    fn skip_stars(&self, places: &mut [bool]) {
        for (i, token) in self.0.iter().enumerate() {
            if places[i] && *token == Token::Star {
                places[i + 1] = true;
            }
        }
    }

    fn end(&self, text: &[char], longest: bool) -> Option<usize> {
        let ends = self.ends(text);
        if longest { ends.last() } else { ends.first() }.copied()
    }

    pub fn trim_start(&self, value: &str, longest: bool) -> String {
        let chars: Vec<char> = value.chars().collect();
        let cut = self.end(&chars, longest).unwrap_or(0);
        chars[cut..].iter().collect()
    }

    pub fn trim_end(&self, value: &str, longest: bool) -> String {
        let chars: Vec<char> = value.chars().rev().collect();
        let cut = self.reversed().end(&chars, longest).unwrap_or(0);
        chars[cut..].iter().rev().collect()
    }

    pub fn replace(&self, value: &str, with: &str, all: bool) -> String {
        let chars: Vec<char> = value.chars().collect();
        let mut out = String::new();
        let mut at = 0;
        while at < chars.len() {
            match self.end(&chars[at..], true) {
                Some(length) if length > 0 => {
                    out.push_str(with);
                    at += length;
                    if !all {
                        break;
                    }
                }
                _ => {
                    out.push(chars[at]);
                    at += 1;
                }
            }
        }
        out.extend(&chars[at..]);
        out
    }
}
