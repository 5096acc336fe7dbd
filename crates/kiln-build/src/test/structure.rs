//! Files of container-structure-test. Files and configuration are looked at in the image's
//! tree, without anything being run; a command is the first process of an instance of its
//! own, over a layer that its setup shares with it and nobody else.
//!
//! As that tool does: `$NAME` in a command or path is a variable of the image; how setup
//! and teardown end doesn't matter; a link counts as itself where a file must exist, and is
//! followed where it is read. Other than there, teardown commands are run, test-local
//! variables are expanded like global ones, and a link's target is looked for in the image.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_model::image::ImageConfig;
use kiln_model::instance::{ExitStatus, ObservedState};
use kiln_model::spec::{Check, Protocol};
use kiln_model::suite::{
    CommandTest, ContentTest, ExecutableBy, ExistenceTest, LicenseTest, MetadataTest, Structure,
    Suite, Wanted,
};
use kiln_runtime::StartError;
use kiln_runtime::log::Stream;
use kiln_store::Image;
use kiln_store::tree::{Kind, Node, Tree};

use super::matching::{compiled, found};
use super::sheet::Sheet;
use super::{MAX_TEXT_BYTES, TestFailure, TestRequest, Tester, look_again, work};

/// How long a command may run.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Where Debian's packages have their copyright files.
const DEBIAN_DOCUMENTS: &str = "usr/share/doc";

/// Licences that the tool's authors refuse, and a package of which they know better.
const REFUSED_LICENCES: [&str; 2] = ["AGPL", "WTFPL"];
const LET_THROUGH: &str = "libgnutls30";

/// What is tested.
pub(super) struct Subject<'a> {
    pub tester: &'a Tester,
    pub request: &'a TestRequest,
    pub image: &'a Image,
    pub tree: &'a Tree,
    pub cancel: &'a AtomicBool,
}

/// A command's end.
struct Ended {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Subject<'_> {
    /// Every file among the checks that needs nothing that runs.
    pub fn check_files(&self, sheet: &mut Sheet) -> Result<(), TestFailure> {
        for check in &self.request.checks {
            if let Check::Suite { path, digest, .. } = check
                && let Some(Suite::Structure(suite)) = self.request.suites.get(digest)
            {
                self.check(path, suite, sheet)?;
            }
        }
        Ok(())
    }

    /// `file`: what the cases are named after.
    fn check(&self, file: &str, suite: &Structure, sheet: &mut Sheet) -> Result<(), TestFailure> {
        let env = self.environment(suite);
        for test in &suite.commands {
            let result = self.command(suite, test, &env)?;
            sheet.checked(format!("{file}: Command Test: {}", test.name), result);
        }
        for test in &suite.contents {
            let result = self.content(test);
            sheet.checked(format!("{file}: File Content Test: {}", test.name), result);
        }
        for test in &suite.existence {
            let path = expand(&test.path, &env);
            let result = existence(self.tree, test, &path);
            sheet.checked(
                format!("{file}: File Existence Test: {}", test.name),
                result,
            );
        }
        for test in &suite.licenses {
            sheet.checked(format!("{file}: License Test"), self.license(test));
        }
        if let Some(test) = &suite.metadata {
            let result = metadata(&self.image.config, test);
            sheet.checked(format!("{file}: Metadata Test"), result);
        }
        Ok(())
    }

    /// The image's variables with the file's.
    fn environment(&self, suite: &Structure) -> BTreeMap<String, String> {
        let mut env: BTreeMap<String, String> = self.image.config.env.iter().cloned().collect();
        add(&mut env, &suite.env);
        env
    }

    fn command(
        &self,
        suite: &Structure,
        test: &CommandTest,
        env: &BTreeMap<String, String>,
    ) -> Result<Result<(), String>, TestFailure> {
        let argv = test.argv.iter().map(|word| expand(word, env)).collect();
        let mut env = env.clone();
        add(&mut env, &test.env);
        let folder = work(&self.tester.cache.join("run"), self.tree, &[]);
        let folder = folder.map_err(|e| self.machine(e))?;
        let run = |argv: Vec<String>| self.run(suite, argv, &env, folder.path());
        for line in &test.setup {
            if let Err(cause) = run(line.clone())? {
                return Ok(Err(format!("setup: {cause}")));
            }
        }
        let ended = match run(argv)? {
            Ok(ended) => ended,
            Err(cause) => return Ok(Err(cause)),
        };
        for line in &test.teardown {
            if let Err(cause) = run(line.clone())? {
                return Ok(Err(format!("teardown: {cause}")));
            }
        }
        Ok(judge(test, &ended))
    }

    /// Runs one command to its end, over what is in `folder`; a cause is the test's.
    fn run(
        &self,
        suite: &Structure,
        argv: Vec<String>,
        env: &BTreeMap<String, String>,
        folder: &std::path::Path,
    ) -> Result<Result<Ended, String>, TestFailure> {
        let config = &self.image.config;
        let mut request = TestRequest {
            argv,
            env: env.clone(),
            cwd: Some(config.working_dir.clone())
                .filter(|cwd| !cwd.is_empty())
                .unwrap_or_else(|| "/".into()),
            user: suite.user.clone().unwrap_or_else(|| config.user.clone()),
            group_add: Vec::new(),
            init: false,
            mounts: Vec::new(),
            hosts: Vec::new(),
            ..self.request.clone()
        };
        let capabilities = suite.capabilities.iter().cloned();
        request.security.cap_add.extend(capabilities);
        let shown = request.argv.join(" ");
        let spec = self.tester.spec(&request, &self.image.tree, folder);
        let mut spec = spec.map_err(|e| self.machine(e))?;
        spec.tty = suite.tty;
        let runtime = &self.tester.runtime;
        let ended = match runtime.start(&spec) {
            Ok(_) => self.follow(&spec.id),
            Err(StartError::Failed { cause, .. }) => Ok(Err(cause)),
            Err(StartError::Invalid { what, .. }) => Ok(Err(what)),
            Err(cause) => Err(self.machine(cause)),
        };
        runtime.remove(&spec.id).map_err(|e| self.machine(e))?;
        Ok(ended?.map_err(|cause| format!("`{shown}`: {cause}")))
    }

    fn follow(&self, id: &kiln_model::InstanceId) -> Result<Result<Ended, String>, TestFailure> {
        let limit = Instant::now() + COMMAND_LIMIT;
        let status = loop {
            match self.tester.runtime.observe(id).map(|o| o.state) {
                Some(ObservedState::Exited { status, .. }) => break status,
                Some(ObservedState::Dead) | None => break ExitStatus::Unknown,
                Some(ObservedState::Starting | ObservedState::Running { .. }) => {}
            }
            if self.cancel.load(Ordering::Relaxed) {
                return Err(TestFailure::Cancelled);
            }
            if Instant::now() > limit {
                let seconds = COMMAND_LIMIT.as_secs();
                return Ok(Err(format!("it did not end within {seconds} s")));
            }
            look_again();
        };
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let mut reader = self.tester.runtime.log(id);
        while let Some(record) = reader.next_record().map_err(|e| self.machine(e))? {
            let text = match record.stream {
                Stream::Stdout => &mut stdout,
                Stream::Stderr => &mut stderr,
                Stream::System => continue,
            };
            text.push_str(&record.text);
            if !record.partial {
                text.push('\n');
            }
            if text.len() as u64 > MAX_TEXT_BYTES {
                return Ok(Err(format!("it printed more than {MAX_TEXT_BYTES} bytes")));
            }
        }
        Ok(Ok(Ended {
            status,
            stdout,
            stderr,
        }))
    }

    fn content(&self, test: &ContentTest) -> Result<(), String> {
        let text = self.read(&test.path)?;
        found(&test.path, &text, &test.expected, &test.excluded)
    }

    /// A file's content, links followed.
    fn read(&self, path: &str) -> Result<String, String> {
        let (_, node) = self.tree.resolve(path).map_err(|e| e.to_string())?;
        let Kind::File { digest, size } = &node.kind else {
            return Err(format!("{path} is not a file"));
        };
        if *size > MAX_TEXT_BYTES {
            return Err(format!(
                "{path} has {size} bytes; at most {MAX_TEXT_BYTES} are looked through"
            ));
        }
        let bytes = std::fs::read(self.tester.store.object_path(digest));
        let bytes = bytes.map_err(|e| format!("{path}: {e}"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn license(&self, test: &LicenseTest) -> Result<(), String> {
        let mut files = test.files.clone();
        if test.debian {
            let packages = self.tree.children(DEBIAN_DOCUMENTS);
            let packages = packages.map_err(|e| e.to_string())?;
            let names = packages.filter(|(_, node)| node.is_dir());
            let names = names.map(|(name, _)| String::from_utf8_lossy(name).into_owned());
            let names = names.filter(|name| name != LET_THROUGH);
            files.extend(names.map(|name| format!("/{DEBIAN_DOCUMENTS}/{name}/copyright")));
        }
        let wrong: Vec<String> = files
            .iter()
            .filter_map(|file| self.refused_licence(file).err())
            .collect();
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(wrong.join("; ")),
        }
    }

    fn refused_licence(&self, file: &str) -> Result<(), String> {
        let text = self.read(file)?.to_uppercase();
        match REFUSED_LICENCES.iter().find(|name| text.contains(**name)) {
            Some(name) => Err(format!("{file} names the licence {name}")),
            None => Ok(()),
        }
    }

    fn machine(&self, cause: impl std::error::Error + Send + Sync + 'static) -> TestFailure {
        TestFailure::Machine {
            name: self.request.name.clone(),
            cause: Box::new(cause),
        }
    }
}

fn judge(test: &CommandTest, ended: &Ended) -> Result<(), String> {
    let code = match ended.status {
        ExitStatus::Code(code) => Some(code),
        // As shells and engines give it.
        ExitStatus::Signal(signal) => Some(128 + signal),
        ExitStatus::OutOfMemory | ExitStatus::StartFailed | ExitStatus::Unknown => None,
    };
    if code != Some(test.exit) {
        let said = format!("{}{}", ended.stdout, ended.stderr);
        let said = super::matching::shown(&said);
        let (status, wanted) = (ended.status, test.exit);
        return Err(format!("the command {status} instead of {wanted}: {said}"));
    }
    found(
        "the output",
        &ended.stdout,
        &test.expected_output,
        &test.excluded_output,
    )?;
    found(
        "the error output",
        &ended.stderr,
        &test.expected_error,
        &test.excluded_error,
    )
}

fn existence(tree: &Tree, test: &ExistenceTest, path: &str) -> Result<(), String> {
    let node = match (tree.get(path), test.exists) {
        (None, false) => return Ok(()),
        (Some(_), false) => return Err(format!("{path} exists")),
        (None, true) => return Err(format!("{path} does not exist")),
        (Some(node), true) => node,
    };
    let mode = mode_text(node);
    if let Some(wanted) = &test.permissions
        && *wanted != mode
    {
        return Err(format!("{path} has the permissions {mode}, not {wanted}"));
    }
    let executable = match test.executable_by {
        None => true,
        Some(ExecutableBy::Owner) => node.meta.mode & 0o100 != 0,
        Some(ExecutableBy::Group) => node.meta.mode & 0o010 != 0,
        Some(ExecutableBy::Other) => node.meta.mode & 0o001 != 0,
        Some(ExecutableBy::Any) => node.meta.mode & 0o111 != 0,
    };
    if !executable {
        return Err(format!(
            "{path} is not executable by whom it should be: {mode}"
        ));
    }
    for (what, wanted, is) in [
        ("user", test.uid, node.meta.uid),
        ("group", test.gid, node.meta.gid),
    ] {
        if let Some(wanted) = wanted
            && wanted != is
        {
            return Err(format!("{path} belongs to the {what} {is}, not {wanted}"));
        }
    }
    Ok(())
}

/// A mode as Go's `os.FileMode` prints it: a letter for each thing that is special (`-` if
/// nothing is), then nine for the permissions.
fn mode_text(node: &Node) -> String {
    let mut text = String::from(match node.kind {
        Kind::Dir => "d",
        Kind::File { .. } => "",
        Kind::Symlink { .. } => "L",
        Kind::Char { .. } => "D",
        Kind::Block { .. } => "D",
        Kind::Fifo => "p",
        Kind::Socket => "S",
    });
    for (bit, letter) in [(0o4000, 'u'), (0o2000, 'g')] {
        if node.meta.mode & bit != 0 {
            text.push(letter);
        }
    }
    if matches!(node.kind, Kind::Char { .. }) {
        text.push('c');
    }
    if node.meta.mode & 0o1000 != 0 {
        text.push('t');
    }
    if text.is_empty() {
        text.push('-');
    }
    let link = matches!(node.kind, Kind::Symlink { .. });
    let mode = if link { 0o777 } else { node.meta.mode };
    for (at, letter) in "rwxrwxrwx".chars().enumerate() {
        let set = mode & (0o400 >> at) != 0;
        text.push(if set { letter } else { '-' });
    }
    text
}

/// Everything wrong at once.
fn metadata(config: &ImageConfig, test: &MetadataTest) -> Result<(), String> {
    let mut wrong = Vec::new();
    let env: BTreeMap<&str, &str> = config
        .env
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let labels = config.labels.iter();
    let labels = labels.map(|(key, value)| (key.as_str(), value.as_str()));
    wrong.extend(values("the variable", &env, &test.env));
    wrong.extend(values("the label", &labels.collect(), &test.labels));
    for name in test.unbound.iter().filter(|n| env.contains_key(n.as_str())) {
        wrong.push(format!("the variable {name} is set"));
    }
    let exposed = |port: &String| {
        config.exposed.iter().any(|one| {
            let protocol = match one.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            *port == one.port.to_string() || *port == format!("{}/{protocol}", one.port)
        })
    };
    let volume = |path: &String| config.volumes.contains(path);
    for port in test.exposed.iter().filter(|port| !exposed(port)) {
        wrong.push(format!("the port {port} is not exposed"));
    }
    for port in test.unexposed.iter().filter(|port| exposed(port)) {
        wrong.push(format!("the port {port} is exposed"));
    }
    for path in test.volumes.iter().filter(|path| !volume(path)) {
        wrong.push(format!("{path} is not a volume"));
    }
    for path in test.unmounted.iter().filter(|path| volume(path)) {
        wrong.push(format!("{path} is a volume"));
    }
    for (what, wanted, is) in [
        ("entrypoint", &test.entrypoint, &config.entrypoint),
        ("cmd", &test.cmd, &config.cmd),
    ] {
        if let Some(wanted) = wanted.as_ref().filter(|wanted| *wanted != is) {
            wrong.push(format!("the {what} is {is:?}, not {wanted:?}"));
        }
    }
    for (what, wanted, is) in [
        ("workdir", &test.workdir, &config.working_dir),
        ("user", &test.user, &config.user),
    ] {
        if let Some(wanted) = wanted.as_ref().filter(|wanted| *wanted != is) {
            wrong.push(format!("the {what} is `{is}`, not `{wanted}`"));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(wrong.join("; ")),
    }
}

fn values(
    what: &str,
    have: &BTreeMap<&str, &str>,
    wanted: &BTreeMap<String, Wanted>,
) -> Vec<String> {
    let judged = wanted.iter().map(|(key, wanted)| {
        let Some(value) = have.get(key.as_str()) else {
            return Err(format!("{what} {key} is not set"));
        };
        match wanted {
            Wanted::Equal(text) if text == value => Ok(()),
            Wanted::Equal(text) => Err(format!("{what} {key} is `{value}`, not `{text}`")),
            Wanted::Match(pattern) if compiled(pattern)?.is_match(value) => Ok(()),
            Wanted::Match(pattern) => Err(format!(
                "{what} {key} is `{value}`, which doesn't match `{}`",
                pattern.0
            )),
        }
    });
    judged.filter_map(Result::err).collect()
}

fn add(env: &mut BTreeMap<String, String>, more: &[(String, String)]) {
    for (key, value) in more {
        let value = expand(value, env);
        env.insert(key.clone(), value);
    }
}

/// `$NAME` and `${NAME}`, as Go's `os.Expand` takes them: what is not set is nothing, a `$`
/// before anything else is itself, and `${}` goes.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, used) = name(after);
        match (name, used) {
            ("", 0) => out.push('$'),
            ("", _) => {}
            (name, _) => out.push_str(env.get(name).map_or("", String::as_str)),
        }
        rest = &after[used..];
    }
    out.push_str(rest);
    out
}

/// The name after a `$`, and how many bytes it and what is around it take.
fn name(text: &str) -> (&str, usize) {
    let special = |c: char| matches!(c, '*' | '#' | '$' | '@' | '!' | '?' | '-' | '0'..='9');
    if let Some(inner) = text.strip_prefix('{') {
        return match inner.find('}') {
            Some(0) => ("", 2),
            Some(end) => (&inner[..end], end + 2),
            None => ("", 1),
        };
    }
    if text.starts_with(special) {
        return (&text[..1], 1);
    }
    let end = text
        .find(|c: char| !(c == '_' || c.is_ascii_alphanumeric()))
        .unwrap_or(text.len());
    (&text[..end], end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_as_go_does() {
        let env = [("HOME", "/root"), ("A_1", "x")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        for (text, wanted) in [
            ("$HOME/${A_1}b", "/root/xb"),
            ("$NOPE.", "."),
            ("a$", "a$"),
            ("$(date) $%", "$(date) $%"),
            ("${}x", "x"),
            ("${HOME", "HOME"),
            ("$1$$x", "x"),
            ("$HOMEé", "/rooté"),
        ] {
            assert_eq!(expand(text, &env), wanted, "{text}");
        }
    }

    #[test]
    fn modes_are_printed_as_go_does() {
        let file = || Kind::File {
            digest: kiln_model::Digest::of(""),
            size: 0,
        };
        for (kind, mode, wanted) in [
            (file(), 0o644, "-rw-r--r--"),
            (file(), 0o4755, "urwxr-xr-x"),
            (file(), 0o6755, "ugrwxr-xr-x"),
            (Kind::Dir, 0o1777, "dtrwxrwxrwx"),
            (Kind::Symlink { target: vec![] }, 0, "Lrwxrwxrwx"),
            (Kind::Char { major: 1, minor: 3 }, 0o666, "Dcrw-rw-rw-"),
        ] {
            assert_eq!(mode_text(&Node::plain(mode, kind)), wanted);
        }
    }
}
