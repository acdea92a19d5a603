//! Functions of elements, reductions and optimizer updates.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::{BinaryFn, UnaryFn};

use super::super::Value;
use super::super::init::rounded;
use super::super::value::{for_each_offset, sizes, strides_over};
use super::neutral;

pub(super) fn unary(function: UnaryFn, x: &Value) -> Value {
    let data = x.data();
    let mut ty = x.ty().clone();
    if let UnaryFn::Cast(dtype) = function {
        ty.dtype = dtype;
    }
    Value::from_fn(ty, |i| apply_unary(function, data[i]))
}

pub(super) fn binary(function: BinaryFn, a: &Value, b: &Value, ty: TensorType) -> Value {
    let mut result = Value::full(ty.clone(), 0.0);
    let mut out = result.data_mut().iter_mut();
    for_each_offset(
        &sizes(&ty),
        [
            &strides_over(a.ty(), ty.dims()),
            &strides_over(b.ty(), ty.dims()),
        ],
        |[at_a, at_b]| {
            if let Some(out) = out.next() {
                *out = apply_binary(function, a.data()[at_a], b.data()[at_b]);
            }
        },
    );
    result
}

/// log Σ exp goes over the elements twice, to subtract the greatest.
pub(super) fn reduce(kind: ReduceKind, x: &Value, ty: TensorType) -> Value {
    let fold = |kind: ReduceKind, element: &dyn Fn(usize, usize) -> f64| {
        let mut result = Value::full(ty.clone(), neutral(kind));
        let out = result.data_mut();
        for_each_offset(
            &sizes(x.ty()),
            [&x.ty().strides(), &strides_over(&ty, x.ty().dims())],
            |[from, to]| out[to] = reduce_pair(kind, out[to], element(from, to)),
        );
        result
    };
    match kind {
        ReduceKind::Sum | ReduceKind::Max => fold(kind, &|from, _| x.data()[from]),
        ReduceKind::Lse => {
            let greatest = fold(ReduceKind::Max, &|from, _| x.data()[from]);
            let mut result = fold(ReduceKind::Sum, &|from, to| {
                let greatest = greatest.data()[to];
                if greatest == f64::NEG_INFINITY {
                    0.0
                } else {
                    (x.data()[from] - greatest).exp()
                }
            });
            for (sum, greatest) in result.data_mut().iter_mut().zip(greatest.data()) {
                *sum = greatest + sum.ln();
            }
            result
        }
    }
}

/// Two elements reduced to one.
pub(in super::super) fn reduce_pair(kind: ReduceKind, a: f64, b: f64) -> f64 {
    match kind {
        ReduceKind::Sum => a + b,
        ReduceKind::Max => a.max(b),
        ReduceKind::Lse => {
            let greatest = a.max(b);
            if greatest.is_infinite() {
                greatest
            } else {
                greatest + ((a - greatest).exp() + (b - greatest).exp()).ln()
            }
        }
    }
}

/// The constants of AdamW.
pub(super) struct AdamwRates {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub decay: f64,
}

/// Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, without a schedule factor.
pub(super) fn adamw(rates: &AdamwRates, [p, g, m, v]: [&Value; 4], step: f64) -> Vec<Value> {
    let [mut next_p, mut next_m, mut next_v] = [p.clone(), m.clone(), v.clone()];
    let correction1 = 1.0 - rates.beta1.powf(step);
    let correction2 = 1.0 - rates.beta2.powf(step);
    for i in 0..p.data().len() {
        let (p, g, m, v) = (p.data()[i], g.data()[i], m.data()[i], v.data()[i]);
        let m = rates.beta1 * m + (1.0 - rates.beta1) * g;
        let v = rates.beta2 * v + (1.0 - rates.beta2) * g * g;
        let direction = (m / correction1) / ((v / correction2).sqrt() + rates.eps);
        next_p.data_mut()[i] = p - rates.lr * (direction + rates.decay * p);
        next_m.data_mut()[i] = m;
        next_v.data_mut()[i] = v;
    }
    vec![next_p, next_m, next_v]
}

pub(super) fn sgd(lr: f64, p: &Value, g: &Value) -> Value {
    Value::from_fn(p.ty().clone(), |i| p.data()[i] - lr * g.data()[i])
}

fn apply_unary(function: UnaryFn, x: f64) -> f64 {
    match function {
        UnaryFn::Neg => -x,
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Rsqrt => 1.0 / x.sqrt(),
        UnaryFn::Square => x * x,
        UnaryFn::Reciprocal => 1.0 / x,
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Sigmoid => sigmoid(x),
        UnaryFn::Silu => x * sigmoid(x),
        UnaryFn::Relu => x.max(0.0),
        UnaryFn::Gelu => x * normal_cdf(x),
        UnaryFn::GeluTanh => 0.5 * x * (1.0 + gelu_argument(x).tanh()),
        UnaryFn::Scale(c) => c.0 * x,
        UnaryFn::Shift(c) => x + c.0,
        UnaryFn::Cast(dtype) => rounded(x, dtype),
    }
}

fn apply_binary(function: BinaryFn, a: f64, b: f64) -> f64 {
    match function {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div => a / b,
        BinaryFn::Max => a.max(b),
        BinaryFn::Equal => f64::from(u8::from(a == b)),
        BinaryFn::TanhGrad => b * (1.0 - a.tanh().powi(2)),
        BinaryFn::SigmoidGrad => b * sigmoid(a) * (1.0 - sigmoid(a)),
        BinaryFn::SiluGrad => b * sigmoid(a) * (1.0 + a * (1.0 - sigmoid(a))),
        BinaryFn::ReluGrad => {
            if a > 0.0 {
                b
            } else {
                0.0
            }
        }
        BinaryFn::GeluGrad => {
            let density = (-0.5 * a * a).exp() / (2.0 * PI).sqrt();
            b * (normal_cdf(a) + a * density)
        }
        BinaryFn::GeluTanhGrad => {
            let tanh = gelu_argument(a).tanh();
            let slope = (2.0 / PI).sqrt() * (1.0 + 3.0 * GELU_CUBIC * a * a);
            b * (0.5 * (1.0 + tanh) + 0.5 * a * (1.0 - tanh * tanh) * slope)
        }
    }
}

/// Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
const GELU_CUBIC: f64 = 0.044715;

fn gelu_argument(x: f64) -> f64 {
    (2.0 / PI).sqrt() * (x + GELU_CUBIC * x * x * x)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn normal_cdf(x: f64) -> f64 {
    0.5 * (1.0 + erf(x * FRAC_1_SQRT_2))
}

/// erf(x) = 2/√π e^(−x²) Σ 2ⁿ x^(2n+1) / (2n+1)!!, whose terms are all of one sign.
/// Source: Abramowitz and Stegun 7.1.6. Beyond 6 the function is ±1 in f64.
fn erf(x: f64) -> f64 {
    if x.is_nan() || x.abs() > 6.0 {
        return if x.is_nan() { x } else { x.signum() };
    }
    let mut term = x;
    let mut sum = x;
    let mut n = 1.0;
    while term.abs() > sum.abs() * 1e-17 {
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_agrees_with_tables() {
        // Abramowitz and Stegun, table 7.1, and erf(2), erf(3) to 15 digits.
        for (x, expected) in [
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ] {
            assert!((erf(x) - expected).abs() < 1e-15, "{x}: {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-15);
        }
    }

    #[test]
    fn derivatives_agree_with_differences() {
        let pairs = [
            (UnaryFn::Tanh, BinaryFn::TanhGrad),
            (UnaryFn::Sigmoid, BinaryFn::SigmoidGrad),
            (UnaryFn::Silu, BinaryFn::SiluGrad),
            (UnaryFn::Relu, BinaryFn::ReluGrad),
            (UnaryFn::Gelu, BinaryFn::GeluGrad),
            (UnaryFn::GeluTanh, BinaryFn::GeluTanhGrad),
        ];
        let h = 1e-5;
        for (function, gradient) in pairs {
            for x in [-3.1, -0.7, -0.01, 0.02, 0.9, 2.7] {
                let slope =
                    (apply_unary(function, x + h) - apply_unary(function, x - h)) / (2.0 * h);
                let given = apply_binary(gradient, x, 1.5);
                assert!((given - 1.5 * slope).abs() < 1e-9, "{function:?} at {x}");
            }
        }
    }
}
