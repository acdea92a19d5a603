//! The cheapest graph in an e-graph.
//!
//! Enters: a saturated e-graph. Leaves: one node for every class that is computed.
//! Invariants: the choice is acyclic; its price counts every class once, however often it is read;
//! it is never above the price of the graph that came in (its dead ops left out).
//!
//! Choosing on a DAG is NP-hard. Two starts, the input's own nodes and the cheapest tree of every
//! class, are each improved by single switches and by bundles (nodes that pay off together only)
//! until none helps; every switch is judged by its exact change of the shared price, through counts
//! of readers.

use std::collections::{HashMap, HashSet};

use egg::Id;

use super::egraph::{Node, Saturation};
use super::price::Prices;
use super::{Result, SimplifyError};

/// Sweeps over all classes at most.
const N_SWEEPS: usize = 16;
/// Between equal prices the input's own op stays.
const NOVELTY_S: f64 = 1e-12;
/// Tree prices grow exponentially with depth; from here on they do not order anything.
const TREE_LIMIT_S: f64 = 1e250;

/// A node for every class that is computed.
pub(super) struct Choice {
    pub nodes: HashMap<Id, Node>,
    pub price_s: f64,
}

pub(super) fn extract(saturation: &Saturation, prices: &Prices) -> Result<Choice> {
    let problem = Problem::new(saturation, prices)?;
    let mut best: Option<State> = None;
    for start in [problem.input_choice(), cheapest_trees(&problem.candidates)] {
        let Some(mut state) = State::new(&problem, start) else {
            continue;
        };
        state.improve();
        if best
            .as_ref()
            .is_none_or(|least| state.price_s < least.price_s)
        {
            best = Some(state);
        }
    }
    let state = best.ok_or_else(|| {
        SimplifyError::Internal("the graph that came in cannot be read back".into())
    })?;
    Ok(state.chosen())
}

/// The input's own choice with one class computed in another way, for every class that it computes
/// and every way that was found. Quadratic: for tests of soundness.
pub(super) fn variants(saturation: &Saturation, prices: &Prices) -> Result<Vec<Choice>> {
    let problem = Problem::new(saturation, prices)?;
    let start = problem.input_choice();
    let Some(state) = State::new(&problem, start.clone()) else {
        return Err(SimplifyError::Internal(
            "the graph that came in cannot be read back".into(),
        ));
    };
    let mut choices = Vec::new();
    for (class_idx, candidates) in problem.candidates.iter().enumerate() {
        if state.n_readers[class_idx] == 0 {
            continue;
        }
        for candidate_idx in 0..candidates.len() {
            let mut choice = start.clone();
            choice[class_idx] = Some(candidate_idx);
            choices.extend(State::new(&problem, choice).map(|state| state.chosen()));
        }
    }
    Ok(choices)
}
struct Candidate {
    node: Node,
    /// Novelty included.
    price_s: f64,
    novelty_s: f64,
    /// Distinct classes it reads.
    children: Vec<usize>,
    is_input: bool,
}

struct Problem {
    ids: Vec<Id>,
    candidates: Vec<Vec<Candidate>>,
    roots: Vec<usize>,
    /// (class, candidate) to be switched together.
    bundles: Vec<Vec<(usize, usize)>>,
}

impl Problem {
    fn new(saturation: &Saturation, prices: &Prices) -> Result<Self> {
        let graph = &saturation.graph;
        let canonical = |node: &Node| {
            let mut node = node.clone();
            for child in &mut node.children {
                *child = graph.find(*child);
            }
            node
        };
        let input_nodes: HashSet<Node> = saturation
            .input_nodes
            .iter()
            .map(|(_, node)| canonical(node))
            .collect();
        let mut ids: Vec<Id> = graph.classes().map(|class| class.id).collect();
        ids.sort();
        let index: HashMap<Id, usize> = ids
            .iter()
            .enumerate()
            .map(|(class_idx, id)| (*id, class_idx))
            .collect();
        let mut candidates: Vec<Vec<Candidate>> = ids
            .iter()
            .map(|id| {
                let mut nodes: Vec<Node> = graph[*id].nodes.iter().map(canonical).collect();
                nodes.sort();
                nodes.dedup();
                nodes
                    .into_iter()
                    .map(|node| {
                        let mut children: Vec<usize> = node
                            .children
                            .iter()
                            .filter_map(|child| index.get(child).copied())
                            .collect();
                        children.sort_unstable();
                        children.dedup();
                        let price_s = prices.node(graph, &node);
                        let is_input = price_s == 0.0 || input_nodes.contains(&node);
                        let novelty_s = if is_input { 0.0 } else { NOVELTY_S };
                        Candidate {
                            price_s: price_s + novelty_s,
                            novelty_s,
                            children,
                            is_input,
                            node,
                        }
                    })
                    .collect()
            })
            .collect();
        // A node above a class that only computes itself can never be read back.
        let trees = cheapest_trees(&candidates);
        for of_class in &mut candidates {
            of_class.retain(|candidate| {
                candidate
                    .children
                    .iter()
                    .all(|child| trees[*child].is_some())
            });
        }
        let class_of = |id: &Id| {
            index
                .get(&graph.find(*id))
                .copied()
                .ok_or_else(|| SimplifyError::Internal(format!("class {id} is not canonical")))
        };
        let mut roots: Vec<usize> = saturation
            .roots
            .iter()
            .map(class_of)
            .collect::<Result<_>>()?;
        roots.sort_unstable();
        roots.dedup();
        let bundles = saturation
            .bundles
            .iter()
            .map(|bundle| {
                bundle
                    .iter()
                    .filter_map(|(id, node)| {
                        let class_idx = class_of(id).ok()?;
                        let node = canonical(node);
                        let candidate_idx = candidates[class_idx]
                            .iter()
                            .position(|candidate| candidate.node == node)?;
                        Some((class_idx, candidate_idx))
                    })
                    .collect()
            })
            .collect();
        Ok(Self {
            ids,
            candidates,
            roots,
            bundles,
        })
    }

    /// The input's own node wherever there is one, the cheapest tree elsewhere.
    fn input_choice(&self) -> Vec<Option<usize>> {
        cheapest_trees(&self.candidates)
            .into_iter()
            .enumerate()
            .map(|(class_idx, tree)| {
                self.candidates[class_idx]
                    .iter()
                    .position(|candidate| candidate.is_input)
                    .or(tree)
            })
            .collect()
    }
}

/// For every class the node with the cheapest tree below it; `None` where every tree is infinite.
fn cheapest_trees(candidates: &[Vec<Candidate>]) -> Vec<Option<usize>> {
    let mut price_s = vec![f64::INFINITY; candidates.len()];
    let mut choice = vec![None; candidates.len()];
    loop {
        let mut has_changed = false;
        for (class_idx, candidates) in candidates.iter().enumerate() {
            for (candidate_idx, candidate) in candidates.iter().enumerate() {
                let below_s: f64 = candidate.children.iter().map(|child| price_s[*child]).sum();
                // Projections are free: a little more, so that no cycle is.
                let total_s = candidate.price_s + NOVELTY_S + below_s;
                if total_s.is_finite()
                    && total_s.min(TREE_LIMIT_S) < price_s[class_idx] * (1.0 - 1e-12)
                {
                    price_s[class_idx] = total_s.min(TREE_LIMIT_S);
                    choice[class_idx] = Some(candidate_idx);
                    has_changed = true;
                }
            }
        }
        if !has_changed {
            return choice;
        }
    }
}

/// A choice with the number of readers of every class; classes without readers are not computed.
struct State<'a> {
    problem: &'a Problem,
    choice: Vec<Option<usize>>,
    n_readers: Vec<usize>,
    price_s: f64,
}

impl<'a> State<'a> {
    /// `None` when the choice is cyclic or leaves a needed class without a node.
    fn new(problem: &'a Problem, choice: Vec<Option<usize>>) -> Option<Self> {
        let mut state = Self {
            problem,
            n_readers: vec![0; choice.len()],
            choice,
            price_s: 0.0,
        };
        for root in &problem.roots {
            state.add_reader(*root)?;
        }
        (!state.is_cyclic(&problem.roots)).then_some(state)
    }

    /// The nodes of the classes that are computed.
    fn chosen(&self) -> Choice {
        let needed = (0..self.choice.len()).filter(|class_idx| self.n_readers[*class_idx] > 0);
        let chosen: Vec<(Id, &Candidate)> = needed
            .filter_map(|class_idx| Some((self.problem.ids[class_idx], self.candidate(class_idx)?)))
            .collect();
        Choice {
            price_s: chosen
                .iter()
                .map(|(_, candidate)| candidate.price_s - candidate.novelty_s)
                .sum(),
            nodes: chosen
                .into_iter()
                .map(|(id, candidate)| (id, candidate.node.clone()))
                .collect(),
        }
    }

    fn candidate(&self, class_idx: usize) -> Option<&'a Candidate> {
        let problem = self.problem;
        Some(&problem.candidates[class_idx][self.choice[class_idx]?])
    }

    fn add_reader(&mut self, class_idx: usize) -> Option<()> {
        let mut todo = vec![class_idx];
        while let Some(class_idx) = todo.pop() {
            self.n_readers[class_idx] += 1;
            if self.n_readers[class_idx] == 1 {
                let candidate = self.candidate(class_idx)?;
                self.price_s += candidate.price_s;
                todo.extend(&candidate.children);
            }
        }
        Some(())
    }

    fn remove_reader(&mut self, class_idx: usize) {
        let mut todo = vec![class_idx];
        while let Some(class_idx) = todo.pop() {
            self.n_readers[class_idx] -= 1;
            if self.n_readers[class_idx] == 0
                && let Some(candidate) = self.candidate(class_idx)
            {
                self.price_s -= candidate.price_s;
                todo.extend(&candidate.children);
            }
        }
    }

    /// Chooses another node for a class that is computed.
    fn switch(&mut self, class_idx: usize, candidate_idx: usize) -> Option<()> {
        let old = self.candidate(class_idx)?;
        let new = &self.problem.candidates[class_idx][candidate_idx];
        self.price_s += new.price_s - old.price_s;
        self.choice[class_idx] = Some(candidate_idx);
        for child in &new.children {
            self.add_reader(*child)?;
        }
        for child in &old.children {
            self.remove_reader(*child);
        }
        Some(())
    }

    /// Whether a class that these need needs itself.
    fn is_cyclic(&self, class_idxs: &[usize]) -> bool {
        // 1: on the path, 2: done.
        let mut mark: HashMap<usize, u8> = HashMap::new();
        let mut todo: Vec<(usize, bool)> = class_idxs
            .iter()
            .map(|class_idx| (*class_idx, false))
            .collect();
        while let Some((class_idx, is_done)) = todo.pop() {
            if is_done {
                mark.insert(class_idx, 2);
                continue;
            }
            match mark.get(&class_idx) {
                Some(1) => return true,
                Some(_) => continue,
                None => {}
            }
            mark.insert(class_idx, 1);
            todo.push((class_idx, true));
            let Some(candidate) = self.candidate(class_idx) else {
                return true;
            };
            for child in &candidate.children {
                match mark.get(child) {
                    Some(1) => return true,
                    Some(_) => {}
                    None => todo.push((*child, false)),
                }
            }
        }
        false
    }

    /// Tries switches together; keeps them when they pay off.
    fn attempt(&mut self, switches: &[(usize, usize)]) -> bool {
        let needed: Vec<(usize, usize)> = switches
            .iter()
            .copied()
            .filter(|(class_idx, candidate_idx)| {
                self.n_readers[*class_idx] > 0 && self.choice[*class_idx] != Some(*candidate_idx)
            })
            .collect();
        let before_s = self.price_s;
        let mut undo = Vec::with_capacity(needed.len());
        let mut is_legal = !needed.is_empty();
        for (class_idx, candidate_idx) in &needed {
            let Some(old) = self.choice[*class_idx] else {
                is_legal = false;
                break;
            };
            // A switch before this one may have made the class unneeded.
            if self.n_readers[*class_idx] == 0 {
                continue;
            }
            undo.push((*class_idx, old));
            if self.switch(*class_idx, *candidate_idx).is_none() {
                is_legal = false;
                break;
            }
        }
        let gains = before_s - self.price_s > 0.5 * NOVELTY_S + 1e-9 * before_s.abs() * 1e-6;
        if is_legal
            && gains
            && undo.iter().all(|(class_idx, _)| {
                self.n_readers[*class_idx] == 0 || !self.is_cyclic(&[*class_idx])
            })
        {
            return true;
        }
        for (class_idx, old) in undo.into_iter().rev() {
            if self.n_readers[class_idx] > 0 {
                let _ = self.switch(class_idx, old);
            } else {
                self.choice[class_idx] = Some(old);
            }
        }
        self.price_s = if is_legal { self.price_s } else { before_s };
        false
    }

    fn improve(&mut self) {
        for _ in 0..N_SWEEPS {
            let mut has_improved = false;
            for bundle in &self.problem.bundles {
                has_improved |= self.attempt(bundle);
            }
            for class_idx in (0..self.choice.len()).rev() {
                for candidate_idx in 0..self.problem.candidates[class_idx].len() {
                    if self.n_readers[class_idx] > 0 {
                        has_improved |= self.attempt(&[(class_idx, candidate_idx)]);
                    }
                }
            }
            if !has_improved {
                return;
            }
        }
    }
}
