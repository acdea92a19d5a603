//! Random syntax trees: every tree that the grammar allows, comments included.

use meshweave_dsl::schedule::{Channels, Command, Event, Item, StreamKind, Verb, Wire};
use meshweave_dsl::units::{Measure, Number, Quantity, Unit};
use meshweave_dsl::weave::Document;
use meshweave_dsl::weave::ast::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

fn name() -> impl Strategy<Value = Name> {
    const SPECIAL: &[&str] = &[
        "zb-h1", "1f1b", "main", "x-2", "override", "over", "on", "within", "rest", "except",
        "weight", "key", "a-b-c", "_", "F", "mb", "none", "golden", "mesh", "3d", "x-1e-5",
        "2s-3s",
    ];
    prop_oneof![
        2 => "[a-zA-Z_][a-zA-Z0-9_]{0,6}",
        1 => select(SPECIAL).prop_map(str::to_owned),
    ]
    .prop_filter_map("a name", |text| Name::new(&text).ok())
}

fn pattern() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        3 => "[a-z_][a-z0-9_]{0,5}",
        1 => "[a-z*][a-z0-9_*]{1,4}",
        1 => "[a-z*]{1,2}-[a-z0-9*]{1,2}",
        1 => "[a-z*][0-9*]{1,2}",
        1 => "[1-9][a-z]",
    ]
    .prop_filter_map("a pattern", |text| Pattern::new(&text).ok())
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z./]{0,8}", "[ -~\\n\\t\\ré\"\\\\]{0,8}"]
}

fn number() -> impl Strategy<Value = Number> {
    let float = prop::num::f64::NORMAL | prop::num::f64::ZERO | prop::num::f64::SUBNORMAL;
    prop_oneof![
        (0i64..5000).prop_map(Number::Int),
        any::<i64>().prop_map(Number::Int),
        float.prop_map(Number::Float),
        (0.0..10.0f64).prop_map(Number::Float),
    ]
}

fn quantity(measure: Measure) -> impl Strategy<Value = Quantity> {
    let units: Vec<Unit> = Unit::ALL
        .iter()
        .copied()
        .filter(|unit| unit.measure() == measure)
        .collect();
    (0i64..100_000, select(units)).prop_map(|(value, unit)| Quantity::new(value, unit))
}

fn any_quantity() -> impl Strategy<Value = Quantity> {
    (number(), select(Unit::ALL)).prop_map(|(value, unit)| Quantity { value, unit })
}

/// Fixed, `auto`, `auto{…}`, with or without a witness that is among the choices.
fn choice<T>(value: impl Strategy<Value = T> + Clone + 'static) -> impl Strategy<Value = Choice<T>>
where
    T: Clone + std::fmt::Debug + 'static,
{
    let bare = option::of(value.clone()).prop_map(|witness| Choice::Auto {
        among: Vec::new(),
        witness,
    });
    let chosen = (
        vec(value.clone(), 1..4),
        option::of(any::<prop::sample::Index>()),
    );
    let chosen = chosen.prop_map(|(among, index)| Choice::Auto {
        witness: index.map(|index| index.get(&among).clone()),
        among,
    });
    prop_oneof![2 => value.prop_map(Choice::Fixed), 1 => bare, 1 => chosen]
}

fn spanned<T: std::fmt::Debug>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Spanned<T>> {
    value.prop_map(Spanned::from)
}

fn list<T: std::fmt::Debug>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<Spanned<T>>> {
    vec(spanned(value), 1..4)
}

fn maybe_list<T: std::fmt::Debug>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<Spanned<T>>> {
    vec(spanned(value), 0..3)
}

fn unique<T, K: PartialEq>(items: Vec<T>, key: impl Fn(&T) -> K) -> Vec<T> {
    let mut out: Vec<T> = Vec::new();
    for item in items {
        if out.iter().all(|earlier| key(earlier) != key(&item)) {
            out.push(item);
        }
    }
    out
}

fn axis_ref() -> impl Strategy<Value = AxisRef> + Clone {
    const NAMES: &[&str] = &["tp", "dp", "main", "t", "zb-h1", "x-2", "3d"];
    let name = select(NAMES).prop_map(|text| Name::new(text).unwrap());
    (option::of(name.clone()), name).prop_map(|(mesh, axis)| AxisRef { mesh, axis })
}

fn index_item() -> impl Strategy<Value = IndexItem> + Clone {
    prop_oneof![
        any::<u32>().prop_map(|at| IndexItem::At(u64::from(at))),
        (0u64..100, option::of(1u64..100)).prop_map(|(start, length)| IndexItem::Range {
            start,
            end: length.map(|length| start + length),
        }),
    ]
}

fn segment() -> impl Strategy<Value = Segment> {
    let index = prop_oneof![
        Just(Index::All),
        vec(index_item(), 1..3).prop_map(Index::Of)
    ];
    prop_oneof![
        1 => Just(Segment::Any),
        4 => (pattern(), option::of(index))
            .prop_map(|(name, index)| Segment::Named { name, index }),
    ]
}

fn selector() -> impl Strategy<Value = Selector> {
    (any::<bool>(), vec(segment(), 1..4)).prop_map(|(is_floating, segments)| Selector {
        is_floating,
        segments,
    })
}

fn target() -> impl Strategy<Value = Target> {
    let is_class = |selector: &Selector| {
        let text = selector.to_string();
        TensorClass::ALL.iter().any(|class| class.text() == text)
    };
    prop_oneof![
        select(&TensorClass::ALL[..]).prop_map(Target::Class),
        selector()
            .prop_filter("a class is no selector", move |s| !is_class(s))
            .prop_map(Target::Selector),
    ]
}

fn split(is_pin: bool) -> BoxedStrategy<Split> {
    let axes = || vec(axis_ref(), 1..3).prop_map(Split::Axes);
    if is_pin {
        let witness = option::of(vec(axis_ref(), 0..3));
        let open = witness.prop_map(|witness| Split::Open { witness });
        prop_oneof![Just(Split::Whole), axes(), open].boxed()
    } else {
        prop_oneof![Just(Split::Whole), axes(), Just(Split::Any)].boxed()
    }
}

fn layout(is_pin: bool) -> BoxedStrategy<Layout> {
    let dims = vec(
        (name(), split(is_pin)).prop_map(|(dim, split)| DimSplit { dim, split }),
        0..4,
    );
    let partial = (select(&Reduce::ALL[..]), vec(axis_ref(), 1..3))
        .prop_map(|(reduce, axes)| Partial { reduce, axes });
    (dims, vec(partial, 0..3))
        .prop_map(|(dims, partial)| Layout { dims, partial })
        .boxed()
}

fn degree() -> impl Strategy<Value = Degree> {
    let witness = || option::of(1u64..64);
    prop_oneof![
        3 => choice(1u64..10_000).prop_map(Degree::Is),
        1 => witness().prop_map(|witness| Degree::Rest { witness }),
        1 => witness().prop_map(|witness| Degree::Same { witness }),
    ]
}

fn mesh() -> impl Strategy<Value = MeshDef> {
    let axis = (name(), degree(), option::of(name())).prop_map(|(name, degree, within)| Axis {
        name,
        degree,
        within,
    });
    let refolds = option::of(spanned(name()));
    let nodes = choice(vec(index_item(), 1..3).prop_map(|items| NodeList { items }));
    (
        spanned(name()),
        list(axis),
        refolds,
        option::of(spanned(nodes)),
    )
        .prop_map(|(name, axes, refolds, on)| MeshDef {
            name,
            axes: unique(axes, |axis| axis.name.clone()),
            refolds,
            on,
        })
}

fn value() -> BoxedStrategy<Value> {
    prop_oneof![
        name().prop_map(Value::Word),
        number().prop_map(Value::Number),
        any_quantity().prop_map(Value::Quantity),
        text().prop_map(Value::Text),
    ]
    .boxed()
}

fn setting() -> impl Strategy<Value = Setting> {
    let key = name().prop_filter("no unit", |key| Unit::lookup(key.as_str()).is_none());
    let plain = value().prop_filter("no word", |value| !matches!(value, Value::Word(_)));
    let more = choice(plain.boxed());
    (key, choice(value()), vec(more, 0..3)).prop_map(|(key, first, more)| Setting {
        key,
        values: std::iter::once(first)
            .chain(more)
            .map(Spanned::from)
            .collect(),
    })
}

fn reference() -> impl Strategy<Value = Reference> {
    prop_oneof![
        text().prop_map(Reference::Text),
        name().prop_map(Reference::Name)
    ]
}

fn comment() -> impl Strategy<Value = Comment> {
    "[ -~é]{0,10}".prop_map(|text| Comment::new(&text))
}

fn trivia() -> impl Strategy<Value = Vec<Trivia>> {
    let one = prop_oneof![Just(Trivia::Blank), comment().prop_map(Trivia::Comment)];
    prop_oneof![2 => Just(Vec::new()), 1 => vec(one, 0..4)]
}

/// A block with comments, made canonical: see [`Block`] and [`Trivia`].
fn block<T: Clone + std::fmt::Debug + 'static>(
    items: impl Strategy<Value = Vec<T>>,
    has_note: bool,
) -> impl Strategy<Value = Block<T>> {
    let lines = items.prop_flat_map(|items| {
        let lines: Vec<_> = items
            .into_iter()
            .map(|item| {
                (trivia(), option::weighted(0.2, comment())).prop_map(move |(lead, note)| Line {
                    lead,
                    item: item.clone().into(),
                    note,
                })
            })
            .collect();
        lines
    });
    let note = option::weighted(0.2, comment());
    let note = note.prop_map(move |note| note.filter(|_| has_note));
    (note, lines, trivia()).prop_map(|(note, mut lines, mut tail)| {
        for line in &mut lines {
            line.lead.dedup_by(|a, b| *a == Trivia::Blank && a == b);
        }
        tail.dedup_by(|a, b| *a == Trivia::Blank && a == b);
        if tail.last() == Some(&Trivia::Blank) {
            tail.pop();
        }
        let first = match lines.first_mut() {
            Some(line) => &mut line.lead,
            None => &mut tail,
        };
        if first.first() == Some(&Trivia::Blank) {
            first.remove(0);
        }
        Block { note, lines, tail }
    })
}

fn definition(is_model: bool) -> impl Strategy<Value = Definition> {
    let line = list(setting()).prop_map(|settings| SettingLine { settings });
    let base = if is_model {
        spanned(reference()).prop_map(Some).boxed()
    } else {
        option::of(spanned(reference())).boxed()
    };
    (spanned(name()), base, block(vec(line, 0..4), true))
        .prop_map(|(name, base, body)| Definition { name, base, body })
}

fn apply() -> impl Strategy<Value = Apply> {
    let arg = prop_oneof![
        number().prop_map(Arg::Number),
        axis_ref().prop_map(Arg::Axis),
        text().prop_map(Arg::Text),
    ];
    let args = vec(spanned(choice(arg.boxed())), 0..3);
    (spanned(name()), args, maybe_list(selector())).prop_map(|(tactic, args, except)| Apply {
        tactic,
        args,
        except,
    })
}

fn pin() -> impl Strategy<Value = Pin> {
    let layout = spanned(choice(layout(true)));
    (spanned(selector()), layout, any::<bool>()).prop_map(|(on, layout, overrides)| Pin {
        on,
        layout,
        overrides,
    })
}

fn forbid() -> impl Strategy<Value = Forbid> {
    (spanned(selector()), spanned(layout(false)), any::<bool>()).prop_map(
        |(on, layout, overrides)| Forbid {
            on,
            layout,
            overrides,
        },
    )
}

/// A layout that leaves nothing open.
fn complete_layout() -> impl Strategy<Value = Layout> {
    layout(false).prop_map(|mut layout| {
        for dim in &mut layout.dims {
            if matches!(dim.split, Split::Any | Split::Open { .. }) {
                dim.split = Split::Whole;
            }
        }
        layout
    })
}

fn place() -> impl Strategy<Value = Place> {
    (spanned(selector()), spanned(complete_layout()))
        .prop_map(|(on, factors)| Place { on, factors })
}

fn keep() -> impl Strategy<Value = Keep> {
    (spanned(selector()), spanned(complete_layout())).prop_map(|(on, layout)| Keep { on, layout })
}

fn prefer() -> impl Strategy<Value = Prefer> {
    let call = (name(), vec(axis_ref(), 0..3)).prop_map(|(name, args)| Call { name, args });
    let weight = prop_oneof![
        (0i64..10).prop_map(Number::Int),
        (0.0..10.0f64).prop_map(Number::Float)
    ];
    let parts = (
        spanned(selector()),
        spanned(name()),
        list(call),
        option::of(weight),
        any::<bool>(),
    );
    parts.prop_map(|(on, key, ranking, weight, overrides)| Prefer {
        on,
        key,
        ranking,
        weight,
        overrides,
    })
}

fn tactic() -> impl Strategy<Value = TacticDef> {
    let shard = (
        list(name()),
        list(axis_ref()),
        list(target()),
        maybe_list(selector()),
    )
        .prop_map(|(dims, over, on, except)| Shard {
            dims,
            over,
            on,
            except,
        });
    let item = prop_oneof![
        shard.prop_map(TacticItem::Shard),
        apply().prop_map(TacticItem::Apply),
        pin().prop_map(TacticItem::Pin),
        forbid().prop_map(TacticItem::Forbid),
        prefer().prop_map(TacticItem::Prefer),
    ];
    let body = block(vec(item, 0..4), true);
    (spanned(name()), maybe_list(name()), body).prop_map(|(name, params, body)| TacticDef {
        name,
        params: unique(params, |param| param.node.clone()),
        body,
    })
}

fn expr() -> impl Strategy<Value = Expr> {
    let leaf = prop_oneof![
        any::<u32>().prop_map(Expr::Int),
        select(&Var::ALL[..]).prop_map(Expr::Var)
    ];
    leaf.prop_recursive(5, 24, 3, |inner| {
        let operators = select(&BinaryOp::ALL[..]);
        let extremum = select(&[ExtremumOp::Min, ExtremumOp::Max][..]);
        prop_oneof![
            inner.clone().prop_map(|e| Expr::Neg(Box::new(e))),
            (operators, inner.clone(), inner.clone()).prop_map(|(op, left, right)| {
                Expr::Binary {
                    op,
                    left: Box::new(left),
                    right: Box::new(right),
                }
            }),
            (extremum, vec(inner, 1..3)).prop_map(|(op, args)| Expr::Extremum { op, args }),
        ]
    })
}

fn schedule() -> impl Strategy<Value = ScheduleDef> {
    let kind = || select(&ActionKind::ALL[..]);
    let key = (kind(), vec(expr(), 1..4)).prop_map(|(action, key)| OrderKey { action, key });
    let keys = list(key).prop_map(|keys| ScheduleBody::Key(unique(keys, |key| key.action)));
    let action = || {
        (any::<u32>(), kind(), any::<u32>(), 0u32..3).prop_map(
            |(stage, kind, microbatch, slice)| Action {
                stage,
                kind,
                microbatch,
                slice,
            },
        )
    };
    let cell = prop_oneof![
        1 => Just(Cell::Wait),
        3 => action().prop_map(Cell::One),
        1 => other().prop_map(Cell::Other),
        1 => (action(), vec(other(), 0..3), action())
            .prop_map(|(first, between, second)| Cell::Pair(first, between, second)),
    ];
    let row = vec(cell, 0..6).prop_map(|cells| Row { cells });
    let rows = (option::of(channels()), block(vec(row, 0..4), true))
        .prop_map(|(channels, rows)| ScheduleBody::Rows { channels, rows });
    let command = prop_oneof![action().prop_map(Command::from), other()];
    let item = (0usize..99, command, vec((0usize..99).prop_map(Event), 0..3)).prop_map(
        |(event, command, waits)| Item {
            command,
            event: Event(event),
            waits,
        },
    );
    let stream = (0usize..9, stream_kind(), vec(item, 0..5), any::<bool>()).prop_map(
        |(rank, kind, items, is_joined)| StreamLine {
            rank,
            kind,
            pairs: if is_joined && items.len() > 1 {
                vec![items.len() - 2]
            } else {
                Vec::new()
            },
            items,
        },
    );
    let streams = (option::of(channels()), block(vec(stream, 0..4), true))
        .prop_map(|(channels, streams)| ScheduleBody::Streams { channels, streams });
    let csv = spanned(text()).prop_map(ScheduleBody::Csv);
    (spanned(name()), prop_oneof![keys, rows, streams, csv])
        .prop_map(|(name, body)| ScheduleDef { name, body })
}

fn channels() -> impl Strategy<Value = Channels> {
    prop_oneof![
        Just(Channels::Blocking),
        Just(Channels::PerPair),
        Just(Channels::PerDirection),
        (1usize..99).prop_map(Channels::Buffered),
    ]
}

fn stream_kind() -> impl Strategy<Value = StreamKind> {
    let rank = || 0usize..9;
    prop_oneof![
        Just(StreamKind::Compute),
        rank().prop_map(|to| StreamKind::Send { to }),
        rank().prop_map(|from| StreamKind::Recv { from }),
        option::of(rank()).prop_map(|with| StreamKind::Exchange { with }),
        Just(StreamKind::Collective),
        Just(StreamKind::ToHost),
        Just(StreamKind::FromHost),
    ]
}

/// A communication or memory action.
fn other() -> impl Strategy<Value = Command> {
    let of_microbatch = select(
        &[
            Verb::Send(Wire::F),
            Verb::Send(Wire::B),
            Verb::Recv(Wire::F),
            Verb::Recv(Wire::B),
            Verb::Offload,
            Verb::Prefetch,
            Verb::Update,
        ][..],
    );
    let of_stage = select(
        &[
            Verb::Unshard,
            Verb::Reshard,
            Verb::ReduceGrad,
            Verb::Barrier,
            Verb::Update,
        ][..],
    );
    prop_oneof![
        (any::<u32>(), of_microbatch, any::<u32>(), 0u32..3).prop_map(
            |(stage, verb, microbatch, slice)| Command {
                stage,
                verb,
                microbatch: Some(microbatch),
                slice,
            },
        ),
        (any::<u32>(), of_stage).prop_map(|(stage, verb)| Command::of_stage(stage, verb)),
    ]
}

fn pipeline() -> impl Strategy<Value = Pipeline> {
    let item = prop_oneof![
        choice(1u64..100).prop_map(PipelineItem::Chunks),
        choice(list(selector()).boxed()).prop_map(PipelineItem::CutBefore),
        choice(name().boxed()).prop_map(PipelineItem::Schedule),
        choice(1u64..100).prop_map(PipelineItem::Microbatches),
        choice(1u64..100).prop_map(PipelineItem::Slices),
        vec(0u64..100, 1..5).prop_map(PipelineItem::Ranks),
        Just(PipelineItem::EmptyStages),
    ];
    let items = vec(item, 0..5).prop_map(|items| unique(items, std::mem::discriminant));
    (spanned(axis_ref()), block(items, true)).prop_map(|(over, body)| Pipeline { over, body })
}

fn memory() -> impl Strategy<Value = Block<MemoryItem>> {
    let budget = choice(quantity(Measure::Bytes).boxed()).prop_map(MemoryItem::Budget);
    let headroom = choice(quantity(Measure::Ratio).boxed()).prop_map(MemoryItem::Headroom);
    let policy = choice(
        prop_oneof![
            select(&RecomputePolicy::ALL[..]),
            vec(0u64..100, 1..4).prop_map(RecomputePolicy::First),
        ]
        .boxed(),
    );
    let recompute =
        (spanned(selector()), policy, any::<bool>()).prop_map(|(on, policy, overrides)| {
            MemoryItem::Recompute(Recompute {
                on,
                policy,
                overrides,
            })
        });
    let to = choice(
        prop_oneof![
            select(&OffloadTo::ALL[..]),
            quantity(Measure::Ratio).prop_map(OffloadTo::Part),
        ]
        .boxed(),
    );
    let offload = (spanned(target()), to, any::<bool>())
        .prop_map(|(on, to, overrides)| MemoryItem::Offload(Offload { on, to, overrides }));
    let lines = (
        option::of(budget),
        option::of(headroom),
        vec(prop_oneof![recompute, offload], 0..4),
    );
    block(
        lines.prop_map(|(budget, headroom, more)| {
            budget.into_iter().chain(headroom).chain(more).collect()
        }),
        true,
    )
}

fn experts() -> impl Strategy<Value = Block<ExpertsItem>> {
    let slots = option::of(spanned(1u64..300));
    let placement = (choice(name().boxed()), option::of(spanned(text())), slots).prop_map(
        |(method, trace, slots)| {
            ExpertsItem::Placement(Placement {
                method,
                trace,
                slots,
            })
        },
    );
    let factor = prop_oneof![
        (1i64..10).prop_map(Number::Int),
        (0.1..4.0f64).prop_map(Number::Float)
    ];
    let dispatch = prop_oneof![
        Just(Dispatch::Dropless),
        factor.prop_map(Dispatch::Capacity)
    ];
    let dispatch = choice(dispatch.boxed()).prop_map(ExpertsItem::Dispatch);
    let exchanges = choice(select(&Exchanges::ALL[..]).boxed()).prop_map(ExpertsItem::Exchanges);
    let items = vec(prop_oneof![placement, dispatch, exchanges], 0..3);
    block(
        items.prop_map(|items| unique(items, std::mem::discriminant)),
        true,
    )
}

fn statement() -> impl Strategy<Value = Statement> {
    let header = (spanned(text()), spanned(reference()), spanned(reference())).prop_map(
        |(name, model, cluster)| Header {
            name,
            model,
            cluster,
        },
    );
    let init = prop_oneof![
        Just(Init::Golden),
        option::of(0u64..1000).prop_map(|seed| Init::Random { seed }),
        text().prop_map(|path| Init::Load { path }),
    ];
    let job = || {
        list(setting()).prop_map(|settings| Job {
            settings: unique(settings, |setting| setting.key.clone()),
        })
    };
    let use_mesh =
        (spanned(name()), list(selector()), any::<bool>()).prop_map(|(mesh, on, overrides)| {
            UseMesh {
                mesh,
                on,
                overrides,
            }
        });
    let solve = (
        select(&Goal::ALL[..]),
        spanned(name()),
        option::of(quantity(Measure::Time)),
        option::of(quantity(Measure::Ratio)),
    )
        .prop_map(|(goal, objective, within, gap)| Solve {
            goal,
            objective,
            within,
            gap,
        });
    prop_oneof![
        header.prop_map(Statement::Plan),
        definition(true).prop_map(Statement::Model),
        definition(false).prop_map(Statement::Cluster),
        spanned(reference()).prop_map(Statement::Data),
        init.prop_map(Statement::Init),
        job().prop_map(Statement::Train),
        job().prop_map(Statement::Infer),
        mesh().prop_map(Statement::Mesh),
        use_mesh.prop_map(Statement::Use),
        tactic().prop_map(Statement::Tactic),
        apply().prop_map(Statement::Apply),
        pin().prop_map(Statement::Pin),
        forbid().prop_map(Statement::Forbid),
        prefer().prop_map(Statement::Prefer),
        place().prop_map(Statement::Place),
        keep().prop_map(Statement::Keep),
        schedule().prop_map(Statement::Schedule),
        pipeline().prop_map(Statement::Pipeline),
        memory().prop_map(Statement::Memory),
        experts().prop_map(Statement::Experts),
        solve.prop_map(Statement::Solve),
    ]
}

/// Any document.
pub fn document() -> impl Strategy<Value = Document> {
    block(vec(statement(), 0..6), false).prop_map(|body| Document { body })
}
