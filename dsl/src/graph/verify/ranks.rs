//! Rule 11: the collectives of all ranks fit together.
//!
//! The ranks are stepped from collective to collective, each waiting for all members of its group.

use super::VerifyError;
use crate::graph::text::kind_text;
use crate::graph::{Graph, Op, TensorType};
use crate::op::OpKind;

/// Checks that the collectives of the local graphs (`graphs[r]` is that of rank r) run to the end:
/// members of a group come to the same ones in the same order, and nobody waits for ever.
/// The graphs obey [`super::verify_local`]. Linear in the collectives, times the ranks.
///
/// # Errors
/// The first place where they do not fit.
pub fn verify_ranks(graphs: &[Graph]) -> Result<(), VerifyError> {
    let collectives: Vec<Vec<&Op>> = graphs
        .iter()
        .map(|graph| {
            let ops = graph.ops.iter();
            ops.filter(|op| op.kind.group().is_some()).collect()
        })
        .collect();
    let mut next = vec![0; graphs.len()];
    loop {
        let waiting: Vec<Option<&Op>> = collectives
            .iter()
            .zip(&next)
            .map(|(ops, next)| ops.get(*next).copied())
            .collect();
        if waiting.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut went_on = false;
        for (rank, op) in waiting.iter().enumerate() {
            let Some(group) = op.and_then(|op| op.kind.group()) else {
                continue;
            };
            // Each collective is handled once, at its first member.
            if group.ranks.first() != Some(&rank) {
                continue;
            }
            let members: Vec<(usize, &Op)> = group
                .ranks
                .iter()
                .filter_map(|member| Some((*member, waiting.get(*member).copied().flatten()?)))
                .filter(|(_, op)| {
                    op.kind
                        .group()
                        .is_some_and(|other| other.ranks == group.ranks)
                })
                .collect();
            if members.len() < group.ranks.len() {
                continue;
            }
            verify_meeting(graphs, &members)?;
            for (member, _) in members {
                next[member] += 1;
            }
            went_on = true;
        }
        if !went_on {
            return Err(VerifyError::Stuck {
                places: waiting
                    .iter()
                    .enumerate()
                    .map(|(rank, op)| match op {
                        Some(op) => format!("rank {rank} waits in {}", place(&graphs[rank], op)),
                        None => format!("rank {rank} is done"),
                    })
                    .collect(),
            });
        }
    }
}

/// Checks that the members of a group have come to one and the same collective.
fn verify_meeting(graphs: &[Graph], members: &[(usize, &Op)]) -> Result<(), VerifyError> {
    let Some(((first_rank, first), others)) = members.split_first() else {
        return Ok(());
    };
    let input = |rank: usize, op: &Op| op.inputs.first().map(|id| graphs[rank].ty(*id));
    for (rank, op) in others {
        let fits = first.kind.meets(&op.kind)
            && match (input(*first_rank, first), input(*rank, op)) {
                (Some(a), Some(b)) => inputs_fit(&first.kind, a, b),
                _ => false,
            };
        if !fits {
            return Err(VerifyError::Disagree {
                first_rank: *first_rank,
                first: place(&graphs[*first_rank], first),
                second_rank: *rank,
                second: place(&graphs[*rank], op),
            });
        }
    }
    for (rank, op) in members {
        let OpKind::CollectivePermute { from, .. } = &op.kind else {
            continue;
        };
        let sender = members.iter().find(|(member, _)| member == from);
        let Some((_, sender)) = sender else { continue };
        if let OpKind::CollectivePermute { to, .. } = &sender.kind
            && to != rank
        {
            return Err(VerifyError::Partners {
                at: graphs[*rank].op_name(op).into(),
                rank: *rank,
                from: *from,
                to: *to,
            });
        }
        if let (Some(sent), Some(result)) = (input(*from, sender), op.results.first())
            && sent != graphs[*rank].ty(*result)
        {
            return Err(VerifyError::ResultType {
                op: op.kind.name(),
                tensor: graphs[*rank].op_name(op).into(),
                expected: sent.clone(),
                found: graphs[*rank].ty(*result).clone(),
            });
        }
    }
    Ok(())
}

/// Members bring shards that differ along the dim that is put together only.
fn inputs_fit(kind: &OpKind, a: &TensorType, b: &TensorType) -> bool {
    let along = match kind {
        OpKind::AllGather { dim, .. } => Some(dim),
        OpKind::AllToAll { concat, .. } => Some(concat),
        OpKind::MoeMove(moved) => Some(&moved.dims.expert),
        OpKind::CollectivePermute { .. } => return true,
        _ => None,
    };
    a.dtype == b.dtype
        && a.shape.len() == b.shape.len()
        && a.shape
            .iter()
            .zip(&b.shape)
            .all(|((dim_a, size_a), (dim_b, size_b))| {
                dim_a == dim_b && (size_a == size_b || Some(dim_a) == along)
            })
}

fn place(graph: &Graph, op: &Op) -> String {
    let input = op.inputs.first().map(|id| graph.ty(*id).to_string());
    format!(
        "`{}`: {} of {}",
        graph.op_name(op),
        kind_text(&op.kind),
        input.unwrap_or_default()
    )
}
