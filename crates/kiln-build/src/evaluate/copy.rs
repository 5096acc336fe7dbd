//! COPY and ADD: what is taken from where, with its variables filled in.

use super::{Action, CopyAction, EvaluateCause, State, Taking};
use crate::containerfile::expand::Lexer;
use crate::containerfile::{Copy, Source};
use crate::context::ignore::clean;
use crate::copy::mode;
use crate::remote::{Checksum, GitAddress, Remote};

impl State<'_> {
    pub(super) fn copy(
        &self,
        name: &'static str,
        copy: &Copy,
    ) -> Result<(Action, String), EvaluateCause> {
        let add = name == "ADD";
        let mut sources = Vec::new();
        for source in &copy.sources {
            sources.push(match source {
                Source::Path(text) => self.taking(add, self.expand(text)?, copy)?,
                Source::Inline {
                    name,
                    content,
                    expand,
                } => Taking::Inline {
                    name: name.clone(),
                    content: match expand {
                        true => self.expand_body(content)?,
                        false => content.clone(),
                    },
                },
            });
        }
        let remote = sources.iter().any(|s| matches!(s, Taking::Remote(_)));
        if copy.checksum.is_some() && !(remote && sources.len() == 1) {
            return Err(EvaluateCause::Checksum(
                "goes with exactly one URL or git repository",
            ));
        }
        let chown = copy.chown.as_deref().map(|t| self.expand(t)).transpose()?;
        let chmod = copy.chmod.as_deref().map(|t| self.expand(t)).transpose()?;
        let chmod = chmod
            .filter(|t| !t.is_empty())
            .map(|t| mode::parse(&t).map_err(EvaluateCause::Chmod));
        let exclude = self.expand_all(&copy.exclude)?;
        let action = CopyAction {
            // What comes from a URL stays as it is, unless the file says otherwise.
            unpack: copy.unpack.unwrap_or(add && !remote),
            from: copy.from.clone(),
            sources,
            destination: self.destination(&copy.destination)?,
            chown: chown.filter(|t| !t.is_empty()),
            chmod: chmod.transpose()?,
            exclude,
            parents: copy.parents,
            link: copy.link,
        };
        let history = copied(name, &action);
        Ok((Action::Copy(action), history))
    }

    fn destination(&self, text: &str) -> Result<String, EvaluateCause> {
        let written = self.expand(text)?;
        let folder = written.is_empty()
            || written.ends_with('/')
            || written.ends_with("/.")
            || written == ".";
        let mut destination = clean(&self.absolute(&written));
        if folder && !destination.ends_with('/') {
            destination.push('/');
        }
        Ok(destination)
    }

    /// A path, or for ADD also a git repository or a URL.
    fn taking(&self, add: bool, text: String, copy: &Copy) -> Result<Taking, EvaluateCause> {
        if !add {
            return Ok(Taking::Path(text));
        }
        let sum = copy
            .checksum
            .as_deref()
            .map(|t| self.expand(t))
            .transpose()?;
        let sum = sum.filter(|t| !t.is_empty());
        if let Some(address) = GitAddress::parse(&text) {
            let commit = sum
                .map(|text| Checksum::commit(&text).map_err(EvaluateCause::Checksum))
                .transpose()?;
            return Ok(Taking::Remote(Remote::Git {
                address,
                commit,
                keep_git_dir: copy.keep_git_dir.unwrap_or(false),
            }));
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            let checksum = sum
                .map(|text| Checksum::sha256(&text).map_err(EvaluateCause::Checksum))
                .transpose()?;
            return Ok(Taking::Remote(Remote::Url {
                url: text,
                checksum,
            }));
        }
        match text.starts_with("ftp://") {
            true => Err(EvaluateCause::Unsupported(format!(
                "ADD of `{text}`: docker takes http and https only, and so does kiln; it"
            ))),
            false => Ok(Taking::Path(text)),
        }
    }

    /// A heredoc's body: quotes mean nothing in it.
    fn expand_body(&self, text: &str) -> Result<String, EvaluateCause> {
        let lexer = Lexer {
            ignore_quotes: true,
            ..Lexer::new('\\')
        };
        lexer
            .word(text, &self.variables)
            .map_err(|cause| EvaluateCause::Expansion {
                text: text.to_owned(),
                cause,
            })
    }
}

fn copied(name: &str, action: &CopyAction) -> String {
    let mut told = name.to_owned();
    if let Some(chown) = &action.chown {
        told.push_str(&format!(" --chown={chown}"));
    }
    for source in &action.sources {
        match source {
            Taking::Path(path) => told.push_str(&format!(" {path}")),
            Taking::Inline { name, .. } => told.push_str(&format!(" <<{name}")),
            Taking::Remote(remote) => told.push_str(&format!(" {}", remote.shown())),
        }
    }
    format!("{told} {}", action.destination)
}
