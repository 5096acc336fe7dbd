//! The other side: what docker makes of a case. Only for recording; needs a `docker` that
//! reaches an engine with BuildKit.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use tar::EntryType;

use super::golden::{Node, Nodes, content, lines, shown};
use super::{Input, SECRET};

/// What builds are named in docker, beside the images of the cases.
const RESULT: &str = "kiln-conformance";

fn docker(words: &[&str]) -> Result<String, String> {
    let output = Command::new("docker").args(words).output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Builds as `name`; gives the image's configuration and its files.
pub fn build(input: &Input<'_>, name: &str) -> Result<(serde_json::Value, Nodes), String> {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).display().to_string();
    let (file, archive, secret) = (path("Dockerfile"), path("root.tar"), path("secret"));
    fs::write(&secret, SECRET).unwrap();
    let mut words: Vec<String> = ["build", "--network=none", "--progress=plain"]
        .map(str::to_owned)
        .to_vec();
    words.push(format!("--secret=id=key,src={secret}"));
    words.push(format!("--output=type=tar,dest={archive}"));
    words.push(format!("--output=type=docker,name={name}"));
    match &input.dockerfile {
        Some(path) => words.push(format!("--file={}", path.display())),
        None if input.text.is_empty() => {}
        None => {
            fs::write(&file, &input.text).unwrap();
            words.push(format!("--file={file}"));
        }
    }
    words.extend(
        input
            .args
            .iter()
            .map(|(k, v)| format!("--build-arg={k}={v}")),
    );
    words.extend(input.target.iter().map(|t| format!("--target={t}")));
    let others = input.others.iter();
    words.extend(others.map(|(name, at)| format!("--build-context={name}={}", at.display())));
    words.push(input.context.display().to_string());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    docker(&words)?;
    let config = docker(&["image", "inspect", "--format", "{{json .Config}}", name])?;
    let config = serde_json::from_str(&config).unwrap();
    Ok((config, nodes(Path::new(&archive))))
}

/// Says what docker makes of a case, and on stderr why it refuses.
pub fn result(input: &Input<'_>, base: &Nodes) -> Vec<String> {
    match build(input, RESULT) {
        Ok((config, nodes)) => lines(&config, &nodes, base),
        Err(told) => {
            let told: Vec<&str> = told.lines().filter(|l| l.starts_with("ERROR: ")).collect();
            eprintln!("{}: {}", input.name, told.last().unwrap_or(&""));
            vec!["refused".to_owned()]
        }
    }
}

pub fn forget(images: &[String]) {
    let mut words = vec!["rmi", "--force", RESULT];
    words.extend(images.iter().map(String::as_str));
    if let Err(told) = docker(&words) {
        eprintln!("docker rmi: {told}");
    }
}

/// What BuildKit's own flat archive of the result holds.
fn nodes(archive: &Path) -> Nodes {
    let mut nodes = Nodes::new();
    let mut archive = tar::Archive::new(fs::File::open(archive).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path_bytes().into_owned();
        let path = path.strip_suffix(b"/").unwrap_or(&path).to_vec();
        let mut xattrs = BTreeMap::new();
        for extension in entry.pax_extensions().unwrap().into_iter().flatten() {
            let extension = extension.unwrap();
            if let Some(name) = extension.key().unwrap().strip_prefix("SCHILY.xattr.") {
                xattrs.insert(name.to_owned(), extension.value_bytes().to_vec());
            }
        }
        let target = entry.link_name_bytes().unwrap_or_default().into_owned();
        let mut bytes = Vec::new();
        let header = entry.header();
        let device = |header: &tar::Header| {
            let number = |n: Option<u32>| n.unwrap_or_default();
            let major = number(header.device_major().unwrap());
            format!("{major}:{}", number(header.device_minor().unwrap()))
        };
        let (kind, rest) = match header.entry_type() {
            EntryType::Directory => ('d', String::new()),
            EntryType::Symlink => ('l', target.escape_ascii().to_string()),
            EntryType::Link => ('h', shown(&target)),
            EntryType::Char => ('c', device(header)),
            EntryType::Block => ('b', device(header)),
            EntryType::Fifo => ('p', String::new()),
            _ => ('f', String::new()),
        };
        let mut node = Node {
            kind,
            mode: header.mode().unwrap() & 0o7777,
            owner: (header.uid().unwrap(), header.gid().unwrap()),
            rest,
            xattrs,
        };
        if kind == 'f' {
            entry.read_to_end(&mut bytes).unwrap();
            node.rest = content(&bytes);
        }
        nodes.insert(path, node);
    }
    nodes
}
