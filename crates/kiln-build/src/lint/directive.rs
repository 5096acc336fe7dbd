//! `# check=skip=A,B;error=true;experimental=C`.

use std::collections::BTreeSet;

use super::{RULES, Rule};

/// A directive that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("# check={text}: {cause}")]
pub struct BadDirective {
    text: String,
    cause: String,
}

/// What a file asks of its check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directive {
    skip: BTreeSet<Rule>,
    experimental: BTreeSet<Rule>,
    /// A finding stops the build.
    pub error: bool,
}

impl Directive {
    /// `None`: the file has none.
    pub fn parse(text: Option<&str>) -> Result<Self, BadDirective> {
        let mut directive = Self::default();
        let text = text.unwrap_or_default();
        let bad = |cause: String| BadDirective {
            text: text.to_owned(),
            cause,
        };
        for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| bad(format!("`{part}` has no `=`")))?;
            let value = value.trim();
            match key.trim() {
                "skip" => directive.skip = rules(value).map_err(bad)?,
                "experimental" => directive.experimental = rules(value).map_err(bad)?,
                "error" => {
                    directive.error = value
                        .parse()
                        .map_err(|_| bad(format!("error takes true or false, not `{value}`")))?;
                }
                other => return Err(bad(format!("`{other}` is not skip, error or experimental"))),
            }
        }
        Ok(directive)
    }

    pub(super) fn wants(&self, rule: Rule) -> bool {
        match rule.is_experimental() {
            true => self.experimental.contains(&rule) && !self.skip.contains(&rule),
            false => !self.skip.contains(&rule),
        }
    }
}

/// Names with commas between; `all`.
fn rules(text: &str) -> Result<BTreeSet<Rule>, String> {
    if text.eq_ignore_ascii_case("all") {
        return Ok(RULES.into());
    }
    let names = text.split(',').map(str::trim).filter(|n| !n.is_empty());
    let rule = |name: &str| {
        let found = RULES
            .into_iter()
            .find(|r| r.to_string().eq_ignore_ascii_case(name));
        found.ok_or_else(|| format!("there is no rule `{name}`"))
    };
    names.map(rule).collect()
}
