//! What packages have brought: whoever wants it can fetch it, so it is no secret.

use std::collections::BTreeSet;
use std::io::Read;

use kiln_store::Store;
use kiln_store::tree::{Kind, Tree};

/// A package's list of files is read up to this many bytes.
const LONGEST_LIST: u64 = 16 << 20;
const DPKG: &str = "var/lib/dpkg/info";
const APK: [&str; 2] = ["lib/apk/db/installed", "usr/lib/apk/db/installed"];

/// Folders of packages of languages.
const LANGUAGES: [&str; 9] = [
    "node_modules",
    "site-packages",
    "dist-packages",
    "gems",
    "vendor",
    "perl5",
    "registry/src",
    "pkg/mod",
    "usr/share/doc",
];
/// Folders within them whose keys are made for tests and for show.
const TESTS: [&str; 14] = [
    "test",
    "tests",
    "testing",
    "testdata",
    "test-data",
    "test_data",
    "__tests__",
    "fixtures",
    "fixture",
    "spec",
    "example",
    "examples",
    "demo",
    "doc",
];

/// Says whether a path, relative to the root, is of a package of a language, and in it of
/// what that is tested by.
pub(super) fn is_test(path: &str) -> bool {
    let lies = |path: &str, folder: &str| format!("/{path}/").contains(&format!("/{folder}/"));
    LANGUAGES.iter().any(|language| {
        let at = format!("/{path}").find(&format!("/{language}/"));
        let below = at.and_then(|at| path.get(at + language.len() + 1..));
        below.is_some_and(|below| TESTS.iter().any(|test| lies(below, test)))
    })
}

/// The paths that package managers say are theirs, as far as these are not settings.
pub(super) fn installed(tree: &Tree, store: &Store) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    let lists = tree.children(DPKG).into_iter().flatten();
    for (name, _) in lists.filter(|(name, _)| name.ends_with(b".list")) {
        let path = [DPKG.as_bytes(), b"/", name].concat();
        let text = text(tree, store, &path);
        paths.extend(
            text.lines()
                .map(|line| merged(line.trim_start_matches('/'))),
        );
    }
    for database in APK {
        let mut folder = String::new();
        for line in text(tree, store, database.as_bytes()).lines() {
            if let Some(path) = line.strip_prefix("F:") {
                path.clone_into(&mut folder);
            } else if let Some(name) = line.strip_prefix("R:") {
                paths.insert(merged(&format!("{folder}/{name}")));
            }
        }
    }
    paths.retain(|path| !path.starts_with("etc/"));
    paths
}

/// A file of `/lib` is one of `/usr/lib` where the one is a link to the other.
pub(super) fn merged(path: &str) -> String {
    let within = ["bin/", "sbin/", "lib/", "lib32/", "lib64/", "libx32/"];
    match within.iter().any(|folder| path.starts_with(folder)) {
        true => format!("usr/{path}"),
        false => path.to_owned(),
    }
}

/// What can't be read makes nothing innocent.
fn text(tree: &Tree, store: &Store, path: &[u8]) -> String {
    let Some(Kind::File { digest, .. }) = tree.get(path).map(|node| &node.kind) else {
        return String::new();
    };
    let mut bytes = Vec::new();
    let object = store.open_object(digest).ok().flatten();
    let read = object.map(|object| object.take(LONGEST_LIST).read_to_end(&mut bytes));
    match read {
        Some(Ok(_)) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_packages_are_told_from_a_projects_own() {
        for path in [
            "app/node_modules/https-proxy/test/server.key",
            "usr/lib/python3/dist-packages/tornado/test/test.key",
            "venv/lib/python3.11/site-packages/x/tests/data/k.pem",
            "root/.cargo/registry/src/index/rustls-0.23/examples/k.pem",
            "usr/share/doc/x/examples/k.pem",
        ] {
            assert!(is_test(path), "{path}");
        }
        for path in [
            "app/tests/key.pem",
            "app/test/node_modules.pem",
            "app/node_modules/own/key.pem",
            "tests/node_modules/own/key.pem",
        ] {
            assert!(!is_test(path), "{path}");
        }
        assert_eq!(merged("lib/x"), "usr/lib/x");
        assert_eq!(merged("library/x"), "library/x");
    }
}
