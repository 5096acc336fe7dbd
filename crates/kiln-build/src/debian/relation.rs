//! Relationship fields: `Depends`, `Pre-Depends`, `Conflicts`, `Breaks`,
//! `Replaces`, `Provides` (Debian Policy 7.1).

use std::cmp::Ordering;
use std::fmt;

use super::version;

/// One name with what is asked of its version: `libc6 (>= 2.36)`, `python3:any`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    pub name: &'a str,
    /// `any`, `native` or an architecture.
    pub qualifier: Option<&'a str>,
    pub version: Option<(Operator, &'a str)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Earlier,
    EarlierOrEqual,
    Equal,
    LaterOrEqual,
    Later,
}

impl Relation<'_> {
    /// Whether a package of this version satisfies the version part.
    pub fn allows(&self, found: &str) -> bool {
        let Some((operator, wanted)) = self.version else {
            return true;
        };
        let order = version::compare(found, wanted);
        match operator {
            Operator::Earlier => order == Ordering::Less,
            Operator::EarlierOrEqual => order != Ordering::Greater,
            Operator::Equal => order == Ordering::Equal,
            Operator::LaterOrEqual => order != Ordering::Less,
            Operator::Later => order == Ordering::Greater,
        }
    }
}

impl fmt::Display for Relation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(qualifier) = self.qualifier {
            write!(f, ":{qualifier}")?;
        }
        if let Some((operator, version)) = self.version {
            let sign = match operator {
                Operator::Earlier => "<<",
                Operator::EarlierOrEqual => "<=",
                Operator::Equal => "=",
                Operator::LaterOrEqual => ">=",
                Operator::Later => ">>",
            };
            write!(f, " ({sign} {version})")?;
        }
        Ok(())
    }
}

/// A field's groups; one of each group's alternatives is enough. Text that is no
/// relation gives an alternative with an impossible name, never a silent nothing.
pub fn parse(field: &str) -> impl Iterator<Item = Vec<Relation<'_>>> {
    field
        .split(',')
        .map(str::trim)
        .filter(|group| !group.is_empty())
        .map(|group| group.split('|').map(one).collect())
}

fn one(text: &str) -> Relation<'_> {
    let text = text.trim();
    let head_end = text
        .find(['(', '[', '<', ' ', '\t', '\n'])
        .unwrap_or(text.len());
    let (head, tail) = text.split_at(head_end);
    let (name, qualifier) = match head.split_once(':') {
        Some((name, qualifier)) => (name, Some(qualifier)),
        None => (head, None),
    };
    let version = tail
        .split_once('(')
        .and_then(|(_, rest)| rest.split_once(')'))
        .and_then(|(inside, _)| operator(inside.trim()));
    let broken = tail.contains('(') && version.is_none();
    Relation {
        name: if broken { text } else { name },
        qualifier,
        version,
    }
}

fn operator(inside: &str) -> Option<(Operator, &str)> {
    let sign_end = inside.find(|c| !matches!(c, '<' | '=' | '>'))?;
    let (sign, version) = inside.split_at(sign_end);
    let operator = match sign {
        "<<" => Operator::Earlier,
        "<=" | "<" => Operator::EarlierOrEqual,
        "=" => Operator::Equal,
        ">=" | ">" => Operator::LaterOrEqual,
        ">>" => Operator::Later,
        _ => return None,
    };
    Some((operator, version.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternatives_versions_and_qualifiers() {
        let groups: Vec<_> =
            parse("libc6 (>= 2.36), python3:any (<<3.12) | perl , awk,\n x(=1:2)").collect();
        assert_eq!(groups.len(), 4);
        assert_eq!(groups[0][0].version, Some((Operator::LaterOrEqual, "2.36")));
        assert_eq!(groups[1].len(), 2);
        assert_eq!(groups[1][0].qualifier, Some("any"));
        assert_eq!(groups[1][0].to_string(), "python3:any (<< 3.12)");
        assert_eq!(groups[1][1].name, "perl");
        assert_eq!(groups[3][0].version, Some((Operator::Equal, "1:2")));
        assert!(groups[0][0].allows("2.36-9") && !groups[0][0].allows("2.35"));
    }

    #[test]
    fn a_broken_version_never_becomes_an_unversioned_relation() {
        for bad in ["a (?? 1)", "a (>= 1", "a ()"] {
            let groups: Vec<_> = parse(bad).collect();
            assert_ne!(groups[0][0].name, "a", "{bad}");
        }
    }
}
