//! apt.conf(5), as far as settings with a value go: nested scopes, `::` names,
//! quotes and the three kinds of comment. `#include` and `#clear` are passed over.

/// The settings in order: (full name in lower case, value).
pub fn parse(text: &str) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    let mut scopes: Vec<String> = Vec::new();
    let mut words: Vec<String> = Vec::new();
    for token in tokens(text) {
        match token {
            Token::Word(word) => words.push(word),
            Token::Open => scopes.push(
                std::mem::take(&mut words)
                    .first()
                    .cloned()
                    .unwrap_or_default(),
            ),
            Token::Close => {
                scopes.pop();
                words.clear();
            }
            Token::End => {
                if let [name, value] = words.as_slice() {
                    let mut full = scopes.clone();
                    full.push(name.clone());
                    settings.push((full.join("::").to_ascii_lowercase(), value.clone()));
                }
                words.clear();
            }
        }
    }
    settings
}

enum Token {
    Word(String),
    Open,
    Close,
    End,
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skip_to = |end: &str| rest.find(end).map_or("", |at| &rest[at + end.len()..]);
        rest = match first {
            '#' => skip_to("\n"),
            _ if rest.starts_with("//") => skip_to("\n"),
            _ if rest.starts_with("/*") => skip_to("*/"),
            '"' => {
                let (inside, tail) = rest[1..].split_once('"').unwrap_or((&rest[1..], ""));
                tokens.push(Token::Word(inside.into()));
                tail
            }
            '{' | '}' | ';' => {
                tokens.push(match first {
                    '{' => Token::Open,
                    '}' => Token::Close,
                    _ => Token::End,
                });
                &rest[1..]
            }
            c if c.is_whitespace() => &rest[c.len_utf8()..],
            _ => {
                let end = rest
                    .find(|c: char| c.is_whitespace() || matches!(c, '{' | '}' | ';' | '"'))
                    .unwrap_or(rest.len());
                tokens.push(Token::Word(rest[..end].into()));
                &rest[end..]
            }
        };
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_names_and_comments() {
        let text = "// a\n# b \"x\";\n/* Acquire::No \"1\"; */\nAcquire::Check-Valid-Until \"false\";\n\
                    Acquire { http { Proxy \"http://p.test:3142\"; }; Retries \"3\"; };\nList { \"a\"; };\nbroken \"";
        let settings = parse(text);
        let expected = [
            ("acquire::check-valid-until", "false"),
            ("acquire::http::proxy", "http://p.test:3142"),
            ("acquire::retries", "3"),
        ];
        let got: Vec<_> = settings
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        assert_eq!(got, expected);
    }
}
