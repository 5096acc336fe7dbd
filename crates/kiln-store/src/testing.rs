//! What several test modules share.

/// Says that a test did not run; in strict runs (CI) that is a failure.
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var_os("KILN_TEST_STRICT").is_none_or(|v| v != "1"),
        "would be skipped: {why}"
    );
    #[allow(clippy::print_stderr, reason = "a skipped test says so")]
    {
        eprintln!("SKIPPED: {why}");
    }
}
