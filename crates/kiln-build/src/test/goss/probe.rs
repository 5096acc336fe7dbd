//! What each kind of resource finds. Without its thing, a resource has its first attribute
//! alone, and that says so.

use std::fs;
use std::os::fd::OwnedFd;

use kiln_model::Millis;
use kiln_model::instance::ExitStatus;
use kiln_model::suite::Probe;
use kiln_runtime::ExecSpec;
use rustix::fs::{FileType, OFlags};
use serde_json::{Value, json};

use super::inside::Inside;
use super::{Found, http, network, packages};
use crate::test::check;

type Asked<'a> = &'a dyn Fn(&str) -> bool;

pub(super) fn look(inside: &Inside<'_>, probe: &Probe, asked: Asked<'_>) -> Result<Found, String> {
    match probe {
        Probe::Addr {
            host,
            port,
            timeout: _,
        } => {
            let own = inside.is_own(host)?;
            let reachable = own && inside.runtime.dial(inside.id, *port).is_ok();
            Ok(Found::from([("reachable", json!(reachable))]))
        }
        Probe::Command { exec, timeout } => command(inside, exec, *timeout),
        Probe::Dns { host } => {
            let addresses = inside.addresses(host)?;
            let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            Ok(Found::from([
                ("resolvable", json!(!texts.is_empty())),
                ("addrs", json!(texts)),
            ]))
        }
        Probe::File { path } => file(inside, path, asked),
        Probe::Group { name } => {
            let found = inside.account("/etc/group", |fields| fields[0] == name)?;
            Ok(match found {
                None => absent("exists"),
                Some(fields) => Found::from([("exists", json!(true)), ("gid", number(&fields[2]))]),
            })
        }
        Probe::Http(request) => http::look(inside, request),
        Probe::Interface { name } => network::interface(inside, name),
        Probe::KernelParam { name } => {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            let bytes = inside.bytes(&path)?;
            let bytes = bytes.ok_or_else(|| format!("there is no {name}"))?;
            let text = String::from_utf8_lossy(&bytes);
            Ok(Found::from([("value", json!(text.trim_end()))]))
        }
        Probe::Matching { content } => Ok(Found::from([("matches", content.clone())])),
        Probe::Mount { path } => mount(inside, path, asked),
        Probe::Package { name } => {
            let versions = packages::versions(inside, name)?;
            Ok(match versions.is_empty() {
                true => absent("installed"),
                false => Found::from([("installed", json!(true)), ("versions", json!(versions))]),
            })
        }
        Probe::Port { protocol, port } => network::port(inside, *protocol, *port),
        Probe::Process { comm } => {
            let running = processes(inside)?.iter().any(|name| name == comm);
            Ok(Found::from([("running", json!(running))]))
        }
        Probe::User { name } => user(inside, name),
    }
}

pub(super) fn absent(attribute: &'static str) -> Found {
    Found::from([(attribute, json!(false))])
}

/// A number of a file's, or its text where it is none.
fn number(text: &str) -> Value {
    text.parse::<u64>()
        .map_or_else(|_| json!(text), |n| json!(n))
}

fn command(inside: &Inside<'_>, exec: &str, timeout: Millis) -> Result<Found, String> {
    let spec = ExecSpec {
        argv: ["sh", "-c", exec].map(str::to_owned).to_vec(),
        timeout: Some(timeout),
        ..ExecSpec::default()
    };
    let ended = check::capture(inside.runtime, inside.id, &spec)?;
    let status = match ended.status {
        ExitStatus::Code(code) => json!(code),
        // As Go gives it.
        ExitStatus::Signal(_) => json!(-1),
        other => return Err(format!("`{exec}` {other}")),
    };
    Ok(Found::from([
        ("exit-status", status),
        ("stdout", json!(ended.stdout)),
        ("stderr", json!(ended.stderr)),
    ]))
}

fn file(inside: &Inside<'_>, path: &str, asked: Asked<'_>) -> Result<Found, String> {
    let Some(itself) = inside.open(path, OFlags::PATH | OFlags::NOFOLLOW)? else {
        return Ok(absent("exists"));
    };
    let stat = rustix::fs::fstat(&itself).map_err(|e| e.to_string())?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut found = Found::from([
        ("exists", json!(true)),
        ("mode", json!(format!("{:04o}", stat.st_mode & 0o7777))),
        ("size", json!(stat.st_size)),
        ("uid", json!(stat.st_uid)),
        ("gid", json!(stat.st_gid)),
        ("filetype", json!(file_type(kind))),
    ]);
    for (attribute, accounts, id) in [
        ("owner", "/etc/passwd", stat.st_uid),
        ("group", "/etc/group", stat.st_gid),
    ] {
        if asked(attribute) {
            let id = id.to_string();
            let account = inside.account(accounts, |fields| fields[2] == id)?;
            found.extend(account.map(|fields| (attribute, json!(fields[0]))));
        }
    }
    if kind == FileType::Symlink {
        found.insert("linked-to", json!(link(&itself)?));
    }
    let of_content = ["contents", "contains", "sha256", "sha512"];
    if of_content.into_iter().any(asked) && kind != FileType::Directory {
        let bytes = inside.bytes(path)?;
        let bytes = bytes.ok_or_else(|| format!("{path} is a link to nothing"))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        found.insert("contains", json!(text));
        found.insert("contents", json!(text));
        found.insert("sha256", json!(kiln_model::Digest::of(&bytes).hex()));
        let long = ring::digest::digest(&ring::digest::SHA512, &bytes);
        found.insert("sha512", json!(hex::encode(long)));
    }
    Ok(found)
}

fn link(itself: &OwnedFd) -> Result<String, String> {
    let target = rustix::fs::readlinkat(itself, "", Vec::new()).map_err(|e| e.to_string())?;
    Ok(target.to_string_lossy().into_owned())
}

fn file_type(kind: FileType) -> &'static str {
    match kind {
        FileType::Symlink => "symlink",
        FileType::Directory => "directory",
        FileType::Socket => "socket",
        FileType::Fifo => "pipe",
        FileType::CharacterDevice => "character-device",
        FileType::BlockDevice => "block-device",
        FileType::RegularFile | FileType::Unknown => "file",
    }
}

/// The names of the programs in the instance's process namespace.
fn processes(inside: &Inside<'_>) -> Result<Vec<String>, String> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid"));
    let own = namespace(&inside.pid.to_string()).map_err(|e| e.to_string())?;
    let mut names = Vec::new();
    for entry in fs::read_dir("/proc").map_err(|e| e.to_string())? {
        let name = entry.map_err(|e| e.to_string())?.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        // One that has just ended has none.
        if namespace(pid).is_ok_and(|theirs| theirs == own)
            && let Ok(comm) = fs::read_to_string(format!("/proc/{pid}/comm"))
        {
            names.push(comm.trim_end().to_owned());
        }
    }
    Ok(names)
}

fn user(inside: &Inside<'_>, name: &str) -> Result<Found, String> {
    let account = inside.account("/etc/passwd", |fields| fields[0] == name)?;
    let Some(fields) = account.filter(|fields| fields.len() >= 7) else {
        return Ok(absent("exists"));
    };
    let groups = inside.text("/etc/group")?;
    let groups = groups
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let groups: Vec<String> = groups
        .filter(|group| {
            let members = group.get(3).copied().unwrap_or("");
            group.get(2) == Some(&fields[3].as_str()) || members.split(',').any(|m| m == name)
        })
        .map(|group| group[0].to_owned())
        .collect();
    Ok(Found::from([
        ("exists", json!(true)),
        ("uid", number(&fields[2])),
        ("gid", number(&fields[3])),
        ("home", json!(fields[5])),
        ("shell", json!(fields[6])),
        ("groups", json!(groups)),
    ]))
}

/// The mount that is seen at `path`, by proc(5), "mountinfo".
fn mount(inside: &Inside<'_>, path: &str, asked: Asked<'_>) -> Result<Found, String> {
    let text = inside.proc("mountinfo")?;
    let mut mounts = text.lines().filter_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let system: Vec<&str> = system.split(' ').collect();
        let at = mount.get(4)?.replace("\\040", " ");
        Some((
            at,
            *mount.get(5)?,
            *system.first()?,
            *system.get(1)?,
            *system.get(2)?,
        ))
    });
    let Some((_, options, kind, source, own)) = mounts.rfind(|(at, ..)| at == path) else {
        return Ok(absent("exists"));
    };
    let list = |text: &str| json!(text.split(',').collect::<Vec<_>>());
    let mut found = Found::from([
        ("exists", json!(true)),
        ("opts", list(options)),
        ("vfs-opts", list(own)),
        ("source", json!(source)),
        ("filesystem", json!(kind)),
    ]);
    if asked("usage") {
        let there = inside.open(path, OFlags::PATH)?;
        let there = there.ok_or_else(|| format!("{path} can't be entered"))?;
        let stat = rustix::fs::fstatvfs(&there).map_err(|e| e.to_string())?;
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        // Percent, to the nearest.
        let blocks = stat.f_blocks.max(1);
        found.insert("usage", json!((used * 100 + blocks / 2) / blocks));
    }
    Ok(found)
}
