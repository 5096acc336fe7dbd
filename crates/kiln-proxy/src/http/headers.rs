//! What a proxy does to the headers of a message (RFC 9110, 7.6). Pure.

use std::net::IpAddr;

use http::header::{
    self, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, TE,
    TRANSFER_ENCODING, UPGRADE,
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Headers which mean the connection, not the message.
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// `Connection` may name further headers to be taken away, but not these: that would let
/// a client take away what the proxy or the framing says.
const PROTECTED: [HeaderName; 6] = [
    HOST,
    CONTENT_LENGTH,
    TE,
    FORWARDED_FOR,
    FORWARDED_PROTO,
    FORWARDED_HOST,
];

/// Takes away what is only for this connection. `TE: trailers` stays, as trailers are
/// passed on.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = list(headers, &CONNECTION)
        .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
        .filter(|name| !PROTECTED.contains(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    if headers.contains_key(TE) {
        let trailers = list(headers, &TE).any(|te| te.eq_ignore_ascii_case("trailers"));
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

/// The protocol a request wants to change to, if it says so as it must. HTTP/2 in clear
/// text is not offered this way (RFC 9113, 3.1).
pub(crate) fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let connection = list(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let upgrade = headers.get(UPGRADE)?;
    let h2c = list(headers, &UPGRADE).any(|token| token.eq_ignore_ascii_case("h2c"));
    (connection && !h2c).then(|| upgrade.clone())
}

/// `chunked`, or nothing; other codings are not understood.
pub(crate) fn transfer_encoding_is_known(headers: &HeaderMap) -> bool {
    list(headers, &TRANSFER_ENCODING).all(|coding| coding.eq_ignore_ascii_case("chunked"))
}

pub(crate) fn is_websocket(upgrade: &HeaderValue) -> bool {
    upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")
}

pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    list(headers, &header::EXPECT).any(|token| token.eq_ignore_ascii_case("100-continue"))
}

/// HTTP/2 splits cookies; HTTP/1.1 wants them in one line (RFC 9113, 8.2.3).
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(|c| c.as_bytes())
        .collect();
    if cookies.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// Tells the instance for whom it works. At the edge (a published port) the client is
/// added to `X-Forwarded-For`; on the way from one service to another what is there stays
/// as it is, so that an instance behind a front sees what the front told. The other two
/// are set only if nobody has (there may be a TLS terminator in front).
pub(crate) fn forwarded(headers: &mut HeaderMap, client: IpAddr, host: Option<&str>, edge: bool) {
    let client = client.to_canonical().to_string();
    let known: Vec<&str> = list(headers, &FORWARDED_FOR).collect();
    let chain = match (known.is_empty(), edge) {
        (true, _) => Some(client),
        (false, true) => Some(format!("{}, {client}", known.join(", "))),
        (false, false) => None,
    };
    if let Some(chain) = chain
        && let Ok(value) = HeaderValue::from_str(&chain)
    {
        headers.insert(FORWARDED_FOR, value);
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    if !headers.contains_key(FORWARDED_HOST)
        && let Some(value) = host.and_then(|host| HeaderValue::from_str(host).ok())
    {
        headers.insert(FORWARDED_HOST, value);
    }
}

/// The elements of a header which is a list. Values that are no text are left out.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|element| !element.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn hop_by_hop_headers_go_and_what_connection_names_too() {
        let mut given = headers(&[
            ("connection", "close, X-Once"),
            ("connection", "host, content-length"),
            ("keep-alive", "timeout=5"),
            ("x-once", "1"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("host", "shop"),
            ("content-length", "3"),
            ("trailer", "x-sum"),
            ("x-stays", "1"),
        ]);
        strip_hop_by_hop(&mut given);
        let expected = headers(&[
            ("host", "shop"),
            ("content-length", "3"),
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("x-stays", "1"),
        ]);
        assert_eq!(given, expected);
    }

    #[test]
    fn an_upgrade_needs_both_headers_and_is_never_h2c() {
        let ws = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ];
        assert!(wanted_upgrade(&headers(&ws)).is_some_and(|u| is_websocket(&u)));
        assert_eq!(wanted_upgrade(&headers(&ws[1..])), None);
        assert_eq!(wanted_upgrade(&headers(&ws[..1])), None);
        let h2c = [
            ("connection", "upgrade, http2-settings"),
            ("upgrade", "h2c"),
        ];
        assert_eq!(wanted_upgrade(&headers(&h2c)), None);
    }

    #[test]
    fn only_chunked_is_a_known_coding() {
        assert!(transfer_encoding_is_known(&headers(&[])));
        assert!(transfer_encoding_is_known(&headers(&[(
            "transfer-encoding",
            "Chunked"
        )])));
        assert!(!transfer_encoding_is_known(&headers(&[(
            "transfer-encoding",
            "gzip, chunked"
        )])));
    }

    #[test]
    fn the_client_is_added_at_the_edge_only() {
        let client = IpAddr::from([10, 0, 0, 9]);
        let mut fresh = HeaderMap::new();
        forwarded(&mut fresh, client, Some("shop:8080"), false);
        let expected = headers(&[
            ("x-forwarded-for", "10.0.0.9"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "shop:8080"),
        ]);
        assert_eq!(fresh, expected);

        let given = [
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "5.6.7.8"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a"),
        ];
        let mut inside = headers(&given);
        forwarded(&mut inside, client, Some("b"), false);
        assert_eq!(inside, headers(&given));
        let mut edge = headers(&given);
        forwarded(
            &mut edge,
            "::ffff:10.0.0.9".parse().unwrap(),
            Some("b"),
            true,
        );
        let all: Vec<_> = edge.get_all("x-forwarded-for").iter().collect();
        assert_eq!(all, ["1.2.3.4, 5.6.7.8, 10.0.0.9"]);
        assert_eq!(edge["x-forwarded-proto"], "https");
    }

    #[test]
    fn cookies_of_http2_are_joined() {
        let mut given = headers(&[("cookie", "a=1"), ("cookie", "b=2")]);
        join_cookies(&mut given);
        assert_eq!(given, headers(&[("cookie", "a=1; b=2")]));
    }
}
