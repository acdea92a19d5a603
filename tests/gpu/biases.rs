//! Biases that products add: fewer kernels, and the same values.

use meshweave_compiler::model::{Activation, AttentionBias, NormKind, Positions};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::Action;

use super::*;
use crate::support::golden::altered;

/// Layer norms, learned positions, GELU, tied embeddings, and biases everywhere; those of keys, which no
/// score depends on, where they are asked for.
pub(super) fn gpt(of_keys: bool) -> Graph {
    altered(None, |config| {
        config.norm.kind = NormKind::Layer;
        config.positions = Positions::Learned { n_positions: 8 };
        config.attention.bias = AttentionBias {
            q: true,
            k: of_keys,
            v: true,
            o: true,
        };
        config.ffn.activation = Activation::GeluTanh;
        config.ffn.gated = false;
        config.ffn.bias = true;
        config.tied = true;
    })
}

fn compiled_for(graph: &Graph, plan: &Plan, options: &CompileOptions) -> Compiled {
    let cluster = Cluster::local(plan.mesh.n_ranks(), &Host::nominal());
    compile(graph, plan, &cluster, options).unwrap()
}

/// What a rank does, an instruction a line.
fn listing(program: &Program) -> Vec<String> {
    let rank = &program.ranks[0];
    let name = |id: meshweave_dsl::program::BufferId| &rank.buffers[id.index()].name;
    let instructions = rank.instructions.iter().map(|one| match &one.action {
        Action::Kernel { args, .. } => {
            let args: Vec<&str> = args.iter().map(|id| name(*id).as_str()).collect();
            format!("kernel {}", args.join(", "))
        }
        Action::Contract { a, b, c, bias, .. } => {
            let bias = bias
                .as_ref()
                .map(|bias| format!(" + {}", name(bias.buffer)));
            let bias = bias.unwrap_or_default();
            format!("{} = {} · {}{bias}", name(*c), name(*a), name(*b))
        }
        Action::Attention { o, .. } => format!("attention {}", name(*o)),
        _ => format!("other {}", one.name),
    });
    instructions.collect()
}

/// Queries' and values' biases are no kernels any more; that of the first half of the network saves a
/// pass over what its gradient needs; the others stay with the residual's kernel.
#[test]
fn products_add_biases() {
    let graph = gpt(false);
    let plan = plan(&graph, &[("dp", 1)], &[]);
    let host = CompileOptions {
        gpu: None,
        ..options()
    };
    let [host, device] = [host, options()].map(|options| compiled_for(&graph, &plan, &options));
    let n_kernels = |program: &Program| {
        let instructions = program.ranks[0].instructions.iter();
        let kernels = instructions.filter(|one| matches!(one.action, Action::Kernel { .. }));
        kernels.count()
    };
    let n_layers = 2;
    assert_eq!(
        n_kernels(&host.program) - n_kernels(&device.program),
        2 * n_layers
    );
    let is_biased = |action: &Action| matches!(action, Action::Contract { bias: Some(_), .. });
    let biased = |program: &Program| {
        let instructions = program.ranks[0].instructions.iter();
        instructions.filter(|one| is_biased(&one.action)).count()
    };
    assert_eq!(biased(&host.program), 0);
    assert_eq!(biased(&device.program), 3 * n_layers);
    let lines = listing(&device.program);
    let layer = lines.iter().take_while(|line| !line.contains("layers[1]"));
    let layer: Vec<&str> = layer.map(String::as_str).collect();
    insta::assert_snapshot!("a_layer_with_biases", layer.join("\n"));

    check(&graph, &plan, Library::None, 1);
    check(&graph, &plan, Library::Products, 2);

    // The same program on a host.
    let kernels = artifact::load_kernels(&device.program, &device.kernels).unwrap();
    let options = SessionOptions::default();
    let mut session = Session::new(device.program, kernels, &options).unwrap();
    give_batch(&graph, &mut session);
    check_steps(&graph, session, F32);
}

/// In bf16 biases are cast as what they are added to.
#[test]
fn biases_of_bf16_products() {
    let graph = gpt(true);
    let plan = Plan {
        storage: DType::Bf16,
        ..plan(&graph, &[("dp", 1)], &[])
    };
    let program = compiled_for(&graph, &plan, &options()).program;
    let rank = &program.ranks[0];
    let mut n_biased = 0;
    for instruction in &rank.instructions {
        if let Action::Contract {
            c,
            bias: Some(bias),
            ..
        } = &instruction.action
        {
            let dtype = |id: meshweave_dsl::program::BufferId| rank.buffers[id.index()].ty.dtype;
            assert_eq!([*c, bias.buffer].map(dtype), [DType::Bf16; 2]);
            n_biased += 1;
        }
    }
    assert_eq!(n_biased, 8);
}

/// A bias that its buffer does not hold is refused before anything runs.
#[test]
fn damaged_biases_are_refused() {
    let graph = gpt(false);
    let plan = plan(&graph, &[("dp", 1)], &[]);
    let compiled = compiled_for(&graph, &plan, &options());
    let damages: [fn(&mut Vec<usize>); 2] = [
        |strides| strides.truncate(1),
        |strides| strides.iter_mut().for_each(|stride| *stride *= 2),
    ];
    for damage in damages {
        let mut program = compiled.program.clone();
        let mut actions = program.ranks[0].instructions.iter_mut();
        let bias = actions.find_map(|one| match &mut one.action {
            Action::Contract { bias, .. } => bias.as_mut(),
            _ => None,
        });
        damage(&mut bias.unwrap().strides);
        let code = compiled.code.as_ref().unwrap();
        let gpu = Box::new(Simulated::new(Library::Products, 1));
        let options = SessionOptions::default();
        let on_gpu = Session::on_gpu(program.clone(), code, gpu, &options);
        let kernels = artifact::load_kernels(&program, &compiled.kernels).unwrap();
        for refused in [on_gpu.err(), Session::new(program, kernels, &options).err()] {
            let message = refused.unwrap().to_string();
            assert!(message.contains("damaged program"), "{message}");
        }
    }
}
