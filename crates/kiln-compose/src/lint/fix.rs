//! Changes of a file's text that mend what a rule found.

use crate::node::Node;
use crate::span::{Sources, Span};

/// A change of one place of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fix {
    pub span: Span,
    pub text: String,
}

/// `./src:/app` → `./src:/app:ro`, where the file says it in the short form.
pub(super) fn read_only_fix(mount: &Node, sources: &Sources) -> Option<Fix> {
    let said = sources.text(mount.span)?;
    let (inner, quote) = match said.as_bytes().first()? {
        b'"' | b'\'' if said.len() > 1 => (&said[1..said.len() - 1], &said[..1]),
        _ => (said, ""),
    };
    let short = !inner.contains(['\n', '$', '{', '\\', ' ']);
    let text = match inner.matches(':').count() {
        1 => format!("{quote}{inner}:ro{quote}"),
        2 => format!("{quote}{}:ro{quote}", inner.strip_suffix(":rw")?),
        _ => return None,
    };
    short.then_some(Fix {
        span: mount.span,
        text,
    })
}

/// A file's text with the fixes that are about it; of two that overlap, the first.
pub fn apply(text: &str, file: u32, fixes: &[Fix]) -> String {
    let mut own: Vec<&Fix> = fixes.iter().filter(|fix| fix.span.file == file).collect();
    own.sort_by_key(|fix| (fix.span.start, fix.span.end));
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    for fix in own {
        let (start, end) = (fix.span.start as usize, fix.span.end as usize);
        if start < at || end < start {
            continue;
        }
        let Some(before) = text.get(at..start).filter(|_| end <= text.len()) else {
            continue;
        };
        out.push_str(before);
        out.push_str(&fix.text);
        at = end;
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}
