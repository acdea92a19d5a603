//! Compositions of row-program instructions that have a name: activations and their derivatives.
//!
//! Enters: a [`KernelBuilder`] and operands. Leaves: the value of the composition.
//! Invariant: spans follow the operands; each formula works on rows and lanes alike.

use super::kernel::{BinaryOp, KernelBuilder, Predicate, UnaryOp, Val};

/// `1/√(2π)`, of the normal density.
const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;
/// Of the tanh form of gelu (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2).
const GELU_CUBIC: f64 = 0.044_715;
/// `2·√(2/π)`
const GELU_ROOT: f64 = 1.595_769_121_605_731;

impl KernelBuilder {
    /// `a + b`
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        self.binary(BinaryOp::Add, a, b)
    }

    /// `a - b`
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        self.binary(BinaryOp::Sub, a, b)
    }

    /// `a · b`
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        self.binary(BinaryOp::Mul, a, b)
    }

    /// `a / b`
    pub fn div(&mut self, a: Val, b: Val) -> Val {
        self.binary(BinaryOp::Div, a, b)
    }

    /// `a · factor`
    pub fn scale(&mut self, a: Val, factor: f32) -> Val {
        let factor = self.f32(factor);
        self.mul(a, factor)
    }

    /// `exp(a)`
    pub fn exp(&mut self, a: Val) -> Val {
        self.unary(UnaryOp::Exp, a)
    }

    /// `max(0, x)`; NaN propagates.
    pub fn relu(&mut self, x: Val) -> Val {
        let zero = self.f32(0.0);
        self.binary(BinaryOp::Max, zero, x)
    }

    /// `x > 0 ? dy : 0`
    pub fn relu_grad(&mut self, x: Val, dy: Val) -> Val {
        let zero = self.f32(0.0);
        let positive = self.compare(Predicate::Gt, x, zero);
        self.select(positive, dy, zero)
    }

    /// `x · sigmoid(x)`
    pub fn silu(&mut self, x: Val) -> Val {
        let s = self.unary(UnaryOp::Sigmoid, x);
        self.mul(x, s)
    }

    /// `dy · s · (1 + x · (1 - s))` with `s = sigmoid(x)`
    pub fn silu_grad(&mut self, x: Val, dy: Val) -> Val {
        let one = self.f32(1.0);
        let s = self.unary(UnaryOp::Sigmoid, x);
        let complement = self.sub(one, s);
        let inner = self.fma(x, complement, one);
        let slope = self.mul(s, inner);
        self.mul(dy, slope)
    }

    /// `x · Φ(x)`, `Φ(x) = (1 + erf(x / √2)) / 2` (Hendrycks and Gimpel 2016, section 2)
    pub fn gelu(&mut self, x: Val) -> Val {
        let cdf = self.normal_cdf(x);
        self.mul(x, cdf)
    }

    /// `dy · (Φ(x) + x · φ(x))`
    pub fn gelu_grad(&mut self, x: Val, dy: Val) -> Val {
        let cdf = self.normal_cdf(x);
        let square = self.mul(x, x);
        let half = self.scale(square, -0.5);
        let exp = self.exp(half);
        let pdf = self.scale(exp, FRAC_1_SQRT_2PI);
        let slope = self.fma(x, pdf, cdf);
        self.mul(dy, slope)
    }

    /// `x/2 · (1 + tanh(u))` with `u = √(2/π) · (x + 0.044715·x³)`, computed as
    /// `x · sigmoid(2u)`, which is the same and keeps its precision where tanh saturates.
    pub fn gelu_tanh(&mut self, x: Val) -> Val {
        let (gate, _) = self.gelu_tanh_gate(x);
        self.mul(x, gate)
    }

    /// Derivative of [`Self::gelu_tanh`] times `dy`: `s + x · s · (1 - s) · 2u'` with
    /// `s = sigmoid(2u)` and `2u' = 2√(2/π) · (1 + 3·0.044715·x²)`.
    pub fn gelu_tanh_grad(&mut self, x: Val, dy: Val) -> Val {
        let (gate, square) = self.gelu_tanh_gate(x);
        let cubic = self.f32((3.0 * GELU_CUBIC * GELU_ROOT) as f32);
        let root = self.f32(GELU_ROOT as f32);
        let inner = self.fma(square, cubic, root);
        let one = self.f32(1.0);
        let complement = self.sub(one, gate);
        let spread = self.mul(gate, complement);
        let chain = self.mul(spread, inner);
        let slope = self.fma(x, chain, gate);
        self.mul(dy, slope)
    }

    /// `sigmoid(2u)` and `x²`.
    fn gelu_tanh_gate(&mut self, x: Val) -> (Val, Val) {
        let square = self.mul(x, x);
        let cubic = self.f32((GELU_CUBIC * GELU_ROOT) as f32);
        let root = self.f32(GELU_ROOT as f32);
        let factor = self.fma(square, cubic, root);
        let inner = self.mul(x, factor);
        (self.unary(UnaryOp::Sigmoid, inner), square)
    }

    fn normal_cdf(&mut self, x: Val) -> Val {
        let scaled = self.scale(x, std::f32::consts::FRAC_1_SQRT_2);
        let erf = self.unary(UnaryOp::Erf, scaled);
        let half = self.f32(0.5);
        self.fma(half, erf, half)
    }
}
