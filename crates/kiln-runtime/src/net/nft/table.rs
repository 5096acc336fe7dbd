//! A whole IPv4 table, replaced in one transaction, and lists of what there is.

use std::ops::ControlFlow;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};

use super::super::channel::{Channel, NetlinkError};
use super::rule::{Rule, comment_bytes};
use super::wire::{self, Attributes};

// enum nf_tables_msg_types
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const NEWSET: u16 = 9;
const GETSETELEM: u16 = 13;
// enum nft_table_attributes
const TABLE_NAME: u16 = 1;
const TABLE_USERDATA: u16 = 6;
// enum nft_chain_attributes
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
// enum nft_hook_attributes
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
// enum nft_rule_attributes
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
// enum nft_set_attributes, nft_set_desc_attributes
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_ID: u16 = 10;
const SET_DESCRIPTION_SIZE: u16 = 1;
// enum nft_set_flags: rules add to it
const SET_EVAL: u32 = 0x20;
// nft's own names for types, six bits each: IPv4 address, address, protocol, port
const SET_KEY: u32 = (((7 << 6 | 7) << 6) | 12) << 6 | 13;
const SET_KEY_BYTES: u32 = 16;
/// Elements of a set; more are not remembered.
const SET_SIZE: u32 = 16_384;
// enum nft_set_elem_list_attributes and below
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;
// netlink.h; netlink-packet-core names these by other uses
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const POLICY_DROP: u32 = 0;
const POLICY_ACCEPT: u32 = 1;
/// How often a list is asked for again when something changed it meanwhile.
const LIST_TRIES: usize = 8;

/// Where a chain hooks in (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
}

/// A base chain; what no rule decides is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub name: &'static str,
    pub kind: ChainKind,
    pub hook: Hook,
    pub rules: Vec<Rule>,
}

impl Chain {
    /// The usual priorities: dstnat, filter, srcnat (`netfilter_ipv4.h`).
    fn priority(&self) -> i32 {
        match (self.kind, self.hook) {
            (ChainKind::Filter, _) => 0,
            (ChainKind::Nat, Hook::Postrouting | Hook::Input) => 100,
            (ChainKind::Nat, _) => -100,
        }
    }
}

/// A set that rules add connections to ([`Rule::remember`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    pub name: &'static str,
    /// Among the table's sets.
    pub id: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub name: String,
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

impl Table {
    /// Makes the table be exactly this, in one step; the comment is kept with it.
    pub fn replace(&self, channel: &mut Channel, comment: &str) -> Result<(), NetlinkError> {
        let mut batch = Batch::new(channel);
        self.delete_in(&mut batch);
        let table = Attributes::default()
            .text(TABLE_NAME, &self.name)
            .bytes(TABLE_USERDATA, &comment_bytes(comment));
        batch.add(NEWTABLE, NLM_F_CREATE, &table);
        for set in &self.sets {
            let size = Attributes::default().number(SET_DESCRIPTION_SIZE, SET_SIZE);
            let attributes = Attributes::default()
                .text(SET_TABLE, &self.name)
                .text(SET_NAME, set.name)
                .number(SET_FLAGS, SET_EVAL)
                .number(SET_KEY_TYPE, SET_KEY)
                .number(SET_KEY_LENGTH, SET_KEY_BYTES)
                .nest(SET_DESCRIPTION, size)
                .number(SET_ID, set.id);
            batch.add(NEWSET, NLM_F_CREATE, &attributes);
        }
        for chain in &self.chains {
            self.add_chain(&mut batch, chain);
        }
        batch.commit()
    }

    /// Removes the table; it need not be there.
    pub fn remove(&self, channel: &mut Channel) -> Result<(), NetlinkError> {
        let mut batch = Batch::new(channel);
        self.delete_in(&mut batch);
        batch.commit()
    }

    /// Made first, so that removing it can't fail; all in the same transaction.
    fn delete_in(&self, batch: &mut Batch<'_>) {
        let name = Attributes::default().text(TABLE_NAME, &self.name);
        batch.add(NEWTABLE, NLM_F_CREATE, &name);
        batch.add(DELTABLE, 0, &name);
    }

    fn add_chain(&self, batch: &mut Batch<'_>, chain: &Chain) {
        let hook = Attributes::default()
            .number(HOOK_NUMBER, chain.hook as u32)
            .number(HOOK_PRIORITY, chain.priority() as u32);
        let kind = match chain.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        };
        let attributes = Attributes::default()
            .text(CHAIN_TABLE, &self.name)
            .text(CHAIN_NAME, chain.name)
            .nest(CHAIN_HOOK, hook)
            .number(CHAIN_POLICY, POLICY_ACCEPT)
            .text(CHAIN_TYPE, kind);
        batch.add(NEWCHAIN, NLM_F_CREATE, &attributes);
        for rule in &chain.rules {
            let (expressions, comment) = rule.parts();
            let attributes = Attributes::default()
                .text(RULE_TABLE, &self.name)
                .text(RULE_CHAIN, chain.name)
                .nest(RULE_EXPRESSIONS, expressions)
                .bytes(RULE_USERDATA, &comment);
            batch.add(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, &attributes);
        }
    }
}

/// One transaction: everything or nothing.
struct Batch<'a> {
    channel: &'a mut Channel,
    bytes: Vec<u8>,
    /// Where the last message starts.
    last: usize,
}

impl<'a> Batch<'a> {
    fn new(channel: &'a mut Channel) -> Self {
        let bytes = wire::batch_begin(NLM_F_REQUEST, channel.next_sequence());
        Self {
            channel,
            bytes,
            last: 0,
        }
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: &Attributes) {
        let sequence = self.channel.next_sequence();
        self.last = self.bytes.len();
        let flags = NLM_F_REQUEST | flags;
        self.bytes
            .extend(wire::message(kind, flags, sequence, wire::IPV4, attributes));
    }

    /// Errors come for every message that fails; only the last is asked to be
    /// acknowledged, since hundreds of acknowledgements would overflow the socket.
    fn commit(mut self) -> Result<(), NetlinkError> {
        let mut sequence = 0;
        if let Some(header) = self.bytes.get_mut(self.last..self.last + 16) {
            let flags = u16::from_ne_bytes([header[6], header[7]]) | NLM_F_ACK;
            header[6..8].copy_from_slice(&flags.to_ne_bytes());
            sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        }
        let end = wire::batch_end(NLM_F_REQUEST, self.channel.next_sequence());
        self.bytes.extend(end);
        self.channel.send(&self.bytes)?;
        self.channel.receive(|frame| {
            if frame.kind == NLMSG_ERROR && frame.sequence == sequence {
                ControlFlow::Break(Ok(()))
            } else {
                ControlFlow::Continue(())
            }
        })
    }
}

/// The comment of a table of ours; `None`: there is no such table.
pub fn table_comment(channel: &mut Channel, name: &str) -> Result<Option<String>, NetlinkError> {
    let sequence = channel.next_sequence();
    let request = Attributes::default().text(TABLE_NAME, name);
    channel.send(&wire::message(
        GETTABLE,
        NLM_F_REQUEST,
        sequence,
        wire::IPV4,
        &request,
    ))?;
    let comment = channel.receive(|frame| {
        if frame.sequence != sequence {
            return ControlFlow::Continue(());
        }
        let data = wire::attributes_of(frame.payload).find(|(kind, _)| *kind == TABLE_USERDATA);
        // Type and length, then the text.
        let comment = data.and_then(|(_, value)| value.get(2..)).map(wire::text);
        ControlFlow::Break(Ok(Some(comment.unwrap_or_default())))
    });
    match comment {
        Err(e) if e.is(libc::ENOENT) => Ok(None),
        result => result,
    }
}

/// The names of all IPv4 tables.
pub fn table_names(channel: &mut Channel) -> Result<Vec<String>, NetlinkError> {
    let all = Attributes::default();
    list(channel, GETTABLE, wire::IPV4, &all, |payload| {
        let name = wire::attributes_of(payload).find(|(kind, _)| *kind == TABLE_NAME);
        name.map(|(_, value)| wire::text(value))
    })
}

/// What rules have added to a set: the keys' bytes.
pub fn remembered(
    channel: &mut Channel,
    table: &str,
    set: &Set,
) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let request = Attributes::default()
        .text(ELEMENTS_TABLE, table)
        .text(ELEMENTS_SET, set.name);
    let parts = list(channel, GETSETELEM, wire::IPV4, &request, |payload| {
        let elements = wire::attributes_of(payload).find(|(kind, _)| *kind == ELEMENTS)?;
        let keys = wire::attributes(elements.1).filter(|(kind, _)| *kind == ELEMENT);
        let keys = keys.filter_map(|(_, element)| {
            let key = wire::attributes(element).find(|(kind, _)| *kind == ELEMENT_KEY)?;
            let value = wire::attributes(key.1).find(|(kind, _)| *kind == DATA_VALUE)?;
            Some(value.1.to_vec())
        });
        Some(keys.collect::<Vec<_>>())
    })?;
    Ok(parts.into_iter().flatten().collect())
}

/// A base chain of any table, as listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListedChain {
    pub family: u8,
    pub table: String,
    pub name: String,
    hook: Option<u32>,
    pub drops: bool,
}

/// The filter chains of all IPv4 tables (families ip and inet) at `hook`.
pub fn chains_with_hook(
    channel: &mut Channel,
    hook: Hook,
) -> Result<Vec<ListedChain>, NetlinkError> {
    let chains = list(
        channel,
        GETCHAIN,
        wire::ANY_FAMILY,
        &Attributes::default(),
        listed_chain,
    )?;
    // NFPROTO_INET is 1.
    let ipv4 = |c: &ListedChain| c.family == wire::IPV4 || c.family == 1;
    Ok(chains
        .into_iter()
        .filter(|c| c.hook == Some(hook as u32) && ipv4(c))
        .collect())
}

fn listed_chain(payload: &[u8]) -> Option<ListedChain> {
    let mut chain = ListedChain {
        family: wire::family_of(payload),
        ..ListedChain::default()
    };
    for (kind, value) in wire::attributes_of(payload) {
        match kind {
            CHAIN_TABLE => chain.table = wire::text(value),
            CHAIN_NAME => chain.name = wire::text(value),
            CHAIN_POLICY => chain.drops = wire::number(value) == Some(POLICY_DROP),
            CHAIN_HOOK => {
                let hook = wire::attributes(value).find(|(kind, _)| *kind == HOOK_NUMBER);
                chain.hook = hook.and_then(|(_, number)| wire::number(number));
            }
            _ => {}
        }
    }
    Some(chain)
}

/// All rules of a table, each as its expressions' bytes.
pub fn rule_bytes(
    channel: &mut Channel,
    table: &ListedChain,
) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let request = Attributes::default().text(RULE_TABLE, &table.table);
    list(channel, GETRULE, table.family, &request, |payload| {
        let rule = wire::attributes_of(payload).find(|(kind, _)| *kind == RULE_EXPRESSIONS);
        rule.map(|(_, value)| value.to_vec())
    })
}

/// A list that was interrupted by a change (`EINTR`) is asked for again.
fn list<T>(
    channel: &mut Channel,
    kind: u16,
    family: u8,
    request: &Attributes,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<Vec<T>, NetlinkError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let sequence = channel.next_sequence();
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        channel.send(&wire::message(kind, flags, sequence, family, request))?;
        let mut found = Vec::new();
        let listed = channel.receive(|frame| match frame.kind {
            _ if frame.sequence != sequence => ControlFlow::Continue(()),
            NLMSG_DONE | NLMSG_ERROR => ControlFlow::Break(Ok(())),
            _ => {
                found.extend(read(frame.payload));
                ControlFlow::Continue(())
            }
        });
        match listed {
            Ok(()) => return Ok(found),
            Err(e) if e.is(libc::EINTR) && tries < LIST_TRIES => {}
            Err(e) => return Err(e),
        }
    }
}
