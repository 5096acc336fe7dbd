//! Users and groups put into an image's account files, as useradd and groupadd would, but
//! with numbers that are said and without anything being run. Texts in, texts out.

use kiln_model::spec::{DeclaredGroup, DeclaredPlace, DeclaredUser};

/// The account files of a root; `None`: the root has none of this kind, and gets none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    pub passwd: String,
    pub group: String,
    pub shadow: Option<String>,
    pub gshadow: Option<String>,
}

/// Why an account can't be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    #[error(
        "{place}: the base has the {kind} `{name}` already, with the number {number}; it can be \
         named without being declared"
    )]
    Known {
        place: DeclaredPlace,
        kind: &'static str,
        name: String,
        number: String,
    },
    #[error("{place}: the {kind} `{other}` has the number {number} already")]
    Taken {
        place: DeclaredPlace,
        kind: &'static str,
        other: String,
        number: u32,
    },
    #[error("{place}: there is no group `{name}`, neither in the base nor declared")]
    NoGroup { place: DeclaredPlace, name: String },
}

impl Accounts {
    pub fn add_group(&mut self, group: &DeclaredGroup) -> Result<(), AccountError> {
        self.group_line(&group.name, group.gid, &group.place)
    }

    pub fn add_user(&mut self, user: &DeclaredUser) -> Result<(), AccountError> {
        free(&self.passwd, "user", &user.name, user.uid, &user.place)?;
        let gid = match &user.group {
            Some(group) => self.gid(group, &user.place)?,
            None => match number(&self.group, &user.name) {
                Some(gid) => gid.to_owned(),
                None => {
                    self.group_line(&user.name, user.uid, &user.place)?;
                    user.uid.to_string()
                }
            },
        };
        for group in &user.groups {
            self.join(group, user)?;
        }
        let (name, uid) = (&user.name, user.uid);
        let line = format!("{name}:x:{uid}:{gid}::{}:{}", user.home, user.shell);
        append(&mut self.passwd, &line);
        if let Some(shadow) = &mut self.shadow {
            // No password, and one that never grows old.
            append(shadow, &format!("{name}:!*:::::::"));
        }
        Ok(())
    }

    fn group_line(
        &mut self,
        name: &str,
        gid: u32,
        place: &DeclaredPlace,
    ) -> Result<(), AccountError> {
        free(&self.group, "group", name, gid, place)?;
        append(&mut self.group, &format!("{name}:x:{gid}:"));
        if let Some(gshadow) = &mut self.gshadow {
            append(gshadow, &format!("{name}:!::"));
        }
        Ok(())
    }

    fn gid(&self, group: &str, place: &DeclaredPlace) -> Result<String, AccountError> {
        let known = number(&self.group, group).map(str::to_owned);
        let known = known.or_else(|| group.parse::<u32>().ok().map(|gid| gid.to_string()));
        known.ok_or_else(|| AccountError::NoGroup {
            place: place.clone(),
            name: group.to_owned(),
        })
    }

    /// Makes the user a member of a group that is there.
    fn join(&mut self, group: &str, user: &DeclaredUser) -> Result<(), AccountError> {
        let mut found = false;
        for text in [Some(&mut self.group), self.gshadow.as_mut()] {
            let Some(text) = text else { continue };
            let lines = text.lines().map(|line| match name_of(line) == group {
                true => {
                    found = true;
                    let alone = line.ends_with([':', ',']);
                    format!("{line}{}{}", if alone { "" } else { "," }, user.name)
                }
                false => line.to_owned(),
            });
            let lines: Vec<String> = lines.collect();
            *text = lines.iter().map(|line| format!("{line}\n")).collect();
        }
        match found {
            true => Ok(()),
            false => Err(AccountError::NoGroup {
                place: user.place.clone(),
                name: group.to_owned(),
            }),
        }
    }
}

fn name_of(line: &str) -> &str {
    line.split(':').next().unwrap_or_default()
}

fn number_of(line: &str) -> &str {
    line.split(':').nth(2).unwrap_or_default()
}

fn number<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let line = text.lines().find(|line| name_of(line) == name)?;
    Some(number_of(line))
}

fn free(
    text: &str,
    kind: &'static str,
    name: &str,
    wanted: u32,
    place: &DeclaredPlace,
) -> Result<(), AccountError> {
    if let Some(number) = number(text, name) {
        return Err(AccountError::Known {
            place: place.clone(),
            kind,
            name: name.to_owned(),
            number: number.to_owned(),
        });
    }
    let same = |line: &&str| number_of(line).parse() == Ok(wanted);
    match text.lines().find(same) {
        None => Ok(()),
        Some(line) => Err(AccountError::Taken {
            place: place.clone(),
            kind,
            other: name_of(line).to_owned(),
            number: wanted,
        }),
    }
}

fn append(text: &mut String, line: &str) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn base() -> Accounts {
        Accounts {
            passwd: "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/:/bin/false".into(),
            group: "root:x:0:\nstaff:x:50:\nshadow:x:42:web\n".into(),
            shadow: Some("root:*:1::::::\n".into()),
            gshadow: None,
        }
    }

    fn user(name: &str, uid: u32) -> DeclaredUser {
        DeclaredUser {
            name: name.into(),
            uid,
            group: None,
            groups: Vec::new(),
            home: "/h".into(),
            shell: "/s".into(),
            place: DeclaredPlace::default(),
        }
    }

    #[test]
    fn a_user_gets_lines_a_group_of_its_own_and_is_made_a_member() {
        let mut accounts = base();
        let mut app = user("app", 1000);
        app.groups = vec!["staff".into(), "shadow".into()];
        accounts.add_user(&app).unwrap();
        accounts
            .add_user(&DeclaredUser {
                group: Some("staff".into()),
                ..user("two", 1001)
            })
            .unwrap();
        assert_eq!(
            accounts.passwd,
            "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/:/bin/false\napp:x:1000:1000::/h:/s\n\
             two:x:1001:50::/h:/s\n"
        );
        assert_eq!(
            accounts.group,
            "root:x:0:\nstaff:x:50:app\nshadow:x:42:web,app\napp:x:1000:\n"
        );
        let shadow = "root:*:1::::::\napp:!*:::::::\ntwo:!*:::::::\n";
        assert_eq!(accounts.shadow.as_deref(), Some(shadow));
        assert_eq!(accounts.gshadow, None);
    }

    #[test]
    fn what_is_taken_or_missing_is_told() {
        let mut accounts = base();
        let told = |error: AccountError| error.to_string();
        let known = told(accounts.add_user(&user("web", 5)).unwrap_err());
        assert!(
            known.contains("the user `web` already, with the number 33"),
            "{known}"
        );
        let taken = told(accounts.add_user(&user("app", 33)).unwrap_err());
        assert!(
            taken.contains("the user `web` has the number 33"),
            "{taken}"
        );
        // Its own group would have the number of another.
        let taken = told(accounts.add_user(&user("app", 50)).unwrap_err());
        assert!(
            taken.contains("the group `staff` has the number 50"),
            "{taken}"
        );
        let mut app = user("app", 9);
        app.groups = vec!["nope".into()];
        let missing = told(accounts.add_user(&app).unwrap_err());
        assert!(missing.contains("no group `nope`"), "{missing}");
        let group = DeclaredGroup {
            name: "staff".into(),
            gid: 7,
            place: DeclaredPlace::default(),
        };
        assert!(accounts.add_group(&group).is_err());
    }
}
