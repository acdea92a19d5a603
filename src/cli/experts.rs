//! What a run does with its experts: where they are, what is recorded, counted and moved.
//!
//! Enters: an execution at its beginning, after each of its steps and at its end. Leaves: experts where a
//! placement has them, a trace, figures. Where ranks are processes, every process comes here alike, and
//! the first one writes.
//! Invariant: experts are back at their own numbers when the run ends, so that files know no placement.

use std::path::{Path, PathBuf};

use meshweave_compiler::placement::replicas::{Layer, Replicas};
use meshweave_compiler::plan::Solution;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::placement::Placement;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::trace::TraceShape;
use meshweave_dsl::weave::ast::Statement;
use meshweave_runtime::executor::Session as Execution;
use serde::{Deserialize, Serialize};

use super::place::{placed_by_routes, placement_error, read_placement, read_shares};
use super::placed::{Moved, Relabeling, other_devices};
use super::rebalance::{Rebalanced, Rebalancer, Rhythm};
use super::routes::{self, Recorder};
use super::tally::{Tallied, Tally};
use crate::error::{Error, Result};
use crate::session::{Model, Session};

/// What the command line asks of a run's experts.
#[derive(Default)]
pub(super) struct Asked<'a> {
    pub placement: Option<&'a Path>,
    pub shares: Option<&'a Path>,
    pub routes: Option<&'a Path>,
    pub rhythm: Option<Rhythm>,
}

/// A placement and where it comes from.
pub(super) struct Given {
    path: PathBuf,
    placement: Placement,
}

/// Outputs that say what routers chose.
pub(super) struct Observed {
    chosen: Vec<String>,
    shape: TraceShape,
}

impl Asked<'_> {
    /// The placement of the command line or of the document's block; its replicas become the session's.
    ///
    /// # Errors
    /// A file cannot be read; a placement that cannot be executed.
    pub fn placement(&self, session: &mut Session) -> Result<Option<Given>> {
        let (given, shares) = match (self.placement, &session.request.experts.placed) {
            (Some(path), _) => {
                let given = Given {
                    path: path.to_path_buf(),
                    placement: read_placement(path)?,
                };
                (given, self.shares.map(read_shares).transpose()?)
            }
            (None, Some(by)) if self.rhythm.is_none() => {
                let n_devices = n_devices(session.clone())?;
                let decoder = session.decoder().ok();
                let cluster = &session.request.cluster;
                let (placement, shares) =
                    placed_by_routes(by, n_devices, cluster, decoder.as_ref())?;
                let path = by.routes.clone();
                (Given { path, placement }, shares)
            }
            _ => return Ok(None),
        };
        let has_replicas = given.placement.division().is_none();
        if has_replicas {
            let replicas = Replicas::new(&given.placement, shares.as_deref());
            session.replicas = Some(replicas.map_err(placement_error)?);
        } else if let Some(path) = self.shares {
            return Err(Error::plain(
                Class::Invalid,
                format!(
                    "{} shares the loads of replicas, and {} has none",
                    path.display(),
                    given.path.display()
                ),
            )
            .help("place with more slots than experts, as in `meshweave place --slots 5`, or remove --shares"));
        }
        Ok(Some(given))
    }

    /// Makes what routers choose outputs, where the run is to know it.
    ///
    /// # Errors
    /// Layers of different sizes; what is asked for is not done in pipelines.
    pub fn observed(&self, session: &Session, model: &mut Model) -> Result<Option<Observed>> {
        let is_piped = model.stages.is_some();
        if is_piped && self.rhythm.is_some() {
            return Err(Error::plain(
                Class::Unsupported,
                "the experts of a pipeline do not change places while it runs yet",
            )
            .help("remove --rebalance, or the `pipeline` block"));
        }
        if is_piped && self.routes.is_some() {
            return Err(Error::plain(
                Class::Unsupported,
                "the routes of a pipeline are not recorded yet",
            )
            .help("record without the `pipeline` block; losses and routes are the same"));
        }
        let places = self.placement.is_some() || session.request.experts.placed.is_some();
        if is_piped || (!places && self.routes.is_none() && self.rhythm.is_none()) {
            return Ok(None);
        }
        let (chosen, shape) = routes::add_outputs(&mut model.graph)?;
        let places = model.graph.ops.iter().filter_map(|op| {
            let result = op
                .results
                .first()
                .filter(|_| matches!(op.kind, OpKind::MoePlaces(_)));
            result.copied()
        });
        let places: Vec<_> = places.collect();
        model.graph.outputs.extend(places);
        Ok(Some(Observed { chosen, shape }))
    }

    /// What the run does with its experts.
    ///
    /// # Errors
    /// The placement is of another model, or for other devices than the plan divides experts over.
    pub fn experts(
        &self,
        session: &Session,
        model: &Model,
        plan: &Plan,
        given: Option<Given>,
        observed: Option<Observed>,
    ) -> Result<Experts> {
        let replicas = session.replicas.as_ref();
        let relabeling = match &given {
            Some(Given { path, placement }) => {
                let orders: Vec<Vec<usize>> = match replicas {
                    Some(replicas) => {
                        let layers = replicas.layers.iter();
                        layers.map(|layer| layer.order.clone()).collect()
                    }
                    None => (0..placement.n_layers())
                        .map(|layer| {
                            let experts = placement.layer(layer).iter().flatten();
                            experts.map(|expert| usize::from(*expert)).collect()
                        })
                        .collect(),
                };
                let graph = &model.graph;
                Some(Relabeling::of(placement, &orders, path, graph, plan)?)
            }
            None if self.rhythm.is_some() => Some(Relabeling::in_order(&model.graph, plan)?),
            None => None,
        };
        let mut experts = Experts {
            relabeling,
            is_placed: given.is_some(),
            n_copies: replicas.map_or(0, Replicas::n_copies),
            ..Experts::default()
        };
        let Some(Observed { chosen, shape }) = observed else {
            return Ok(experts);
        };
        let tables = replicas.map(|replicas| (replicas, tables(&model.graph)));
        if experts.relabeling.is_some() {
            let places = tables
                .as_ref()
                .map(|(replicas, tables)| (tables.places.clone(), replicas.slots));
            experts.tally = Some(Tally::new(chosen.clone(), places, shape.top_k));
        }
        if let Some(rhythm) = self.rhythm {
            let tables = tables.map(|(replicas, tables)| (replicas.clone(), tables.turns));
            experts.rebalancer = Some(Rebalancer::new(rhythm, chosen.clone(), tables));
        }
        if let Some(path) = self.routes {
            let name = &session.request.name;
            experts.recorder = Some(Recorder::new(path, (chosen, shape), name));
        }
        Ok(experts)
    }
}

/// The plan of a model whose experts a placement may have replicated.
///
/// # Errors
/// Those of [`Session::plan`]; where the placement is for other devices than the document's, that.
pub(super) fn plan(session: &Session, model: &Model, given: Option<&Given>) -> Result<Solution> {
    session.plan(model).map_err(|error| {
        let Some((Given { path, placement }, _)) = given.zip(session.replicas.as_ref()) else {
            return error;
        };
        match n_devices(session.clone()) {
            Ok(degree) if degree != placement.n_devices() => {
                other_devices(path, placement, "the model", degree)
            }
            _ => error,
        }
    })
}

/// Over how many devices a document divides its experts, which is known once it is planned without their
/// replicas.
fn n_devices(mut session: Session) -> Result<usize> {
    session.replicas = None;
    // What a plan says of ops is of those with replicas.
    let lines = &mut session.document.body.lines;
    lines.retain(|line| !matches!(line.item.node, Statement::Place(_) | Statement::Keep(_)));
    let model = session.model()?;
    let plan = session.plan(&model)?.plan;
    Ok(Relabeling::in_order(&model.graph, &plan)?.n_devices())
}

/// A session with the replicas that its document asks for, homes where the document's routes put them.
///
/// # Errors
/// Those of [`Asked::placement`].
pub(super) fn with_replicas(mut session: Session) -> Result<Session> {
    if matches!(&session.request.experts.placed, Some(by) if by.slots.is_some()) {
        Asked::default().placement(&mut session)?;
    }
    Ok(session)
}

/// The same replicas with the experts at home in their own order, wherever they serve.
pub(super) fn at_home(replicas: &Replicas) -> Replicas {
    let layers = replicas.layers.iter().map(|layer| {
        let mut turns = vec![Vec::new(); layer.turns.len()];
        for (expert, of_position) in layer.order.iter().zip(&layer.turns) {
            if let Some(turns) = turns.get_mut(*expert) {
                turns.clone_from(of_position);
            }
        }
        let expert = |position: &usize| layer.order[*position];
        let held = layer.held.iter();
        Layer {
            order: (0..layer.order.len()).collect(),
            held: held.map(|held| held.iter().map(expert).collect()).collect(),
            turns,
        }
    });
    Replicas {
        layers: layers.collect(),
        ..replicas.clone()
    }
}

/// The names of what replicas are chosen by in every layer, and of what is chosen.
struct Tables {
    turns: Vec<String>,
    places: Vec<String>,
}

fn tables(graph: &Graph) -> Tables {
    let mut tables = Tables {
        turns: Vec::new(),
        places: Vec::new(),
    };
    for op in &graph.ops {
        if let (OpKind::MoePlaces(_), &[.., turns]) = (&op.kind, op.inputs.as_slice()) {
            tables.turns.push(graph.tensor(turns).name.clone());
            tables.places.push(graph.op_name(op).to_owned());
        }
    }
    tables
}

/// A run's experts. Goes from the process that starts a job to those that run it.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Experts {
    pub relabeling: Option<Relabeling>,
    pub recorder: Option<Recorder>,
    pub rebalancer: Option<Rebalancer>,
    pub tally: Option<Tally>,
    /// Copies of experts beside those at home, of all layers and devices.
    n_copies: usize,
    /// Whether a placement says where experts are.
    is_placed: bool,
    moved: Moved,
}

/// What became of a run's experts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Settled {
    /// Tokens whose routes were recorded.
    pub recorded: Option<usize>,
    pub rebalanced: Option<Rebalanced>,
    /// Where experts had other places than their own: what that moved, and what it did.
    pub placed: Option<Placed>,
}

/// Experts where a placement put them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Placed {
    /// By a placement, or between steps alone.
    pub is_placed: bool,
    /// Experts that went to other devices when the run began.
    pub moved: Moved,
    /// Experts of all layers.
    pub of: usize,
    pub n_copies: usize,
    /// Nothing was counted of a pipeline's steps.
    pub tallied: Option<Tallied>,
}

impl Experts {
    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.relabeling.is_none() && self.recorder.is_none()
    }

    /// Brings experts to where the run has them.
    ///
    /// # Errors
    /// A tensor cannot be read or written; no trace can be written.
    pub fn begin(&mut self, execution: &mut Execution) -> Result<()> {
        if let Some(relabeling) = &self.relabeling {
            self.moved = relabeling.apply(execution)?;
        }
        if let Some(recorder) = self.recorder.as_mut()
            && execution.ranks().contains(&0)
        {
            recorder.open()?;
        }
        Ok(())
    }

    /// Records and counts what the last step chose, and moves experts when it is time.
    ///
    /// # Errors
    /// The execution lacks the outputs, or a tensor cannot be moved.
    pub fn after_step(&mut self, execution: &mut Execution) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            recorder.record(execution, self.relabeling.as_ref())?;
        }
        if let Some(relabeling) = &mut self.relabeling {
            if let Some(tally) = &mut self.tally {
                tally.after_step(execution, relabeling)?;
            }
            if let Some(rebalancer) = &mut self.rebalancer {
                rebalancer.after_step(execution, relabeling)?;
            }
        }
        Ok(())
    }

    /// Brings experts back to their own numbers; what was done with them.
    ///
    /// # Errors
    /// A tensor cannot be read or written; the trace cannot be ended.
    pub fn end(self, execution: &mut Execution) -> Result<Settled> {
        if let Some(relabeling) = &self.relabeling {
            relabeling.undo(execution)?;
        }
        let recorded = self.recorder.map(Recorder::finish).transpose()?;
        let (moved, n_copies) = (self.moved, self.n_copies);
        let tally = self.tally;
        let placed = self.relabeling.map(|relabeling| Placed {
            is_placed: self.is_placed,
            moved,
            of: relabeling.n_layers() * relabeling.n_experts(),
            n_copies,
            tallied: tally.and_then(|tally| tally.finish()),
        });
        Ok(Settled {
            recorded: recorded.flatten(),
            rebalanced: self.rebalancer.map(Rebalancer::finish),
            placed,
        })
    }
}
