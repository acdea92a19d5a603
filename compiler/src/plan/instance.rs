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

mod follow;
mod nets;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, TensorId, TensorType};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{Factor, OpKind};
use meshweave_dsl::plan::{Placement, Plan, Tie, op_factors};

use super::classes::{Classes, label};
use super::directives::Subject;
use super::facts::{Facts, op_types};
use super::grid::{Code, Grid};
use super::metric::Metric;
use super::network::{Edge, End, Network, Node, Wire};
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
    /// The most bytes that one member works on.
    pub working_bytes: f64,
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

/// Builds the problem of a grid.
///
/// # Errors
/// A group whose strategies all break a rule.
pub fn build_instance(
    graph: &Graph,
    classes: &Classes,
    grid: &Grid,
    rules: &Rules,
    metric: &mut Metric,
) -> Result<Instance, NoStrategy> {
    let mut builder = Builder {
        graph,
        classes,
        grid,
        rules,
        facts: Facts::new(graph),
        alike_of: alike(graph, classes, rules),
        units: RefCell::default(),
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

/// The tied class of every class.
fn alike(graph: &Graph, classes: &Classes, rules: &Rules) -> Vec<usize> {
    match classes.tie {
        Tie::Layers => (0..classes.ops.len()).collect(),
        Tie::None => {
            let tied = Classes::new(graph, rules, Tie::Layers);
            let firsts = classes.ops.iter().map(|ops| ops[0]);
            firsts.map(|op_id| tied.of_op[op_id.index()]).collect()
        }
    }
}

/// What was priced before; `None` where a placement is illegal.
type UnitsByPlacement = HashMap<Placement, Option<Rc<Unit>>>;

struct Builder<'a> {
    graph: &'a Graph,
    classes: &'a Classes,
    grid: &'a Grid,
    rules: &'a Rules,
    facts: Facts,
    /// For every class, the number of the classes that differ from it in the layer alone.
    alike_of: Vec<usize>,
    units: RefCell<HashMap<(usize, u64), UnitsByPlacement>>,
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
        let name = label(self.graph.op_name(op), self.classes.ops[class].len());
        let factors = op_factors(self.graph, op);
        let pinned = self.statements_on(class);
        let mut placements = self.placements(op, &factors, pinned.is_empty());
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
    fn placements(&self, op: &Op, factors: &[Factor], prune: bool) -> Vec<Placement> {
        let (inputs, results) = op_types(self.graph, op);
        let n_ranks: usize = self.grid.axes.iter().map(|axis| axis.degree).product();
        let is_heavy = op.kind.is_matmul()
            && op.kind.n_flops(&inputs, &results) > 1e-4 * self.facts.total_flops;
        let useful: Vec<&Factor> = factors
            .iter()
            .filter(|factor| {
                let is_whole = self.facts.whole_dims.contains(&factor.name);
                !prune || !(is_whole || shares_keys(op, factor, &inputs, n_ranks))
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
        let unit = self.unit(class, factors, placement)?;
        let n_times = self.classes.ops[class].len() as f64;
        let mut member = Member {
            working_bytes: unit.working_bytes,
            placement: placement.clone(),
            seconds: unit.seconds * n_times,
            saved_bytes: 0.0,
            gradient_bytes: 0.0,
            dislike_s: self.dislike_s(class, placement, &unit.codes),
            codes: unit.codes.clone(),
        };
        for op_id in &self.classes.ops[class] {
            let results = &self.graph.op(*op_id).results;
            for (id, n_bytes) in results.iter().zip(&unit.n_bytes[op.inputs.len()..]) {
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

    /// One op of a class under a placement. Equal layers ask for the same ones: they are remembered.
    fn unit(&self, class: usize, factors: &[Factor], placement: &Placement) -> Option<Rc<Unit>> {
        let op = self.first_op(class);
        let all = op.inputs.iter().chain(&op.results);
        let fused = all.clone().map(|id| self.facts.is_fused[id.index()]);
        let fused = fused.fold(0_u64, |bits, is_fused| bits << 1 | u64::from(is_fused));
        let key = (self.alike_of[class], fused);
        if let Some(known) = self.units.borrow().get(&key)
            && let Some(unit) = known.get(placement)
        {
            return unit.clone();
        }
        let mesh = &self.grid.mesh;
        let layouts = placement.layouts(factors, op.inputs.len(), op.results.len(), mesh);
        let result_layouts = &layouts.results;
        let layouts = layouts.inputs.iter().chain(result_layouts);
        let mut unit = Unit::default();
        let mut locals = Vec::with_capacity(op.inputs.len() + op.results.len());
        let mut is_legal = true;
        for (id, layout) in all.zip(layouts) {
            let ty = self.graph.ty(*id);
            let code = self.grid.code(layout, ty);
            let Some(code) = code.filter(|code| self.grid.is_legal(*code, ty)) else {
                is_legal = false;
                break;
            };
            let local = self.grid.local(code, ty);
            unit.codes.push(code);
            unit.n_bytes.push(local.n_bytes() as f64);
            locals.push(local);
        }
        let unit = is_legal.then(|| {
            unit.seconds = self.facts.seconds(op, &locals, &self.grid.cluster);
            if let Some(rows) = result_layouts.first().zip(locals.last()) {
                unit.seconds += self.facts.exchange_seconds(op, rows, self.grid);
            }
            unit.working_bytes = unit.n_bytes.iter().sum();
            Rc::new(unit)
        });
        let mut units = self.units.borrow_mut();
        let known = units.entry(key).or_default();
        known.insert(placement.clone(), unit.clone());
        unit
    }
}

/// One op under one placement.
#[derive(Clone, Debug, Default)]
struct Unit {
    seconds: f64,
    /// Layouts and bytes of operands and results.
    codes: Vec<Code>,
    n_bytes: Vec<f64>,
    working_bytes: f64,
}

/// A class under one placement.
struct Member {
    placement: Placement,
    seconds: f64,
    saved_bytes: f64,
    gradient_bytes: f64,
    working_bytes: f64,
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
            working_bytes: self.working_bytes,
            dislike_s: self.dislike_s,
            codes: self.codes,
            placements: vec![self.placement],
        }
    }
}

impl Instance {
    /// The compute of every group at its fastest.
    pub fn least_seconds(&self) -> f64 {
        let groups = self.groups.iter();
        let least = groups.map(|group| {
            let strategies = group.strategies.iter();
            strategies
                .map(|one| one.seconds)
                .fold(f64::INFINITY, f64::min)
        });
        least.sum()
    }

    /// The most that preferences may put on top of the seconds of an assignment.
    pub fn greatest_dislike_s(&self) -> f64 {
        let groups = self.groups.iter();
        let greatest = groups.map(|group| {
            let strategies = group.strategies.iter();
            strategies.map(|one| one.dislike_s).fold(0.0, f64::max)
        });
        greatest.sum()
    }

    /// The assignment that stands for a plan; `None` where a group has no such strategy.
    pub fn assignment(
        &self,
        plan: &Plan,
        graph: &Graph,
        classes: &Classes,
        grid: &Grid,
    ) -> Option<Vec<usize>> {
        let kept_as_planned = |group: &Group, strategy: &Strategy| {
            group.ports.iter().all(|(port, port_idx)| {
                let Port::Source(class) = port else {
                    return true;
                };
                let id = classes.sources[*class][0];
                let code = grid.code(&plan.source_layout(id), graph.ty(id));
                code == Some(strategy.codes[*port_idx])
            })
        };
        let placed_as_planned = |group: &Group, strategy: &Strategy| {
            let mut members = group.members.iter().zip(&strategy.placements);
            members.all(|(class, placement)| {
                let op_id = classes.ops[*class][0];
                plan.placements.get(op_id.index()) == Some(placement)
            })
        };
        let groups = self.groups.iter();
        groups
            .map(|group| {
                let mut strategies = group.strategies.iter();
                strategies
                    .position(|one| placed_as_planned(group, one) && kept_as_planned(group, one))
            })
            .collect()
    }

    /// The problem as numbers. Nets whose ends have one layout cost nothing and are left out.
    pub fn network(&self, metric: &mut Metric) -> Network {
        let mut network = Network::default();
        for group in &self.groups {
            let all = group.strategies.iter();
            network.nodes.push(Node {
                strategies: (0..group.strategies.len()).collect(),
                seconds: all.clone().map(|one| one.seconds + one.dislike_s).collect(),
                bytes: all
                    .clone()
                    .map(|one| {
                        let kept = one.kept_bytes;
                        [kept + one.saved_bytes, kept + one.gradient_bytes]
                    })
                    .collect(),
                working_bytes: all.map(|one| one.working_bytes).collect(),
                edges: Vec::new(),
            });
        }
        for net in &self.nets {
            let codes = net.codes(self);
            if codes.len() < 2 {
                continue;
            }
            let idx_of = |(group, port): (usize, usize)| {
                let strategies = self.groups[group].strategies.iter();
                let idx = |code: &Code| codes.binary_search(code).unwrap_or(0) as u16;
                strategies
                    .map(|strategy| idx(&strategy.codes[port]))
                    .collect::<Vec<u16>>()
            };
            let made = idx_of(net.from);
            let net_idx = network.nets.len();
            let first_edge = network.edges.len();
            for to in &net.to {
                let edge_idx = network.edges.len();
                network.nodes[net.from.0].edges.push((edge_idx, End::Maker));
                network.nodes[to.0].edges.push((edge_idx, End::Reader));
                network.edges.push(Edge {
                    net: net_idx,
                    maker: net.from.0,
                    reader: to.0,
                    made: made.clone(),
                    read: idx_of(*to),
                });
            }
            network.nets.push(Wire {
                weight: net.weight,
                reshards: metric.reshards(&net.ty, &codes, net.to.len() > 1),
                first_edge,
                n_edges: net.to.len(),
            });
        }
        network
    }

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
