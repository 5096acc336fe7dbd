//! Checks archive signatures by running `gpgv`, or `sqv` where that is missing, as
//! apt does. Nothing here parses OpenPGP beyond taking off an armor.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;

use super::sources::KeyRef;

/// A keyring larger than this is none.
const MAX_KEYRING_BYTES: u64 = 16 << 20;

/// Why a signature was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{url} has no valid signature of {keys}:\n{report}")]
    Bad {
        url: String,
        keys: String,
        report: String,
    },
    #[error(
        "no keyring to check {url} with: {looked_for} is missing (install the package debian-archive-keyring)"
    )]
    NoKeyring { url: String, looked_for: String },
    #[error("cannot read the keyring {path}")]
    Keyring {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "neither `gpgv` nor `sqv` is installed: one of them is needed to check archive signatures"
    )]
    NoProgram,
    #[error("cannot run {program}")]
    Run {
        program: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Checks `signature` (armored, detached) over `message` with `keys`; with none, with
/// the default keyrings below `root`. `url` is for messages. Blocking.
pub fn verify(
    url: &str,
    message: &str,
    signature: &str,
    keys: &[KeyRef],
    root: &Path,
) -> Result<(), VerifyError> {
    let io = |source| VerifyError::Run {
        program: "gpgv",
        source,
    };
    let folder = tempfile::tempdir().map_err(io)?;
    let (rings, fingerprints) = keyrings(url, keys, root, folder.path())?;
    let write = |name: &str, text: &str| -> std::io::Result<PathBuf> {
        let path = folder.path().join(name);
        std::fs::File::create_new(&path)?.write_all(text.as_bytes())?;
        Ok(path)
    };
    let message = write("message", message).map_err(io)?;
    let signature = write("signature", signature).map_err(io)?;
    let checks = [gpgv, sqv];
    for check in checks {
        let Some((signers, report)) = check(&rings, &signature, &message, folder.path())? else {
            continue;
        };
        let trusted = signers
            .iter()
            .any(|signer| fingerprints.is_empty() || fingerprints.contains(signer));
        if trusted {
            return Ok(());
        }
        return Err(VerifyError::Bad {
            url: url.into(),
            keys: describe(keys, root),
            report: report.trim_end().into(),
        });
    }
    Err(VerifyError::NoProgram)
}

/// Fingerprints of all who signed well (keys and their primary keys), and the
/// program's own words; `None`: the program is not installed.
type Checked = Option<(Vec<String>, String)>;

fn gpgv(
    rings: &[PathBuf],
    signature: &Path,
    message: &Path,
    home: &Path,
) -> Result<Checked, VerifyError> {
    let mut command = Command::new("gpgv");
    command.args(["--status-fd", "1", "--homedir"]).arg(home);
    let Some((status, report)) = run(command, "gpgv", rings, signature, message)? else {
        return Ok(None);
    };
    // gpgv's exit code also complains of signatures by keys that aren't in the ring:
    // one good signature is enough, a bad one never is.
    let mut signers = Vec::new();
    let mut good = false;
    for line in status.lines().filter_map(|l| l.strip_prefix("[GNUPG:] ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["GOODSIG", ..] => good = true,
            [
                "NEWSIG" | "EXPKEYSIG" | "REVKEYSIG" | "EXPSIG" | "ERRSIG",
                ..,
            ] => good = false,
            ["BADSIG", ..] => return Ok(Some((Vec::new(), report))),
            ["VALIDSIG", key, .., primary] if good => {
                signers.extend([key.to_string(), primary.to_string()])
            }
            _ => {}
        }
    }
    Ok(Some((signers, report)))
}

fn sqv(
    rings: &[PathBuf],
    signature: &Path,
    message: &Path,
    _: &Path,
) -> Result<Checked, VerifyError> {
    let mut command = Command::new("sqv");
    command.stdin(Stdio::null());
    let Some((output, report)) = run(command, "sqv", rings, signature, message)? else {
        return Ok(None);
    };
    // sqv prints the fingerprints of good signatures only.
    Ok(Some((
        output.split_whitespace().map(Into::into).collect(),
        report,
    )))
}

fn run(
    mut command: Command,
    program: &'static str,
    rings: &[PathBuf],
    signature: &Path,
    message: &Path,
) -> Result<Option<(String, String)>, VerifyError> {
    for ring in rings {
        command.arg("--keyring").arg(ring);
    }
    command
        .arg(signature)
        .arg(message)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    match command.output() {
        Ok(output) => Ok(Some((
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(VerifyError::Run { program, source }),
    }
}

fn describe(keys: &[KeyRef], root: &Path) -> String {
    if keys.is_empty() {
        return format!(
            "the keys in {}",
            root.join("usr/share/keyrings/debian-archive-keyring.gpg")
                .display()
        );
    }
    let one = |key: &KeyRef| match key {
        KeyRef::File(path) => path.display().to_string(),
        KeyRef::Fingerprint(print) => print.clone(),
        KeyRef::Inline(_) => "the key in the source's Signed-By".into(),
    };
    keys.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Binary keyring files for `keys`, and the fingerprints asked for (if any).
fn keyrings(
    url: &str,
    keys: &[KeyRef],
    root: &Path,
    folder: &Path,
) -> Result<(Vec<PathBuf>, Vec<String>), VerifyError> {
    let mut rings = Vec::new();
    let mut fingerprints = Vec::new();
    for key in keys {
        match key {
            KeyRef::File(path) => rings.push(path.clone()),
            KeyRef::Fingerprint(print) => fingerprints.push(print.clone()),
            KeyRef::Inline(text) => {
                let path = folder.join(format!("inline-{}.asc", rings.len()));
                std::fs::write(&path, text).map_err(|source| VerifyError::Keyring {
                    path: path.clone(),
                    source,
                })?;
                rings.push(path);
            }
        }
    }
    if rings.is_empty() {
        rings = default_keyrings(root);
    }
    if rings.is_empty() {
        return Err(VerifyError::NoKeyring {
            url: url.into(),
            looked_for: root
                .join("usr/share/keyrings/debian-archive-keyring.gpg")
                .display()
                .to_string(),
        });
    }
    let binary = rings
        .iter()
        .enumerate()
        .map(|(i, ring)| dearmored(ring, folder, i));
    Ok((binary.collect::<Result<_, _>>()?, fingerprints))
}

fn default_keyrings(root: &Path) -> Vec<PathBuf> {
    let shared = root.join("usr/share/keyrings");
    for name in ["debian-archive-keyring.gpg", "debian-archive-keyring.pgp"] {
        if shared.join(name).is_file() {
            return vec![shared.join(name)];
        }
    }
    let Ok(entries) = std::fs::read_dir(root.join("etc/apt/trusted.gpg.d")) else {
        return Vec::new();
    };
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("debian-archive") && (name.ends_with(".gpg") || name.ends_with(".asc"))
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(named).collect();
    files.sort();
    files
}

/// `gpgv` reads binary keyrings only.
fn dearmored(ring: &Path, folder: &Path, index: usize) -> Result<PathBuf, VerifyError> {
    let fail = |source| VerifyError::Keyring {
        path: ring.into(),
        source,
    };
    let size = std::fs::metadata(ring).map_err(fail)?.len();
    if size > MAX_KEYRING_BYTES {
        return Err(fail(std::io::Error::other("it is too large for a keyring")));
    }
    let bytes = std::fs::read(ring).map_err(fail)?;
    let Some(keys) = std::str::from_utf8(&bytes).ok().and_then(dearmor) else {
        return Ok(ring.into());
    };
    let path = folder.join(format!("ring-{index}.gpg"));
    std::fs::write(&path, keys).map_err(fail)?;
    Ok(path)
}

/// The packets of every armored key block in `text`; `None` if there is none.
fn dearmor(text: &str) -> Option<Vec<u8>> {
    let mut packets = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while lines
        .by_ref()
        .any(|line| line == "-----BEGIN PGP PUBLIC KEY BLOCK-----")
    {
        let body: String = lines
            .by_ref()
            .skip_while(|line| !line.is_empty())
            .skip(1)
            // The checksum line starts with `=`.
            .take_while(|line| !line.starts_with('=') && !line.starts_with("-----"))
            .collect();
        packets.extend(
            base64::engine::general_purpose::STANDARD
                .decode(body)
                .ok()?,
        );
    }
    (!packets.is_empty()).then_some(packets)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn armor_comes_off() {
        let text = "junk\n-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: x\n\nYWJj\nZGVm\n=AAAA\n-----END PGP PUBLIC KEY BLOCK-----\n\
                    -----BEGIN PGP PUBLIC KEY BLOCK-----\n\nZ2g=\n-----END PGP PUBLIC KEY BLOCK-----\n";
        assert_eq!(dearmor(text).unwrap(), b"abcdefgh");
        assert_eq!(dearmor("binary"), None);
    }

    #[test]
    fn no_keyring_is_said_with_the_package_to_install() {
        let root = tempfile::tempdir().unwrap();
        let error = verify("u", "m", "s", &[], root.path()).unwrap_err();
        assert!(
            error.to_string().contains("debian-archive-keyring"),
            "{error}"
        );
        let missing = KeyRef::File(root.path().join("none.gpg"));
        assert!(matches!(
            verify("u", "m", "s", &[missing], root.path()),
            Err(VerifyError::Keyring { .. })
        ));
    }
}
