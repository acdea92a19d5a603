//! Partitioning against the interpreter: whatever the plan, the ranks together compute the model.
//!
//! In f64, so that the tolerance (1e-9) is far below any error of placement or resharding.

use crate::support::plans;
use std::collections::BTreeMap;

use meshweave_compiler::partition::{Keep, partition};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::Plan;
use meshweave_runtime::reference::{Value, evaluate, evaluate_ranks};
use proptest::prelude::*;

use crate::support::golden::{first_step, golden};

const TOLERANCE: f64 = 1e-9;

/// Runs all ranks and compares what leaves them, gathered, with the whole graph's values.
fn check(graph: &Graph, plan: &Plan) -> Result<(), String> {
    let cluster = Cluster::local(plan.mesh.n_ranks(), &Host::nominal());
    let parts =
        partition(graph, plan, Keep::Gradients, &cluster).map_err(|error| error.to_string())?;
    let sources = first_step(graph);
    let whole = evaluate(graph, &sources).map_err(|error| error.to_string())?;
    let ids: Vec<TensorId> = graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp)
        .collect();
    let n_ranks = plan.mesh.n_ranks();
    let inputs: Vec<BTreeMap<TensorId, Value>> = (0..n_ranks)
        .map(|rank| {
            let part = |id: &TensorId| {
                let region = plan
                    .source_layout(*id)
                    .region(&graph.ty(*id).shape, &plan.mesh, rank);
                sources[id].part(&region).unwrap()
            };
            ids.iter()
                .enumerate()
                .map(|(local, id)| (TensorId(local as u32), part(id)))
                .collect()
        })
        .collect();
    let ranks = evaluate_ranks(&parts.locals, &inputs).map_err(|error| error.to_string())?;

    let compare = |id: TensorId, layout: &Layout, local_of: &dyn Fn(&Graph) -> TensorId| {
        let mut gathered = Value::full(graph.ty(id).clone(), f64::NAN);
        for (rank, values) in ranks.iter().enumerate() {
            let region = layout.region(&graph.ty(id).shape, &plan.mesh, rank);
            let part = values
                .require(&parts.locals[rank], local_of(&parts.locals[rank]))
                .unwrap();
            gathered.put_part(&region, part).unwrap();
        }
        let error = gathered.relative_error(whole.require(graph, id).unwrap());
        if error <= TOLERANCE {
            Ok(())
        } else {
            Err(format!("{}: {error:e}", graph.tensor(id).name))
        }
    };
    for (output_idx, output) in graph.outputs.iter().enumerate() {
        compare(*output, &parts.output_layouts[output_idx], &|local| {
            local.outputs[output_idx]
        })?;
    }
    for (gradient_idx, gradient) in graph.gradients.values().enumerate() {
        let local_of = |local: &Graph| *local.gradients.values().nth(gradient_idx).unwrap();
        compare(*gradient, &parts.gradient_layouts[gradient_idx], &local_of)?;
    }
    for (update_idx, (source, updated)) in graph.updates.iter().enumerate() {
        let local_of = |local: &Graph| *local.updates.values().nth(update_idx).unwrap();
        compare(*updated, &plan.source_layout(*source), &local_of)?;
    }
    Ok(())
}

fn meshes() -> impl Strategy<Value = Mesh> {
    prop_oneof![
        Just(Mesh::new([("dp", 1)])),
        Just(Mesh::new([("dp", 2)])),
        Just(Mesh::new([("dp", 3)])),
        Just(Mesh::new([("dp", 5)])),
        Just(Mesh::new([("dp", 2), ("tp", 2)])),
        Just(Mesh::new([("dp", 2), ("tp", 3)])),
        Just(Mesh::new([("dp", 2), ("tp", 2), ("cp", 2)])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_of_a_dense_decoder_computes_the_model(mesh in meshes(), seed in 0u32..1000, tied: bool) {
        let graph = golden(None, tied);
        let plan = plans::random_plan(&graph, &mesh, seed);
        prop_assert_eq!(check(&graph, &plan), Ok(()));
    }

    #[test]
    fn any_plan_of_a_moe_decoder_computes_the_model(mesh in meshes(), seed in 0u32..1000, dropless: bool) {
        let graph = golden(Some(if dropless { 0.0 } else { 2.0 }), false);
        let plan = plans::random_plan(&graph, &mesh, seed);
        prop_assert_eq!(check(&graph, &plan), Ok(()));
    }
}

#[test]
fn a_plan_of_another_graph_is_refused() {
    let graph = golden(None, false);
    let mut plan = Plan::replicated("broken", &graph, Mesh::new([("tp", 8)]));
    let cluster = Cluster::local(8, &Host::nominal());
    let attention = graph
        .ops
        .iter()
        .position(|op| op.kind.name() == "attention")
        .unwrap();
    plan.placements[attention]
        .factors
        .insert("tp".into(), "heads".into());
    let too_many = partition(&graph, &plan, Keep::Outputs, &cluster).unwrap_err();
    plan.placements[attention]
        .factors
        .insert("tp".into(), "ffn".into());
    let no_factor = partition(&graph, &plan, Keep::Outputs, &cluster).unwrap_err();
    plan.placements.pop();
    let too_few = partition(&graph, &plan, Keep::Outputs, &cluster).unwrap_err();
    insta::assert_snapshot!(format!("{too_many}\n{no_factor}\n{too_few}"));
}
