//! `RUN --mount=type=…,key=value,…` (Dockerfile reference, "RUN --mount").

use super::expand::{Lexer, Variables};
use super::nearest;

/// A mount with its variables expanded and its rules checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountKind,
    /// A stage, an image or a named context; `None`: the build context (bind) or an
    /// empty folder (cache).
    pub from: Option<String>,
    pub source: String,
    pub target: String,
    pub read_only: bool,
    /// tmpfs, bytes.
    pub size: Option<u64>,
    pub id: Option<String>,
    pub sharing: Sharing,
    pub required: bool,
    /// A secret also, or only, as this variable.
    pub env: Option<String>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountKind {
    #[default]
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    #[default]
    Shared,
    Private,
    Locked,
}

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "src",
    "target",
    "dst",
    "destination",
    "readonly",
    "ro",
    "readwrite",
    "rw",
    "required",
    "size",
    "id",
    "sharing",
    "mode",
    "uid",
    "gid",
    "env",
];

/// What can be said before variables are known: the fields split, keys are known, and
/// `from` holds no variable (stages must be known before anything is built).
pub(super) fn check(text: &str) -> Result<(), String> {
    for field in fields(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_ascii_lowercase(), Some(value)),
            None => (field.to_ascii_lowercase(), None),
        };
        if !KEYS.contains(&key.as_str()) {
            let near = nearest(&key, &KEYS);
            let near = near.map(|n| format!("; did you mean `{n}`?"));
            return Err(format!("unknown key `{key}`{}", near.unwrap_or_default()));
        }
        let variable = value.and_then(|v| v.split_once('$'));
        if key == "from" && variable.is_some_and(|(_, after)| !after.is_empty()) {
            return Err("`from` can't hold a variable; name a stage FROM it instead".into());
        }
    }
    Ok(())
}

/// The stage, image or context a mount reads, before expansion: for finding out which
/// stages are needed.
pub fn from(text: &str) -> Option<String> {
    let fields = fields(text).ok()?;
    fields.iter().rev().find_map(|field| {
        let (key, value) = field.split_once('=')?;
        key.eq_ignore_ascii_case("from").then(|| value.to_owned())
    })
}

/// Expands and checks one `--mount` value.
pub fn parse(text: &str, lexer: &Lexer, variables: &dyn Variables) -> Result<Mount, String> {
    let mut builder = Builder::default();
    for field in fields(text)? {
        match field.split_once('=') {
            Some((key, value)) => {
                let key = key.to_ascii_lowercase();
                let value = lexer.word(value, variables).map_err(|e| e.to_string())?;
                builder.set(&key, value)?;
            }
            None => builder.flag(&field.to_ascii_lowercase())?,
        }
    }
    builder.finish()
}

#[derive(Default)]
struct Builder {
    kind: MountKind,
    from: Option<String>,
    source: String,
    target: String,
    read_only: Option<bool>,
    size: Option<u64>,
    id: Option<String>,
    sharing: Option<Sharing>,
    required: bool,
    env: Option<String>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Builder {
    fn flag(&mut self, key: &str) -> Result<(), String> {
        match key {
            "readonly" | "ro" => self.read_only = Some(true),
            "readwrite" | "rw" => self.read_only = Some(false),
            "required" => return self.set("required", "true".into()),
            _ => return Err(format!("`{key}` needs a value")),
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: String) -> Result<(), String> {
        let number = |radix| {
            u32::from_str_radix(&value, radix)
                .map(Some)
                .map_err(|_| format!("`{key}={value}` is not a number"))
        };
        let truth = || match value.to_ascii_lowercase().as_str() {
            "1" | "t" | "true" => Ok(true),
            "0" | "f" | "false" => Ok(false),
            _ => Err(format!("`{key}={value}` is neither true nor false")),
        };
        match key {
            "type" => self.kind = kind(&value)?,
            "from" => self.from = Some(value).filter(|v| !v.is_empty()),
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "readonly" | "ro" => self.read_only = Some(truth()?),
            "readwrite" | "rw" => self.read_only = Some(!truth()?),
            "required" => self.required = truth()?,
            "size" => self.size = Some(bytes(&value)?),
            "id" => self.id = Some(value).filter(|v| !v.is_empty()),
            "sharing" => {
                self.sharing = Some(match value.to_ascii_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    _ => {
                        return Err(format!(
                            "sharing is shared, private or locked, not `{value}`"
                        ));
                    }
                });
            }
            "mode" => self.mode = number(8)?,
            "uid" => self.uid = number(10)?,
            "gid" => self.gid = number(10)?,
            "env" => self.env = Some(value),
            _ => return Err(format!("unknown key `{key}`")),
        }
        Ok(())
    }

    fn finish(self) -> Result<Mount, String> {
        let file_like = matches!(
            self.kind,
            MountKind::Secret | MountKind::Ssh | MountKind::Cache
        );
        if !file_like && (self.mode.is_some() || self.uid.is_some() || self.gid.is_some()) {
            return Err("mode, uid and gid go with type cache, secret and ssh only".into());
        }
        if self.size.is_some() && self.kind != MountKind::Tmpfs {
            return Err("size goes with type tmpfs only".into());
        }
        if self.required && !matches!(self.kind, MountKind::Secret | MountKind::Ssh) {
            return Err("required goes with type secret and ssh only".into());
        }
        if self.sharing.is_some() && self.kind != MountKind::Cache {
            return Err("sharing goes with type cache only".into());
        }
        if self.kind == MountKind::Tmpfs && !self.source.is_empty() {
            return Err("a tmpfs takes no source".into());
        }
        if self.kind == MountKind::Secret {
            if self.from.is_some() {
                return Err("a secret takes no `from`".into());
            }
            if self.id.is_none() && self.source.is_empty() && self.target.is_empty() {
                return Err("a secret needs an id, a source or a target".into());
            }
            if self.id.is_some() && !self.source.is_empty() {
                return Err("a secret takes an id or a source, not both".into());
            }
        } else if self.kind != MountKind::Ssh && self.target.is_empty() {
            return Err("needs a target".into());
        }
        let writable = matches!(self.kind, MountKind::Cache | MountKind::Tmpfs);
        Ok(Mount {
            kind: self.kind,
            from: self.from,
            source: self.source,
            target: self.target,
            read_only: self.read_only.unwrap_or(!writable),
            size: self.size,
            id: self.id,
            sharing: self.sharing.unwrap_or_default(),
            required: self.required,
            env: self.env,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        })
    }
}

fn kind(value: &str) -> Result<MountKind, String> {
    Ok(match value.to_ascii_lowercase().as_str() {
        "bind" => MountKind::Bind,
        "cache" => MountKind::Cache,
        "tmpfs" => MountKind::Tmpfs,
        "secret" => MountKind::Secret,
        "ssh" => MountKind::Ssh,
        _ => {
            return Err(format!(
                "type is bind, cache, tmpfs, secret or ssh, not `{value}`"
            ));
        }
    })
}

/// `64m`, `1GiB`, `4096`: units of 1024, as docker reads them.
fn bytes(text: &str) -> Result<u64, String> {
    let fail = || format!("`{text}` is not a size (like 64m)");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let shift = match lower[digits..].trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(fail()),
    };
    let number: f64 = lower[..digits].parse().map_err(|_| fail())?;
    Ok((number * f64::from(1_u32 << 10).powi(shift / 10)) as u64)
}

/// Splits one CSV record (RFC 4180): commas, fields in double quotes.
fn fields(text: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut field = String::new();
            let mut tail = quoted;
            loop {
                let at = tail.find('"').ok_or("a quote is never closed")?;
                field.push_str(&tail[..at]);
                tail = &tail[at + 1..];
                match tail.strip_prefix('"') {
                    Some(after) => {
                        field.push('"');
                        tail = after;
                    }
                    None => break,
                }
            }
            fields.push(field);
            match tail.strip_prefix(',') {
                Some(after) => rest = after,
                None if tail.is_empty() => return Ok(fields),
                None => return Err("text stands right after a closing quote".into()),
            }
        } else {
            let (field, after) = match rest.split_once(',') {
                Some((field, after)) => (field, Some(after)),
                None => (rest, None),
            };
            if field.contains('"') {
                return Err("a quote stands within a field".into());
            }
            fields.push(field.to_owned());
            match after {
                Some(after) => rest = after,
                None => return Ok(fields),
            }
        }
    }
}
