//! Fused fragments against the serial interpreter: a graph's items are executed one by one with
//! generated kernels, everything else by the interpreter, and every result is compared.

use std::collections::BTreeMap;
use std::ffi::c_void;

use crate::support::ptx::{self, Order};
use meshweave_compiler::codegen::fuse::{Fragment, Item, Platform, fuse};
use meshweave_compiler::codegen::kernel::Kernel;
use meshweave_compiler::codegen::launch::Launch;
use meshweave_compiler::mlir::{self, CompileOptions, GpuTarget, HostTarget};
use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{Graph, OpId, Role, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};
use meshweave_runtime::reference::{Value, evaluate, evaluate_op, golden_inputs};

type KernelFn = unsafe extern "C" fn(*mut *mut c_void, i64, i64);

/// Memory of one tensor; both element types have four bytes.
fn to_bytes(value: &Value) -> Vec<u32> {
    let is_int = value.ty().dtype == DType::I32;
    let bits = |v: &f64| {
        if is_int {
            (*v as i32) as u32
        } else {
            (*v as f32).to_bits()
        }
    };
    value.data().iter().map(bits).collect()
}

fn from_bytes(ty: &TensorType, bytes: &[u32]) -> Value {
    let is_int = ty.dtype == DType::I32;
    let data = bytes.iter().map(|bits| {
        if is_int {
            f64::from(*bits as i32)
        } else {
            f64::from(f32::from_bits(*bits))
        }
    });
    Value::new(ty.clone(), data.collect()).unwrap()
}

/// Runs `graph` item by item and compares every fragment's result.
#[track_caller]
fn check(graph: &Graph, inputs: &BTreeMap<TensorId, Value>, tolerance: f64) -> Vec<Item> {
    let items = fuse(graph, Platform::Host).unwrap();
    let mut kernels: Vec<Kernel> = Vec::new();
    for item in &items {
        if let Item::Fragment(fragment) = item
            && !kernels.contains(&fragment.kernel)
        {
            kernels.push(fragment.kernel.clone());
        }
    }
    let object =
        mlir::compile(&kernels, &HostTarget::detect(), &CompileOptions::default()).unwrap();
    let ptx = mlir::compile_ptx(&kernels, GpuTarget::Sm90, &[]).unwrap();
    let module = ptx::Module::parse(&ptx.text);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernels.so");
    mlir::link(&object, &path).unwrap();
    // SAFETY: the object has no initializers.
    let library = unsafe { libloading::Library::new(&path) }.unwrap();

    let expected = evaluate(graph, inputs).unwrap();
    let mut memory: Vec<Option<Vec<u32>>> = vec![None; graph.tensors.len()];
    for id in graph.tensor_ids() {
        if graph.tensor(id).role != Role::Temp {
            memory[id.index()] = Some(to_bytes(expected.get(id).unwrap()));
        }
    }
    for item in &items {
        match item {
            Item::Fragment(fragment) => {
                let idx = kernels.iter().position(|k| *k == fragment.kernel).unwrap();
                // SAFETY: the symbol has this signature.
                let function: libloading::Symbol<KernelFn> =
                    unsafe { library.get(object.symbols[idx].as_bytes()) }.unwrap();
                let device = (&module, &ptx.entries[idx][..]);
                run(graph, fragment, *function, device, tolerance, &mut memory);
                for result in &fragment.results {
                    let actual = memory[result.index()].as_ref().unwrap();
                    let actual = from_bytes(graph.ty(*result), actual);
                    let expected = expected.get(*result).unwrap();
                    let worst = error(&actual, expected);
                    assert!(
                        worst <= tolerance,
                        "`{}` of fragment `{}` is off by {worst:e}\n{}",
                        graph.tensor(*result).name,
                        fragment.name,
                        fragment.kernel
                    );
                }
            }
            Item::Contract {
                op,
                a,
                b,
                out,
                onto,
                ..
            } => {
                let product = evaluate_one(graph, *op, &[*a, *b], &memory);
                let mut sum = product[0].clone();
                if let Some(onto) = onto {
                    let onto = from_bytes(graph.ty(*onto), memory[onto.index()].as_ref().unwrap());
                    let kind = OpKind::Binary(BinaryFn::Add);
                    sum = evaluate_op(&kind, &[&onto, &sum]).unwrap().remove(0);
                }
                memory[out.index()] = Some(to_bytes(&sum));
                assert!(error(&sum, expected.get(*out).unwrap()) <= tolerance);
            }
            Item::Attention { op, .. }
            | Item::AttentionGrad { op, .. }
            | Item::Routine { op }
            | Item::View { op } => {
                let op_inputs = graph.op(*op).inputs.clone();
                let values = evaluate_one(graph, *op, &op_inputs, &memory);
                for (result, value) in graph.op(*op).results.iter().zip(values) {
                    memory[result.index()] = Some(to_bytes(&value));
                }
            }
            Item::Collective { .. } => panic!("a collective in a serial graph"),
        }
    }
    for output in graph.outputs.iter().chain(graph.updates.values()) {
        assert!(
            memory[output.index()].is_some(),
            "{}",
            graph.tensor(*output).name
        );
    }
    items
}

/// Largest error over the largest expected value.
fn error(actual: &Value, expected: &Value) -> f64 {
    assert_eq!(actual.ty(), expected.ty());
    let largest = expected
        .data()
        .iter()
        .fold(1e-30_f64, |m, v| m.max(v.abs()));
    let pairs = actual.data().iter().zip(expected.data());
    pairs.fold(0.0, |worst, (a, e)| {
        let error = if a == e { 0.0 } else { (a - e).abs() / largest };
        // A NaN must not hide.
        if error <= worst { worst } else { error }
    })
}

fn evaluate_one(
    graph: &Graph,
    op: OpId,
    inputs: &[TensorId],
    memory: &[Option<Vec<u32>>],
) -> Vec<Value> {
    let values: Vec<Value> = inputs
        .iter()
        .map(|id| from_bytes(graph.ty(*id), memory[id.index()].as_ref().unwrap()))
        .collect();
    evaluate_op(&graph.op(op).kind, &values.iter().collect::<Vec<_>>()).unwrap()
}

/// Runs a fragment with the first allowed result of each input written in place, in two halves of
/// its rows where it allows that, so that both promises are put to the test.
fn run(
    graph: &Graph,
    fragment: &Fragment,
    function: KernelFn,
    (module, entries): (&ptx::Module, &[(String, Launch)]),
    tolerance: f64,
    memory: &mut [Option<Vec<u32>>],
) {
    let mut shared: BTreeMap<TensorId, TensorId> = BTreeMap::new();
    for (result, input) in &fragment.in_place {
        if !shared.contains_key(result) && !shared.values().any(|other| other == input) {
            shared.insert(*result, *input);
        }
    }
    let mut owners: Vec<TensorId> = Vec::new();
    let mut buffers: Vec<Vec<u32>> = Vec::new();
    for arg in &fragment.args {
        let bytes = if fragment.results.contains(arg) {
            if shared.contains_key(arg) {
                continue;
            }
            vec![0x7fc0_0000; graph.ty(*arg).n_elements()]
        } else {
            memory[arg.index()].clone().unwrap()
        };
        owners.push(*arg);
        buffers.push(bytes);
    }
    let buffer_of = |tensor: &TensorId| {
        let owner = shared.get(tensor).unwrap_or(tensor);
        owners.iter().position(|other| other == owner).unwrap()
    };
    let args: Vec<usize> = fragment.args.iter().map(buffer_of).collect();
    let on_device = [Order::Ascending, Order::Descending].map(|order| {
        let mut buffers = buffers.clone();
        for (entry, launch) in entries {
            module.run(entry, *launch, &args, &mut buffers, order);
        }
        buffers
    });

    let mut pointers: Vec<*mut c_void> = args
        .iter()
        .map(|&idx| buffers[idx].as_mut_ptr().cast())
        .collect();
    let program = fragment.kernel.program();
    let n_rows = program.n_rows() as i64;
    let middle = if program.is_splittable() {
        n_rows / 2
    } else {
        0
    };
    for (begin, end) in [(0, middle), (middle, n_rows)] {
        if begin < end {
            // SAFETY: the buffers have the sizes of the tensors.
            unsafe { function(pointers.as_mut_ptr(), begin, end) };
        }
    }
    assert_eq!(
        on_device[0], on_device[1],
        "a race in {}\n{}",
        fragment.name, fragment.kernel
    );
    for result in &fragment.results {
        let host = &buffers[buffer_of(result)];
        let ty = graph.ty(*result);
        let device = from_bytes(ty, &on_device[0][buffer_of(result)]);
        let worst = error(&device, &from_bytes(ty, host));
        assert!(
            worst <= tolerance,
            "`{}` on a GPU is off by {worst:e} from the host's\n{}",
            graph.tensor(*result).name,
            fragment.kernel
        );
        memory[result.index()] = Some(host.clone());
    }
}

/// A graph of one op over given input types, with noise in them.
struct Case {
    graph: Graph,
    inputs: BTreeMap<TensorId, Value>,
    seed: u64,
}

impl Case {
    fn new() -> Self {
        Self {
            graph: Graph::new("case"),
            inputs: BTreeMap::new(),
            seed: 1,
        }
    }

    fn next(&mut self) -> f64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        // Representable in f32, so that both sides start alike.
        f64::from((self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32) / f64::from(1 << 23)
            - 1.0
    }

    /// Values in −1..1.
    fn noise(&mut self, dims: &[(&str, usize)]) -> TensorId {
        self.floats(dims, |v| v)
    }

    fn floats(&mut self, dims: &[(&str, usize)], f: impl Fn(f64) -> f64) -> TensorId {
        let ty = TensorType::new(DType::F32, dims.iter().copied());
        let data = (0..ty.n_elements())
            .map(|_| f64::from(f(self.next()) as f32))
            .collect();
        self.source(Value::new(ty, data).unwrap())
    }

    /// Integers in −2..bound+2, so that some are out of range.
    fn indices(&mut self, dims: &[(&str, usize)], bound: usize) -> TensorId {
        let ty = TensorType::new(DType::I32, dims.iter().copied());
        let span = (bound + 4) as f64;
        let data = (0..ty.n_elements())
            .map(|_| ((self.next() + 1.0) / 2.0 * span).floor() - 2.0)
            .collect();
        self.source(Value::new(ty, data).unwrap())
    }

    fn source(&mut self, value: Value) -> TensorId {
        let name = format!("in{}", self.graph.tensors.len());
        let id = self.graph.add_source(name, value.ty().clone(), Role::Input);
        self.inputs.insert(id, value);
        id
    }

    fn op(&mut self, kind: OpKind, inputs: &[TensorId]) -> Vec<TensorId> {
        let name = format!("op{}", self.graph.ops.len());
        self.graph.add_op(name, kind, inputs).unwrap()
    }

    fn output(&mut self, ids: &[TensorId]) {
        self.graph.outputs.extend_from_slice(ids);
    }

    #[track_caller]
    fn check(self, tolerance: f64) -> Vec<Item> {
        check(&self.graph, &self.inputs, tolerance)
    }
}

fn dim(name: &str) -> Dim {
    name.into()
}

const WIDTHS: [usize; 8] = [1, 3, 7, 8, 9, 31, 64, 130];

#[test]
fn elementwise_with_any_broadcast() {
    let mut case = Case::new();
    for width in WIDTHS {
        let full = [("batch", 2), ("seq", 3), ("embed", width)];
        let x = case.noise(&full);
        let positive = case.floats(&full, |v| v.abs() + 0.1);
        for function in [
            UnaryFn::Neg,
            UnaryFn::Exp,
            UnaryFn::Square,
            UnaryFn::Tanh,
            UnaryFn::Sigmoid,
            UnaryFn::Silu,
            UnaryFn::Relu,
            UnaryFn::Gelu,
            UnaryFn::GeluTanh,
            UnaryFn::Scale(Scalar(0.3)),
            UnaryFn::Shift(Scalar(0.3)),
        ] {
            let y = case.op(OpKind::Unary(function), &[x]);
            case.output(&y);
        }
        for function in [
            UnaryFn::Log,
            UnaryFn::Sqrt,
            UnaryFn::Rsqrt,
            UnaryFn::Reciprocal,
        ] {
            let y = case.op(OpKind::Unary(function), &[positive]);
            case.output(&y);
        }
        let others = [
            case.noise(&full),
            case.noise(&[("embed", width)]),
            case.noise(&[("batch", 2), ("seq", 3)]),
            case.noise(&[("seq", 3)]),
            case.noise(&[]),
            case.noise(&[("embed", width), ("seq", 3), ("batch", 2)]),
            case.noise(&[("seq", 3), ("embed", width)]),
        ];
        for other in others {
            for function in [BinaryFn::Add, BinaryFn::Sub, BinaryFn::Mul, BinaryFn::Max] {
                let y = case.op(OpKind::Binary(function), &[x, other]);
                case.output(&y);
                let y = case.op(OpKind::Binary(function), &[other, x]);
                case.output(&y);
            }
        }
        for function in [
            BinaryFn::Div,
            BinaryFn::TanhGrad,
            BinaryFn::SigmoidGrad,
            BinaryFn::SiluGrad,
            BinaryFn::ReluGrad,
            BinaryFn::GeluGrad,
            BinaryFn::GeluTanhGrad,
            BinaryFn::Equal,
        ] {
            let y = case.op(OpKind::Binary(function), &[x, positive]);
            case.output(&y);
        }
        for dims in [
            vec![("seq", 3), ("embed", width), ("new", 5)],
            vec![("new", 5), ("embed", width), ("seq", 3)],
        ] {
            let narrow = others[6];
            let dims = dims.into_iter().map(|(name, size)| (dim(name), size));
            let y = case.op(
                OpKind::Expand {
                    dims: dims.collect(),
                },
                &[narrow],
            );
            case.output(&y);
        }
    }
    case.check(2e-6);
}

#[test]
fn reductions_over_any_dims() {
    let mut case = Case::new();
    for width in WIDTHS {
        let x = case.noise(&[("batch", 2), ("seq", 5), ("embed", width)]);
        for dims in [
            vec!["embed"],
            vec!["seq"],
            vec!["batch"],
            vec!["batch", "seq"],
            vec!["batch", "embed"],
            vec!["batch", "seq", "embed"],
        ] {
            let dims: Vec<Dim> = dims.into_iter().map(dim).collect();
            for kind in [ReduceKind::Sum, ReduceKind::Max] {
                let y = case.op(
                    OpKind::Reduce {
                        kind,
                        dims: dims.clone(),
                    },
                    &[x],
                );
                case.output(&y);
            }
            if dims.len() == 1 {
                let kind = ReduceKind::Lse;
                let y = case.op(OpKind::Reduce { kind, dims }, &[x]);
                case.output(&y);
            }
        }
    }
    case.check(2e-6);
}

#[test]
fn norms_and_softmax() {
    let eps = Scalar(1e-5);
    let mut case = Case::new();
    // The gradient of a normalized single element is all rounding error.
    for width in WIDTHS.into_iter().filter(|width| *width > 1) {
        let full = [("batch", 2), ("seq", 5), ("embed", width)];
        let (x, dy) = (case.noise(&full), case.noise(&full));
        let (weight, bias) = (
            case.noise(&[("embed", width)]),
            case.noise(&[("embed", width)]),
        );
        let dim = dim("embed");
        let norm = OpKind::RmsNorm {
            dim: dim.clone(),
            eps,
        };
        let y = case.op(norm, &[x, weight]);
        let grad = case.op(
            OpKind::RmsNormGrad { dim: dim.clone() },
            &[x, weight, y[1], dy],
        );
        case.output(&y);
        case.output(&grad);
        let y = case.op(OpKind::Softmax { dim: dim.clone() }, &[x]);
        let grad = case.op(OpKind::SoftmaxGrad { dim: dim.clone() }, &[y[0], dy]);
        case.output(&y);
        case.output(&grad);
        let norm = OpKind::LayerNorm {
            dim: dim.clone(),
            eps,
        };
        let y = case.op(norm, &[x, weight, bias]);
        let kind = OpKind::LayerNormGrad { dim };
        let grad = case.op(kind, &[x, weight, y[1], y[2], dy]);
        case.output(&y);
        case.output(&grad);
    }
    case.check(5e-6);
}

#[test]
fn softmax_over_an_outer_dim() {
    let mut case = Case::new();
    let x = case.noise(&[("batch", 2), ("seq", 9), ("embed", 5)]);
    let y = case.op(OpKind::Softmax { dim: dim("seq") }, &[x]);
    case.output(&y);
    case.check(2e-6);
}

#[test]
fn rope_and_its_inverse() {
    let mut case = Case::new();
    for half in [1, 3, 8, 16, 33] {
        let x = case.noise(&[("batch", 2), ("seq", 3), ("heads", 2), ("head", 2 * half)]);
        let cos = case.noise(&[("seq", 3), ("half", half)]);
        let sin = case.noise(&[("seq", 3), ("half", half)]);
        for inverse in [false, true] {
            let dim = dim("head");
            let y = case.op(OpKind::Rope { dim, inverse }, &[x, cos, sin]);
            case.output(&y);
        }
    }
    case.check(1e-6);
}

#[test]
fn indexed_rows() {
    let mut case = Case::new();
    for width in WIDTHS {
        let index = [("batch", 2), ("seq", 6)];
        let table = case.noise(&[("vocab", 11), ("embed", width)]);
        let idx = case.indices(&index, 13);
        let dim_ = dim("vocab");
        for offset in [0, 2] {
            let kind = OpKind::Gather {
                dim: dim_.clone(),
                offset,
            };
            let y = case.op(kind, &[table, idx]);
            case.output(&y);
            let rows = case.noise(&[("batch", 2), ("seq", 6), ("embed", width)]);
            let kind = OpKind::ScatterAdd {
                dim: dim_.clone(),
                size: 11,
                offset,
            };
            let y = case.op(kind, &[idx, rows]);
            case.output(&y);
            let logits = case.noise(&[("batch", 2), ("seq", 6), ("vocab", width)]);
            let kind = OpKind::Pick {
                dim: dim_.clone(),
                offset,
            };
            let target = case.indices(&index, width);
            let y = case.op(kind, &[logits, target]);
            case.output(&y);
            let lse = case.noise(&index);
            let dloss = case.noise(&index);
            let kind = OpKind::CrossEntropyGrad {
                dim: dim_.clone(),
                offset,
            };
            let y = case.op(kind, &[logits, lse, target, dloss]);
            case.output(&y);
        }
    }
    let vector = case.noise(&[("vocab", 11)]);
    let idx = case.indices(&[("seq", 9)], 11);
    let kind = OpKind::Gather {
        dim: dim("vocab"),
        offset: 0,
    };
    let y = case.op(kind, &[vector, idx]);
    case.output(&y);
    let values = case.noise(&[("seq", 9)]);
    let kind = OpKind::ScatterAdd {
        dim: dim("vocab"),
        size: 11,
        offset: 0,
    };
    let y = case.op(kind, &[idx, values]);
    case.output(&y);
    case.check(2e-6);
}

#[test]
fn optimizers() {
    let mut case = Case::new();
    for (shape, step) in [
        (vec![("embed", 7)], 1.0),
        (vec![("embed", 64), ("ffn", 130)], 2.0),
        (vec![("embed", 3), ("ffn", 5)], 1000.0),
    ] {
        let p = case.noise(&shape);
        let g = case.noise(&shape);
        let m = case.noise(&shape);
        let v = case.floats(&shape, f64::abs);
        let step = case.floats(&[], |_| step);
        let kind = OpKind::Adamw {
            lr: Scalar(1e-2),
            beta1: Scalar(0.9),
            beta2: Scalar(0.999),
            eps: Scalar(1e-8),
            decay: Scalar(0.1),
        };
        let next = case.op(kind, &[p, g, m, v, step]);
        case.output(&next);
        let next = case.op(OpKind::Sgd { lr: Scalar(0.1) }, &[p, g]);
        case.output(&next);
    }
    case.check(1e-6);
}

/// Names of the kernels' ops, fragment by fragment.
fn fragments(graph: &Graph, items: &[Item]) -> Vec<String> {
    items
        .iter()
        .filter_map(|item| match item {
            Item::Fragment(fragment) => Some(
                fragment
                    .ops
                    .iter()
                    .map(|op| graph.op(*op).kind.name())
                    .collect::<Vec<_>>()
                    .join(" "),
            ),
            _ => None,
        })
        .collect()
}

#[test]
fn a_gated_unit_is_one_kernel_around_its_contractions() {
    let mut case = Case::new();
    let x = case.noise(&[("seq", 6), ("embed", 16)]);
    let residual = case.noise(&[("seq", 6), ("embed", 16)]);
    let w = case.noise(&[("embed", 16)]);
    let (wg, wu) = (
        case.noise(&[("embed", 16), ("ffn", 40)]),
        case.noise(&[("embed", 16), ("ffn", 40)]),
    );
    let wd = case.noise(&[("ffn", 40), ("embed", 16)]);
    let h = case.op(OpKind::Binary(BinaryFn::Add), &[x, residual])[0];
    let eps = Scalar(1e-5);
    let n = case.op(
        OpKind::RmsNorm {
            dim: dim("embed"),
            eps,
        },
        &[h, w],
    )[0];
    let out = |names: [&str; 2]| OpKind::Contract {
        out: names.map(dim).to_vec(),
    };
    let g = case.op(out(["seq", "ffn"]), &[n, wg])[0];
    let s = case.op(OpKind::Unary(UnaryFn::Silu), &[g])[0];
    let u = case.op(out(["seq", "ffn"]), &[n, wu])[0];
    let m = case.op(OpKind::Binary(BinaryFn::Mul), &[s, u])[0];
    let d = case.op(out(["seq", "embed"]), &[m, wd])[0];
    let y = case.op(OpKind::Binary(BinaryFn::Add), &[h, d])[0];
    case.output(&[y]);
    let graph = case.graph.clone();
    let items = case.check(2e-6);
    assert_eq!(fragments(&graph, &items), ["add rms_norm", "silu mul"]);
    let n_onto = items
        .iter()
        .filter(|item| matches!(item, Item::Contract { onto: Some(_), .. }))
        .count();
    assert_eq!(n_onto, 1, "the residual is what the last product adds onto");
}

#[test]
fn a_loss_is_one_kernel_over_the_logits() {
    let mut case = Case::new();
    let logits = case.noise(&[("batch", 2), ("seq", 6), ("vocab", 37)]);
    let target = case.indices(&[("batch", 2), ("seq", 6)], 37);
    let kind = ReduceKind::Lse;
    let dims = vec![dim("vocab")];
    let lse = case.op(OpKind::Reduce { kind, dims }, &[logits])[0];
    let kind = OpKind::Pick {
        dim: dim("vocab"),
        offset: 0,
    };
    let picked = case.op(kind, &[logits, target])[0];
    let losses = case.op(OpKind::Binary(BinaryFn::Sub), &[lse, picked])[0];
    let kind = ReduceKind::Sum;
    let dims = vec![dim("batch"), dim("seq")];
    let loss = case.op(OpKind::Reduce { kind, dims }, &[losses])[0];
    let mean = case.op(OpKind::Unary(UnaryFn::Scale(Scalar(1.0 / 12.0))), &[loss])[0];
    case.output(&[mean, lse]);
    let graph = case.graph.clone();
    let items = case.check(2e-6);
    insta::assert_snapshot!(fragments(&graph, &items).join("\n"));
}

/// A step of whole decoders, optimizer included: every fragment's result, and how ops are grouped.
#[test]
fn decoders() {
    use meshweave_compiler::differentiate::{Optimizer, differentiate};
    use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
    for capacity in [None, Some(1.5)] {
        let size = GoldenSize::named("tiny").unwrap();
        let config = DecoderConfig::golden(&size, capacity);
        let forward = build_decoder(&config, 2, 16, Goal::Training).unwrap();
        let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
        let mut inputs = golden_inputs(&graph, config.vocab).unwrap();
        let step = graph.find("step").unwrap();
        inputs.insert(step, Value::full(graph.ty(step).clone(), 1.0));
        for id in graph.tensor_ids() {
            let tensor = graph.tensor(id);
            if matches!(tensor.role, Role::State { .. }) && tensor.name.starts_with("v.") {
                // From 0, the first step would divide each gradient by its own rounded size.
                inputs.insert(id, Value::full(tensor.ty.clone(), 0.015625));
            }
        }
        let items = check(&graph, &inputs, 1e-5);
        let name = if capacity.is_some() { "moe" } else { "dense" };
        insta::assert_snapshot!(
            format!("decoder_{name}"),
            fragments(&graph, &items).join("\n")
        );
    }
}

/// Random graphs of everything that fuses, over small and odd sizes: whatever is grouped, delayed,
/// advanced or recomputed, the values stay.
#[test]
fn random_graphs() {
    for seed in 1..=10_u64 {
        let mut case = Case::new();
        case.seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let pick = |case: &mut Case, n: usize| ((case.next() + 1.0) / 2.0 * n as f64) as usize;
        let sizes = [1, 2, 3, 5, 8, 17, 40];
        let size = |case: &mut Case| sizes[pick(case, sizes.len())];
        let (batch, seq, embed) = (size(&mut case), size(&mut case), 2 + size(&mut case));
        let (b, s, e) = (("batch", batch), ("seq", seq), ("embed", embed));
        let weight = case.noise(&[e]);
        let scalar = case.noise(&[]);
        let table = case.noise(&[("vocab", 9), e]);
        let idx = case.indices(&[b, s], 9);
        let w = case.noise(&[e, ("other", embed)]);
        let first = [case.noise(&[b, s, e]), case.noise(&[b, s, e])];
        let mut full = first.to_vec();
        let mut rows = vec![case.noise(&[b, s])];
        for _ in 0..40 {
            let x = full[pick(&mut case, full.len())];
            let y = full[pick(&mut case, full.len())];
            let r = rows[pick(&mut case, rows.len())];
            let dim_e = dim("embed");
            let eps = Scalar(0.1);
            // Squashed, so that chains of products neither vanish nor explode.
            let squash = OpKind::Unary(UnaryFn::Tanh);
            match pick(&mut case, 14) {
                0 => full.extend(case.op(squash, &[x])),
                1 => full.extend(case.op(OpKind::Unary(UnaryFn::Silu), &[x])),
                2 => {
                    let sum = case.op(OpKind::Binary(BinaryFn::Add), &[x, y]);
                    full.extend(case.op(squash, &sum));
                }
                3 => full.extend(case.op(OpKind::Binary(BinaryFn::Mul), &[x, weight])),
                4 => full.extend(case.op(OpKind::Binary(BinaryFn::Mul), &[r, x])),
                5 => full.extend(case.op(OpKind::Binary(BinaryFn::SiluGrad), &[x, y])),
                6 => {
                    let norm = case.op(OpKind::RmsNorm { dim: dim_e, eps }, &[x, weight]);
                    full.push(norm[0]);
                    rows.push(norm[1]);
                    if pick(&mut case, 2) == 0 {
                        let kind = OpKind::RmsNormGrad { dim: dim("embed") };
                        let grad = case.op(kind, &[x, weight, norm[1], y]);
                        full.push(grad[0]);
                        case.output(&grad[1..]);
                    }
                }
                7 => full.extend(case.op(OpKind::Softmax { dim: dim_e }, &[x])),
                8 => {
                    let kind = ReduceKind::Lse;
                    let dims = vec![dim_e];
                    rows.extend(case.op(OpKind::Reduce { kind, dims }, &[x]));
                }
                9 => {
                    let product = case.op(OpKind::Binary(BinaryFn::Mul), &[x, y]);
                    let kind = ReduceKind::Sum;
                    let dims = vec![[dim("embed")], [dim("seq")], [dim("batch")]]
                        .swap_remove(pick(&mut case, 3))
                        .to_vec();
                    let is_row = dims[0] == dim("embed");
                    let sum = case.op(OpKind::Reduce { kind, dims }, &product);
                    let sum = case.op(squash, &sum);
                    if is_row {
                        rows.extend(sum);
                    } else {
                        case.output(&sum);
                    }
                }
                10 => {
                    let product = case.op(OpKind::Binary(BinaryFn::Mul), &[r, scalar]);
                    rows.extend(case.op(squash, &product));
                }
                11 => {
                    let kind = OpKind::Gather {
                        dim: dim("vocab"),
                        offset: 1,
                    };
                    full.extend(case.op(kind, &[table, idx]));
                }
                12 => {
                    let kind = OpKind::ScatterAdd {
                        dim: dim("vocab"),
                        size: 9,
                        offset: 0,
                    };
                    let sums = case.op(kind, &[idx, x]);
                    case.output(&sums);
                }
                _ => {
                    let out = [dim("batch"), dim("seq"), dim("other")].to_vec();
                    let product = case.op(OpKind::Contract { out }, &[x, w])[0];
                    let (from, to) = (dim("other"), dim_e);
                    let product = case.op(OpKind::Rename { from, to }, &[product])[0];
                    let sum = case.op(OpKind::Binary(BinaryFn::Add), &[x, product]);
                    full.extend(case.op(squash, &sum));
                }
            }
        }
        case.output(&full[full.len() - 2..]);
        case.output(&rows[rows.len() - 1..]);
        case.check(2e-4);
    }
}
