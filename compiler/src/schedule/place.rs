//! Stages on other ranks than a rule puts them on.
//!
//! Enters: a schedule and a rank for every stage. Leaves: the same schedule with its ranks renamed.
//! Invariant: who works with whom in what order does not change, only which device it is.

use std::collections::BTreeMap;

use meshweave_dsl::schedule::Schedule;

use super::PipelineError;

/// `schedule` with stage `s` on rank `stage_rank[s]`; of two copies, the stages of the first are
/// listed. Linear.
///
/// # Errors
/// [`PipelineError::Invalid`] when the list has another length than there are stages, or when it does
/// more than rename ranks: stages that share a rank must stay together, others apart.
pub fn place(schedule: &Schedule, stage_rank: &[usize]) -> Result<Schedule, PipelineError> {
    let refuse = |what: String| {
        Err(PipelineError::Invalid(format!(
            "{what}; order keys (`schedule NAME = key …`) take any ranks"
        )))
    };
    if stage_rank.len() != schedule.n_stages {
        return Err(PipelineError::Invalid(format!(
            "ranks of {} stages are listed and schedule `{}` has {}; list one for each",
            stage_rank.len(),
            schedule.name,
            schedule.n_stages
        )));
    }
    // By old rank: its new name, and the stage that gave it.
    let mut renamed: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for (stage, (old, new)) in schedule.stage_rank.iter().zip(stage_rank).enumerate() {
        if *new >= schedule.n_ranks {
            return Err(PipelineError::Invalid(format!(
                "stage {stage} is put on rank {new} and there are {} ranks; they count from 0",
                schedule.n_ranks
            )));
        }
        let (first_new, first) = *renamed.entry(*old).or_insert((*new, stage));
        if first_new != *new {
            return refuse(format!(
                "`{}` has stages {first} and {stage} on one rank, and they are put on ranks {first_new} \
                 and {new}",
                schedule.name
            ));
        }
    }
    let mut taken: BTreeMap<usize, usize> = BTreeMap::new();
    for (new, stage) in renamed.values() {
        if let Some(other) = taken.insert(*new, *stage) {
            return refuse(format!(
                "`{}` has stages {other} and {stage} on two ranks, and both are put on rank {new}",
                schedule.name
            ));
        }
    }
    let new_of = |old: usize| renamed.get(&old).map_or(old, |(new, _)| *new);
    let mut placed = schedule.clone();
    for rank in &mut placed.stage_rank {
        *rank = new_of(*rank);
    }
    for old in 0..schedule.n_ranks {
        placed.rows[new_of(old)].clone_from(&schedule.rows[old]);
        placed.pairs[new_of(old)].clone_from(&schedule.pairs[old]);
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::super::{Builtin, Costs, Shape, build, check, simulate};
    use super::*;

    #[test]
    fn ranks_are_renamed_and_nothing_else() {
        for (builtin, stage_rank) in [
            (Builtin::ZbH1, vec![2, 0, 3, 1]),
            (Builtin::ZbV, vec![3, 1, 0, 2, 2, 0, 1, 3]),
            (Builtin::DualPipe, vec![1, 0, 3, 2]),
        ] {
            let shape = builtin.fit(Shape::new(4, 8));
            let schedule = build(builtin, &shape, None).unwrap();
            let placed = place(&schedule, &stage_rank).unwrap();
            check(&placed).unwrap();
            assert_eq!(placed.stage_rank[..stage_rank.len()], stage_rank);
            let costs = Costs::even(4, schedule.n_stages, 1.0, 1.0, 1.0);
            let step_s = |schedule| simulate(schedule, &costs).unwrap().step_s;
            assert_eq!(step_s(&placed), step_s(&schedule));
        }
        let schedule = build(Builtin::ZbV, &Shape::new(2, 4).chunks(2), None).unwrap();
        let refuse = |stage_rank: &[usize]| place(&schedule, stage_rank).unwrap_err().to_string();
        insta::assert_snapshot!(refuse(&[0, 1, 0, 1]), @"`zb-v` has stages 1 and 2 on one rank, and they are put on ranks 1 and 0; order keys (`schedule NAME = key …`) take any ranks");
        insta::assert_snapshot!(refuse(&[0, 0, 0, 0]), @"`zb-v` has stages 0 and 1 on two ranks, and both are put on rank 0; order keys (`schedule NAME = key …`) take any ranks");
        insta::assert_snapshot!(refuse(&[0, 1]), @"ranks of 2 stages are listed and schedule `zb-v` has 4; list one for each");
        insta::assert_snapshot!(refuse(&[0, 1, 2, 0]), @"stage 2 is put on rank 2 and there are 2 ranks; they count from 0");
    }
}
