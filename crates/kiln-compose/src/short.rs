//! The short forms of one-line values: `8080:80/tcp`, `data:/var/lib:ro`, `/dev/a:/dev/b`.
//! Pure: text in, value out.

use std::net::IpAddr;

use crate::node::{Map, Node};
use crate::span::Span;

/// Ports of one entry like `10000-20000:10000-20000`.
pub const MAX_PORT_RANGE: u32 = 16_384;

/// What a bare name in `depends_on` means.
pub fn dependency(span: Span) -> Node {
    Node::map(
        Map::from_iter([
            ("condition".into(), Node::str("service_started", span)),
            ("required".into(), Node::bool(true, span)),
        ]),
        span,
    )
}

/// A volume's short form, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShortVolume {
    /// `bind` or `volume`.
    pub kind: &'static str,
    pub source: String,
    pub target: String,
    pub read_only: bool,
    pub nocopy: bool,
    pub propagation: Option<String>,
    pub selinux: Option<String>,
    /// Texts of one or two characters are a path and nothing else.
    pub tiny: bool,
}

const PROPAGATIONS: [&str; 6] = [
    "rprivate", "private", "rshared", "shared", "rslave", "slave",
];

/// `[source:]target[:options]`. A letter and a colon at a section's beginning are a Windows
/// drive, as for compose; unknown options are left out, as by compose.
pub fn volume(text: &str) -> Result<ShortVolume, String> {
    let mut volume = ShortVolume {
        kind: "volume",
        ..ShortVolume::default()
    };
    if text.is_empty() {
        return Err("a volume must not be empty".into());
    }
    if text.len() <= 2 {
        volume.target = text.into();
        volume.tiny = true;
        return Ok(volume);
    }
    let sections = sections(text);
    if sections.iter().any(String::is_empty) {
        return Err(format!("`{text}` has an empty section between colons"));
    }
    match sections.as_slice() {
        [target] => volume.target.clone_from(target),
        [source, target] => {
            volume.source.clone_from(source);
            volume.target.clone_from(target);
        }
        [source, target, options] => {
            volume.source.clone_from(source);
            volume.target.clone_from(target);
            volume_options(&mut volume, options);
        }
        _ => return Err(format!("`{text}` has too many colons")),
    }
    if is_path(&volume.source) {
        volume.kind = "bind";
    }
    Ok(volume)
}

fn sections(text: &str) -> Vec<String> {
    let mut sections = vec![String::new()];
    for c in text.chars() {
        let current = sections.last_mut();
        let Some(current) = current else { continue };
        let drive = current.len() == 1 && current.chars().all(char::is_alphabetic);
        if c == ':' && !drive {
            sections.push(String::new());
        } else {
            current.push(c);
        }
    }
    sections
}

fn volume_options(volume: &mut ShortVolume, options: &str) {
    for option in options.split(',') {
        match option {
            "ro" => volume.read_only = true,
            "rw" => volume.read_only = false,
            "nocopy" => volume.nocopy = true,
            "z" | "Z" => volume.selinux = Some(option.into()),
            other if PROPAGATIONS.contains(&other) => volume.propagation = Some(other.into()),
            _ => {}
        }
    }
}

/// Options of the short form that compose drops without a word.
pub fn unknown_volume_options(text: &str) -> Vec<String> {
    let sections = sections(text);
    let Some(options) = sections.get(2) else {
        return vec![];
    };
    options
        .split(',')
        .filter(|o| !["ro", "rw", "nocopy", "z", "Z"].contains(o) && !PROPAGATIONS.contains(o))
        .map(str::to_owned)
        .collect()
}

fn is_path(source: &str) -> bool {
    let mut chars = source.chars();
    match chars.next() {
        Some('.' | '/' | '~') => true,
        Some('\\') => source.starts_with(r"\\"),
        Some(first) => first.is_alphabetic() && chars.next() == Some(':'),
        None => false,
    }
}

/// One port of a short form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShortPort {
    pub host_ip: String,
    pub target: u16,
    /// Empty: any; or a number, or a range to choose from.
    pub published: String,
    pub protocol: String,
}

/// `[[ip:]published:]target[/protocol]`, with ranges; ordered as compose orders them.
pub fn ports(text: &str) -> Result<Vec<ShortPort>, String> {
    let (ip, host, container) = port_parts(text);
    let (container, protocol) = match container.split_once('/') {
        Some((port, "")) => (port, "tcp".to_owned()),
        Some((port, protocol)) => (port, protocol.to_ascii_lowercase()),
        None => (container, "tcp".to_owned()),
    };
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(format!(
            "`{text}`: the protocol `{protocol}` is not tcp, udp or sctp"
        ));
    }
    let ip = address(text, &ip)?;
    if container.is_empty() {
        return Err(format!("`{text}` has no port"));
    }
    let (start, end) = port_range(text, container)?;
    if start == 0 {
        return Err(format!("`{text}`: 0 is not a port of a service"));
    }
    let published = match host {
        "" => None,
        host => Some(port_range(text, host)?),
    };
    let count = u32::from(end - start) + 1;
    if let Some((first, last)) = published
        && last - first != end - start
        && count != 1
    {
        return Err(format!("`{text}`: the two ranges have different lengths"));
    }
    if count > MAX_PORT_RANGE {
        return Err(format!("`{text}` has more than {MAX_PORT_RANGE} ports"));
    }
    let mut ports: Vec<ShortPort> = (start..=end)
        .map(|target| ShortPort {
            host_ip: ip.clone(),
            target,
            published: match published {
                None => String::new(),
                Some((first, last)) if count == 1 && first != last => format!("{first}-{last}"),
                Some((first, _)) => (first + (target - start)).to_string(),
            },
            protocol: protocol.clone(),
        })
        .collect();
    ports.sort_by_key(|port| format!("{}/{}", port.target, port.protocol));
    Ok(ports)
}

fn port_parts(text: &str) -> (String, &str, &str) {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [container] => (String::new(), "", container),
        [host, container] => (String::new(), host, container),
        [ip @ .., host, container] => (ip.join(":"), host, container),
        [] => (String::new(), "", ""),
    }
}

fn address(text: &str, ip: &str) -> Result<String, String> {
    let bare = match ip.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .ok_or_else(|| format!("`{text}`: the bracket of the address is not closed"))?,
        None => ip,
    };
    if !bare.is_empty() && bare.parse::<IpAddr>().is_err() {
        return Err(format!("`{text}`: `{bare}` is not an IP address"));
    }
    Ok(bare.to_owned())
}

/// `80` or `80-90`.
pub fn port_range(text: &str, range: &str) -> Result<(u16, u16), String> {
    let number = |part: &str| {
        let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        part.parse::<u16>()
            .ok()
            .filter(|_| digits)
            .ok_or_else(|| format!("`{text}`: `{part}` is not a port (0 to 65535)"))
    };
    let (start, end) = match range.split_once('-') {
        Some((start, end)) => (number(start)?, number(end)?),
        None => (number(range)?, number(range)?),
    };
    if end < start {
        return Err(format!("`{text}`: the range `{range}` goes backwards"));
    }
    Ok((start, end))
}

/// `source[:target[:permissions]]`.
pub fn device(text: &str) -> Result<(String, String, String), String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, permissions) = match parts.as_slice() {
        [source] => (*source, "", "rwm"),
        [source, target] => (*source, *target, "rwm"),
        [source, target, permissions] => (*source, *target, *permissions),
        _ => return Err(format!("`{text}` has too many colons; use the long form")),
    };
    let target = if target.is_empty() { source } else { target };
    Ok((source.into(), target.into(), permissions.into()))
}

/// A command line, split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    pub words: Vec<String>,
    /// What compose leaves out: everything from an unquoted `;`, `&`, `|`, `<` or `>` on.
    pub dropped: Option<String>,
}

/// Splits a command line as compose does: quotes and backslashes of a shell, no expansion,
/// and an end at the first operator.
pub fn words(text: &str) -> Result<Words, String> {
    let mut splitter = Splitter::default();
    for (at, c) in text.char_indices() {
        if splitter.step(c)? == Step::End {
            return splitter.finish(Some(text[at..].to_owned()));
        }
    }
    splitter.finish(None)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    On,
    End,
}

#[derive(Debug, Default)]
struct Splitter {
    words: Vec<String>,
    word: String,
    /// Something of a word was seen, be it an empty pair of quotes.
    open: bool,
    escaped: bool,
    single: bool,
    double: bool,
    /// Inside of backticks.
    back: bool,
    /// Inside of `$(…)`.
    dollar: bool,
}

impl Splitter {
    fn step(&mut self, c: char) -> Result<Step, String> {
        if self.escaped {
            self.escaped = false;
            self.keep(c);
            return Ok(Step::On);
        }
        let quoted = self.single || self.double || self.back || self.dollar;
        match c {
            '\\' if !self.single => self.escaped = true,
            ' ' | '\t' | '\r' | '\n' if !quoted => self.end_word(),
            '"' if !self.single && !self.dollar && !self.back => {
                self.double = !self.double;
                self.open = true;
            }
            '\'' if !self.double && !self.dollar && !self.back => {
                self.single = !self.single;
                self.open = true;
            }
            ';' | '&' | '|' | '<' | '>' if !quoted => {
                // `2>` goes as a whole.
                if c == '>' && self.word.starts_with(|c: char| c.is_ascii_digit()) {
                    self.open = false;
                }
                return Ok(Step::End);
            }
            '(' if !quoted => {
                if !self.word.ends_with('$') {
                    return Err("an unquoted `(` means nothing here; put it in quotes".into());
                }
                self.dollar = true;
                self.keep(c);
            }
            ')' if !(self.single || self.double || self.back) => {
                self.dollar = !self.dollar;
                self.keep(c);
            }
            '`' if !(self.single || self.double || self.dollar) => {
                self.back = !self.back;
                self.keep(c);
            }
            other => self.keep(other),
        }
        Ok(Step::On)
    }

    fn keep(&mut self, c: char) {
        self.word.push(c);
        self.open = true;
    }

    fn end_word(&mut self) {
        if self.open {
            self.words.push(std::mem::take(&mut self.word));
            self.open = false;
        }
    }

    fn finish(mut self, dropped: Option<String>) -> Result<Words, String> {
        if self.escaped || self.single || self.double || self.back || self.dollar {
            return Err("a quote or bracket of the command is never closed".into());
        }
        self.end_word();
        Ok(Words {
            words: self.words,
            dropped,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn volumes() {
        let parts = |text: &str| {
            let v = volume(text).unwrap();
            (v.kind, v.source, v.target, v.read_only)
        };
        assert_eq!(
            parts("./a:/b:ro"),
            ("bind", "./a".into(), "/b".into(), true)
        );
        assert_eq!(
            parts("data:/b"),
            ("volume", "data".into(), "/b".into(), false)
        );
        assert_eq!(
            parts("/b/c"),
            ("volume", String::new(), "/b/c".into(), false)
        );
        assert_eq!(parts("~/x:/b").0, "bind");
        assert_eq!(
            volume("./a:/b:z,rslave").unwrap().propagation.as_deref(),
            Some("rslave")
        );
        for bad in ["", ":/b", "a1::", "aa:/b:ro:x"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
        assert_eq!(unknown_volume_options("a1:/b:ro,cached"), ["cached"]);
    }

    #[test]
    fn port_forms() {
        let show = |text: &str| -> Vec<String> {
            ports(text)
                .unwrap()
                .iter()
                .map(|p| format!("{}|{}|{}/{}", p.host_ip, p.published, p.target, p.protocol))
                .collect()
        };
        assert_eq!(show("80"), ["||80/tcp"]);
        assert_eq!(
            show("8000-8001:80-81/UDP"),
            ["|8000|80/udp", "|8001|81/udp"]
        );
        assert_eq!(show("127.0.0.1::5"), ["127.0.0.1||5/tcp"]);
        assert_eq!(show("[::1]:5:6"), ["::1|5|6/tcp"]);
        assert_eq!(show("::1:5:6"), ["::1|5|6/tcp"]);
        assert_eq!(show("9000-9002:90"), ["|9000-9002|90/tcp"]);
        assert_eq!(show("9-10"), ["||10/tcp", "||9/tcp"]);
        for bad in [
            "",
            "x",
            "80:",
            "1-2:1-3",
            "70000",
            "5-4",
            "1.2.3:1:1",
            "80/foo",
            "0-65535",
            "+1",
        ] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn command_lines() {
        let split = |text: &str| words(text).unwrap().words;
        assert_eq!(
            split(r#"a 'b c' "d \" e" f\ g '' x"y"z"#),
            ["a", "b c", "d \" e", "f g", "", "xyz"]
        );
        assert_eq!(split("  "), Vec::<String>::new());
        assert_eq!(
            split("echo `a b` $(c d) '\\n' \\n"),
            ["echo", "`a b`", "$(c d)", "\\n", "n"]
        );
        for bad in ["a 'b", "a \"b", "a (b)", "a )", "`a", "$(a", "a\\"] {
            assert!(words(bad).is_err(), "{bad}");
        }
        let cut = words("run 2>&1 | tee").unwrap();
        assert_eq!(cut.words, ["run"]);
        assert_eq!(cut.dropped.as_deref(), Some(">&1 | tee"));
    }
}
