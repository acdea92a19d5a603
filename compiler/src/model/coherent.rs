//! Layers whose tokens stand where their experts are, in inference.
//!
//! Enters: rows of tokens, and where they stand. Leaves: the rows after a layer, and where these stand.
//! Invariant: tokens are numbered within their experts in the order of the sequence, as everywhere, so
//! each is computed with the same operands as at home.
//!
//! Source: ExFlow (arXiv 2401.08383, §4): the context, here the keys and values of each layer, is
//! gathered everywhere, so a token's attention runs where its expert was, and only the way to the next
//! expert is left of the two exchanges of a layer. With several experts a token it stands with the first
//! one, which the outputs of the others are brought to.
//!
//! Legend: rows `[expert, batch, slot, ..]`; routes `[batch, seq, choice]`, seats `[batch, seq, seat:1]`.

use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{ConstInit, TensorId};
use meshweave_dsl::op::{MoeDims, MoeMove, OpKind};

use super::golden::Part;
use super::{Built, DecoderConfig, Model, ModelError, MoeConfig};

/// Where the tokens of a layer stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    /// The dims of a token, before its features.
    pub dims: &'static [&'static str],
    /// The experts that a router chooses from.
    pub choices: &'static str,
    pub seats: Option<Seats>,
    /// (cos, sin) of the tokens' positions.
    pub rope: Option<(TensorId, TensorId)>,
}

/// The slots in which tokens stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seats {
    expert: TensorId,
    slot: TensorId,
    n_experts: usize,
    capacity: usize,
    /// How many keys each row's token sees; 0 where there is none.
    pub seen: TensorId,
}

impl Stand {
    /// Every token at its place in its sequence.
    pub fn home(rope: Option<(TensorId, TensorId)>) -> Self {
        Self {
            dims: &["batch", "seq"],
            choices: "expert",
            seats: None,
            rope,
        }
    }
}

impl Seats {
    fn dims(&self) -> MoeDims {
        routes("seat", self.n_experts, self.capacity)
    }
}

fn routes(choice: &str, n_experts: usize, capacity: usize) -> MoeDims {
    MoeDims {
        seq: "seq".into(),
        choice: choice.into(),
        expert: "expert".into(),
        slot: "slot".into(),
        n_experts,
        capacity,
        offset: 0,
    }
}

/// Whether the tokens of a model can stand with their experts.
///
/// # Errors
/// `Invalid` for a model without experts, or one that drops tokens.
pub(super) fn check(config: &DecoderConfig) -> Result<(), ModelError> {
    let name = &config.name;
    let Some(moe) = &config.moe else {
        return Err(ModelError::Invalid(format!(
            "model `{name}` has no experts, so its tokens have nowhere to stand: leave `exchanges` out"
        )));
    };
    if moe.capacity_factor != 0.0 || moe.subsequences != 1 {
        return Err(ModelError::Invalid(format!(
            "model `{name}` drops tokens (capacity {}, {} subsequences), and one that is dropped stands nowhere: write `capacity 0` and `subsequences 1`, or `exchanges two`",
            moe.capacity_factor, moe.subsequences
        )));
    }
    Ok(())
}

impl Model<'_> {
    /// h + moe(norm(h)) in rows, and where they stand.
    pub(super) fn moe_where_experts_are(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        moe: &MoeConfig,
        h: TensorId,
        stand: &Stand,
    ) -> Result<(TensorId, Stand), ModelError> {
        let norm = self.norm_weights(b, "norm")?;
        let x = self.normed(b, "input", h, norm)?;
        let (mut expert, mut gate, _) = self.route(b, layer_idx, moe, x, stand)?;
        if let Some(seats) = stand.seats {
            expert = self.at_home(b, "chosen.home", expert, seats)?;
            gate = self.at_home(b, "gates.home", gate, seats)?;
        }
        let choice = if moe.top_k == 1 { "seat" } else { "choice" };
        if moe.top_k == 1 {
            expert = b.rename("chosen.seat", expert, "choice", choice)?;
            gate = b.rename("gates.seat", gate, "choice", choice)?;
        }
        let (n_experts, capacity) = (moe.n_experts, self.seq);
        let numbered = |choice: &str| OpKind::MoeSlots {
            seq: "seq".into(),
            choice: choice.into(),
            n_experts,
            capacity,
        };
        let slot = b.apply("slots", numbered(choice), &[expert])?;
        let to = routes(choice, n_experts, capacity);
        let rows = match stand.seats {
            None => b.apply("dispatched", OpKind::MoeDispatch(to), &[h, expert, slot])?,
            Some(seats) => {
                let there = OpKind::MoeMove(MoeMove {
                    dims: to,
                    from: "seat".into(),
                    stays: false,
                    weights: false,
                    over: None,
                });
                let inputs = [h, seats.expert, seats.slot, expert, slot];
                b.apply("moved", there, &inputs)?
            }
        };
        let x = self.normed(b, "experts.input", rows, norm)?;
        let parts = [Part::ExpertsWg, Part::ExpertsWu, Part::ExpertsWd];
        let out = b.within("experts", |b| {
            self.block(b, layer_idx, parts, moe.ffn, x, Some(moe), stand)
        })?;
        // A token's seat is with its first expert, where its row has come already.
        let (seat_expert, seat_slot, h, x) = if moe.top_k == 1 {
            (expert, slot, rows, x)
        } else {
            let first = |b: &mut GraphBuilder, name: &str, of| -> Built {
                let first = b.slice(&format!("{name}.first"), of, "choice", 0, 1)?;
                Ok(b.rename(&format!("{name}.seat"), first, "choice", "seat")?)
            };
            let seat_expert = first(b, "chosen", expert)?;
            let standing = first(b, "slots", slot)?;
            let seat_slot = b.apply("seats", numbered("seat"), &[seat_expert])?;
            let stays = OpKind::MoeMove(MoeMove {
                dims: routes("seat", n_experts, capacity),
                from: "seat".into(),
                stays: true,
                weights: false,
                over: None,
            });
            let inputs = [rows, seat_expert, standing, seat_expert, seat_slot];
            let h = b.apply("seated", stays, &inputs)?;
            (seat_expert, seat_slot, h, x)
        };
        let back = OpKind::MoeMove(MoeMove {
            dims: routes("seat", n_experts, capacity),
            from: choice.into(),
            stays: moe.top_k == 1,
            weights: false,
            over: None,
        });
        let inputs = [out, expert, slot, seat_expert, seat_slot, gate];
        let mut out = b.apply("combined", back, &inputs)?;
        let stand = self.stand_at(b, seat_expert, seat_slot, n_experts)?;
        if let Some(shared) = &moe.shared {
            let x = match moe.top_k {
                1 => x,
                _ => self.normed(b, "shared.input", h, norm)?,
            };
            let dense = self.shared(b, layer_idx, shared, x, &stand)?;
            out = b.add("out", out, dense)?;
        }
        Ok((b.add("residual", h, out)?, stand))
    }

    /// Rows `[expert, batch, slot, ..]` as `[batch, seq, ..]`.
    pub(super) fn at_home(
        &self,
        b: &mut GraphBuilder,
        name: &str,
        rows: TensorId,
        seats: Seats,
    ) -> Built {
        let combine = OpKind::MoeCombine(seats.dims());
        Ok(b.apply(name, combine, &[rows, seats.expert, seats.slot])?)
    }

    /// What the tokens in these seats bring along: how much they see, and their positions.
    fn stand_at(
        &self,
        b: &mut GraphBuilder,
        expert: TensorId,
        slot: TensorId,
        n_experts: usize,
    ) -> Result<Stand, ModelError> {
        let batch = b.size_of(expert, "batch")?;
        let capacity = self.seq;
        let seat = |b: &mut GraphBuilder, name: &str, of: TensorId| -> Built {
            let dispatch = OpKind::MoeDispatch(routes("seat", n_experts, capacity));
            Ok(b.apply(name, dispatch, &[of, expert, slot])?)
        };
        let init = ConstInit::Iota { dim: "seq".into() };
        let shape = [("batch", batch), ("seq", self.seq + 1)];
        let counted = b.constant("sight.counted", DType::I32, shape, init)?;
        let sight = b.slice("sight", counted, "seq", 1, self.seq)?;
        let seen = seat(b, "seen", sight)?;
        let rope = match self.rope {
            None => None,
            Some((cos, sin)) => {
                let mut table = |name: &str, table: TensorId| -> Built {
                    let mut shape = vec![("batch".into(), batch)];
                    shape.extend(b.ty(table).shape.iter().cloned());
                    let wide = b.expand(&format!("{name}.all"), table, shape)?;
                    seat(b, name, wide)
                };
                Some((table("seat.cos", cos)?, table("seat.sin", sin)?))
            }
        };
        Ok(Stand {
            dims: &["expert", "batch", "slot"],
            choices: "target",
            seats: Some(Seats {
                expert,
                slot,
                n_experts,
                capacity,
                seen,
            }),
            rope,
        })
    }
}
