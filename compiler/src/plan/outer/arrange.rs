//! In which order ranks take the nodes of a cluster whose nodes are not alike.
//!
//! Enters: a problem on a cluster with groups, levels or slow links. Leaves: the best outcome over the
//! orders that are worth a look, and the cluster in that order.
//! Invariant: the lower bound holds for every order that is looked at; a cluster whose order the user
//! gives has no other.
//!
//! Pipeline ranks take consecutive nodes, so an order decides which stage is on which type of device, and
//! which stages meet a slow link. Like nodes may change places, so what matters is the order of the
//! groups, which groups take part at all, and where the nodes with slow links stand: together at the end
//! of their group, so that as few stages as possible meet them, at its beginning, or idle. Of every
//! group as many nodes may take part as are a multiple of a power of two.

use std::time::Instant;

use meshweave_dsl::cluster::Cluster;

use super::bound::Layers;
use super::search::Outcome;
use super::{Options, OuterError, Problem, search_in_order};

/// Groups whose orders are all looked at.
const MOST_PERMUTED: usize = 3;

/// The best outcome over all orders; the cluster in its order.
///
/// # Errors
/// `Internal` where there is no order or no batch.
pub(super) fn search(
    problem: &Problem<'_>,
    options: &Options,
    start: Instant,
) -> Result<(Outcome, Cluster), OuterError> {
    // Steps of several batches cannot be compared by their seconds.
    let is_one_batch = super::serving::batches(problem).len() == 1;
    let mut best: Option<(Outcome, Cluster)> = None;
    for order in orders(problem.cluster) {
        let Ok(placed) = problem.cluster.on_nodes(&order) else {
            continue;
        };
        let own = Problem {
            cluster: &placed,
            ..*problem
        };
        let known_s = best
            .as_ref()
            .filter(|_| is_one_batch)
            .and_then(|(outcome, _)| outcome.best.first())
            .map(|priced| priced.estimate.step_s);
        let with_bound = Options {
            better_than_s: known_s.or(options.better_than_s),
            ..options.clone()
        };
        let found = search_in_order(&own, &with_bound, start, &Layers::default())?;
        best = Some(match best {
            None => (found, placed),
            Some(known) => better(problem, known, (found, placed)),
        });
    }
    best.ok_or_else(|| OuterError::Internal("no order of the nodes was searched".into()))
}

/// The better of two outcomes, with the bound and the counts of both; steps count by sequence.
fn better(
    problem: &Problem<'_>,
    known: (Outcome, Cluster),
    later: (Outcome, Cluster),
) -> (Outcome, Cluster) {
    let batch = |outcome: &Outcome| {
        let found = outcome.best.first().map(|priced| priced.batch);
        found.unwrap_or(problem.workload.batch).max(1) as f64
    };
    let bound_s = |outcome: &Outcome| outcome.seen.lower_bound_s / batch(outcome);
    let a_sequence_s = bound_s(&known.0).min(bound_s(&later.0));
    let counts = known.0.seen.counts.and(later.0.seen.counts);
    let is_out_of_time = known.0.is_out_of_time || later.0.is_out_of_time;
    let is_later = match (known.0.best.first(), later.0.best.first()) {
        (Some(one), Some(other)) => other.a_sequence_s() < one.a_sequence_s(),
        (Some(_), None) => false,
        (None, Some(_)) => true,
        // Neither fits: the one that came closer says why.
        (None, None) => {
            let least = |outcome: &Outcome| {
                let closest = outcome.seen.closest.as_ref();
                closest.map_or(u64::MAX, |(bytes, _)| *bytes)
            };
            least(&later.0) < least(&known.0)
        }
    };
    let (mut taken, other) = if is_later {
        (later, known)
    } else {
        (known, later)
    };
    taken.0.seen.lower_bound_s = a_sequence_s * batch(&taken.0);
    taken.0.seen.counts = counts;
    taken.0.is_out_of_time = is_out_of_time;
    taken.0.seen.fastest_s = taken.0.seen.fastest_s.min(other.0.seen.fastest_s);
    taken.0.seen.fastest_first_s = taken
        .0
        .seen
        .fastest_first_s
        .min(other.0.seen.fastest_first_s);
    taken
}

/// The orders that are looked at, each once, the likeliest first.
pub(super) fn orders(cluster: &Cluster) -> Vec<Vec<usize>> {
    if !cluster.order.is_empty() {
        return vec![cluster.order.clone()];
    }
    let mut found: Vec<Vec<usize>> = Vec::new();
    for chosen in subsets(cluster.groups().count()) {
        for groups in permutations(&chosen) {
            for slow in [Place::Own, Place::Last, Place::First, Place::Idle] {
                let of_groups: Vec<Vec<usize>> = groups
                    .iter()
                    .map(|group| nodes_of_group(cluster, *group, slow))
                    .filter(|nodes| !nodes.is_empty())
                    .collect();
                let smallest = of_groups.iter().map(Vec::len).min().unwrap_or(0);
                let mut unit = 1;
                while unit <= smallest {
                    let order: Vec<usize> = of_groups
                        .iter()
                        .flat_map(|nodes| &nodes[..nodes.len() / unit * unit])
                        .copied()
                        .collect();
                    if !order.is_empty() && !found.contains(&order) {
                        found.push(order);
                    }
                    unit *= 2;
                }
            }
        }
    }
    found
}

/// Where the nodes with slow links stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Own,
    Last,
    First,
    Idle,
}

/// The nodes of a group, numbered through all groups.
fn nodes_of_group(cluster: &Cluster, group: usize, slow: Place) -> Vec<usize> {
    let before: usize = cluster.groups().take(group).map(|own| own.n_nodes).sum();
    let own = cluster.group(group);
    let is_slow = |node: &usize| own.slow.iter().any(|slow| slow.covers(*node, own));
    let (slow_nodes, others): (Vec<usize>, Vec<usize>) = (0..own.n_nodes).partition(is_slow);
    let nodes = match slow {
        Place::Own => (0..own.n_nodes).collect(),
        Place::Last => [others, slow_nodes].concat(),
        Place::First => [slow_nodes, others].concat(),
        Place::Idle => others,
    };
    nodes.into_iter().map(|node| before + node).collect()
}

/// The sets of groups that take part: all, then fewer.
fn subsets(n_groups: usize) -> Vec<Vec<usize>> {
    if n_groups > MOST_PERMUTED {
        return vec![(0..n_groups).collect()];
    }
    let mut sets: Vec<Vec<usize>> = (1..1usize << n_groups)
        .map(|mask| {
            (0..n_groups)
                .filter(|group| mask & (1 << group) != 0)
                .collect()
        })
        .collect();
    sets.sort_by_key(|set| std::cmp::Reverse(set.len()));
    sets
}

/// All orders of a few groups; both directions of many.
fn permutations(groups: &[usize]) -> Vec<Vec<usize>> {
    if groups.len() > MOST_PERMUTED {
        let backward = groups.iter().rev().copied().collect();
        return vec![groups.to_vec(), backward];
    }
    if groups.len() < 2 {
        return vec![groups.to_vec()];
    }
    let mut all = Vec::new();
    for first in groups {
        let others: Vec<usize> = groups.iter().copied().filter(|g| g != first).collect();
        for rest in permutations(&others) {
            all.push([vec![*first], rest].concat());
        }
    }
    all
}
