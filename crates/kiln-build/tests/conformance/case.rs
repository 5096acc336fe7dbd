//! The cases' text: files of many cases, each a Containerfile and what is around it.
//!
//! ```text
//! === a-name
//! FROM kiln-base
//! COPY a /b
//! --- file a 0600
//! one
//! --- link l -> a
//! ```
//!
//! A line `=== NAME` begins a case; what follows is its Containerfile, up to the first line
//! that begins with `--- `. Those are, with paths below the context (or, as `@NAME/…`, below
//! the named context `NAME`), in which a space is `\s`:
//!
//! | line | what |
//! |---|---|
//! | `file PATH [MODE]` | the lines after it, without empty ones at the end; mode 0644 unless said |
//! | `bytes PATH [MODE]` | the same with `\n \r \t \s \0 \\ \xNN`, its lines' ends left out |
//! | `sparse PATH BYTES` | a file without content of this size |
//! | `dir PATH [MODE]`, `link PATH -> TARGET`, `hard PATH = OTHER`, `fifo PATH`, `socket PATH` | |
//! | `xattr PATH NAME VALUE` | of a file that is there |
//! | `tar PATH [gzip, bzip2, xz or zstd]` | an archive of the members after it ([`archive`](super::archive)) |
//! | `serve NAME [COMPRESSION]` | the lines after it (or an archive of them), at `{url}/NAME`; `{url}` is replaced in the Containerfile |
//! | `image NAME` | an image that is built first from the lines after it, in the same context |
//! | `dockerfile PATH` | the Containerfile is this one, of the context |
//! | `arg NAME=VALUE`, `target STAGE` | as `docker build` takes them |
//! | `says WORDS` | part of the error with which kiln refuses |
//! | `differs WHY` | kiln means to do something else than docker: what it does is the lines after it, in the goldens' form |

/// One case of a file.
#[derive(Debug, Default)]
pub struct Case {
    pub name: String,
    pub text: String,
    pub parts: Vec<Part>,
}

/// A line `--- …` and what follows it.
#[derive(Debug, Default)]
pub struct Part {
    pub verb: String,
    /// What stands behind the verb.
    pub rest: String,
    pub body: Vec<String>,
}

impl Part {
    /// The first word behind the verb, and the others.
    pub fn path(&self) -> (&str, &str) {
        self.rest.split_once(' ').unwrap_or((&self.rest, ""))
    }

    pub fn text(&self) -> String {
        self.body.iter().map(|line| format!("{line}\n")).collect()
    }
}

impl Case {
    /// Empty lines at an end only separate; a file that ends with some is `bytes`.
    fn tidy(&mut self) {
        while self.text.ends_with("\n\n") {
            self.text.pop();
        }
        for part in &mut self.parts {
            while part.body.last().is_some_and(String::is_empty) {
                part.body.pop();
            }
        }
    }

    pub fn all<'a>(&'a self, verb: &'a str) -> impl Iterator<Item = &'a Part> {
        self.parts.iter().filter(move |part| part.verb == verb)
    }

    pub fn one(&self, verb: &str) -> Option<&Part> {
        let mut found = self.parts.iter().filter(|part| part.verb == verb);
        let first = found.next();
        assert!(found.next().is_none(), "{}: two {verb}", self.name);
        first
    }
}

pub fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("=== ") {
            assert!(!cases.iter().any(|c| c.name == name), "two cases {name}");
            cases.push(Case {
                name: name.to_owned(),
                ..Case::default()
            });
            continue;
        }
        // What stands before the first case says what the file is about.
        let Some(case) = cases.last_mut() else {
            continue;
        };
        if let Some(words) = line.strip_prefix("--- ") {
            let (verb, rest) = words.split_once(' ').unwrap_or((words, ""));
            case.parts.push(Part {
                verb: verb.to_owned(),
                rest: rest.to_owned(),
                body: Vec::new(),
            });
        } else if let Some(part) = case.parts.last_mut() {
            part.body.push(line.to_owned());
        } else {
            case.text.push_str(line);
            case.text.push('\n');
        }
    }
    for case in &mut cases {
        case.tidy();
    }
    cases
}

/// `\n \r \t \s \0 \\ \xNN`; `\s` is a space, for lines' ends.
pub fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next() {
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b's') => b' ',
            Some(b'0') => 0,
            Some(b'\\') => b'\\',
            Some(b'x') => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            other => panic!("not an escape: {:?} in {text}", other.map(char::from)),
        });
    }
    bytes
}
