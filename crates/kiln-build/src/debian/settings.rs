//! apt's settings in an image, where a RUN installs packages and nobody ever reads what apt
//! keeps: those of Debian's own container images (debuerreotype-minimizing-config), under
//! their names, because Containerfiles remove them by name (docker-clean, before a cache is
//! mounted at /var/cache/apt).

use std::io;

use super::edit::Edit;

const FOLDER: &str = "etc/apt/apt.conf.d";

/// pkgcache.bin, which Debian's docker-clean removes as well, saves a second `apt-get` of the
/// same RUN reading all again; no layer has it.
const SETTINGS: [(&str, &str); 4] = [
    (
        "docker-autoremove-suggests",
        "// What is only suggested does not keep a package from `apt-get autoremove`.\n\
         Apt::AutoRemove::SuggestsImportant \"false\";\n",
    ),
    (
        "docker-clean",
        "// Package files are of no use once they are installed. Remove this file where they\n\
         // are kept in a cache mount.\n\
         DPkg::Post-Invoke { \"rm -f /var/cache/apt/archives/*.deb \
         /var/cache/apt/archives/partial/*.deb || true\"; };\n",
    ),
    (
        "docker-gzip-indexes",
        "// Lists of packages stay small, and are fetched as what is quick to unpack.\n\
         Acquire::GzipIndexes \"true\";\n\
         Acquire::CompressionTypes::Order:: \"gz\";\n",
    ),
    (
        "docker-no-languages",
        "// Nobody reads translated descriptions here.\n\
         Acquire::Languages \"none\";\n",
    ),
];

/// Writes them into a root that has apt.
pub fn write(edit: &Edit) -> io::Result<()> {
    if edit.names(FOLDER)?.is_empty() {
        return Ok(());
    }
    for (name, text) in SETTINGS {
        edit.put_if_missing(&format!("{FOLDER}/{name}"), text, 0o644)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    #[test]
    fn a_root_with_apt_has_them_beside_its_own_and_another_has_none() {
        let root = tempfile::tempdir().unwrap();
        let edit = Edit::open(root.path()).unwrap();
        write(&edit).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        let folder = root.path().join(FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("01autoremove"), "").unwrap();
        fs::write(folder.join("docker-clean"), "a package's").unwrap();
        write(&edit).unwrap();
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 5);
        assert_eq!(read("docker-clean"), "a package's");
        assert!(read("docker-gzip-indexes").contains("Acquire::GzipIndexes \"true\";"));
    }
}
