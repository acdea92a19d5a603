//! Decoding with one exchange of tokens a layer against two: the same features, and the bytes of the
//! routes.

use meshweave_runtime::decode::{Decode, DecodeShape, Decoded, Exchanges, HEADER, decode};

const LAYERS: usize = 3;
const EXPERTS: usize = 8;
const SEQUENCES: usize = 8;
const STEPS: usize = 4;

fn shape(top_k: usize) -> DecodeShape {
    DecodeShape {
        layers: LAYERS,
        experts: EXPERTS,
        top_k,
        embed: 16,
        ffn: 24,
        kv: 8,
    }
}

/// Distinct experts a token, by hashing.
fn routes(top_k: usize) -> Vec<u16> {
    let n = (STEPS * SEQUENCES * LAYERS) as u32;
    let token = |i: u32| {
        let first = (i.wrapping_mul(0x9E37_79B9) >> 29) as u16;
        (0..top_k as u16).map(move |k| (first + 3 * k) % EXPERTS as u16)
    };
    (0..n).flat_map(token).collect()
}

/// Experts in order, or dealt out.
fn devices(dealt: bool) -> Vec<Vec<u16>> {
    let device = |expert: u16| if dealt { expert % 4 } else { expert / 2 };
    vec![(0..EXPERTS as u16).map(device).collect(); LAYERS]
}

fn run(top_k: usize, dealt: bool, exchanges: Exchanges) -> (Decoded, [u64; 2]) {
    let (routes, devices) = (routes(top_k), devices(dealt));
    let run = Decode {
        shape: shape(top_k),
        n_devices: 4,
        devices: &devices,
        n_sequences: SEQUENCES,
        routes: &routes,
        exchanges,
    };
    (decode(&run).unwrap(), run.n_crossing())
}

#[test]
fn one_exchange_computes_what_two_do() {
    for top_k in [1, 2, 3] {
        let (truth, _) = run(top_k, false, Exchanges::Two);
        for dealt in [false, true] {
            for exchanges in [Exchanges::Two, Exchanges::One] {
                let (decoded, _) = run(top_k, dealt, exchanges);
                let pairs = decoded.features.iter().zip(&truth.features);
                let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Sums over several experts have another order elsewhere.
                let tolerance = if top_k == 1 { 0.0 } else { 1e-4 };
                assert!(error <= tolerance, "top {top_k}, {exchanges:?}: {error}");
            }
        }
    }
}

#[test]
fn bytes_and_exchanges_are_those_of_the_routes() {
    for top_k in [1, 2] {
        for exchanges in [Exchanges::Two, Exchanges::One] {
            let (decoded, crossing) = run(top_k, true, exchanges);
            let row_bytes = 4 * (HEADER + 16) as u64;
            assert_eq!(
                decoded.dispatched_bytes,
                (crossing[0] + crossing[1]) * row_bytes
            );
            let a_layer = if exchanges == Exchanges::One && top_k == 1 {
                1
            } else {
                2
            };
            assert_eq!(decoded.n_exchanges, (STEPS * LAYERS * a_layer) as u64);
            // Keys and values of every token and layer, to the three other devices.
            let gathered = (STEPS * SEQUENCES * LAYERS * 3 * 4 * (2 + 2 * 8)) as u64;
            let expected = if exchanges == Exchanges::One {
                gathered
            } else {
                0
            };
            assert_eq!(decoded.context_bytes, expected);
        }
    }
}

#[test]
fn what_cannot_be_decoded_says_why() {
    let (routes, devices) = (routes(1), devices(false));
    let good = Decode {
        shape: shape(1),
        n_devices: 4,
        devices: &devices,
        n_sequences: SEQUENCES,
        routes: &routes,
        exchanges: Exchanges::One,
    };
    let refusal = |run: Decode| decode(&run).unwrap_err().to_string();
    let uneven = Decode {
        n_sequences: 6,
        ..good
    };
    assert_eq!(
        refusal(uneven),
        "6 sequences do not divide over 4 devices: choose a multiple"
    );
    let fewer = Decode {
        devices: &devices[..2],
        ..good
    };
    assert_eq!(
        refusal(fewer),
        "the placement is not one of 3 layers of 8 experts on 4 devices"
    );
    let astray = [9; LAYERS * SEQUENCES];
    let other = Decode {
        routes: &astray,
        ..good
    };
    assert_eq!(
        refusal(other),
        "a token goes to expert 9 of 8: give the placement of this trace"
    );
}
