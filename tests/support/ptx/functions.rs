//! What instructions of PTX compute that touch registers alone.
//!
//! Enters: the name of an instruction. Leaves: a function from its operands' bits to its result's.

use std::cmp::Ordering;

pub(super) fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

pub(super) fn of(value: f32) -> u64 {
    u64::from(value.to_bits())
}

fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// The upper half of a float, rounded to the nearest, ties to even.
pub(super) fn to_bf16(value: f32) -> u64 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    u64::from((bits + 0x7fff + (bits >> 16 & 1)) >> 16)
}

/// A float rounded to 10 bits behind the point, ties away from zero.
fn to_tf32(value: f32) -> u64 {
    u64::from((value.to_bits() + 0x1000) & 0xffff_e000)
}

/// Whether one of two floats is NaN, or their order is as wanted.
fn unordered_or(a: &[u64], wanted: fn(Ordering) -> bool) -> bool {
    f(a[0]).partial_cmp(&f(a[1])).is_none_or(wanted)
}

/// The function of an instruction that computes, by its name.
pub(super) fn function(op: &str) -> Option<fn(&[u64]) -> u64> {
    let function: fn(&[u64]) -> u64 = match op {
        "mov.b64" | "mov.u64" | "mov.f64" | "cvta.to.global.u64" | "cvt.u64.u32" => |a| a[0],
        "mov.b32" | "mov.u32" | "mov.f32" | "cvt.u32.u64" => |a| a[0] & 0xffff_ffff,
        "mov.pred" => |a| a[0],
        "cvt.s64.s32" => |a| a[0] as u32 as i32 as i64 as u64,
        "cvt.rn.f32.s32" => |a| of(a[0] as u32 as i32 as f32),
        "cvt.rn.f32.f64" => |a| of(d(a[0]) as f32),
        "cvt.rn.f64.s32" => |a| f64::from(a[0] as u32 as i32).to_bits(),
        "cvt.f64.f32" => |a| f64::from(f(a[0])).to_bits(),
        "cvt.rzi.s32.f32" => |a| u64::from((f(a[0]) as i32) as u32),
        "cvt.rzi.s32.f64" => |a| u64::from((d(a[0]) as i32) as u32),
        "add.s64" | "add.u64" => |a| a[0].wrapping_add(a[1]),
        "sub.s64" | "sub.u64" => |a| a[0].wrapping_sub(a[1]),
        "mul.lo.s64" | "mul.lo.u64" => |a| a[0].wrapping_mul(a[1]),
        "mad.lo.s64" => |a| a[0].wrapping_mul(a[1]).wrapping_add(a[2]),
        "div.u64" => |a| a[0] / a[1],
        "rem.u64" => |a| a[0] % a[1],
        "div.u32" => |a| u64::from(a[0] as u32 / a[1] as u32),
        "rem.u32" => |a| u64::from(a[0] as u32 % a[1] as u32),
        "mul.hi.u32" => |a| ((a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff)) >> 32,
        "mul.hi.s32" => |a| {
            let product = i64::from(a[0] as u32 as i32) * i64::from(a[1] as u32 as i32);
            u64::from((product >> 32) as u32)
        },
        "mul.hi.u64" => |a| ((u128::from(a[0]) * u128::from(a[1])) >> 64) as u64,
        "add.s32" | "add.u32" => |a| u64::from((a[0] as u32).wrapping_add(a[1] as u32)),
        "sub.s32" | "sub.u32" => |a| u64::from((a[0] as u32).wrapping_sub(a[1] as u32)),
        "mul.lo.s32" => |a| u64::from((a[0] as u32).wrapping_mul(a[1] as u32)),
        "mad.lo.s32" => |a| {
            u64::from(
                (a[0] as u32)
                    .wrapping_mul(a[1] as u32)
                    .wrapping_add(a[2] as u32),
            )
        },
        "mul.wide.u32" => |a| (a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff),
        "mul.wide.s32" => {
            |a| (i64::from(a[0] as u32 as i32) * i64::from(a[1] as u32 as i32)) as u64
        }
        "mad.wide.u32" => |a| ((a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff)).wrapping_add(a[2]),
        "mad.wide.s32" => |a| {
            let product = i64::from(a[0] as u32 as i32) * i64::from(a[1] as u32 as i32);
            (product as u64).wrapping_add(a[2])
        },
        "and.b64" | "and.b32" | "and.pred" => |a| a[0] & a[1],
        "or.b64" | "or.b32" | "or.pred" => |a| a[0] | a[1],
        "xor.b64" | "xor.b32" | "xor.pred" => |a| a[0] ^ a[1],
        "not.b32" => |a| u64::from(!(a[0] as u32)),
        "not.b64" => |a| !a[0],
        "not.pred" => |a| u64::from(a[0] == 0),
        "neg.s32" => |a| u64::from((a[0] as u32).wrapping_neg()),
        "neg.s64" => |a| a[0].wrapping_neg(),
        "shl.b64" => |a| a[0].checked_shl(a[1] as u32).unwrap_or(0),
        "shr.u64" => |a| a[0].checked_shr(a[1] as u32).unwrap_or(0),
        "shr.s64" => |a| ((a[0] as i64) >> a[1].min(63)) as u64,
        "shl.b32" => |a| u64::from((a[0] as u32).checked_shl(a[1] as u32).unwrap_or(0)),
        "shr.u32" => |a| u64::from((a[0] as u32).checked_shr(a[1] as u32).unwrap_or(0)),
        "shr.s32" => |a| u64::from(((a[0] as u32 as i32) >> a[1].min(31)) as u32),
        "bfe.u32" => |a| ((a[0] & 0xffff_ffff) >> a[1]) & ((1 << a[2]) - 1),
        "bfe.u64" => |a| (a[0] >> a[1]) & ((1 << a[2]) - 1),
        "cvt.u16.u32" | "cvt.u16.u64" | "cvt.u32.u16" | "cvt.u64.u16" | "mov.b16" | "mov.u16" => {
            |a| a[0] & 0xffff
        }
        "add.s16" => |a| u64::from((a[0] as u16).wrapping_add(a[1] as u16)),
        "sub.s16" => |a| u64::from((a[0] as u16).wrapping_sub(a[1] as u16)),
        "mul.lo.s16" => |a| u64::from((a[0] as u16).wrapping_mul(a[1] as u16)),
        "mul.wide.u16" => |a| (a[0] & 0xffff) * (a[1] & 0xffff),
        "and.b16" => |a| a[0] & a[1] & 0xffff,
        "or.b16" => |a| (a[0] | a[1]) & 0xffff,
        "xor.b16" => |a| (a[0] ^ a[1]) & 0xffff,
        "not.b16" => |a| u64::from(!(a[0] as u16)),
        "neg.s16" => |a| u64::from((a[0] as u16).wrapping_neg()),
        "shl.b16" => |a| u64::from((a[0] as u16).checked_shl(a[1] as u32).unwrap_or(0)),
        "shr.s16" => |a| u64::from(((a[0] as u16 as i16) >> a[1].min(15)) as u16),
        "mul.hi.u16" => |a| ((a[0] & 0xffff) * (a[1] & 0xffff)) >> 16,
        "mad.lo.s16" => |a| {
            u64::from(
                (a[0] as u16)
                    .wrapping_mul(a[1] as u16)
                    .wrapping_add(a[2] as u16),
            )
        },
        "setp.lt.u16" => |a| u64::from((a[0] as u16) < a[1] as u16),
        "setp.gt.u16" => |a| u64::from(a[0] as u16 > a[1] as u16),
        "shr.u16" => |a| (a[0] & 0xffff).checked_shr(a[1] as u32).unwrap_or(0),
        "setp.eq.s16" | "setp.eq.b16" => |a| u64::from(a[0] as u16 == a[1] as u16),
        "setp.ne.s16" | "setp.ne.b16" => |a| u64::from(a[0] as u16 != a[1] as u16),
        "min.u32" => |a| (a[0] & 0xffff_ffff).min(a[1] & 0xffff_ffff),
        "max.u32" => |a| (a[0] & 0xffff_ffff).max(a[1] & 0xffff_ffff),
        "min.u64" => |a| a[0].min(a[1]),
        "max.u64" => |a| a[0].max(a[1]),
        "min.s32" => |a| u64::from((a[0] as u32 as i32).min(a[1] as u32 as i32) as u32),
        "max.s32" => |a| u64::from((a[0] as u32 as i32).max(a[1] as u32 as i32) as u32),
        "min.s64" => |a| (a[0] as i64).min(a[1] as i64) as u64,
        "max.s64" => |a| (a[0] as i64).max(a[1] as i64) as u64,
        "add.rn.f32" | "add.f32" => |a| of(f(a[0]) + f(a[1])),
        "sub.rn.f32" | "sub.f32" => |a| of(f(a[0]) - f(a[1])),
        "mul.rn.f32" | "mul.f32" => |a| of(f(a[0]) * f(a[1])),
        "div.rn.f32" => |a| of(f(a[0]) / f(a[1])),
        "rcp.rn.f32" => |a| of(1.0 / f(a[0])),
        "cvt.sat.f32.f32" => |a| of(f(a[0]).clamp(0.0, 1.0).max(0.0)),
        "fma.rm.f32" => |a| {
            let exact = f64::from(f(a[0])).mul_add(f64::from(f(a[1])), f64::from(f(a[2])));
            let nearest = exact as f32;
            of(if f64::from(nearest) > exact {
                nearest.next_down()
            } else {
                nearest
            })
        },
        "fma.rn.f32" => |a| of(f(a[0]).mul_add(f(a[1]), f(a[2]))),
        "sqrt.rn.f32" => |a| of(f(a[0]).sqrt()),
        "neg.f32" => |a| of(-f(a[0])),
        "abs.f32" => |a| of(f(a[0]).abs()),
        "max.f32" => |a| of(f(a[0]).max(f(a[1]))),
        "min.f32" => |a| of(f(a[0]).min(f(a[1]))),
        "add.rn.f64" | "add.f64" => |a| (d(a[0]) + d(a[1])).to_bits(),
        "sub.rn.f64" | "sub.f64" => |a| (d(a[0]) - d(a[1])).to_bits(),
        "mul.rn.f64" | "mul.f64" => |a| (d(a[0]) * d(a[1])).to_bits(),
        "div.rn.f64" => |a| (d(a[0]) / d(a[1])).to_bits(),
        "fma.rn.f64" => |a| d(a[0]).mul_add(d(a[1]), d(a[2])).to_bits(),
        "sqrt.rn.f64" => |a| d(a[0]).sqrt().to_bits(),
        "rcp.rn.f64" => |a| (1.0 / d(a[0])).to_bits(),
        "abs.f64" => |a| d(a[0]).abs().to_bits(),
        "neg.f64" => |a| (-d(a[0])).to_bits(),
        "setp.eq.f32" => |a| u64::from(f(a[0]) == f(a[1])),
        "setp.neu.f32" => |a| u64::from(f(a[0]) != f(a[1])),
        "setp.lt.f32" => |a| u64::from(f(a[0]) < f(a[1])),
        "setp.le.f32" => |a| u64::from(f(a[0]) <= f(a[1])),
        "setp.gt.f32" => |a| u64::from(f(a[0]) > f(a[1])),
        "setp.ge.f32" => |a| u64::from(f(a[0]) >= f(a[1])),
        "setp.ltu.f32" => |a| u64::from(unordered_or(a, Ordering::is_lt)),
        "setp.leu.f32" => |a| u64::from(unordered_or(a, Ordering::is_le)),
        "setp.gtu.f32" => |a| u64::from(unordered_or(a, Ordering::is_gt)),
        "setp.geu.f32" => |a| u64::from(unordered_or(a, Ordering::is_ge)),
        "setp.nan.f32" => |a| u64::from(f(a[0]).is_nan() || f(a[1]).is_nan()),
        "setp.num.f32" => |a| u64::from(!f(a[0]).is_nan() && !f(a[1]).is_nan()),
        "setp.eq.s64" | "setp.eq.b64" => |a| u64::from(a[0] == a[1]),
        "setp.ne.s64" | "setp.ne.b64" => |a| u64::from(a[0] != a[1]),
        "setp.lt.s64" => |a| u64::from((a[0] as i64) < a[1] as i64),
        "setp.le.s64" => |a| u64::from(a[0] as i64 <= a[1] as i64),
        "setp.gt.s64" => |a| u64::from(a[0] as i64 > a[1] as i64),
        "setp.ge.s64" => |a| u64::from(a[0] as i64 >= a[1] as i64),
        "setp.lt.u64" => |a| u64::from(a[0] < a[1]),
        "setp.gt.u64" => |a| u64::from(a[0] > a[1]),
        "setp.eq.s32" | "setp.eq.b32" => |a| u64::from(a[0] as u32 == a[1] as u32),
        "setp.ne.s32" | "setp.ne.b32" => |a| u64::from(a[0] as u32 != a[1] as u32),
        "setp.lt.s32" => |a| u64::from((a[0] as i32) < a[1] as i32),
        "setp.le.s32" => |a| u64::from(a[0] as i32 <= a[1] as i32),
        "setp.gt.s32" => |a| u64::from(a[0] as i32 > a[1] as i32),
        "setp.ge.s32" => |a| u64::from(a[0] as i32 >= a[1] as i32),
        "setp.lt.u32" => |a| u64::from((a[0] as u32) < a[1] as u32),
        "setp.gt.u32" => |a| u64::from(a[0] as u32 > a[1] as u32),
        "cvt.rna.tf32.f32" => |a| to_tf32(f(a[0])),
        "cvt.rn.bf16.f32" => |a| to_bf16(f(a[0])),
        // The first operand becomes the upper half.
        "cvt.rn.bf16x2.f32" => |a| to_bf16(f(a[0])) << 16 | to_bf16(f(a[1])),
        "ex2.approx.ftz.f32" => |a| of(f(a[0]).exp2()),
        "lg2.approx.ftz.f32" => |a| of(f(a[0]).log2()),
        "bfi.b32" => |a| {
            let mask = ((1_u64 << a[3]) - 1) << a[2];
            (a[1] & 0xffff_ffff & !mask) | (a[0] << a[2] & mask)
        },
        "bfi.b64" => |a| {
            let mask = (1_u64 << a[3]).wrapping_sub(1) << a[2];
            (a[1] & !mask) | (a[0] << a[2] & mask)
        },
        "popc.b32" => |a| u64::from((a[0] as u32).count_ones()),
        "setp.ge.u32" => |a| u64::from(a[0] as u32 >= a[1] as u32),
        "setp.le.u32" => |a| u64::from(a[0] as u32 <= a[1] as u32),
        "setp.ge.u64" => |a| u64::from(a[0] >= a[1]),
        "setp.le.u64" => |a| u64::from(a[0] <= a[1]),
        "rem.s32" => |a| u64::from((a[0] as i32).wrapping_rem(a[1] as i32) as u32),
        "div.s32" => |a| u64::from((a[0] as i32).wrapping_div(a[1] as i32) as u32),
        "selp.b16" | "selp.b32" | "selp.f32" | "selp.b64" | "selp.f64" | "selp.s32" => {
            |a| if a[2] != 0 { a[0] } else { a[1] }
        }
        _ => return None,
    };
    Some(function)
}
