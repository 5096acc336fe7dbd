//! Circles of `depends_on`.

use std::collections::BTreeMap;

use crate::diag::{Code, Diagnostic, Diagnostics};
use crate::node::Node;
use crate::span::Span;

/// A service on the way, where it is asked for, and what it still has to visit.
type Step<'a> = (&'a str, Span, Vec<(&'a str, Span)>);

fn services(root: &Node) -> impl Iterator<Item = (&str, &Node)> {
    let map = root.get("services").and_then(Node::as_map);
    map.into_iter()
        .flatten()
        .map(|(name, node)| (name.as_str(), node))
}

/// Steps of a circle that are shown.
const MAX_SHOWN: usize = 10;

/// depends_on in a circle; also through services that are not active.
pub fn find(root: &Node, diagnostics: &mut Diagnostics) {
    let mut done: BTreeMap<&str, bool> = BTreeMap::new();
    for (name, _) in services(root) {
        if let Some(circle) = find_cycle(root, name, &mut done) {
            let mut names: Vec<&str> = circle.iter().map(|(name, _)| *name).collect();
            if names.len() > MAX_SHOWN {
                names.truncate(MAX_SHOWN);
                names.push("…");
            }
            names.push(circle[0].0);
            let mut diagnostic = Diagnostic::error(
                Code::Cycle,
                circle[0].1,
                format!(
                    "services depend on each other in a circle: {}",
                    names.join(" -> ")
                ),
            );
            for (name, span) in circle.iter().take(MAX_SHOWN).skip(1) {
                diagnostic = diagnostic.also(*span, format!("`{name}` goes on here"));
            }
            diagnostics.push(diagnostic);
        }
    }
}

/// Depth first with an own stack: a chain may be as long as the file.
/// `done`: false while on the way, true when nothing circular follows.
fn find_cycle<'a>(
    root: &'a Node,
    start: &'a str,
    done: &mut BTreeMap<&'a str, bool>,
) -> Option<Vec<(&'a str, Span)>> {
    let next_of = |name: &str| -> Vec<(&'a str, Span)> {
        root.at(&["services", name, "depends_on"])
            .and_then(Node::as_map)
            .into_iter()
            .flatten()
            .map(|(key, node)| (key.as_str(), node.key))
            .collect()
    };
    if done.contains_key(start) {
        return None;
    }
    done.insert(start, false);
    let mut stack: Vec<Step<'a>> = vec![(start, Span::NONE, next_of(start))];
    while let Some((name, _, todo)) = stack.last_mut() {
        let name = *name;
        let Some((next, span)) = todo.pop() else {
            done.insert(name, true);
            stack.pop();
            continue;
        };
        match done.get(next) {
            Some(true) => {}
            Some(false) => {
                let from = stack.iter().position(|(n, ..)| *n == next).unwrap_or(0);
                let mut circle: Vec<(&str, Span)> =
                    stack[from..].iter().map(|(n, s, _)| (*n, *s)).collect();
                // Each step shows where its own depends_on points; the last closes the circle.
                let mut spans: Vec<Span> = circle.iter().skip(1).map(|(_, s)| *s).collect();
                spans.push(span);
                for (step, span) in circle.iter_mut().zip(spans) {
                    step.1 = span;
                }
                for (name, ..) in &stack {
                    done.insert(name, true);
                }
                return Some(circle);
            }
            None => {
                done.insert(next, false);
                let todo = next_of(next);
                stack.push((next, span, todo));
            }
        }
    }
    None
}
