//! One request to the instance, and those that it is redirected to.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use base64::Engine as _;
use kiln_model::suite::HttpProbe;
use serde_json::json;

use super::Found;
use super::inside::Inside;
use crate::test::MAX_TEXT_BYTES;

/// As many as Go follows.
const MAX_REDIRECTS: usize = 10;

/// An answer, by HTTP/1.0: it ends with the connection.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

pub(super) fn look(inside: &Inside<'_>, request: &HttpProbe) -> Result<Found, String> {
    let mut next = request.clone();
    for _ in 0..=MAX_REDIRECTS {
        let answer = ask(inside, &next)?;
        let location = answer.headers.iter().find(|(name, _)| name == "Location");
        let location = location.filter(|_| request.follow && is_redirect(answer.status));
        match location {
            None => return Ok(found(&answer)),
            Some((_, target)) => redirect(&mut next, target, answer.status)?,
        }
    }
    Err(format!("it was redirected more than {MAX_REDIRECTS} times"))
}

fn is_redirect(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
}

fn found(answer: &Answer) -> Found {
    let mut lines: Vec<String> = answer
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    lines.sort();
    Found::from([
        ("status", json!(answer.status)),
        ("headers", json!(lines.join("\n"))),
        ("body", json!(answer.body)),
    ])
}

fn redirect(next: &mut HttpProbe, target: &str, status: u16) -> Result<(), String> {
    if let Some(rest) = target.strip_prefix("http://") {
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = authority.split_once(':').unwrap_or((authority, "80"));
        next.host = host.to_owned();
        next.port = port
            .parse()
            .map_err(|_| format!("redirected to {target}"))?;
        next.path = format!("/{path}");
    } else if target.starts_with('/') {
        next.path = target.to_owned();
    } else {
        return Err(format!(
            "it was redirected to {target}, which can't be followed"
        ));
    }
    if matches!(status, 301..=303) && next.method != "HEAD" {
        next.method = "GET".into();
        next.body.clear();
    }
    Ok(())
}

fn ask(inside: &Inside<'_>, request: &HttpProbe) -> Result<Answer, String> {
    let (host, port) = (&request.host, request.port);
    if !inside.is_own(host)? {
        return Err(format!("{host} can't be reached from an isolated test"));
    }
    let stream = inside.runtime.dial(inside.id, port);
    let mut stream = stream.map_err(|e| format!("can't connect to port {port}: {e}"))?;
    let limit = Some(Duration::from(request.timeout));
    let limited = stream
        .set_read_timeout(limit)
        .and_then(|()| stream.set_write_timeout(limit));
    limited.map_err(|e| e.to_string())?;
    let sent = stream.write_all(text(request).as_bytes());
    sent.map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    let read = stream.take(MAX_TEXT_BYTES).read_to_end(&mut bytes);
    answer(&bytes).ok_or_else(|| match read {
        Err(e) => format!("no HTTP answer: {e}"),
        Ok(_) => "no HTTP answer".to_owned(),
    })
}

fn text(request: &HttpProbe) -> String {
    let has = |name: &str| {
        let mut all = request.headers.iter();
        all.any(|(known, _)| known.eq_ignore_ascii_case(name))
    };
    let mut text = format!("{} {} HTTP/1.0\r\n", request.method, request.path);
    if !has("Host") {
        text.push_str(&format!("Host: {}:{}\r\n", request.host, request.port));
    }
    if !has("User-Agent") {
        text.push_str("User-Agent: kiln\r\n");
    }
    if let Some((user, password)) = &request.login {
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        text.push_str(&format!("Authorization: Basic {login}\r\n"));
    }
    if !request.body.is_empty() {
        text.push_str(&format!("Content-Length: {}\r\n", request.body.len()));
    }
    for (name, value) in &request.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{text}\r\n{}", request.body)
}

fn answer(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.get(2..5)?.parse();
    let headers = lines.filter_map(|line| line.split_once(':'));
    Some(Answer {
        status: status.ok()?,
        headers: headers
            .map(|(name, value)| (canonical(name), value.trim().to_owned()))
            .collect(),
        body: String::from_utf8_lossy(&bytes[end + 4..]).into_owned(),
    })
}

/// `content-type` → `Content-Type`, as Go gives them.
fn canonical(name: &str) -> String {
    let parts = name.split('-').map(|part| {
        let mut letters = part.chars();
        let first = letters.next().map(|c| c.to_ascii_uppercase());
        let rest = letters.map(|c| c.to_ascii_lowercase());
        first.into_iter().chain(rest).collect::<String>()
    });
    parts.collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::Millis;

    fn request() -> HttpProbe {
        HttpProbe {
            host: "localhost".into(),
            port: 80,
            path: "/a?b".into(),
            method: "PUT".into(),
            headers: vec![("X-A".into(), "b".into())],
            login: Some(("u".into(), "p".into())),
            body: "{}".into(),
            follow: true,
            timeout: Millis(1),
        }
    }

    #[test]
    fn requests_and_answers_are_as_written() {
        assert_eq!(
            text(&request()),
            "PUT /a?b HTTP/1.0\r\nHost: localhost:80\r\nUser-Agent: kiln\r\n\
             Authorization: Basic dTpw\r\nContent-Length: 2\r\nX-A: b\r\n\r\n{}"
        );
        let found = answer(b"HTTP/1.1 201 Created\r\ncontent-type: a\r\nETag: b\r\n\r\nbody");
        let found = super::found(&found.unwrap());
        assert_eq!(found["status"], 201);
        assert_eq!(found["headers"], "Content-Type: a\nEtag: b");
        assert_eq!(found["body"], "body");
        assert!(answer(b"SSH-2.0\r\n\r\n").is_none());
    }

    #[test]
    fn redirects_are_followed_where_they_lead() {
        let mut next = request();
        redirect(&mut next, "/c", 307).unwrap();
        assert_eq!((next.method.as_str(), next.path.as_str()), ("PUT", "/c"));
        redirect(&mut next, "http://other:81/d?e", 302).unwrap();
        assert_eq!((next.host.as_str(), next.port), ("other", 81));
        assert_eq!((next.method.as_str(), next.body.as_str()), ("GET", ""));
        assert_eq!(next.path, "/d?e");
        assert!(redirect(&mut next, "https://x/", 302).is_err());
    }
}
