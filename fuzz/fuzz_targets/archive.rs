//! Archives that ADD unpacks: every compression, and tar within.
#![no_main]

use std::io::{self, Read};

use kiln_build::copy::archive;
use kiln_model::Digest;
use libfuzzer_sys::fuzz_target;

/// What is unpacked of one input; the rest counts as a broken archive.
const MOST: u64 = 16 << 20;

fuzz_target!(|data: &[u8]| {
    let mut left = MOST;
    let mut sink = |content: &mut dyn Read, _| {
        let count = io::copy(&mut content.take(left + 1), &mut io::sink())?;
        left = left
            .checked_sub(count)
            .ok_or_else(|| io::Error::other("too much"))?;
        Ok((Digest::of(""), count))
    };
    let _ = archive::read(data, &mut sink);
});
