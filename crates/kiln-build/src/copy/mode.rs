//! `--chmod`: octal (`0644`) or symbolic (`u+x,go-w`, `a=rX`).

/// A change of permission bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModeChange {
    Set(u32),
    Clauses(Vec<Clause>),
}

/// `[ugoa]*[+-=][rwxXst]*`, one operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Of u, g, o as the bits 4, 2, 1.
    who: u8,
    operator: char,
    /// Of r, w, x.
    bits: u32,
    /// `X`: x for folders and for what anyone may execute.
    maybe_x: bool,
    setid: bool,
    sticky: bool,
    /// `g=u`: the bits of another.
    of: Option<char>,
}

/// Parses a mode; the error says what is allowed.
pub fn parse(text: &str) -> Result<ModeChange, String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o7777 => Ok(ModeChange::Set(mode)),
            _ => Err(format!("`{text}` is not a mode: octal, 0 to 07777")),
        };
    }
    let fail = || format!("`{text}` is not a mode: octal like 0644, or symbolic like u+x,go-w");
    let mut clauses = Vec::new();
    for part in text.split(',') {
        let split = part.find(['+', '-', '=']).ok_or_else(fail)?;
        let mut who = 0;
        for c in part[..split].chars() {
            who |= match c {
                'u' => 4,
                'g' => 2,
                'o' => 1,
                'a' => 7,
                _ => return Err(fail()),
            };
        }
        if who == 0 {
            who = 7;
        }
        let mut chars = part[split..].chars().peekable();
        while let Some(operator) = chars.next() {
            let mut clause = Clause {
                who,
                operator,
                bits: 0,
                maybe_x: false,
                setid: false,
                sticky: false,
                of: None,
            };
            while let Some(c) = chars.next_if(|c| !matches!(c, '+' | '-' | '=')) {
                match c {
                    'r' => clause.bits |= 4,
                    'w' => clause.bits |= 2,
                    'x' => clause.bits |= 1,
                    'X' => clause.maybe_x = true,
                    's' => clause.setid = true,
                    't' => clause.sticky = true,
                    'u' | 'g' | 'o' if clause.bits == 0 => clause.of = Some(c),
                    _ => return Err(fail()),
                }
            }
            clauses.push(clause);
        }
    }
    Ok(ModeChange::Clauses(clauses))
}

impl ModeChange {
    pub fn apply(&self, mode: u32, folder: bool) -> u32 {
        match self {
            ModeChange::Set(mode) => *mode,
            ModeChange::Clauses(clauses) => {
                // `X` asks what stood there before any clause.
                let runs = folder || mode & 0o111 != 0;
                clauses
                    .iter()
                    .fold(mode & 0o7777, |mode, c| c.apply(mode, folder, runs))
            }
        }
    }
}

impl Clause {
    fn apply(&self, mode: u32, folder: bool, runs: bool) -> u32 {
        let mut bits = self.bits;
        if self.maybe_x && runs {
            bits |= 1;
        }
        match self.of {
            Some('u') => bits = mode >> 6 & 7,
            Some('g') => bits = mode >> 3 & 7,
            Some(_) => bits = mode & 7,
            None => {}
        }
        let mut change = 0;
        let mut reach = 0;
        for (who, shift, setid) in [(4, 6, 0o4000), (2, 3, 0o2000), (1, 0, 0)] {
            if self.who & who != 0 {
                change |= bits << shift | if self.setid { setid } else { 0 };
                reach |= 7 << shift | setid;
            }
        }
        if self.sticky {
            change |= 0o1000;
        }
        match self.operator {
            '+' => mode | change,
            '-' => mode & !change,
            // A folder keeps setuid and setgid that are not named, as in chmod(1).
            _ if folder => mode & !(reach & 0o777) | change,
            _ => mode & !reach | change,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn modes_are_octal_or_symbolic() {
        let cases = [
            ("0644", 0o777, false, 0o644),
            ("4755", 0, false, 0o4755),
            ("u+x", 0o644, false, 0o744),
            ("go-rwx", 0o755, false, 0o700),
            ("a=rX", 0o644, false, 0o444),
            ("a=rX", 0o744, false, 0o555),
            ("a=rX", 0o600, true, 0o555),
            ("+x,u=rwx,g=u", 0o600, false, 0o771),
            ("u=rw,go=r", 0o777, false, 0o644),
            ("u+s", 0o755, false, 0o4755),
            ("u+r-x", 0o100, false, 0o400),
            ("a-x,a+X", 0o744, false, 0o755),
            ("u+x,go+X", 0o644, false, 0o744),
        ];
        for (text, mode, folder, expected) in cases {
            let got = parse(text).unwrap().apply(mode, folder);
            assert_eq!(got, expected, "{text}: {got:o}");
        }
        for bad in ["", "888", "10000", "u", "u+z", "x+u", "u=rw,"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
