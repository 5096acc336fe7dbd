//! What each kind of resource looks at, and what is said of how.

use kiln_model::Millis;
use kiln_model::suite::{HttpProbe, PortProtocol, Probe};

use crate::lower::Lowering;
use crate::node::{Node, Value};
use crate::values;

/// goss's own.
const ADDR_TIMEOUT: Millis = Millis(500);
const COMMAND_TIMEOUT: Millis = Millis(10_000);
const HTTP_TIMEOUT: Millis = Millis(5_000);

impl Lowering<'_> {
    /// `name`: of the resource, or what it says instead.
    pub(super) fn probe(
        &mut self,
        kind: &str,
        name: &str,
        said: &Node,
        path: &str,
    ) -> Option<Probe> {
        let name = || name.to_owned();
        Some(match kind {
            "addr" => self.addr(&name(), said, path)?,
            "command" => Probe::Command {
                exec: name(),
                timeout: self.timeout(said, path, COMMAND_TIMEOUT)?,
            },
            "dns" => self.dns(name(), said, path)?,
            "file" => self.file_probe(name(), said, path)?,
            "group" => Probe::Group { name: name() },
            "http" => Probe::Http(self.http_probe(&name(), said, path)?),
            "interface" => Probe::Interface { name: name() },
            "kernel-param" => Probe::KernelParam { name: name() },
            "matching" => {
                let content = said.get("content").filter(|node| !node.is_null());
                let Some(content) = content else {
                    self.wrong(said.key, format!("{path}: the key `content` is missing"));
                    return None;
                };
                Probe::Matching {
                    content: self.json(content, &format!("{path}.content"))?,
                }
            }
            "mount" => Probe::Mount { path: name() },
            "package" => Probe::Package { name: name() },
            "port" => self.port_probe(&name(), said, path)?,
            "process" => Probe::Process { comm: name() },
            _ => Probe::User { name: name() },
        })
    }

    /// Milliseconds; 0 and nothing are goss's own.
    fn timeout(&mut self, said: &Node, path: &str, default: Millis) -> Option<Millis> {
        let Some(node) = said.get("timeout").filter(|node| !node.is_null()) else {
            return Some(default);
        };
        let millis: u32 = self.number(node, &format!("{path}.timeout"))?;
        Some(match millis {
            0 => default,
            millis => Millis(millis.into()),
        })
    }

    /// Options that can't be honoured, where they say anything.
    fn none_of(&mut self, said: &Node, path: &str, keys: &[&str], why: &str) -> Option<()> {
        let mut none = Some(());
        for key in keys {
            let Some(node) = said.get(key) else { continue };
            let nothing = match &node.value {
                Value::Null => true,
                Value::Str(text) => text.is_empty(),
                _ => false,
            };
            if !nothing {
                self.refused(node.key, &format!("{path}.{key}"), why);
                none = None;
            }
        }
        none
    }

    fn addr(&mut self, address: &str, said: &Node, path: &str) -> Option<Probe> {
        let why = "a test's network has one address; leave it out";
        self.none_of(said, path, &["local-address"], why)?;
        let (protocol, rest) = address.split_once("://").unwrap_or(("tcp", address));
        if protocol != "tcp" {
            let why = "that a datagram is sent says nothing; use `port`";
            self.refused(said.key, &format!("{path}: {protocol}"), why);
            return None;
        }
        let parts = rest.rsplit_once(':');
        let parts = parts.and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let Some((host, port)) = parts else {
            self.wrong(
                said.key,
                format!("{path}: `{address}` is not tcp://host:port"),
            );
            return None;
        };
        Some(Probe::Addr {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            timeout: self.timeout(said, path, ADDR_TIMEOUT)?,
        })
    }

    fn dns(&mut self, host: String, said: &Node, path: &str) -> Option<Probe> {
        let why = "a test's network reaches no name server; only what the instance's own files \
                   say is known";
        self.none_of(said, path, &["server"], why)?;
        if host.contains(':') && host.parse::<std::net::IpAddr>().is_err() {
            self.refused(said.key, &format!("{path}: {host}"), why);
            return None;
        }
        Some(Probe::Dns { host })
    }

    fn file_probe(&mut self, file: String, said: &Node, path: &str) -> Option<Probe> {
        if !file.starts_with('/') {
            self.wrong(
                said.key,
                format!("{path}: `{file}` is not an absolute path"),
            );
            return None;
        }
        Some(Probe::File { path: file })
    }

    fn port_probe(&mut self, port: &str, said: &Node, path: &str) -> Option<Probe> {
        let (protocol, number) = port.split_once(':').unwrap_or(("tcp", port));
        let known = PortProtocol::ALL
            .into_iter()
            .find(|known| known.as_str() == protocol);
        let Some((protocol, port)) = known.zip(number.parse().ok()) else {
            self.wrong(
                said.key,
                format!("{path}: `{port}` is not tcp:80, udp6:53 …"),
            );
            return None;
        };
        Some(Probe::Port { protocol, port })
    }

    fn http_probe(&mut self, url: &str, said: &Node, path: &str) -> Option<HttpProbe> {
        let keys = ["ca-file", "cert-file", "key-file", "proxy"];
        self.none_of(said, path, &keys, "only plain HTTP is spoken in a test")?;
        let Some(rest) = url.strip_prefix("http://") else {
            let why = "only plain HTTP is spoken in a test; ask TLS with a command";
            self.refused(said.key, &format!("{path}: {url}"), why);
            return None;
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
            _ => (authority, Some(80)),
        };
        let Some(port) = port.filter(|_| !host.is_empty() && !host.contains('@')) else {
            self.wrong(
                said.key,
                format!("{path}: `{url}` is not http://host:port/path"),
            );
            return None;
        };
        let text = |it: &mut Self, key: &str| match said.get(key).filter(|n| !n.is_null()) {
            Some(node) => it.string(node, &format!("{path}.{key}")),
            None => Some(String::new()),
        };
        let (user, password) = (text(self, "username")?, text(self, "password")?);
        let follow = match said.get("no-follow-redirects").filter(|n| !n.is_null()) {
            Some(node) => !self.take(values::boolean(node), node.span)?,
            None => true,
        };
        Some(HttpProbe {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            path: match target.starts_with('/') {
                true => target.to_owned(),
                false => format!("/{target}"),
            },
            method: Some(text(self, "method")?)
                .filter(|method| !method.is_empty())
                .unwrap_or_else(|| "GET".into()),
            headers: self.request_headers(said, path)?,
            login: Some((user, password)).filter(|(u, p)| !u.is_empty() || !p.is_empty()),
            body: text(self, "request-body")?,
            follow,
            timeout: self.timeout(said, path, HTTP_TIMEOUT)?,
        })
    }

    fn request_headers(&mut self, said: &Node, path: &str) -> Option<Vec<(String, String)>> {
        let Some(node) = said.get("request-headers").filter(|n| !n.is_null()) else {
            return Some(vec![]);
        };
        let mut found = vec![];
        for item in self.list(node, path) {
            let line = self.string(item, path)?;
            let parts = line
                .split_once(": ")
                .filter(|_| !line.contains(['\r', '\n']));
            let Some((name, value)) = parts else {
                let what = format!("{path}.request-headers: `{line}` is not `Name: value`");
                self.wrong(item.span, what);
                return None;
            };
            found.push((name.to_owned(), value.to_owned()));
        }
        Some(found)
    }
}
