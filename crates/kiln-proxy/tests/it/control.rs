//! The control socket, listeners, and restarts.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use kiln_model::Generation;
use kiln_model::route::{NetworkNames, Published};
use kiln_model::spec::Protocol;
use kiln_proxy::control::Refusal;
use kiln_proxy::status::Purpose;
use kiln_proxy::{Client, ClientError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{App, Instance, PORT, Proxy, get};

fn refusal<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> (Refusal, String) {
    match outcome {
        Err(ClientError::Refused { kind, message }) => (kind, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_older_generation_is_refused_and_the_same_again_is_fine() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    proxy.client.apply(&proxy.table).await.unwrap();
    let mut older = proxy.table.clone();
    older.generation = Generation(1);
    older.services.values_mut().for_each(|s| s.backends.clear());
    let (kind, message) = refusal(proxy.client.apply(&older).await);
    assert_eq!(kind, Refusal::OlderGeneration);
    assert!(
        message.contains("generation 1, and 2 is in effect"),
        "{message}"
    );
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_table_that_contradicts_itself_changes_nothing() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mut bad = proxy.table.clone();
    bad.generation = Generation(9);
    bad.published[0].service = "nobody".parse().unwrap();
    let (kind, message) = refusal(proxy.client.apply(&bad).await);
    assert_eq!(kind, Refusal::Invalid);
    assert!(message.contains("`nobody`"), "{message}");
    let (kind, _) = refusal(proxy.client.drain(&instance.id, 1.into_millis()).await);
    assert_eq!(kind, Refusal::StillServing);
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
}

trait IntoMillis {
    fn into_millis(self) -> kiln_model::Millis;
}

impl IntoMillis for u64 {
    fn into_millis(self) -> kiln_model::Millis {
        kiln_model::Millis(self)
    }
}

#[tokio::test]
async fn a_port_in_use_is_told_with_who_has_it_and_the_others_work() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    let taken = std::net::TcpListener::bind((proxy.net.address(), 8081)).unwrap();
    let address = taken.local_addr().unwrap();
    proxy.table.published.push(Published {
        listen: address,
        protocol: Protocol::Tcp,
        service: "web".parse().unwrap(),
        target: PORT,
    });
    proxy.web().backends = vec![instance.backend()];
    let applied = proxy.apply().await;
    let [failure] = applied.failed.as_slice() else {
        panic!("{applied:?}");
    };
    assert_eq!(failure.listen, address);
    assert!(
        matches!(&failure.purpose, Purpose::Published { service, .. } if service.as_str() == "web")
    );
    assert!(failure.cause.contains("in use"), "{failure}");
    assert_eq!(failure.holder.as_ref().unwrap().pid, std::process::id());
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
    let status = proxy.client.status().await.unwrap();
    let listeners = &status.environments["shop"].listeners;
    assert!(listeners[0].failed.is_none() && listeners[1].failed.is_some());
    // The next table tries again.
    drop(taken);
    assert_eq!(proxy.apply().await.failed, []);
    assert!(get(address, "/").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn two_environments_do_not_take_each_others_ports() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mut other = proxy.table.clone();
    // Comes first by name.
    other.environment = "a".parse().unwrap();
    let web = other.services.get_mut("web").unwrap();
    web.backends[0].instance = "web-of-a".parse().unwrap();
    let applied = proxy.client.apply(&other).await.unwrap();
    assert_eq!(applied.failed.len(), 1);
    assert!(
        applied.failed[0].cause.contains("`shop`"),
        "{:?}",
        applied.failed
    );
    proxy
        .client
        .remove_environment(&proxy.table.environment)
        .await
        .unwrap();
    assert_eq!(proxy.client.apply(&other).await.unwrap().failed, []);
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_removed_listener_is_closed_and_its_connections_go_on() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let mut stream = proxy.connect().await;
    let mut request = async || {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            .await
            .unwrap();
        let mut buffer = vec![0u8; 4096];
        let n = stream.read(&mut buffer).await.unwrap();
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    assert!(request().await.starts_with("HTTP/1.1 200 "));
    proxy.table.published.clear();
    proxy.apply().await;
    assert!(TcpStream::connect(proxy.listen).await.is_err());
    let last = request().await;
    assert!(
        last.starts_with("HTTP/1.1 200 ") && last.contains("connection: close"),
        "{last}"
    );
}

#[tokio::test]
async fn a_restarted_proxy_serves_again_by_itself() {
    let mut proxy = Proxy::start_with(|config| config.catch_all.set_port(0)).await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let ports = proxy.client.ports().await.unwrap();
    proxy.restart().await;
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
    assert_eq!(proxy.client.ports().await.unwrap(), ports);
    let mut older = proxy.table.clone();
    older.generation = Generation(1);
    assert_eq!(
        refusal(proxy.client.apply(&older).await).0,
        Refusal::OlderGeneration
    );
}

#[tokio::test]
async fn only_one_proxy_has_the_socket_and_it_is_private() {
    let mut proxy = Proxy::start().await;
    let mode = std::fs::metadata(&proxy.config.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = kiln_proxy::run(proxy.config.clone()).await;
    assert!(second.unwrap_err().to_string().contains("running already"));
    assert!(Client::connect(&proxy.config.socket).await.is_ok());
    proxy.stop().await;
    assert!(matches!(
        Client::connect(&proxy.config.socket).await,
        Err(ClientError::Unreachable { .. })
    ));
    // What a killed one leaves behind is no obstacle.
    std::os::unix::net::UnixListener::bind(&proxy.config.socket).unwrap();
}

#[tokio::test]
async fn a_state_that_can_not_be_written_changes_nothing() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    // A folder in the way of the file that is written beside.
    std::fs::create_dir(proxy.config.state.with_extension("new")).unwrap();
    let mut next = proxy.table.clone();
    next.generation = Generation(7);
    next.services.values_mut().for_each(|s| s.backends.clear());
    let (kind, message) = refusal(proxy.client.apply(&next).await);
    assert_eq!(kind, Refusal::State);
    assert!(message.contains("nothing was changed"), "{message}");
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn nonsense_on_the_socket_is_refused_line_by_line() {
    let proxy = Proxy::start().await;
    let mut stream = tokio::net::UnixStream::connect(&proxy.config.socket)
        .await
        .unwrap();
    stream
        .write_all(b"nonsense\n{\"drain\":{}}\n\"status\"\n")
        .await
        .unwrap();
    let mut answers = String::new();
    while answers.matches('\n').count() < 3 {
        let mut buffer = vec![0u8; 4096];
        let n = stream.read(&mut buffer).await.unwrap();
        answers.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    let lines: Vec<&str> = answers.lines().collect();
    assert!(
        lines[0].contains("\"invalid\"") && lines[1].contains("\"invalid\""),
        "{answers}"
    );
    assert!(lines[2].starts_with("{\"status\":"), "{answers}");
}

#[tokio::test]
async fn a_drain_whose_caller_goes_away_cuts_nothing() {
    let mut proxy = Proxy::start().await;
    let old = Instance::start(&proxy.net, App::Greets);
    let new = Instance::start(&proxy.net, App::Greets);
    proxy.serve(&[&old]).await;
    let mut stream = proxy.connect().await;
    let mut buffer = [0u8; 6];
    stream.read_exact(&mut buffer).await.unwrap();
    proxy.serve(&[&new]).await;
    let drain = proxy.client.drain(&old.id, 300.into_millis());
    let ended = tokio::time::timeout(std::time::Duration::from_millis(100), drain).await;
    assert!(ended.is_err());
    tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    stream.write_all(b"still").await.unwrap();
    stream.read_exact(&mut buffer[..5]).await.unwrap();
    assert_eq!(&buffer[..5], b"still");
}

#[tokio::test]
async fn service_addresses_lead_to_the_networks_own_addresses_of_instances() {
    // Without a redirection the catch-all is reached under its own address and port; the
    // port is the instances' one here.
    let mut proxy = Proxy::start_with(|config| config.catch_all.set_port(PORT)).await;
    let instance = Instance::start(&proxy.net, App::Http);
    let SocketAddr::V4(service) = proxy.config.catch_all else {
        panic!("not of IPv4");
    };
    let mut backend = instance.backend();
    backend.address = proxy.net.address().into();
    let std::net::IpAddr::V4(own) = instance.address else {
        panic!("not of IPv4");
    };
    proxy.web().backends = vec![backend];
    proxy.table.networks = vec![NetworkNames {
        network: "shop_default".into(),
        gateway: proxy.net.address(),
        names: [].into(),
        addresses: [(*service.ip(), "web".parse().unwrap())].into(),
        also: Default::default(),
        backends: [(instance.id.clone(), own)].into(),
    }];
    assert_eq!(proxy.apply().await.failed, []);
    let answer = get(SocketAddr::V4(service), "/").await;
    assert!(answer.contains(instance.id.as_str()), "{answer}");
    // Through the published port it is looked for at its first address.
    assert!(get(proxy.listen, "/").await.starts_with("HTTP/1.1 502 "));
}

/// The inode of the socket that listens there: another socket has another one.
fn inode(listen: SocketAddr) -> String {
    let SocketAddr::V4(listen) = listen else {
        panic!("not of IPv4");
    };
    let ip = u32::from_ne_bytes(listen.ip().octets());
    let local = format!("{ip:08X}:{:04X}", listen.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut sockets = table
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>());
    let socket = sockets.find(|fields| fields[1] == local && fields[3] == "0A");
    socket.expect("somebody listens")[9].to_owned()
}

#[tokio::test]
async fn a_listener_that_stays_wanted_is_never_made_anew() {
    let mut proxy = Proxy::start().await;
    let instance = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&instance]).await;
    let before = inode(proxy.listen);
    proxy.serve(&[]).await;
    proxy.table.published[0].target = 9;
    proxy.apply().await;
    assert_eq!(inode(proxy.listen), before);
}
