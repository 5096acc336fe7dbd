//! The names of one network, and the answers to questions about them. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use kiln_model::route::{self, NetworkNames};

use crate::limits::DNS_TTL;

/// How many aliases may lead to a name.
const ALIASES: usize = 8;

#[derive(Debug, Default)]
pub(crate) struct Zone {
    /// Lower case, without the last dot.
    names: BTreeMap<String, Vec<Ipv4Addr>>,
    /// The name each service address has when asked for.
    reverse: HashMap<Ipv4Addr, String>,
}

impl Zone {
    /// Names also resolve with the network's name behind them, as with Docker.
    pub(crate) fn add(&mut self, network: &NetworkNames) {
        for name in network.names.keys() {
            let addresses = resolve(&network.names, name);
            let lower = name.to_ascii_lowercase();
            let qualified = format!("{lower}.{}", network.network.to_ascii_lowercase());
            for name in [lower, qualified] {
                let known = self.names.entry(name).or_default();
                known.extend(&addresses);
                known.sort_unstable();
                known.dedup();
            }
        }
        for (address, service) in &network.addresses {
            self.reverse.insert(*address, service.to_string());
        }
    }

    /// The answer to `query` if it is about a name of this network, or if it is a
    /// question that is not to be forwarded.
    pub(crate) fn answer(&self, query: &Message) -> Option<Message> {
        let [question] = query.queries.as_slice() else {
            return Some(response(query, ResponseCode::FormErr));
        };
        if query.op_code != OpCode::Query {
            return Some(response(query, ResponseCode::NotImp));
        }
        if question.query_class() != DNSClass::IN {
            return None;
        }
        let records = match question.query_type() {
            RecordType::PTR => vec![self.pointer(question.name())?],
            kind => self.records(question, kind)?,
        };
        let mut answer = response(query, ResponseCode::NoError);
        answer.metadata.authoritative = true;
        answer.add_answers(records);
        Some(answer)
    }

    /// Known names have addresses of IPv4 and nothing else: no records of another kind,
    /// rather than "no such name", which some resolvers would take for the whole name.
    fn records(&self, question: &Query, kind: RecordType) -> Option<Vec<Record>> {
        let addresses = self.names.get(&key(question.name()))?;
        if !matches!(kind, RecordType::A | RecordType::ANY) {
            return Some(Vec::new());
        }
        let record = |address: &Ipv4Addr| {
            Record::from_rdata(question.name().clone(), DNS_TTL, RData::A(A(*address)))
        };
        Some(addresses.iter().map(record).collect())
    }

    fn pointer(&self, name: &Name) -> Option<Record> {
        let net = name.parse_arpa_name().ok()?;
        let IpAddr::V4(address) = net.addr() else {
            return None;
        };
        if net.prefix_len() != 32 {
            return None;
        }
        let target = self.reverse.get(&address)?;
        let target = Name::from_ascii(format!("{target}.")).ok()?;
        Some(Record::from_rdata(
            name.clone(),
            DNS_TTL,
            RData::PTR(PTR(target)),
        ))
    }
}

/// Follows aliases to addresses.
fn resolve(names: &BTreeMap<String, route::Name>, name: &str) -> Vec<Ipv4Addr> {
    let mut name = name;
    for _ in 0..ALIASES {
        match names.get(name) {
            Some(route::Name::Addresses(addresses)) => return addresses.clone(),
            Some(route::Name::Alias(target)) => name = target,
            None => break,
        }
    }
    Vec::new()
}

fn key(name: &Name) -> String {
    let mut text = name.to_ascii().to_ascii_lowercase();
    if text.ends_with('.') {
        text.pop();
    }
    text
}

/// An answer without records.
pub(crate) fn response(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::new(query.id, MessageType::Response, query.op_code);
    answer.metadata.response_code = code;
    answer.metadata.recursion_desired = query.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_queries(query.queries.iter().cloned());
    answer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    const WEB: Ipv4Addr = Ipv4Addr::new(10, 1, 128, 2);

    fn zone() -> Zone {
        let network = NetworkNames {
            network: "Shop_default".into(),
            gateway: Ipv4Addr::new(10, 1, 0, 1),
            names: [
                ("web".to_owned(), route::Name::Addresses(vec![WEB])),
                ("www".to_owned(), route::Name::Alias("web".into())),
                ("loop".to_owned(), route::Name::Alias("loop".into())),
                ("my_app.x".to_owned(), route::Name::Alias("www".into())),
            ]
            .into(),
            addresses: [(WEB, "web".parse().unwrap())].into(),
            also: BTreeMap::new(),
            backends: BTreeMap::new(),
        };
        let mut zone = Zone::default();
        zone.add(&network);
        zone
    }

    fn ask(name: &str, kind: RecordType) -> Option<Message> {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        // As on the wire.
        let query = Message::from_vec(&query.to_vec().unwrap()).unwrap();
        let answer = zone().answer(&query)?;
        assert_eq!(answer.id, query.id);
        assert_eq!(answer.queries, query.queries);
        Some(answer)
    }

    #[test]
    fn names_resolve_in_any_case_with_or_without_the_last_dot() {
        for name in ["web", "WEB.", "www", "my_app.x", "Web.Shop_Default."] {
            let answer = ask(name, RecordType::A).unwrap();
            assert_eq!(answer.response_code, ResponseCode::NoError);
            assert_eq!(answer.answers.len(), 1, "{name}");
            assert_eq!(answer.answers[0].data, RData::A(A(WEB)));
            assert_eq!(answer.answers[0].ttl, DNS_TTL);
        }
    }

    #[test]
    fn a_known_name_has_no_address_of_ipv6_but_exists() {
        for kind in [RecordType::AAAA, RecordType::MX, RecordType::TXT] {
            let answer = ask("web", kind).unwrap();
            assert_eq!(answer.response_code, ResponseCode::NoError);
            assert!(answer.answers.is_empty());
        }
    }

    #[test]
    fn a_loop_of_aliases_ends() {
        assert!(ask("loop", RecordType::A).unwrap().answers.is_empty());
    }

    #[test]
    fn service_addresses_have_names() {
        let answer = ask("2.128.1.10.in-addr.arpa.", RecordType::PTR).unwrap();
        let RData::PTR(name) = &answer.answers[0].data else {
            panic!("{answer:?}");
        };
        assert_eq!(name.0.to_ascii(), "web.");
        assert!(ask("3.128.1.10.in-addr.arpa.", RecordType::PTR).is_none());
        assert!(ask("128.1.10.in-addr.arpa.", RecordType::PTR).is_none());
    }

    #[test]
    fn other_names_are_left_to_others() {
        assert!(ask("example.org.", RecordType::A).is_none());
        assert!(ask("web.example.org.", RecordType::A).is_none());
    }

    #[test]
    fn odd_questions_are_refused() {
        let mut query = Message::query();
        assert_eq!(
            zone().answer(&query).unwrap().response_code,
            ResponseCode::FormErr
        );
        query.metadata.op_code = OpCode::Update;
        query.add_query(Query::query(
            Name::from_ascii("web").unwrap(),
            RecordType::A,
        ));
        assert_eq!(
            zone().answer(&query).unwrap().response_code,
            ResponseCode::NotImp
        );
    }
}
