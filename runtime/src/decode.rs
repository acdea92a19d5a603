//! Decoding steps of a mixture of experts over devices, with two exchanges of tokens a layer or with one.
//!
//! In: sizes, where experts are, and the experts that a router chose for every token of a recorded run.
//! Out: each step's seconds, the bytes that crossed devices, and the tokens' features at the end.
//! Invariant: both ways compute the same; with one expert a token they give the same bits.
//!
//! With *two* exchanges a token comes home after every layer: all_to_all to its experts, all_to_all back;
//! keys and values of a sequence are at its home alone.
//! With *one* the context is coherent (ExFlow, arXiv 2401.08383, §4.1): every device has all keys and
//! values, so a token's attention may run where its expert was, and the token goes from expert to expert
//! by one all_to_all a layer. Keys and values of the new tokens are gathered once a step, since within the
//! step a token attends only to itself and to what is known everywhere.
//! With several experts a token it lives where its first one is, and what the others give has to reach
//! it: a second all_to_all carries the results of experts on other devices than the first.
//!
//! Weights are made by hashing and routes are those of the trace, so what is measured is the exchange
//! around real work, not a model's text.

use std::time::Instant;

use crate::collective::threads::{WaitOptions, World};
use crate::collective::{Communicator, Crossing, CrossingOrder, Division, GroupIdx};
use crate::error::{Error, Result};

/// Sizes of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeShape {
    pub layers: usize,
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    pub embed: usize,
    /// Width of an expert.
    pub ffn: usize,
    /// Width of a token's keys, and of its values; queries have it, too.
    pub kv: usize,
}

/// How tokens get from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchanges {
    /// To the experts and home again.
    Two,
    /// From expert to expert.
    One,
}

/// What is decoded.
#[derive(Debug, Clone, Copy)]
pub struct Decode<'a> {
    pub shape: DecodeShape,
    pub n_devices: usize,
    /// The device of every expert, layer by layer.
    pub devices: &'a [Vec<u16>],
    /// Sequences decoded together; a device is home to an equal run of them.
    pub n_sequences: usize,
    /// Chosen experts: `[step, sequence, layer, choice]`.
    pub routes: &'a [u16],
    pub exchanges: Exchanges,
}

/// What a run measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Wall seconds of every step.
    pub step_s: Vec<f64>,
    /// Bytes of tokens that came to a device from another one, over all devices and steps.
    pub dispatched_bytes: u64,
    /// The same of keys and values.
    pub context_bytes: u64,
    /// The same of counts, which go ahead of rows.
    pub count_bytes: u64,
    /// Exchanges of tokens that a device took part in.
    pub n_exchanges: u64,
    /// `[sequence, embed]` after the last step.
    pub features: Vec<f32>,
}

impl Decode<'_> {
    /// Steps that the routes are for.
    pub fn n_steps(&self) -> usize {
        let of_step = self.n_sequences * self.shape.layers * self.shape.top_k;
        self.routes.len() / of_step.max(1)
    }

    fn experts(&self, step: usize, sequence: usize, layer: usize) -> &[u16] {
        let DecodeShape { layers, top_k, .. } = self.shape;
        let at = ((step * self.n_sequences + sequence) * layers + layer) * top_k;
        &self.routes[at..at + top_k]
    }

    fn device(&self, layer: usize, expert: u16) -> usize {
        usize::from(self.devices[layer][usize::from(expert)])
    }

    fn home(&self, sequence: usize) -> usize {
        sequence / (self.n_sequences / self.n_devices)
    }

    /// Rows that leave their device in the first exchange, and in the second, over all steps: the
    /// figures that a run must come to, from routes alone.
    pub fn n_crossing(&self) -> [u64; 2] {
        let mut crossing = [0; 2];
        for step in 0..self.n_steps() {
            for sequence in 0..self.n_sequences {
                let mut at = self.home(sequence);
                for layer in 0..self.shape.layers {
                    let experts = self.experts(step, sequence, layer);
                    let mut reached: Vec<usize> = Vec::new();
                    for expert in experts {
                        let device = self.device(layer, *expert);
                        if !reached.contains(&device) {
                            reached.push(device);
                        }
                    }
                    let back_to = match self.exchanges {
                        Exchanges::Two => at,
                        Exchanges::One => reached[0],
                    };
                    let others = |from: usize| reached.iter().filter(|to| **to != from).count();
                    crossing[0] += others(at) as u64;
                    crossing[1] += others(back_to) as u64;
                    at = back_to;
                }
            }
        }
        crossing
    }

    fn check(&self) -> Result<()> {
        let DecodeShape {
            layers,
            experts,
            top_k,
            embed,
            ffn,
            kv,
        } = self.shape;
        let invalid = |text: String| Err(Error::Invalid(text));
        if [layers, experts, top_k, embed, ffn, kv, self.n_devices].contains(&0) {
            return invalid("a decoding run needs at least 1 of everything".into());
        }
        if top_k > 32 {
            return invalid(format!("{top_k} experts a token; at most 32 are decoded"));
        }
        if self.n_sequences == 0 || !self.n_sequences.is_multiple_of(self.n_devices) {
            return invalid(format!(
                "{} sequences do not divide over {} devices: choose a multiple",
                self.n_sequences, self.n_devices
            ));
        }
        let placed = self.devices.len() == layers
            && self.devices.iter().all(|layer| {
                let on_device = |device: &u16| usize::from(*device) < self.n_devices;
                layer.len() == experts && layer.iter().all(on_device)
            });
        if !placed {
            return invalid(format!(
                "the placement is not one of {layers} layers of {experts} experts on {} devices",
                self.n_devices
            ));
        }
        if let Some(expert) = self.routes.iter().find(|e| usize::from(**e) >= experts) {
            return invalid(format!(
                "a token goes to expert {expert} of {experts}: give the placement of this trace"
            ));
        }
        if self.n_steps() == 0 {
            return invalid(format!(
                "the routes do not suffice for a step of {} sequences",
                self.n_sequences
            ));
        }
        Ok(())
    }
}

/// Runs the steps on threads, one a device.
///
/// # Errors
/// `Invalid` for sizes that do not fit; that of the first device that fails.
pub fn decode(run: &Decode) -> Result<Decoded> {
    run.check()?;
    let world = World::new(run.n_devices, WaitOptions::for_threads(run.n_devices));
    let communicators = world.communicators();
    let ended: Vec<Result<Ended>> = std::thread::scope(|scope| {
        let threads: Vec<_> = communicators
            .into_iter()
            .map(|communicator| {
                scope.spawn(move || {
                    let mut device = Device::new(run, Box::new(communicator))?;
                    let ended = device.run();
                    if let Err(error) = &ended {
                        device.communicator.abort(error);
                    }
                    ended
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Ended>>| {
            let panicked = |_| Err(Error::Internal("a decoding device panicked".into()));
            thread.join().unwrap_or_else(panicked)
        };
        threads.into_iter().map(join).collect()
    });
    let ended = ended.into_iter().collect::<Result<Vec<_>>>()?;
    let embed = run.shape.embed;
    let mut features = vec![0.0; run.n_sequences * embed];
    for token in ended.iter().flat_map(|ended| &ended.tokens) {
        features[token.sequence * embed..][..embed].copy_from_slice(&token.h);
    }
    let sum = |figure: fn(&Bytes) -> u64| ended.iter().map(|ended| figure(&ended.bytes)).sum();
    Ok(Decoded {
        step_s: ended
            .first()
            .map_or_else(Vec::new, |ended| ended.step_s.clone()),
        dispatched_bytes: sum(|bytes| bytes.rows),
        context_bytes: sum(|bytes| bytes.context),
        count_bytes: sum(|bytes| bytes.counts),
        n_exchanges: ended.first().map_or(0, |ended| ended.n_exchanges),
        features,
    })
}

#[derive(Clone, Copy, Default)]
struct Bytes {
    rows: u64,
    context: u64,
    counts: u64,
}

/// What a device has to say after the last step.
struct Ended {
    tokens: Vec<Token>,
    step_s: Vec<f64>,
    bytes: Bytes,
    n_exchanges: u64,
}

/// A new token where it is.
struct Token {
    sequence: usize,
    h: Vec<f32>,
}

/// A matrix `[rows, columns]`.
struct Matrix {
    columns: usize,
    data: Vec<f32>,
}

/// An expert: gate, up, down.
type Expert = [Matrix; 3];

struct Device<'a> {
    run: &'a Decode<'a>,
    rank: usize,
    communicator: Box<dyn Communicator>,
    group: GroupIdx,
    /// Queries, keys, values and the way out, by layer.
    attention: Vec<[Matrix; 4]>,
    /// Those that live here, by layer.
    experts: Vec<Vec<Option<Expert>>>,
    /// Keys, then values, of every position so far: by layer and sequence.
    context: Vec<Vec<[Vec<f32>; 2]>>,
    bytes: Bytes,
    n_exchanges: u64,
}

/// Words ahead of a row: its sequence, its choices as bits, and where its token lives next.
pub const HEADER: usize = 3;

impl<'a> Device<'a> {
    fn new(run: &'a Decode<'a>, mut communicator: Box<dyn Communicator>) -> Result<Device<'a>> {
        let ranks: Vec<usize> = (0..run.n_devices).collect();
        let group = communicator.join(&ranks)?;
        let rank = communicator.rank();
        let DecodeShape {
            layers,
            experts,
            embed,
            ffn,
            kv,
            ..
        } = run.shape;
        let attention = (0..layers as u32).map(|layer| {
            [(embed, kv), (embed, kv), (embed, kv), (kv, embed)]
                .map(|(rows, columns)| (rows, columns))
                .into_iter()
                .enumerate()
                .map(|(at, size)| Matrix::hashed(size, 4 * layer + at as u32))
                .collect::<Vec<_>>()
        });
        let attention: Option<Vec<[Matrix; 4]>> =
            attention.map(|layer| layer.try_into().ok()).collect();
        let attention =
            attention.ok_or_else(|| Error::Internal("attention has four matrices".into()))?;
        let experts = (0..layers).map(|layer| {
            let made = (0..experts).map(|expert| {
                let here = usize::from(run.devices[layer][expert]) == rank;
                here.then(|| {
                    let stream = (1 << 20) + 3 * (layer * experts + expert) as u32;
                    [
                        Matrix::hashed((embed, ffn), stream),
                        Matrix::hashed((embed, ffn), stream + 1),
                        Matrix::hashed((ffn, embed), stream + 2),
                    ]
                })
            });
            made.collect()
        });
        Ok(Device {
            experts: experts.collect(),
            attention,
            context: (0..layers)
                .map(|_| {
                    (0..run.n_sequences)
                        .map(|_| [Vec::new(), Vec::new()])
                        .collect()
                })
                .collect(),
            run,
            rank,
            communicator,
            group,
            bytes: Bytes::default(),
            n_exchanges: 0,
        })
    }

    fn run(&mut self) -> Result<Ended> {
        let mut step_s = Vec::new();
        let mut tokens = Vec::new();
        for step in 0..self.run.n_steps() {
            self.communicator.barrier(self.group)?;
            let started = Instant::now();
            tokens = self.step(step)?;
            self.communicator.barrier(self.group)?;
            step_s.push(started.elapsed().as_secs_f64());
        }
        Ok(Ended {
            tokens,
            step_s,
            bytes: self.bytes,
            n_exchanges: self.n_exchanges,
        })
    }

    /// One new token of every sequence, through all layers.
    fn step(&mut self, step: usize) -> Result<Vec<Token>> {
        let embed = self.run.shape.embed;
        let sequences = (0..self.run.n_sequences).filter(|s| self.run.home(*s) == self.rank);
        let mut tokens: Vec<Token> = sequences
            .map(|sequence| {
                let first = ((step * self.run.n_sequences + sequence) * embed) as u32;
                let h = (0..embed as u32).map(|i| uniform(first + i, 7)).collect();
                Token { sequence, h }
            })
            .collect();
        // Layer, sequence, keys and values of what was computed here.
        let mut fresh: Vec<u32> = Vec::new();
        for layer in 0..self.run.shape.layers {
            for token in &mut tokens {
                self.attend(layer, token, &mut fresh);
            }
            tokens = self.exchange(step, layer, tokens)?;
        }
        match self.run.exchanges {
            Exchanges::Two => self.remember(&fresh),
            Exchanges::One => {
                let everything = self.gather(&fresh)?;
                self.remember(&everything);
            }
        }
        Ok(tokens)
    }

    /// h += attention(norm(h)) over the positions known and the token itself.
    fn attend(&self, layer: usize, token: &mut Token, fresh: &mut Vec<u32>) {
        let x = norm(&token.h);
        let [wq, wk, wv, wo] = &self.attention[layer];
        let (q, k, v) = (wq.applied(&x), wk.applied(&x), wv.applied(&x));
        let kv = self.run.shape.kv;
        let [keys, values] = &self.context[layer][token.sequence];
        let scale = (kv as f32).sqrt().recip();
        let score =
            |key: &[f32]| -> f32 { key.iter().zip(&q).map(|(a, b)| a * b).sum::<f32>() * scale };
        let mut scores: Vec<f32> = keys.chunks(kv).map(&score).collect();
        scores.push(score(&k));
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        let mut out = vec![0.0; kv];
        let all_values = values.chunks(kv).chain([v.as_slice()]);
        for (score, value) in scores.iter().zip(all_values) {
            let weight = (score - top).exp();
            sum += weight;
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
        out.iter_mut().for_each(|out| *out /= sum);
        for (h, out) in token.h.iter_mut().zip(wo.applied(&out)) {
            *h += out;
        }
        fresh.extend([layer as u32, token.sequence as u32]);
        fresh.extend(k.iter().chain(&v).map(|x| x.to_bits()));
    }

    /// Adds keys and values to the context.
    fn remember(&mut self, fresh: &[u32]) {
        let kv = self.run.shape.kv;
        for one in fresh.chunks(2 + 2 * kv) {
            let [keys, values] = &mut self.context[one[0] as usize][one[1] as usize];
            keys.extend(one[2..2 + kv].iter().map(|bits| f32::from_bits(*bits)));
            values.extend(one[2 + kv..].iter().map(|bits| f32::from_bits(*bits)));
        }
    }

    /// Tokens to their experts, and on to where they live next.
    fn exchange(&mut self, step: usize, layer: usize, tokens: Vec<Token>) -> Result<Vec<Token>> {
        let run = self.run;
        let top_k = run.shape.top_k;
        let mut sent: Vec<Vec<u32>> = vec![Vec::new(); run.n_devices];
        for token in &tokens {
            let experts = run.experts(step, token.sequence, layer);
            let devices: Vec<usize> = experts.iter().map(|e| run.device(layer, *e)).collect();
            let next = match run.exchanges {
                Exchanges::Two => self.rank,
                Exchanges::One => devices[0],
            };
            for (choice, device) in devices.iter().enumerate() {
                if devices[..choice].contains(device) {
                    continue;
                }
                let of_device = (0..top_k).filter(|other| devices[*other] == *device);
                let mask = of_device.fold(0_u32, |mask, other| mask | 1 << other);
                sent[*device].extend([token.sequence as u32, mask, next as u32]);
                sent[*device].extend(token.h.iter().map(|x| x.to_bits()));
            }
        }
        let rows = self.send(sent)?;
        let mut results: Vec<Vec<u32>> = vec![Vec::new(); run.n_devices];
        let mut arrived: Vec<Token> = Vec::new();
        for row in rows.chunks(HEADER + run.shape.embed) {
            let (sequence, mask, next) = (row[0] as usize, row[1], row[2] as usize);
            let h: Vec<f32> = row[HEADER..].iter().map(|x| f32::from_bits(*x)).collect();
            let x = norm(&h);
            let mut out = vec![0.0; run.shape.embed];
            for (choice, expert) in run.experts(step, sequence, layer).iter().enumerate() {
                if mask & (1 << choice) != 0 {
                    self.expert(layer, *expert, &x, &mut out)?;
                }
            }
            results[next].extend([row[0], mask, row[2]]);
            results[next].extend(out.iter().map(|x| x.to_bits()));
            if run.exchanges == Exchanges::One && next == self.rank {
                arrived.push(Token { sequence, h });
            }
        }
        let mut here = if run.exchanges == Exchanges::Two {
            tokens
        } else {
            arrived
        };
        // With one expert a token nothing is left to be sent where the token stays with it.
        let rows = if run.exchanges == Exchanges::One && top_k == 1 {
            std::mem::take(&mut results[self.rank])
        } else {
            self.send(results)?
        };
        for row in rows.chunks(HEADER + run.shape.embed) {
            let sequence = row[0] as usize;
            let token = here.iter_mut().find(|token| token.sequence == sequence);
            let token = token.ok_or_else(|| {
                Error::Internal(format!("a result of sequence {sequence} came astray"))
            })?;
            for (h, out) in token.h.iter_mut().zip(&row[HEADER..]) {
                *h += f32::from_bits(*out);
            }
        }
        Ok(here)
    }

    /// out += (silu(x wg) ⊙ (x wu)) wd / k.
    fn expert(&self, layer: usize, expert: u16, x: &[f32], out: &mut [f32]) -> Result<()> {
        let here = self.experts[layer][usize::from(expert)].as_ref();
        let [gate, up, down] = here.ok_or_else(|| {
            Error::Internal(format!(
                "expert {expert} of layer {layer} is not on device {}",
                self.rank
            ))
        })?;
        let part = (self.run.shape.top_k as f32).recip();
        let (gate, up) = (gate.applied(x), up.applied(x));
        let hidden = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u * part);
        for (out, y) in out
            .iter_mut()
            .zip(down.applied(&hidden.collect::<Vec<_>>()))
        {
            *out += y;
        }
        Ok(())
    }

    /// All_to_all of rows, whose numbers go ahead: what all devices send to this one.
    fn send(&mut self, parts: Vec<Vec<u32>>) -> Result<Vec<u32>> {
        let n_words: Vec<u32> = parts.iter().map(|part| part.len() as u32).collect();
        let mut arriving = vec![0; parts.len()];
        let ones = || vec![1; parts.len()];
        self.all_to_all(&n_words, &mut arriving, ones(), ones(), |bytes| {
            &mut bytes.counts
        })?;
        let counts = |words: &[u32]| words.iter().map(|n| *n as usize).collect::<Vec<_>>();
        let mut rows = vec![0; counts(&arriving).iter().sum()];
        let sent = parts.concat();
        let (split, concat) = (counts(&n_words), counts(&arriving));
        self.all_to_all(&sent, &mut rows, split, concat, |bytes| &mut bytes.rows)?;
        self.n_exchanges += 1;
        Ok(rows)
    }

    fn all_to_all(
        &mut self,
        src: &[u32],
        dst: &mut [u32],
        split_counts: Vec<usize>,
        concat_counts: Vec<usize>,
        of: impl Fn(&mut Bytes) -> &mut u64,
    ) -> Result<()> {
        let crossing = Crossing {
            outer: 1,
            mid: 1,
            inner: 1,
            split_counts,
            concat_counts,
            order: CrossingOrder::SameDim,
        };
        let before = self.communicator.stats().received_bytes;
        self.communicator
            .all_to_all(self.group, src, dst, &crossing)?;
        *of(&mut self.bytes) += self.communicator.stats().received_bytes - before;
        Ok(())
    }

    /// What all devices have, in the order of devices.
    fn gather(&mut self, own: &[u32]) -> Result<Vec<u32>> {
        let along = |counts: Vec<usize>| Division {
            outer: 1,
            counts,
            inner: 1,
        };
        let n_devices = self.run.n_devices;
        let mut lens = vec![0; n_devices];
        let before = self.communicator.stats().received_bytes;
        let ones = along(vec![1; n_devices]);
        self.communicator
            .all_gather(self.group, &[own.len() as u32], &mut lens, &ones)?;
        let between = self.communicator.stats().received_bytes;
        let division = along(lens.iter().map(|len| *len as usize).collect());
        let mut all = vec![0; division.n_elements()];
        self.communicator
            .all_gather(self.group, own, &mut all, &division)?;
        self.bytes.counts += between - before;
        self.bytes.context += self.communicator.stats().received_bytes - between;
        Ok(all)
    }
}

impl Matrix {
    fn hashed((rows, columns): (usize, usize), stream: u32) -> Matrix {
        let scale = (3.0 / rows as f32).sqrt();
        let n = (rows * columns) as u32;
        Matrix {
            columns,
            data: (0..n).map(|i| scale * uniform(i, stream)).collect(),
        }
    }

    /// x · self, row after row, so that no sum depends on what else is computed.
    fn applied(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.columns];
        for (x, row) in x.iter().zip(self.data.chunks(self.columns)) {
            for (out, w) in out.iter_mut().zip(row) {
                *out += x * w;
            }
        }
        out
    }
}

/// x / √(mean x² + 1e-5).
fn norm(x: &[f32]) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = (mean + 1e-5).sqrt().recip();
    x.iter().map(|x| x * scale).collect()
}

/// Uniform in [−1, 1), by lowbias32.
fn uniform(i: u32, stream: u32) -> f32 {
    let mut x = i.wrapping_add(stream.wrapping_mul(0x9E37_79B9));
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    (x >> 8) as f32 * (1.0 / (1 << 23) as f32) - 1.0
}
