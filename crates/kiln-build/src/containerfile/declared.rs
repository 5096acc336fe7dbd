//! What no Containerfile can say in one instruction, and `x-kiln.image` does: accounts,
//! folders, files and links.

use std::fmt;

use kiln_model::spec::{DeclaredContent, DeclaredEntry, DeclaredGroup, DeclaredUser};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    pub groups: Vec<DeclaredGroup>,
    pub users: Vec<DeclaredUser>,
    pub entries: Vec<DeclaredEntry>,
}

impl Declared {
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.users.is_empty() && self.entries.is_empty()
    }
}

impl fmt::Display for Declared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |wanted: fn(&DeclaredContent) -> bool| {
            let entries = self.entries.iter();
            entries.filter(|entry| wanted(&entry.what)).count()
        };
        let parts = [
            (self.groups.len(), "groups"),
            (self.users.len(), "users"),
            (count(|w| matches!(w, DeclaredContent::Folder)), "folders"),
            (
                count(|w| matches!(w, DeclaredContent::Copy(_) | DeclaredContent::Text(_))),
                "files",
            ),
            (count(|w| matches!(w, DeclaredContent::Link(_))), "links"),
        ];
        let said = parts.iter().filter(|(n, _)| *n > 0);
        let said: Vec<String> = said.map(|(n, what)| format!("{what}: {n}")).collect();
        write!(f, "x-kiln.image {}", said.join(", "))
    }
}
