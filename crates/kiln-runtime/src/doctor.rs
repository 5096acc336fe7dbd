//! Facts about this machine that instances depend on.
