//! Who an instance runs as, looked up in its own image, never in the host's files.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::root::inside;

/// passwd and group files beyond this are refused.
const MAX_FILE: u64 = 4 << 20;
/// The kernel's NGROUPS_MAX is 65536; nobody writes that many by hand.
const MAX_GROUPS: usize = 1024;

/// Numbers, and a home folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups: `gid`, those of the group file, and the service's own.
    pub groups: Vec<u32>,
    pub home: String,
}

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error(
        "the image's {file} has no {what} `{name}`; use a number, or add the {what} to the image"
    )]
    Unknown {
        what: &'static str,
        name: String,
        file: &'static str,
    },
    #[error("`{0}` is no user: expected `user`, `user:group`, or numbers")]
    Malformed(String),
    #[error("more than {MAX_GROUPS} groups")]
    TooManyGroups,
    #[error("cannot read the image's {file}: {source}")]
    Read {
        file: &'static str,
        source: io::Error,
    },
}

/// Looks `user` (`""`, `name`, `uid`, each with `:group`) up below the mounted `root`.
pub fn lookup(root: &Path, user: &str, group_add: &[String]) -> Result<Identity, UserError> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    resolve(user, group_add, &passwd, &group)
}

fn read(root: &Path, file: &'static str) -> Result<String, UserError> {
    let fail = |source| UserError::Read { file, source };
    let opened = match inside::open_read(root, file) {
        Ok(fd) => File::from(fd),
        // Images without these files (FROM scratch) have numbers only.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(String::new());
        }
        Err(e) => return Err(fail(e)),
    };
    let mut bytes = Vec::new();
    opened
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(io::Error::other("longer than 4 MiB")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_lines(text: &str) -> impl Iterator<Item = PasswdLine<'_>> {
    text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        Some(PasswdLine {
            name: fields.first()?,
            uid: fields.get(2)?.parse().ok()?,
            gid: fields.get(3)?.parse().ok()?,
            home: fields.get(5).copied().unwrap_or("/"),
        })
    })
}

/// `(name, gid, members)`
fn group_lines(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

fn group_id(name: &str, group: &str) -> Result<u32, UserError> {
    let number = name.parse().ok();
    let by_name = || group_lines(group).find(|(known, ..)| *known == name);
    let gid = number.or_else(|| by_name().map(|(_, gid, _)| gid));
    gid.ok_or_else(|| UserError::Unknown {
        what: "group",
        name: name.to_owned(),
        file: "/etc/group",
    })
}

fn resolve(
    user: &str,
    group_add: &[String],
    passwd: &str,
    group: &str,
) -> Result<Identity, UserError> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, "")) => (name, None),
        Some((name, group)) if !group.contains(':') => (name, Some(group)),
        Some(_) => return Err(UserError::Malformed(user.to_owned())),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number = name.parse::<u32>().ok();
    // A number never is a name, as with Docker.
    let line = passwd_lines(passwd).find(|l| match number {
        Some(uid) => l.uid == uid,
        None => l.name == name,
    });
    let uid = match (&line, number) {
        (Some(line), _) => line.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            return Err(UserError::Unknown {
                what: "user",
                name: name.to_owned(),
                file: "/etc/passwd",
            });
        }
    };
    let gid = match group_name {
        Some(text) => group_id(text, group)?,
        None => line.as_ref().map_or(0, |l| l.gid),
    };
    // Docker has it among them.
    let mut groups = vec![gid];
    // With an explicit group, Docker leaves the group file's memberships out.
    if let (Some(line), None) = (&line, group_name) {
        let member = |list: &str| list.split(',').any(|m| m.trim() == line.name);
        groups.extend(
            group_lines(group)
                .filter(|(_, _, m)| member(m))
                .map(|(_, gid, _)| gid),
        );
    }
    for name in group_add {
        groups.push(group_id(name, group)?);
    }
    groups.sort_unstable();
    groups.dedup();
    if groups.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups);
    }
    Ok(Identity {
        uid,
        gid,
        groups,
        home: line
            .map(|l| l.home.to_owned())
            .filter(|h| !h.is_empty())
            .unwrap_or_else(|| "/".into()),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nssl:x:50:web,other\nadm:x:4:other\n";

    fn of(user: &str, add: &[&str]) -> Result<Identity, UserError> {
        let add: Vec<String> = add.iter().map(|s| (*s).to_owned()).collect();
        resolve(user, &add, PASSWD, GROUP)
    }

    #[test]
    fn names_and_numbers_are_looked_up_in_the_image() {
        let web = of("web", &["adm", "777"]).unwrap();
        assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 34, "/var/www"));
        assert_eq!(web.groups, [4, 34, 50, 777]);
        assert_eq!(of("33", &[]).unwrap().gid, 34);
        assert_eq!(of("", &[]).unwrap().home, "/root");
        let unknown = of("1234", &[]).unwrap();
        assert_eq!(
            (unknown.uid, unknown.gid, unknown.home.as_str()),
            (1234, 0, "/")
        );
        assert_eq!(
            of("web:ssl", &[]).unwrap(),
            Identity {
                uid: 33,
                gid: 50,
                groups: vec![50],
                home: "/var/www".into()
            }
        );
        assert_eq!(of("5:6", &[]).unwrap().gid, 6);
        let named = resolve("7:8", &[], "7:x:33:34::/:/bin/sh\n", "8:x:50:\n").unwrap();
        assert_eq!((named.uid, named.gid), (7, 8));
        // What stands empty beside the colon is left out.
        assert_eq!(of("web:", &[]).unwrap(), of("web", &[]).unwrap());
        let group = of(":ssl", &[]).unwrap();
        assert_eq!(
            (group.uid, group.gid, group.home.as_str()),
            (0, 50, "/root")
        );
    }

    #[test]
    fn unknown_names_are_refused_and_said() {
        assert!(
            of("nobody", &[])
                .unwrap_err()
                .to_string()
                .contains("no user `nobody`")
        );
        assert!(
            of("web:nope", &[])
                .unwrap_err()
                .to_string()
                .contains("no group `nope`")
        );
        assert!(of("a:b:c", &[]).is_err());
    }
}
