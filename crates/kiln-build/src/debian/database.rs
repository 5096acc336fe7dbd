//! dpkg's own records of what is in a root: `status`, the `info` folder, trigger
//! interests; or, for a base without dpkg, one file per package in `status.d`, as
//! distroless images have it: Trivy and Syft (and so Grype) read it beside `status`, and
//! nothing claims that a dpkg manages these files. Texts are made here; [`write`] and [`write_distroless`] put them
//! into the root.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

use super::deb::Deb;
use super::edit::Edit;
use super::index;

const DPKG: &str = "var/lib/dpkg";

/// A package whose files are in the root.
pub struct Unpacked<'d> {
    pub deb: &'d Deb,
    /// The paths it brought, as in dpkg's lists.
    pub paths: Vec<String>,
}

/// The name dpkg's info files carry: with the architecture where several could be
/// installed side by side.
pub fn info_name(deb: &Deb) -> String {
    match deb.field("Multi-Arch") {
        "same" => format!("{}:{}", deb.field("Package"), deb.field("Architecture")),
        _ => deb.field("Package").into(),
    }
}

/// The stanza of a package that is unpacked and waits for being configured.
fn status_stanza(deb: &Deb) -> String {
    let mut text = String::new();
    for line in deb.control.lines() {
        text.push_str(line);
        text.push('\n');
        if line.starts_with("Package:") {
            text.push_str("Status: install ok unpacked\n");
        }
    }
    let conffiles = deb.conffiles();
    if !conffiles.is_empty() {
        text.push_str("Conffiles:\n");
        for path in conffiles {
            let _ = writeln!(text, " {path} newconffile");
        }
    }
    text
}

/// Trigger interests: file name in `triggers/` → its lines.
fn triggers<'d>(debs: impl Iterator<Item = &'d Deb>) -> BTreeMap<String, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for deb in debs {
        let text = String::from_utf8_lossy(deb.info("triggers").unwrap_or_default()).into_owned();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let suffix = match words.next() {
                Some("interest" | "interest-await") => "",
                Some("interest-noawait") => "/noawait",
                _ => continue,
            };
            let Some(name) = words.next() else { continue };
            let holder = format!("{}{suffix}", info_name(deb));
            if name.starts_with('/') {
                let _ = writeln!(files.entry("File".into()).or_default(), "{name} {holder}");
            } else if index::plain_name(name) {
                let _ = writeln!(files.entry(name.into()).or_default(), "{holder}");
            }
        }
    }
    files
}

/// Writes dpkg's database for `packages`, sorted by name.
pub fn write(edit: &Edit, packages: &[Unpacked]) -> io::Result<()> {
    for folder in ["alternatives", "info", "parts", "triggers", "updates"] {
        edit.folder(&format!("{DPKG}/{folder}"), 0o755)?;
    }
    let stanzas: Vec<String> = packages.iter().map(|p| status_stanza(p.deb)).collect();
    edit.put(&format!("{DPKG}/status"), stanzas.join("\n"), 0o644)?;
    for empty in ["available", "diversions", "statoverride"] {
        edit.put_if_missing(&format!("{DPKG}/{empty}"), "", 0o644)?;
    }
    edit.put(&format!("{DPKG}/info/format"), "1\n", 0o644)?;
    for package in packages {
        let base = format!("{DPKG}/info/{}", info_name(package.deb));
        edit.put(
            &format!("{base}.list"),
            package.paths.join("\n") + "\n",
            0o644,
        )?;
        for (name, content) in &package.deb.info {
            let script = matches!(
                name.as_str(),
                "preinst" | "postinst" | "prerm" | "postrm" | "config"
            );
            edit.put(
                &format!("{base}.{name}"),
                content,
                if script { 0o755 } else { 0o644 },
            )?;
        }
    }
    for (name, lines) in triggers(packages.iter().map(|p| p.deb)) {
        edit.put(&format!("{DPKG}/triggers/{name}"), lines, 0o644)?;
    }
    Ok(())
}

/// Writes the records of a base without dpkg, in the form distroless images have.
pub fn write_distroless(edit: &Edit, packages: &[Unpacked]) -> io::Result<()> {
    edit.folder(&format!("{DPKG}/status.d"), 0o755)?;
    for package in packages {
        let base = format!("{DPKG}/status.d/{}", package.deb.field("Package"));
        edit.put(&base, &package.deb.control, 0o644)?;
        if let Some(sums) = package.deb.info("md5sums") {
            edit.put(&format!("{base}.md5sums"), sums, 0o644)?;
        }
    }
    Ok(())
}

/// Packages that dpkg does not call installed, with their state.
pub fn not_installed(status: &str) -> Vec<String> {
    super::deb822::stanzas(status)
        .filter_map(|stanza| {
            let state = stanza.get("Status")?;
            let name = stanza.get("Package")?;
            (state != "install ok installed").then(|| format!("{name} ({state})"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::debian::deb::tests::{deb, opened};

    #[test]
    fn status_info_and_triggers() {
        let folder = tempfile::tempdir().unwrap();
        let a = deb(
            "Package: liba\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\n",
            &[
                (
                    "./triggers",
                    "# x\ninterest-noawait /usr/lib/x\ninterest ldx\nactivate other\ninterest ../up\n",
                ),
                ("./conffiles", "/etc/a\n"),
                ("./postinst", "#!/bin/sh\n"),
            ],
            &[],
        );
        let a = opened(folder.path(), &a).unwrap();
        let root = tempfile::tempdir().unwrap();
        let edit = Edit::open(root.path()).unwrap();
        let packages = [Unpacked {
            deb: &a,
            paths: vec!["/.".into(), "/etc".into()],
        }];
        write(&edit, &packages).unwrap();
        let read = |path: &str| String::from_utf8(edit.read(path).unwrap().unwrap()).unwrap();
        assert_eq!(
            read("var/lib/dpkg/status"),
            "Package: liba\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\nConffiles:\n /etc/a newconffile\n"
        );
        assert_eq!(
            read("var/lib/dpkg/triggers/File"),
            "/usr/lib/x liba:amd64/noawait\n"
        );
        assert_eq!(read("var/lib/dpkg/triggers/ldx"), "liba:amd64\n");
        assert_eq!(read("var/lib/dpkg/info/liba:amd64.list"), "/.\n/etc\n");
        assert_eq!(
            edit.names("var/lib/dpkg/triggers").unwrap(),
            ["File", "ldx"]
        );
        assert_eq!(
            not_installed(&read("var/lib/dpkg/status")),
            ["liba (install ok unpacked)"]
        );
        write_distroless(&edit, &packages).unwrap();
        assert_eq!(read("var/lib/dpkg/status.d/liba"), a.control);
    }
}
