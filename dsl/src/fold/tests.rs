use super::*;
use crate::mapping::{GridAxis, Mapping, Precision};

/// Megatron-Core's `generate_masked_orthogonal_rank_groups` (`megatron/core/parallel_state.py`): ranks
/// in column-major order of `sizes`, one group for every index of the axes that are not masked.
fn megatron(sizes: &[usize], masked: usize) -> Vec<Vec<usize>> {
    let mut strides = vec![1];
    for size in sizes {
        strides.push(strides.last().unwrap() * size);
    }
    let decompose = |index: usize, axes: &[usize]| -> usize {
        let mut rest = index;
        axes.iter()
            .map(|axis| {
                let at = rest % sizes[*axis];
                rest /= sizes[*axis];
                at * strides[*axis]
            })
            .sum()
    };
    let others: Vec<usize> = (0..sizes.len()).filter(|axis| *axis != masked).collect();
    let n_groups: usize = others.iter().map(|axis| sizes[*axis]).product();
    (0..n_groups)
        .map(|group| {
            (0..sizes[masked])
                .map(|member| decompose(group, &others) + member * strides[masked])
                .collect()
        })
        .collect()
}

fn sets(mapping: &Mapping, axes: &[(&str, GridAxis)]) -> Vec<GroupSet> {
    axes.iter()
        .map(|(name, axis)| {
            let mut groups: Vec<Vec<usize>> = (0..mapping.n_ranks())
                .map(|rank| mapping.groups(*axis).of(rank))
                .collect();
            groups.sort();
            groups.dedup();
            GroupSet {
                axis: (*name).to_owned(),
                groups,
            }
        })
        .collect()
}

const ATTENTION: [(&str, GridAxis); 4] = [
    ("tp", GridAxis::Tp),
    ("cp", GridAxis::Cp),
    ("dp", GridAxis::Dp),
    ("pp", GridAxis::Pp),
];
const EXPERTS: [(&str, GridAxis); 4] = [
    ("etp", GridAxis::Etp),
    ("ep", GridAxis::Ep),
    ("edp", GridAxis::Edp),
    ("pp", GridAxis::Pp),
];

fn mapping([tp, cp, dp, pp]: [usize; 4], ep: usize, etp: usize) -> Mapping {
    Mapping {
        tp,
        cp,
        pp,
        ep,
        etp,
        ..Mapping::data_parallel(dp, 1, Precision::MIXED_BF16)
    }
}

/// The groups of a mapping are legal, equal to Megatron-Core's in its order `tp-cp-ep-dp-pp`, and
/// those of the refined mesh.
fn check(mapping: &Mapping) {
    let (attention, experts) = (sets(mapping, &ATTENTION), sets(mapping, &EXPERTS));
    prove(&attention, &experts, "pp", mapping.n_ranks()).unwrap();
    let sizes = [mapping.tp, mapping.cp, mapping.dp, mapping.pp];
    let expert_sizes = [mapping.etp, mapping.ep, mapping.edp(), mapping.pp];
    for (grid, sizes) in [(&attention, sizes), (&experts, expert_sizes)] {
        for (idx, set) in grid.iter().enumerate() {
            let mut theirs = megatron(&sizes, idx);
            theirs.sort();
            assert_eq!(set.groups, theirs, "{} of {mapping}", set.axis);
        }
    }
    let main = Mesh::new([
        ("pp", mapping.pp),
        ("dp", mapping.dp),
        ("cp", mapping.cp),
        ("tp", mapping.tp),
    ]);
    let folded = Mesh::new([
        ("pp", mapping.pp),
        ("edp", mapping.edp()),
        ("ep", mapping.ep),
        ("etp", mapping.etp),
    ]);
    match Fold::new(&main, &folded) {
        Ok(fold) => {
            assert_eq!(fold.mesh().n_ranks(), mapping.n_ranks());
            for set in attention.iter().chain(&experts) {
                let parts = &fold.parts()[&Axis::from(set.axis.as_str())];
                for group in &set.groups {
                    let mut ours = fold.mesh().group(group[0], parts);
                    ours.sort_unstable();
                    assert_eq!(ours, *group, "{} of {mapping}", set.axis);
                }
            }
        }
        Err(FoldError::Unsupported(_)) => {
            // Only where cuts do not nest.
            let degrees = [mapping.tp, mapping.cp, mapping.dp, mapping.ep, mapping.etp];
            assert!(
                degrees.iter().any(|degree| !degree.is_power_of_two()),
                "{mapping}"
            );
        }
        Err(error) => panic!("{mapping}: {error}"),
    }
}

/// The mappings of MoE Parallel Folding's Table 3, both of Megatron-Core's orders: (model, ranks,
/// [tp, cp, dp, pp], ep, etp).
const TABLE_3: [(&str, [usize; 4], usize, usize); 8] = [
    ("Mixtral-8x22B", [2, 1, 8, 8], 4, 2),
    ("Mixtral-8x22B folded", [2, 1, 8, 8], 8, 1),
    ("Qwen2-57B-A14B", [2, 1, 8, 4], 4, 2),
    ("Qwen2-57B-A14B folded", [2, 1, 8, 4], 4, 1),
    ("Mixtral-8x22B-G8T8", [2, 1, 8, 8], 8, 2),
    ("Mixtral-8x22B-G8T8 folded", [4, 1, 4, 8], 8, 1),
    ("Llama3-8x70B", [8, 1, 4, 8], 4, 8),
    ("Llama3-8x70B folded", [8, 1, 2, 16], 8, 1),
];

#[test]
fn published_mappings_have_the_groups_of_megatron_core() {
    for (_, grid, ep, etp) in TABLE_3 {
        check(&mapping(grid, ep, etp));
    }
    // DeepSeek-V3 trains on PP16 × EP64 × DP128 without tensor parallelism (arXiv 2412.19437, §3.2).
    check(&mapping([1, 1, 128, 16], 64, 1));
}

/// Every mapping up to 64 ranks, context parallelism included, so every published one of that size.
#[test]
fn all_legal_mappings_have_the_groups_of_megatron_core() {
    let degrees = [1, 2, 3, 4, 8];
    let mut n_checked = 0;
    for tp in degrees {
        for cp in degrees {
            for dp in degrees {
                for pp in [1, 2, 4] {
                    for ep in degrees {
                        for etp in degrees {
                            let mapping = mapping([tp, cp, dp, pp], ep, etp);
                            if mapping.n_ranks() <= 64 && mapping.check().is_ok() {
                                check(&mapping);
                                n_checked += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(n_checked > 500, "{n_checked}");
}

/// The listing of the paper: attention as (dp, pp, cp, tp), experts as (edp, pp, ep, `tp`), row-major,
/// so the experts' pipelines step over ep · tp ranks and attention's over cp · tp.
fn listed([tp, cp, dp, pp]: [usize; 4], ep: usize) -> Result<(), FoldError> {
    let n_ranks = tp * cp * dp * pp;
    let grid = |axes: [(&str, usize); 4]| -> Vec<GroupSet> {
        let mesh = Mesh::new(axes);
        axes.iter()
            .map(|(axis, _)| GroupSet::of(&mesh, &Axis::from(*axis)))
            .collect()
    };
    let attention = grid([("dp", dp), ("pp", pp), ("cp", cp), ("tp", tp)]);
    if !n_ranks.is_multiple_of(pp * ep * tp) {
        return Err(FoldError::Invalid(format!(
            "{n_ranks} ranks cannot be reshaped to (edp, pp {pp}, ep {ep}, tp {tp})"
        )));
    }
    let edp = n_ranks / (pp * ep * tp);
    let experts = grid([("edp", edp), ("pp", pp), ("ep", ep), ("etp", tp)]);
    prove(&attention, &experts, "pp", n_ranks)
}

#[test]
fn the_listing_of_the_paper_breaks_the_rule() {
    for (name, grid, ep, _) in TABLE_3 {
        let error = listed(grid, ep).unwrap_err().to_string();
        let is_seen = error.contains("`pp` group") || error.contains("cannot be reshaped");
        assert!(is_seen, "{name}: {error}");
    }
    assert!(listed([1, 1, 128, 16], 64).is_err());
    // Where experts take what context parallelism has, it happens to be right.
    listed([2, 4, 2, 4], 4).unwrap();
    assert_eq!(
        listed([2, 1, 2, 2], 2).unwrap_err().to_string(),
        "rank 0 has the `pp` group [0, 2] for attention and [0, 4] for experts: lay ranks out with `pp` outermost in both grids"
    );
}

#[test]
fn groups_that_are_no_grid_are_refused_with_their_ranks() {
    let set = |axis: &str, groups: &[&[usize]]| GroupSet {
        axis: axis.to_owned(),
        groups: groups.iter().map(|group| group.to_vec()).collect(),
    };
    let pp = set("pp", &[&[0], &[1], &[2], &[3]]);
    let good = [
        set("tp", &[&[0, 1], &[2, 3]]),
        set("dp", &[&[0, 2], &[1, 3]]),
        pp.clone(),
    ];
    prove(&good, &good, "pp", 4).unwrap();
    let refusal = |grid: &[GroupSet]| prove(grid, &good, "pp", 4).unwrap_err().to_string();
    assert_eq!(
        refusal(&[set("tp", &[&[0, 1], &[1, 3]]), pp.clone()]),
        "rank 1 is in two groups of `tp`, [0, 1] and [1, 3]"
    );
    assert_eq!(
        refusal(&[set("tp", &[&[0, 1], &[3]]), pp.clone()]),
        "rank 2 is in no group of `tp`"
    );
    assert_eq!(
        refusal(&[
            set("tp", &[&[0, 1], &[2, 3]]),
            set("dp", &[&[0, 1], &[2, 3]]),
            pp.clone()
        ]),
        "ranks 0 and 1 share a group of `tp` and one of `dp`"
    );
    assert_eq!(
        refusal(&[set("tp", &[&[0, 1], &[2, 3]]), pp]),
        "the groups of rank 0 (tp 2 × pp 1) span 2 ranks, and there are 4"
    );
}

#[test]
fn meshes_are_refined() {
    let main = Mesh::new([("dp", 4), ("cp", 1), ("tp", 2)]);
    let fold = Fold::new(&main, &Mesh::new([("edp", 2), ("ep", 4), ("etp", 1)])).unwrap();
    assert_eq!(fold.mesh().to_string(), "dp_edp:2 > dp_ep:2 > tp_ep:2");
    let parts = |axis: &str| -> Vec<&str> {
        let parts = &fold.parts()[&Axis::from(axis)];
        parts.iter().map(Axis::as_str).collect()
    };
    assert_eq!(parts("dp"), ["dp_edp", "dp_ep"]);
    assert_eq!(parts("ep"), ["dp_ep", "tp_ep"]);
    assert_eq!(parts("etp"), ["etp"]);

    let uneven = Fold::new(
        &Mesh::new([("dp", 2), ("tp", 3)]),
        &Mesh::new([("edp", 3), ("ep", 2)]),
    );
    assert!(matches!(uneven, Err(FoldError::Unsupported(_))));
    let pp_inside = Fold::new(
        &Mesh::new([("pp", 2), ("dp", 4)]),
        &Mesh::new([("ep", 4), ("pp", 2)]),
    );
    assert_eq!(
        pp_inside.unwrap_err().to_string(),
        "`pp:2` of `pp:2 > dp:4` puts rank 0 into the group [0, 4], `ep:4 > pp:2` into [0, 1]: write `pp` at the same place of both meshes, outermost"
    );
}
