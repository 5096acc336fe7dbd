//! `.dockerignore` files and `--exclude` patterns: the last pattern that matches an
//! entry or one of its parents decides; `!` takes back.

use super::glob::{BadPattern, Glob};

/// A `.dockerignore` is read up to this many bytes.
pub const MAX_IGNORE_FILE: u64 = 1 << 20;

struct Pattern {
    glob: Glob,
    again: bool,
}

/// An ordered list of patterns.
#[derive(Default)]
pub struct Patterns(Vec<Pattern>);

/// Which patterns matched a folder or one of its parents: what its entries go on with.
#[derive(Clone, Debug, Default)]
pub struct Seen(Vec<bool>);

impl Patterns {
    /// One pattern a line; `#` begins a comment at a line's start only.
    pub fn parse_file(text: &str) -> Result<Self, BadPattern> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self::compile(lines, |path| path.strip_prefix('/').unwrap_or(path))
    }

    /// Patterns that begin with `/` match nothing: only a file's are taken without it.
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, BadPattern> {
        Self::compile(texts, |path| path)
    }

    fn compile<'a>(
        texts: impl IntoIterator<Item = &'a str>,
        below: fn(&str) -> &str,
    ) -> Result<Self, BadPattern> {
        let mut patterns = Vec::new();
        for text in texts {
            let text = text.trim();
            let (text, again) = match text.strip_prefix('!') {
                Some("") => return Err(BadPattern("!".into())),
                Some(rest) => (rest.trim(), true),
                None => (text, false),
            };
            if text.is_empty() {
                continue;
            }
            let cleaned = clean(text);
            let cleaned = below(&cleaned);
            if cleaned.is_empty() {
                continue;
            }
            patterns.push(Pattern {
                glob: Glob::ignore(cleaned)?,
                again,
            });
        }
        Ok(Self(patterns))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a pattern takes something back, so that an ignored folder must still be
    /// looked into.
    pub fn takes_back(&self) -> bool {
        self.0.iter().any(|p| p.again)
    }

    /// Whether the entry at this path is left out, itself or with a folder it is in.
    pub fn leaves_out(&self, path: &str) -> bool {
        let mut seen = Seen::default();
        let mut out = false;
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            (out, seen) = self.leave_out(&path[..at], &seen);
        }
        out
    }

    /// Whether the entry is left out. `path` is relative, with `/` between names;
    /// `parent` is what the same question about its folder gave.
    pub fn leave_out(&self, path: &str, parent: &Seen) -> (bool, Seen) {
        let mut out = false;
        let mut seen = vec![false; self.0.len()];
        for (i, pattern) in self.0.iter().enumerate() {
            let mut matched = parent.0.get(i).copied().unwrap_or(false);
            if !matched {
                // A pattern that could change nothing is not asked.
                if pattern.again != out {
                    continue;
                }
                matched = pattern.glob.matches(path);
            }
            seen[i] = matched;
            if matched {
                out = !pattern.again;
            }
        }
        (out, Seen(seen))
    }
}

/// A path without `.`, `..` (as far as it has parents), doubled and trailing `/`.
pub fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." if names.last().is_some_and(|last| *last != "..") => {
                names.pop();
            }
            ".." if rooted => {}
            name => names.push(name),
        }
    }
    let joined = names.join("/");
    if rooted { format!("/{joined}") } else { joined }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn left_out(file: &str, path: &str) -> bool {
        Patterns::parse_file(file).unwrap().leaves_out(path)
    }

    #[test]
    fn the_last_matching_pattern_decides_also_for_what_is_within() {
        let file = "# comment\n\n/target\n*.log\n!keep.log\n docs \n!docs/README.md\n**/tmp";
        for (path, expected) in [
            ("target", true),
            ("target/debug/x", true),
            ("src/target", false),
            ("a.log", true),
            ("b/a.log", false),
            ("keep.log", false),
            ("docs/x", true),
            ("docs/README.md", false),
            ("x/tmp/y", true),
            ("# comment", false),
        ] {
            assert_eq!(left_out(file, path), expected, "{path}");
        }
        assert!(left_out("*\n!src", "a") && !left_out("*\n!src", "src/a"));
        assert!(left_out("!a\na", "a"));
        assert!(left_out("./a/../b//c/", "b/c"));
        assert!(Patterns::parse_file("a\n!").is_err());
        assert!(Patterns::parse_file("[").is_err());
        assert!(!left_out(".\n/", "a"));
    }
}
