//! Containerfiles: the parser, the lint rules and the evaluation of every stage.
#![no_main]

use std::collections::BTreeMap;

use kiln_build::containerfile::{Kind, parse, parse_trigger};
use kiln_build::context::ignore::Patterns;
use kiln_build::evaluate::{Start, evaluate};
use kiln_build::graph::{self, Ask, Triggers};
use kiln_build::lint::{Around, Directive, lint};
use kiln_model::ImageConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = parse(data) else { return };
    let args = BTreeMap::new();
    let around = Around {
        args: &args,
        contexts: &[],
        ignored: &Patterns::default(),
        pinned: &|_| false,
    };
    let text = String::from_utf8_lossy(data);
    lint(&text, &file, &around, &Directive::default());
    let ask = Ask {
        args: &args,
        target: None,
        platform: "linux/amd64",
        host: "linux/amd64",
        contexts: &[],
    };
    let graph = graph::resolve(&file, &ask, &Triggers::new());
    let globals = graph.map(|graph| graph.globals).unwrap_or_default();
    for (index, stage) in file.stages.iter().enumerate() {
        let start = Start {
            config: ImageConfig::default(),
            author: None,
            args: BTreeMap::new(),
            given: &args,
            globals: &globals,
            triggers: &[],
        };
        let _ = evaluate(&file, index, start);
        for instruction in &stage.instructions {
            if let Kind::Onbuild(text, _) = &instruction.kind {
                let _ = parse_trigger(text, instruction.span);
            }
        }
    }
});
