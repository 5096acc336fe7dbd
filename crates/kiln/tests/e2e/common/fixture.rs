//! Small projects: busybox from a Debian package, and nothing else in the image.

use std::fs;
use std::path::Path;

use super::machine::shared;

/// The base of every small project: one package, no shell of Debian's.
pub const BUSYBOX: &str = "x-kiln:
  bases:
    busybox: {suite: bookworm, packages: [busybox-static], distroless: true}
";

const CONTAINERFILE: &str = "FROM busybox AS packages
FROM scratch
COPY --from=packages /bin/busybox /bin/busybox
RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]
RUN [\"/bin/mkdir\", \"-m\", \"1777\", \"/tmp\"]
COPY --chmod=0755 run /run.sh
COPY www /www
CMD [\"/run.sh\"]
";

/// A service that serves one page: how the page and its program may be varied.
pub struct Page<'a> {
    /// The page's text, part of the image.
    pub text: &'a str,
    /// Shell lines before the server starts.
    pub before: &'a str,
    /// More keys of the service `web`, each line indented by four spaces.
    pub keys: &'a str,
    /// More of the compose file.
    pub more: &'a str,
}

impl Default for Page<'_> {
    fn default() -> Self {
        Self {
            text: "one",
            before: "",
            keys: "",
            more: "",
        }
    }
}

impl Page<'_> {
    pub fn compose(&self) -> String {
        format!(
            "{BUSYBOX}services:\n  web:\n    build: .\n    ports: [\"${{PORT}}:8000\"]\n{}\n{}\n",
            self.keys, self.more
        )
    }

    pub fn program(&self) -> String {
        format!(
            "#!/bin/sh\n{}\nexec httpd -f -p 8000 -h /www\n",
            self.before
        )
    }

    /// The project's files.
    pub fn files(&self) -> Vec<(&'static str, String)> {
        vec![
            ("compose.yaml", self.compose()),
            ("Containerfile", CONTAINERFILE.into()),
            ("run", self.program()),
            ("www/index.html", self.text.into()),
        ]
    }
}

impl super::Kiln {
    /// A project with one page.
    pub fn page(&self, name: &str, page: &Page) -> super::Project<'_> {
        let files = page.files();
        let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (*p, t.as_str())).collect();
        self.project(name, &files)
    }
}

/// The packages' versions, once known, are those of all small projects: so nobody has to
/// read Debian's indexes again.
pub fn pin(folder: &Path) {
    let compose = fs::read_to_string(folder.join("compose.yaml")).unwrap_or_default();
    if compose.starts_with(BUSYBOX) {
        let _ = fs::copy(shared().join("busybox.lock"), folder.join("kiln.lock"));
    }
}

pub fn keep_pins(folder: &Path) {
    let compose = fs::read_to_string(folder.join("compose.yaml")).unwrap_or_default();
    let kept = shared().join("busybox.lock");
    if compose.starts_with(BUSYBOX) && !kept.exists() {
        let fresh = shared().join(format!("busybox.lock.{}", std::process::id()));
        if fs::copy(folder.join("kiln.lock"), &fresh).is_ok() {
            let _ = fs::rename(&fresh, &kept);
        }
    }
}
