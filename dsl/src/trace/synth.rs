//! Synthetic routers: Markov chains over experts with chosen affinity and load.
//!
//! Enters: a [`Router`] and a seed. Leaves: a trace of as many tokens as asked for.
//! Invariant: the same router, seed and number of tokens give the same trace on every machine.
//!
//! Experts of a layer are divided at random into topics. From one layer to the next a choice moves,
//! with probability `1 − noise`, to an expert of its topic by a sparse random row (Dirichlet with
//! `concentration`), and with probability `noise` to any expert by popularity alone.

use serde::{Deserialize, Serialize};

use super::{RoutingTrace, TraceError, TraceShape};

/// How popular experts are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// All alike.
    Uniform,
    /// The expert of rank r is r^−s as popular as the first.
    Zipf(f64),
    /// Popularity is lognormal with this σ.
    LogNormal(f64),
}

/// A synthetic router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Router {
    pub shape: TraceShape,
    /// Groups that experts of every layer fall into; as many as experts makes every topic one expert.
    pub topics: usize,
    /// Probability that a choice forgets its topic.
    pub noise: f64,
    /// Of the Dirichlet rows within a topic: small means few successors, ∞ means uniform.
    pub concentration: f64,
    pub load: Load,
    pub seed: u64,
}

impl Router {
    /// Checks the parameters.
    ///
    /// # Errors
    /// Sizes that cannot occur, topics that do not divide the experts, or a parameter out of range.
    pub fn check(&self) -> Result<(), TraceError> {
        self.shape.check()?;
        let experts = self.shape.experts;
        if self.topics == 0 || !experts.is_multiple_of(self.topics) {
            return Err(TraceError::Invalid(format!(
                "{experts} experts do not fall into {} topics of one size; give a divisor of {experts}",
                self.topics
            )));
        }
        if !(0.0..=1.0).contains(&self.noise) {
            return Err(TraceError::Invalid(format!(
                "noise is a probability, {} is not; give 0 to 1",
                self.noise
            )));
        }
        let parameter = match self.load {
            Load::Uniform => 0.0,
            Load::Zipf(s) => s,
            Load::LogNormal(sigma) => sigma,
        };
        if !(parameter.is_finite() && parameter >= 0.0) || self.concentration.is_nan() {
            return Err(TraceError::Invalid(
                "load parameters are finite and not negative, the concentration is positive".into(),
            ));
        }
        if self.concentration <= 0.0 {
            return Err(TraceError::Invalid(format!(
                "the concentration is positive, {} is not",
                self.concentration
            )));
        }
        Ok(())
    }

    /// Routes `n_tokens` tokens. O(layers · experts²) once, then O(layers · top_k · log experts) a token.
    ///
    /// # Errors
    /// See [`Router::check`].
    pub fn trace(&self, n_tokens: usize) -> Result<RoutingTrace, TraceError> {
        self.check()?;
        let mut random = Random::new(self.seed);
        let chain = Chain::draw(self, &mut random);
        let TraceShape { layers, top_k, .. } = self.shape;
        let mut trace = RoutingTrace::new(self.shape, Some("synthetic".into()))?;
        let mut choices = vec![0; self.shape.slots()];
        for _ in 0..n_tokens {
            for layer in 0..layers {
                for slot in 0..top_k {
                    let (done, open) = choices.split_at_mut(layer * top_k + slot);
                    let taken = &done[layer * top_k..];
                    let before = layer
                        .checked_sub(1)
                        .map(|before| usize::from(done[before * top_k + slot]));
                    open[0] = chain.choose(layer, before, taken, &mut random);
                }
            }
            trace.push(&choices, None)?;
        }
        Ok(trace)
    }
}

/// Cumulative distributions of a router.
struct Chain {
    noise: f64,
    experts: usize,
    /// Per layer, over its experts.
    popular: Vec<Vec<f64>>,
    /// Per layer but the last, per expert: the experts of its topic in the next layer.
    rows: Vec<Vec<Row>>,
}

struct Row {
    experts: std::rc::Rc<[u16]>,
    cumulative: Vec<f64>,
}

impl Chain {
    fn draw(router: &Router, random: &mut Random) -> Self {
        let TraceShape {
            layers, experts, ..
        } = router.shape;
        let per_topic = experts / router.topics;
        let mut weights = Vec::with_capacity(layers);
        let mut members: Vec<Vec<std::rc::Rc<[u16]>>> = Vec::with_capacity(layers);
        for _ in 0..layers {
            let mut order: Vec<u16> = (0..experts as u16).collect();
            random.shuffle(&mut order);
            members.push(order.chunks(per_topic).map(std::rc::Rc::from).collect());
            let mut ranks: Vec<usize> = (0..experts).collect();
            random.shuffle(&mut ranks);
            let layer: Vec<f64> = ranks
                .iter()
                .map(|rank| match router.load {
                    Load::Uniform => 1.0,
                    Load::Zipf(s) => ((rank + 1) as f64).powf(-s),
                    Load::LogNormal(sigma) => (sigma * random.normal()).exp(),
                })
                .collect();
            weights.push(layer);
        }
        let mut rows = Vec::with_capacity(layers.saturating_sub(1));
        for layer in 0..layers.saturating_sub(1) {
            let mut of_layer: Vec<Option<Row>> = (0..experts).map(|_| None).collect();
            for (from, to) in members[layer].iter().zip(&members[layer + 1]) {
                for expert in from.iter() {
                    let popularity = to.iter().map(|e| weights[layer + 1][usize::from(*e)]);
                    let row = dirichlet(router.concentration, popularity.collect(), random);
                    of_layer[usize::from(*expert)] = Some(Row {
                        experts: to.clone(),
                        cumulative: cumulative(&row),
                    });
                }
            }
            rows.push(of_layer.into_iter().flatten().collect());
        }
        Self {
            noise: router.noise,
            experts,
            popular: weights.iter().map(|layer| cumulative(layer)).collect(),
            rows,
        }
    }

    /// An expert that is not taken. A row whose every likely expert is taken is left by popularity.
    fn choose(
        &self,
        layer: usize,
        before: Option<usize>,
        taken: &[u16],
        random: &mut Random,
    ) -> u16 {
        /// Draws that may fall on taken experts before a free one is taken in order.
        const TRIES: usize = 64;
        for attempt in 0..TRIES {
            let row = before.filter(|_| attempt < TRIES / 2 && random.uniform() >= self.noise);
            let expert = match row {
                Some(before) => {
                    let row = &self.rows[layer - 1][before];
                    row.experts[pick(&row.cumulative, random)]
                }
                None => pick(&self.popular[layer], random) as u16,
            };
            if !taken.contains(&expert) {
                return expert;
            }
        }
        let free = (0..self.experts as u16).find(|expert| !taken.contains(expert));
        free.unwrap_or_default()
    }
}

fn cumulative(weights: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let sums = weights.iter().map(|weight| {
        sum += weight;
        sum
    });
    sums.collect()
}

fn pick(cumulative: &[f64], random: &mut Random) -> usize {
    let total = cumulative.last().copied().unwrap_or(0.0);
    let at = random.uniform() * total;
    let idx = cumulative.partition_point(|sum| *sum <= at);
    idx.min(cumulative.len().saturating_sub(1))
}

/// Shares from a Dirichlet distribution, times popularity. In logarithms, since small concentrations
/// underflow.
fn dirichlet(concentration: f64, popularity: Vec<f64>, random: &mut Random) -> Vec<f64> {
    if concentration.is_infinite() {
        return popularity;
    }
    let logs: Vec<f64> = popularity
        .iter()
        .map(|p| random.log_gamma_variate(concentration) + p.ln())
        .collect();
    let greatest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logs.iter().map(|log| (log - greatest).exp()).collect()
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; nearby seeds give unrelated streams.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.uniform() * n as f64) as usize).min(n.saturating_sub(1))
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// The logarithm of a gamma variate of this shape (Marsaglia and Tsang 2000).
    fn log_gamma_variate(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = (1.0 - self.uniform()).ln() / shape;
            return self.log_gamma_variate(shape + 1.0) + boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 {
                let u = 1.0 - self.uniform();
                if u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                    return (d * v).ln();
                }
            }
        }
    }

    /// Puts items into random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}
