//! Kept sources and the nets between groups.
//!
//! Enters: the groups of all ops. Leaves: groups of sources and outputs, and every net.
//! Invariant: a net stands for all tensors that have the same maker and the same readers in a phase.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::{Role, TensorId, TensorType};

use super::{Builder, Group, Net, NoStrategy, Port, Strategy};
use crate::plan::classes::label;
use crate::plan::directives::Subject;
use crate::plan::metric::Metric;

impl Builder<'_> {
    /// Kept layouts: those of optimizer state are what its update works on, all others are chosen.
    pub(super) fn add_sources(&mut self) -> Result<(), NoStrategy> {
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
            let may_shard = |dim_idx: usize| {
                has_rule
                    || ty.shape.get(dim_idx).is_some_and(|(dim, _)| {
                        !self.facts.whole_dims.contains(dim) || ty.shape.len() == 1
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
                    working_bytes: 0.0,
                    dislike_s: self.source_dislike_s(members, code, ty),
                    codes: vec![code],
                    placements: Vec::new(),
                })
                .collect();
            if strategies.is_empty() {
                return Err(self.no_source(source_class));
            }
            self.instance.groups.push(Group {
                name: label(&self.graph.tensor(first).name, members.len()),
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
            name: label(&self.graph.tensor(members[0]).name, members.len()),
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

    fn port(&self, port: Port, keepers: &BTreeMap<Port, usize>) -> Option<(usize, usize)> {
        let group_idx = match port {
            Port::Input(class, _) | Port::Result(class, _) => *self.group_of.get(class)?,
            Port::Source(_) | Port::Output(_) => *keepers.get(&port)?,
        };
        let group = self.instance.groups.get(group_idx)?;
        Some((group_idx, *group.ports.get(&port)?))
    }

    pub(super) fn add_nets(&mut self, metric: &mut Metric) -> Result<(), NoStrategy> {
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
                    let share = self.facts.shares[id.index()];
                    nets.entry((maker, readers)).or_insert((id, 0.0)).1 += share;
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
                        working_bytes: 0.0,
                        dislike_s: 0.0,
                        codes: vec![code],
                        placements: Vec::new(),
                    })
                    .collect(),
                ports: [(Port::Output(type_idx), 0)].into(),
                members: Vec::new(),
            });
        }
        let mut keepers: BTreeMap<Port, usize> = BTreeMap::new();
        for (group_idx, group) in self.instance.groups.iter().enumerate() {
            let ports = group.ports.keys();
            let kept = ports.filter(|port| matches!(port, Port::Source(_) | Port::Output(_)));
            keepers.extend(kept.map(|port| (*port, group_idx)));
        }
        for ((maker, readers), (id, weight)) in nets {
            let Some(from) = self.port(maker, &keepers) else {
                continue;
            };
            let ty = self.graph.ty(id);
            let (mut inner, mut to) = (Vec::new(), Vec::new());
            for port in readers.iter().filter_map(|port| self.port(*port, &keepers)) {
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
