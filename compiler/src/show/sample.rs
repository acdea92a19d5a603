//! A small decoder with its plan, local graph, program and timelines, for the tests of this module.
//!
//! The structure is that of a real training step (forward, a backward of the products, AdamW); the
//! times are made up, with a jitter that is the same on every machine.

use std::collections::BTreeMap;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Init, Op, OpId, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::{AttentionDims, BinaryFn, Group, OpKind, UnaryFn};
use meshweave_dsl::plan::{Placement, Plan, op_factors};
use meshweave_dsl::program::{
    Action, Buffer, BufferId, GlobalTensor, Instruction, PROGRAM_VERSION, Program, RankProgram,
    TensorPart,
};
use meshweave_dsl::timeline::{Basis, Event, Timeline};

use super::fold::category;
use super::{ActionGrid, Figure, FigureSource, FigureValue, ReportInput};
use crate::schedule::{self, Builtin, Costs, Shape, simulate};

/// Degrees of data and tensor parallelism in the sample.
const DP: usize = 2;
const TP: usize = 4;

/// The global graph.
pub(super) fn decoder(n_layers: usize) -> Graph {
    build(n_layers, 1, 1)
}

/// One rank's graph: batch over dp, heads, ffn and vocab over tp.
fn local(n_layers: usize) -> Graph {
    build(n_layers, DP, TP)
}

struct Builder {
    graph: Graph,
    dp: usize,
    tp: usize,
}

fn build(n_layers: usize, dp: usize, tp: usize) -> Graph {
    let mut builder = Builder {
        graph: Graph::new("decoder"),
        dp,
        tp,
    };
    builder.decoder(n_layers);
    builder.graph
}

fn dims(names: &[&str]) -> Vec<Dim> {
    names.iter().map(|name| Dim::from(*name)).collect()
}

impl Builder {
    fn size(&self, dim: &str) -> usize {
        match dim {
            "batch" => 8 / self.dp,
            "seq" => 256,
            "embed" => 512,
            "heads" => 8 / self.tp,
            "head" => 64,
            "ffn" => 1408 / self.tp,
            "vocab" => 4096 / self.tp,
            _ => panic!("no size for {dim}"),
        }
    }

    fn ty(&self, names: &[&str]) -> TensorType {
        TensorType::new(
            DType::F32,
            names.iter().map(|name| (*name, self.size(name))),
        )
    }

    fn param(&mut self, name: &str, names: &[&str]) -> TensorId {
        let ty = self.ty(names);
        let init = Init::Hash {
            stream: self.graph.tensors.len() as u32,
            scale: 0.02,
        };
        self.graph.add_source(name, ty, Role::Param(init))
    }

    fn op(&mut self, name: &str, kind: OpKind, inputs: &[TensorId]) -> TensorId {
        self.graph.add_op(name, kind, inputs).unwrap()[0]
    }

    fn contract(&mut self, name: &str, out: &[&str], a: TensorId, b: TensorId) -> TensorId {
        self.op(name, OpKind::Contract { out: dims(out) }, &[a, b])
    }

    fn group(&self, axis: &str) -> Group {
        Group {
            axes: vec![axis.into()],
            ranks: if axis == "tp" {
                (0..TP).collect()
            } else {
                (0..DP).map(|index| index * TP).collect()
            },
        }
    }

    /// The reduction of a partial sum, in local graphs.
    fn reduced(&mut self, x: TensorId, axis: &str) -> TensorId {
        if self.tp == 1 {
            return x;
        }
        let name = format!("{}.sum_{axis}", self.graph.tensor(x).name);
        let kind = OpKind::AllReduce {
            kind: ReduceKind::Sum,
            group: self.group(axis),
        };
        self.op(&name, kind, &[x])
    }

    fn decoder(&mut self, n_layers: usize) {
        let ids = TensorType::new(
            DType::I32,
            [("batch", self.size("batch")), ("seq", self.size("seq"))],
        );
        let tokens = self.graph.add_source("tokens", ids.clone(), Role::Input);
        let targets = self.graph.add_source("targets", ids, Role::Input);
        let step_ty = TensorType::new(DType::F32, Vec::<(Dim, usize)>::new());
        let step = self.graph.add_source("step", step_ty, Role::Input);
        let wte = self.param("embed.wte", &["vocab", "embed"]);
        let layers: Vec<Vec<TensorId>> = (0..n_layers)
            .map(|layer| {
                let weights: [(&str, &[&str]); 9] = [
                    ("attn.norm", &["embed"]),
                    ("attn.wq", &["embed", "heads", "head"]),
                    ("attn.wk", &["embed", "heads", "head"]),
                    ("attn.wv", &["embed", "heads", "head"]),
                    ("attn.wo", &["heads", "head", "embed"]),
                    ("mlp.norm", &["embed"]),
                    ("mlp.wg", &["embed", "ffn"]),
                    ("mlp.wu", &["embed", "ffn"]),
                    ("mlp.wd", &["ffn", "embed"]),
                ];
                weights
                    .iter()
                    .map(|(name, dims)| self.param(&format!("layers[{layer}].{name}"), dims))
                    .collect()
            })
            .collect();
        let final_norm = self.param("final.norm", &["embed"]);
        let head = self.param("final.head", &["embed", "vocab"]);
        let gather = OpKind::Gather {
            dim: "vocab".into(),
            offset: 0,
        };
        let mut x = self.op("embed.x", gather, &[wte, tokens]);
        x = self.reduced(x, "tp");
        let mut tape: Vec<(TensorId, TensorId, TensorId)> = Vec::new();
        for (layer, weights) in layers.iter().enumerate() {
            x = self.layer(layer, x, weights, &mut tape);
        }
        let x = self.norm("final.x", x, final_norm);
        let logits = self.contract("final.logits", &["batch", "seq", "vocab"], x, head);
        tape.push((x, head, logits));
        let lse = OpKind::Reduce {
            kind: ReduceKind::Lse,
            dims: dims(&["vocab"]),
        };
        let lse = self.op("final.lse", lse, &[logits]);
        let pick = OpKind::Pick {
            dim: "vocab".into(),
            offset: 0,
        };
        let picked = self.op("final.picked", pick, &[logits, targets]);
        let token_loss = self.op(
            "final.token_loss",
            OpKind::Binary(BinaryFn::Sub),
            &[lse, picked],
        );
        let sum = OpKind::Reduce {
            kind: ReduceKind::Sum,
            dims: dims(&["batch", "seq"]),
        };
        let sum = self.op("final.loss_sum", sum, &[token_loss]);
        let sum = self.reduced(sum, "dp");
        let mean = OpKind::Unary(UnaryFn::Scale((1.0 / 2048.0).into()));
        let loss = self.op("loss", mean, &[sum]);
        self.graph.outputs.push(loss);
        let expand = OpKind::Expand {
            dims: self.ty(&["batch", "seq"]).shape,
        };
        let dloss = self.op("grad.final.token_loss", expand, &[loss]);
        let grad = OpKind::CrossEntropyGrad {
            dim: "vocab".into(),
            offset: 0,
        };
        let mut dy = self.op("grad.final.logits", grad, &[logits, lse, targets, dloss]);
        for (input, weight, result) in tape.into_iter().rev() {
            dy = self.backward(input, weight, result, dy);
        }
        let params: Vec<TensorId> = self.graph.params().collect();
        for param in params {
            self.update(param, step);
        }
    }

    fn norm(&mut self, name: &str, x: TensorId, weight: TensorId) -> TensorId {
        let kind = OpKind::RmsNorm {
            dim: "embed".into(),
            eps: 1e-5.into(),
        };
        self.op(name, kind, &[x, weight])
    }

    fn layer(
        &mut self,
        layer: usize,
        x: TensorId,
        weights: &[TensorId],
        tape: &mut Vec<(TensorId, TensorId, TensorId)>,
    ) -> TensorId {
        let at = |name: &str| format!("layers[{layer}].{name}");
        let normed = self.norm(&at("attn.normed"), x, weights[0]);
        let heads = ["batch", "seq", "heads", "head"];
        let q = self.contract(&at("attn.q"), &heads, normed, weights[1]);
        let k = self.contract(&at("attn.k"), &heads, normed, weights[2]);
        let v = self.contract(&at("attn.v"), &heads, normed, weights[3]);
        tape.extend([
            (normed, weights[1], q),
            (normed, weights[2], k),
            (normed, weights[3], v),
        ]);
        let order = dims(&["batch", "heads", "seq", "head"]);
        let [q, k, v] = [("q_rows", q), ("k_rows", k), ("v_rows", v)].map(|(name, x)| {
            self.op(
                &at(&format!("attn.{name}")),
                OpKind::Transpose {
                    dims: order.clone(),
                },
                &[x],
            )
        });
        let rename = |from: &str, to: &str| OpKind::Rename {
            from: from.into(),
            to: to.into(),
        };
        let k = self.op(&at("attn.keys"), rename("seq", "kv_seq"), &[k]);
        let v = self.op(&at("attn.values"), rename("seq", "kv_seq"), &[v]);
        let v = self.op(&at("attn.value"), rename("head", "value"), &[v]);
        let attention = OpKind::Attention(AttentionDims {
            seq: "seq".into(),
            kv_seq: "kv_seq".into(),
            head: "head".into(),
            value: "value".into(),
            scale: 0.125.into(),
            causal: true,
            offset: 0,
        });
        let core = self.op(&at("attn.core"), attention, &[q, k, v]);
        let core = self.op(&at("attn.mixed"), rename("value", "head"), &[core]);
        let out = self.contract(
            &at("attn.out"),
            &["batch", "seq", "embed"],
            core,
            weights[4],
        );
        tape.push((core, weights[4], out));
        let out = self.reduced(out, "tp");
        let add = OpKind::Binary(BinaryFn::Add);
        let x = self.op(&at("attn.residual"), add.clone(), &[x, out]);
        let normed = self.norm(&at("mlp.normed"), x, weights[5]);
        let ffn = ["batch", "seq", "ffn"];
        let gate = self.contract(&at("mlp.gate"), &ffn, normed, weights[6]);
        let up = self.contract(&at("mlp.up"), &ffn, normed, weights[7]);
        let silu = self.op(&at("mlp.silu"), OpKind::Unary(UnaryFn::Silu), &[gate]);
        let hidden = self.op(
            &at("mlp.hidden"),
            OpKind::Binary(BinaryFn::Mul),
            &[silu, up],
        );
        let down = self.contract(
            &at("mlp.down"),
            &["batch", "seq", "embed"],
            hidden,
            weights[8],
        );
        tape.extend([
            (normed, weights[6], gate),
            (normed, weights[7], up),
            (hidden, weights[8], down),
        ]);
        let down = self.reduced(down, "tp");
        self.op(&at("mlp.residual"), add, &[x, down])
    }

    /// The two products of a contraction's gradient; `dy` is resized where the chain is cut short.
    fn backward(&mut self, x: TensorId, weight: TensorId, y: TensorId, dy: TensorId) -> TensorId {
        let y_ty = self.graph.ty(y).clone();
        let y_name = self.graph.tensor(y).name.clone();
        let dy = if self.graph.ty(dy) == &y_ty {
            dy
        } else {
            let dims: Vec<Dim> = self
                .graph
                .ty(dy)
                .dims()
                .filter(|dim| !y_ty.has(dim))
                .cloned()
                .collect();
            let kind = ReduceKind::Sum;
            let sum = OpKind::Reduce { kind, dims };
            let part = self.op(&format!("grad.{y_name}.part"), sum, &[dy]);
            let expand = OpKind::Expand { dims: y_ty.shape };
            self.op(&format!("grad.{y_name}"), expand, &[part])
        };
        let weight_name = self.graph.tensor(weight).name.clone();
        let x_name = self.graph.tensor(x).name.clone();
        let weight_dims: Vec<Dim> = self.graph.ty(weight).dims().cloned().collect();
        let x_dims: Vec<Dim> = self.graph.ty(x).dims().cloned().collect();
        let dw = self.op(
            &format!("grad.{weight_name}"),
            OpKind::Contract { out: weight_dims },
            &[x, dy],
        );
        let dw = self.reduced(dw, "dp");
        self.graph.gradients.insert(weight, dw);
        let dx_name = match weight_name.rsplit('.').next() {
            Some(last) => format!("grad.{x_name}.by_{last}"),
            None => format!("grad.{x_name}"),
        };
        let dx = self.op(&dx_name, OpKind::Contract { out: x_dims }, &[dy, weight]);
        if self
            .graph
            .ty(weight)
            .shape
            .last()
            .is_some_and(|(dim, _)| dim.as_str() != "embed")
        {
            self.reduced(dx, "tp")
        } else {
            dx
        }
    }

    fn update(&mut self, param: TensorId, step: TensorId) {
        let Some(gradient) = self.graph.gradients.get(&param).copied() else {
            return;
        };
        let name = self.graph.tensor(param).name.clone();
        let ty = self.graph.ty(param).clone();
        let [m, v] = ["m", "v"].map(|moment| {
            self.graph.add_source(
                format!("{moment}.{name}"),
                ty.clone(),
                Role::State { of: param },
            )
        });
        let kind = OpKind::Adamw {
            lr: 3e-4.into(),
            beta1: 0.9.into(),
            beta2: 0.95.into(),
            eps: 1e-8.into(),
            decay: 0.1.into(),
        };
        let results = self
            .graph
            .add_op(format!("{name}.next"), kind, &[param, gradient, m, v, step])
            .unwrap();
        for (source, result) in [param, m, v].into_iter().zip(results) {
            self.graph.updates.insert(source, result);
        }
    }
}

fn plan(graph: &Graph, mesh: Mesh) -> Plan {
    let over_tp = ["heads", "ffn", "vocab"];
    let placements = graph
        .ops
        .iter()
        .map(|op| {
            let factors = op_factors(graph, op);
            let mut placement = Placement::default();
            let mut give = |axis: &str, wanted: &[&str]| {
                let factor = factors
                    .iter()
                    .find(|factor| wanted.contains(&factor.name.as_str()));
                if let Some(factor) = factor {
                    placement
                        .factors
                        .insert(Axis::from(axis), factor.name.clone());
                }
            };
            give("dp", &["batch"]);
            give("tp", &over_tp);
            placement
        })
        .collect();
    let mut sources = BTreeMap::new();
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        if tensor.role == Role::Temp {
            continue;
        }
        let mut layout = Layout::replicated();
        for dim in tensor.ty.dims() {
            if over_tp.contains(&dim.as_str()) {
                layout = layout.shard(dim, "tp");
            }
            if dim.as_str() == "batch" {
                layout = layout.shard(dim, "dp");
            }
        }
        if matches!(tensor.role, Role::State { .. }) && tensor.ty.has(&"embed".into()) {
            layout = layout.shard("embed", "dp");
        }
        sources.insert(id, layout);
    }
    Plan {
        name: "decoder on 8 devices".into(),
        mesh,
        placements,
        sources,
        storage: meshweave_dsl::dtype::DType::F32,
        certificate: None,
    }
}

/// Work of an op in the sample: (flops, bytes, seconds).
fn price(graph: &Graph, op: &Op) -> (f64, f64, f64) {
    let types = |ids: &[TensorId]| ids.iter().map(|id| graph.ty(*id)).collect::<Vec<_>>();
    let (inputs, results) = (types(&op.inputs), types(&op.results));
    let n_flops = op.kind.n_flops(&inputs, &results);
    let n_bytes = op.kind.n_bytes_moved(&inputs, &results);
    let rate = if op.kind.is_matmul() { 4.5e10 } else { 2e10 };
    (n_flops, n_bytes, 2e-6 + (n_flops / rate).max(n_bytes / 9e9))
}

fn program(global: &Graph, local: &Graph, plan: &Plan) -> Program {
    let mut last_use = vec![0; local.tensors.len()];
    for (op_id, op) in local.ops() {
        for id in op.inputs.iter().chain(&op.results) {
            last_use[id.index()] = op_id.index();
        }
    }
    let mut offset = 0;
    let buffers: Vec<Buffer> = local
        .tensors
        .iter()
        .map(|tensor| {
            let buffer = Buffer {
                name: tensor.name.clone(),
                offset,
                ty: tensor.ty.clone(),
                persistent: tensor.role != Role::Temp,
            };
            offset += tensor.ty.n_bytes().next_multiple_of(64);
            buffer
        })
        .collect();
    let kept: usize = buffers
        .iter()
        .filter(|buffer| buffer.persistent)
        .map(|buffer| buffer.ty.n_bytes())
        .sum();
    let ranks: Vec<RankProgram> = (0..DP * TP)
        .map(|rank| {
            let mut live = kept + rank * (64 << 10);
            let mut peak = 0;
            let mut instructions = Vec::new();
            for (op_id, op) in local.ops() {
                live += op
                    .results
                    .iter()
                    .map(|id| local.ty(*id).n_bytes())
                    .sum::<usize>();
                peak = peak.max(live);
                let (n_flops, n_bytes, predicted_s) = price(local, op);
                instructions.push(Instruction {
                    name: local.op_name(op).into(),
                    action: Action::Routine {
                        op: op.kind.clone(),
                        inputs: op.inputs.iter().map(|id| BufferId(id.0)).collect(),
                        results: op.results.iter().map(|id| BufferId(id.0)).collect(),
                    },
                    n_flops,
                    n_bytes,
                    predicted_s,
                    live_bytes: live,
                    rows: None,
                });
                for id in local.tensor_ids() {
                    let tensor = local.tensor(id);
                    if tensor.role == Role::Temp && last_use[id.index()] == op_id.index() {
                        live -= tensor.ty.n_bytes();
                    }
                }
            }
            RankProgram {
                arena_bytes: peak.next_multiple_of(4096),
                buffers: buffers.clone(),
                instructions,
                spans: Vec::new(),
            }
        })
        .collect();
    let sources = global
        .tensor_ids()
        .filter(|id| global.tensor(*id).role != Role::Temp)
        .map(|id| {
            let tensor = global.tensor(id);
            let buffer = BufferId(local.find(&tensor.name).unwrap().0);
            let layout = plan.source_layout(id);
            GlobalTensor {
                name: tensor.name.clone(),
                ty: tensor.ty.clone(),
                role: tensor.role.clone(),
                parts: (0..DP * TP)
                    .map(|rank| TensorPart {
                        rank,
                        buffer,
                        region: layout.region(&tensor.ty.shape, &plan.mesh, rank),
                    })
                    .collect(),
                layout,
            }
        })
        .collect();
    Program {
        version: PROGRAM_VERSION,
        name: global.name.clone(),
        mesh: plan.mesh.clone(),
        kernels: Vec::new(),
        sources,
        outputs: Vec::new(),
        channels: Vec::new(),
        statements: BTreeMap::new(),
        ranks,
    }
}

/// A jitter in [0, 1) that is the same on every machine.
fn noise(rank: usize, instruction: usize) -> f64 {
    let mut x = (rank * 7919 + instruction * 104_729 + 12345) as u32;
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    f64::from(x) / f64::from(u32::MAX)
}

fn timeline(local: &Graph, basis: Basis) -> Timeline {
    let n_ranks = DP * TP;
    let mut clock = vec![0.0f64; n_ranks];
    let mut events = Vec::new();
    for (op_id, op) in local.ops() {
        let (n_flops, n_bytes, seconds) = price(local, op);
        let ready = clock.clone();
        for rank in 0..n_ranks {
            let mut duration_s = seconds;
            if basis == Basis::Measured {
                duration_s *= 0.92 + 0.3 * noise(rank, op_id.index());
            }
            let mut wait_s = 0.0;
            if let Some(group) = op.kind.group() {
                let members: Vec<usize> = if group.axes[0].as_str() == "tp" {
                    (rank / TP * TP..rank / TP * TP + TP).collect()
                } else {
                    (0..DP).map(|index| index * TP + rank % TP).collect()
                };
                let latest = members
                    .iter()
                    .map(|member| ready[*member])
                    .fold(0.0, f64::max);
                wait_s = latest - ready[rank];
                duration_s = seconds + wait_s;
            }
            events.push(Event {
                rank,
                instruction: op_id.index(),
                name: local.op_name(op).into(),
                category: category(&op.kind),
                start_s: clock[rank],
                duration_s,
                wait_s,
                n_flops,
                n_bytes,
                received_bytes: None,
            });
            clock[rank] += duration_s;
        }
    }
    Timeline {
        basis,
        n_ranks,
        events,
    }
}

/// A schedule with overlapped pairs and every cause to wait.
fn grid() -> ActionGrid {
    let schedule = schedule::build(Builtin::DualPipeV, &Shape::new(2, 4).chunks(2), None).unwrap();
    let mut costs = Costs::even(2, 4, 1.0, 1.0, 1.0);
    costs.barrier = true;
    costs.stages[0].p2p_s = 0.5;
    costs.memory_limit_bytes = Some(2.5);
    let simulation = simulate(&schedule, &costs).unwrap();
    ActionGrid::of_simulation(&schedule, &simulation, &costs)
}

/// A report of everything.
pub(super) fn report_input(n_layers: usize) -> ReportInput {
    let global = decoder(n_layers);
    let local = local(n_layers);
    let plan = plan(&global, Mesh::new([("dp", DP), ("tp", TP)]));
    let predicted = timeline(&local, Basis::Predicted);
    let losses = (0..48)
        .map(|step| 2.1 + 6.2 * (-0.09 * step as f64).exp() + 0.12 * (noise(3, step) - 0.5))
        .collect();
    ReportInput {
        title: "Llama-style decoder on 8 devices".into(),
        subtitle: format!(
            "{n_layers} layers · width 512 · 8 sequences of 256 tokens · f32 · AdamW"
        ),
        figures: vec![Figure {
            label: "Compile time".into(),
            values: vec![FigureValue {
                text: "3.42 s".into(),
                source: FigureSource::Measured,
            }],
            note: "graph to kernels".into(),
        }],
        lower_bound_s: Some(predicted.step_s() * 0.87),
        grids: vec![grid()],
        plan_text: Some(
            "plan \"demo\" model \"small.weave\" cluster \"host:8\"\n\
             # chosen by the search\n\
             mesh main = dp:auto := 2 > tp:auto{2,4,8} := 4\n\
             use main on *\n\n\
             tactic megatron(t) {\n  shard heads, ffn, vocab over t on params\n}\n\
             apply megatron(main.tp)\n\
             pin layers[*].attn.wq : [embed, heads/tp, head]\n\
             solve minimize step_time within 10 s gap 2 %\n"
                .into(),
        ),
        explanation: Some(
            "Searched 14 meshes of 8 devices; 9 were pruned by their bound.\n\
             Chosen: dp 2 × tp 4, predicted 43.1 ms a step.\n\
             Runner-up: dp 8, 47.9 ms (+11 %): its gradients take 9.8 ms to reduce.\n\
             Lower bound 37.5 ms: every product at the measured peak, no communication.\n\
             Not searched: context parallelism, pipelines."
                .into(),
        ),
        program: Some(program(&global, &local, &plan)),
        measured: Some(timeline(&local, Basis::Measured)),
        predicted: Some(predicted),
        graph: Some(global),
        local: Some(local),
        plan: Some(plan),
        losses,
    }
}

/// Program and timelines of `n_ranks` × `n_instructions`.
pub(super) fn large_run(n_ranks: usize, n_instructions: usize) -> (Program, Timeline, Timeline) {
    let input = report_input(1);
    let mut program = input.program.unwrap();
    for (rank_idx, rank) in program.ranks.iter_mut().enumerate() {
        let instructions = rank.instructions.clone();
        rank.instructions = (0..n_instructions)
            .map(|instruction_idx| {
                let mut instruction = instructions[instruction_idx % instructions.len()].clone();
                instruction.name = format!(
                    "layers[{}].part{}",
                    instruction_idx / 40,
                    instruction_idx % 40
                );
                instruction.live_bytes += (noise(rank_idx, instruction_idx) * 1e6) as usize;
                instruction
            })
            .collect();
    }
    let timeline = |basis| {
        let template = timeline(&local(1), basis);
        let of_rank_0: Vec<Event> = template
            .events
            .into_iter()
            .filter(|event| event.rank == 0)
            .collect();
        let mut events = Vec::new();
        for rank in 0..n_ranks {
            let mut clock = 0.0;
            for instruction in 0..n_instructions {
                let mut event = of_rank_0[instruction % of_rank_0.len()].clone();
                event.rank = rank;
                event.instruction = instruction;
                event.name = format!("layers[{}].part{}", instruction / 40, instruction % 40);
                event.start_s = clock;
                event.duration_s *= 0.7 + 0.6 * noise(rank, instruction);
                clock += event.duration_s;
                events.push(event);
            }
        }
        Timeline {
            basis,
            n_ranks,
            events,
        }
    };
    (
        program,
        timeline(Basis::Predicted),
        timeline(Basis::Measured),
    )
}

/// Writes the sample report where `MESHWEAVE_SAMPLE` says, to be looked at.
#[test]
fn sample_report() {
    let input = report_input(12);
    assert!(input.local.as_ref().is_some_and(|local| {
        local
            .op(OpId(0))
            .results
            .iter()
            .all(|id| local.ty(*id).n_bytes() > 0)
    }));
    let html = super::report(&input);
    assert!(html.len() < 2 << 20);
    if let Ok(path) = std::env::var("MESHWEAVE_SAMPLE") {
        std::fs::write(path, html).unwrap();
        let (program, predicted, measured) = large_run(8, 2000);
        let large = ReportInput {
            program: Some(program),
            predicted: Some(predicted),
            measured: Some(measured),
            ..input
        };
        std::fs::write(
            std::env::var("MESHWEAVE_SAMPLE").unwrap() + ".large.html",
            super::report(&large),
        )
        .unwrap();
    }
}
