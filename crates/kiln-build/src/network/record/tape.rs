//! Which exchange answers a request: the recorded ones in their order, the last again and
//! again; new ones are added.

use std::collections::{BTreeMap, BTreeSet};

use super::{Exchange, Recording};

/// More exchanges of one RUN are refused: a lock file is for reading, too.
pub(super) const MAX_EXCHANGES: usize = 50_000;
/// So many things that are not recorded are named.
const MAX_NAMED: usize = 100;

/// What a request is known by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked {
    pub url: String,
    pub method: String,
    /// `range`, `body`, `authorization`, `git-protocol`.
    pub conditions: BTreeMap<String, String>,
    /// Counts where the server says that it varies by it.
    pub accept: String,
}

pub(super) const ACCEPT: &str = "accept";

impl Asked {
    /// Is this the request that was recorded?
    fn is(&self, exchange: &Exchange) -> bool {
        let varies = exchange.request.contains_key(ACCEPT);
        let conditions = self.conditions.len() + usize::from(varies);
        exchange.url == self.url
            && exchange.method == self.method
            && exchange.request.len() == conditions
            && exchange
                .request
                .iter()
                .all(|(name, value)| match name.as_str() {
                    ACCEPT => *value == self.accept,
                    name => self.conditions.get(name) == Some(value),
                })
    }
}

#[derive(Default)]
pub(super) struct Tape {
    known: Vec<Exchange>,
    /// The first of each URL's exchanges in `known`, which is sorted by URL.
    first: BTreeMap<String, usize>,
    /// How many of a request's exchanges were given.
    given: BTreeMap<Asked, usize>,
    /// With the request's place in time.
    learned: BTreeMap<u64, Exchange>,
    next: u64,
    direct: BTreeSet<String>,
}

impl Tape {
    pub fn new(mut known: Vec<Exchange>) -> Self {
        // Stable: what has one URL keeps its order.
        known.sort_by(|a, b| a.url.cmp(&b.url));
        let mut first = BTreeMap::new();
        for (index, exchange) in known.iter().enumerate() {
            first.entry(exchange.url.clone()).or_insert(index);
        }
        Self {
            known,
            first,
            ..Self::default()
        }
    }

    fn of_url(&self, url: &str) -> &[Exchange] {
        let Some(first) = self.first.get(url) else {
            return &[];
        };
        let rest = &self.known[*first..];
        let end = rest.iter().position(|one| one.url != url);
        &rest[..end.unwrap_or(rest.len())]
    }

    /// The recorded answer to a request.
    pub fn play(&mut self, asked: &Asked) -> Option<Exchange> {
        let all: Vec<&Exchange> = self
            .of_url(&asked.url)
            .iter()
            .filter(|e| asked.is(e))
            .collect();
        let given = self.given.get(asked).copied().unwrap_or(0);
        let answer = (*all.get(given).or(all.last())?).clone();
        self.given.insert(asked.clone(), given + 1);
        Some(answer)
    }

    /// A place in time for an exchange that begins now; `None`: there are too many.
    pub fn place(&mut self) -> Option<u64> {
        self.next += 1;
        (self.known.len() + self.learned.len() < MAX_EXCHANGES).then_some(self.next)
    }

    pub fn learn(&mut self, place: u64, exchange: Exchange) {
        self.learned.insert(place, exchange);
    }

    /// Something that is not recorded.
    pub fn note(&mut self, what: String) -> bool {
        self.direct.len() < MAX_NAMED && self.direct.insert(what)
    }

    /// The exchange that led to this URL, which may be valid for a moment only.
    pub fn leads_to(&self, url: &str) -> Option<&Exchange> {
        self.known.iter().find(|exchange| {
            let Some(location) = exchange.headers.get("location") else {
                return false;
            };
            let base = reqwest::Url::parse(&exchange.url);
            location == url || base.is_ok_and(|b| b.join(location).is_ok_and(|l| l.as_str() == url))
        })
    }

    /// All that the RUN is to be given next time: what it was given, what was new, and with
    /// `all` also what it did not ask for this time.
    pub fn recording(&self, all: bool) -> Recording {
        let used = |exchange: &&Exchange| {
            let of_url = |asked: &&Asked| asked.url == exchange.url;
            let from = Asked {
                url: exchange.url.clone(),
                method: String::new(),
                conditions: BTreeMap::new(),
                accept: String::new(),
            };
            let mut given = self.given.range(from..).map(|(asked, _)| asked);
            all || given
                .by_ref()
                .take_while(of_url)
                .any(|asked| asked.is(exchange))
        };
        let known = self.known.iter().filter(used);
        let mut exchanges: Vec<Exchange> = known.chain(self.learned.values()).cloned().collect();
        exchanges.sort_by(|a, b| {
            let key = |e: &Exchange| (e.url.clone(), e.method.clone(), e.request.clone());
            key(a).cmp(&key(b))
        });
        // The last is given again anyway.
        exchanges.dedup();
        Recording {
            exchanges,
            direct: self.direct.iter().cloned().collect(),
            ..Recording::default()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kiln_model::Digest;

    fn asked(url: &str, accept: &str) -> Asked {
        Asked {
            url: url.into(),
            method: "GET".into(),
            conditions: BTreeMap::new(),
            accept: accept.into(),
        }
    }

    fn exchange(url: &str, body: &str, accept: Option<&str>) -> Exchange {
        let accept = accept.map(|value| (ACCEPT.to_owned(), value.to_owned()));
        Exchange {
            method: "GET".into(),
            url: url.into(),
            request: accept.into_iter().collect(),
            status: 200,
            headers: BTreeMap::new(),
            sha256: Digest::of(body),
            size: body.len() as u64,
        }
    }

    #[test]
    fn answers_come_in_their_order_and_the_last_again() {
        let known = vec![
            exchange("b", "1", None),
            exchange("a", "x", None),
            exchange("b", "2", None),
        ];
        let mut tape = Tape::new(known);
        let bodies = ["1", "2", "2"].map(|body| Some(Digest::of(body)));
        let played = [(); 3].map(|()| tape.play(&asked("b", "")).map(|e| e.sha256));
        assert_eq!(played, bodies);
        assert_eq!(tape.play(&asked("c", "")), None);
        let urls = |all| -> Vec<String> {
            let recording = tape.recording(all);
            recording.exchanges.into_iter().map(|e| e.url).collect()
        };
        assert_eq!(urls(false), ["b", "b"], "what nobody asked for goes");
        assert_eq!(urls(true), ["a", "b", "b"]);
    }

    #[test]
    fn accept_counts_where_the_server_varies_by_it_and_conditions_always() {
        let known = vec![
            exchange("a", "json", Some("json")),
            exchange("a", "html", Some("html")),
        ];
        let mut tape = Tape::new(known);
        let html = tape.play(&asked("a", "html")).unwrap();
        assert_eq!(html.sha256, Digest::of("html"));
        assert_eq!(tape.play(&asked("a", "xml")), None);
        let mut ranged = asked("a", "json");
        ranged.conditions.insert("range".into(), "bytes=1-".into());
        assert_eq!(tape.play(&ranged), None);
    }

    #[test]
    fn what_is_recorded_does_not_depend_on_who_was_faster() {
        let one = |first: &str, second: &str| {
            let mut tape = Tape::default();
            let places = [tape.place().unwrap(), tape.place().unwrap()];
            tape.learn(places[1], exchange(second, "y", None));
            tape.learn(places[0], exchange(first, "y", None));
            tape.recording(false)
        };
        assert_eq!(one("a", "b"), one("b", "a"));
        assert_eq!(one("a", "b").digest(), one("b", "a").digest());
        assert_eq!(one("a", "a").exchanges.len(), 1);
        assert_eq!(Tape::default().recording(false).digest(), None);
    }
}
