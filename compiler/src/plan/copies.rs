//! What copies of experts' weights cross devices.
//!
//! Enters: a move of weights whose routes are tables. Leaves: the rows that change their rank.
//! Invariant: a copy beside its home is not counted, since it is not sent.

use meshweave_dsl::graph::{ConstInit, Graph, Op, Role, TensorId};
use meshweave_dsl::op::OpKind;

/// The routes of a move of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copies {
    n_devices: usize,
    /// Rows of a device's part of the result.
    n_slots: usize,
    /// From device to device, once for every row and choice.
    ways: Vec<(usize, usize)>,
}

impl Copies {
    /// The copies that an op makes, or brings home; `None` of other ops, and of routes that are no tables.
    pub fn of(graph: &Graph, op: &Op) -> Option<Self> {
        let (OpKind::MoeMove(moved), &[_, at, _, to, _]) = (&op.kind, op.inputs.as_slice()) else {
            return None;
        };
        if !moved.weights {
            return None;
        }
        let table = |id: TensorId| match &graph.tensor(id).role {
            Role::Const(ConstInit::Numbers(numbers)) => {
                let n_rows = graph.ty(id).size_of(&moved.dims.seq)?;
                (numbers.len() == graph.ty(id).n_elements())
                    .then(|| numbers.chunks((numbers.len() / n_rows.max(1)).max(1)))
            }
            _ => None,
        };
        let mut ways = Vec::new();
        for (at, to) in table(at)?.zip(table(to)?) {
            let device = |one: &i32| usize::try_from(*one).ok();
            for from in at.iter().filter_map(device) {
                ways.extend(to.iter().filter_map(device).map(|to| (from, to)));
            }
        }
        let whole = moved.whole();
        Some(Self {
            n_devices: whole.dims.n_experts,
            n_slots: whole.dims.capacity,
            ways,
        })
    }

    /// Bytes of an all_to_all that is as long, over those of a rank's part of the result, where ranks share
    /// the devices: what the busiest rank sends or receives.
    pub fn share(&self, n_ranks: usize) -> f64 {
        if n_ranks < 2 {
            return 0.0;
        }
        let rank = |device: usize| device * n_ranks / self.n_devices.max(1);
        let mut sent = vec![0usize; n_ranks];
        let mut received = vec![0usize; n_ranks];
        let crossing = self.ways.iter().map(|(from, to)| (rank(*from), rank(*to)));
        for (from, to) in crossing.filter(|(from, to)| from != to) {
            if let (Some(sent), Some(received)) = (sent.get_mut(from), received.get_mut(to)) {
                *sent += 1;
                *received += 1;
            }
        }
        let busiest = sent.into_iter().chain(received).max().unwrap_or(0);
        let held = (self.n_slots * self.n_devices).max(1) as f64 / n_ranks as f64;
        // Of an all_to_all, a rank keeps its own part.
        busiest as f64 / held * n_ranks as f64 / (n_ranks - 1) as f64
    }
}
