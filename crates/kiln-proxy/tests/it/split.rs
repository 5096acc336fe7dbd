//! A part of the traffic goes to some instances; what each did is counted.

use std::time::Duration;

use hyper::Method;
use kiln_model::route::AppProtocol;
use kiln_testkit::load::{Load, Mode, Report};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{App, Instance, Proxy, get};

async fn load(proxy: &Proxy, mode: Mode) -> Report {
    let load = Load::new(proxy.listen, 500, mode).send(Method::GET, "/", "");
    load.run(tokio::time::sleep(Duration::from_secs(1))).await
}

#[tokio::test]
async fn requests_are_split_by_weight_on_kept_and_on_new_connections() {
    for mode in [Mode::KeepAlive { connections: 1 }, Mode::NewConnection] {
        for weight in [5, 50] {
            let mut proxy = Proxy::start().await;
            let old = Instance::start(&proxy.net, App::Http);
            let new = Instance::start(&proxy.net, App::Http);
            proxy.split(weight, &[&old, &new]).await;
            let report = load(&proxy, mode).await;
            assert_eq!(report.failed(), 0, "{report}");
            let (all, part) = (report.requests(), proxy.traffic(&new).await.requests);
            assert!(all > 100, "{report}");
            let wanted = all * u64::from(weight) / 100;
            assert!(part.abs_diff(wanted) <= 3, "{part} of {all}, {weight} %");
            assert_eq!(proxy.traffic(&old).await.requests, all - part);
        }
    }
}

#[tokio::test]
async fn raw_connections_are_split_by_weight() {
    for stated in [true, false] {
        let mut proxy = Proxy::start().await;
        let old = Instance::start(&proxy.net, App::Greets);
        let new = Instance::start(&proxy.net, App::Greets);
        if stated {
            proxy.protocol(AppProtocol::Tcp);
        }
        proxy.split(25, &[&old, &new]).await;
        for _ in 0..40 {
            let mut stream = proxy.connect().await;
            let mut hello = [0; 6];
            stream.read_exact(&mut hello).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), b'x');
        }
        let part = proxy.traffic(&new).await.requests;
        assert!((8..=12).contains(&part), "{part}");
        assert_eq!(proxy.traffic(&old).await.requests, 40 - part);
    }
}

#[tokio::test]
async fn failures_and_times_are_counted_for_each_instance() {
    let mut proxy = Proxy::start().await;
    let one = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&one]).await;
    for path in ["/", "/fail", "/crash", "/half", "/refuse", "/slow?200"] {
        get(proxy.listen, path).await;
    }
    let traffic = proxy.traffic(&one).await;
    assert_eq!((traffic.requests, traffic.failed), (6, 3));
    let slowest = traffic.latency.quantile(1000).unwrap();
    assert!(slowest >= 180_000, "{slowest}");
    assert!(traffic.latency.quantile(500).unwrap() < 100_000);
}

#[tokio::test]
async fn connections_that_are_refused_are_failures_of_who_refused() {
    let mut proxy = Proxy::start().await;
    let one = Instance::start(&proxy.net, App::Greets);
    let other = Instance::start(&proxy.net, App::Greets);
    proxy.protocol(AppProtocol::Tcp);
    let gone = other.backend().instance;
    proxy.split(50, &[&one, &other]).await;
    drop(other);
    for _ in 0..20 {
        let mut hello = [0; 6];
        proxy.connect().await.read_exact(&mut hello).await.unwrap();
    }
    let all = proxy.client.traffic(vec![gone.clone()]).await.unwrap();
    let refused = &all[&gone];
    assert!((8..=12).contains(&refused.failed), "{refused:?}");
    assert_eq!(refused.requests, refused.failed);
    let well = proxy.traffic(&one).await;
    assert_eq!((well.requests, well.failed), (20, 0));
}

#[tokio::test]
async fn nothing_is_told_of_an_instance_that_is_not_known() {
    let proxy = Proxy::start().await;
    let unknown = vec!["web-0".parse().unwrap()];
    assert!(proxy.client.traffic(unknown).await.unwrap().is_empty());
}
