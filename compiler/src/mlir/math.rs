//! Elementary functions as polynomials, on scalars and vectors of `f32`.
//!
//! Enters: a value and its form. Leaves: straight-line operations, no library call.
//! Invariant: NaN gives NaN, and infinities give the function's limit. Errors are a few units in
//! the last place (measured against f64 in `tests/kernels.rs`).
//!
//! Sources: exp and log are Cephes' `expf` and `logf` (S. Moshier, Cephes Math Library 2.8,
//! single/expf.c and single/logf.c); tanh and erf are the rational approximations of Eigen
//! (Eigen/src/Core/MathFunctionsImpl.h, `ptanh_float`; unsupported/…/SpecialFunctionsImpl.h,
//! `erf` for float).

use super::Error;
use super::ops::{Cmp, Form, Ops, V};
use crate::codegen::kernel::Elem;

/// `1.5 · 2²³`: adding it leaves the rounded integer in the low bits of the mantissa.
const ROUND_MAGIC: f64 = 12_582_912.0;

impl<'c> Ops<'c> {
    fn k(&mut self, form: Form, value: f64) -> Result<V<'c>, Error> {
        self.float(Elem::F32, form, value)
    }

    /// Horner's scheme; `coefficients` from the highest degree down.
    fn polynomial(&mut self, form: Form, x: V<'c>, coefficients: &[f64]) -> Result<V<'c>, Error> {
        let Some((first, rest)) = coefficients.split_first() else {
            return self.k(form, 0.0);
        };
        let mut sum = self.k(form, *first)?;
        for coefficient in rest {
            let coefficient = self.k(form, *coefficient)?;
            sum = self.fma(sum, x, coefficient)?;
        }
        Ok(sum)
    }

    /// `low` and `high` bound `x`; a NaN stays.
    fn clamp(&mut self, form: Form, x: V<'c>, low: f64, high: f64) -> Result<V<'c>, Error> {
        let low = self.k(form, low)?;
        let high = self.k(form, high)?;
        let x = self.max_keeping_nan(form, low, x)?;
        let above = self.cmpf(Cmp::Lt, form, high, x)?;
        self.select(above, high, x)
    }

    /// `a > x ? a : x`, one instruction on x86; a NaN in `x` stays.
    pub fn max_keeping_nan(&mut self, form: Form, a: V<'c>, x: V<'c>) -> Result<V<'c>, Error> {
        let greater = self.cmpf(Cmp::Gt, form, a, x)?;
        self.select(greater, a, x)
    }

    /// `exp(x)`: `x = n·ln 2 + r`, `|r| ≤ ln 2 / 2`, a polynomial in `r` that yields `2·exp(r)`,
    /// times `2ⁿ⁻¹`.
    ///
    /// The doubling lets one factor reach the largest finite results and overflow beyond them;
    /// results below 2⁻¹²⁵ become 0.
    pub fn exp(&mut self, form: Form, x: V<'c>) -> Result<V<'c>, Error> {
        let int = self.ty(Elem::I32, form);
        let float = self.ty(Elem::F32, form);
        // From the least n on the factor is 0, up to where the product overflows.
        let x = self.clamp(form, x, -87.4, 89.0)?;
        let log2e = self.k(form, std::f64::consts::LOG2_E)?;
        let magic = self.k(form, ROUND_MAGIC)?;
        let shifted = self.fma(x, log2e, magic)?;
        let n = self.subf(shifted, magic)?;
        // ln 2 in two parts, the first with few bits, so that n · ln2_high is exact.
        let ln2_high = self.k(form, -0.693_359_375)?;
        let ln2_low = self.k(form, 2.121_944_4e-4)?;
        let r = self.fma(n, ln2_high, x)?;
        let r = self.fma(n, ln2_low, r)?;
        let coefficients = [
            1.987_569_15e-4,
            1.398_199_95e-3,
            8.333_451_9e-3,
            4.166_579_6e-2,
            1.666_666_55e-1,
            5.000_000_1e-1,
        ];
        let p = self.polynomial(form, r, &coefficients.map(|c: f64| 2.0 * c))?;
        let square = self.mulf(r, r)?;
        let two = self.k(form, 2.0)?;
        let linear = self.fma(r, two, two)?;
        let y = self.fma(p, square, linear)?;

        // The integer n stands in the low bits of `shifted`; the exponent field becomes n - 1.
        let bits = self.bitcast(shifted, int)?;
        let bias = 126_i32.wrapping_sub((ROUND_MAGIC as f32).to_bits() as i32);
        let bias = self.int(form, bias)?;
        let biased = self.addi(bits, bias)?;
        let mantissa_bits = self.int(form, 23)?;
        let exponent = self.same("arith.shli", &[biased, mantissa_bits])?;
        let factor = self.bitcast(exponent, float)?;
        self.mulf(y, factor)
    }

    /// `log(x)`: `x = 2ᵉ·m`, `√½ ≤ m < √2`, a polynomial of degree 8 in `m - 1`.
    pub fn log(&mut self, form: Form, x: V<'c>) -> Result<V<'c>, Error> {
        let int = self.ty(Elem::I32, form);
        let float = self.ty(Elem::F32, form);
        // Subnormals are first scaled into the normal range.
        let smallest = self.k(form, f64::from(f32::MIN_POSITIVE))?;
        let tiny = self.cmpf(Cmp::Lt, form, x, smallest)?;
        let scale = self.k(form, 8_388_608.0)?;
        let scaled = self.mulf(x, scale)?;
        let normal = self.select(tiny, scaled, x)?;
        // Subtracting the bits of √½ makes the exponent field count from there.
        let bits = self.bitcast(normal, int)?;
        let root = self.int(form, 0x3f35_04f3)?;
        let shifted = self.subi(bits, root)?;
        let mantissa_bits = self.int(form, 23)?;
        let e = self.same("arith.shrsi", &[shifted, mantissa_bits])?;
        let exponent_part = self.same("arith.shli", &[e, mantissa_bits])?;
        let m_bits = self.subi(bits, exponent_part)?;
        let m = self.bitcast(m_bits, float)?;
        let e = self.op1("arith.sitofp", &[e], &[], float)?;
        let zero = self.k(form, 0.0)?;
        let twenty_three = self.k(form, 23.0)?;
        let correction = self.select(tiny, twenty_three, zero)?;
        let e = self.subf(e, correction)?;

        let one = self.k(form, 1.0)?;
        let r = self.subf(m, one)?;
        let p = self.polynomial(
            form,
            r,
            &[
                7.037_683_6e-2,
                -1.151_461e-1,
                1.167_699_8e-1,
                -1.242_014_1e-1,
                1.424_932_3e-1,
                -1.666_805_7e-1,
                2.000_071_4e-1,
                -2.499_999_4e-1,
                3.333_333_1e-1,
            ],
        )?;
        let square = self.mulf(r, r)?;
        let cube = self.mulf(square, r)?;
        let y = self.mulf(p, cube)?;
        let ln2_low = self.k(form, -2.121_944_4e-4)?;
        let y = self.fma(e, ln2_low, y)?;
        let minus_half = self.k(form, -0.5)?;
        let y = self.fma(square, minus_half, y)?;
        let y = self.addf(r, y)?;
        let ln2_high = self.k(form, 0.693_359_375)?;
        let y = self.fma(e, ln2_high, y)?;

        // log 0 = -inf, log inf = inf, log of negative numbers and NaN is NaN.
        let infinity = self.k(form, f64::INFINITY)?;
        let minus_infinity = self.k(form, f64::NEG_INFINITY)?;
        let nan = self.k(form, f64::NAN)?;
        let is_infinite = self.cmpf(Cmp::Eq, form, x, infinity)?;
        let y = self.select(is_infinite, infinity, y)?;
        let is_zero = self.cmpf(Cmp::Eq, form, x, zero)?;
        let y = self.select(is_zero, minus_infinity, y)?;
        let is_legal = self.cmpf(Cmp::Ge, form, x, zero)?;
        self.select(is_legal, y, nan)
    }

    /// `tanh(x)`: an odd rational function of degrees 13 and 6 on `|x| < 7.9`, 1 beyond, and `x`
    /// itself below 0.0004.
    pub fn tanh(&mut self, form: Form, x: V<'c>) -> Result<V<'c>, Error> {
        let limit = 7.905_311_107_637_98;
        let clamped = self.clamp(form, x, -limit, limit)?;
        let square = self.mulf(clamped, clamped)?;
        let p = self.polynomial(
            form,
            square,
            &[
                -2.760_768_477_423_55e-16,
                2.000_187_904_824_77e-13,
                -8.604_671_522_137_35e-11,
                5.122_297_090_371_14e-8,
                1.485_722_357_179_79e-5,
                6.372_619_288_754_36e-4,
                4.893_524_558_917_86e-3,
            ],
        )?;
        let p = self.mulf(clamped, p)?;
        let q = self.polynomial(
            form,
            square,
            &[
                1.198_258_394_667_02e-6,
                1.185_347_056_866_54e-4,
                2.268_434_632_439e-3,
                4.893_525_185_543_85e-3,
            ],
        )?;
        let y = self.divf(p, q)?;
        let magnitude = self.same("math.absf", &[x])?;
        let threshold = self.k(form, 0.0004)?;
        let tiny = self.cmpf(Cmp::Lt, form, magnitude, threshold)?;
        self.select(tiny, x, y)
    }

    /// `erf(x)`: an odd rational function of degrees 13 and 8 on `|x| < 4`, its value at 4 beyond.
    pub fn erf(&mut self, form: Form, x: V<'c>) -> Result<V<'c>, Error> {
        let clamped = self.clamp(form, x, -4.0, 4.0)?;
        let square = self.mulf(clamped, clamped)?;
        let p = self.polynomial(
            form,
            square,
            &[
                -2.726_142_258_013_06e-10,
                2.770_681_424_959_02e-8,
                -2.101_024_020_825_08e-6,
                -5.692_506_394_623_46e-5,
                -7.349_906_303_268_55e-4,
                -2.954_599_808_540_25e-3,
                -1.609_603_332_624_15e-2,
            ],
        )?;
        let p = self.mulf(clamped, p)?;
        let q = self.polynomial(
            form,
            square,
            &[
                -1.456_607_184_649_96e-5,
                -2.133_740_552_789_05e-4,
                -1.682_826_974_382_03e-3,
                -7.373_329_167_204_68e-3,
                -1.426_473_905_141_89e-2,
            ],
        )?;
        self.divf(p, q)
    }

    /// `1 / (1 + exp(-x))`; 0 where the exponential overflows.
    pub fn sigmoid(&mut self, form: Form, x: V<'c>) -> Result<V<'c>, Error> {
        let one = self.k(form, 1.0)?;
        let negated = self.same("arith.negf", &[x])?;
        let exp = self.exp(form, negated)?;
        let sum = self.addf(one, exp)?;
        self.divf(one, sum)
    }
}
