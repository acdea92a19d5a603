//! The planning problem of one mesh: groups of ops with strategies, and nets between them.
//!
//! Enters: a graph with its classes, a grid, rules. Leaves: groups, each to be given one of its
//! strategies; nets, whose price depends on the layouts that the strategies give their ends; and
//! bytes of memory per strategy.
//! Invariant: the seconds and bytes of an assignment are those of the plan it stands for, repeated
//! layers counted as often as they occur.
//!
//! An elementwise op *follows* the op that makes its widest operand when every strategy of that op
//! leaves it in a layout that the follower can take over; it then has no choice of its own.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId, TensorType};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, Factor, OpKind, PARTIAL_FACTOR, Spread};
use meshweave_dsl::plan::{Placement, Plan, op_factors};

use super::classes::Classes;
use super::directives::Subject;
use super::facts::{Facts, op_types};
use super::grid::{Code, Grid, Metric, State};
use super::rules::Rules;

/// A group without a legal strategy.
#[derive(Clone, Debug, PartialEq)]
pub struct NoStrategy {
    /// The op or source.
    pub name: String,
    /// Statements whose rules are about it.
    pub statements: Vec<usize>,
}

/// Where layouts meet: a kept source, or an operand or result of a class of ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    Source(usize),
    Input(usize, usize),
    Result(usize, usize),
    /// The end of a step, for a type of output.
    Output(usize),
}

/// One choice of a group.
#[derive(Clone, Debug)]
pub struct Strategy {
    /// Seconds of compute of all members, in all layers.
    pub seconds: f64,
    /// Bytes a rank keeps between steps, at the turn from forward to backward, and of gradients.
    pub kept_bytes: f64,
    pub saved_bytes: f64,
    pub gradient_bytes: f64,
    /// Seconds that the user's preferences put on top; no part of the step.
    pub dislike_s: f64,
    /// Layouts at the group's ports.
    pub codes: Vec<Code>,
    /// Placements of the member classes.
    placements: Vec<Placement>,
}

/// A leader and its followers, or a source.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: String,
    pub strategies: Vec<Strategy>,
    ports: BTreeMap<Port, usize>,
    /// Classes of ops, the leader first; empty for sources and outputs.
    members: Vec<usize>,
}

/// A tensor made in one layout and read in others within one phase.
#[derive(Clone, Debug)]
pub struct Net {
    pub ty: TensorType,
    /// How often it occurs.
    pub weight: f64,
    /// Group and port of the maker, and of the readers.
    pub from: (usize, usize),
    pub to: Vec<(usize, usize)>,
}

/// The whole problem.
#[derive(Clone, Debug)]
pub struct Instance {
    pub groups: Vec<Group>,
    pub nets: Vec<Net>,
}

impl Net {
    /// All layouts that its ends may take, without repeats, in order.
    pub fn codes(&self, instance: &Instance) -> Vec<Code> {
        let ends = std::iter::once(&self.from).chain(&self.to);
        let codes: BTreeSet<Code> = ends
            .flat_map(|(group, port)| {
                let strategies = instance.groups[*group].strategies.iter();
                strategies.map(move |strategy| strategy.codes[*port])
            })
            .collect();
        codes.into_iter().collect()
    }
}

/// Factors and dims that the plans of simpler meshes use, by class of ops and of sources: the only
/// ones that are tried on meshes of many axes, where all products of all factors are too many.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Habits {
    ops: Vec<BTreeSet<Dim>>,
    sources: Vec<BTreeSet<Dim>>,
}

impl Habits {
    /// Adds what a plan does, whatever the names of its axes.
    pub fn learn(&mut self, graph: &Graph, classes: &Classes, plan: &Plan) {
        self.ops.resize(classes.ops.len(), BTreeSet::new());
        self.sources.resize(classes.sources.len(), BTreeSet::new());
        for (class, ops) in classes.ops.iter().enumerate() {
            let first = ops
                .first()
                .and_then(|op_id| plan.placements.get(op_id.index()));
            self.ops[class].extend(
                first
                    .into_iter()
                    .flat_map(|one| one.factors.values().cloned()),
            );
        }
        for (class, sources) in classes.sources.iter().enumerate() {
            for id in sources.iter().take(1) {
                let layout = plan.source_layout(*id);
                let dims = graph.ty(*id).dims();
                let used = dims.filter(|dim| !layout.axes_of(dim).is_empty());
                self.sources[class].extend(used.cloned());
            }
        }
    }

    /// Allows these factors and dims everywhere.
    pub fn allow(&mut self, dims: &BTreeSet<Dim>) {
        for known in self.ops.iter_mut().chain(&mut self.sources) {
            known.extend(dims.iter().cloned());
        }
    }
}

/// Builds the problem of a grid.
///
/// # Errors
/// A group whose strategies all break a rule.
pub fn build_instance(
    graph: &Graph,
    classes: &Classes,
    grid: &Grid,
    rules: &Rules,
    habits: Option<&Habits>,
    metric: &mut Metric,
) -> Result<Instance, NoStrategy> {
    let mut builder = Builder {
        graph,
        classes,
        grid,
        rules,
        habits,
        facts: Facts::new(graph),
        group_of: vec![0; classes.ops.len()],
        instance: Instance {
            groups: Vec::new(),
            nets: Vec::new(),
        },
    };
    for class in 0..classes.ops.len() {
        builder.add_class(class, metric)?;
    }
    builder.add_sources()?;
    builder.add_nets(metric)?;
    Ok(builder.instance)
}

struct Builder<'a> {
    graph: &'a Graph,
    classes: &'a Classes,
    grid: &'a Grid,
    rules: &'a Rules,
    habits: Option<&'a Habits>,
    facts: Facts,
    group_of: Vec<usize>,
    instance: Instance,
}

impl Builder<'_> {
    fn first_op(&self, class: usize) -> &Op {
        self.graph.op(self.classes.ops[class][0])
    }

    fn add_class(&mut self, class: usize, metric: &mut Metric) -> Result<(), NoStrategy> {
        if self.follow(class, metric) || self.join_sibling(class) {
            return Ok(());
        }
        let op = self.first_op(class);
        let name = super::classes::class_name(self.graph.op_name(op));
        let factors = op_factors(self.graph, op);
        let pinned = self.statements_on(class);
        let habits = self.habits.and_then(|habits| habits.ops.get(class));
        let habits = habits.filter(|_| pinned.is_empty());
        let mut placements = self.placements(op, &factors, pinned.is_empty(), habits);
        placements.retain(|placement| self.keeps_rules(class, &factors, placement));
        let strategies: Vec<Strategy> = placements
            .into_iter()
            .filter_map(|placement| self.member(class, &factors, &placement))
            .map(|member| member.alone())
            .collect();
        if strategies.is_empty() {
            return Err(NoStrategy {
                name,
                statements: pinned,
            });
        }
        let n_inputs = op.inputs.len();
        let ports = (0..n_inputs)
            .map(|input_idx| Port::Input(class, input_idx))
            .chain((0..op.results.len()).map(|result_idx| Port::Result(class, result_idx)))
            .enumerate()
            .map(|(port_idx, port)| (port, port_idx))
            .collect();
        self.group_of[class] = self.instance.groups.len();
        self.instance.groups.push(Group {
            name,
            strategies,
            ports,
            members: vec![class],
        });
        Ok(())
    }

    fn statements_on(&self, class: usize) -> Vec<usize> {
        let mut statements = BTreeSet::new();
        for op_id in &self.classes.ops[class] {
            statements.extend(self.rules.about(Subject::Op(*op_id)));
            for result in &self.graph.op(*op_id).results {
                statements.extend(self.rules.about(Subject::Tensor(*result)));
            }
        }
        statements.into_iter().collect()
    }

    /// Every way to give each axis a factor or none. When `prune`, heavy ops are never replicated and
    /// never split along the width of a head.
    fn placements(
        &self,
        op: &Op,
        factors: &[Factor],
        prune: bool,
        habits: Option<&BTreeSet<Dim>>,
    ) -> Vec<Placement> {
        let (inputs, results) = op_types(self.graph, op);
        let n_ranks: usize = self.grid.axes.iter().map(|axis| axis.degree).product();
        let is_heavy = op.kind.is_matmul()
            && op.kind.n_flops(&inputs, &results) > 1e-4 * self.facts.total_flops;
        let useful: Vec<&Factor> = factors
            .iter()
            .filter(|factor| {
                let is_whole = self.facts.whole_dims.contains(&factor.name);
                let is_usual = habits.is_none_or(|habits| habits.contains(&factor.name));
                is_usual && (!prune || !(is_whole || shares_keys(op, factor, &inputs, n_ranks)))
            })
            .collect();
        let mut partial: Vec<(Placement, Vec<(Dim, usize)>)> = vec![Default::default()];
        for axis in &self.grid.axes {
            let mut longer = Vec::new();
            for (placement, used) in &partial {
                longer.push((placement.clone(), used.clone()));
                for factor in &useful {
                    let before = used.iter().find(|(name, _)| *name == factor.name);
                    let degree = before.map_or(1, |(_, degree)| *degree) * axis.degree;
                    if !factor.admits(degree) {
                        continue;
                    }
                    let mut next = (placement.clone(), used.clone());
                    next.0
                        .factors
                        .insert(axis.axis.clone(), factor.name.clone());
                    next.1.retain(|(name, _)| *name != factor.name);
                    next.1.push((factor.name.clone(), degree));
                    longer.push(next);
                }
            }
            partial = longer;
        }
        let mut placements: Vec<Placement> = partial
            .into_iter()
            .map(|(placement, _)| placement)
            .collect();
        if prune && is_heavy {
            let n_axes = self.grid.axes.len();
            let full = |placement: &Placement| placement.factors.len() == n_axes;
            if placements.iter().any(full) {
                placements.retain(full);
            }
        }
        placements
    }

    fn keeps_rules(&self, class: usize, factors: &[Factor], placement: &Placement) -> bool {
        if self.rules.is_empty() {
            return true;
        }
        self.classes.ops[class].iter().all(|op_id| {
            let op = self.graph.op(*op_id);
            let same = self
                .rules
                .admit_placement(*op_id, placement, &self.grid.mesh);
            let layouts =
                placement.layouts(factors, op.inputs.len(), op.results.len(), &self.grid.mesh);
            same && op.results.iter().zip(&layouts.results).all(|(id, layout)| {
                let ty = self.graph.ty(*id);
                let code = self.grid.code(layout, ty);
                code.is_some_and(|code| self.rules.admit(*id, code, ty, self.grid))
            })
        })
    }

    /// Seconds of one per cent of the fastest conceivable step: all work, evenly divided.
    fn per_cent_s(&self) -> f64 {
        let device = &self.grid.cluster.device;
        let speed = device.matmul_peak(DType::F32) * device.matmul_efficiency;
        0.01 * self.facts.total_flops / speed / self.grid.mesh.n_ranks() as f64
    }

    fn dislike_s(&self, class: usize, placement: &Placement, codes: &[Code]) -> f64 {
        if self.rules.is_empty() {
            return 0.0;
        }
        let mut per_cent = 0.0;
        for op_id in &self.classes.ops[class] {
            let op = self.graph.op(*op_id);
            per_cent += self
                .rules
                .dislike_placement(*op_id, placement, &self.grid.mesh);
            for (id, code) in op.results.iter().zip(&codes[op.inputs.len()..]) {
                per_cent += self
                    .rules
                    .dislike(*id, *code, self.graph.ty(*id), self.grid);
            }
        }
        per_cent * self.per_cent_s()
    }

    fn source_dislike_s(&self, members: &[TensorId], code: Code, ty: &TensorType) -> f64 {
        let per_cent = |id: &TensorId| self.rules.dislike(*id, code, ty, self.grid);
        members.iter().map(per_cent).sum::<f64>() * self.per_cent_s()
    }

    /// One class under a placement; `None` where a layout is illegal.
    fn member(&self, class: usize, factors: &[Factor], placement: &Placement) -> Option<Member> {
        let op = self.first_op(class);
        let mesh = &self.grid.mesh;
        let layouts = placement.layouts(factors, op.inputs.len(), op.results.len(), mesh);
        let all = op.inputs.iter().zip(&layouts.inputs);
        let all = all.chain(op.results.iter().zip(&layouts.results));
        let mut codes = Vec::with_capacity(op.inputs.len() + op.results.len());
        let mut locals = Vec::with_capacity(codes.capacity());
        for (id, layout) in all {
            let ty = self.graph.ty(*id);
            let code = self.grid.code(layout, ty)?;
            if !self.grid.is_legal(code, ty) {
                return None;
            }
            codes.push(code);
            locals.push(self.grid.local(code, ty));
        }
        let n_times = self.classes.ops[class].len() as f64;
        let mut member = Member {
            placement: placement.clone(),
            seconds: self.facts.seconds(op, &locals, &self.grid.cluster) * n_times,
            saved_bytes: 0.0,
            gradient_bytes: 0.0,
            dislike_s: self.dislike_s(class, placement, &codes),
            codes,
        };
        for op_id in &self.classes.ops[class] {
            let results = &self.graph.op(*op_id).results;
            for (id, local) in results.iter().zip(&locals[op.inputs.len()..]) {
                let n_bytes = local.n_bytes() as f64;
                if self.facts.is_saved[id.index()] {
                    member.saved_bytes += n_bytes;
                }
                if self.facts.is_gradient[id.index()] {
                    member.gradient_bytes += n_bytes;
                }
            }
        }
        Some(member)
    }

    /// Adds a class to the group of the op that makes its widest operand, where it can follow.
    fn follow(&mut self, class: usize, metric: &mut Metric) -> bool {
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
    fn join_sibling(&mut self, class: usize) -> bool {
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
            strategy.dislike_s += member.dislike_s;
            strategy.codes.extend(member.codes);
            strategy.placements.push(member.placement);
        }
        self.group_of[class] = group_idx;
    }

    /// Kept layouts: those of optimizer state are what its update works on, all others are chosen.
    fn add_sources(&mut self) -> Result<(), NoStrategy> {
        for source_class in 0..self.classes.sources.len() {
            let members = &self.classes.sources[source_class];
            let first = members[0];
            let ty = self.graph.ty(first);
            let n_times = members.len() as f64;
            if let Some((group_idx, port)) = self.state_port(source_class) {
                let grid = self.grid;
                let rules = self.rules;
                let group = &mut self.instance.groups[group_idx];
                group.strategies.retain(|strategy| {
                    let code = strategy.codes[port];
                    members.iter().all(|id| rules.admit(*id, code, ty, grid))
                });
                if group.strategies.is_empty() {
                    return Err(self.no_source(source_class));
                }
                for strategy in &mut group.strategies {
                    strategy.kept_bytes += n_times * grid.local_bytes(strategy.codes[port], ty);
                }
                group.ports.insert(Port::Source(source_class), port);
                continue;
            }
            let rules_about = |id: &TensorId| self.rules.about(Subject::Tensor(*id)).next();
            let has_rule = members.iter().any(|id| rules_about(id).is_some());
            let habits = self
                .habits
                .and_then(|habits| habits.sources.get(source_class));
            let may_shard = |dim_idx: usize| {
                has_rule
                    || ty.shape.get(dim_idx).is_some_and(|(dim, _)| {
                        habits.is_none_or(|habits| habits.contains(dim))
                            && (!self.facts.whole_dims.contains(dim) || ty.shape.len() == 1)
                    })
            };
            let codes = self.grid.kept_codes(ty, may_shard);
            let strategies: Vec<Strategy> = codes
                .into_iter()
                .filter(|code| {
                    let mut all = members.iter();
                    all.all(|id| self.rules.admit(*id, *code, ty, self.grid))
                })
                .map(|code| Strategy {
                    seconds: 0.0,
                    kept_bytes: n_times * self.grid.local_bytes(code, ty),
                    saved_bytes: 0.0,
                    gradient_bytes: 0.0,
                    dislike_s: self.source_dislike_s(members, code, ty),
                    codes: vec![code],
                    placements: Vec::new(),
                })
                .collect();
            if strategies.is_empty() {
                return Err(self.no_source(source_class));
            }
            self.instance.groups.push(Group {
                name: super::classes::class_name(&self.graph.tensor(first).name),
                strategies,
                ports: [(Port::Source(source_class), 0)].into(),
                members: Vec::new(),
            });
        }
        Ok(())
    }

    fn no_source(&self, source_class: usize) -> NoStrategy {
        let members = &self.classes.sources[source_class];
        let mut statements = BTreeSet::new();
        for id in members {
            statements.extend(self.rules.about(Subject::Tensor(*id)));
        }
        NoStrategy {
            name: super::classes::class_name(&self.graph.tensor(members[0]).name),
            statements: statements.into_iter().collect(),
        }
    }

    /// The operand port of the one class of ops that reads and updates a class of states.
    fn state_port(&self, source_class: usize) -> Option<(usize, usize)> {
        let members = &self.classes.sources[source_class];
        let reader = |id: &TensorId| {
            let Role::State { .. } = self.graph.tensor(*id).role else {
                return None;
            };
            let [reader] = self.facts.consumers[id.index()].as_slice() else {
                return None;
            };
            let updated = self.graph.updates.get(id)?;
            if self.facts.producers[updated.index()] != Some(*reader) {
                return None;
            }
            let inputs = &self.graph.op(*reader).inputs;
            let input_idx = inputs.iter().position(|input| input == id)?;
            Some((self.classes.of_op[reader.index()], input_idx))
        };
        let first = reader(members.first()?)?;
        if members.iter().any(|id| reader(id) != Some(first)) {
            return None;
        }
        let group_idx = self.group_of[first.0];
        let ports = &self.instance.groups[group_idx].ports;
        let port = ports.get(&Port::Input(first.0, first.1))?;
        Some((group_idx, *port))
    }

    fn port(&self, port: Port) -> Option<(usize, usize)> {
        let group_idx = match port {
            Port::Input(class, _) | Port::Result(class, _) => *self.group_of.get(class)?,
            Port::Source(_) | Port::Output(_) => {
                let mut groups = self.instance.groups.iter();
                groups.position(|group| group.ports.contains_key(&port))?
            }
        };
        let group = self.instance.groups.get(group_idx)?;
        Some((group_idx, *group.ports.get(&port)?))
    }

    fn add_nets(&mut self, metric: &mut Metric) -> Result<(), NoStrategy> {
        // (maker, readers of one phase) → the type, a name, how often.
        let mut nets: BTreeMap<(Port, Vec<Port>), (TensorId, f64)> = BTreeMap::new();
        let mut updated: BTreeMap<TensorId, Vec<usize>> = BTreeMap::new();
        for (source, value) in &self.graph.updates {
            let class = self.classes.of_source[source.index()];
            updated.entry(*value).or_default().extend(class);
        }
        let mut output_types: Vec<TensorType> = Vec::new();
        for id in self.graph.tensor_ids() {
            let maker = match self.facts.producers[id.index()] {
                Some(op_id) => {
                    let results = &self.graph.op(op_id).results;
                    let result_idx = results.iter().position(|result| *result == id).unwrap_or(0);
                    Port::Result(self.classes.of_op[op_id.index()], result_idx)
                }
                None => match self.classes.of_source[id.index()] {
                    Some(class) => Port::Source(class),
                    None => continue,
                },
            };
            let mut phases: [Vec<Port>; 3] = Default::default();
            for op_id in &self.facts.consumers[id.index()] {
                let phase = usize::from(op_id.index() >= self.facts.n_forward);
                let class = self.classes.of_op[op_id.index()];
                let inputs = &self.graph.op(*op_id).inputs;
                for (input_idx, input) in inputs.iter().enumerate() {
                    if *input == id {
                        phases[phase].push(Port::Input(class, input_idx));
                    }
                }
            }
            for class in updated.get(&id).into_iter().flatten() {
                phases[1].push(Port::Source(*class));
            }
            if self.graph.outputs.contains(&id) {
                let ty = self.graph.ty(id);
                let known = output_types.iter().position(|other| other == ty);
                let type_idx = known.unwrap_or_else(|| {
                    output_types.push(ty.clone());
                    output_types.len() - 1
                });
                phases[2].push(Port::Output(type_idx));
            }
            for mut readers in phases {
                readers.sort_unstable();
                readers.dedup();
                if !readers.is_empty() {
                    nets.entry((maker, readers)).or_insert((id, 0.0)).1 += 1.0;
                }
            }
        }
        for (type_idx, ty) in output_types.iter().enumerate() {
            let codes = self.grid.kept_codes(ty, |_| true);
            self.instance.groups.push(Group {
                name: "output".into(),
                strategies: codes
                    .into_iter()
                    .map(|code| Strategy {
                        seconds: 0.0,
                        kept_bytes: 0.0,
                        saved_bytes: 0.0,
                        gradient_bytes: 0.0,
                        dislike_s: 0.0,
                        codes: vec![code],
                        placements: Vec::new(),
                    })
                    .collect(),
                ports: [(Port::Output(type_idx), 0)].into(),
                members: Vec::new(),
            });
        }
        for ((maker, readers), (id, weight)) in nets {
            let Some(from) = self.port(maker) else {
                continue;
            };
            let ty = self.graph.ty(id);
            let (mut inner, mut to) = (Vec::new(), Vec::new());
            for port in readers.iter().filter_map(|port| self.port(*port)) {
                if port.0 == from.0 {
                    inner.push(port.1);
                } else if !to.contains(&port) {
                    to.push(port);
                }
            }
            // Within one group both ends follow from the strategy.
            let group = &mut self.instance.groups[from.0];
            for port in inner {
                for strategy in &mut group.strategies {
                    let seconds = metric.seconds(ty, strategy.codes[from.1], strategy.codes[port]);
                    strategy.seconds += weight * seconds;
                }
            }
            group
                .strategies
                .retain(|strategy| strategy.seconds.is_finite());
            if group.strategies.is_empty() {
                return Err(NoStrategy {
                    name: group.name.clone(),
                    statements: Vec::new(),
                });
            }
            self.merge_equal_readers(&mut to);
            if !to.is_empty() {
                self.instance.nets.push(Net {
                    ty: ty.clone(),
                    weight,
                    from,
                    to,
                });
            }
        }
        Ok(())
    }
}

impl Builder<'_> {
    /// Readers in one group that want the same layout whatever the strategy count once.
    fn merge_equal_readers(&self, to: &mut Vec<(usize, usize)>) {
        let mut kept: Vec<(usize, usize)> = Vec::with_capacity(to.len());
        for end in to.iter() {
            let strategies = &self.instance.groups[end.0].strategies;
            let is_known = kept.iter().any(|known| {
                let mut all = strategies.iter();
                known.0 == end.0 && all.all(|one| one.codes[known.1] == one.codes[end.1])
            });
            if !is_known {
                kept.push(*end);
            }
        }
        *to = kept;
    }
}

/// A class under one placement.
struct Member {
    placement: Placement,
    seconds: f64,
    saved_bytes: f64,
    gradient_bytes: f64,
    dislike_s: f64,
    codes: Vec<Code>,
}

impl Member {
    fn alone(self) -> Strategy {
        Strategy {
            seconds: self.seconds,
            kept_bytes: 0.0,
            saved_bytes: self.saved_bytes,
            gradient_bytes: self.gradient_bytes,
            dislike_s: self.dislike_s,
            codes: self.codes,
            placements: vec![self.placement],
        }
    }
}

impl Instance {
    /// The plan of an assignment: one strategy index per group.
    pub fn plan(
        &self,
        assignment: &[usize],
        graph: &Graph,
        classes: &Classes,
        grid: &Grid,
        name: &str,
    ) -> Plan {
        let mut plan = Plan::replicated(name, graph, grid.mesh.clone());
        for (group, choice) in self.groups.iter().zip(assignment) {
            let Some(strategy) = group.strategies.get(*choice) else {
                continue;
            };
            for (class, placement) in group.members.iter().zip(&strategy.placements) {
                for op_id in &classes.ops[*class] {
                    plan.placements[op_id.index()] = placement.clone();
                }
            }
            for (port, port_idx) in &group.ports {
                let Port::Source(class) = port else { continue };
                for id in &classes.sources[*class] {
                    let layout = grid.layout(strategy.codes[*port_idx], graph.ty(*id));
                    if !layout.is_replicated() {
                        plan.sources.insert(*id, layout);
                    }
                }
            }
        }
        plan
    }
}

/// Whether a factor of attention splits queries that share keys although the key heads go round.
fn shares_keys(op: &Op, factor: &Factor, inputs: &[&TensorType], n_ranks: usize) -> bool {
    let (OpKind::Attention(dims) | OpKind::AttentionGrad(dims)) = &op.kind else {
        return false;
    };
    let [q, k, ..] = inputs else { return false };
    let is_shared = factor.name != dims.seq && q.has(&factor.name) && !k.has(&factor.name);
    let heads = k
        .shape
        .iter()
        .filter(|(dim, _)| *dim != dims.kv_seq && *dim != dims.head);
    is_shared
        && heads
            .map(|(_, size)| *size)
            .max()
            .is_some_and(|size| size >= n_ranks)
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
