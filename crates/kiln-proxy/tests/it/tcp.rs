//! What is not HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use kiln_model::Millis;
use kiln_model::route::{AppProtocol, Published};
use kiln_model::spec::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::support::{App, Instance, PORT, Proxy};

const SOON: Duration = Duration::from_secs(2);

async fn read(stream: &mut tokio::net::TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; n];
    let read = timeout(SOON, stream.read_exact(&mut bytes)).await;
    read.expect("in time").unwrap();
    bytes
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&instance]).await;
    for _ in 0..3 {
        let mut stream = proxy.connect().await;
        assert_eq!(read(&mut stream, 6).await, b"hello\n");
        // Looks like HTTP, but it was raw before.
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!(read(&mut stream, 18).await, b"GET / HTTP/1.1\r\n\r\n");
    }
}

#[tokio::test]
async fn a_client_may_speak_first_and_without_a_line_end() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Echo);
    proxy.serve(&[&instance]).await;
    for first in [
        &b"\x16\x03\x01\0"[..],
        b"PING\r\n",
        b"GET key\r\n",
        b"GET",
        b"GET k",
    ] {
        let mut stream = proxy.connect().await;
        stream.write_all(first).await.unwrap();
        assert_eq!(read(&mut stream, first.len()).await, first);
    }
    // Before the proxy can have connected to anybody, and later.
    for pause in [0, 100] {
        let mut stream = proxy.connect().await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        stream.write_all(b"*1\r\n").await.unwrap();
        assert_eq!(read(&mut stream, 4).await, b"*1\r\n");
    }
}

#[tokio::test]
async fn a_closed_direction_leaves_the_other_open() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&instance]).await;
    let mut stream = proxy.connect().await;
    stream.shutdown().await.unwrap();
    let mut all = Vec::new();
    timeout(SOON, stream.read_to_end(&mut all))
        .await
        .expect("in time")
        .unwrap();
    assert_eq!(all, b"hello\n");
}

#[tokio::test]
async fn a_known_raw_port_is_not_looked_into() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Echo);
    proxy.protocol(AppProtocol::Tcp);
    proxy.serve(&[&instance]).await;
    let mut stream = proxy.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(read(&mut stream, 18).await, b"GET / HTTP/1.1\r\n\r\n");
}

#[tokio::test]
async fn raw_connections_wait_while_parked() {
    let mut proxy = Proxy::start().await;
    proxy.park(Millis(10_000)).await;
    let mut first = proxy.connect().await;
    let mut second = proxy.connect().await;
    first.write_all(b"\x01early").await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let instance = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&instance]).await;
    assert_eq!(read(&mut first, 12).await, b"hello\n\x01early");
    assert_eq!(read(&mut second, 6).await, b"hello\n");
}

#[tokio::test]
async fn the_refused_and_the_parked_for_too_long_are_closed() {
    let mut proxy = Proxy::start().await;
    proxy.protocol(AppProtocol::Tcp);
    proxy.serve(&[]).await;
    let mut stream = proxy.connect().await;
    let mut byte = [0u8; 1];
    assert_eq!(
        timeout(SOON, stream.read(&mut byte))
            .await
            .unwrap()
            .unwrap(),
        0
    );
    proxy.park(Millis(100)).await;
    let mut stream = proxy.connect().await;
    assert_eq!(
        timeout(SOON, stream.read(&mut byte))
            .await
            .unwrap()
            .unwrap(),
        0
    );
    let status = proxy.client.status().await.unwrap();
    let failures = status.environments["shop"].services["web"].failures;
    assert_eq!((failures.no_backend, failures.park_timeout), (1, 1));
}

#[tokio::test]
async fn at_the_drain_limit_raw_connections_are_cut_and_counted() {
    let mut proxy = Proxy::start().await;
    let old = Instance::start(&proxy.net, App::Greets);
    let new = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&old]).await;
    let mut streams = Vec::new();
    for _ in 0..7 {
        let mut stream = proxy.connect().await;
        read(&mut stream, 6).await;
        streams.push(stream);
    }
    proxy.serve(&[&new]).await;
    // They go on meanwhile.
    for stream in &mut streams {
        stream.write_all(b"still").await.unwrap();
        assert_eq!(read(stream, 5).await, b"still");
    }
    drop(streams.pop());
    let status = proxy.client.status().await.unwrap();
    assert_eq!(status.draining.len(), 1);
    assert_eq!(proxy.drain(&old, Duration::from_millis(300)).await, 6);
    let mut byte = [0u8; 1];
    for mut stream in streams {
        assert_eq!(
            timeout(SOON, stream.read(&mut byte))
                .await
                .unwrap()
                .unwrap(),
            0
        );
    }
}

#[tokio::test]
async fn a_silent_connection_moves_to_the_new_instance() {
    let mut proxy = Proxy::start().await;
    let old = Instance::start(&proxy.net, App::Silent);
    proxy.serve(&[&old]).await;
    let mut stream = proxy.connect().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let new = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&new]).await;
    assert_eq!(read(&mut stream, 6).await, b"hello\n");
    assert_eq!(proxy.drain(&old, Duration::from_secs(9)).await, 0);
}

#[tokio::test]
async fn an_instance_that_refuses_is_passed_over() {
    let mut proxy = Proxy::start().await;
    let dead = Instance::start(&proxy.net, App::Greets);
    let alive = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&dead, &alive]).await;
    drop(dead);
    for _ in 0..5 {
        let mut stream = proxy.connect().await;
        assert_eq!(read(&mut stream, 6).await, b"hello\n");
    }
}

#[tokio::test]
async fn datagrams_go_to_an_instance_and_back() {
    let mut proxy = Proxy::start().await;
    let old = UdpSocket::bind((proxy.net.address(), PORT)).await.unwrap();
    let new = UdpSocket::bind((proxy.net.address(), PORT)).await.unwrap();
    proxy.table.published.push(Published {
        listen: SocketAddr::new(proxy.listen.ip(), 8053),
        protocol: Protocol::Udp,
        service: "web".parse().unwrap(),
        target: PORT,
    });
    let client = UdpSocket::bind((proxy.net.address(), 0)).await.unwrap();
    let listen = SocketAddr::new(proxy.listen.ip(), 8053);
    for (number, socket) in [old, new].iter().enumerate() {
        proxy.web().backends = vec![kiln_model::route::Backend {
            instance: format!("udp-{number}").parse().unwrap(),
            address: socket.local_addr().unwrap().ip(),
        }];
        assert_eq!(proxy.apply().await.failed, []);
        for question in [&b"ping"[..], b"ping2"] {
            client.send_to(question, listen).await.unwrap();
            let mut buffer = [0u8; 64];
            let received = timeout(SOON, socket.recv_from(&mut buffer)).await;
            let (n, peer) = received.expect("in time").unwrap();
            assert_eq!(&buffer[..n], question);
            socket.send_to(b"pong", peer).await.unwrap();
            let received = timeout(SOON, client.recv_from(&mut buffer)).await;
            let (n, peer) = received.expect("in time").unwrap();
            assert_eq!((&buffer[..n], peer), (&b"pong"[..], listen));
        }
    }
}

#[tokio::test]
async fn an_instance_with_a_full_backlog_is_waited_for() {
    let mut proxy = Proxy::start().await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    let address = SocketAddr::from((proxy.net.address(), PORT));
    socket.bind(address).unwrap();
    let listener = socket.listen(2).unwrap();
    proxy.protocol(AppProtocol::Tcp);
    proxy.web().backends = vec![kiln_model::route::Backend {
        instance: "web-busy".parse().unwrap(),
        address: address.ip(),
    }];
    proxy.apply().await;
    // One more than it says is taken.
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let begun = std::time::Instant::now();
    let mut stream = proxy.connect().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // It may have been given up meanwhile.
            let _ = stream.write_all(b"hello\n").await;
        }
    });
    assert_eq!(read(&mut stream, 6).await, b"hello\n");
    // The kernel alone tries again after 1 s and 3 s.
    assert!(begun.elapsed() < Duration::from_millis(900));
}
