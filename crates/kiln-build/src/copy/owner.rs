//! `user[:group]` by number or by name, looked up in an image's own passwd and group.

/// A passwd or group file is read up to this many bytes.
pub const MAX_ACCOUNTS: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// The greatest number that is one: beyond it docker takes the digits for a name.
const MAX_ID: u32 = i32::MAX as u32;

/// A user as an image knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub owner: Owner,
    pub home: Option<String>,
}

/// Why an owner can't be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnerError {
    #[error("the user `{0}` is not in the image's /etc/passwd")]
    User(String),
    #[error("the group `{0}` is not in the image's /etc/group")]
    Group(String),
}

/// Finds the numbers for `text`: a user without a group has its group from passwd, or else
/// root's; no user is root. `same_group`, as COPY --chown has it: a number alone is the
/// group's, too, and what `user:` leaves out is root's.
pub fn lookup(
    text: &str,
    passwd: &str,
    group: &str,
    same_group: bool,
) -> Result<Account, OwnerError> {
    let (user, wanted) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user);
    let line = passwd
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .filter(|f| f.len() >= 4)
        // A number never is a name.
        .find(|f| match number {
            Some(_) => f[2].parse().ok() == number,
            None => f[0] == user,
        });
    let known = line.as_ref().and_then(|fields| {
        let uid = fields[2].parse().ok()?;
        let gid = fields[3].parse().ok()?;
        Some(Owner { uid, gid })
    });
    let uid = match (known, number) {
        (Some(owner), _) => owner.uid,
        (None, Some(number)) => number,
        (None, None) => return Err(OwnerError::User(user.to_owned())),
    };
    let gid = match wanted {
        Some("") if same_group => 0,
        Some(group_name) if !group_name.is_empty() => group_number(group_name, group)?,
        None if number.is_some() && same_group => uid,
        _ => known.map(|owner| owner.gid).unwrap_or(0),
    };
    Ok(Account {
        owner: Owner { uid, gid },
        home: line
            .and_then(|f| f.get(5).map(|h| (*h).to_owned()))
            .filter(|h| !h.is_empty()),
    })
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

fn group_number(name: &str, group: &str) -> Result<u32, OwnerError> {
    let by_name = || {
        group.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.len() >= 3 && fields[0] == name).then(|| fields[2].parse().ok())?
        })
    };
    id(name)
        .or_else(by_name)
        .ok_or_else(|| OwnerError::Group(name.to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:web\n";

    #[test]
    fn owners_are_numbers_or_names_of_the_image() {
        let owner = |text: &str, same| {
            lookup(text, PASSWD, GROUP, same).map(|a| (a.owner.uid, a.owner.gid))
        };
        assert_eq!(owner("web", true).unwrap(), (33, 34));
        assert_eq!(owner("web:staff", true).unwrap(), (33, 50));
        assert_eq!(owner("1000", true).unwrap(), (1000, 1000));
        assert_eq!(owner("1000", false).unwrap(), (1000, 0));
        assert_eq!(owner("33", false).unwrap(), (33, 34));
        assert_eq!(owner("5:7", false).unwrap(), (5, 7));
        assert_eq!(
            owner("nobody", true),
            Err(OwnerError::User("nobody".into()))
        );
        assert_eq!(
            owner("web:nope", true),
            Err(OwnerError::Group("nope".into()))
        );
        assert_eq!(owner("1000:", true).unwrap(), (1000, 0));
        assert_eq!(owner(":staff", true).unwrap(), (0, 50));
        assert_eq!(owner(":", true).unwrap(), (0, 0));
        assert_eq!(owner(":staff", false).unwrap(), (0, 50));
        assert_eq!(owner("33:", false).unwrap(), (33, 34));
        assert_eq!(owner("2147483647", true).unwrap().0, i32::MAX as u32);
        assert!(owner("2147483648", true).is_err());
        assert!(owner("5:2147483648", true).is_err());
        assert_eq!(
            lookup("web", PASSWD, GROUP, true).unwrap().home.unwrap(),
            "/var/www"
        );
    }
}
