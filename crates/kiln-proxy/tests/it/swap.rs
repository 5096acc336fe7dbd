//! Replacement under load: nothing may be lost.

use std::time::Duration;

use hyper::Method;
use kiln_model::Millis;
use kiln_testkit::load::{Load, Mode, Report};
use tokio::sync::oneshot;

use crate::support::{App, Instance, Proxy};

const RATE: u32 = 500;
/// One load at a time: together they would measure each other.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const DRAIN: Duration = Duration::from_secs(5);

/// Replaces three instances by three others, again and again, while `load` goes on.
async fn swap_under(proxy: &mut Proxy, app: App, load: Load, swaps: usize) -> Report {
    let three = |proxy: &Proxy| -> Vec<Instance> {
        (0..3).map(|_| Instance::start(&proxy.net, app)).collect()
    };
    let mut old = three(proxy);
    proxy.serve(&old.iter().collect::<Vec<_>>()).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(load.run(async {
        let _ = stopped.await;
    }));
    for _ in 0..swaps {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let new = three(proxy);
        proxy.serve(&new.iter().collect::<Vec<_>>()).await;
        for instance in &old {
            assert_eq!(proxy.drain(instance, DRAIN).await, 0);
        }
        // Kills the old ones at once, without any grace.
        old = new;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    println!("{report}");
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_connections_lose_nothing() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let load = Load::new(proxy.listen, RATE, Mode::NewConnection).send(Method::POST, "/echo", "x");
    let report = swap_under(&mut proxy, App::Http, load, 10).await;
    assert_eq!(report.failed(), 0, "{report}");
    assert!(
        report.requests() > 1000 && report.by.len() == 33,
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keep_alive_connections_lose_nothing_and_stay_open() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let mode = Mode::KeepAlive { connections: 10 };
    let load = Load::new(proxy.listen, RATE, mode).send(Method::POST, "/echo", "x");
    let report = swap_under(&mut proxy, App::Http, load, 10).await;
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(report.connections, 10);
    assert_eq!(report.by.len(), 33, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunked_uploads_lose_nothing() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let mode = Mode::KeepAlive { connections: 10 };
    let load = Load::new(proxy.listen, 50, mode)
        .send(Method::PUT, "/echo", vec![7; 50_000])
        .chunked(1000);
    let report = swap_under(&mut proxy, App::Http, load, 5).await;
    assert_eq!(report.failed(), 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_requests_are_waited_for() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let load = Load::new(proxy.listen, 50, Mode::NewConnection).send(Method::GET, "/slow?700", "");
    let report = swap_under(&mut proxy, App::Http, load, 4).await;
    assert_eq!(report.failed(), 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_tcp_loses_nothing() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let load = Load::new(proxy.listen, 200, Mode::Tcp).send(Method::GET, "", vec![1; 5000]);
    let report = swap_under(&mut proxy, App::Echo, load, 5).await;
    assert_eq!(report.failed(), 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_keep_their_instance_until_the_drain_limit_and_end_with_a_close_frame() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let old = Instance::start(&proxy.net, App::Http);
    let new = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&old]).await;
    let mode = Mode::Websocket { connections: 20 };
    let load = Load::new(proxy.listen, RATE, mode).send(Method::GET, "/ws", "");
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(load.run(async {
        let _ = stopped.await;
    }));
    tokio::time::sleep(Duration::from_millis(500)).await;
    proxy.serve(&[&new]).await;
    let begun = std::time::Instant::now();
    let cut = proxy.drain(&old, Duration::from_secs(1)).await;
    assert!(begun.elapsed() > Duration::from_secs(1));
    assert_eq!(cut, 20);
    drop(old);
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(
        report.closed_websockets,
        [(Some(1001), 20)].into(),
        "{report}"
    );
    assert_eq!(report.connections, 40);
    let status = proxy.client.status().await.unwrap();
    assert_eq!(status.draining, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_loses_nothing() {
    let _alone = ALONE.lock().await;
    let mut proxy = Proxy::start().await;
    let mut old = Instance::start(&proxy.net, App::Http);
    proxy.serve(&[&old]).await;
    for mode in [Mode::NewConnection, Mode::KeepAlive { connections: 10 }] {
        let load = Load::new(proxy.listen, RATE, mode).send(Method::POST, "/echo", "x");
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(load.run(async {
            let _ = stopped.await;
        }));
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            proxy.park(Millis(10_000)).await;
            assert_eq!(proxy.drain(&old, DRAIN).await, 0);
            drop(old);
            tokio::time::sleep(Duration::from_millis(300)).await;
            let waiting =
                proxy.client.status().await.unwrap().environments["shop"].services["web"].waiting;
            assert!(waiting > 5, "{waiting}");
            old = Instance::start(&proxy.net, App::Http);
            proxy.serve(&[&old]).await;
        }
        stop.send(()).unwrap();
        let report = running.await.unwrap();
        assert_eq!(report.failed(), 0, "{report}");
    }
}
