//! A build's network against the real kernel: the recorder's address, and what goes past it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{Ipv4Addr, UdpSocket};

use super::tests::{ask_from, firewall, network, on_a_host, serve};
use super::*;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

#[test]
fn what_goes_past_the_recorder_is_remembered_and_what_goes_to_it_is_not() {
    on_a_host("recorder", |host| {
        let build = network("knta", "10.201.0.0/20", false);
        let outside = network("xout", "10.202.0.0/20", false);
        let others = network("kntb", "10.203.0.0/20", false);
        for net in [&build, &outside, &others] {
            ensure_bridge(net).unwrap();
        }
        let listens = serve(0);
        let mut made = firewall(&[&build], 4444);
        made.catch_all_port = None;
        made.recorder = Some(Recorder {
            address: ADDRESS,
            port: 3128,
            listens,
        });
        made.apply().unwrap();
        assert!(made.is_in_place().unwrap());
        let one = host.instance("one", &build, 2);
        let far = host.instance("far", &outside, 3);
        let answer = ask_from(&one, ADDRESS, 3128).unwrap();
        assert_eq!(answer, "10.201.0.2 192.0.2.1:3128", "redirected");
        assert_eq!(made.direct().unwrap(), []);
        let port = inside(&far, |_| serve(0)).unwrap();
        let to = outside.subnet.nth(3);
        for _ in 0..2 {
            assert!(ask_from(&one, to, port).is_some(), "it is let through");
        }
        let send = |_: &_| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.send_to(b"x", (to, 9)).unwrap();
        };
        inside(&one, send).unwrap();
        let from = build.subnet.nth(2);
        let direct = |protocol, port| Direct {
            from,
            to,
            protocol,
            port,
        };
        let mut seen = made.direct().unwrap();
        seen.sort();
        assert_eq!(seen, [direct(6, port), direct(17, 9)]);
        let without = firewall(&[&others], 4444);
        assert_eq!(without.direct().unwrap(), [], "who has none is not asked");
    });
}
