//! Files of container-structure-test, schema 2.0.0. What that tool would take and then fail
//! by (a test without a name, a pattern that is none) is told before anything is built.

use kiln_model::suite::{
    CommandTest, ContentTest, ExecutableBy, ExistenceTest, LicenseTest, MetadataTest, Structure,
    Wanted,
};

use super::Lowering;
use crate::node::{Node, Value};
use crate::values;

const SCHEMA: &str = "2.0.0";

impl Lowering<'_> {
    pub(super) fn structure(&mut self, root: &Node) -> Structure {
        let mut out = Structure::default();
        let known = [
            "schemaVersion",
            "globalEnvVars",
            "commandTests",
            "fileExistenceTests",
            "fileContentTests",
            "metadataTest",
            "licenseTests",
            "containerRunOptions",
        ];
        match root.get("schemaVersion").map(|node| (node, node.text())) {
            Some((_, Some(version))) if version == SCHEMA => {}
            Some((node, version)) => {
                let version = version.unwrap_or_default();
                let what = format!("schemaVersion `{version}` is not known; kiln reads {SCHEMA}");
                return self.and(out, |it| it.wrong(node.span, what));
            }
            None => {
                let what = format!("the key `schemaVersion` is missing; write \"{SCHEMA}\"");
                return self.and(out, |it| it.wrong(root.span, what));
            }
        }
        for (key, value) in self.known(root, "the file", &known) {
            match key {
                "globalEnvVars" => out.env = self.variables(value, key),
                "commandTests" => out.commands = self.each(value, key, Self::command_test),
                "fileExistenceTests" => out.existence = self.each(value, key, Self::existence_test),
                "fileContentTests" => out.contents = self.each(value, key, Self::content_test),
                "metadataTest" => out.metadata = Some(self.metadata_test(value)),
                "licenseTests" => out.licenses = self.each(value, key, Self::license_test),
                "containerRunOptions" => self.run_options(value, &mut out),
                _ => {}
            }
        }
        out
    }

    fn and<T>(&mut self, value: T, tell: impl FnOnce(&mut Self)) -> T {
        tell(self);
        value
    }

    /// The items of a list, each read with its place.
    fn each<T>(
        &mut self,
        node: &Node,
        path: &str,
        read: fn(&mut Self, &Node, &str) -> Option<T>,
    ) -> Vec<T> {
        if node.is_null() {
            return vec![];
        }
        let items = self.list(node, path).iter().enumerate();
        items
            .filter_map(|(at, item)| read(self, item, &format!("{path}[{at}]")))
            .collect()
    }

    /// A text that must be there and say something.
    fn stated(&mut self, test: &Node, key: &str, path: &str) -> Option<String> {
        let Some(node) = test.get(key) else {
            self.wrong(test.span, format!("{path}: the key `{key}` is missing"));
            return None;
        };
        let text = self.string(node, &format!("{path}.{key}"))?;
        if text.is_empty() {
            self.wrong(node.span, format!("{path}.{key} is empty"));
            return None;
        }
        Some(text)
    }

    fn words(&mut self, node: &Node, path: &str) -> Vec<String> {
        self.each(node, path, |it, item, path| it.string(item, path))
    }

    fn command_lines(&mut self, node: &Node, path: &str) -> Vec<Vec<String>> {
        self.each(node, path, |it, item, path| {
            let words = it.words(item, path);
            if words.is_empty() {
                it.wrong(item.span, format!("{path}: an empty command"));
            }
            (!words.is_empty()).then_some(words)
        })
    }

    /// `[{key: K, value: V}]`
    fn variables(&mut self, node: &Node, path: &str) -> Vec<(String, String)> {
        self.each(node, path, |it, item, path| {
            it.known(item, path, &["key", "value"]);
            let key = it.stated(item, "key", path)?;
            Some((key, it.stated(item, "value", path)?))
        })
    }

    fn command_test(&mut self, node: &Node, path: &str) -> Option<CommandTest> {
        let known = [
            "name",
            "setup",
            "teardown",
            "envVars",
            "exitCode",
            "command",
            "args",
            "expectedOutput",
            "excludedOutput",
            "expectedError",
            "excludedError",
        ];
        let mut out = CommandTest {
            name: String::new(),
            setup: vec![],
            teardown: vec![],
            env: vec![],
            argv: vec![],
            exit: 0,
            expected_output: vec![],
            excluded_output: vec![],
            expected_error: vec![],
            excluded_error: vec![],
        };
        let mut args = vec![];
        for (key, value) in self.known(node, path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "setup" => out.setup = self.command_lines(value, &here),
                "teardown" => out.teardown = self.command_lines(value, &here),
                "envVars" => out.env = self.variables(value, &here),
                "exitCode" => out.exit = self.number(value, &here).unwrap_or_default(),
                "args" => args = self.words(value, &here),
                "expectedOutput" => out.expected_output = self.patterns(value, &here),
                "excludedOutput" => out.excluded_output = self.patterns(value, &here),
                "expectedError" => out.expected_error = self.patterns(value, &here),
                "excludedError" => out.excluded_error = self.patterns(value, &here),
                _ => {}
            }
        }
        let name = self.stated(node, "name", path);
        out.argv = vec![self.stated(node, "command", path)?];
        out.argv.append(&mut args);
        out.name = name?;
        Some(out)
    }

    fn existence_test(&mut self, node: &Node, path: &str) -> Option<ExistenceTest> {
        let known = [
            "name",
            "path",
            "shouldExist",
            "permissions",
            "uid",
            "gid",
            "isExecutableBy",
        ];
        let (name, file) = (
            self.stated(node, "name", path),
            self.stated(node, "path", path),
        );
        let mut out = ExistenceTest {
            name: name.unwrap_or_default(),
            path: file?,
            exists: true,
            permissions: None,
            uid: None,
            gid: None,
            executable_by: None,
        };
        for (key, value) in self.known(node, path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "shouldExist" => out.exists = self.boolean(value, &here)?,
                "permissions" => {
                    out.permissions = self.string(value, &here).filter(|text| !text.is_empty());
                }
                "uid" => out.uid = self.owner_id(value, &here),
                "gid" => out.gid = self.owner_id(value, &here),
                "isExecutableBy" => out.executable_by = self.executable_by(value, &here),
                _ => {}
            }
        }
        Some(out)
    }

    /// -1 stands for anybody.
    fn owner_id(&mut self, node: &Node, path: &str) -> Option<u32> {
        if node.as_int() == Some(-1) {
            return None;
        }
        self.number(node, path)
    }

    fn executable_by(&mut self, node: &Node, path: &str) -> Option<ExecutableBy> {
        match self.string(node, path)?.as_str() {
            "" => None,
            "owner" => Some(ExecutableBy::Owner),
            "group" => Some(ExecutableBy::Group),
            "other" => Some(ExecutableBy::Other),
            "any" => Some(ExecutableBy::Any),
            other => {
                let what = format!("{path} is owner, group, other or any, not `{other}`");
                self.and(None, |it| it.wrong(node.span, what))
            }
        }
    }

    fn content_test(&mut self, node: &Node, path: &str) -> Option<ContentTest> {
        let known = ["name", "path", "expectedContents", "excludedContents"];
        let (mut expected, mut excluded) = (vec![], vec![]);
        for (key, value) in self.known(node, path, &known) {
            let here = format!("{path}.{key}");
            match key {
                "expectedContents" => expected = self.patterns(value, &here),
                "excludedContents" => excluded = self.patterns(value, &here),
                _ => {}
            }
        }
        let name = self.stated(node, "name", path);
        Some(ContentTest {
            path: self.stated(node, "path", path)?,
            name: name?,
            expected,
            excluded,
        })
    }

    fn metadata_test(&mut self, node: &Node) -> MetadataTest {
        let mut out = MetadataTest::default();
        let known = [
            "envVars",
            "unboundEnvVars",
            "labels",
            "exposedPorts",
            "unexposedPorts",
            "volumes",
            "unmountedVolumes",
            "entrypoint",
            "cmd",
            "workdir",
            "user",
        ];
        let said = |text: Option<String>| text.filter(|text| !text.is_empty());
        for (key, value) in self.known(node, "metadataTest", &known) {
            let here = format!("metadataTest.{key}");
            match key {
                "envVars" => out.env = self.wanted(value, &here).into_iter().collect(),
                "unboundEnvVars" => {
                    let names = self.wanted(value, &here);
                    out.unbound = names.into_iter().map(|(name, _)| name).collect();
                }
                "labels" => out.labels = self.wanted(value, &here).into_iter().collect(),
                "exposedPorts" => out.exposed = self.words(value, &here),
                "unexposedPorts" => out.unexposed = self.words(value, &here),
                "volumes" => out.volumes = self.words(value, &here),
                "unmountedVolumes" => out.unmounted = self.words(value, &here),
                // `cmd:` and nothing more says nothing; `cmd: []` says that there is none.
                "entrypoint" if matches!(value.value, Value::Null) => {}
                "cmd" if matches!(value.value, Value::Null) => {}
                "entrypoint" => out.entrypoint = Some(self.words(value, &here)),
                "cmd" => out.cmd = Some(self.words(value, &here)),
                "workdir" => out.workdir = said(self.string(value, &here)),
                _ => out.user = said(self.string(value, &here)),
            }
        }
        out
    }

    /// `[{key: K, value: V, isRegex: false}]`
    fn wanted(&mut self, node: &Node, path: &str) -> Vec<(String, Wanted)> {
        self.each(node, path, |it, item, path| {
            it.known(item, path, &["key", "value", "isRegex"]);
            let key = it.stated(item, "key", path)?;
            let regex = match item.get("isRegex") {
                Some(node) => it.boolean(node, &format!("{path}.isRegex"))?,
                None => false,
            };
            let here = format!("{path}.value");
            let wanted = match item.get("value").filter(|value| !value.is_null()) {
                None => Wanted::Equal(String::new()),
                Some(value) if regex => Wanted::Match(it.pattern(value, &here)?),
                Some(value) => Wanted::Equal(it.string(value, &here)?),
            };
            Some((key, wanted))
        })
    }

    fn license_test(&mut self, node: &Node, path: &str) -> Option<LicenseTest> {
        let mut out = LicenseTest::default();
        for (key, value) in self.known(node, path, &["debian", "files"]) {
            let here = format!("{path}.{key}");
            match key {
                "debian" => out.debian = self.boolean(value, &here)?,
                _ => out.files = self.words(value, &here),
            }
        }
        Some(out)
    }

    fn run_options(&mut self, node: &Node, out: &mut Structure) {
        let known = [
            "user",
            "privileged",
            "allocateTty",
            "envFile",
            "envVars",
            "capabilities",
            "bindMounts",
        ];
        for (key, value) in self.known(node, "containerRunOptions", &known) {
            let here = format!("containerRunOptions.{key}");
            let nothing = match &value.value {
                Value::Seq(seq) => seq.is_empty(),
                Value::Str(text) => text.is_empty(),
                Value::Null => true,
                _ => values::boolean(value) == Ok(false),
            };
            match key {
                _ if nothing => {}
                "user" => out.user = self.string(value, &here),
                "allocateTty" => out.tty = self.boolean(value, &here).unwrap_or_default(),
                "capabilities" => out.capabilities = self.words(value, &here),
                "privileged" => self.refused(
                    value.key,
                    &here,
                    "a test gets no more rights than its service; name `capabilities`",
                ),
                "envFile" | "envVars" => self.refused(
                    value.key,
                    &here,
                    "the verdict would depend on who asks; use `globalEnvVars`",
                ),
                _ => self.refused(
                    value.key,
                    &here,
                    "a test of an image sees nothing of the host; add the files to the image",
                ),
            }
        }
    }
}
