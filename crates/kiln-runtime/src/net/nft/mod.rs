//! nf_tables over nfnetlink: just what the firewall and doctor need, without the
//! `nft` program.
//!
//! Numbers and layouts are those of the kernel's `include/uapi/linux/netfilter/`
//! `{nfnetlink,nf_tables}.h`; how expressions are put together is what
//! `nft --debug=netlink` prints for the same rule.
//! - [`wire`]: attributes and messages as bytes, and reading them back;
//! - [`rule`]: rules as lists of expressions;
//! - [`table`]: a whole table, replaced in one transaction; lists of chains.

mod rule;
mod table;
mod wire;

pub(super) use rule::Rule;
pub(super) use table::{
    Chain, ChainKind, Hook, Set, Table, chains_with_hook, remembered, rule_bytes, table_comment,
    table_names,
};
