//! Random graphs under random plans: partitioned, verified, printed, and computed by all ranks
//! together, they are the graph that they came from.

use crate::support::{graphs, plans};
use std::collections::BTreeMap;

use meshweave_compiler::partition::{Keep, Partition, partition};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::diagnostics::SourceId;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::text::{parse, print};
use meshweave_dsl::graph::verify::{verify_global, verify_local, verify_ranks};
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::Plan;
use meshweave_runtime::reference::{Value, Values, evaluate, evaluate_ranks, initial_value};
use proptest::prelude::*;

/// In f64; the graphs are a few dozen ops deep.
const TOLERANCE: f64 = 1e-9;

/// Values of all sources; inputs are small numbers, or indices below 3.
fn sources(graph: &Graph) -> BTreeMap<TensorId, Value> {
    graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp)
        .map(|id| {
            let tensor = graph.tensor(id);
            let mut numbers = plans::Numbers::new(id.0);
            let value = match initial_value(&tensor.role, &tensor.ty).unwrap() {
                Some(value) => value,
                None if tensor.ty.dtype == DType::I32 => {
                    Value::from_fn(tensor.ty.clone(), |_| numbers.below(3) as f64)
                }
                // The step counts from 1.
                None if tensor.ty.shape.is_empty() => Value::full(tensor.ty.clone(), 1.0),
                None => Value::from_fn(tensor.ty.clone(), |_| {
                    numbers.below(2001) as f64 / 1000.0 - 1.0
                }),
            };
            (id, value)
        })
        .collect()
}

/// What each rank holds of the sources, which local graphs number in the global order.
fn shards(
    graph: &Graph,
    plan: &Plan,
    sources: &BTreeMap<TensorId, Value>,
    rank: usize,
) -> BTreeMap<TensorId, Value> {
    sources
        .iter()
        .enumerate()
        .map(|(local, (id, value))| {
            let shape = &graph.ty(*id).shape;
            let region = plan.source_layout(*id).region(shape, &plan.mesh, rank);
            (TensorId(local as u32), value.part(&region).unwrap())
        })
        .collect()
}

/// The value of a tensor from its parts on the ranks; replicas must agree.
fn gathered(
    graph: &Graph,
    id: TensorId,
    layout: &Layout,
    mesh: &Mesh,
    part_of: impl Fn(usize) -> Value,
) -> Result<Value, String> {
    let ty = graph.ty(id);
    let mut whole = Value::full(ty.clone(), f64::NAN);
    for rank in 0..mesh.n_ranks() {
        let region = layout.region(&ty.shape, mesh, rank);
        let part = part_of(rank);
        let before = whole.part(&region).unwrap();
        let is_new = before.data().iter().all(|x| x.is_nan());
        if !is_new && error_of(&before, &part) > TOLERANCE {
            return Err(format!(
                "`{}` differs between its copies",
                graph.tensor(id).name
            ));
        }
        whole.put_part(&region, &part).unwrap();
    }
    Ok(whole)
}

/// The greatest difference, relative to the greatest element but at least to 1: sums of gradients
/// cancel to nothing, so their error goes with what was summed. Not finite when a NaN is left.
fn error_of(value: &Value, expected: &Value) -> f64 {
    let greatest = expected
        .data()
        .iter()
        .fold(1.0_f64, |max, x| max.max(x.abs()));
    let differences = value.data().iter().zip(expected.data());
    let total: f64 = value.data().iter().sum();
    let difference = differences.fold(0.0_f64, |max, (a, b)| max.max((a - b).abs()));
    if total.is_finite() {
        difference / greatest
    } else {
        f64::INFINITY
    }
}

fn check(graph: &Graph, plan: &Plan) -> Result<(), String> {
    let mesh = &plan.mesh;
    let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
    let Partition {
        locals,
        output_layouts,
        gradient_layouts,
    } = partition(graph, plan, Keep::Gradients, &cluster).map_err(|error| error.to_string())?;
    for (rank, local) in locals.iter().enumerate() {
        verify_local(local, rank, mesh).map_err(|error| format!("rank {rank}: {error}"))?;
        let parsed = parse(&print(local), SourceId::default());
        if parsed.graph != *local || !parsed.diagnostics.is_empty() {
            return Err(format!(
                "rank {rank} does not reparse: {:?}",
                parsed.diagnostics
            ));
        }
    }
    verify_ranks(&locals).map_err(|error| error.to_string())?;

    let sources = sources(graph);
    let whole = evaluate(graph, &sources).map_err(|error| error.to_string())?;
    let inputs: Vec<_> = (0..mesh.n_ranks())
        .map(|rank| shards(graph, plan, &sources, rank))
        .collect();
    let ranks: Vec<Values> = evaluate_ranks(&locals, &inputs).map_err(|error| error.to_string())?;

    let compare = |id: TensorId, layout: &Layout, local_id: &dyn Fn(&Graph) -> TensorId| {
        let part_of = |rank: usize| {
            let local = &locals[rank];
            ranks[rank].require(local, local_id(local)).unwrap().clone()
        };
        let value = gathered(graph, id, layout, mesh, part_of)?;
        let error = error_of(&value, whole.require(graph, id).unwrap());
        if error <= TOLERANCE {
            Ok(())
        } else {
            Err(format!("`{}` is off by {error:e}", graph.tensor(id).name))
        }
    };
    for (nth, id) in graph.outputs.iter().enumerate() {
        compare(*id, &output_layouts[nth], &|local| local.outputs[nth])?;
    }
    for (nth, id) in graph.gradients.values().enumerate() {
        compare(*id, &gradient_layouts[nth], &|local| {
            *local.gradients.values().nth(nth).unwrap()
        })?;
    }
    for (nth, (source, id)) in graph.updates.iter().enumerate() {
        let layout = plan.source_layout(*source);
        compare(*id, &layout, &|local| {
            *local.updates.values().nth(nth).unwrap()
        })?;
    }
    Ok(())
}

fn meshes() -> impl Strategy<Value = Mesh> {
    prop_oneof![
        Just(Mesh::new([("x", 2)])),
        Just(Mesh::new([("x", 3)])),
        Just(Mesh::new([("x", 2), ("y", 2)])),
        Just(Mesh::new([("x", 3), ("y", 2)])),
        Just(Mesh::new([("x", 2), ("y", 2), ("z", 2)])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_plan_of_any_graph_computes_it(
        mesh in meshes(),
        graph_seed: u64,
        n_ops in 1..25_usize,
        plan_seed: u32,
    ) {
        let graph = graphs::random_graph(graph_seed, n_ops);
        prop_assert_eq!(verify_global(&graph), Ok(()));
        let plan = plans::random_plan(&graph, &mesh, plan_seed);
        if let Err(error) = check(&graph, &plan) {
            let printed = print(&graph);
            return Err(TestCaseError::fail(format!("{error}\n{printed}")));
        }
    }
}
