//! Which packages a base is made of: the asked-for ones, the required set, and what
//! they depend on, no recommends. Pure and deterministic: the same universe and
//! request give the same set, whatever the order of either.
//!
//! Like apt: of alternatives the first that can be had is taken, real packages before
//! those that provide the name, the newest version unless the lock has another one
//! that still exists. Needs with one answer come first; only then are choices made,
//! and taken back (in a bounded search) when they lead to a conflict.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::index::Universe;
use super::relation::Relation;

/// Choices tried before giving up. Real suites need none or a few.
const MAX_BACKTRACKS: usize = 2000;

/// Packages that only serve maintainer scripts: a base without scripts leaves them
/// out, unless they are asked for by name.
const SCRIPT_HELPERS: [&str; 13] = [
    "adduser",
    "awk",
    "cdebconf",
    "debconf",
    "debconf-2.0",
    "debianutils",
    "dpkg",
    "init-system-helpers",
    "install-info",
    "lsb-base",
    "passwd",
    "sysvinit-utils",
    "ucf",
];

/// Says that `/bin` and others are links into `/usr`.
const ALREADY_MERGED: &str = "usr-is-merged";

/// What a base shall hold.
#[derive(Clone, Debug, Default)]
pub struct Request<'r> {
    /// `name` or `name=version`.
    pub packages: Vec<&'r str>,
    /// Also the required set.
    pub required: bool,
    /// No maintainer scripts are going to run.
    pub scriptless: bool,
    /// Versions of the lock, to be kept where they still exist.
    pub preferred: BTreeMap<&'r str, &'r str>,
}

/// Why there is no such set.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ResolveError {
    #[error("there is no package `{name}` in {suite}{hint}")]
    Unknown {
        name: String,
        suite: String,
        hint: String,
    },
    #[error("`{name}={wanted}` is not in {suite} (it has {found})")]
    NoVersion {
        name: String,
        wanted: String,
        suite: String,
        found: String,
    },
    #[error("the packages of {suite} can't be installed together: {chain} needs `{need}`, {why}")]
    Unsatisfiable {
        suite: String,
        chain: String,
        need: String,
        why: String,
    },
}

#[derive(Clone)]
struct Need<'a> {
    group: Vec<Relation<'a>>,
    /// The package that has this need; `None`: asked for, or required.
    by: Option<usize>,
}

#[derive(Clone, Default)]
struct State<'a> {
    chosen: BTreeMap<&'a str, usize>,
    /// Provided name → (by, version).
    provided: HashMap<&'a str, Vec<(usize, Option<&'a str>)>>,
    enemies: Vec<(usize, Relation<'a>)>,
    why: HashMap<usize, Option<usize>>,
    pending: VecDeque<Need<'a>>,
    deferred: VecDeque<Need<'a>>,
}

struct Resolver<'a, 'r> {
    universe: &'r Universe<'a>,
    request: &'r Request<'r>,
    suite: &'r str,
    asked: BTreeSet<&'r str>,
}

/// The set's indices in `universe.packages`, sorted by name.
pub fn resolve(
    universe: &Universe,
    request: &Request,
    suite: &str,
) -> Result<Vec<usize>, ResolveError> {
    let name_of = |text: &'_ str| {
        text.split_once('=')
            .map_or(text.len(), |(name, _)| name.len())
    };
    let resolver = Resolver {
        universe,
        request,
        suite,
        asked: request
            .packages
            .iter()
            .map(|text| &text[..name_of(text)])
            .collect(),
    };
    let mut state = resolver.start()?;
    let mut choices: Vec<(State, Need, Vec<usize>)> = Vec::new();
    let mut first_failure = None;
    for _ in 0..MAX_BACKTRACKS {
        let failure = match resolver.run(&mut state, &mut choices) {
            Ok(()) => return Ok(state.chosen.into_values().collect()),
            Err(failure) => first_failure.get_or_insert(failure),
        };
        let Some((before, need, mut options)) = choices.pop() else {
            return Err(failure.clone());
        };
        state = before;
        let next = options.remove(0);
        if !options.is_empty() {
            choices.push((state.clone(), need.clone(), options));
        }
        resolver.choose(&mut state, next, need.by);
    }
    first_failure.map_or_else(|| Ok(Vec::new()), Err)
}

impl<'a> Resolver<'a, '_> {
    /// Everything asked for by name is chosen before any need is looked at, so that
    /// it answers alternatives.
    fn start(&self) -> Result<State<'a>, ResolveError> {
        let mut state = State::default();
        let mut wanted = Vec::new();
        for text in &self.request.packages {
            wanted.push(self.asked_for(text)?);
        }
        if self.request.required {
            let required = self.universe.required();
            wanted.extend(required.iter().filter_map(|name| self.best(name, None)));
        }
        wanted.sort_by_key(|i| self.universe.packages[*i].name);
        for index in wanted {
            let package = &self.universe.packages[index];
            if state.chosen.contains_key(package.name) {
                continue;
            }
            if let Some(why) = self.conflict(&state, index) {
                return Err(self.unsatisfiable(None, package.name.into(), why));
            }
            self.choose(&mut state, index, None);
        }
        Ok(state)
    }

    fn asked_for(&self, text: &str) -> Result<usize, ResolveError> {
        let (name, version) = match text.split_once('=') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        let unknown = |hint: String| ResolveError::Unknown {
            name: name.into(),
            suite: self.suite.into(),
            hint,
        };
        let versions = self.universe.versions(name);
        if versions.is_empty() {
            let mut providers: Vec<&str> = self
                .universe
                .providers(name)
                .iter()
                .map(|(index, _)| self.universe.packages[*index].name)
                .collect();
            providers.sort_unstable();
            providers.dedup();
            return match providers.as_slice() {
                // One package goes by this name: that is what is meant.
                [only] => self.best(only, None).ok_or_else(|| unknown(String::new())),
                [] => Err(unknown(String::new())),
                many => Err(unknown(format!(
                    " (it is provided by {}: name one of them)",
                    many.join(", ")
                ))),
            };
        }
        let Some(version) = version else {
            return self.best(name, None).ok_or_else(|| unknown(String::new()));
        };
        let found = |i: &&usize| self.universe.packages[**i].version == version;
        versions
            .iter()
            .find(found)
            .copied()
            .ok_or_else(|| ResolveError::NoVersion {
                name: name.into(),
                wanted: version.into(),
                suite: self.suite.into(),
                found: self.version_list(name),
            })
    }

    fn version_list(&self, name: &str) -> String {
        let versions = self.universe.versions(name).iter();
        versions
            .map(|i| self.universe.packages[*i].version)
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// The version of `name` to take: the lock's, else the newest, that `relation` allows.
    fn best(&self, name: &str, relation: Option<&Relation>) -> Option<usize> {
        let versions = self.universe.versions(name);
        let version = |i: usize| self.universe.packages[i].version;
        let allowed = |i: &usize| relation.is_none_or(|r| r.allows(version(*i)));
        let locked = self.request.preferred.get(name);
        let kept = versions
            .iter()
            .copied()
            .find(|i| locked == Some(&version(*i)) && allowed(i));
        kept.or_else(|| versions.iter().copied().find(allowed))
    }

    /// Works off every need; pushes the state before each choice onto `choices`.
    fn run(
        &self,
        state: &mut State<'a>,
        choices: &mut Vec<(State<'a>, Need<'a>, Vec<usize>)>,
    ) -> Result<(), ResolveError> {
        loop {
            let (need, may_choose) = match state.pending.pop_front() {
                Some(need) => (need, false),
                None => match state.deferred.pop_front() {
                    Some(need) => (need, true),
                    None => return Ok(()),
                },
            };
            if need
                .group
                .iter()
                .any(|r| satisfied(self.universe, state, r))
            {
                continue;
            }
            let mut obstacles = Vec::new();
            let mut options = self.options(state, &need, &mut obstacles);
            match options.len() {
                0 => return Err(self.failure(state, &need, obstacles)),
                1 => self.choose(state, options[0], need.by),
                _ if !may_choose => state.deferred.push_back(need),
                _ => {
                    let first = options.remove(0);
                    choices.push((state.clone(), need.clone(), options));
                    self.choose(state, first, need.by);
                }
            }
        }
    }

    /// The packages that answer `need` without a conflict, best first.
    fn options(
        &self,
        state: &State<'a>,
        need: &Need<'a>,
        obstacles: &mut Vec<String>,
    ) -> Vec<usize> {
        let mut options: Vec<usize> = Vec::new();
        for relation in &need.group {
            let mut found: Vec<usize> = Vec::new();
            if !foreign(relation) {
                found.extend(self.best(relation.name, Some(relation)));
            }
            let mut providers: Vec<usize> = self
                .universe
                .providers(relation.name)
                .iter()
                .filter(|(_, version)| provides(relation, *version))
                .map(|(index, _)| *index)
                .filter(|i| self.best(self.universe.packages[*i].name, None) == Some(*i))
                .collect();
            providers.sort_by_key(|i| {
                let package = &self.universe.packages[*i];
                let locked = self.request.preferred.contains_key(package.name);
                (!locked, priority_rank(package.priority), package.name)
            });
            found.extend(providers);
            for index in found {
                let name = self.universe.packages[index].name;
                if let Some(other) = state.chosen.get(name).filter(|other| **other != index) {
                    let version = self.universe.packages[*other].version;
                    obstacles.push(format!(
                        "`{relation}` is not met by {name} {version}, which is already chosen"
                    ));
                } else if let Some(why) = self.conflict(state, index) {
                    obstacles.push(why);
                } else if !options.contains(&index) {
                    options.push(index);
                }
            }
        }
        options
    }

    /// Why `index` can't join the chosen, if it can't.
    fn conflict(&self, state: &State<'a>, index: usize) -> Option<String> {
        let new = &self.universe.packages[index];
        let text = |who: &str, enemy: &Relation, whom: &str| {
            format!("{who} conflicts with {whom} (`{enemy}`)")
        };
        for enemy in new.enemies() {
            let real = state.chosen.get(enemy.name).copied();
            if let Some(other) =
                real.filter(|i| *i != index && enemy.allows(self.universe.packages[*i].version))
            {
                return Some(text(new.name, &enemy, self.universe.packages[other].name));
            }
            let virtually = state.provided.get(enemy.name).into_iter().flatten();
            for (other, version) in virtually {
                if *other != index && provides(&enemy, *version) {
                    return Some(text(new.name, &enemy, self.universe.packages[*other].name));
                }
            }
        }
        for (owner, enemy) in &state.enemies {
            if *owner == index {
                continue;
            }
            let really = enemy.name == new.name && enemy.allows(new.version);
            let virtually = || {
                new.provided()
                    .any(|p| p.name == enemy.name && provides(enemy, p.version.map(|(_, v)| v)))
            };
            if really || virtually() {
                return Some(text(self.universe.packages[*owner].name, enemy, new.name));
            }
        }
        None
    }

    fn choose(&self, state: &mut State<'a>, index: usize, by: Option<usize>) {
        let package = &self.universe.packages[index];
        if state.chosen.insert(package.name, index).is_some() {
            return;
        }
        state.why.insert(index, by);
        for provided in package.provided() {
            let version = provided.version.map(|(_, version)| version);
            state
                .provided
                .entry(provided.name)
                .or_default()
                .push((index, version));
        }
        state
            .enemies
            .extend(package.enemies().map(|enemy| (index, enemy)));
        for mut group in package.dependencies() {
            // kiln's roots are merged from the start: the program that would merge an
            // old one is not wanted, although it is named first.
            group.sort_by_key(|relation| relation.name != ALREADY_MERGED);
            if self.request.scriptless && self.only_for_scripts(&group) {
                continue;
            }
            state.pending.push_back(Need {
                group,
                by: Some(index),
            });
        }
    }

    fn only_for_scripts(&self, group: &[Relation]) -> bool {
        group
            .iter()
            .any(|r| SCRIPT_HELPERS.contains(&r.name) && !self.asked.contains(r.name))
    }

    fn failure(&self, state: &State<'a>, need: &Need<'a>, obstacles: Vec<String>) -> ResolveError {
        let why = if obstacles.is_empty() {
            let known: Vec<String> = need
                .group
                .iter()
                .filter(|r| !self.universe.versions(r.name).is_empty())
                .map(|r| format!("{} {}", r.name, self.version_list(r.name)))
                .collect();
            match known.is_empty() {
                true => "which does not exist there".into(),
                false => format!("and there is only {}", known.join("; ")),
            }
        } else {
            format!("but {}", obstacles.join("; "))
        };
        let group: Vec<String> = need.group.iter().map(ToString::to_string).collect();
        self.unsatisfiable(need.by.map(|by| (state, by)), group.join(" | "), why)
    }

    fn unsatisfiable(
        &self,
        by: Option<(&State<'a>, usize)>,
        need: String,
        why: String,
    ) -> ResolveError {
        let mut chain = Vec::new();
        if let Some((state, by)) = by {
            let mut at = Some(by);
            while let Some(index) = at {
                let package = &self.universe.packages[index];
                chain.push(format!("{} {}", package.name, package.version));
                at = state.why.get(&index).copied().flatten();
            }
        }
        chain.push("the base".into());
        chain.reverse();
        ResolveError::Unsatisfiable {
            suite: self.suite.into(),
            chain: chain.join(" → "),
            need,
            why,
        }
    }
}

fn satisfied(universe: &Universe, state: &State, relation: &Relation) -> bool {
    if foreign(relation) {
        return false;
    }
    let real = state.chosen.get(relation.name);
    real.is_some_and(|i| relation.allows(universe.packages[*i].version))
        || state
            .provided
            .get(relation.name)
            .is_some_and(|list| list.iter().any(|(_, version)| provides(relation, *version)))
}

/// A versioned relation is only met by a versioned provide (Policy 7.5).
fn provides(relation: &Relation, version: Option<&str>) -> bool {
    match (relation.version, version) {
        (None, _) => true,
        (Some(_), Some(version)) => relation.allows(version),
        (Some(_), None) => false,
    }
}

/// Asks for another architecture's package: a base holds one architecture only.
fn foreign(relation: &Relation) -> bool {
    relation
        .qualifier
        .is_some_and(|q| !matches!(q, "any" | "native"))
}

fn priority_rank(priority: &str) -> usize {
    const ORDER: [&str; 4] = ["required", "important", "standard", "optional"];
    ORDER
        .iter()
        .position(|p| *p == priority)
        .unwrap_or(ORDER.len())
}

/// The packages in an order in which each comes after what it depends on, as far as
/// there are no cycles; ties by name. `dependencies` of an item, by index.
pub fn install_order(count: usize, dependencies: impl Fn(usize) -> Vec<usize>) -> Vec<usize> {
    let mut order = Vec::with_capacity(count);
    let mut seen = vec![false; count];
    for start in 0..count {
        // An explicit stack: (item, what it still waits for).
        let mut stack: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut enter = |item: usize, stack: &mut Vec<(usize, Vec<usize>)>| {
            if !std::mem::replace(&mut seen[item], true) {
                let mut waits = dependencies(item);
                waits.reverse();
                stack.push((item, waits));
            }
        };
        enter(start, &mut stack);
        while let Some((item, waits)) = stack.last_mut() {
            match waits.pop() {
                Some(next) if next < count => enter(next, &mut stack),
                Some(_) => {}
                None => {
                    order.push(*item);
                    stack.pop();
                }
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::debian::index::Package;

    /// `name version | Field: value | …`
    fn universe(lines: &[&'static str]) -> Universe<'static> {
        let one = |line: &&'static str| {
            let mut parts = line.split(" / ").map(str::trim);
            let (name, version) = parts.next().unwrap().split_once(' ').unwrap_or((line, "1"));
            let mut package = Package {
                name,
                version,
                arch: "amd64",
                priority: "optional",
                ..Package::default()
            };
            for part in parts {
                let (field, value) = part.split_once(": ").unwrap();
                match field {
                    "D" => package.depends = value,
                    "P" => package.provides = value,
                    "C" => package.conflicts = value,
                    "B" => package.breaks = value,
                    "Pri" => package.priority = value,
                    other => panic!("{other}"),
                }
            }
            package
        };
        Universe::new(lines.iter().map(one).collect())
    }

    fn names(lines: &[&'static str], packages: &[&str]) -> Result<String, ResolveError> {
        let request = Request {
            packages: packages.to_vec(),
            required: true,
            ..Request::default()
        };
        solve(lines, &request)
    }

    fn solve(lines: &[&'static str], request: &Request) -> Result<String, ResolveError> {
        let universe = universe(lines);
        let set = resolve(&universe, request, "bookworm")?;
        let text = |i: &usize| {
            format!(
                "{}-{}",
                universe.packages[*i].name, universe.packages[*i].version
            )
        };
        Ok(set.iter().map(text).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn dependencies_newest_versions_and_the_required_set() {
        let lines = [
            "a 1 / D: b (>= 2), c:any",
            "b 1",
            "b 3",
            "b 2",
            "c 1",
            "r 1 / Pri: required",
            "z 1",
        ];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 b-3 c-1 r-1");
        let mut backwards = lines;
        backwards.reverse();
        assert_eq!(names(&backwards, &["a"]).unwrap(), "a-1 b-3 c-1 r-1");
    }

    #[test]
    fn of_alternatives_the_first_unless_one_is_there_anyway() {
        let lines = ["a 1 / D: b | c", "b 1", "c 1", "d 1 / D: c"];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 b-1");
        assert_eq!(names(&lines, &["a", "d"]).unwrap(), "a-1 c-1 d-1");
        assert_eq!(
            names(&["a 1 / D: gone | c", "c 1"], &["a"]).unwrap(),
            "a-1 c-1"
        );
    }

    #[test]
    fn provided_names_with_and_without_versions() {
        let lines = ["a 1 / D: v", "p 1 / P: v", "q 1 / P: v / Pri: important"];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 q-1");
        let lines = [
            "a 1 / D: v (>= 2)",
            "p 1 / P: v",
            "q 1 / P: v (= 1)",
            "s 1 / P: v (= 2)",
        ];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 s-1");
        assert!(names(&lines[..3], &["a"]).is_err());
        assert_eq!(names(&["p 1 / P: v"], &["v"]).unwrap(), "p-1");
        let error = names(&["p 1 / P: v", "q 1 / P: v"], &["v"]).unwrap_err();
        assert!(error.to_string().contains("provided by p, q"), "{error}");
    }

    #[test]
    fn a_choice_that_conflicts_is_taken_back() {
        let lines = [
            "a 1 / D: b | c, d",
            "b 1 / D: e",
            "c 1",
            "d 1",
            "e 1 / C: d",
        ];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 c-1 d-1");
        let lines = ["a 1 / D: v", "p 1 / P: v / C: v", "q 1 / P: v / C: v"];
        assert_eq!(names(&lines, &["a"]).unwrap(), "a-1 p-1");
    }

    #[test]
    fn conflicts_are_reported_with_who_wants_what() {
        let error = names(&["a 1 / D: b", "b 1 / D: c (>= 2)", "c 1"], &["a"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("the base → a 1 → b 1 needs `c (>= 2)`, and there is only c 1"),
            "{error}"
        );
        let error = names(&["a 1 / D: b", "b 1 / B: d (<< 2)", "d 1"], &["a", "d"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("b conflicts with d (`d (<< 2)`)"), "{error}");
        assert!(names(&["a 1 / C: b", "b 1"], &["a", "b"]).is_err());
        assert!(names(&["a 1 / D: x:i386", "x 1"], &["a"]).is_err());
        assert!(
            names(&["a 1"], &["nope"])
                .unwrap_err()
                .to_string()
                .contains("no package `nope` in bookworm")
        );
        assert!(
            names(&["a 1"], &["a=2"])
                .unwrap_err()
                .to_string()
                .contains("it has 1")
        );
    }

    #[test]
    fn locked_versions_are_kept_while_they_exist_and_fit() {
        let lines = ["a 1 / D: b", "a 2 / D: b (>= 2)", "b 1", "b 2"];
        let mut request = Request {
            packages: vec!["a"],
            preferred: [("a", "1"), ("b", "1")].into(),
            ..Request::default()
        };
        assert_eq!(solve(&lines, &request).unwrap(), "a-1 b-1");
        request.preferred = [("a", "0"), ("b", "1")].into();
        assert_eq!(solve(&lines, &request).unwrap(), "a-2 b-2");
        request.packages = vec!["a=1"];
        assert_eq!(solve(&lines, &request).unwrap(), "a-1 b-1");
    }

    #[test]
    fn without_scripts_their_helpers_stay_out_unless_asked_for() {
        let lines = [
            "a 1 / D: debconf (>= 1) | debconf-2.0, dpkg, b",
            "b 1",
            "debconf 2",
            "dpkg 1",
        ];
        let mut request = Request {
            packages: vec!["a"],
            scriptless: true,
            ..Request::default()
        };
        assert_eq!(solve(&lines, &request).unwrap(), "a-1 b-1");
        request.packages.push("dpkg");
        assert_eq!(solve(&lines, &request).unwrap(), "a-1 b-1 dpkg-1");
    }

    #[test]
    fn a_hopeless_search_ends() {
        let mut lines: Vec<String> = Vec::new();
        for i in 0..40 {
            lines.push(format!("n{i} 1 / D: x{i} | y{i}, bad"));
            lines.push(format!("x{i} 1"));
            lines.push(format!("y{i} 1"));
        }
        lines.push("bad 1 / D: m | n".into());
        lines.push("m 1 / D: o".into());
        lines.push("n 1 / D: o".into());
        let lines: Vec<&'static str> = lines.into_iter().map(|l| &*l.leak()).collect();
        let all: Vec<String> = (0..40).map(|i| format!("n{i}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        assert!(names(&lines, &all).is_err());
    }

    #[test]
    fn the_install_order_puts_dependencies_first_and_survives_cycles() {
        let edges = [vec![2], vec![0], vec![], vec![4], vec![3, 1]];
        assert_eq!(install_order(5, |i| edges[i].clone()), [2, 0, 1, 4, 3]);
    }
}
