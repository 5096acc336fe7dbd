//! Which devices an instance may use: nodes for libcontainer, rules for the devices
//! cgroup of v1, and the same rules as a small program for v2 (where the kernel
//! asks a BPF program attached to the group).

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kiln_model::instance::InstanceSecurity;
use kiln_model::spec::Device;
use serde_json::{Value, json};

use crate::sys;

/// Folders of the host's `/dev` that hold no devices of the machine, or are each instance's
/// own, as Docker leaves them out.
const NOT_OF_THE_MACHINE: [&str; 7] =
    ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
/// Made for every instance, or its terminal.
const OF_THE_INSTANCE: [&str; 8] = [
    "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx",
];
/// `/dev` has few levels (`/dev/bus/usb/001`).
const MAX_DEPTH: u32 = 8;

/// A folder of devices with more entries is no folder of devices.
const MAX_NODES: usize = 1024;
/// Rules beyond this make a program that no one can have meant.
const MAX_RULES: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the device {path} cannot be given to the instance: {source}")]
    Device { path: String, source: io::Error },
    #[error("`{0}` is no device cgroup rule (like `c 1:3 rwm`)")]
    Rule(String),
    #[error("more than {MAX_RULES} device rules")]
    TooMany,
}

/// Something that is allowed; all else isn't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `c`, `b`, or `a` for both.
    kind: char,
    /// `None`: any.
    major: Option<u32>,
    minor: Option<u32>,
    /// Of `rwm`.
    access: String,
}

/// A device node and the rules that let the instance use it.
pub struct Devices {
    pub nodes: Vec<Value>,
    pub allowed: Vec<Rule>,
}

/// null, zero, full, random, urandom, tty, console, ptmx, and the pseudo terminals.
const STANDARD: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

fn rule(kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> Rule {
    Rule {
        kind,
        major,
        minor,
        access: access.to_owned(),
    }
}

/// What `security` asks for, beside the standard devices; privileged: everything.
pub fn devices(security: &InstanceSecurity) -> Result<Devices, DeviceError> {
    let mut devices = Devices {
        nodes: Vec::new(),
        allowed: Vec::new(),
    };
    if security.privileged {
        devices.allowed.push(rule('a', None, None, "rwm"));
    } else {
        // Nodes may be made, as with Docker; opening them is another matter.
        devices.allowed.push(rule('c', None, None, "m"));
        devices.allowed.push(rule('b', None, None, "m"));
        let standard = STANDARD.map(|(major, minor)| rule('c', Some(major), minor, "rwm"));
        devices.allowed.extend(standard);
    }
    if security.privileged {
        let mut found = Vec::new();
        collect(Path::new("/dev"), 0, &mut found);
        let node = |(kind, meta, target): &(char, fs::Metadata, String)| node(*kind, meta, target);
        devices.nodes.extend(found.iter().map(node));
    }
    for device in &security.devices {
        for (kind, meta, target) in nodes(device)? {
            let (major, minor) = (
                rustix::fs::major(meta.rdev()),
                rustix::fs::minor(meta.rdev()),
            );
            // Where a whole `/dev` is given, this says more of one of them.
            devices.nodes.retain(|n| n["path"] != target.as_str());
            let access = match device.permissions.as_str() {
                "" => "rwm",
                some => some,
            };
            devices
                .allowed
                .push(rule(kind, Some(major), Some(minor), access));
            devices.nodes.push(node(kind, &meta, &target));
        }
    }
    for text in &security.device_cgroup_rules {
        let rule = parse_rule(text).ok_or_else(|| DeviceError::Rule(text.clone()))?;
        devices.allowed.push(rule);
    }
    if devices.allowed.len() > MAX_RULES {
        return Err(DeviceError::TooMany);
    }
    Ok(devices)
}

fn node(kind: char, meta: &fs::Metadata, target: &str) -> Value {
    let (major, minor) = (
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev()),
    );
    json!({
        "path": target, "type": kind.to_string(), "major": major, "minor": minor,
        "fileMode": meta.mode() & 0o7777, "uid": meta.uid(), "gid": meta.gid(),
    })
}

/// The machine's devices, for privileged instances. What comes and goes meanwhile is left
/// out; links show nowhere, as with Docker.
fn collect(folder: &Path, depth: u32, found: &mut Vec<(char, fs::Metadata, String)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(meta) = entry.metadata() else { continue };
        let Some(text) = path.to_str() else { continue };
        let is = |list: &[&str]| depth == 0 && list.iter().any(|n| name == *n);
        if meta.is_dir() && depth < MAX_DEPTH && !is(&NOT_OF_THE_MACHINE) {
            collect(&path, depth + 1, found);
        } else if let Some(kind) = device_kind(&meta)
            && !is(&OF_THE_INSTANCE)
            && found.len() < MAX_NODES
        {
            found.push((kind, meta, text.to_owned()));
        }
    }
}

fn device_kind(meta: &fs::Metadata) -> Option<char> {
    let kind = meta.file_type();
    match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) => Some('c'),
        (_, true) => Some('b'),
        _ => None,
    }
}

/// `c 1:3 rwm`, `a *:* rwm`.
fn parse_rule(text: &str) -> Option<Rule> {
    let mut words = text.split_whitespace();
    let (kind, numbers, access) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = numbers.split_once(':')?;
    let number = |text: &str| match text {
        "*" => Some(None),
        text => text.parse().ok().map(Some),
    };
    let known = matches!(kind, "a" | "b" | "c")
        && access.chars().all(|c| "rwm".contains(c))
        && words.next().is_none();
    known.then_some(rule(
        kind.chars().next()?,
        number(major)?,
        number(minor)?,
        access,
    ))
}

/// A device, or all devices of a folder.
fn nodes(device: &Device) -> Result<Vec<(char, fs::Metadata, String)>, DeviceError> {
    let fail = |source| DeviceError::Device {
        path: device.source.clone(),
        source,
    };
    let meta = fs::metadata(&device.source).map_err(fail)?;
    if let Some(kind) = device_kind(&meta) {
        return Ok(vec![(kind, meta, device.target.clone())]);
    }
    if !meta.is_dir() {
        return Err(fail(io::Error::other("it is not a device")));
    }
    let mut list = Vec::new();
    for entry in fs::read_dir(&device.source).map_err(fail)?.take(MAX_NODES) {
        let entry = entry.map_err(fail)?;
        let meta = fs::metadata(entry.path()).map_err(fail)?;
        if let (Some(kind), Ok(name)) = (device_kind(&meta), entry.file_name().into_string()) {
            let target = device.target.trim_end_matches('/');
            list.push((kind, meta, format!("{target}/{name}")));
        }
    }
    Ok(list)
}

/// The rules as libcontainer wants them for v1: nothing, and then what is allowed.
pub fn v1_rules(allowed: &[Rule]) -> Vec<Value> {
    let mut list = vec![json!({ "allow": false, "access": "rwm" })];
    list.extend(allowed.iter().map(|rule| {
        let mut value =
            json!({ "allow": true, "type": rule.kind.to_string(), "access": rule.access });
        for (key, number) in [("major", rule.major), ("minor", rule.minor)] {
            if let Some(number) = number {
                value[key] = json!(number);
            }
        }
        value
    }));
    list
}

/// Makes the kernel ask the rules for every use of a device in the v2 group `dir`.
pub fn confine_v2(dir: &Path, allowed: &[Rule]) -> io::Result<()> {
    let group = fs::File::open(dir)?;
    let program = sys::load_device_program(&assemble(allowed))?;
    sys::attach_device_program(group.as_fd(), program.as_fd())
}

/// One BPF instruction (linux/bpf.h, `struct bpf_insn`).
fn instruction(code: u8, registers: u8, offset: i16, immediate: u32) -> u64 {
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate) << 32
}

/// The program: 1 where a rule allows the access, else 0. The context holds
/// `access << 16 | type`, major and minor (`struct bpf_cgroup_dev_ctx`).
fn assemble(allowed: &[Rule]) -> Vec<u64> {
    const LOAD_WORD: u8 = 0x61;
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const AND_32: u8 = 0x54;
    const SHIFT_RIGHT: u8 = 0x77;
    const JUMP_UNLESS_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    const TYPE: u8 = 2;
    const ACCESS: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    let mut program = vec![
        instruction(LOAD_WORD, TYPE | 1 << 4, 0, 0),
        instruction(MOVE, ACCESS | TYPE << 4, 0, 0),
        instruction(AND_32, TYPE, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 16),
        instruction(LOAD_WORD, MAJOR | 1 << 4, 4, 0),
        instruction(LOAD_WORD, MINOR | 1 << 4, 8, 0),
    ];
    for rule in allowed {
        let mut tests: Vec<(u8, u32)> = Vec::new();
        match rule.kind {
            'b' => tests.push((TYPE, 1)),
            'c' => tests.push((TYPE, 2)),
            _ => {}
        }
        tests.extend(rule.major.map(|n| (MAJOR, n)));
        tests.extend(rule.minor.map(|n| (MINOR, n)));
        let granted = rule.access.chars().fold(0, |bits, c| {
            bits | match c {
                'm' => 1,
                'r' => 2,
                _ => 4,
            }
        });
        // What is asked for beyond the granted must be nothing; two to set up.
        let mut left = (tests.len() + 3 + 2) as i16;
        for (register, value) in tests {
            left -= 1;
            program.push(instruction(JUMP_UNLESS_EQUAL, register, left, value));
        }
        program.push(instruction(MOVE, 1 | ACCESS << 4, 0, 0));
        program.push(instruction(AND_32, 1, 0, 7 & !granted));
        program.push(instruction(JUMP_UNLESS_EQUAL, 1, 2, 0));
        program.push(instruction(MOVE_IMMEDIATE, 0, 0, 1));
        program.push(instruction(EXIT, 0, 0, 0));
    }
    program.push(instruction(MOVE_IMMEDIATE, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn rules_are_read_and_wrong_ones_are_refused() {
        assert_eq!(parse_rule("c 1:* rw"), Some(rule('c', Some(1), None, "rw")));
        for bad in [
            "",
            "c 1:3",
            "x 1:3 r",
            "c 1 r",
            "c 1:3 q",
            "c 1:3 r more",
            "c a:3 r",
        ] {
            assert_eq!(parse_rule(bad), None, "{bad}");
        }
        let security = InstanceSecurity {
            devices: vec![Device {
                source: "/etc/passwd".into(),
                target: "/dev/x".into(),
                permissions: "r".into(),
            }],
            ..InstanceSecurity::default()
        };
        assert!(devices(&security).is_err());
    }

    /// On any machine with a unified hierarchy somewhere, in use or not.
    #[test]
    fn a_v2_group_is_confined_by_the_program() {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let unified = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let at = fields.nth(1)?;
            (fields.next()? == "cgroup2").then(|| at.to_owned())
        });
        let Some(unified) = unified.filter(|_| rustix::process::geteuid().is_root()) else {
            assert!(
                std::env::var_os("KILN_TEST_STRICT").is_none(),
                "needs root and cgroup2"
            );
            eprintln!("SKIPPED: needs root and a cgroup2 mount");
            return;
        };
        let dir = Path::new(&unified).join(format!("kiln-test-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let allowed = devices(&InstanceSecurity::default()).unwrap().allowed;
        let confined = confine_v2(&dir, &allowed);
        let script = format!(
            "echo $$ > {}/cgroup.procs; head -c1 /dev/zero >/dev/null && echo zero; \
             rm -f /tmp/kiln-node-$$; mknod /tmp/kiln-node-$$ c 1 1 && echo made; \
             head -c1 /tmp/kiln-node-$$ >/dev/null && echo memory; rm -f /tmp/kiln-node-$$; \
             head -c1 /dev/kmsg >/dev/null && echo kmsg; true",
            dir.display()
        );
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap();
        let _ = fs::remove_dir(&dir);
        confined.unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            text,
            "zero\nmade\n",
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
