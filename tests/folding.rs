//! Parallel folding in execution: attention on one mesh, experts on another over the same ranks, from
//! documents, against the published losses of the golden model and the oracle's gradients.

use std::path::Path;

use meshweave::compile::CompileOptions;
use meshweave::session::{Model, Session};
use meshweave_compiler::partition::Keep;
use meshweave_dsl::program::{Action, Program};
use meshweave_runtime::artifact;
use meshweave_runtime::error::Error;
use meshweave_runtime::executor::{Session as Execution, SessionOptions};
use meshweave_runtime::reference::{StepResult, Stepper, Value, golden_inputs, golden_tokens};
use meshweave_runtime::tensor::{Elements, HostTensor};

/// Largest |difference| over largest |value| of a tensor, f32 programs against the f64 oracle.
const TOLERANCE: f64 = 1e-5;
/// Of the published losses of the golden model.
const GOLDEN_TOLERANCE: f64 = 1e-4;

const MOE_CAPACITY_2: [f64; 5] = [6.751934, 5.857271, 5.038284, 4.282347, 3.568987];
const MOE_DROPLESS: [f64; 5] = [6.751000, 5.855239, 5.033547, 4.281944, 3.571185];

/// Ranks, meshes with their tactics, and how the plan keeps an expert's weights.
const FOLDS: [(&str, usize, &str, &str); 7] = [
    (
        "ep4",
        4,
        "mesh main = dp:4\nmesh moe = ep:4 refolds main\napply dp(dp)\napply ep(ep)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/dp_ep, embed, ffn]",
    ),
    (
        "ep2 x etp2",
        4,
        "mesh main = dp:4\nmesh moe = ep:2 > etp:2 refolds main\napply dp(dp)\napply ep(ep)\n\
         apply megatron(etp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn/etp]",
        "[expert/dp_ep, embed, ffn/dp_etp]",
    ),
    (
        "ep8",
        8,
        "mesh main = dp:8\nmesh moe = ep:8 refolds main\napply dp(dp)\napply ep(ep)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/dp_ep, embed, ffn]",
    ),
    (
        "ep4 over tp2 x dp4",
        8,
        "mesh main = dp:4 > tp:2\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply ep(ep)\napply edp(edp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/(dp_ep,tp_ep), embed, ffn]",
    ),
    (
        "ep4 over tp4 x dp2",
        8,
        "mesh main = dp:2 > tp:4\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply ep(ep)\napply edp(edp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/tp_ep, embed, ffn]",
    ),
    (
        "ep4 over cp2 x tp2 x dp2",
        8,
        "mesh main = dp:2 > cp:2 > tp:2\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply context(cp)\napply megatron(tp)\napply ep(ep)\napply edp(edp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/(cp_ep,tp_ep), embed, ffn]",
    ),
    (
        "ep4 over tp2 x dp2 with pp2",
        8,
        "mesh main = pp:2 > dp:2 > tp:2\nmesh moe = pp:same > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply ep(ep)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]\npipeline main.pp {\n  microbatches 4\n}",
        "[expert/(dp_ep,tp_ep), embed, ffn]",
    ),
];

/// Ranks, parts of a sequence that are dispatched from where they are, meshes with their tactics, and
/// how the plan keeps an expert's weights. Tokens are dispatched by the ranks that attention leaves them
/// on, and travel.
const TRAVELS: [(&str, usize, usize, &str, &str); 8] = [
    (
        "ep4",
        4,
        1,
        "mesh main = dp:4\nmesh moe = ep:4 refolds main\napply dp(dp)\napply leave(dp)\n\
         apply arrive(ep)",
        "[expert/dp_ep, embed, ffn]",
    ),
    (
        "ep2 x etp2",
        4,
        1,
        "mesh main = dp:4\nmesh moe = ep:2 > etp:2 refolds main\napply dp(dp)\napply leave(dp)\n\
         apply arrive(ep)\napply megatron(etp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn/etp]",
        "[expert/dp_ep, embed, ffn/dp_etp]",
    ),
    (
        "etp2 x ep2",
        4,
        1,
        "mesh main = dp:4\nmesh moe = etp:2 > ep:2 refolds main\napply dp(dp)\napply leave(dp)\n\
         apply arrive(ep)\napply megatron(etp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn/etp]",
        "[expert/dp_ep, embed, ffn/dp_etp]",
    ),
    (
        "ep8",
        8,
        1,
        "mesh main = dp:8\nmesh moe = ep:8 refolds main\napply dp(dp)\napply leave(dp)\n\
         apply arrive(ep)",
        "[expert/dp_ep, embed, ffn]",
    ),
    (
        "ep4 over tp2 x dp4",
        8,
        2,
        "mesh main = dp:4 > tp:2\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply leave(dp)\napply leave_parts(tp)\napply arrive(ep)\n\
         apply replicas(edp)\npin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/(dp_ep,tp_ep), embed, ffn]",
    ),
    (
        "ep4 over tp4 x dp2",
        8,
        4,
        "mesh main = dp:2 > tp:4\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply leave(dp)\napply leave_parts(tp)\napply arrive(ep)\n\
         apply replicas(edp)\npin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/tp_ep, embed, ffn]",
    ),
    (
        "ep4 over cp2 x tp2 x dp2",
        8,
        4,
        "mesh main = dp:2 > cp:2 > tp:2\nmesh moe = edp:rest > ep:4 refolds main\napply dp(dp)\n\
         apply context(cp)\napply megatron(tp)\napply leave(dp)\napply leave_parts(cp)\n\
         apply leave_parts(tp)\napply arrive(ep)\napply replicas(edp)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]",
        "[expert/(cp_ep,tp_ep), embed, ffn]",
    ),
    (
        "ep4 over tp2 x dp2 with pp2",
        8,
        2,
        "mesh main = pp:2 > dp:2 > tp:2\nmesh moe = pp:same > ep:4 refolds main\napply dp(dp)\n\
         apply megatron(tp)\napply leave(dp)\napply leave_parts(tp)\napply arrive(ep)\n\
         pin layers[*].moe.experts.w* : [expert/ep, embed, ffn]\npipeline main.pp {\n  microbatches 4\n}",
        "[expert/(dp_ep,tp_ep), embed, ffn]",
    ),
];

/// Dispatch by attention's ranks, work on the experts'.
const TACTICS: &str = "tactic leave(a) {\nshard batch over a on .moe.dispatched\n}\n\
     tactic leave_parts(a) {\nshard part over a on .moe.dispatched\n}\n\
     tactic arrive(a) {\nshard expert over a on .moe.experts.*\n}\n\
     tactic replicas(a) {\nshard batch over a on .moe.experts.*\n}\n";

struct Case {
    session: Session,
    model: Model,
}

impl Case {
    fn new(n_ranks: usize, config: &str, rest: &str) -> Self {
        let text = format!(
            "plan \"folded\" model m cluster \"local:{n_ranks}\"\nmodel m = {config}\n{rest}\n\
             use main on *\nuse moe on {}layers[*].moe.experts\n",
            if rest.contains("apply arrive") {
                ""
            } else {
                "layers[*].moe.dispatched, "
            }
        );
        let session = Session::from_text("plan.weave", &text, Path::new("."), None)
            .unwrap_or_else(|error| panic!("{text}\n{error}"));
        let model = session.model().unwrap();
        Self { session, model }
    }

    fn truth(&self) -> StepResult {
        let graph = self.model.whole();
        let vocab = self.session.decoder().unwrap().vocab;
        let mut stepper = Stepper::new(graph).unwrap();
        stepper.step(&golden_inputs(graph, vocab).unwrap()).unwrap()
    }

    /// Compiles the plan, which keeps an expert's weights in `layout`.
    fn start(&self, layout: &str) -> Execution {
        let solution = self
            .session
            .plan(&self.model)
            .unwrap_or_else(|error| panic!("{error}"));
        let graph = &self.model.graph;
        let id = graph.find("layers[0].moe.experts.wg").unwrap();
        let kept = solution.plan.source_layout(id);
        assert_eq!(kept.display(graph.ty(id).dims()), layout);

        // The printed plan replays to the same one, under the two meshes of its document.
        let text = self.session.plan_text(&self.model, &solution);
        let again = Session::from_text("plan.weave", &text, Path::new("."), None)
            .unwrap_or_else(|error| panic!("{text}\n{error}"));
        let replayed = again
            .plan(&self.model)
            .unwrap_or_else(|error| panic!("{text}\n{error}"));
        assert_eq!(replayed.plan.placements, solution.plan.placements);
        assert_eq!(replayed.plan.mesh, solution.plan.mesh);

        let options = CompileOptions {
            keep: Keep::Gradients,
            ..CompileOptions::default()
        };
        let compiled = self
            .session
            .compile(&self.model, &solution.plan, &options)
            .unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("artifact");
        artifact::write(&path, &compiled.program, &compiled.kernels, "").unwrap();
        let (program, kernels) = artifact::load(&path).unwrap();
        let mut execution = Execution::new(program, kernels, &SessionOptions::default()).unwrap();
        let (batch, seq) = self.session.request.job.sizes();
        let vocab = self.session.decoder().unwrap().vocab;
        let (tokens, targets) = golden_tokens(batch, seq, vocab);
        let whole = self.model.whole();
        for (name, data) in [("tokens", tokens), ("targets", targets)] {
            let ty = whole.ty(whole.find(name).unwrap()).clone();
            execution
                .set(name, &HostTensor::new(ty, Elements::I32(data)).unwrap())
                .unwrap();
        }
        execution
    }

    /// A step against the oracle's, then further ones against published losses.
    fn check(&self, layout: &str, truth: &StepResult, published: &[f64]) -> Vec<String> {
        let mut execution = self.start(layout);
        execution.step().unwrap();
        let mut failures = Vec::new();
        let loss = execution.loss().unwrap();
        if (loss - truth.loss()).abs() > TOLERANCE * truth.loss() {
            failures.push(format!("loss {loss}, the oracle's is {}", truth.loss()));
        }
        let whole = self.model.whole();
        for (param, gradient) in &whole.gradients {
            let name = &whole.tensor(*gradient).name;
            let error = relative_error(&execution.get(name).unwrap(), &truth.gradients[param]);
            if error.is_nan() || error > TOLERANCE {
                failures.push(format!("{name}: relative error {error:e}"));
            }
        }
        for (step_idx, want) in published.iter().enumerate() {
            if step_idx > 0 {
                execution.step().unwrap();
            }
            let got = execution.loss().unwrap();
            if (got - want).abs() > GOLDEN_TOLERANCE {
                failures.push(format!("step {step_idx}: loss {got}, published {want}"));
            }
        }
        failures
    }
}

fn relative_error(value: &HostTensor, expected: &Value) -> f64 {
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0_f64, f64::max);
    let scale = most(&mut expected.data().iter().map(|x| x.abs()));
    let pairs = value.as_f32().unwrap().iter().zip(expected.data());
    let error = most(&mut pairs.map(|(got, want)| (f64::from(*got) - want).abs()));
    if scale == 0.0 { error } else { error / scale }
}

fn check_folds(capacity: &str, published: &[f64; 5]) {
    let config = format!("golden {{ size tiny capacity {capacity} }}");
    let mut truth: Option<StepResult> = None;
    let mut failures = Vec::new();
    for (name, n_ranks, rest, layout) in FOLDS {
        let rest = format!("train batch 8 seq 64 optimizer adamw\n{rest}");
        let case = Case::new(n_ranks, &config, &rest);
        let truth = match &truth {
            // Ids of gradients differ from graph to graph: a pipeline's is not simplified.
            Some(truth) if !rest.contains("pipeline") => truth,
            _ => truth.insert(case.truth()),
        };
        let found = case.check(layout, truth, published);
        failures.extend(
            found
                .into_iter()
                .map(|failure| format!("{name}: {failure}")),
        );
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_golden_model_folds_with_capacity() {
    check_folds("2", &MOE_CAPACITY_2);
}

#[test]
fn the_golden_model_folds_without_drops() {
    check_folds("0", &MOE_DROPLESS);
}

#[test]
fn choices_of_64_experts_fold_with_the_losses_of_routers() {
    let mut failures = Vec::new();
    for top_k in [1, 2, 8] {
        let config = format!(
            "llama {{\n  layers 2 embed 32 heads 4 ffn 16 vocab 64\n  experts 64 topk {top_k} \
             capacity 2 shared_ffn 24\n  balance 0.02 z 0.01\n}}"
        );
        let rest = "train batch 4 seq 32 optimizer adamw\nmesh main = dp:2 > tp:2\n\
                    mesh moe = ep:4 refolds main\napply dp(dp)\napply megatron(tp)\napply ep(ep)";
        let case = Case::new(4, &config, rest);
        let found = case.check("[expert/(dp_ep,tp_ep), embed, ffn]", &case.truth(), &[]);
        failures.extend(
            found
                .into_iter()
                .map(|failure| format!("top {top_k}: {failure}")),
        );
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check_travels(capacity: &str, published: Option<&[f64; 5]>) {
    let mut failures = Vec::new();
    for (name, n_ranks, parts, rest, layout) in TRAVELS {
        let config = format!("golden {{ size tiny capacity {capacity} subsequences {parts} }}");
        let rest = format!("train batch 8 seq 64 optimizer adamw\n{TACTICS}{rest}");
        let case = Case::new(n_ranks, &config, &rest);
        let solution = case.session.plan(&case.model).unwrap();
        let (program, _) = case.session.outline(&case.model, &solution.plan).unwrap();
        let mut found: Vec<String> = counted_collectives(&program);
        found.dedup();
        if !found.iter().any(|op| op == "all_to_all") {
            failures.push(format!("{name}: counted rows go by {found:?}"));
        }
        let (truth, published) = (case.truth(), published.map_or(&[][..], |losses| losses));
        // Parts of sequences drop other tokens than whole ones.
        let published = if parts == 1 || capacity == "0" {
            published
        } else {
            &[]
        };
        let found = case.check(layout, &truth, published);
        failures.extend(
            found
                .into_iter()
                .map(|failure| format!("{name}: {failure}")),
        );
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn tokens_travel_on_every_mapping_with_capacity() {
    check_travels("2", Some(&MOE_CAPACITY_2));
}

#[test]
fn tokens_travel_on_every_mapping_without_drops() {
    check_travels("0", Some(&MOE_DROPLESS));
}

/// The collectives of rank 0 that send counted rows, in their order.
fn counted_collectives(program: &Program) -> Vec<String> {
    let instructions = program.ranks[0].instructions.iter();
    instructions
        .filter(|instruction| instruction.rows.is_some())
        .filter_map(|instruction| match &instruction.action {
            Action::Collective { op, .. } => Some(op.name().to_owned()),
            _ => None,
        })
        .collect()
}

/// A token's features cross once for every expert of another device, each way; nothing that fills up
/// slots is sent.
#[test]
fn dispatched_bytes_are_those_of_tokens_that_cross() {
    let (_, n_ranks, _, rest, layout) = TRAVELS[0];
    let rest = format!("train batch 8 seq 64 optimizer adamw\n{TACTICS}{rest}");
    let mut case = Case::new(n_ranks, "golden { size tiny capacity 0 }", &rest);
    let chosen: Vec<String> = (0..2)
        .map(|l| format!("layers[{l}].moe.chosen.1"))
        .collect();
    for name in &chosen {
        let id = case.model.graph.find(name).unwrap();
        case.model.graph.outputs.push(id);
    }
    let mut execution = case.start(layout);
    let timeline = execution.step().unwrap();
    let mut n_crossing = 0;
    for name in &chosen {
        let experts = execution.get(name).unwrap();
        // Two of eight sequences a rank, 64 tokens of two choices each; two of eight experts a rank.
        for (at, expert) in experts.as_i32().unwrap().iter().enumerate() {
            n_crossing += usize::from(at / (2 * 64 * 2) != *expert as usize / 2);
        }
    }
    // As many all_to_alls in both layers; each moves every crossing token once.
    let found = counted_collectives(execution.program());
    assert!(found.len() >= 4 && found.iter().all(|op| op == "all_to_all"));
    let expected = found.len() / 2 * n_crossing * 128 * 4;
    let counted = timeline.dispatched_bytes(execution.program()).unwrap();
    assert_eq!(counted, expected as u64);
}

/// The collectives of the ops whose names hold `part`, in their order on rank 0.
fn collectives(program: &Program, part: &str) -> Vec<String> {
    let instructions = program.ranks[0].instructions.iter();
    instructions
        .filter(|instruction| instruction.name.starts_with(part))
        .filter_map(|instruction| match &instruction.action {
            Action::Collective { op, .. } => Some(op.name().to_owned()),
            _ => None,
        })
        .collect()
}

/// Tokens that are dispatched where they are travel to their experts, instead of being gathered.
#[test]
fn tokens_travel_by_all_to_all() {
    let text = "plan \"folded\" model m cluster \"local:4\"\n\
                model m = golden { size tiny capacity 2 }\n\
                train batch 8 seq 64 optimizer adamw\n\
                mesh main = dp:4\nmesh moe = ep:4 refolds main\n\
                use main on *\nuse moe on layers[*].moe.experts\n\
                tactic travel(d, e) {\n\
                shard batch over d on .moe.dispatched\n\
                shard expert over e on .moe.experts.*\n}\n\
                apply dp(dp)\napply travel(dp, ep)\n";
    let session = Session::from_text("plan.weave", text, Path::new("."), None)
        .unwrap_or_else(|error| panic!("{error}"));
    let model = session.model().unwrap();
    let case = Case { session, model };
    let solution = case.session.plan(&case.model).unwrap();
    let (program, _) = case.session.outline(&case.model, &solution.plan).unwrap();
    for part in ["layers[0].moe.dispatched.", "layers[0].moe.experts.out."] {
        let found = collectives(&program, part);
        assert!(!found.is_empty(), "{part}");
        assert!(
            found.iter().all(|name| name == "all_to_all"),
            "{part}: {found:?}"
        );
    }
    let failures = case.check("[expert/dp_ep, embed, ffn]", &case.truth(), &MOE_CAPACITY_2);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The bias of a sigmoid router moves against the loads of the whole batch (DeepSeek-V3, §2.1.2), on
/// every mesh alike, by the optimizer's side.
#[test]
fn the_bias_of_a_router_goes_against_the_load() {
    const RATE: f64 = 0.01;
    let config = format!(
        "llama {{\n  layers 2 embed 32 heads 4 ffn 16 vocab 64\n  experts 8 topk 2\n  router sigmoid \
         bias_rate {RATE}\n}}"
    );
    let rest = "train batch 4 seq 32 optimizer adamw\nmesh main = dp:2 > tp:2\n\
                mesh moe = ep:4 refolds main\napply dp(dp)\napply megatron(tp)\napply ep(ep)";
    let mut case = Case::new(4, &config, rest);
    let name = "layers[1].moe.router_bias";
    let chosen = case.model.graph.find("layers[1].moe.chosen.1").unwrap();
    case.model.graph.outputs.push(chosen);
    let truth = case.truth();
    let layout = "[expert/(dp_ep,tp_ep), embed, ffn]";
    let failures = case.check(layout, &truth, &[]);
    assert!(failures.is_empty(), "{}", failures.join("\n"));

    let mut execution = case.start(layout);
    let mut expected = [0.0; 8];
    for _ in 0..3 {
        execution.step().unwrap();
        let mut load = [0; 8];
        for expert in execution
            .get("layers[1].moe.chosen.1")
            .unwrap()
            .as_i32()
            .unwrap()
        {
            load[*expert as usize] += 1;
        }
        assert_eq!(load.iter().sum::<i32>(), 4 * 32 * 2);
        for (bias, load) in expected.iter_mut().zip(load) {
            *bias -= RATE * f64::from((load - 32).signum());
        }
        let bias = execution.get(name).unwrap();
        for (got, want) in bias.as_f32().unwrap().iter().zip(expected) {
            assert!(
                (f64::from(*got) - want).abs() < 1e-6,
                "{got} against {want}"
            );
        }
    }
    assert!(expected.iter().any(|bias| *bias != 0.0));
}

#[test]
fn scores_that_are_no_numbers_are_named() {
    let config = "golden { size tiny capacity 2 }";
    let rest = "train batch 8 seq 64\nmesh main = dp:2\nmesh moe = ep:2 refolds main\n\
                apply dp(dp)\napply ep(ep)";
    let case = Case::new(2, config, rest);
    let mut execution = case.start("[expert/dp_ep, embed, ffn]");
    let mut router = execution.get("layers[1].moe.router").unwrap();
    let ty = router.ty().clone();
    let mut data = router.as_f32().unwrap().to_vec();
    data[3] = f32::NAN;
    router = HostTensor::new(ty, Elements::F32(data)).unwrap();
    execution.set("layers[1].moe.router", &router).unwrap();
    let Err(Error::Invalid(message)) = execution.step() else {
        panic!("the step must fail");
    };
    assert!(message.contains("layers[1].moe.chosen"), "{message}");
    assert!(message.contains("batch 0, seq 0"), "{message}");
}
