//! Logging in as the registry's challenge says: basic, or a token from its token
//! service (github.com/distribution: "Token Authentication Specification").

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::credentials::Credential;
use super::session::{Session, host_and_port, read_body};
use super::{Action, Problem, RegistryError, http_allowed};

/// Longest answer of a token service, in bytes.
const MAX_TOKEN_BYTES: u64 = 256 << 10;

/// A way to authorise requests.
pub(super) struct Login {
    pub authorization: HeaderValue,
    pub with_credential: bool,
}

/// How the registry wants it.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// A token service's answer; services differ in the name they give it.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session<'_> {
    /// `headers`: of an answer that demands a login.
    pub async fn log_in(&self, headers: &HeaderMap) -> Result<Login, RegistryError> {
        let unfollowable = |problem: &str| {
            self.fail(Problem::Challenge {
                problem: problem.into(),
            })
        };
        let values = headers.get_all(WWW_AUTHENTICATE).into_iter();
        let challenge = choose(values.filter_map(|value| value.to_str().ok()))
            .ok_or_else(|| unfollowable("it asks for neither Basic nor Bearer"))?;
        let sources = &self.client.options.credentials;
        let credential = sources
            .find(self.reference.registry())
            .await
            .map_err(|e| self.fail(e.into()))?;
        let with_credential = credential.is_some();
        let authorization = match (challenge, &credential) {
            (_, Some(Credential::RegistryToken(token))) => format!("Bearer {token}"),
            (Challenge::Basic, Some(Credential::Basic { user, password })) => basic(user, password),
            (Challenge::Basic, None) => return Err(self.fail(self.login_problem(false))),
            (Challenge::Basic, Some(Credential::IdentityToken(_))) => {
                return Err(unfollowable(
                    "it wants a password, and an identity token is configured",
                ));
            }
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                credential,
            ) => {
                let realm = self.realm(&realm)?;
                let scope = scope.unwrap_or_else(|| self.scope());
                let query = Query {
                    realm,
                    service,
                    scope,
                };
                format!("Bearer {}", self.token(&query, credential.as_ref()).await?)
            }
        };
        let mut authorization = HeaderValue::from_str(&authorization)
            .map_err(|_| unfollowable("the login is no valid HTTP header"))?;
        authorization.set_sensitive(true);
        Ok(Login {
            authorization,
            with_credential,
        })
    }

    fn scope(&self) -> String {
        let actions = match self.action {
            Action::Pull => "pull",
            Action::Push => "pull,push",
        };
        format!("repository:{}:{actions}", self.reference.repository())
    }

    /// The token service's address; it will see the credentials.
    fn realm(&self, text: &str) -> Result<Url, RegistryError> {
        let refuse = |problem| self.fail(Problem::Challenge { problem });
        let realm = Url::parse(text)
            .map_err(|_| refuse(format!("its token service `{text}` is no address")))?;
        let plain = realm.scheme() == "http"
            && http_allowed(&host_and_port(&realm), &self.client.options.insecure);
        match realm.scheme() == "https" || plain {
            true => Ok(realm),
            false => Err(refuse(format!(
                "its token service `{text}` is not reached over HTTPS"
            ))),
        }
    }

    async fn token(
        &self,
        query: &Query,
        credential: Option<&Credential>,
    ) -> Result<String, RegistryError> {
        let http = &self.client.http;
        let make = || match credential {
            Some(Credential::IdentityToken(token)) => http
                .post(query.realm.clone())
                .header("content-type", "application/x-www-form-urlencoded")
                .body(query.refresh_form(token)),
            Some(Credential::Basic { user, password }) => {
                http.get(query.url()).basic_auth(user, Some(password))
            }
            _ => http.get(query.url()),
        };
        let response = self.execute(&make, None, self.client.options.retry).await?;
        let refused = matches!(
            response.status(),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST
        );
        if refused {
            return Err(self.fail(self.login_problem(credential.is_some())));
        }
        let response = self.success("the request for a token", response).await?;
        let host = host_and_port(response.url());
        let unusable = |problem: &str| {
            let problem = problem.into();
            self.fail_at(&host, Problem::Challenge { problem })
        };
        let body = read_body(response, MAX_TOKEN_BYTES).await;
        let body = body
            .ok()
            .flatten()
            .ok_or_else(|| unusable("its token service's answer broke off or is too long"))?;
        // The JSON error could quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| unusable("its token service's answer is not in the agreed form"))?;
        let tokens = [answer.token, answer.access_token];
        let mut tokens = tokens.into_iter().flatten().filter(|t| !t.is_empty());
        tokens
            .next()
            .ok_or_else(|| unusable("its token service gave no token"))
    }
}

/// What to ask a token service.
struct Query {
    realm: Url,
    service: Option<String>,
    scope: String,
}

impl Query {
    fn url(&self) -> Url {
        let mut url = self.realm.clone();
        let mut pairs = url.query_pairs_mut();
        if let Some(service) = &self.service {
            pairs.append_pair("service", service);
        }
        pairs.append_pair("scope", &self.scope);
        drop(pairs);
        url
    }

    /// OAuth 2's way to trade a long-lived token for a short one.
    fn refresh_form(&self, token: &str) -> String {
        let mut url = self.realm.clone();
        url.set_query(None);
        let mut pairs = url.query_pairs_mut();
        pairs.append_pair("grant_type", "refresh_token");
        pairs.append_pair("client_id", "kiln");
        pairs.append_pair("refresh_token", token);
        pairs.append_pair("scope", &self.scope);
        if let Some(service) = &self.service {
            pairs.append_pair("service", service);
        }
        drop(pairs);
        url.query().unwrap_or_default().into()
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// The best challenge kiln can answer: Bearer before Basic.
fn choose<'h>(headers: impl Iterator<Item = &'h str>) -> Option<Challenge> {
    let mut found = None;
    for header in headers {
        let Ok(challenges) = http_auth::parse_challenges(header) else {
            continue;
        };
        for challenge in challenges {
            let parameter = |name: &str| {
                let mut each = challenge.params.iter();
                each.find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = parameter("realm") {
                    return Some(Challenge::Bearer {
                        realm,
                        service: parameter("service"),
                        scope: parameter("scope"),
                    });
                }
            } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                found = Some(Challenge::Basic);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_chosen_and_parsed() {
        let one = |header| choose([header].into_iter());
        assert_eq!(one("Basic realm=\"x\""), Some(Challenge::Basic));
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("registry.example".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        let header = "bearer realm=\"https://auth.example/token\",service=\"registry.example\",scope=\"repository:a/b:pull,push\"";
        assert_eq!(one(header), Some(bearer));
        let both = choose(["Basic realm=\"x\"", "Bearer realm=\"https://a\""].into_iter());
        assert!(matches!(both, Some(Challenge::Bearer { .. })));
        for none in [
            "",
            "Negotiate",
            "Bearer service=\"x\"",
            "Bearer realm=\"",
            "\u{7f}",
        ] {
            assert_eq!(one(none), None, "{none}");
        }
    }
}
