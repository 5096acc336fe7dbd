//! Every bound of the proxy, with its reason. Nothing here is read from outside.

use std::time::Duration;

/// Connections the kernel keeps for a listener until they are accepted: a burst must
/// not be refused while the proxy is busy. The kernel lowers it to `somaxconn`.
pub(crate) const BACKLOG: u32 = 4096;

/// File descriptors kept free for everything that is not a client's connection:
/// listeners, control, DNS, the idle pool.
pub(crate) const RESERVED_FILES: u64 = 512;

/// Client connections at once where the limit of open files is not lower: each costs
/// up to two descriptors (its own and one to an instance).
pub(crate) const CONNECTIONS: u64 = 65_536;

/// Request line and headers of a request, or of an instance's answer, in bytes. More is
/// answered with 431 (client) or 502 (instance).
pub(crate) const HEADER_BYTES: usize = 64 * 1024;

/// Headers of one message.
pub(crate) const HEADER_COUNT: usize = 200;

/// Bytes buffered for one HTTP/1 connection and direction.
pub(crate) const HTTP_BUFFER: usize = 128 * 1024;

/// How long a client may take to send a request's headers, and how long a keep-alive
/// connection may be idle. Guards against clients which send one byte a minute.
pub(crate) const HEADER_READ: Duration = Duration::from_secs(60);

/// Streams a client may have open at once on one HTTP/2 connection.
pub(crate) const H2_CLIENT_STREAMS: u32 = 250;

/// Requests on one HTTP/2 connection to an instance; then another one is opened. Below
/// the usual limit of servers (100 to 128), so that long streams never wait for each other.
pub(crate) const H2_UPSTREAM_STREAMS: usize = 90;

/// First bytes kept while the protocol of a connection is not known yet. A longer
/// request line is judged by its start.
pub(crate) const SNIFF_BYTES: usize = 16 * 1024;

/// How long an unfinished first line is waited for, before it is judged by its start:
/// a raw protocol may wait for its answer without ever sending a line end.
pub(crate) const SNIFF_WAIT: Duration = Duration::from_millis(500);

/// On a port which has spoken HTTP before: how long the client's first bytes are waited
/// for, before an instance is connected as well (it may speak first after all). Without
/// it, each idle connection of a browser would take a worker of the instance.
pub(crate) const HTTP_HINT_WAIT: Duration = Duration::from_secs(1);

/// When no instance could be reached and the client hasn't spoken yet: how long its
/// first bytes are waited for, to answer 502 or 503 if it speaks HTTP.
pub(crate) const REFUSED_WAIT: Duration = Duration::from_secs(5);

/// How long an instance may take to accept a connection, in all. Long, as an instance that
/// is busy drops what its backlog can't hold, and that must not become a failure.
pub(crate) const CONNECT: Duration = Duration::from_secs(10);

/// After this the connection attempt is given up and made anew, then after twice the time,
/// and so on. Instances are on this host and answer at once, so the backlog was full (5
/// for a plain Python server), and the kernel itself would try again only after 1 s, 3 s, 7 s.
pub(crate) const CONNECT_AGAIN: Duration = Duration::from_millis(100);

/// Attempts for one request or connection, each to another instance where there is one.
pub(crate) const CONNECT_ATTEMPTS: usize = 4;

/// An instance which refused a connection is asked last for this long.
pub(crate) const AVOID_FAILED: Duration = Duration::from_secs(1);

/// Requests and connections waiting for a parked service, for each service.
pub(crate) const PARK_QUEUE: usize = 4096;

/// When parking ends, those who wait go on one after the other with this pause between
/// them, after the first [`RELEASE_BURST`]: all at once they would overflow the backlog of
/// an instance that has just begun to listen.
pub(crate) const RELEASE_PACE: Duration = Duration::from_millis(1);
pub(crate) const RELEASE_BURST: u32 = 4;

/// What 503 tells clients to wait, in seconds.
pub(crate) const RETRY_AFTER: &str = "1";

/// Idle connections kept for one instance's address and port.
pub(crate) const POOL_IDLE: usize = 64;

/// How long an idle connection to an instance may be used again for a request that can
/// be repeated (GET and the like).
pub(crate) const POOL_AGE: Duration = Duration::from_secs(15);

/// The same for requests which must not be sent twice. Servers close idle connections
/// after 2 s and more; whoever sends at that very moment can't know if it was received.
pub(crate) const POOL_AGE_UNREPEATABLE: Duration = Duration::from_secs(1);

/// How often too old idle connections are looked for.
pub(crate) const POOL_SWEEP: Duration = Duration::from_secs(5);

/// How long an instance may take to answer `Expect: 100-continue`, before the body is
/// sent without it (curl waits as long).
pub(crate) const EXPECT_WAIT: Duration = Duration::from_secs(1);

/// At a drain limit, what is left is cut over this time in [`CUT_STEPS`] parts, so that
/// clients do not all come back in the same instant.
pub(crate) const CUT_SPREAD: Duration = Duration::from_secs(2);
pub(crate) const CUT_STEPS: u8 = 20;

/// How long cut connections may take to end (finish a websocket frame, say good-bye).
pub(crate) const CUT_GRACE: Duration = Duration::from_secs(2);

/// How long a websocket's client may take to answer the close frame.
pub(crate) const CLOSE_FRAME_WAIT: Duration = Duration::from_secs(1);

/// Bytes copied at once in each direction of a raw or upgraded connection.
pub(crate) const TUNNEL_BUFFER: usize = 16 * 1024;

/// When an instance has closed its direction of a raw connection: how long the client may
/// be silent, before the connection counts as left behind.
pub(crate) const HALF_CLOSED_IDLE: Duration = Duration::from_secs(60);

/// Dead peers are noticed by keep-alive probes of TCP.
pub(crate) const TCP_IDLE: Duration = Duration::from_secs(60);
pub(crate) const TCP_PROBE: Duration = Duration::from_secs(15);
pub(crate) const TCP_PROBES: u32 = 4;

/// At the end of the proxy itself: how long open requests may go on.
pub(crate) const SHUTDOWN: Duration = Duration::from_secs(10);

/// One line on the control socket, in bytes: 1,000 services of 10 instances take about 2 MiB.
pub(crate) const CONTROL_LINE: u64 = 32 * 1024 * 1024;

/// How often a retired proxy looks if its last connection has ended.
pub(crate) const LEFT_CHECK: Duration = Duration::from_millis(200);

/// How long a proxy whose place is taken may be silent within its answer.
pub(crate) const HANDOVER: Duration = Duration::from_secs(5);

/// Control connections at once: the daemon's, a few of people, and one for each drain.
pub(crate) const CONTROL_CONNECTIONS: usize = 512;

/// Time to live of kiln's own DNS answers, in seconds. Service addresses are stable, so it
/// only bounds how long a removed service is remembered.
pub(crate) const DNS_TTL: u32 = 5;

/// Questions being forwarded at once, over all networks; more are answered SERVFAIL.
pub(crate) const DNS_FORWARDS: usize = 256;

/// One name server's time to answer.
pub(crate) const DNS_FORWARD: Duration = Duration::from_secs(2);

/// Name servers of the host that are asked one after the other (as the resolver of libc).
pub(crate) const DNS_SERVERS: usize = 3;

/// The largest DNS message over UDP that is taken or passed on.
pub(crate) const DNS_MESSAGE: usize = 4096;

/// DNS connections over TCP at once on one network, and how long one may be idle.
pub(crate) const DNS_TCP: usize = 64;
pub(crate) const DNS_TCP_IDLE: Duration = Duration::from_secs(10);

/// How often `/etc/resolv.conf` is looked at, at most.
pub(crate) const RESOLV_CHECK: Duration = Duration::from_secs(1);

/// Clients (address and port) of one published UDP port at once; a new one then takes the
/// place of the one that has been silent for longest.
pub(crate) const UDP_SESSIONS: usize = 1024;

/// How long a UDP client is remembered after its last datagram, either way.
pub(crate) const UDP_IDLE: Duration = Duration::from_secs(30);
