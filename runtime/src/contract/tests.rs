use proptest::prelude::*;

use super::*;

/// Strides of a dense operand whose dims are the indices in `order`, outermost first.
fn strides(sizes: &[usize], order: &[usize], padding: usize) -> (Vec<usize>, usize) {
    let mut strides = vec![0; sizes.len()];
    let mut stride = 1;
    for (position, &index) in order.iter().rev().enumerate() {
        strides[index] = stride;
        stride *= sizes[index] + if position == 0 { padding } else { 0 };
    }
    (strides, stride)
}

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| {
            let x = (i ^ seed).wrapping_mul(0x9E37_79B9);
            ((x ^ (x >> 15)) >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// The definition, in f64.
fn naive(
    dims: &[ContractIndex],
    a: &[f32],
    b: &[f32],
    c: &[f32],
    options: ContractOptions,
) -> Vec<f64> {
    let mut out: Vec<f64> = c.iter().map(|x| f64::from(*x)).collect();
    if !options.accumulate {
        let outputs: Vec<ContractIndex> = dims.iter().copied().filter(|d| d.c != 0).collect();
        let mut counter = Counter::new(&outputs);
        while let Some((_, _, at)) = counter.next_offsets() {
            out[at] = 0.0;
        }
    }
    let mut counter = Counter::new(dims);
    while let Some((at_a, at_b, at_c)) = counter.next_offsets() {
        out[at_c] += f64::from(options.alpha) * f64::from(a[at_a]) * f64::from(b[at_b]);
    }
    out
}

fn check(dims: &[ContractIndex], options: ContractOptions) {
    let plan = ContractPlan::new(dims, options).unwrap();
    let (n_a, n_b, n_c) = plan.spans();
    let (a, b, c) = (values(n_a, 1), values(n_b, 2), values(n_c, 3));
    let expected = naive(dims, &a, &b, &c, options);
    let mut serial = c.clone();
    plan.run(&a, &b, &mut serial).unwrap();
    let mut parallel = c.clone();
    let pool = WorkerPool::new(3).unwrap();
    // SAFETY: the vectors hold the spans of the plan.
    unsafe { plan.run_raw_on(&pool, a.as_ptr(), b.as_ptr(), parallel.as_mut_ptr()) }.unwrap();
    let mut pieces = c.clone();
    for piece in plan.split_into(3) {
        // SAFETY: as above; a piece stays inside the whole's spans.
        unsafe {
            piece.plan.run_raw(
                a.as_ptr().add(piece.a),
                b.as_ptr().add(piece.b),
                pieces.as_mut_ptr().add(piece.c),
            );
        }
    }
    let depth: usize = dims.iter().filter(|d| d.c == 0).map(|d| d.size).product();
    let tolerance = 1e-6 * (depth as f64 + 4.0);
    for results in [&serial, &parallel, &pieces] {
        for (i, (got, want)) in results.iter().zip(&expected).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= tolerance,
                "element {i}: {got} for {want}\n{plan:#?}"
            );
        }
    }
}

#[derive(Debug, Clone)]
struct Einsum {
    dims: Vec<ContractIndex>,
    options: ContractOptions,
}

fn einsum() -> impl Strategy<Value = Einsum> {
    // (in a, in b, in c) of each index; an index in none of them is left out.
    let index = (1usize..8, 1usize..24, any::<bool>(), any::<u32>())
        .prop_map(|(mask, size, long, order)| (mask, if long { size } else { size.min(5) }, order));
    (
        proptest::collection::vec(index, 1..6),
        0usize..3,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(indices, padding, accumulate, scaled)| {
            let mut budget = 200_000usize;
            let sizes: Vec<usize> = indices
                .iter()
                .map(|(_, size, _)| {
                    let size = (*size).min(budget.max(1));
                    budget /= size;
                    size
                })
                .collect();
            let operand = |bit: usize, rotate: u32| {
                let mut order: Vec<usize> = (0..indices.len())
                    .filter(|&i| indices[i].0 >> bit & 1 == 1)
                    .collect();
                order.sort_by_key(|&i| indices[i].2.rotate_left(rotate));
                strides(&sizes, &order, padding).0
            };
            let (a, b, c) = (operand(0, 0), operand(1, 7), operand(2, 19));
            let dims = (0..sizes.len())
                .map(|i| ContractIndex {
                    size: sizes[i],
                    a: a[i],
                    b: b[i],
                    c: c[i],
                })
                .collect();
            let alpha = if scaled { 0.125 } else { 1.0 };
            Einsum {
                dims,
                options: ContractOptions { accumulate, alpha },
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_einsums_match_the_definition(einsum in einsum()) {
        check(&einsum.dims, einsum.options);
    }
}

/// `c[m,n] = a[m,k] b[k,n]`, each operand by rows or by columns.
fn matmul(m: usize, n: usize, k: usize, by_rows: [bool; 3]) -> Vec<ContractIndex> {
    let of =
        |rows: usize, columns: usize, by_rows: bool| if by_rows { (columns, 1) } else { (1, rows) };
    let ((am, ak), (bk, bn), (cm, cn)) = (
        of(m, k, by_rows[0]),
        of(k, n, by_rows[1]),
        of(m, n, by_rows[2]),
    );
    vec![
        ContractIndex {
            size: m,
            a: am,
            b: 0,
            c: cm,
        },
        ContractIndex {
            size: n,
            a: 0,
            b: bn,
            c: cn,
        },
        ContractIndex {
            size: k,
            a: ak,
            b: bk,
            c: 0,
        },
    ]
}

#[test]
fn odd_sizes_and_orders() {
    for (m, n, k) in [
        (1, 1, 1),
        (1, 37, 5),
        (37, 1, 5),
        (5, 37, 1),
        (129, 67, 33),
        (17, 6, 300),
        (70, 200, 64),
    ] {
        for orders in 0..8 {
            let by_rows = [orders & 1 == 0, orders & 2 == 0, orders & 4 == 0];
            check(&matmul(m, n, k, by_rows), ContractOptions::default());
        }
    }
}

#[test]
fn an_empty_sum_is_zero() {
    let plan = ContractPlan::new(&matmul(3, 4, 0, [true; 3]), ContractOptions::default()).unwrap();
    let mut c = vec![7.0; 12];
    plan.run(&[], &[], &mut c).unwrap();
    assert_eq!(c, vec![0.0; 12]);
}

#[test]
fn projections_become_one_product() {
    // q[b,s,h,e] = x[b,s,d] wq[d,h,e]
    let (b, s, h, e, d) = (4, 16, 3, 8, 24);
    let dims = [
        ContractIndex {
            size: b,
            a: s * d,
            b: 0,
            c: s * h * e,
        },
        ContractIndex {
            size: s,
            a: d,
            b: 0,
            c: h * e,
        },
        ContractIndex {
            size: h,
            a: 0,
            b: e,
            c: e,
        },
        ContractIndex {
            size: e,
            a: 0,
            b: 1,
            c: 1,
        },
        ContractIndex {
            size: d,
            a: 1,
            b: h * e,
            c: 0,
        },
    ];
    let plan = ContractPlan::new(&dims, ContractOptions::default()).unwrap();
    assert_eq!((plan.m.size, plan.n.size, plan.k.size), (b * s, h * e, d));
    assert!(plan.outer.is_empty() && plan.depth.is_empty());
    check(&dims, ContractOptions::default());
}

#[test]
fn shared_output_places_are_refused() {
    let dims = [
        ContractIndex {
            size: 4,
            a: 1,
            b: 0,
            c: 1,
        },
        ContractIndex {
            size: 4,
            a: 0,
            b: 1,
            c: 2,
        },
    ];
    let error = ContractPlan::new(&dims, ContractOptions::default()).unwrap_err();
    insta::assert_snapshot!(error, @"two output elements of a contraction share a place: an index steps by 2 where the smaller ones reach over 4 elements");
}

#[test]
fn short_operands_are_refused() {
    let plan = ContractPlan::new(&matmul(3, 4, 5, [true; 3]), ContractOptions::default()).unwrap();
    let error = plan
        .run(&[0.0; 14], &[0.0; 20], &mut [0.0; 12])
        .unwrap_err();
    insta::assert_snapshot!(error, @"the contraction's left operand holds 14 elements, its indices span 15");
}
