//! Times of the programs of a folder on a GPU, each kernel beside what the device can do.
//!
//! In: programs. Out: of each the seconds of a step, predicted and measured, and where they go: kernels
//! that move data beside the bandwidth of a copy, which is measured first; products and attention beside
//! the peak that the device's maker states.
//! Invariant: kernels are timed one by one, by events around them; the whole step as the graph that
//! training runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use meshweave_dsl::cluster::{Cluster, Device};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::{Action, Program};
use meshweave_dsl::timeline::{Category, Event, Timeline};
use meshweave_runtime::device::cuda::Cuda;
use meshweave_runtime::device::gpu::{Command, EventIdx, Gpu, StreamIdx, Work};

use super::{By, Failure, Task, cases, give_batch, name, on_gpu};

/// Steps of the graph, of which the fastest counts.
const N_STEPS: usize = 20;
/// Kernels that are listed, by their part of the step.
const N_LISTED: usize = 16;

/// Times all programs of a folder; the number of those that failed.
pub fn bench(folder: &Path, by: By) -> Result<usize, Failure> {
    let mut gpu = by.open()?;
    let copy = copy_bandwidth(&mut gpu)?;
    let known = preset_of(&gpu.name());
    println!("device     {}", gpu.name());
    println!("products   {}", by.words());
    println!(
        "copies     {:.0} GB/s, read and written (measured)",
        copy / 1e9
    );
    match &known {
        Some(device) => println!("peaks      those of {} (stated by its maker)", device.name),
        None => println!("peaks      not known for this device"),
    }
    drop(gpu);
    let mut n_failed = 0;
    for case in cases(folder)? {
        if let Err(error) = bench_one(&case, by, copy, known.as_ref()) {
            n_failed += 1;
            println!("{:<24}  FAILED: {error}", name(&case));
        }
    }
    Ok(n_failed)
}

fn bench_one(case: &Path, by: By, copy: f64, known: Option<&Device>) -> Result<(), Failure> {
    let Task { vocab } = serde_json::from_slice(&std::fs::read(case.join("expected.json"))?)?;
    let mut session = on_gpu(case, by)?;
    give_batch(&mut session, vocab, 0)?;
    // The first step loads what it needs; the second one's instructions are timed one by one.
    session.step()?;
    let eager = session.step()?;
    let mut graph_s = f64::INFINITY;
    for _ in 0..N_STEPS {
        let start = Instant::now();
        session.step()?;
        graph_s = graph_s.min(start.elapsed().as_secs_f64());
    }
    let program = session.program();
    println!(
        "\n{}: step {:.3} ms as a graph, {:.3} ms kernel by kernel (measured); arena {:.2} GB",
        name(case),
        1e3 * graph_s,
        1e3 * eager.step_s(),
        session.arena_bytes().iter().sum::<usize>() as f64 / 1e9
    );
    println!("  ms a step   times   of the limit   kernel");
    let kinds = by_kind(program, &eager);
    for (label, kind) in kinds.iter().take(N_LISTED) {
        println!(
            "  {:9.3}   {:5}   {:>12}   {label}",
            1e3 * kind.seconds,
            kind.n_times,
            kind.of_limit(copy, known)
        );
    }
    let left: f64 = kinds
        .iter()
        .skip(N_LISTED)
        .map(|(_, kind)| kind.seconds)
        .sum();
    if left > 0.0 {
        println!(
            "  {:9.3}                          {} others",
            1e3 * left,
            kinds.len() - N_LISTED
        );
    }
    Ok(())
}

/// Executions of the same instruction in all layers.
#[derive(Default)]
struct Kind {
    seconds: f64,
    n_times: usize,
    n_flops: f64,
    n_bytes: f64,
    /// Of the operands of products and attention.
    dtype: Option<DType>,
}

impl Kind {
    /// What it reaches: operations a second where it multiplies, else bytes a second.
    fn of_limit(&self, copy: f64, known: Option<&Device>) -> String {
        let (rate, unit, limit) = match self.dtype {
            Some(dtype) => {
                let peak = known.and_then(|device| peak(device, dtype));
                (
                    self.n_flops / self.seconds / 1e12,
                    "TFLOP/s",
                    peak.map(|peak| peak / 1e12),
                )
            }
            None => (self.n_bytes / self.seconds / 1e9, "GB/s", Some(copy / 1e9)),
        };
        match limit {
            Some(limit) => format!("{:.0} %, {rate:.0} {unit}", 100.0 * rate / limit),
            None => format!("{rate:.0} {unit}"),
        }
    }
}

/// Operations a second of products of a type: those of f32 run in f32, not in tf32.
fn peak(device: &Device, dtype: DType) -> Option<f64> {
    match dtype {
        DType::F32 => Some(device.vector_flops_per_s),
        dtype => device.matmul_flops_per_s.get(&dtype).copied(),
    }
}

/// The preset of a device: the one of its maker's name, such as `NVIDIA H100 80GB HBM3`.
fn preset_of(name: &str) -> Option<Device> {
    let name = name.to_lowercase();
    let words: Vec<&str> = name.split(|c: char| !c.is_alphanumeric()).collect();
    let presets = Cluster::preset_names().into_iter();
    let preset = presets
        .filter(|preset| {
            preset
                .split('-')
                .next()
                .is_some_and(|first| words.contains(&first))
        })
        .min_by_key(|preset| preset.len())?;
    Cluster::preset(preset).ok().map(|cluster| cluster.device)
}

/// Kinds of instructions by their seconds, greatest first.
fn by_kind(program: &Program, timeline: &Timeline) -> Vec<(String, Kind)> {
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    let own = |event: &&Event| !matches!(event.category, Category::Collective | Category::Message);
    for event in timeline.events.iter().filter(own) {
        let kind = kinds.entry(of_any_layer(&event.name)).or_default();
        kind.seconds += event.duration_s;
        kind.n_times += 1;
        kind.n_flops += event.n_flops;
        kind.n_bytes += event.n_bytes;
        kind.dtype = operands(program, event);
    }
    let mut kinds: Vec<(String, Kind)> = kinds.into_iter().collect();
    kinds.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    kinds
}

/// The type of what an instruction multiplies.
fn operands(program: &Program, event: &Event) -> Option<DType> {
    let rank = program.ranks.get(event.rank)?;
    let buffer = match &rank.instructions.get(event.instruction)?.action {
        Action::Contract { a, .. } => *a,
        Action::Attention { q, .. } => *q,
        Action::AttentionGrad { inputs, .. } => inputs[0],
        _ => return None,
    };
    Some(rank.buffers.get(buffer.index())?.ty.dtype)
}

/// `layers[*].attn.q` of `layers[3].attn.q`.
fn of_any_layer(name: &str) -> String {
    let mut label = String::with_capacity(name.len());
    let mut is_index = false;
    for c in name.chars() {
        match c {
            '[' => label.push_str("[*"),
            _ if is_index && c.is_ascii_digit() => {}
            _ => label.push(c),
        }
        is_index = c == '[' || is_index && c.is_ascii_digit();
    }
    label
}

/// Bytes read and written a second by a copy of 1 GiB, the best of ten.
fn copy_bandwidth(gpu: &mut Cuda) -> Result<f64, Failure> {
    const N_BYTES: usize = 1 << 30;
    let (from, to) = (gpu.allocate(N_BYTES)?, gpu.allocate(N_BYTES)?);
    gpu.reserve(1, 2, 0)?;
    let stream = StreamIdx(0);
    let command = |work| Command { stream, work };
    let commands = [
        command(Work::Record(EventIdx(0))),
        command(Work::Copy {
            to,
            from,
            n_bytes: N_BYTES,
        }),
        command(Work::Record(EventIdx(1))),
    ];
    let mut best_s = f64::INFINITY;
    for _ in 0..10 {
        gpu.submit(&commands)?;
        gpu.synchronize()?;
        best_s = best_s.min(gpu.elapsed_s(EventIdx(0), EventIdx(1))?);
    }
    Ok(2.0 * N_BYTES as f64 / best_s)
}
