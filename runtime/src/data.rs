//! Batches of tokens.
//!
//! In: a source of text or the golden rule, and the number of a step. Out: tokens, and the same
//! shifted by one as targets, both row-major `[batch, seq]`.
//! Invariant: a batch depends on the source, the sizes and the step alone, so every run and every mesh
//! sees the same data.

use std::path::Path;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;

use crate::error::{Error, Result};
use crate::reference::{golden_tokens, lowbias32};
use crate::tensor::{Elements, HostTensor};

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The golden batch: hashed tokens, the same at every step.
    Golden {
        /// Number of different tokens.
        vocab: usize,
    },
    /// The bytes of a text, one token a byte; every sequence starts at a hashed place.
    Text(Vec<u8>),
}

/// Tokens and targets, `i32[batch, seq]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// What the model sees.
    pub tokens: Vec<i32>,
    /// What it is to predict: the tokens one place further on.
    pub targets: Vec<i32>,
    n_batch: usize,
    n_seq: usize,
}

impl DataSource {
    /// Reads a text file as bytes.
    ///
    /// # Errors
    /// `Invalid` when it cannot be read.
    pub fn text_file(path: &Path) -> Result<DataSource> {
        let bytes = std::fs::read(path).map_err(|error| {
            Error::Invalid(format!("cannot read the text {}: {error}", path.display()))
        })?;
        Ok(DataSource::Text(bytes))
    }

    /// Number of different tokens.
    pub fn vocab(&self) -> usize {
        match self {
            DataSource::Golden { vocab } => *vocab,
            DataSource::Text(_) => 256,
        }
    }

    /// What tells this source from others.
    pub fn identity(&self) -> String {
        match self {
            DataSource::Golden { vocab } => format!("the golden tokens of {vocab}"),
            DataSource::Text(bytes) => {
                let mark = crate::artifact::mark(bytes);
                format!("a text of {} bytes with hash {}", mark.n_bytes, mark.hash)
            }
        }
    }

    /// The batch of step `step`, counted from 0.
    ///
    /// # Errors
    /// `Invalid` when the text is shorter than a sequence and its target.
    pub fn batch(&self, step: usize, n_batch: usize, n_seq: usize) -> Result<Batch> {
        let (tokens, targets) = match self {
            DataSource::Golden { vocab } => golden_tokens(n_batch, n_seq, *vocab),
            DataSource::Text(bytes) => windows(bytes, step, n_batch, n_seq)?,
        };
        Ok(Batch {
            tokens,
            targets,
            n_batch,
            n_seq,
        })
    }
}

impl Batch {
    /// Tokens and targets as tensors `i32[batch, seq]`, for the program's inputs of these names.
    ///
    /// # Errors
    /// Never for a batch of [`DataSource::batch`].
    pub fn tensors(self) -> Result<(HostTensor, HostTensor)> {
        let ty = TensorType::new(DType::I32, [("batch", self.n_batch), ("seq", self.n_seq)]);
        let tokens = HostTensor::new(ty.clone(), Elements::I32(self.tokens))?;
        Ok((tokens, HostTensor::new(ty, Elements::I32(self.targets))?))
    }
}

fn windows(
    bytes: &[u8],
    step: usize,
    n_batch: usize,
    n_seq: usize,
) -> Result<(Vec<i32>, Vec<i32>)> {
    let Some(n_starts) = bytes.len().checked_sub(n_seq).filter(|n| *n > 0) else {
        return Err(Error::Invalid(format!(
            "the text has {} bytes, a sequence of {n_seq} tokens with its last target needs {}; give a \
             longer text or a shorter seq",
            bytes.len(),
            n_seq + 1
        )));
    };
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for row in 0..n_batch {
        // Two rounds of hashing, so that neighboring steps and rows share no pattern.
        let start = lowbias32(lowbias32(step as u32) ^ row as u32) as usize % n_starts;
        let window = &bytes[start..=start + n_seq];
        tokens.extend(window[..n_seq].iter().map(|byte| i32::from(*byte)));
        targets.extend(window[1..].iter().map(|byte| i32::from(*byte)));
    }
    Ok((tokens, targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_a_text() {
        let text = DataSource::Text((0..=255).collect());
        for step in 0..20 {
            let batch = text.batch(step, 3, 16).unwrap();
            assert_eq!((batch.tokens.len(), batch.targets.len()), (48, 48));
            assert!(
                batch
                    .tokens
                    .iter()
                    .zip(&batch.targets)
                    .all(|(token, target)| token + 1 == *target)
            );
            assert_eq!(batch, text.batch(step, 3, 16).unwrap());
            assert_ne!(batch, text.batch(step + 1, 3, 16).unwrap());
        }
        // The shortest text has one window.
        let shortest = DataSource::Text(vec![7; 17]);
        assert_eq!(shortest.batch(5, 1, 16).unwrap().tokens, [7; 16]);
        let error = DataSource::Text(vec![7; 16]).batch(0, 1, 16).unwrap_err();
        insta::assert_snapshot!(error, @"the text has 16 bytes, a sequence of 16 tokens with its last target needs 17; give a longer text or a shorter seq");
    }

    #[test]
    fn the_golden_batch_never_changes() {
        let golden = DataSource::Golden { vocab: 512 };
        let batch = golden.batch(0, 2, 4).unwrap();
        assert_eq!(batch, golden.batch(9, 2, 4).unwrap());
        assert_eq!(batch.tokens[1..4], batch.targets[..3]);
        let (tokens, _) = batch.tensors().unwrap();
        assert_eq!(tokens.ty().to_string(), "i32[batch:2, seq:4]");
    }
}
