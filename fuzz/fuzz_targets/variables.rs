//! Variables in texts, and .env files that define them.
#![no_main]

use std::collections::BTreeMap;

use kiln_compose::{Environment, LoadOptions, dotenv, resolve};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (file, text) = match data.iter().position(|byte| *byte == 0xff) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (&[][..], data),
    };
    let mut environment: Environment = BTreeMap::new();
    let _ = dotenv::parse(file, &mut environment, &|_| None);
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    // Quoted, so that all of it is one value.
    let text = text.replace('\'', "''");
    let compose = format!("services: {{a: {{image: x, hostname: '{text}'}}}}");
    let options = LoadOptions {
        files: vec!["/fuzz/compose.yaml".into()],
        folder: "/fuzz".into(),
        environment,
        ..LoadOptions::default()
    };
    let _ = resolve(&options, &|_: &std::path::Path| Ok(compose.clone().into_bytes()));
});
