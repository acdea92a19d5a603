//! Ops without a choice of their own: followers of the op that makes their operand, and siblings.
//!
//! Enters: a class of ops and the groups so far. Leaves: the class as a member of a group, or not.
//! Invariant: in every strategy of the group the member has a legal placement that keeps the rules.

use meshweave_dsl::graph::{Graph, Op, OpId, TensorType};
use meshweave_dsl::op::{BinaryFn, Factor, OpKind, PARTIAL_FACTOR, Spread};
use meshweave_dsl::plan::{Placement, op_factors};

use super::{Builder, Member, Port};
use crate::plan::grid::{Code, Grid, State};
use crate::plan::metric::Metric;

impl Builder<'_> {
    /// Adds a class to the group of the op that makes its widest operand, where it can follow.
    pub(super) fn follow(&mut self, class: usize, metric: &mut Metric) -> bool {
        let op = self.first_op(class);
        let Some(input_idx) = followed_input(self.graph, op) else {
            return false;
        };
        let made_by = |op_id: &OpId| {
            let input = *self.graph.op(*op_id).inputs.get(input_idx)?;
            let producer = self.facts.producers[input.index()]?;
            let results = &self.graph.op(producer).results;
            let result_idx = results.iter().position(|id| *id == input)?;
            let class = self.classes.of_op[producer.index()];
            Some((class, result_idx))
        };
        let mut makers = self.classes.ops[class].iter().map(made_by);
        let Some(Some(maker)) = makers.next() else {
            return false;
        };
        if maker.0 >= class || makers.any(|other| other != Some(maker)) {
            return false;
        }
        let group_idx = self.group_of[maker.0];
        let factors = op_factors(self.graph, op);
        let group = &self.instance.groups[group_idx];
        let Some(port) = group.ports.get(&Port::Result(maker.0, maker.1)) else {
            return false;
        };
        let ty = self.graph.ty(op.inputs[input_idx]);
        let mut members = Vec::with_capacity(group.strategies.len());
        for strategy in &group.strategies {
            let placement =
                follower_placement(strategy.codes[*port], ty, input_idx, &factors, self.grid);
            let member = placement
                .filter(|placement| self.keeps_rules(class, &factors, placement))
                .and_then(|placement| self.member(class, &factors, &placement));
            let Some(member) = member else { return false };
            // The operand must be taken over as it is.
            if metric.seconds(ty, strategy.codes[*port], member.codes[input_idx]) != 0.0 {
                return false;
            }
            members.push(member);
        }
        self.join(group_idx, class, members);
        true
    }

    /// Adds a class to the group of an earlier sibling, where it can be divided alike: contractions
    /// that read the same tensor (the projections of attention, the halves of a gated FFN, their
    /// weight gradients), and updates of weights whose gradients are siblings.
    pub(super) fn join_sibling(&mut self, class: usize) -> bool {
        let op = self.first_op(class);
        let is_contract = matches!(op.kind, OpKind::Contract { .. });
        let is_update = matches!(op.kind, OpKind::Adamw { .. } | OpKind::Sgd { .. });
        let n_ops = self.classes.ops[class].len();
        let gradient_group = |class: usize| {
            let gradient = self.first_op(class).inputs.get(1)?;
            let maker = self.facts.producers[gradient.index()]?;
            Some(self.group_of[self.classes.of_op[maker.index()]])
        };
        let is_sibling = |other: usize| {
            let first = self.first_op(other);
            if self.classes.ops[other].len() != n_ops
                || std::mem::discriminant(&first.kind) != std::mem::discriminant(&op.kind)
            {
                return false;
            }
            if is_update {
                return first.kind == op.kind && gradient_group(other) == gradient_group(class);
            }
            (0..2).any(|input_idx| {
                let mut pairs = self.classes.ops[other].iter().zip(&self.classes.ops[class]);
                pairs.all(|(a, b)| {
                    let inputs = |op_id: &OpId| self.graph.op(*op_id).inputs.get(input_idx);
                    inputs(a) == inputs(b)
                })
            })
        };
        if !(is_contract || is_update) || self.rules.place_ops() {
            return false;
        }
        let leads = |other: &usize| {
            self.instance.groups[self.group_of[*other]].members.first() == Some(other)
        };
        let Some(sibling) = (0..class).filter(leads).find(|other| is_sibling(*other)) else {
            return false;
        };
        let group_idx = self.group_of[sibling];
        let factors = op_factors(self.graph, op);
        let mut members = Vec::new();
        for strategy in &self.instance.groups[group_idx].strategies {
            let placement = &strategy.placements[0];
            let mut names = placement.factors.values();
            let member = names
                .all(|name| factors.iter().any(|factor| factor.name == *name))
                .then(|| self.member(class, &factors, placement))
                .flatten()
                .filter(|_| self.keeps_rules(class, &factors, placement));
            let Some(member) = member else { return false };
            members.push(member);
        }
        self.join(group_idx, class, members);
        true
    }

    fn join(&mut self, group_idx: usize, class: usize, members: Vec<Member>) {
        let op = self.first_op(class);
        let (n_inputs, n_results) = (op.inputs.len(), op.results.len());
        let group = &mut self.instance.groups[group_idx];
        let first_port = group.strategies.first().map_or(0, |one| one.codes.len());
        let new_ports = (0..n_inputs)
            .map(|input_idx| Port::Input(class, input_idx))
            .chain((0..n_results).map(|result_idx| Port::Result(class, result_idx)));
        for (offset, port) in new_ports.enumerate() {
            group.ports.insert(port, first_port + offset);
        }
        group.members.push(class);
        for (strategy, member) in group.strategies.iter_mut().zip(members) {
            strategy.seconds += member.seconds;
            strategy.saved_bytes += member.saved_bytes;
            strategy.gradient_bytes += member.gradient_bytes;
            strategy.working_bytes = strategy.working_bytes.max(member.working_bytes);
            strategy.dislike_s += member.dislike_s;
            strategy.codes.extend(member.codes);
            strategy.placements.push(member.placement);
        }
        self.group_of[class] = group_idx;
    }
}

/// Which operand an op may take its layout from.
fn followed_input(graph: &Graph, op: &Op) -> Option<usize> {
    let widths: Vec<usize> = op
        .inputs
        .iter()
        .map(|id| graph.ty(*id).shape.len())
        .collect();
    let result_width = graph.ty(*op.results.first()?).shape.len();
    match &op.kind {
        OpKind::Unary(_) | OpKind::Transpose { .. } | OpKind::Rename { .. } => Some(0),
        OpKind::Rope { .. } => Some(0),
        // Sums may carry partial operands and join residual streams: they choose for themselves.
        OpKind::Binary(BinaryFn::Add | BinaryFn::Sub) => {
            let widest = widths.iter().position(|width| *width == result_width)?;
            widths
                .iter()
                .any(|width| *width < result_width)
                .then_some(widest)
        }
        OpKind::Binary(_) => widths.iter().position(|width| *width == result_width),
        _ => None,
    }
}

/// The placement that takes an operand over in the layout `code`; `None` when there is none.
fn follower_placement(
    code: Code,
    ty: &TensorType,
    input_idx: usize,
    factors: &[Factor],
    grid: &Grid,
) -> Option<Placement> {
    let mut placement = Placement::default();
    for (axis_idx, axis) in grid.axes.iter().enumerate() {
        let factor = match code.state(axis_idx) {
            State::Replicated => continue,
            State::Dim(dim_idx) => {
                let (dim, _) = ty.shape.get(dim_idx)?;
                factors.iter().find(|factor| {
                    factor.inputs.get(input_idx) == Some(&Spread::Split(dim.clone()))
                })?
            }
            State::Partial(_) => factors.iter().find(|factor| {
                factor.name.as_str() == PARTIAL_FACTOR && factor.inputs.len() == 1
            })?,
        };
        placement
            .factors
            .insert(axis.axis.clone(), factor.name.clone());
    }
    Some(placement)
}
