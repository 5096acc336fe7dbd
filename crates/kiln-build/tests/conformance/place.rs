//! A case's context on the disk, and what it is served.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::archive;
use super::case::{Case, Part, unescape};

/// What is at which path below the server's root.
type Pages = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

pub struct Server {
    pub url: String,
    pages: Pages,
}

impl Server {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let pages = Pages::default();
        let served = pages.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut buffer = [0; 8192];
                let length = stream.read(&mut buffer).unwrap_or_default();
                let head = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let path = head.split(' ').nth(1).unwrap_or_default();
                let path = path.split('?').next().unwrap_or_default();
                let body = served.lock().unwrap().get(path).cloned();
                let status = if body.is_some() { "200 OK" } else { "404 No" };
                let body = body.unwrap_or_default();
                let answer = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes());
                if !head.starts_with("HEAD") {
                    let _ = stream.write_all(&body);
                }
            }
        });
        Self { url, pages }
    }

    /// Makes what a case asks for be there, and gives the address of it.
    pub fn serve(&self, case: &Case) -> String {
        for part in case.parts.iter().filter(|part| part.verb == "serve") {
            let path = format!("/{}/{}", case.name, part.path().0);
            let body = match part.path().1 {
                "" => part.text().into_bytes(),
                _ => archive::bytes(part),
            };
            self.pages.lock().unwrap().insert(path, body);
        }
        format!("{}/{}", self.url, case.name)
    }
}

/// The folders of a case.
pub struct Place {
    pub folder: tempfile::TempDir,
    /// Named contexts.
    pub others: BTreeMap<String, PathBuf>,
    /// Sockets are there as long as somebody listens.
    _sockets: Vec<UnixListener>,
}

impl Place {
    pub fn context(&self) -> PathBuf {
        self.folder.path().join("context")
    }

    pub fn new(case: &Case) -> Self {
        let mut place = Self {
            folder: tempfile::tempdir().unwrap(),
            others: BTreeMap::new(),
            _sockets: Vec::new(),
        };
        fs::create_dir(place.context()).unwrap();
        for part in &case.parts {
            place.part(part);
        }
        // Modes at the end, so that they keep nobody out before.
        for part in &case.parts {
            let mode = match part.verb.as_str() {
                "file" | "bytes" => part.path().1,
                "dir" => part.path().1,
                _ => "",
            };
            if !mode.is_empty() {
                let mode = u32::from_str_radix(mode, 8).unwrap();
                let path = place.path(part.path().0);
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        place
    }

    fn path(&mut self, name: &str) -> PathBuf {
        let Some(other) = name.strip_prefix('@') else {
            return self.context().join(plain(name));
        };
        let (other, name) = other.split_once('/').unwrap();
        let root = self.folder.path().join("others").join(other);
        self.others.insert(other.to_owned(), root.clone());
        root.join(plain(name))
    }

    fn part(&mut self, part: &Part) {
        let known = [
            "file", "bytes", "sparse", "dir", "link", "hard", "fifo", "socket", "tar", "xattr",
        ];
        if !known.contains(&part.verb.as_str()) {
            return;
        }
        let (name, rest) = part.path();
        let path = self.path(name);
        folder(path.parent().unwrap());
        match part.verb.as_str() {
            "file" => write(&path, part.text().as_bytes()),
            "bytes" => write(&path, &unescape(&part.body.concat())),
            "tar" => write(&path, &archive::bytes(part)),
            "sparse" => {
                let file = fs::File::create(&path).unwrap();
                file.set_len(rest.parse().unwrap()).unwrap();
            }
            "dir" => folder(&path),
            "link" => symlink(rest.strip_prefix("-> ").unwrap(), &path).unwrap(),
            "hard" => {
                let first = self.path(rest.strip_prefix("= ").unwrap());
                fs::hard_link(first, &path).unwrap();
            }
            "fifo" => mknodat(CWD, &path, FileType::Fifo, Mode::from(0o644), 0).unwrap(),
            "xattr" => {
                let (name, value) = rest.split_once(' ').unwrap();
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(&path, name, &unescape(value), flags).unwrap();
            }
            _ => self._sockets.push(UnixListener::bind(&path).unwrap()),
        }
    }
}

/// A name without its escapes.
fn plain(name: &str) -> OsString {
    OsString::from_vec(unescape(name))
}

/// Whatever the umask.
fn folder(path: &Path) {
    if path.is_dir() {
        return;
    }
    folder(path.parent().unwrap());
    fs::create_dir(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}
