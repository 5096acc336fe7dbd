//! DNS as a client sees it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, RecordType};
use kiln_model::route::{self, NetworkNames};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::support::Proxy;

const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 9, 128, 5);

async fn with_network(mut proxy: Proxy) -> (Proxy, SocketAddr) {
    let gateway = proxy.net.address();
    proxy.table.networks = vec![NetworkNames {
        network: "shop_default".into(),
        gateway,
        names: [("web".to_owned(), route::Name::Addresses(vec![SERVICE]))].into(),
        addresses: [(SERVICE, "web".parse().unwrap())].into(),
        also: Default::default(),
        backends: [].into(),
    }];
    assert_eq!(proxy.apply().await.failed, []);
    (proxy, SocketAddr::from((gateway, 5300)))
}

fn question(name: &str) -> Message {
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    query
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(query).await.unwrap();
    let mut buffer = vec![0u8; 4096];
    let received = timeout(Duration::from_secs(9), socket.recv(&mut buffer)).await;
    let n = received.expect("in time").unwrap();
    Message::from_vec(&buffer[..n]).unwrap()
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    stream.write_u16(query.len() as u16).await.unwrap();
    stream.write_all(query).await.unwrap();
    let n = stream.read_u16().await.unwrap();
    let mut buffer = vec![0u8; n.into()];
    stream.read_exact(&mut buffer).await.unwrap();
    Message::from_vec(&buffer).unwrap()
}

#[tokio::test]
async fn own_names_are_answered_over_both_transports() {
    let (proxy, server) = with_network(Proxy::start().await).await;
    let query = question("WEB.");
    let bytes = query.to_vec().unwrap();
    for answer in [
        over_udp(server, &bytes).await,
        over_tcp(server, &bytes).await,
    ] {
        assert_eq!(
            (answer.id, answer.response_code),
            (query.id, ResponseCode::NoError)
        );
        assert_eq!(answer.answers[0].data, RData::A(A(SERVICE)));
    }
    assert_eq!(proxy.client.status().await.unwrap().dns.answered, 2);
}

/// A name server which knows one address for all names.
async fn name_server(address: SocketAddr) {
    let udp = Arc::new(UdpSocket::bind(address).await.unwrap());
    let tcp = TcpListener::bind(address).await.unwrap();
    let answer = |query: &[u8]| {
        let mut message = Message::from_vec(query).unwrap().into_response();
        let name = message.queries[0].name().clone();
        let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
        message.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, data));
        message.to_vec().unwrap()
    };
    tokio::spawn(async move {
        let mut buffer = vec![0u8; 4096];
        loop {
            let (n, peer) = udp.recv_from(&mut buffer).await.unwrap();
            // A forged answer before the right one: another id.
            let right = answer(&buffer[..n]);
            let mut forged = right.clone();
            forged[0] ^= 1;
            udp.send_to(&forged, peer).await.unwrap();
            udp.send_to(&right, peer).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let n = stream.read_u16().await.unwrap();
            let mut query = vec![0u8; n.into()];
            stream.read_exact(&mut query).await.unwrap();
            let answer = answer(&query);
            stream.write_u16(answer.len() as u16).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
}

#[tokio::test]
async fn other_names_are_asked_of_the_hosts_name_servers_and_never_of_itself() {
    let (proxy, server) = with_network(Proxy::start().await).await;
    let upstream = SocketAddr::from((proxy.net.address(), 5353));
    name_server(upstream).await;
    // The first one is the proxy itself.
    let text = format!("nameserver {server}\nnameserver {upstream}\n");
    std::fs::write(&proxy.config.resolv_conf, text).unwrap();
    let query = question("example.org.");
    let bytes = query.to_vec().unwrap();
    for answer in [
        over_udp(server, &bytes).await,
        over_tcp(server, &bytes).await,
    ] {
        assert_eq!(
            (answer.id, answer.response_code),
            (query.id, ResponseCode::NoError)
        );
        assert_eq!(
            answer.answers[0].data,
            RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))
        );
    }
    // The file has changed: nobody is left to be asked.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(&proxy.config.resolv_conf, format!("nameserver {server}\n")).unwrap();
    let answer = over_udp(server, &bytes).await;
    assert_eq!(
        (answer.id, answer.response_code),
        (query.id, ResponseCode::ServFail)
    );
    let status = proxy.client.status().await.unwrap();
    assert_eq!((status.dns.forwarded, status.dns.failed), (3, 1));
}

#[tokio::test]
async fn rubbish_is_answered_or_ignored_and_harms_nobody() {
    let (_proxy, server) = with_network(Proxy::start().await).await;
    let bytes = question("web").to_vec().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut response = bytes.clone();
    response[2] |= 0x80;
    for rubbish in [
        &[][..],
        &[1],
        &[1, 2, 0x80],
        &response,
        &[0xff; 600],
        &bytes[..20],
    ] {
        socket.send_to(rubbish, server).await.unwrap();
    }
    let answer = over_udp(server, &bytes).await;
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn a_gateway_that_does_not_exist_yet_is_told_and_tried_again() {
    let mut proxy = Proxy::start().await;
    proxy.table.networks = vec![NetworkNames {
        network: "shop_default".into(),
        // For documentation; no host has it.
        gateway: Ipv4Addr::new(192, 0, 2, 1),
        names: [].into(),
        addresses: [].into(),
        also: Default::default(),
        backends: [].into(),
    }];
    let applied = proxy.apply().await;
    assert_eq!(applied.failed.len(), 1);
    let text = applied.failed[0].to_string();
    assert!(
        text.contains("`shop_default`") && text.contains("does not have the address"),
        "{text}"
    );
    proxy.table.networks[0].gateway = proxy.net.address();
    assert_eq!(proxy.apply().await.failed, []);
}
