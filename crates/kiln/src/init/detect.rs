//! From the names in a folder, and a few of their contents, to a project's files. Pure.

use std::fmt::Write;

/// The Debian release of the bases that are written.
const SUITE: &str = "trixie";

/// Files by which a folder is known, in the order they are looked for.
pub const KNOWN: &[&str] = &[
    "Containerfile",
    "Dockerfile",
    "package.json",
    "pyproject.toml",
    "requirements.txt",
    "go.mod",
    "Cargo.toml",
    "pom.xml",
    "Gemfile",
    "composer.json",
    "manage.py",
    "main.py",
    "app.py",
    "server.py",
    "wsgi.py",
    "index.html",
];

/// What a Python project's program is called, likeliest first.
const PYTHON_PROGRAMS: &[&str] = &["main.py", "app.py", "server.py", "wsgi.py"];

/// A folder as far as it matters.
pub struct Folder<'a> {
    pub names: Vec<String>,
    pub read: &'a dyn Fn(&str) -> String,
}

/// What is to be written.
pub struct Made {
    pub what: &'static str,
    /// Names and texts.
    pub files: Vec<(&'static str, String)>,
    /// Guesses that someone should look at.
    pub to_do: Vec<String>,
}

/// A base: its name, its packages, and whether it is without a shell.
struct Base(&'static str, &'static [&'static str], bool);

/// What a language needs.
struct Recipe {
    what: &'static str,
    bases: &'static [Base],
    containerfile: String,
    port: u16,
    ignore: &'static str,
    to_do: Vec<String>,
}

impl Folder<'_> {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    fn first<'n>(&self, names: &[&'n str]) -> Option<&'n str> {
        names.iter().copied().find(|name| self.has(name))
    }

    fn text(&self, name: &str) -> String {
        match self.has(name) {
            true => (self.read)(name),
            false => String::new(),
        }
    }
}

/// The files of a project for this folder. `None`: nothing in it is known.
pub fn project(folder: &Folder<'_>) -> Option<Made> {
    let known = folder.first(KNOWN)?;
    let recipe = match known {
        "Containerfile" | "Dockerfile" => return Some(of_containerfile(known, folder)),
        "package.json" => node(folder),
        "pyproject.toml" | "requirements.txt" => python(folder),
        known if known.ends_with(".py") => python(folder),
        "go.mod" => go(),
        "Cargo.toml" => rust(folder),
        "pom.xml" => java(),
        "Gemfile" => ruby(folder),
        "composer.json" => php(folder),
        _ => pages(),
    };
    let mut files = vec![
        (
            "compose.yaml",
            compose(recipe.bases, Some(recipe.port), true),
        ),
        ("Containerfile", recipe.containerfile),
    ];
    if !folder.has(".dockerignore") && !folder.has(".containerignore") {
        files.push((".dockerignore", format!(".git\n{}", recipe.ignore)));
    }
    Some(Made {
        what: recipe.what,
        files,
        to_do: recipe.to_do,
    })
}

/// The port of the last EXPOSE; what runs is the Containerfile's business.
fn of_containerfile(name: &str, folder: &Folder<'_>) -> Made {
    let text = folder.text(name);
    let port = text
        .lines()
        .filter_map(|line| {
            let (word, rest) = line.trim().split_once(char::is_whitespace)?;
            word.eq_ignore_ascii_case("EXPOSE").then_some(rest)
        })
        .filter_map(|rest| {
            let port = rest.split_whitespace().next()?;
            port.strip_suffix("/tcp").unwrap_or(port).parse().ok()
        })
        .next_back();
    let mut to_do = vec![];
    if port.is_none() {
        to_do.push(format!(
            "{name} exposes no port; publish one with `ports:` if it serves"
        ));
    }
    Made {
        what: "a folder with a Containerfile",
        files: vec![("compose.yaml", compose(&[], port, false))],
        to_do,
    }
}

fn compose(bases: &[Base], port: Option<u16>, environment: bool) -> String {
    let mut out = String::from("# Made by `kiln init`; change it as you like.\n");
    if !bases.is_empty() {
        out.push_str(
            "\n# Base images, composed of Debian packages: `FROM` in the Containerfile means these.\n\
             # kiln.lock pins every package by version and sha256.\nx-kiln:\n  bases:\n",
        );
    }
    for Base(name, packages, distroless) in bases {
        let _ = writeln!(out, "    {name}:\n      suite: {SUITE}");
        let _ = writeln!(out, "      packages: [{}]", packages.join(", "));
        if *distroless {
            out.push_str("      distroless: true\n");
        }
    }
    out.push_str("\nservices:\n  app:\n    build: .\n    restart: unless-stopped\n");
    let Some(port) = port else {
        out.push_str("    # It is ready when it has stayed up for so long.\n");
        out.push_str("    x-kiln:\n      ready:\n        settled: 2s\n");
        return out;
    };
    let published = if port < 1024 { port + 8000 } else { port };
    if environment {
        let _ = writeln!(out, "    environment:\n      PORT: \"{port}\"");
    }
    let _ = writeln!(out, "    ports:\n      - \"{published}:{port}\"");
    let _ = write!(
        out,
        "    x-kiln:\n      # A new copy gets traffic when this answers; the old one has so long to finish.\n\
         \x20     ready:\n        tcp: {port}\n      drain: 10s\n",
    );
    out
}

fn node(folder: &Folder<'_>) -> Recipe {
    let package: serde_json::Value =
        serde_json::from_str(&folder.text("package.json")).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let start = text(&package["scripts"]["start"]);
    let main = text(&package["main"]).or_else(|| {
        folder
            .first(&["server.js", "index.js", "app.js"])
            .map(str::to_owned)
    });
    let mut to_do = vec![];
    let command = match (start, main) {
        (Some(_), _) => exec(&["npm", "start"]),
        (None, Some(main)) => exec(&["node", &main]),
        (None, None) => {
            to_do.push("Containerfile: CMD is a guess; package.json names no program".into());
            exec(&["node", "index.js"])
        }
    };
    let locked = folder.has("package-lock.json") || folder.has("npm-shrinkwrap.json");
    let install = match locked {
        true => "npm ci",
        false => {
            to_do.push("there is no package-lock.json: builds won't stay the same".into());
            "npm install"
        }
    };
    let build = match package["scripts"]["build"].is_string() {
        true => "RUN npm run build\n",
        false => "",
    };
    Recipe {
        what: "a Node.js project",
        bases: &[Base("node", &["nodejs", "npm", "ca-certificates"], false)],
        containerfile: format!(
            "FROM node\nWORKDIR /app\nCOPY package*.json ./\nRUN {install} --no-audit --no-fund\n\
             COPY . .\n{build}ENV NODE_ENV=production\nUSER nobody\nEXPOSE 3000\nCMD {command}\n"
        ),
        port: 3000,
        ignore: "node_modules\n",
        to_do,
    }
}

fn python(folder: &Folder<'_>) -> Recipe {
    let mut to_do = vec![];
    let install = match folder.first(&["requirements.txt", "pyproject.toml"]) {
        Some("requirements.txt") => {
            "COPY requirements.txt ./\nRUN /venv/bin/pip install --no-cache-dir -r requirements.txt\nCOPY . ."
        }
        Some(_) => "COPY . .\nRUN /venv/bin/pip install --no-cache-dir .",
        None => "COPY . .",
    };
    let needs = folder.text("requirements.txt") + &folder.text("pyproject.toml");
    let needs = needs.to_lowercase();
    let program = folder.first(PYTHON_PROGRAMS);
    let module = program.unwrap_or("main.py").trim_end_matches(".py");
    let command = if folder.has("manage.py") {
        exec(&[
            "python3",
            "manage.py",
            "runserver",
            "--noreload",
            "0.0.0.0:8000",
        ])
    } else if needs.contains("uvicorn") {
        exec(&[
            "uvicorn",
            &format!("{module}:app"),
            "--host",
            "0.0.0.0",
            "--port",
            "8000",
        ])
    } else if needs.contains("gunicorn") {
        exec(&[
            "gunicorn",
            "--bind",
            "0.0.0.0:8000",
            &format!("{module}:app"),
        ])
    } else {
        exec(&["python3", "-u", &format!("{module}.py")])
    };
    if program.is_none() && !folder.has("manage.py") {
        to_do.push("Containerfile: CMD is a guess".into());
    }
    Recipe {
        what: "a Python project",
        bases: &[Base(
            "python",
            &["python3", "python3-venv", "ca-certificates"],
            false,
        )],
        containerfile: format!(
            "FROM python\nENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin\nWORKDIR /app\n\
             RUN python3 -m venv /venv\n{install}\n\
             # Compiled now, since a running instance can't write beside its programs.\n\
             RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app\n\
             USER nobody\nEXPOSE 8000\nCMD {command}\n"
        ),
        port: 8000,
        ignore: "__pycache__\n.venv\nvenv\n",
        to_do,
    }
}

const BARE: Base = Base("bare", &["ca-certificates", "tzdata"], true);

fn go() -> Recipe {
    Recipe {
        what: "a Go module",
        bases: &[Base("go", &["golang-go", "ca-certificates"], false), BARE],
        containerfile: "FROM go AS build\nWORKDIR /src\nENV CGO_ENABLED=0\nCOPY . .\n\
             RUN go build -trimpath -o /out/app .\n\n\
             FROM bare\nCOPY --from=build /out/app /app\nUSER 65534:65534\nEXPOSE 8080\nCMD [\"/app\"]\n"
            .into(),
        port: 8080,
        ignore: "bin\n",
        to_do: vec!["Containerfile: the main package is taken to be the module's root".into()],
    }
}

fn rust(folder: &Folder<'_>) -> Recipe {
    let text = folder.text("Cargo.toml");
    let package = text.split("[package]").nth(1).unwrap_or_default();
    let name = package.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "name").then(|| value.trim().trim_matches('"').to_owned())
    });
    let plain = |name: &String| {
        !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
    };
    let mut to_do = vec![];
    let name = name.filter(plain).unwrap_or_else(|| {
        to_do.push("Containerfile: the program's name is a guess".into());
        "app".into()
    });
    let locked = if folder.has("Cargo.lock") {
        " --locked"
    } else {
        ""
    };
    Recipe {
        what: "a Rust crate",
        bases: &[
            Base("rust", &["cargo", "ca-certificates"], false),
            Base(
                "run",
                &["libc6", "libgcc-s1", "ca-certificates", "tzdata"],
                true,
            ),
        ],
        containerfile: format!(
            "FROM rust AS build\nWORKDIR /src\nCOPY . .\nRUN cargo build --release{locked}\n\n\
             FROM run\nCOPY --from=build /src/target/release/{name} /app\nUSER 65534:65534\n\
             EXPOSE 8080\nCMD [\"/app\"]\n"
        ),
        port: 8080,
        ignore: "target\n",
        to_do,
    }
}

fn java() -> Recipe {
    Recipe {
        what: "a Maven project",
        bases: &[
            Base("maven", &["maven", "default-jdk-headless", "ca-certificates"], false),
            Base("java", &["default-jre-headless", "ca-certificates"], false),
        ],
        containerfile: "FROM maven AS build\nWORKDIR /src\nCOPY . .\n\
             RUN mvn -q -B package -DskipTests\n\
             RUN mkdir /out && cp \"$(find target -maxdepth 1 -name '*.jar' ! -name 'original-*' ! -name '*-sources.jar' | head -n 1)\" /out/app.jar\n\n\
             FROM java\nCOPY --from=build /out/app.jar /app.jar\nUSER nobody\nEXPOSE 8080\n\
             CMD [\"java\", \"-jar\", \"/app.jar\"]\n"
            .into(),
        port: 8080,
        ignore: "target\n",
        to_do: vec!["Containerfile: the jar must be one that `java -jar` can start".into()],
    }
}

fn ruby(folder: &Folder<'_>) -> Recipe {
    let rack = folder.has("config.ru");
    let mut to_do = vec![];
    let command = match (rack, folder.first(&["app.rb", "main.rb", "server.rb"])) {
        (true, _) => exec(&[
            "bundle", "exec", "rackup", "--host", "0.0.0.0", "--port", "9292",
        ]),
        (false, program) => {
            if program.is_none() {
                to_do.push("Containerfile: CMD is a guess".into());
            }
            exec(&["bundle", "exec", "ruby", program.unwrap_or("app.rb")])
        }
    };
    Recipe {
        what: "a Ruby project",
        bases: &[Base(
            "ruby",
            &[
                "ruby",
                "ruby-dev",
                "bundler",
                "build-essential",
                "ca-certificates",
            ],
            false,
        )],
        containerfile: format!(
            "FROM ruby\nWORKDIR /app\nENV BUNDLE_PATH=/gems\nCOPY Gemfile* ./\nRUN bundle install\n\
             COPY . .\nUSER nobody\nEXPOSE 9292\nCMD {command}\n"
        ),
        port: 9292,
        ignore: "vendor/bundle\n",
        to_do,
    }
}

fn php(folder: &Folder<'_>) -> Recipe {
    let root = if folder.has("public") { "public" } else { "." };
    Recipe {
        what: "a PHP project",
        bases: &[Base(
            "php",
            &["php-cli", "composer", "unzip", "ca-certificates"],
            false,
        )],
        containerfile: format!(
            "FROM php\nWORKDIR /app\nCOPY . .\n\
             RUN composer install --no-dev --no-interaction --optimize-autoloader\n\
             ENV PHP_CLI_SERVER_WORKERS=4\nUSER nobody\nEXPOSE 8000\nCMD {}\n",
            exec(&["php", "-S", "0.0.0.0:8000", "-t", root])
        ),
        port: 8000,
        ignore: "vendor\n",
        to_do: vec![
            "PHP's own server is for small sites; use php-fpm behind nginx for others".into(),
        ],
    }
}

fn pages() -> Recipe {
    Recipe {
        what: "a folder of static pages",
        bases: &[Base("nginx", &["nginx-light"], false)],
        containerfile: "FROM nginx\nCOPY . /var/www/html/\nEXPOSE 80\nCMD [\"nginx\", \"-g\", \"daemon off;\"]\n".into(),
        port: 80,
        ignore: "Containerfile\ncompose.yaml\nkiln.lock\n.dockerignore\n",
        to_do: vec![],
    }
}

/// JSON's form of a command is the Containerfile's.
fn exec(words: &[&str]) -> String {
    serde_json::json!(words).to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use kiln_compose::{LoadOptions, lint, load};

    fn made(files: &[(&str, &str)]) -> Option<Made> {
        let read = |name: &str| {
            let found = files.iter().find(|(n, _)| *n == name);
            found
                .map(|(_, text)| (*text).to_owned())
                .unwrap_or_default()
        };
        project(&Folder {
            names: files.iter().map(|(name, _)| (*name).to_owned()).collect(),
            read: &read,
        })
    }

    fn text<'m>(made: &'m Made, name: &str) -> &'m str {
        &made.files.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Loads as it is, has nothing to complain of, and every FROM is a base or a stage.
    fn is_good(made: &Made) {
        let compose = text(made, "compose.yaml").to_owned();
        let options = LoadOptions {
            files: vec!["/p/compose.yaml".into()],
            folder: "/p".into(),
            ..LoadOptions::default()
        };
        let reader = |_: &std::path::Path| Ok(compose.clone().into_bytes());
        let loaded = load(&options, &reader).unwrap_or_else(|e| panic!("{e}\n{compose}"));
        assert!(loaded.notes.is_empty(), "{:?}", loaded.notes);
        let found = lint::lint(&loaded.project, &loaded.sources);
        assert!(found.is_empty(), "{found:?}");
        let Some((_, file)) = made.files.iter().find(|(n, _)| *n == "Containerfile") else {
            return;
        };
        kiln_build::containerfile::parse(file.as_bytes()).unwrap_or_else(|e| panic!("{e}\n{file}"));
        for line in file.lines().filter(|line| line.starts_with("FROM ")) {
            let base = line.split_whitespace().nth(1).unwrap();
            assert!(loaded.spec.bases.contains_key(base), "{line}");
        }
    }

    #[test]
    fn each_kind_of_folder_becomes_a_project_that_loads() {
        for (files, what, says) in [
            (
                vec![
                    (
                        "package.json",
                        r#"{"scripts": {"start": "node x.js", "build": "b"}}"#,
                    ),
                    ("package-lock.json", ""),
                ],
                "Node.js",
                "npm ci",
            ),
            (
                vec![("package.json", r#"{"main": "srv.js"}"#)],
                "Node.js",
                r#"CMD ["node","srv.js"]"#,
            ),
            (vec![("package.json", "not json")], "Node.js", "CMD"),
            (
                vec![("requirements.txt", "Flask\ngunicorn==1"), ("app.py", "")],
                "Python",
                r#""app:app"]"#,
            ),
            (
                vec![("pyproject.toml", "[project]"), ("main.py", "")],
                "Python",
                "pip install --no-cache-dir .",
            ),
            (
                vec![("app.py", "")],
                "Python",
                r#"COPY . .
# Compiled"#,
            ),
            (vec![("manage.py", "")], "Python", "runserver"),
            (vec![("go.mod", "module x")], "Go", "go build"),
            (
                vec![
                    ("Cargo.toml", "[package]\nname = \"pot\"\n"),
                    ("Cargo.lock", ""),
                ],
                "Rust",
                "release/pot /app",
            ),
            (
                vec![("Cargo.toml", "[package]\nname = \"a b; rm\"\n")],
                "Rust",
                "release/app /app",
            ),
            (vec![("pom.xml", "")], "Maven", "java"),
            (vec![("Gemfile", ""), ("config.ru", "")], "Ruby", "rackup"),
            (
                vec![("composer.json", ""), ("public", "")],
                "PHP",
                r#""public"]"#,
            ),
            (vec![("index.html", "")], "static", "nginx"),
        ] {
            let made = made(&files).unwrap();
            assert!(made.what.contains(what), "{}", made.what);
            let file = text(&made, "Containerfile");
            assert!(file.contains(says), "{says}: {file}");
            is_good(&made);
        }
    }

    #[test]
    fn a_containerfile_is_taken_as_it_is() {
        let made = made(&[
            ("Dockerfile", "FROM x\nexpose 1234/tcp 5\n"),
            ("package.json", "{}"),
        ])
        .unwrap();
        assert_eq!(made.files.len(), 1);
        assert!(text(&made, "compose.yaml").contains("\"1234:1234\""));
        is_good(&made);
        let silent = super::tests::made(&[("Containerfile", "FROM x")]).unwrap();
        assert!(text(&silent, "compose.yaml").contains("settled"));
        assert_eq!(silent.to_do.len(), 1);
        is_good(&silent);
        assert!(super::tests::made(&[("notes.txt", "")]).is_none());
    }
}
