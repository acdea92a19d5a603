//! Mappings as text.
//!
//! Enters: a document and the mapping that was found for it. Leaves: the same document with a witness
//! for every hole, and with the lines that it lacks to say the whole mapping.
//! Invariant: freezing the printed document leaves exactly this mapping; thawing it leaves the intent.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Context, Mapping, Module, Recompute};
use meshweave_dsl::units::{Number, Quantity, Unit};
use meshweave_dsl::weave::ast::{
    self, Apply, Arg, AxisRef, Block, Choice, Comment, Degree, Document, Index, IndexItem, Line,
    MemoryItem, MeshDef, Name, NodeList, Offload, OffloadTo, Pattern, Pipeline, PipelineItem,
    RecomputePolicy, Segment, Selector, Spanned, Statement, Target, TensorClass, Trivia, UseMesh,
    Value,
};

use super::axes::{EXPERTS, MAIN, grid_axis};
use super::saving::PARTS;
use super::{FORMATS, MappingRequest};
use crate::resolve::replay::behind_head;
use meshweave_dsl::mapping::GridAxis;

/// `document` with what `mapping` decides on the cluster whose nodes are `placed` in the order of the
/// ranks; `remarks` stand above its first new or solved line.
pub fn print_mapping(
    document: &Document,
    request: &MappingRequest,
    (mapping, placed): (&Mapping, &Cluster),
    remarks: &[String],
) -> Document {
    let mut printed = document.clone();
    witness_job(&mut printed, request, mapping);
    let main = witness_meshes(&mut printed, request, mapping, placed);
    witness_tactics(&mut printed, &main, mapping);
    witness_pipeline(&mut printed, &main, request, mapping);
    witness_memory(&mut printed, mapping);
    remark(&mut printed, remarks);
    printed
}

fn name(text: &'static str) -> Name {
    Name::literal(text)
}

fn witnessed<T>(value: T) -> Choice<T> {
    Choice::auto().witnessed(value)
}

/// Fills `batch` and `dtype`, where they are holes.
fn witness_job(document: &mut Document, request: &MappingRequest, mapping: &Mapping) {
    let known = FORMATS
        .iter()
        .find(|(_, precision)| *precision == mapping.precision);
    let format = known.map(|(word, _)| Value::Word(name(word)));
    let batch = Value::Number(Number::Int(request.workload.batch as i64));
    for line in &mut document.body.lines {
        let (Statement::Train(job) | Statement::Infer(job)) = &mut line.item.node else {
            continue;
        };
        for setting in &mut job.settings {
            let witness = match setting.node.key.as_str() {
                "batch" => Some(&batch),
                "dtype" => format.as_ref(),
                _ => None,
            };
            let Some(witness) = witness else { continue };
            for value in &mut setting.node.values {
                value.node = value.node.clone().witnessed(witness.clone());
            }
        }
    }
}

/// The degree of an axis.
fn degree(mapping: &Mapping, axis: GridAxis) -> u64 {
    let degree = match axis {
        GridAxis::Tp => mapping.tp,
        GridAxis::Cp => mapping.cp,
        GridAxis::Dp => mapping.dp,
        GridAxis::Pp => mapping.pp,
        GridAxis::Ep => mapping.ep,
        GridAxis::Etp => mapping.etp,
        GridAxis::Edp => mapping.edp(),
    };
    degree as u64
}

/// Behind the last statement that `is_kin`, or behind the head.
fn behind(document: &Document, is_kin: impl Fn(&Statement) -> bool) -> usize {
    let lines = &document.body.lines;
    let at = lines.iter().rposition(|line| is_kin(&line.item.node));
    at.map_or_else(|| behind_head(document), |at| at + 1)
}

/// Fills or adds the nodes that ranks take, where they are not all in order.
fn witness_nodes(mesh: &mut MeshDef, placed: &Cluster) {
    if placed.order.is_empty() && mesh.on.is_none() {
        return;
    }
    let nodes = NodeList::of(&placed.placed_nodes());
    let on = mesh.on.take().map_or_else(Choice::auto, |on| on.node);
    mesh.on = Some(Spanned::from(on.witnessed(nodes)));
}

/// Fills or adds the meshes; the name of the main one.
fn witness_meshes(
    document: &mut Document,
    request: &MappingRequest,
    mapping: &Mapping,
    placed: &Cluster,
) -> Name {
    let mut main = None;
    let mut has_experts = false;
    for line in &mut document.body.lines {
        let Statement::Mesh(mesh) = &mut line.item.node else {
            continue;
        };
        match mesh.refolds {
            None => {
                main = Some(mesh.name.node.clone());
                witness_nodes(mesh, placed);
            }
            Some(_) => has_experts = true,
        }
        for axis in &mut mesh.axes {
            let Some(grid_axis) = grid_axis(axis.name.as_str()) else {
                continue;
            };
            let value = degree(mapping, grid_axis);
            match &mut axis.node.degree {
                Degree::Is(choice) => *choice = choice.clone().witnessed(value),
                Degree::Rest { witness } | Degree::Same { witness } => *witness = Some(value),
            }
        }
    }
    let is_mesh = |statement: &Statement| matches!(statement, Statement::Mesh(_));
    let mesh = |own: &'static str, refolds: Option<&Name>, order: [&'static str; 4]| {
        let rest = if refolds.is_some() { "edp" } else { "dp" };
        let axes = order.map(|axis| {
            let value = grid_axis(axis).map_or(1, |axis| degree(mapping, axis));
            let degree = match axis {
                "pp" if refolds.is_some() => Degree::Same {
                    witness: Some(value),
                },
                axis if axis == rest => Degree::Rest {
                    witness: Some(value),
                },
                _ => Degree::Is(witnessed(value)),
            };
            Spanned::from(ast::Axis {
                name: name(axis),
                degree,
                within: None,
            })
        });
        Statement::Mesh(MeshDef {
            name: name(own).into(),
            axes: axes.into(),
            refolds: refolds.cloned().map(Spanned::from),
            on: None,
        })
    };
    let main = main.unwrap_or_else(|| {
        let mut main = mesh("main", None, MAIN);
        if let Statement::Mesh(mesh) = &mut main {
            witness_nodes(mesh, placed);
        }
        let mut line = Line::of(main);
        line.lead.push(Trivia::Blank);
        let at = behind_head(document);
        document.body.lines.insert(at, line);
        name("main")
    });
    if request.workload.model.moe.is_some() && !has_experts {
        let at = behind(document, is_mesh);
        let line = Line::of(mesh("moe", Some(&main), EXPERTS));
        document.body.lines.insert(at, line);
        let selector = Selector {
            is_floating: false,
            segments: vec![
                segment("layers", Some(Index::All)),
                segment("moe", None),
                segment("experts", None),
            ],
        };
        let uses = [
            (main.clone(), Selector::everything()),
            (name("moe"), selector),
        ];
        let has_use = |document: &Document, mesh: &Name| {
            document.statements().any(
                |statement| matches!(&statement.node, Statement::Use(item) if item.mesh.node == *mesh),
            )
        };
        for (mesh, on) in uses {
            if has_use(document, &mesh) {
                continue;
            }
            let at = behind(document, |statement| {
                matches!(statement, Statement::Mesh(_) | Statement::Use(_))
            });
            let statement = Statement::Use(UseMesh {
                mesh: mesh.into(),
                on: vec![on.into()],
                overrides: false,
            });
            document.body.lines.insert(at, Line::of(statement));
        }
    }
    main
}

fn segment(text: &'static str, index: Option<Index>) -> Segment {
    Segment::Named {
        name: Pattern::literal(text),
        index,
    }
}

fn word(text: &'static str) -> Arg {
    Arg::Axis(AxisRef {
        mesh: None,
        axis: name(text),
    })
}

fn context_word(context: Context) -> &'static str {
    match context {
        Context::Ring => "ring",
        Context::AllGather => "all_gather",
        Context::Ulysses => "ulysses",
    }
}

/// Fills or adds `zero`, `sp` and `context`.
fn witness_tactics(document: &mut Document, main: &Name, mapping: &Mapping) {
    let axis = |axis: &'static str| {
        Arg::Axis(AxisRef {
            mesh: Some(main.clone()),
            axis: name(axis),
        })
    };
    let number = |value: usize| Arg::Number(Number::Int(value as i64));
    let group = mapping.zero.group.unwrap_or(mapping.dp);
    let sequence = if mapping.sequence_parallel {
        axis("tp")
    } else {
        word("none")
    };
    let wanted: Vec<(&'static str, Vec<Choice<Arg>>)> = vec![
        (
            "zero",
            vec![
                witnessed(number(usize::from(mapping.zero.stage))),
                Choice::Fixed(axis("dp")),
                witnessed(number(group)),
            ],
        ),
        ("sp", vec![witnessed(sequence)]),
        (
            "context",
            vec![
                witnessed(word(context_word(mapping.context))),
                Choice::Fixed(axis("cp")),
            ],
        ),
    ];
    let matters = |tactic: &str| match tactic {
        "zero" => mapping.dp > 1,
        "sp" => mapping.tp > 1,
        _ => mapping.cp > 1,
    };
    for (tactic, args) in wanted {
        let mut is_said = false;
        for line in &mut document.body.lines {
            let Statement::Apply(apply) = &mut line.item.node else {
                continue;
            };
            let own = apply.tactic.node.as_str();
            let is_it = own == tactic
                || tactic == "context" && matches!(own, "ring" | "all_gather" | "ulysses")
                || tactic == "zero" && own == "fsdp";
            if !is_it {
                continue;
            }
            is_said = true;
            if own != tactic {
                continue;
            }
            for (given, value) in apply.args.iter_mut().zip(&args) {
                if let Some(value) = value.known() {
                    given.node = given.node.clone().witnessed(value.clone());
                }
            }
            // The group is said where it is a choice of its own.
            if tactic == "zero" && apply.args.len() == 2 && mapping.zero.group.is_some() {
                apply.args.extend(args.get(2).cloned().map(Spanned::from));
            }
        }
        if is_said || !matters(tactic) {
            continue;
        }
        let is_first = !document
            .statements()
            .any(|statement| matches!(statement.node, Statement::Apply(_)));
        let at = behind(document, |statement| {
            matches!(
                statement,
                Statement::Mesh(_) | Statement::Use(_) | Statement::Apply(_)
            )
        });
        let mut line = Line::of(Statement::Apply(Apply {
            tactic: name(tactic).into(),
            args: args.into_iter().map(Spanned::from).collect(),
            except: Vec::new(),
        }));
        if is_first {
            line.lead.push(Trivia::Blank);
        }
        document.body.lines.insert(at, line);
    }
}

/// Fills or adds the pipeline block.
fn witness_pipeline(
    document: &mut Document,
    main: &Name,
    request: &MappingRequest,
    mapping: &Mapping,
) {
    let is_pipeline =
        |line: &&mut Line<Statement>| matches!(line.item.node, Statement::Pipeline(_));
    if document.body.lines.iter_mut().find(is_pipeline).is_none() {
        let mut line = Line::of(Statement::Pipeline(Pipeline {
            over: AxisRef {
                mesh: Some(main.clone()),
                axis: name("pp"),
            }
            .into(),
            body: Block::default(),
        }));
        line.lead.push(Trivia::Blank);
        let at = behind(document, |statement| {
            matches!(
                statement,
                Statement::Mesh(_) | Statement::Use(_) | Statement::Apply(_)
            )
        });
        document.body.lines.insert(at, line);
    }
    let Some(Statement::Pipeline(pipeline)) = document
        .body
        .lines
        .iter_mut()
        .map(|line| &mut line.item.node)
        .find(|statement| matches!(statement, Statement::Pipeline(_)))
    else {
        return;
    };
    let cuts = cuts(request, mapping);
    let n_microbatches = mapping.n_microbatches(request.workload.batch) as u64;
    let mut wanted = vec![
        PipelineItem::Chunks(witnessed(mapping.pipeline.chunks as u64)),
        PipelineItem::Microbatches(witnessed(n_microbatches)),
    ];
    let schedule = Name::new(&mapping.pipeline.schedule).ok();
    wanted.extend(schedule.map(|schedule| PipelineItem::Schedule(witnessed(schedule))));
    wanted.extend(
        cuts.clone()
            .map(|cuts| PipelineItem::CutBefore(witnessed(vec![cuts.into()]))),
    );
    if mapping.pp == 1 {
        wanted.retain(|item| matches!(item, PipelineItem::Microbatches(_)));
    }
    for item in wanted {
        let kind = std::mem::discriminant(&item);
        let own = pipeline
            .body
            .lines
            .iter_mut()
            .map(|line| &mut line.item.node)
            .find(|own| std::mem::discriminant(*own) == kind);
        match (own, item) {
            (None, item) => pipeline.body.lines.push(Line::of(item)),
            (
                Some(PipelineItem::Chunks(own)),
                PipelineItem::Chunks(Choice::Auto { witness, .. }),
            )
            | (
                Some(PipelineItem::Microbatches(own)),
                PipelineItem::Microbatches(Choice::Auto { witness, .. }),
            ) => fill(own, witness),
            (
                Some(PipelineItem::Schedule(own)),
                PipelineItem::Schedule(Choice::Auto { witness, .. }),
            ) => fill(own, witness),
            (
                Some(PipelineItem::CutBefore(own)),
                PipelineItem::CutBefore(Choice::Auto { witness, .. }),
            ) => fill(own, witness),
            _ => {}
        }
    }
}

fn fill<T: Clone>(own: &mut Choice<T>, witness: Option<T>) {
    if let Some(value) = witness {
        *own = own.clone().witnessed(value);
    }
}

/// `layers[4,8,12]`: where stages begin; none for one stage.
fn cuts(request: &MappingRequest, mapping: &Mapping) -> Option<Selector> {
    let n_stages = mapping.n_stages();
    let n_layers = request.workload.model.n_layers;
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    let mut at = 0;
    let mut starts: Vec<IndexItem> = Vec::new();
    for stage in 0..n_stages - 1 {
        at += match &mapping.pipeline.layers {
            Some(layers) => layers.get(stage).copied().unwrap_or(0),
            None => even(stage),
        };
        let next = at as u64;
        // Neighbors are a range.
        match starts.last_mut() {
            Some(IndexItem::At(before)) if *before + 1 == next => {
                let start = *before;
                starts.pop();
                starts.push(IndexItem::Range {
                    start,
                    end: Some(next + 1),
                });
            }
            Some(IndexItem::Range { end, .. }) if *end == Some(next) => *end = Some(next + 1),
            _ => starts.push(IndexItem::At(next)),
        }
    }
    (!starts.is_empty()).then(|| Selector {
        is_floating: false,
        segments: vec![segment("layers", Some(Index::Of(starts)))],
    })
}

/// Fills or adds the memory block.
fn witness_memory(document: &mut Document, mapping: &Mapping) {
    let is_memory = |statement: &Statement| matches!(statement, Statement::Memory(_));
    if !document
        .statements()
        .any(|statement| is_memory(&statement.node))
    {
        let mut line = Line::of(Statement::Memory(Block::default()));
        line.lead.push(Trivia::Blank);
        let at = behind(document, |statement| {
            matches!(
                statement,
                Statement::Mesh(_)
                    | Statement::Use(_)
                    | Statement::Apply(_)
                    | Statement::Pipeline(_)
            )
        });
        document.body.lines.insert(at, line);
    }
    let Some(Statement::Memory(block)) = document
        .body
        .lines
        .iter_mut()
        .map(|line| &mut line.item.node)
        .find(|statement| is_memory(statement))
    else {
        return;
    };
    let again: Vec<Module> = match &mapping.recompute {
        Recompute::Modules(parts) => parts.iter().copied().collect(),
        _ => Vec::new(),
    };
    let whole = match &mapping.recompute {
        Recompute::None | Recompute::Modules(_) => RecomputePolicy::None,
        Recompute::Full => RecomputePolicy::Full,
        Recompute::Layers(count) => RecomputePolicy::First(vec![*count as u64]),
        Recompute::LayersByRank(counts) => {
            RecomputePolicy::First(counts.iter().map(|count| *count as u64).collect())
        }
    };
    let mut said: Vec<Module> = Vec::new();
    let mut is_whole_said = false;
    let (mut is_optimizer_said, mut are_activations_said) = (false, false);
    let part = mapping.offload.activations;
    let activations = if part == 0.0 {
        OffloadTo::None
    } else if part == 1.0 {
        OffloadTo::Host
    } else {
        OffloadTo::Part(Quantity::new(100.0 * part, Unit::Percent))
    };
    let optimizer = if mapping.offload.optimizer {
        OffloadTo::Host
    } else {
        OffloadTo::None
    };
    for line in &mut block.lines {
        match &mut line.item.node {
            MemoryItem::Budget(_) | MemoryItem::Headroom(_) => {}
            MemoryItem::Recompute(item) => {
                let on = &item.on.node;
                if *on == Selector::everything() || on.matches("layers[0]") {
                    is_whole_said = true;
                    item.policy = item.policy.clone().witnessed(whole.clone());
                    continue;
                }
                let own: Vec<Module> = PARTS
                    .iter()
                    .filter(|(path, _)| on.matches(&path.replace("[*]", "[0]")))
                    .map(|(_, module)| *module)
                    .collect();
                let policy = match own.iter().any(|module| again.contains(module)) {
                    true => RecomputePolicy::Full,
                    // Whole layers compute their parts again.
                    false if whole == RecomputePolicy::Full => RecomputePolicy::Full,
                    false => RecomputePolicy::None,
                };
                item.policy = item.policy.clone().witnessed(policy);
                said.extend(own);
            }
            MemoryItem::Offload(item) => match &item.on.node {
                Target::Class(TensorClass::Optimizer) => {
                    is_optimizer_said = true;
                    item.to = item.to.clone().witnessed(optimizer);
                }
                Target::Class(TensorClass::Activations) => {
                    are_activations_said = true;
                    item.to = item.to.clone().witnessed(activations);
                }
                _ => {}
            },
        }
    }
    let recompute = |on: Selector, policy: RecomputePolicy| {
        MemoryItem::Recompute(ast::Recompute {
            on: on.into(),
            policy: witnessed(policy),
            overrides: false,
        })
    };
    let mut lines = Vec::new();
    // Said even where parts are computed again: it decides about all others.
    if !is_whole_said {
        lines.push(recompute(Selector::everything(), whole));
    }
    for (path, module) in PARTS {
        if again.contains(&module) && !said.contains(&module) {
            let selector = path.split('.').map(|text| match text.strip_suffix("[*]") {
                Some(text) => segment(text, Some(Index::All)),
                None => segment(text, None),
            });
            let selector = Selector {
                is_floating: false,
                segments: selector.collect(),
            };
            lines.push(recompute(selector, RecomputePolicy::Full));
        }
    }
    let offload = |class: TensorClass, to: OffloadTo| {
        MemoryItem::Offload(Offload {
            on: Target::Class(class).into(),
            to: witnessed(to),
            overrides: false,
        })
    };
    if !is_optimizer_said {
        lines.push(offload(TensorClass::Optimizer, optimizer));
    }
    if !are_activations_said {
        lines.push(offload(TensorClass::Activations, activations));
    }
    block.lines.extend(lines.into_iter().map(Line::of));
}

/// Puts comments above the first mesh.
fn remark(document: &mut Document, remarks: &[String]) {
    let line = document
        .body
        .lines
        .iter_mut()
        .find(|line| matches!(line.item.node, Statement::Mesh(_)));
    let Some(line) = line else { return };
    // What an earlier plan said is no longer so.
    line.lead
        .retain(|trivia| !matches!(trivia, Trivia::Comment(comment) if is_remark(comment)));
    let comments = remarks
        .iter()
        .map(|text| Trivia::Comment(Comment::new(&format!("{MARK}{text}"))));
    line.lead.extend(comments);
}

/// What remarks of plans begin with.
pub const MARK: &str = "| ";

fn is_remark(comment: &Comment) -> bool {
    comment.text().starts_with(MARK)
}

/// Where the remarks of a plan are: their texts without the mark.
pub fn remarks(document: &Document) -> Vec<String> {
    let trivia = document.body.lines.iter().flat_map(|line| &line.lead);
    trivia
        .filter_map(|trivia| match trivia {
            Trivia::Comment(comment) => comment.text().strip_prefix(MARK).map(str::to_owned),
            Trivia::Blank => None,
        })
        .collect()
}
