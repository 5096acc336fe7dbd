//! HTTP in detail.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kiln_model::Millis;
use kiln_model::route::AppProtocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{App, Instance, Proxy, get, raw};

const SOON: Duration = Duration::from_secs(3);

async fn serving(app: App) -> (Proxy, Instance) {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, app);
    proxy.serve(&[&instance]).await;
    (proxy, instance)
}

async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut answer = Vec::new();
    let read = timeout(SOON, async {
        while !answer.ends_with(end.as_bytes()) {
            answer.push(stream.read_u8().await?);
        }
        Ok::<_, std::io::Error>(())
    });
    let outcome = read.await;
    let text = String::from_utf8_lossy(&answer).into_owned();
    assert!(matches!(outcome, Ok(Ok(()))), "{outcome:?} after {text:?}");
    text
}

#[tokio::test]
async fn the_instance_hears_for_whom_it_works_and_nothing_of_the_connection() {
    let (proxy, _instance) = serving(App::Http).await;
    let request = "GET /headers?a=b%20c HTTP/1.1\r\nHost: shop.test:81\r\nConnection: close, x-hop\r\n\
                   X-Hop: 1\r\nKeep-Alive: timeout=3\r\nX-Forwarded-For: 9.9.9.9\r\nX-Own: 2\r\n\r\n";
    let answer = raw(proxy.listen, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("GET /headers?a=b%20c HTTP/1.1"), "{answer}");
    for line in [
        r#""host": "shop.test:81""#,
        r#""x-forwarded-for": "9.9.9.9, 127."#,
        r#""x-forwarded-proto": "http""#,
        r#""x-forwarded-host": "shop.test:81""#,
        r#""x-own": "2""#,
    ] {
        assert!(answer.contains(line), "{line} is not in {answer}");
    }
    assert!(
        !answer.contains("x-hop") && !answer.contains("keep-alive"),
        "{answer}"
    );
}

#[tokio::test]
async fn without_instances_it_is_unavailable_and_the_service_is_named() {
    let mut proxy = Proxy::start().await;
    proxy.serve(&[]).await;
    let answer = get(proxy.listen, "/").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
    assert!(
        answer.contains("service `web` of `shop` has no instance"),
        "{answer}"
    );
    proxy.park(Millis(200)).await;
    let answer = get(proxy.listen, "/").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.contains("`web`") && answer.contains("not ready in time"),
        "{answer}"
    );
}

#[tokio::test]
async fn an_instance_that_refuses_or_breaks_off_is_a_bad_gateway() {
    let (mut proxy, instance) = serving(App::Http).await;
    let gone = Instance::start(&proxy.net, App::Http);
    let mut backend = gone.backend();
    drop(gone);
    proxy.web().backends = vec![backend.clone()];
    proxy.apply().await;
    let answer = get(proxy.listen, "/").await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(
        answer.contains("`web`") && answer.contains("refuses connections"),
        "{answer}"
    );
    // Together with one that works it is not noticed.
    backend.instance = "web-other".parse().unwrap();
    proxy.web().backends = vec![backend, instance.backend()];
    proxy.apply().await;
    for _ in 0..4 {
        assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn half_an_answer_is_not_passed_off_as_whole() {
    let (proxy, _instance) = serving(App::Http).await;
    let answer = get(proxy.listen, "/half").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(
        answer.contains("part") && !answer.ends_with("0\r\n\r\n"),
        "{answer}"
    );
    let status = proxy.client.status().await.unwrap();
    let web = &status.environments["shop"].services["web"];
    assert_eq!(web.failures.half_answer, 1);
    assert_eq!(web.instances[0].in_flight, 0);
    assert_eq!(web.instances[0].requests, 1);
}

#[tokio::test]
async fn a_request_that_is_killed_before_its_answer_is_not_repeated() {
    let (mut proxy, instance) = serving(App::Http).await;
    let other = Instance::start(&proxy.net, App::Http);
    let request = tokio::spawn(get(proxy.listen, "/slow?5000"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.serve(&[&instance, &other]).await;
    drop(instance);
    let answer = request.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(answer.contains("without an answer"), "{answer}");
}

#[tokio::test]
async fn at_the_drain_limit_requests_are_cut_and_counted() {
    let (mut proxy, old) = serving(App::Http).await;
    let new = Instance::start(&proxy.net, App::Http);
    let request = tokio::spawn(get(proxy.listen, "/slow?60000"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.serve(&[&new]).await;
    assert_eq!(proxy.drain(&old, Duration::from_millis(200)).await, 1);
    let answer = request.await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 502 ") && answer.contains("drain limit"),
        "{answer}"
    );
}

#[tokio::test]
async fn head_has_a_length_and_no_body_and_the_connection_goes_on() {
    let (proxy, instance) = serving(App::Http).await;
    let mut stream = proxy.connect().await;
    let head = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "\r\n\r\n").await;
    let length = format!("content-length: {}\r\n", instance.id.as_str().len() + 1);
    assert!(answer.contains(&length), "{answer}");
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    let answer = read_until(&mut stream, &format!("\r\n\r\n{}\n", instance.id)).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn pipelined_requests_and_old_clients_are_answered() {
    let (proxy, instance) = serving(App::Http).await;
    let two =
        "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = raw(proxy.listen, two).await;
    assert_eq!(answer.matches(instance.id.as_str()).count(), 4, "{answer}");
    let answer = raw(proxy.listen, "GET /trailers HTTP/1.0\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.0 200 ") && answer.ends_with("\r\n\r\nbody"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_body_is_asked_for_by_the_instance_not_by_the_proxy() {
    let (proxy, _instance) = serving(App::Http).await;
    let head = |path: &str| {
        format!(
            "PUT {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    let mut stream = proxy.connect().await;
    stream.write_all(head("/count").as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 100 "), "{answer}");
    stream.write_all(b"body").await.unwrap();
    let answer = read_until(&mut stream, "\r\n\r\n4").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

    let mut stream = proxy.connect().await;
    stream.write_all(head("/refuse").as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "too large").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let status = proxy.client.status().await.unwrap();
    let web = &status.environments["shop"].services["web"];
    assert_eq!(web.instances[0].in_flight, 0);
}

#[tokio::test]
async fn trailers_pass_both_kinds_of_http() {
    for app in [App::Http, App::H2c] {
        let (mut proxy, instance) = serving(app).await;
        if app == App::H2c {
            proxy.protocol(AppProtocol::H2c);
            proxy.serve(&[&instance]).await;
        }
        let (mut sender, connection) = http1::handshake(TokioIo::new(proxy.connect().await))
            .await
            .unwrap();
        tokio::spawn(connection);
        let request = Request::get("/trailers")
            .header("host", "a")
            .header("te", "trailers")
            .header("connection", "te")
            .body(Full::<Bytes>::default())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let body = response.into_body().collect().await.unwrap();
        let trailers = body.trailers().cloned();
        assert_eq!(trailers.expect("trailers")["x-sum"], "42", "{app:?}");
        assert_eq!(body.to_bytes(), "body");
    }
}

#[tokio::test]
async fn http2_is_recognised_and_balanced_request_by_request() {
    for known in [false, true] {
        let mut proxy = Proxy::start().await;
        if known {
            proxy.protocol(AppProtocol::H2c);
        }
        let instances = [(); 3].map(|()| Instance::start(&proxy.net, App::H2c));
        proxy.serve(&instances.each_ref()).await;
        let io = TokioIo::new(proxy.connect().await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        let mut by = std::collections::BTreeSet::new();
        for _ in 0..12 {
            let mut sender = sender.clone();
            let request = Request::builder()
                .method(Method::POST)
                .version(Version::HTTP_2)
                .uri("http://shop.test/echo")
                .body(Full::new(Bytes::from("grpc")))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            by.insert(response.headers()["x-instance"].clone());
            let body = response.into_body().collect().await.unwrap();
            assert_eq!(body.to_bytes(), "grpc");
        }
        assert_eq!(by.len(), 3);
        // A swap is not seen on this connection either.
        let new = Instance::start(&proxy.net, App::H2c);
        proxy.serve(&[&new]).await;
        for old in instances {
            assert_eq!(proxy.drain(&old, SOON).await, 0);
        }
        let request = Request::get("http://shop.test/headers")
            .body(Full::<Bytes>::default())
            .unwrap();
        let response = sender.clone().send_request(request).await.unwrap();
        assert_eq!(response.headers()["x-instance"], new.id.as_str());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains("http://shop.test/headers HTTP/2.0"), "{text}");
    }
}

#[tokio::test]
async fn http2_clients_reach_instances_of_http1() {
    let (mut proxy, instance) = serving(App::Http).await;
    proxy.protocol(AppProtocol::Http);
    proxy.serve(&[&instance]).await;
    let io = TokioIo::new(proxy.connect().await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://shop.test/headers")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(Full::new(Bytes::from("x")))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(body.to_vec()).unwrap();
    assert!(text.contains("POST /headers HTTP/1.1"), "{text}");
    assert!(text.contains(r#""host": "shop.test""#), "{text}");
    assert!(text.contains(r#""cookie": "a=1; b=2""#), "{text}");
}

#[tokio::test]
async fn a_slow_reader_slows_the_instance_and_not_the_memory() {
    let (proxy, _instance) = serving(App::Http).await;
    let mut stream = proxy.connect().await;
    let size = 64 * 1024 * 1024;
    let head = format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    // Nothing is read: sending must come to a halt by itself.
    let chunk = vec![1u8; 64 * 1024];
    let mut sent = 0;
    while timeout(Duration::from_millis(500), stream.write_all(&chunk))
        .await
        .is_ok()
    {
        sent += chunk.len();
        assert!(sent < size, "all was taken although nothing is read");
    }
}

#[tokio::test]
async fn what_can_not_be_meant_is_refused() {
    let (proxy, _instance) = serving(App::Http).await;
    let big = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(70_000)
    );
    let cases = [
        (
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            " 501 ",
        ),
        (big.as_str(), " 431 "),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            " 400 ",
        ),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", " 400 "),
    ];
    for (request, status) in cases {
        let answer = raw(proxy.listen, request).await;
        let line = answer.lines().next().unwrap_or_default().to_owned();
        assert!(line.contains(status), "{status}: {line}");
    }
    // Both lengths: the length is not believed, and nothing is left for a second request.
    let smuggled = "POST /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\
                    Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n";
    let answer = raw(proxy.listen, smuggled).await;
    assert!(!answer.contains("evil"), "{answer}");
}

#[tokio::test]
async fn a_client_that_goes_away_frees_the_instance() {
    let (proxy, _instance) = serving(App::Http).await;
    let mut stream = proxy.connect().await;
    let request = "GET /slow?60000 HTTP/1.1\r\nHost: a\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let in_flight = async || {
        let status = proxy.client.status().await.unwrap();
        status.environments["shop"].services["web"].instances[0].in_flight
    };
    assert_eq!(in_flight().await, 1);
    drop(stream);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(in_flight().await, 0);
}

#[tokio::test]
async fn idle_connections_to_a_retired_instance_are_closed() {
    let mut proxy = Proxy::start().await;
    proxy.protocol(AppProtocol::Http);
    let listener = tokio::net::TcpListener::bind((proxy.net.address(), crate::support::PORT))
        .await
        .unwrap();
    proxy.web().backends = vec![kiln_model::route::Backend {
        instance: "web-idle".parse().unwrap(),
        address: listener.local_addr().unwrap().ip(),
    }];
    proxy.apply().await;
    // One goes on, so that the instance is not forgotten; the other is done.
    let long = tokio::spawn(get(proxy.listen, "/"));
    let (mut busy, _) = listener.accept().await.unwrap();
    read_until(&mut busy, "\r\n\r\n").await;
    let short = tokio::spawn(get(proxy.listen, "/"));
    let (mut idle, _) = listener.accept().await.unwrap();
    read_until(&mut idle, "\r\n\r\n").await;
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    idle.write_all(answer).await.unwrap();
    assert!(short.await.unwrap().ends_with("ok"));
    let mut byte = [0u8; 1];
    let kept = timeout(Duration::from_millis(200), idle.read(&mut byte)).await;
    assert!(kept.is_err(), "it was not kept for the next request");
    proxy.serve(&[]).await;
    assert_eq!(
        timeout(SOON, idle.read(&mut byte)).await.unwrap().unwrap(),
        0
    );
    busy.write_all(answer).await.unwrap();
    assert!(long.await.unwrap().ends_with("ok"));
    // And it does not come back to the pool.
    assert_eq!(
        timeout(SOON, busy.read(&mut byte)).await.unwrap().unwrap(),
        0
    );
}

#[tokio::test]
async fn an_answer_in_two_parts_does_not_wait_for_acknowledgements() {
    let mut proxy = Proxy::start().await;
    proxy.protocol(AppProtocol::Http);
    let listener = tokio::net::TcpListener::bind((proxy.net.address(), crate::support::PORT))
        .await
        .unwrap();
    proxy.web().backends = vec![kiln_model::route::Backend {
        instance: "web-plain".parse().unwrap(),
        address: listener.local_addr().unwrap().ip(),
    }];
    proxy.apply().await;
    tokio::spawn(async move {
        // One connection for all, without TCP_NODELAY.
        let (mut upstream, _) = listener.accept().await.unwrap();
        loop {
            read_until(&mut upstream, "\r\n\r\n").await;
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
            upstream.write_all(head).await.unwrap();
            upstream.write_all(b"o").await.unwrap();
            upstream.write_all(b"k").await.unwrap();
        }
    });
    let mut times = Vec::new();
    for _ in 0..40 {
        let begun = std::time::Instant::now();
        assert!(get(proxy.listen, "/").await.ends_with("ok"));
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    assert!(times[20] < Duration::from_millis(30), "{times:?}");
}
