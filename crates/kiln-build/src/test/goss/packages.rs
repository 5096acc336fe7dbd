//! Installed packages, by the records of dpkg and apk.

use super::inside::Inside;

/// The installed versions of a package; none: it is not installed.
pub(super) fn versions(inside: &Inside<'_>, name: &str) -> Result<Vec<String>, String> {
    let (package, arch) = name.split_once(':').unwrap_or((name, ""));
    let whole = inside.bytes("/var/lib/dpkg/status")?;
    // Distroless images have a file for each package.
    let own = match package.contains('/') {
        true => None,
        false => inside.bytes(&format!("/var/lib/dpkg/status.d/{package}"))?,
    };
    let alpine = inside.bytes("/lib/apk/db/installed")?;
    let text = |bytes: Option<Vec<u8>>| bytes.map(|b| String::from_utf8_lossy(&b).into_owned());
    if let Some(text) = text(alpine) {
        return Ok(apk(&text, name));
    }
    let mut found = Vec::new();
    let mut known = false;
    for text in [text(whole), text(own)].into_iter().flatten() {
        known = true;
        found.extend(dpkg(&text, package, arch));
    }
    let folder = inside.open("/var/lib/dpkg/status.d", rustix::fs::OFlags::PATH)?;
    match known || folder.is_some() {
        true => Ok(found),
        false => Err("the image has no records of dpkg or apk".into()),
    }
}

/// Of stanzas with `Package`, `Status`, `Version`; a file for one package has no status.
fn dpkg(text: &str, package: &str, arch: &str) -> Vec<String> {
    let stanzas = text.split("\n\n").filter_map(|stanza| {
        let field = |name: &str| {
            let line = stanza.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.strip_prefix(": "))
        };
        let installed = field("Status").is_none_or(|s| s.ends_with(" ok installed"));
        let same = field("Package") == Some(package);
        let arch = arch.is_empty() || field("Architecture") == Some(arch);
        let version = field("Version")?;
        (installed && same && arch).then(|| version.to_owned())
    });
    stanzas.collect()
}

/// Of stanzas with `P:` and `V:`.
fn apk(text: &str, package: &str) -> Vec<String> {
    let stanzas = text.split("\n\n").filter_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        let version = field("V:")?;
        (field("P:") == Some(package)).then(|| version.to_owned())
    });
    stanzas.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_say_what_is_installed() {
        let status = "Package: a\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1-2\n\n\
                      Package: b\nStatus: deinstall ok config-files\nVersion: 3\n\n\
                      Package: a\nStatus: hold ok installed\nArchitecture: i386\nVersion: 1-1\n";
        assert_eq!(dpkg(status, "a", ""), ["1-2", "1-1"]);
        assert_eq!(dpkg(status, "a", "i386"), ["1-1"]);
        assert!(
            dpkg(status, "b", "").is_empty(),
            "only its configuration is left"
        );
        assert_eq!(dpkg("Package: c\nVersion: 7\n", "c", ""), ["7"]);
        let apks = "C:Q1x=\nP:musl\nV:1.2.4-r2\n\nP:musl-utils\nV:9\n";
        assert_eq!(apk(apks, "musl"), ["1.2.4-r2"]);
        assert!(apk(apks, "mus").is_empty());
    }
}
