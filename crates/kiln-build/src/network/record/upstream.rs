//! The way out: requests as they are sent to servers, and which of their headers count.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;

/// A server that does not take a connection, or sends nothing, for so long is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Redirects that are followed to an address that was valid for a moment only.
const REDIRECTS: usize = 10;
/// Certificates beyond the machine's own that are believed.
const MAX_ROOTS: usize = 2_000;

/// Headers of a response that programs go by; no others are passed on, so that what a
/// program does can't follow from what is not recorded.
const KEPT: [&str; 25] = [
    "accept-ranges",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-range",
    "content-type",
    "docker-content-digest",
    "docker-distribution-api-version",
    "etag",
    "git-protocol",
    "last-modified",
    "link",
    "location",
    "npm-notice",
    "retry-after",
    "www-authenticate",
    "x-checksum-sha1",
    "x-checksum-sha256",
    "x-goog-hash",
    "x-linked-etag",
    "x-linked-size",
    "x-pypi-last-serial",
    "x-repo-commit",
    "x-xet-hash",
    "x-xet-refresh-route",
];

/// Headers of a request that are about the connection, or about what the client has already:
/// servers are always asked for the whole thing, uncompressed, so that caches that a RUN
/// finds, and servers' compression, decide nothing.
const NOT_SENT: [&str; 15] = [
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What is known of the way out, for one RUN.
#[derive(Default)]
pub(crate) struct Route {
    /// `extra_hosts`.
    pub hosts: Vec<(IpAddr, String)>,
    /// The proxies that the build was given for HTTP and HTTPS, and what goes without.
    pub proxies: Proxies,
    /// Certificates that the image's programs trust, in PEM.
    pub trusted: Vec<u8>,
    /// Addresses that stand for others: what is recorded, and what is really asked.
    pub mirrors: Vec<(String, String)>,
    /// Whether the host's own loopback addresses may be asked: where the command has the
    /// host's network anyway.
    pub loopback: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proxies {
    pub http: Option<String>,
    pub https: Option<String>,
    pub without: Option<String>,
}

/// Made when the first request really goes out: what is recorded needs none.
pub(super) struct Upstream {
    route: Route,
    plain: OnceLock<reqwest::Client>,
    following: OnceLock<reqwest::Client>,
}

impl Upstream {
    pub fn new(route: Route) -> Self {
        Self {
            route,
            plain: OnceLock::new(),
            following: OnceLock::new(),
        }
    }

    /// A client that leaves redirects to who asked.
    pub fn client(&self) -> Result<&reqwest::Client, reqwest::Error> {
        self.made(&self.plain, Policy::none())
    }

    pub fn following(&self) -> Result<&reqwest::Client, reqwest::Error> {
        self.made(&self.following, Policy::limited(REDIRECTS))
    }

    fn made<'a>(
        &self,
        place: &'a OnceLock<reqwest::Client>,
        policy: Policy,
    ) -> Result<&'a reqwest::Client, reqwest::Error> {
        if let Some(client) = place.get() {
            return Ok(client);
        }
        let client = self.make(policy)?;
        Ok(place.get_or_init(|| client))
    }

    fn make(&self, policy: Policy) -> Result<reqwest::Client, reqwest::Error> {
        // A second call finds it installed: the same provider serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let route = &self.route;
        let mut builder = reqwest::Client::builder()
            .redirect(policy)
            .referer(false)
            .connect_timeout(PATIENCE)
            .read_timeout(PATIENCE)
            .dns_resolver(Names {
                loopback: route.loopback,
            });
        for (address, name) in &route.hosts {
            if route.loopback || !is_own(address) {
                builder = builder.resolve(name, SocketAddr::new(*address, 0));
            }
        }
        // A bundle may hold what is no certificate of today's: that one is left out.
        let found = reqwest::Certificate::from_pem_bundle(&route.trusted).unwrap_or_default();
        if !found.is_empty() {
            builder = builder.tls_certs_merge(found.into_iter().take(MAX_ROOTS));
        }
        let Proxies {
            http,
            https,
            without,
        } = &route.proxies;
        let without = without.as_deref().and_then(reqwest::NoProxy::from_string);
        if let Some(proxy) = http {
            builder = builder.proxy(reqwest::Proxy::http(proxy)?.no_proxy(without.clone()));
        }
        if let Some(proxy) = https {
            builder = builder.proxy(reqwest::Proxy::https(proxy)?.no_proxy(without));
        }
        builder.build()
    }

    /// What is really asked for an address.
    pub fn real(&self, url: &str) -> String {
        let below = |shown: &str| {
            let rest = url.strip_prefix(shown)?;
            (rest.is_empty() || rest.starts_with('/')).then_some(rest)
        };
        let mut mirrors = self.route.mirrors.iter();
        let found = mirrors.find_map(|(shown, real)| Some(format!("{real}{}", below(shown)?)));
        found.unwrap_or_else(|| url.to_owned())
    }

    /// Whether an address may be asked: the command itself has no way to the host's own
    /// loopback, and gets none through the proxy.
    pub fn allows(&self, url: &reqwest::Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        self.route.loopback || !address.is_ok_and(|address| is_own(&address))
    }

    /// Where a connection that is passed on unread goes.
    pub async fn addresses(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let stated = self.route.hosts.iter().filter(|(_, name)| name == host);
        let mut all: Vec<SocketAddr> = stated.map(|(ip, _)| (*ip, port).into()).collect();
        if all.is_empty() {
            all.extend(tokio::net::lookup_host((host, port)).await?);
        }
        all.retain(|address| self.route.loopback || !is_own(&address.ip()));
        Ok(all)
    }
}

fn is_own(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_unspecified(),
        IpAddr::V6(v6) => {
            let mapped = v6.to_ipv4_mapped().map(IpAddr::V4);
            v6.is_loopback() || v6.is_unspecified() || mapped.is_some_and(|v4| is_own(&v4))
        }
    }
}

/// The host's names, without its own loopback addresses.
struct Names {
    loopback: bool,
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let loopback = self.loopback;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let all: Vec<SocketAddr> = found.filter(|a| loopback || !is_own(&a.ip())).collect();
            match all.is_empty() {
                true => Err("the name has no address that a RUN may reach".into()),
                false => Ok(Box::new(all.into_iter()) as Addrs),
            }
        })
    }
}

/// The headers that are sent on.
pub(super) fn outgoing(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all("connection")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let mut sent = HeaderMap::new();
    for (name, value) in headers {
        let about_the_connection = named.iter().any(|other| other == name.as_str());
        if !NOT_SENT.contains(&name.as_str()) && !about_the_connection {
            sent.append(name.clone(), value.clone());
        }
    }
    if headers.contains_key("if-range") {
        // The part of something else is of no use.
        sent.remove("range");
    }
    sent.insert("accept-encoding", HeaderValue::from_static("identity"));
    sent
}

/// The headers that are recorded, and passed on. `head`: the length is that of the body
/// that was not asked for.
pub(super) fn kept(headers: &HeaderMap, head: bool) -> BTreeMap<String, String> {
    let mut kept = BTreeMap::new();
    let length = head.then_some("content-length");
    for name in KEPT.into_iter().chain(length) {
        let values = headers.get_all(name).iter();
        let values: Vec<&str> = values.filter_map(|value| value.to_str().ok()).collect();
        if !values.is_empty() {
            kept.insert(name.to_owned(), values.join(", "));
        }
    }
    kept
}

/// What is recorded, as headers again.
pub(super) fn given(kept: &BTreeMap<String, String>) -> HeaderMap {
    let pairs = kept.iter().filter_map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_str(value).ok()?))
    });
    pairs.collect()
}

/// Whether another answer may come to a request with another `Accept`.
pub(super) fn varies(headers: &HeaderMap) -> bool {
    let values = headers.get_all("vary").iter();
    let names = values.filter_map(|value| value.to_str().ok());
    let mut names = names.flat_map(|value| value.split(',')).map(str::trim);
    names.any(|name| name == "*" || name.eq_ignore_ascii_case("accept"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_out_of_reach() {
        let upstream = Upstream::new(Route::default());
        let allows = |url: &str| upstream.allows(&reqwest::Url::parse(url).unwrap());
        for url in [
            "http://127.0.0.1/",
            "http://127.1:80/",
            "http://[::1]/",
            "http://0.0.0.0/",
            "http://[::ffff:127.0.0.1]/",
        ] {
            assert!(!allows(url), "{url}");
        }
        assert!(allows("http://192.0.2.1/") && allows("http://h.test/"));
    }

    #[test]
    fn mirrors_are_whole_folders() {
        let mirrors = [
            ("http://d.test/debian", "https://m.test/d"),
            ("http://d.test/debian-security", "https://s.test"),
        ];
        let mirrors = mirrors.map(|(shown, real)| (shown.to_owned(), real.to_owned()));
        let upstream = Upstream::new(Route {
            mirrors: mirrors.to_vec(),
            ..Route::default()
        });
        assert_eq!(
            upstream.real("http://d.test/debian/x"),
            "https://m.test/d/x"
        );
        let security = upstream.real("http://d.test/debian-security/x");
        assert_eq!(security, "https://s.test/x");
        let other = "http://d.test/debian-ports/x";
        assert_eq!(upstream.real(other), other);
    }

    #[test]
    fn who_has_something_already_is_given_the_whole() {
        let names = [
            "if-none-match",
            "if-range",
            "range",
            "x-own",
            "accept-encoding",
            "x-hop",
        ];
        let mut headers: HeaderMap = names
            .iter()
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("v")))
            .collect();
        headers.insert("connection", HeaderValue::from_static("close, X-Hop"));
        let sent = outgoing(&headers);
        let mut names: Vec<&str> = sent.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept-encoding", "x-own"]);
        assert_eq!(sent["accept-encoding"], "identity");
    }
}
