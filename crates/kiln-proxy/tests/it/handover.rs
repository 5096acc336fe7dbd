//! Another proxy takes over: nothing is refused, nothing is cut.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use hyper::Method;
use kiln_model::Millis;
use kiln_model::route::{AppProtocol, Published};
use kiln_model::spec::Protocol;
use kiln_testkit::load::{Load, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::oneshot;

use crate::support::{App, Instance, PORT, Proxy, ends, get};

/// A request on a connection that stays, and the answer's head and body.
async fn ask(stream: &mut TcpStream, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut byte = [0u8; 1];
    while !answer.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).await.unwrap(), 1, "{answer:?}");
        answer.push(byte[0]);
    }
    let head = String::from_utf8(answer).unwrap();
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
        .unwrap();
    let mut body = vec![0u8; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    head + &String::from_utf8(body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_nothing_is_lost() {
    for mode in [Mode::NewConnection, Mode::KeepAlive { connections: 10 }] {
        let mut proxy = Proxy::start().await;
        let instance = Instance::start(&proxy.net, App::Http);
        proxy.serve(&[&instance]).await;
        let load = Load::new(proxy.listen, 300, mode).send(Method::POST, "/echo", "x");
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(load.run(async {
            let _ = stopped.await;
        }));
        let mut old = Vec::new();
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            old.push(proxy.hand_over().await);
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        stop.send(()).unwrap();
        let report = running.await.unwrap();
        assert_eq!(report.failed(), 0, "{report}");
        assert!(report.requests() > 400, "{report}");
        for old in old {
            ends(old).await;
        }
        assert_eq!(proxy.retired(), 0);
    }
}

#[tokio::test]
async fn what_is_open_stays_with_the_old_one_until_it_ends() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Greets);
    proxy.protocol(AppProtocol::Tcp);
    proxy.serve(&[&instance]).await;
    let mut stream = proxy.connect().await;
    let mut greeting = [0u8; 6];
    stream.read_exact(&mut greeting).await.unwrap();
    let old = proxy.hand_over().await;
    let older = proxy.hand_over().await;
    let mut answer = [0u8; 5];
    stream.write_all(b"still").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"still");
    // The one in between had nothing, and is gone.
    ends(older).await;
    assert_eq!((proxy.retired(), old.is_finished()), (1, false));
    let mut fresh = proxy.connect().await;
    fresh.read_exact(&mut greeting).await.unwrap();
    drop(stream);
    ends(old).await;
    assert_eq!(proxy.retired(), 0);
}

/// They are carried by the old one, and end with a close frame when that ends as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_stay_with_the_old_one_until_they_end() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mode = Mode::Websocket { connections: 5 };
    let load = Load::new(proxy.listen, 100, mode).send(Method::GET, "/ws", "");
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(load.run(async {
        let _ = stopped.await;
    }));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let old = proxy.hand_over().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((proxy.retired(), old.is_finished()), (1, false));
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert_eq!((report.failed(), report.connections), (0, 5), "{report}");
    assert_eq!(report.closed_websockets, [].into(), "{report}");
    ends(old).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_ends_says_goodbye_to_websockets() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mode = Mode::Websocket { connections: 5 };
    let load = Load::new(proxy.listen, 100, mode).send(Method::GET, "/ws", "");
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(load.run(async {
        let _ = stopped.await;
    }));
    tokio::time::sleep(Duration::from_millis(500)).await;
    proxy.restart().await;
    proxy.serve(&[&instance]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert_eq!(
        report.closed_websockets,
        [(Some(1001), 5)].into(),
        "{report}"
    );
}

#[tokio::test]
async fn its_kept_connections_follow_new_tables_and_are_asked_to_go() {
    let mut proxy = Proxy::start().await;
    let first = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&first]).await;
    let mut kept = proxy.connect().await;
    let answer = ask(&mut kept, "/").await;
    assert!(answer.contains(first.id.as_str()) && !answer.contains("connection: close"));
    let old = proxy.hand_over().await;
    let second = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&second]).await;
    assert_eq!(proxy.drain(&first, Duration::from_secs(5)).await, 0);
    drop(first);
    let answer = ask(&mut kept, "/").await;
    assert!(answer.contains(second.id.as_str()), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    ends(old).await;
}

#[tokio::test]
async fn those_who_wait_in_the_old_one_are_served_when_parking_ends() {
    let mut proxy = Proxy::start().await;
    proxy.park(Millis(10_000)).await;
    let listen = proxy.listen;
    let waiting = tokio::spawn(async move { get(listen, "/").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let old = proxy.hand_over().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    assert!(waiting.await.unwrap().starts_with("HTTP/1.1 200"));
    ends(old).await;
}

#[tokio::test]
async fn a_drain_waits_for_what_the_old_one_holds_and_cuts_it() {
    let mut proxy = Proxy::start().await;
    let first = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&first]).await;
    let listen = proxy.listen;
    let slow = tokio::spawn(async move { get(listen, "/slow?1500").await });
    let endless = tokio::spawn(async move { get(listen, "/slow?60000").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let old = proxy.hand_over().await;
    let second = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&second]).await;
    assert_eq!(proxy.drain(&first, Duration::from_secs(3)).await, 1);
    assert!(slow.await.unwrap().ends_with("slow"));
    assert!(!endless.await.unwrap().ends_with("slow"));
    ends(old).await;
}

#[tokio::test]
async fn datagrams_go_on_and_late_answers_still_come() {
    let mut proxy = Proxy::start().await;
    let backend = UdpSocket::bind((proxy.net.address(), PORT)).await.unwrap();
    let instance = Instance::start(&proxy.net, App::Silent);
    let mut route = crate::support::route(&[&instance]);
    route.backends[0].address = backend.local_addr().unwrap().ip();
    proxy.table.services.insert("web".parse().unwrap(), route);
    proxy.table.published.push(Published {
        protocol: Protocol::Udp,
        ..proxy.table.published[0].clone()
    });
    assert_eq!(proxy.apply().await.failed, []);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(proxy.listen).await.unwrap();
    let mut buffer = [0u8; 16];
    client.send(b"one").await.unwrap();
    let (_, asker) = backend.recv_from(&mut buffer).await.unwrap();
    let _old = proxy.hand_over().await;
    backend.send_to(b"late", asker).await.unwrap();
    let n = client.recv(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..n], b"late");
    client.send(b"two").await.unwrap();
    let (n, next) = backend.recv_from(&mut buffer).await.unwrap();
    assert_eq!((&buffer[..n], next != asker), (&b"two"[..], true));
}

#[tokio::test]
async fn one_that_dies_before_it_serves_changes_nothing() {
    use std::io::{Read, Write};
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mut control = UnixStream::connect(&proxy.config.socket).unwrap();
    control.write_all(b"\"take_over\"\n").unwrap();
    let mut answer = [0u8; 512];
    let n = control.read(&mut answer).unwrap();
    assert!(n > 0);
    drop(control);
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200"));
    proxy.serve(&[&instance]).await;
}

#[tokio::test]
async fn one_that_is_started_anew_leads_the_retired_it_finds() {
    let mut proxy = Proxy::start().await;
    let first = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&first]).await;
    let mut kept = proxy.connect().await;
    ask(&mut kept, "/").await;
    let old = proxy.hand_over().await;
    // What a proxy leaves behind that was killed.
    let dead = proxy.config.socket.with_extension("before-7");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    proxy.restart().await;
    let second = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&second]).await;
    assert!(!dead.exists());
    assert!(ask(&mut kept, "/").await.contains(second.id.as_str()));
    ends(old).await;
}
