//! Asks a Prometheus server for the one value of an instant query, over plain HTTP.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{HOST, USER_AGENT};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use kiln_model::spec::Prometheus;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long it may take to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// An answer with one value is far shorter.
const LARGEST_ANSWER: usize = 64 << 10;
const PORT: u16 = 80;

/// The value, or why there is none.
pub async fn value(prometheus: &Prometheus) -> Result<f64, String> {
    let answered = timeout(LIMIT, ask(prometheus)).await;
    let answered = answered.unwrap_or_else(|_| Err(format!("no answer within {LIMIT:?}")));
    answered.map_err(|why| format!("{}: {why}", prometheus.url))
}

async fn ask(prometheus: &Prometheus) -> Result<f64, String> {
    let said = |e: &dyn std::fmt::Display| e.to_string();
    let uri: Uri = prometheus.url.parse().map_err(|e| said(&e))?;
    let host = uri.host().ok_or("it names no host")?;
    let address = (
        host.trim_matches(['[', ']']),
        uri.port_u16().unwrap_or(PORT),
    );
    let stream = TcpStream::connect(address).await.map_err(|e| said(&e))?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| said(&e))?;
    let connection = tokio::spawn(connection);
    let path = format!(
        "{}/api/v1/query?query={}",
        uri.path().trim_end_matches('/'),
        escaped(&prometheus.query)
    );
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let request = Request::get(path)
        .header(HOST, authority)
        .header(USER_AGENT, "kiln")
        .body(Empty::<Bytes>::new())
        .map_err(|e| said(&e))?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|e| said(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), LARGEST_ANSWER);
        let body = body.collect().await.map_err(|e| said(&e))?.to_bytes();
        // An error has a body that says more than its status.
        read(&body).map_err(|why| match status.is_success() {
            true => why,
            false => format!("{status}: {why}"),
        })
    };
    let read = exchange.await;
    connection.abort();
    read
}

/// RFC 3986: everything but unreserved characters.
fn escaped(query: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let mut text = String::new();
    for byte in query.bytes() {
        match plain(byte) {
            true => text.push(char::from(byte)),
            false => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[derive(Deserialize)]
struct Answer {
    data: Option<Data>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "resultType")]
    kind: String,
    result: serde_json::Value,
}

#[derive(Deserialize)]
struct Sample {
    value: Point,
}

/// A time, and the number as text (`NaN` and `+Inf` are numbers here).
#[derive(Deserialize)]
struct Point(#[allow(dead_code)] serde_json::Number, String);

fn read(body: &[u8]) -> Result<f64, String> {
    let answer: Answer =
        serde_json::from_slice(body).map_err(|e| format!("not Prometheus' answer: {e}"))?;
    if let Some(error) = answer.error {
        return Err(error);
    }
    let data = answer.data.ok_or("it has no data")?;
    let unreadable = |e: serde_json::Error| format!("not Prometheus' answer: {e}");
    let point = match data.kind.as_str() {
        "scalar" => serde_json::from_value(data.result).map_err(unreadable)?,
        "vector" => {
            let samples: Vec<Sample> = serde_json::from_value(data.result).map_err(unreadable)?;
            let count = samples.len();
            match <[Sample; 1]>::try_from(samples) {
                Ok([sample]) => sample.value,
                Err(_) => return Err(format!("the query has {count} values instead of one")),
            }
        }
        other => {
            return Err(format!(
                "the query's answer is no single value but a {other}"
            ));
        }
    };
    let Point(_, text) = point;
    text.parse().map_err(|_| format!("`{text}` is no number"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn of(result: &str) -> Result<f64, String> {
        read(format!(r#"{{"status":"success","data":{result}}}"#).as_bytes())
    }

    #[test]
    fn one_value_is_read_and_anything_else_is_said() {
        let one = r#"{"resultType":"vector","result":[{"metric":{"a":"b"},"value":[1.5,"0.25"]}]}"#;
        assert_eq!(of(one), Ok(0.25));
        let scalar = r#"{"resultType":"scalar","result":[1435781451.781,"2"]}"#;
        assert_eq!(of(scalar), Ok(2.0));
        assert!(of(&one.replace("0.25", "NaN")).unwrap().is_nan());
        let none = r#"{"resultType":"vector","result":[]}"#;
        assert!(of(none).unwrap_err().contains("0 values"));
        let matrix = r#"{"resultType":"matrix","result":[]}"#;
        assert!(of(matrix).unwrap_err().contains("no single value"));
        let error = br#"{"status":"error","errorType":"bad_data","error":"parse error"}"#;
        assert_eq!(read(error), Err("parse error".into()));
        assert!(
            read(b"<html>")
                .unwrap_err()
                .contains("not Prometheus' answer")
        );
    }

    #[tokio::test]
    async fn it_is_asked_over_http() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/prefix", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            let body = r#"{"status":"success","data":{"resultType":"scalar","result":[1,"7"]}}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(request).unwrap()
        });
        let asked = Prometheus {
            url: url.clone(),
            query: "rate(x{a=\"b\"}[1m])".into(),
            min: None,
            max: None,
        };
        assert_eq!(value(&asked).await, Ok(7.0));
        let request = server.await.unwrap();
        let line = "GET /prefix/api/v1/query?query=rate%28x%7Ba%3D%22b%22%7D%5B1m%5D%29 HTTP/1.1";
        assert!(request.starts_with(line), "{request}");
        // Nobody listens there any more.
        assert!(value(&asked).await.unwrap_err().starts_with(&url));
    }
}
