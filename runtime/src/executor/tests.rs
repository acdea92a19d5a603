//! Small programs written by hand, on one and two ranks.

use std::ffi::c_void;
use std::fs;
use std::path::Path;

use meshweave_dsl::graph::{ConstInit, Init};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::op::{Group, OpKind};
use meshweave_dsl::program::{
    Action, Buffer, BufferId, ContractIndex, Instruction, KernelId, KernelSymbol, PROGRAM_VERSION,
    RankProgram, TensorPart,
};
use meshweave_dsl::timeline::Category;

use super::*;
use crate::checkpoint::{DataOrder, Event, Keeper, restore};

/// `w -= 0.1 dw`, one row an element.
unsafe extern "C" fn descend(args: *const *mut c_void, begin: i64, end: i64) {
    // SAFETY: the test's program gives two buffers of at least `end` elements.
    unsafe {
        let (w, dw) = ((*args).cast::<f32>(), (*args.add(1)).cast::<f32>());
        for i in begin as usize..end as usize {
            *w.add(i) -= 0.1 * *dw.add(i);
        }
    }
}

/// `loss = Σ y · step`.
unsafe extern "C" fn sum(args: *const *mut c_void, _begin: i64, _end: i64) {
    // SAFETY: the test's program gives a buffer of `N_ROWS / n_ranks` elements behind two scalars.
    unsafe {
        let (y, step, n) = (
            (*args).cast::<f32>(),
            (*args.add(1)).cast::<f32>(),
            (*args.add(2)).cast::<i32>(),
        );
        let loss = (*args.add(3)).cast::<f32>();
        *loss = (0..*n as usize).map(|i| *y.add(i)).sum::<f32>() * *step;
    }
}

const N_ROWS: usize = 6;
const N_COLUMNS: usize = 4;

fn f32s(shape: &[(&str, usize)]) -> TensorType {
    TensorType::new(DType::F32, shape.iter().copied())
}

/// y[row] = x[row, column] w[column] with rows over `dp`; dw = Σ over ranks of Σ_row x; w −= 0.1 dw;
/// loss = Σ y · step.
fn program(n_ranks: usize) -> Program {
    let mesh = Mesh::new([("dp", n_ranks)]);
    let by_rows = Layout::default().shard("row", "dp");
    let group = Group {
        axes: vec!["dp".into()],
        ranks: (0..n_ranks).collect(),
    };
    let global =
        |name: &str, ty: TensorType, role: Role, layout: Layout, buffer: u32| GlobalTensor {
            name: name.into(),
            parts: (0..n_ranks)
                .map(|rank| TensorPart {
                    rank,
                    buffer: BufferId(buffer),
                    region: layout.region(&ty.shape, &mesh, rank),
                })
                .collect(),
            ty,
            role,
            layout,
        };
    let scalar = || f32s(&[]);
    let ranks = (0..n_ranks).map(|rank| {
        let rows = by_rows.interval(&"row".into(), N_ROWS, &mesh, rank).len;
        let count = TensorType {
            dtype: DType::I32,
            shape: Vec::new(),
        };
        let shapes = [
            ("x", f32s(&[("row", rows), ("column", N_COLUMNS)])),
            ("w", f32s(&[("column", N_COLUMNS)])),
            ("step", scalar()),
            ("ones", f32s(&[("row", rows)])),
            ("count", count),
            ("y", f32s(&[("row", rows)])),
            ("partial dw", f32s(&[("column", N_COLUMNS)])),
            ("dw", f32s(&[("column", N_COLUMNS)])),
            ("partial loss", scalar()),
            ("loss", scalar()),
        ];
        let mut offset = 0;
        let buffers = shapes.into_iter().map(|(name, ty)| {
            let buffer = Buffer {
                name: name.into(),
                offset,
                persistent: false,
                ty,
            };
            offset += buffer.ty.n_bytes().next_multiple_of(64);
            buffer
        });
        let buffers: Vec<Buffer> = buffers.collect();
        let all_reduce = || OpKind::AllReduce {
            kind: ReduceKind::Sum,
            group: group.clone(),
        };
        let actions = [
            (
                "y",
                Action::Contract {
                    a: BufferId(0),
                    b: BufferId(1),
                    c: BufferId(5),
                    indices: vec![
                        ContractIndex {
                            size: rows,
                            a: N_COLUMNS,
                            b: 0,
                            c: 1,
                        },
                        ContractIndex {
                            size: N_COLUMNS,
                            a: 1,
                            b: 1,
                            c: 0,
                        },
                    ],
                    accumulate: false,
                    bias: None,
                },
            ),
            (
                "partial dw",
                Action::Contract {
                    a: BufferId(0),
                    b: BufferId(3),
                    c: BufferId(6),
                    indices: vec![
                        ContractIndex {
                            size: N_COLUMNS,
                            a: 1,
                            b: 0,
                            c: 1,
                        },
                        ContractIndex {
                            size: rows,
                            a: N_COLUMNS,
                            b: 1,
                            c: 0,
                        },
                    ],
                    accumulate: false,
                    bias: None,
                },
            ),
            (
                "dw",
                Action::Collective {
                    op: all_reduce(),
                    src: BufferId(6),
                    dst: BufferId(7),
                },
            ),
            (
                "partial loss",
                Action::Kernel {
                    kernel: KernelId(1),
                    args: [5, 2, 4, 8].map(BufferId).to_vec(),
                },
            ),
            (
                "loss",
                Action::Collective {
                    op: all_reduce(),
                    src: BufferId(8),
                    dst: BufferId(9),
                },
            ),
            (
                "w",
                Action::Kernel {
                    kernel: KernelId(0),
                    args: vec![BufferId(1), BufferId(7)],
                },
            ),
        ];
        let instructions = actions.into_iter().map(|(name, action)| Instruction {
            name: name.into(),
            action,
            n_flops: 1.0,
            n_bytes: 1.0,
            predicted_s: 0.0,
            live_bytes: offset,
            rows: None,
        });
        RankProgram {
            arena_bytes: offset,
            instructions: instructions.collect(),
            buffers,
            spans: Vec::new(),
        }
    });
    let symbol = |name: &str, n_rows| KernelSymbol {
        name: name.into(),
        description: name.into(),
        splittable: true,
        n_rows,
    };
    let count_layout = Layout::default();
    Program {
        version: PROGRAM_VERSION,
        name: "rows".into(),
        kernels: vec![symbol("descend", N_COLUMNS), symbol("sum", 1)],
        channels: Vec::new(),
        statements: Default::default(),
        sources: vec![
            global(
                "x",
                f32s(&[("row", N_ROWS), ("column", N_COLUMNS)]),
                Role::Input,
                by_rows.clone(),
                0,
            ),
            global(
                "w",
                f32s(&[("column", N_COLUMNS)]),
                Role::Param(Init::Hash {
                    stream: 5,
                    scale: 0.5,
                }),
                Layout::default(),
                1,
            ),
            global("step", scalar(), Role::Input, Layout::default(), 2),
            global(
                "ones",
                f32s(&[("row", N_ROWS)]),
                Role::Const(ConstInit::Fill(1.0.into())),
                by_rows.clone(),
                3,
            ),
            global(
                "count",
                TensorType {
                    dtype: DType::I32,
                    shape: Vec::new(),
                },
                Role::Const(ConstInit::Fill(((N_ROWS / n_ranks) as f64).into())),
                count_layout,
                4,
            ),
        ],
        outputs: vec![
            global("loss", scalar(), Role::Temp, Layout::default(), 9),
            global(
                "y",
                f32s(&[("row", N_ROWS)]),
                Role::Temp,
                by_rows.clone(),
                5,
            ),
            global(
                "dw",
                f32s(&[("column", N_COLUMNS)]),
                Role::Temp,
                Layout::default(),
                7,
            ),
        ],
        ranks: ranks.collect(),
        mesh,
    }
}

fn kernels() -> KernelTable {
    // SAFETY: the functions follow the contract of the program's two symbols.
    unsafe { KernelTable::from_functions(vec![descend, sum]) }
}

fn x() -> HostTensor {
    let data = (0..N_ROWS * N_COLUMNS)
        .map(|i| i as f32 / 8.0 - 1.0)
        .collect();
    HostTensor::new(
        f32s(&[("row", N_ROWS), ("column", N_COLUMNS)]),
        Elements::F32(data),
    )
    .unwrap()
}

#[test]
fn steps_are_the_same_on_every_mesh() {
    let mut ws = Vec::new();
    for (n_ranks, n_threads) in [(1, 1), (1, 2), (2, 1), (3, 2), (6, 1)] {
        let options = SessionOptions {
            threads_per_device: Some(n_threads),
            ..SessionOptions::default()
        };
        let mut session = Session::new(program(n_ranks), kernels(), &options).unwrap();
        let w: Vec<f32> = (0..N_COLUMNS)
            .map(|i| 0.5 * crate::reference::hash_uniform(5, i))
            .collect();
        assert_eq!(session.get("w").unwrap().as_f32().unwrap(), w);
        let expected_bytes: Vec<usize> = session
            .program()
            .ranks
            .iter()
            .map(|rank| rank.arena_bytes)
            .collect();
        assert_eq!(session.arena_bytes(), expected_bytes);
        session.set("x", &x()).unwrap();
        for step in 1..=3 {
            let before = session.get("w").unwrap();
            let timeline = session.step().unwrap();
            let y = session.get("y").unwrap();
            let (y, before) = (y.as_f32().unwrap(), before.as_f32().unwrap());
            for (row, y) in y.iter().enumerate() {
                let expected: f32 = (0..N_COLUMNS)
                    .map(|i| x().as_f32().unwrap()[row * N_COLUMNS + i] * before[i])
                    .sum();
                assert!((y - expected).abs() < 1e-5);
            }
            let loss = f64::from(y.iter().sum::<f32>()) * f64::from(step);
            assert!(
                (session.loss().unwrap() - loss).abs() < 1e-4,
                "the input `step` counts"
            );
            assert_eq!(timeline.n_ranks, n_ranks);
            assert_eq!(timeline.events.len(), 6 * n_ranks);
            assert!(timeline.step_s() > 0.0);
            let collectives = timeline
                .events
                .iter()
                .filter(|e| e.category == Category::Collective);
            assert_eq!(collectives.count(), 2 * n_ranks);
            for pair in timeline
                .events
                .windows(2)
                .filter(|pair| pair[0].rank == pair[1].rank)
            {
                assert!(pair[0].start_s + pair[0].duration_s <= pair[1].start_s + 1e-9);
            }
        }
        assert_eq!(session.n_steps(), 3);
        ws.push(session.get("w").unwrap());
    }
    for w in &ws[1..] {
        for (got, want) in w.as_f32().unwrap().iter().zip(ws[0].as_f32().unwrap()) {
            assert!((got - want).abs() < 1e-5);
        }
    }
}

#[test]
fn checkpoints_move_between_meshes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("step.safetensors");
    let options = SessionOptions::default();
    let mut one = Session::new(program(1), kernels(), &options).unwrap();
    one.set("x", &x()).unwrap();
    one.step().unwrap();
    crate::checkpoint::save(&one, &path).unwrap();
    let mut three = Session::new(
        program(3),
        kernels(),
        &SessionOptions { seed: 9, ..options },
    )
    .unwrap();
    assert_ne!(three.get("w").unwrap(), one.get("w").unwrap());
    restore(&mut three, &path, &order()).unwrap();
    assert_eq!(three.get("w").unwrap(), one.get("w").unwrap());
    assert_eq!(three.n_steps(), 1);
}

fn order() -> DataOrder {
    DataOrder {
        source: "x".into(),
        n_batch: 1,
        n_seq: 1,
    }
}

/// Makes a checkpoint of a session and waits for it.
fn keep(session: &Session, folder: &Path, n_kept: usize) -> Event {
    let mut keeper = Keeper::new(folder, n_kept, session);
    keeper.begin(session, &order()).unwrap();
    let report = keeper.report(true);
    keeper.conclude(&[report]).unwrap()
}

#[test]
fn shards_move_between_meshes_and_the_oldest_go() {
    let folder = tempfile::tempdir().unwrap();
    let options = SessionOptions::default();
    let mut two = Session::new(program(2), kernels(), &options).unwrap();
    two.set("x", &x()).unwrap();
    for _ in 0..3 {
        two.step().unwrap();
        assert!(matches!(keep(&two, folder.path(), 2), Event::Made(_)));
    }
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["step-00000002", "step-00000003"]);
    for n_ranks in [1, 2, 3] {
        let mut session = Session::new(program(n_ranks), kernels(), &options).unwrap();
        let resumed = restore(&mut session, folder.path(), &order()).unwrap();
        assert_eq!((resumed.n_steps, session.n_steps()), (3, 3));
        assert_eq!(session.get("w").unwrap(), two.get("w").unwrap());
        let other = DataOrder {
            n_batch: 2,
            ..order()
        };
        let error = restore(&mut session, folder.path(), &other).unwrap_err();
        assert!(error.to_string().contains("in batches of 2"), "{error}");
    }
}

#[test]
fn a_checkpoint_cut_off_at_any_byte_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let options = SessionOptions::default();
    let mut two = Session::new(program(2), kernels(), &options).unwrap();
    two.set("x", &x()).unwrap();
    for _ in 0..2 {
        two.step().unwrap();
        keep(&two, folder.path(), 0);
    }
    let newest = folder.path().join("step-00000002");
    let mut session = Session::new(program(1), kernels(), &options).unwrap();
    let resumed_at =
        |session: &mut Session| restore(session, folder.path(), &order()).unwrap().n_steps;
    let mut n_files = 0;
    for entry in fs::read_dir(&newest).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        for n in 0..bytes.len() {
            fs::write(&path, &bytes[..n]).unwrap();
            assert_eq!(resumed_at(&mut session), 1, "{} at {n}", path.display());
            let mut changed = bytes.clone();
            changed[n] ^= 1 << (n % 8);
            fs::write(&path, &changed).unwrap();
            assert_eq!(
                resumed_at(&mut session),
                1,
                "{} changed at {n}",
                path.display()
            );
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(resumed_at(&mut session), 1, "{} is gone", path.display());
        fs::write(&path, &bytes).unwrap();
        assert_eq!(resumed_at(&mut session), 2);
        n_files += 1;
    }
    assert_eq!(n_files, 3, "two ranks and the manifest");
}

#[test]
fn missing_and_wrong_values_are_refused() {
    let mut session = Session::new(program(2), kernels(), &SessionOptions::default()).unwrap();
    insta::assert_snapshot!(session.step().unwrap_err(), @"input `x` has not been given");
    insta::assert_snapshot!(session.set("z", &x()).unwrap_err(), @"the program has no source `z`; it has x, w, step, ones, count");
    insta::assert_snapshot!(session.set("w", &x()).unwrap_err(), @"source `w` is f32[column:4], the value given is f32[row:6, column:4]");
    insta::assert_snapshot!(session.get("dy").unwrap_err(), @"the program has neither an output nor a source `dy`; gradients are outputs only when asked for at compile time");
}

#[test]
fn damaged_programs_are_refused() {
    let refusal = |damage: &dyn Fn(&mut Program)| {
        let mut damaged = program(2);
        damage(&mut damaged);
        let session = Session::new(damaged, kernels(), &SessionOptions::default());
        session.map(|_| ()).unwrap_err().to_string()
    };
    insta::assert_snapshot!(refusal(&|p| p.version = 99), @"the program is of version 99, this runtime executes version 3; compile again");
    insta::assert_snapshot!(refusal(&|p| { p.ranks.pop(); }), @"damaged program: 1 ranks on a mesh of 2; compile again");
    insta::assert_snapshot!(refusal(&|p| { p.kernels.pop(); }), @"damaged program: 1 kernels are listed, 2 were given; compile again");
    insta::assert_snapshot!(
        refusal(&|p| p.ranks[1].arena_bytes = 128),
        @"rank 1, instruction 0 `y`: damaged program: buffer `y` of 12 bytes at offset 320 does not lie in an arena of 128 bytes; compile again"
    );
    insta::assert_snapshot!(
        refusal(&|p| p.ranks[0].buffers[5].offset = 16),
        @"rank 0, instruction 0 `y`: damaged program: `y` is written over `x`, which is in use; compile again"
    );
    insta::assert_snapshot!(
        refusal(&|p| p.ranks[0].buffers[1].ty = f32s(&[("column", 3)])),
        @"rank 0, instruction 0 `y`: damaged program: `w` f32[column:3] has 3 elements, the contraction spans 4; compile again"
    );
    insta::assert_snapshot!(
        refusal(&|p| p.sources[0].parts[1].region[0].start = 4),
        @"damaged program: the part [Interval { start: 4, len: 3 }, Interval { start: 0, len: 4 }] of `x` f32[row:6, column:4] does not fit the buffer f32[row:3, column:4]; compile again"
    );
    insta::assert_snapshot!(
        refusal(&|p| {
            let Action::Collective { dst, .. } = &mut p.ranks[1].instructions[2].action else { unreachable!() };
            *dst = BufferId(9);
        }),
        @"rank 1, instruction 2 `dw`: damaged program: all_reduce from f32[column:4] to f32[] over 2 ranks does not fit; compile again"
    );
    insta::assert_snapshot!(
        refusal(&|p| {
            let Action::Kernel { args, .. } = &mut p.ranks[0].instructions[3].action else { unreachable!() };
            args.push(BufferId(77));
        }),
        @"rank 0, instruction 3 `partial loss`: damaged program: buffer 77 of 10; compile again"
    );
}

#[test]
fn ranks_that_disagree_fail_together() {
    let mut program = program(2);
    // Rank 1 does the second collective first.
    program.ranks[1].instructions.swap(2, 4);
    let mut session = Session::new(program, kernels(), &SessionOptions::default()).unwrap();
    session.set("x", &x()).unwrap();
    let error = session.step().unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    assert_eq!(
        session.step().unwrap_err(),
        error,
        "the session stays failed"
    );
}
