//! `x-kiln.image` as what a Containerfile of the same meaning would be read as: one stage
//! whose texts are meant as they stand.

use kiln_model::spec::{DeclaredImage, ExposedPort, Protocol};

use crate::containerfile::expand::literal;
use crate::containerfile::{
    CommandLine, Containerfile, Declared, Instruction, Kind, Pair, Span, Stage,
};

const ESCAPE: char = '\\';

pub(super) fn containerfile(image: &DeclaredImage) -> Containerfile {
    let span = Span {
        start: image.place.line,
        end: image.place.line,
    };
    let base = image.base.as_deref().unwrap_or("scratch");
    let instructions = kinds(image).into_iter().map(|kind| Instruction {
        span,
        text: text(&kind),
        kind,
    });
    Containerfile {
        syntax: None,
        check: None,
        escape: ESCAPE,
        global_args: Vec::new(),
        stages: vec![Stage {
            span,
            text: format!("FROM {base}"),
            base: meant(base),
            name: None,
            platform: None,
            instructions: instructions.collect(),
        }],
        warnings: Vec::new(),
    }
}

fn meant(text: &str) -> String {
    literal(text, ESCAPE)
}

fn kinds(image: &DeclaredImage) -> Vec<Kind> {
    let mut kinds = Vec::new();
    let put = Declared {
        groups: image.groups.clone(),
        users: image.users.clone(),
        entries: image.entries.clone(),
    };
    kinds.extend((!put.is_empty()).then(|| Kind::Declared(Box::new(put))));
    let pairs = |of: &std::collections::BTreeMap<String, String>| -> Vec<Pair> {
        let pair = |(key, value): (&String, &String)| Pair {
            key: meant(key),
            value: meant(value),
        };
        of.iter().map(pair).collect()
    };
    kinds.extend((!image.env.is_empty()).then(|| Kind::Env(pairs(&image.env))));
    kinds.extend((!image.labels.is_empty()).then(|| Kind::Label(pairs(&image.labels))));
    // A folder that is missing belongs to who works in it.
    kinds.extend(image.user.as_deref().map(meant).map(Kind::User));
    kinds.extend(image.working_dir.as_deref().map(meant).map(Kind::Workdir));
    let ports: Vec<String> = image.exposed.iter().map(port).collect();
    kinds.extend((!ports.is_empty()).then_some(Kind::Expose(ports)));
    kinds.extend(
        image
            .stop_signal
            .as_deref()
            .map(meant)
            .map(Kind::StopSignal),
    );
    let command = |words: &Vec<String>| CommandLine::Exec(words.clone());
    kinds.extend(image.entrypoint.as_ref().map(command).map(Kind::Entrypoint));
    kinds.extend(image.cmd.as_ref().map(command).map(Kind::Cmd));
    kinds
}

fn port(port: &ExposedPort) -> String {
    match port.protocol {
        Protocol::Tcp => format!("{}/tcp", port.port),
        Protocol::Udp => format!("{}/udp", port.port),
    }
}

/// For people, and to know an instruction again.
fn text(kind: &Kind) -> String {
    match kind {
        Kind::Declared(declared) => declared.to_string(),
        Kind::Workdir(path) => format!("WORKDIR {path}"),
        kind => kind.name().to_owned(),
    }
}
