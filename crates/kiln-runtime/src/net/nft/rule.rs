//! Rules: matches, then one verdict or translation. A chain of methods reads like
//! the rule in nft's own language.

use std::net::Ipv4Addr;

use kiln_model::network::Subnet;

use super::wire::Attributes;

// enum nft_registers: one 16-byte register is enough; each match loads and compares.
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;

// enum nft_meta_keys
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_L4PROTO: u32 = 16;
// enum nft_ct_keys
const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
// nf_conntrack_common.h: NF_CT_STATE_BIT of IP_CT_ESTABLISHED and IP_CT_RELATED; IPS_DST_NAT
const STATE_ESTABLISHED_OR_RELATED: u32 = 0b110;
const STATUS_DNAT: u32 = 1 << 5;
// enum nft_dynset_ops
const SET_ADD: u32 = 0;
/// The first of the 4-byte registers that lie where [`REGISTER`] does (`NFT_REG32_00`).
const FIRST_PART: u32 = 8;
// enum nft_cmp_ops
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
// enum nft_payload_bases
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
// RFC 791 and RFC 9293
const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;
const DESTINATION_PORT_OFFSET: u32 = 2;
// netfilter.h
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
// enum nft_reject_types; RFC 792: port unreachable
const REJECT_WITH_ICMP: u32 = 0;
const PORT_UNREACHABLE: u8 = 3;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const INTERFACE_FIELD_BYTES: usize = 16;
/// A comment is shown by `nft list`; the format's length is one byte.
const COMMENT_BYTES: usize = 128;

/// A rule under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    expressions: Attributes,
    comment: String,
}

impl Rule {
    /// `comment`: what it is for, shown by `nft list ruleset`; cut to its bound.
    pub fn new(comment: &str) -> Self {
        Self {
            expressions: Attributes::default(),
            comment: comment.to_owned(),
        }
    }

    pub fn in_by(self, interface: &str) -> Self {
        self.meta(META_IIFNAME)
            .compare(EQUAL, &interface_field(interface))
    }

    pub fn in_not_by(self, interface: &str) -> Self {
        self.meta(META_IIFNAME)
            .compare(NOT_EQUAL, &interface_field(interface))
    }

    pub fn out_by(self, interface: &str) -> Self {
        self.meta(META_OIFNAME)
            .compare(EQUAL, &interface_field(interface))
    }

    pub fn out_not_by(self, interface: &str) -> Self {
        self.meta(META_OIFNAME)
            .compare(NOT_EQUAL, &interface_field(interface))
    }

    pub fn from(self, subnet: &Subnet) -> Self {
        self.address(SOURCE_OFFSET, subnet, EQUAL)
    }

    pub fn not_from(self, subnet: &Subnet) -> Self {
        self.address(SOURCE_OFFSET, subnet, NOT_EQUAL)
    }

    pub fn to(self, subnet: &Subnet) -> Self {
        self.address(DESTINATION_OFFSET, subnet, EQUAL)
    }

    pub fn for_address(self, address: Ipv4Addr) -> Self {
        self.payload(NETWORK_HEADER, DESTINATION_OFFSET, 4)
            .compare(EQUAL, &address.octets())
    }

    pub fn tcp(self) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[TCP])
    }

    pub fn udp(self) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[UDP])
    }

    pub fn icmp(self) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[ICMP])
    }

    /// After [`Rule::tcp`] or [`Rule::udp`].
    pub fn for_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, DESTINATION_PORT_OFFSET, 2)
            .compare(EQUAL, &port.to_be_bytes())
    }

    /// Belongs to a connection that was let through before.
    pub fn established(self) -> Self {
        self.conntrack(CT_STATE, STATE_ESTABLISHED_OR_RELATED)
    }

    /// The connection's destination was translated (redirected).
    pub fn redirected(self) -> Self {
        self.conntrack(CT_STATUS, STATUS_DNAT)
    }

    pub fn accept(self) -> Self {
        self.verdict(NF_ACCEPT)
    }

    pub fn drop(self) -> Self {
        self.verdict(NF_DROP)
    }

    /// Answers "port unreachable", so that a client fails at once.
    pub fn reject(self) -> Self {
        let data = Attributes::default()
            .number(1, REJECT_WITH_ICMP)
            .bytes(2, &[PORT_UNREACHABLE]);
        self.expression("reject", data)
    }

    /// To this port of the host itself.
    pub fn redirect(self, port: u16) -> Self {
        let value = Attributes::default().bytes(1, &port.to_be_bytes());
        let load = Attributes::default().number(1, REGISTER).nest(2, value);
        self.expression("immediate", load)
            .expression("redir", Attributes::default().number(1, REGISTER))
    }

    /// Remembers source, destination, protocol and destination port in a set of the table
    /// ([`super::Set`]); a full set is left as it is.
    pub fn remember(self, set: &str, id: u32) -> Self {
        let load = |rule: Self, part: u32, base: u32, offset: u32, length: u32| {
            let data = Attributes::default()
                .number(1, FIRST_PART + part)
                .number(2, base)
                .number(3, offset)
                .number(4, length);
            rule.expression("payload", data)
        };
        let rule = load(self, 0, NETWORK_HEADER, SOURCE_OFFSET, 4);
        let rule = load(rule, 1, NETWORK_HEADER, DESTINATION_OFFSET, 4);
        let protocol = Attributes::default()
            .number(1, FIRST_PART + 2)
            .number(2, META_L4PROTO);
        let rule = rule.expression("meta", protocol);
        let rule = load(rule, 3, TRANSPORT_HEADER, DESTINATION_PORT_OFFSET, 2);
        let add = Attributes::default()
            .text(1, set)
            .number(2, id)
            .number(3, SET_ADD)
            .number(4, FIRST_PART);
        rule.expression("dynset", add)
    }

    pub fn masquerade(self) -> Self {
        self.expression("masq", Attributes::default())
    }

    /// NFTA_RULE_EXPRESSIONS' content, and the comment's bytes for NFTA_RULE_USERDATA.
    pub fn parts(&self) -> (Attributes, Vec<u8>) {
        (self.expressions.clone(), comment_bytes(&self.comment))
    }

    fn address(self, offset: u32, subnet: &Subnet, operation: u32) -> Self {
        let mask = u32::MAX << (32 - u32::from(subnet.prefix()));
        self.payload(NETWORK_HEADER, offset, 4)
            .mask(mask.to_be_bytes())
            .compare(operation, &subnet.base().octets())
    }

    fn meta(self, key: u32) -> Self {
        self.expression(
            "meta",
            Attributes::default().number(1, REGISTER).number(2, key),
        )
    }

    fn payload(self, base: u32, offset: u32, length: u32) -> Self {
        let data = Attributes::default()
            .number(1, REGISTER)
            .number(2, base)
            .number(3, offset)
            .number(4, length);
        self.expression("payload", data)
    }

    /// Any of these bits is set (numbers in conntrack are the machine's own).
    fn conntrack(self, key: u32, bits: u32) -> Self {
        self.expression(
            "ct",
            Attributes::default().number(1, REGISTER).number(2, key),
        )
        .mask(bits.to_ne_bytes())
        .compare(NOT_EQUAL, &[0; 4])
    }

    fn mask(self, mask: [u8; 4]) -> Self {
        let data = Attributes::default()
            .number(1, REGISTER)
            .number(2, REGISTER)
            .number(3, mask.len() as u32)
            .nest(4, Attributes::default().bytes(1, &mask))
            .nest(5, Attributes::default().bytes(1, &[0; 4]));
        self.expression("bitwise", data)
    }

    fn compare(self, operation: u32, value: &[u8]) -> Self {
        let data = Attributes::default()
            .number(1, REGISTER)
            .number(2, operation)
            .nest(3, Attributes::default().bytes(1, value));
        self.expression("cmp", data)
    }

    fn verdict(self, code: u32) -> Self {
        let verdict = Attributes::default().number(1, code);
        let data = Attributes::default()
            .number(1, VERDICT_REGISTER)
            .nest(2, Attributes::default().nest(2, verdict));
        self.expression("immediate", data)
    }

    fn expression(mut self, name: &str, data: Attributes) -> Self {
        let expression = Attributes::default().text(1, name).nest(2, data);
        self.expressions = self.expressions.nest(1, expression);
        self
    }
}

fn interface_field(name: &str) -> [u8; INTERFACE_FIELD_BYTES] {
    let mut field = [0; INTERFACE_FIELD_BYTES];
    // The last byte stays an end mark.
    for (to, from) in field
        .iter_mut()
        .take(INTERFACE_FIELD_BYTES - 1)
        .zip(name.bytes())
    {
        *to = from;
    }
    field
}

/// A comment as nft keeps it in user data: type 0, length, text with end mark.
pub fn comment_bytes(comment: &str) -> Vec<u8> {
    let mut end = comment.len().min(COMMENT_BYTES - 1);
    while !comment.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![0, end as u8 + 1];
    bytes.extend(&comment.as_bytes()[..end]);
    bytes.push(0);
    bytes
}
