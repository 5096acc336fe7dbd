//! Layers as registries and archives bring them: compression, tar, extension headers.
#![no_main]

use std::io::Read;

use kiln_oci::layer::{LayerReader, Limits, Whiteouts};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let limits = Limits {
        entries: 1_000,
        bytes: 16 << 20,
    };
    let Ok(mut reader) = LayerReader::new(data, limits, Whiteouts::Interpret) else {
        return;
    };
    let mut buffer = [0; 4096];
    while let Ok(Some(_)) = reader.next_entry() {
        while reader.read(&mut buffer).is_ok_and(|count| count > 0) {}
    }
});
