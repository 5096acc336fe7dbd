//! Which stages of a Containerfile are built, in which order, and what each takes from
//! where. Pure: names in, indexes out.

use std::collections::BTreeMap;

use crate::containerfile::expand::{ExpandError, Lexer};
use crate::containerfile::{Arg, Containerfile, Instruction, Kind, Span, mount};

/// Where files or a base come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nothing: an empty root.
    Scratch,
    /// An earlier stage, by its place in the file.
    Stage(usize),
    /// A named context of the request.
    Named(String),
    /// A base's name or an image reference.
    Image(String),
}

/// One stage that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    /// Its place in the file.
    pub index: usize,
    pub base: Origin,
    /// What it is built for: said, or its base stage's, or the target's.
    pub platform: String,
    /// What the base's ONBUILD has this stage begin with.
    pub triggers: Vec<Instruction>,
}

/// An image for one platform.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    /// As FROM or `--from` has it.
    pub reference: String,
    pub platform: String,
}

/// ONBUILD instructions of images, by what stages are built FROM.
pub type Triggers = BTreeMap<Wanted, Vec<Instruction>>;

/// What is built, in order; the last one is the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    pub stages: Vec<Needed>,
    /// `ARG`s before the first FROM and the predefined ones, with their values.
    pub globals: BTreeMap<String, String>,
}

/// Why there is nothing to build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    #[error("{span}: in `{text}`: {cause}")]
    Expansion {
        span: Span,
        text: String,
        cause: ExpandError,
    },
    #[error("{span}: FROM {text}: the image's name is empty once its variables are filled in")]
    NoBase { span: Span, text: String },
    #[error("{span}: --platform={text}: {cause}")]
    Platform {
        span: Span,
        text: String,
        cause: UnknownPlatform,
    },
    #[error(
        "{span}: `{name}` is a stage that comes later in the file; only earlier ones can be used"
    )]
    Later { span: Span, name: String },
    #[error("{span}: --from can't hold a variable (`{text}`); name a stage FROM it instead")]
    VariableFrom { span: Span, text: String },
    #[error("{span}: there is no stage {index}")]
    NoIndex { span: Span, index: usize },
    #[error("there is no stage `{name}`{}", known(.stages))]
    NoTarget { name: String, stages: Vec<String> },
}

fn known(stages: &[String]) -> String {
    match stages {
        [] => "; no stage has a name".into(),
        stages => format!("; there are {}", stages.join(", ")),
    }
}

/// What the caller asks for.
pub struct Ask<'a> {
    pub args: &'a BTreeMap<String, String>,
    pub target: Option<&'a str>,
    /// What is built for: `linux/amd64`; as [`platform`] has it.
    pub platform: &'a str,
    /// Of this host.
    pub host: &'a str,
    /// The names of the request's contexts.
    pub contexts: &'a [&'a str],
}

/// Finds the needed stages. `of_images`: as far as images are known.
pub fn resolve(
    file: &Containerfile,
    ask: &Ask<'_>,
    of_images: &Triggers,
) -> Result<Graph, GraphError> {
    let globals = globals(file, ask)?;
    let lexer = Lexer::new(file.escape);
    let mut bases: Vec<(Origin, String)> = Vec::new();
    for (index, stage) in file.stages.iter().enumerate() {
        let expand = |text: &str| {
            lexer
                .word(text, &globals)
                .map_err(|cause| GraphError::Expansion {
                    span: stage.span,
                    text: text.to_owned(),
                    cause,
                })
        };
        let base = expand(&stage.base)?;
        if base.is_empty() {
            return Err(GraphError::NoBase {
                span: stage.span,
                text: stage.base.clone(),
            });
        }
        let said = stage.platform.as_deref().map(expand).transpose()?;
        let said = said.filter(|text| !text.is_empty()).map(|text| {
            platform(&text).map_err(|cause| GraphError::Platform {
                span: stage.span,
                text,
                cause,
            })
        });
        let named = stage.name.as_deref().filter(|n| ask.contexts.contains(n));
        let origin = match named {
            Some(name) => Origin::Named(name.to_owned()),
            None if base == "scratch" => Origin::Scratch,
            None => by_name(file, ask, index, &base, stage.span, false)?,
        };
        let said = said.transpose()?;
        let platform = match &origin {
            // Its files are what they are.
            Origin::Stage(earlier) => bases[*earlier].1.clone(),
            _ => said.unwrap_or_else(|| ask.platform.to_owned()),
        };
        bases.push((origin, platform));
    }
    let target = target(file, ask)?;
    let all: Vec<Needed> = bases
        .into_iter()
        .enumerate()
        .map(|(index, (base, platform))| Needed {
            index,
            triggers: triggers(file, &base, &platform, of_images),
            base,
            platform,
        })
        .collect();
    let needed = order(file, ask, &all, target)?;
    let stages = all
        .into_iter()
        .filter(|stage| needed.contains(&stage.index))
        .collect();
    Ok(Graph { stages, globals })
}

fn triggers(
    file: &Containerfile,
    base: &Origin,
    platform: &str,
    of_images: &Triggers,
) -> Vec<Instruction> {
    match base {
        Origin::Scratch => Vec::new(),
        Origin::Image(name) | Origin::Named(name) => {
            let wanted = Wanted {
                reference: name.clone(),
                platform: platform.to_owned(),
            };
            of_images.get(&wanted).cloned().unwrap_or_default()
        }
        Origin::Stage(index) => file.stages[*index]
            .instructions
            .iter()
            .filter_map(|instruction| match &instruction.kind {
                Kind::Onbuild(_, inner) => Some((**inner).clone()),
                _ => None,
            })
            .collect(),
    }
}

/// Every `--from` of an instruction, as written.
pub fn froms(instruction: &Instruction) -> Vec<String> {
    match &instruction.kind {
        Kind::Copy(copy) | Kind::Add(copy) => copy.from.iter().cloned().collect(),
        Kind::Run(run) => run.mounts.iter().filter_map(|m| mount::from(m)).collect(),
        _ => Vec::new(),
    }
}

fn globals(file: &Containerfile, ask: &Ask<'_>) -> Result<BTreeMap<String, String>, GraphError> {
    let mut globals = BTreeMap::new();
    for (side, platform) in [("TARGET", ask.platform), ("BUILD", ask.host)] {
        let mut parts = platform.splitn(3, '/');
        let [os, arch, variant] = [(); 3].map(|()| parts.next().unwrap_or_default());
        for (name, value) in [
            ("PLATFORM", platform),
            ("OS", os),
            ("ARCH", arch),
            ("VARIANT", variant),
        ] {
            globals.insert(format!("{side}{name}"), value.to_owned());
        }
    }
    let last = file.stages.last().and_then(|s| s.name.as_deref());
    let stage = ask.target.or(last).unwrap_or("default");
    globals.insert("TARGETSTAGE".into(), stage.to_owned());
    for (name, value) in &mut globals {
        if let Some(given) = ask.args.get(name) {
            value.clone_from(given);
        }
    }
    let lexer = Lexer::new(file.escape);
    for instruction in &file.global_args {
        let Kind::Arg(args) = &instruction.kind else {
            continue;
        };
        for Arg { name, default } in args {
            let value = match (ask.args.get(name), default) {
                (Some(given), _) => given.clone(),
                (None, Some(text)) => {
                    lexer
                        .word(text, &globals)
                        .map_err(|cause| GraphError::Expansion {
                            span: instruction.span,
                            text: text.clone(),
                            cause,
                        })?
                }
                (None, None) => continue,
            };
            globals.insert(name.clone(), value);
        }
    }
    Ok(globals)
}

/// No platform that images are built for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no platform that kiln builds for (like linux/amd64, linux/arm64, linux/arm/v7)")]
pub struct UnknownPlatform(pub String);

/// A platform in its one normal form, as containerd has it: `arm64`, `linux/aarch64` and
/// `linux/arm64/v8` are `linux/arm64`; `linux/arm` is `linux/arm/v7`.
pub fn platform(text: &str) -> Result<String, UnknownPlatform> {
    let unknown = || UnknownPlatform(text.to_owned());
    let lower = text.trim().to_ascii_lowercase();
    let rest = match lower.split_once('/') {
        Some(("linux", rest)) => rest,
        Some((_, variant)) if variant.starts_with('v') => &lower,
        None => &lower,
        Some(_) => return Err(unknown()),
    };
    let (arch, variant) = rest.split_once('/').unwrap_or((rest, ""));
    let arch = match arch {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "i386" | "i686" => "386",
        "armhf" => "arm",
        known => known,
    };
    const KNOWN: [&str; 8] = [
        "amd64", "arm64", "arm", "386", "riscv64", "s390x", "ppc64le", "loong64",
    ];
    let number = variant
        .strip_prefix('v')
        .is_some_and(|n| n.parse::<u8>().is_ok());
    if !KNOWN.contains(&arch) || !(variant.is_empty() || number) {
        return Err(unknown());
    }
    Ok(match (arch, variant) {
        ("arm", "") => "linux/arm/v7".into(),
        ("amd64", "v1") | ("arm64", "v8") | (_, "") => format!("linux/{arch}"),
        _ => format!("linux/{arch}/{variant}"),
    })
}

/// What a FROM or --from of the stage at `index` means.
fn by_name(
    file: &Containerfile,
    ask: &Ask<'_>,
    index: usize,
    name: &str,
    span: Span,
    numbers: bool,
) -> Result<Origin, GraphError> {
    if let (true, Ok(number)) = (numbers, name.parse::<usize>()) {
        return match number {
            n if n < index => Ok(Origin::Stage(n)),
            n if n < file.stages.len() => Err(GraphError::Later {
                span,
                name: name.to_owned(),
            }),
            index => Err(GraphError::NoIndex { span, index }),
        };
    }
    if ask.contexts.contains(&name) {
        return Ok(Origin::Named(name.to_owned()));
    }
    let lower = name.to_ascii_lowercase();
    let is = |stage: &crate::containerfile::Stage| stage.name.as_deref() == Some(&lower);
    // A name that is given twice means the nearest one before.
    if let Some(found) = file.stages[..index].iter().rposition(is) {
        return Ok(Origin::Stage(found));
    }
    if numbers && file.stages[index..].iter().any(is) {
        return Err(GraphError::Later {
            span,
            name: name.to_owned(),
        });
    }
    Ok(Origin::Image(name.to_owned()))
}

/// What `COPY --from` or `--mount from=` means within the stage at `index`.
pub fn from(
    file: &Containerfile,
    ask: &Ask<'_>,
    index: usize,
    text: &str,
    span: Span,
) -> Result<Origin, GraphError> {
    if text.contains('$') {
        return Err(GraphError::VariableFrom {
            span,
            text: text.to_owned(),
        });
    }
    match text {
        "scratch" => Ok(Origin::Scratch),
        _ => by_name(file, ask, index, text, span, true),
    }
}

fn target(file: &Containerfile, ask: &Ask<'_>) -> Result<usize, GraphError> {
    let last = file.stages.len().saturating_sub(1);
    let Some(name) = ask.target.filter(|t| !t.is_empty()) else {
        return Ok(last);
    };
    let lower = name.to_ascii_lowercase();
    let found = file
        .stages
        .iter()
        .rposition(|s| s.name.as_deref() == Some(&lower));
    found.ok_or_else(|| GraphError::NoTarget {
        name: name.to_owned(),
        stages: file.stages.iter().filter_map(|s| s.name.clone()).collect(),
    })
}

/// The target and all it needs, in the file's order: what is needed always stands
/// before what needs it.
fn order(
    file: &Containerfile,
    ask: &Ask<'_>,
    all: &[Needed],
    target: usize,
) -> Result<Vec<usize>, GraphError> {
    let mut needed = vec![false; file.stages.len()];
    needed[target] = true;
    // Also what isn't needed is looked at: its mistakes are told all the same.
    for index in (0..file.stages.len()).rev() {
        let stage = &file.stages[index];
        let replaced = |name: &str| ask.contexts.contains(&name);
        if stage.name.as_deref().is_some_and(replaced) {
            // The context stands for the whole stage.
            continue;
        }
        let mut takes = vec![all[index].base.clone()];
        for instruction in all[index].triggers.iter().chain(&stage.instructions) {
            for text in froms(instruction) {
                takes.push(from(file, ask, index, &text, instruction.span)?);
            }
        }
        for origin in takes {
            if let (true, Origin::Stage(earlier)) = (needed[index], origin) {
                needed[earlier] = true;
            }
        }
    }
    Ok((0..=target).filter(|i| needed[*i]).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::containerfile::parse;

    fn graph(text: &str, args: &[(&str, &str)], target: Option<&str>) -> Result<Graph, GraphError> {
        let args = args
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let ask = Ask {
            args: &args,
            target,
            platform: "linux/arm64",
            host: "linux/amd64",
            contexts: &["extra"],
        };
        resolve(&parse(text.as_bytes()).unwrap(), &ask, &Triggers::new())
    }

    fn indexes(graph: &Graph) -> Vec<usize> {
        graph.stages.iter().map(|s| s.index).collect()
    }

    #[test]
    fn only_what_the_target_needs_is_built() {
        let text = "FROM a AS one\nFROM b AS two\nCOPY --from=one x y\nFROM c AS three\n\
                    FROM two AS four\nRUN --mount=from=extra,target=/x true\nFROM d\nCOPY --from=3 a b";
        assert_eq!(indexes(&graph(text, &[], None).unwrap()), [0, 1, 3, 4]);
        assert_eq!(indexes(&graph(text, &[], Some("THREE")).unwrap()), [2]);
        assert_eq!(indexes(&graph(text, &[], Some("1")).unwrap()), [0, 1]);
        let told = graph(text, &[], Some("five")).unwrap_err().to_string();
        assert_eq!(
            told,
            "there is no stage `five`; there are one, two, three, four"
        );
    }

    #[test]
    fn what_a_trigger_takes_is_needed_too() {
        let text = "FROM a AS tools\nFROM b AS base\nONBUILD COPY --from=tools x y\nFROM base";
        let graph = graph(text, &[], None).unwrap();
        assert_eq!(indexes(&graph), [0, 1, 2]);
        assert_eq!(graph.stages[2].triggers.len(), 1);
        assert!(
            graph.stages[1].triggers.is_empty(),
            "not in the stage itself"
        );
    }

    #[test]
    fn bases_are_stages_contexts_images_or_nothing() {
        let text = "ARG V=1\nARG N=img:$V\nFROM $N\nFROM scratch AS s\nFROM S\nFROM extra\n\
                    COPY --from=extra a b\nCOPY --from=s a b\nCOPY --from=0 a b\nCOPY --from=2 a b";
        let graph = graph(text, &[("V", "2")], None).unwrap();
        let bases: Vec<_> = graph.stages.iter().map(|s| s.base.clone()).collect();
        let expected = [
            Origin::Image("img:2".into()),
            Origin::Scratch,
            Origin::Stage(1),
            Origin::Named("extra".into()),
        ];
        assert_eq!(bases, expected);
        assert_eq!(graph.globals["TARGETARCH"], "arm64");
        assert_eq!(graph.globals["BUILDPLATFORM"], "linux/amd64");
    }

    #[test]
    fn a_stage_is_for_what_it_says_or_its_base_is_for_or_the_target_is() {
        let text = "FROM --platform=$BUILDPLATFORM a AS tools\nFROM tools AS more\n\
                    FROM --platform=linux/s390x tools\nFROM scratch AS out\nFROM --platform=arm b\n\
                    FROM out\nCOPY --from=tools a b\nCOPY --from=1 a b\nCOPY --from=2 a b\n\
                    COPY --from=4 a b";
        let graph = graph(text, &[], None).unwrap();
        let platforms: Vec<&str> = graph.stages.iter().map(|s| s.platform.as_str()).collect();
        let (here, target) = ("linux/amd64", "linux/arm64");
        assert_eq!(
            platforms,
            [here, here, here, target, "linux/arm/v7", target]
        );
    }

    #[test]
    fn platforms_have_one_normal_form() {
        for (text, normal) in [
            ("linux/amd64", "linux/amd64"),
            ("LINUX/x86_64", "linux/amd64"),
            ("arm64", "linux/arm64"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("arm/v6", "linux/arm/v6"),
            ("linux/arm", "linux/arm/v7"),
            ("armhf", "linux/arm/v7"),
        ] {
            assert_eq!(platform(text).as_deref(), Ok(normal), "{text}");
        }
        for text in [
            "",
            "linux",
            "windows/amd64",
            "linux/vax",
            "linux/arm/7",
            "a/b/c/d",
            "/",
        ] {
            assert!(platform(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_told_with_its_line() {
        for (text, expected) in [
            (
                "ARG E\nFROM $E",
                "line 2: FROM $E: the image's name is empty",
            ),
            (
                "FROM a\nCOPY --from=b x y\nFROM a AS b",
                "line 2: `b` is a stage that comes later",
            ),
            (
                "FROM a AS b\nCOPY --from=b x y",
                "line 2: `b` is a stage that comes later",
            ),
            (
                "FROM a\nCOPY --from=$x y z",
                "line 2: --from can't hold a variable",
            ),
            ("FROM a\nCOPY --from=7 y z", "line 2: there is no stage 7"),
            (
                "FROM --platform=windows/amd64 a",
                "line 1: --platform=windows/amd64: `windows/amd64` is no platform",
            ),
            ("FROM ${a", "line 1: in `${a`"),
        ] {
            let told = graph(text, &[], None).unwrap_err().to_string();
            assert!(told.starts_with(expected), "{told}");
        }
        assert!(graph("FROM a AS b\nFROM b AS b", &[], None).is_ok());
    }
}
