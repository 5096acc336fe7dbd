//! What of a URL, and of what commands print, may be written down: no login, no secret of the
//! build, no token or signature in a query.

use reqwest::Url;

/// Names of query parameters that let somebody in, in lower case.
const TOKENS: [&str; 12] = [
    "token",
    "access_token",
    "auth_token",
    "private_token",
    "api_key",
    "apikey",
    "sig",
    "signature",
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "x-goog-signature",
];
const MASK: &str = "***";
/// A shorter secret is part of too much.
const SHORTEST: usize = 4;

#[derive(Default)]
pub(crate) struct Mask(Vec<String>);

impl Mask {
    pub fn new<'a>(secrets: impl Iterator<Item = &'a [u8]>) -> Self {
        let texts = secrets.filter_map(|value| std::str::from_utf8(value.trim_ascii()).ok());
        let mut all = Vec::new();
        // Keys have several lines, and are printed line by line.
        let texts = texts.flat_map(|text| text.lines().chain([text]));
        for text in texts.map(str::trim).filter(|text| text.len() >= SHORTEST) {
            all.push(text.to_owned());
            // As it stands in a URL.
            let mut url = Url::parse("http://x/").ok();
            if let Some(url) = &mut url {
                url.set_path(text);
                all.push(url.path().trim_start_matches('/').to_owned());
                url.query_pairs_mut().append_pair("", text);
                all.push(
                    url.query()
                        .unwrap_or_default()
                        .trim_start_matches('=')
                        .to_owned(),
                );
            }
        }
        all.retain(|text| text.len() >= SHORTEST);
        all.sort_by_key(|text| std::cmp::Reverse(text.len()));
        all.dedup();
        Self(all)
    }

    /// The URL as it may be written down.
    pub fn url(&self, url: &str) -> String {
        self.text(&without_tokens(&without_login(url)))
    }

    /// A text without the build's secrets.
    pub fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.0 {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), MASK);
            }
        }
        text
    }

    /// Whether a text that is no URL holds a secret of the build.
    pub fn hides(&self, text: &str) -> bool {
        self.0.iter().any(|secret| text.contains(secret.as_str()))
    }
}

/// The query's tokens, in an address that may be relative.
fn without_tokens(text: &str) -> String {
    let Some((before, query)) = text.split_once('?') else {
        return text.to_owned();
    };
    let secret = |name: &str| TOKENS.contains(&name.to_ascii_lowercase().as_str());
    let parts = query.split('&').map(|part| match part.split_once('=') {
        Some((name, _)) if secret(name) => format!("{name}={MASK}"),
        _ => part.to_owned(),
    });
    format!("{before}?{}", parts.collect::<Vec<_>>().join("&"))
}

fn without_login(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        return text.to_owned();
    };
    // It has a host: these can be taken away.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_tokens_and_the_builds_secrets_are_left_out() {
        let secrets = [b"hush hush\n".as_slice(), b"x"];
        let mask = Mask::new(secrets.into_iter());
        for (url, expected) in [
            ("http://u:p@h.test/x?y=1", "http://h.test/x?y=1"),
            (
                "http://h.test/?a=1&SIG=abc&token=d",
                "http://h.test/?a=1&SIG=***&token=***",
            ),
            ("http://h.test/hush%20hush/z", "http://h.test/***/z"),
            ("http://h.test/?k=hush+hush", "http://h.test/?k=***"),
            ("/next?q=hush hush&token=1", "/next?q=***&token=***"),
        ] {
            assert_eq!(mask.url(url), expected);
        }
        let key = Mask::new([b"first line\nsecond line\n".as_slice()].into_iter());
        assert_eq!(key.text("is second line"), "is ***");
        assert_eq!(key.text("line"), "line");
    }
}
