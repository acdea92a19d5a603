//! Where the weights of a graph lie in a checkpoint.
//!
//! Enters: nothing but names and sizes. Leaves: for every element of a parameter, the tensor of the
//! checkpoint and the element there.
//! Invariant: a [`WeightSource`] stays inside of its checkpoint tensors ([`WeightSource::check`]).
//!
//! A source is a strided view: each dim of the parameter is one or several factors, each of a size and
//! a step in the checkpoint's tensor. So transposes, splits, slices, interleaved halves and stacks of
//! experts are data, and any region of a parameter can be read alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, TensorType};
use crate::layout::Interval;

/// The sources of all parameters of a graph.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightMap {
    /// Texts that a checkpoint may have before all names; the first under which it has a tensor counts.
    pub prefixes: Vec<String>,
    /// By parameter.
    pub sources: BTreeMap<String, WeightSource>,
    /// Names that a checkpoint may have without being read; `*` stands for any text.
    pub ignored: Vec<String>,
}

/// Where one parameter lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSource {
    /// One tensor, or as many as the parameter's outermost dim has elements (experts).
    pub names: Vec<String>,
    /// The shape of each of them in the checkpoint.
    pub shape: Vec<usize>,
    /// First element.
    #[serde(default)]
    pub start: usize,
    /// The factors of every dim of the parameter, major first (without the dim over `names`).
    pub dims: Vec<Vec<Factor>>,
}

/// A part of a dim: `size` indices, `step` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Factor {
    pub size: usize,
    pub step: usize,
}

/// A map that does not fit its graph, or a step that does not fit its source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WeightError(pub String);

impl WeightSource {
    /// The whole tensor `name` of this shape, row-major.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let mut step = 1;
        let mut dims: Vec<Vec<Factor>> = shape
            .iter()
            .rev()
            .map(|&size| {
                let factor = Factor { size, step };
                step *= size;
                vec![factor]
            })
            .collect();
        dims.reverse();
        Self {
            names: vec![name.into()],
            shape,
            start: 0,
            dims,
        }
    }

    /// A dim as several of these sizes, the first major.
    ///
    /// # Errors
    /// There is no such dim of one factor, or the sizes do not multiply to its size.
    pub fn split(mut self, dim: usize, sizes: &[usize]) -> Result<Self, WeightError> {
        let factor = self.single(dim)?;
        let product: usize = sizes.iter().product();
        if product != factor.size {
            return Err(self.error(format!("cannot split {} into {sizes:?}", factor.size)));
        }
        let mut step = factor.step * factor.size;
        let parts = sizes.iter().map(|&size| {
            step /= size.max(1);
            vec![Factor { size, step }]
        });
        let parts: Vec<_> = parts.collect();
        self.dims.splice(dim..=dim, parts);
        Ok(self)
    }

    /// `len` indices of a dim from `start`.
    ///
    /// # Errors
    /// There is no such dim of one factor, or it is shorter.
    pub fn slice(mut self, dim: usize, start: usize, len: usize) -> Result<Self, WeightError> {
        let factor = self.single(dim)?;
        if start + len > factor.size {
            let end = start + len;
            return Err(self.error(format!("cannot slice {} up to {end}", factor.size)));
        }
        self.start += start * factor.step;
        self.dims[dim] = vec![Factor {
            size: len,
            ..factor
        }];
        Ok(self)
    }

    /// Index 0 of a dim, which vanishes.
    ///
    /// # Errors
    /// There is no such dim of one factor.
    pub fn first_of(mut self, dim: usize) -> Result<Self, WeightError> {
        self.single(dim)?;
        self.dims.remove(dim);
        Ok(self)
    }

    /// The dims in another order.
    ///
    /// # Errors
    /// `order` is not a permutation of the dims.
    pub fn permute(mut self, order: &[usize]) -> Result<Self, WeightError> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.dims.len()) {
            return Err(self.error(format!(
                "{order:?} does not permute {} dims",
                self.dims.len()
            )));
        }
        self.dims = order.iter().map(|&dim| self.dims[dim].clone()).collect();
        Ok(self)
    }

    /// A dim whose even indices come first and odd ones after them: pairs as two halves.
    ///
    /// # Errors
    /// There is no such dim of one factor, or its size is odd.
    pub fn deinterleave(mut self, dim: usize) -> Result<Self, WeightError> {
        let Factor { size, step } = self.single(dim)?;
        if !size.is_multiple_of(2) {
            return Err(self.error(format!("cannot take {size} elements by pairs")));
        }
        let halves = Factor { size: 2, step };
        let pairs = Factor {
            size: size / 2,
            step: 2 * step,
        };
        self.dims[dim] = vec![halves, pairs];
        Ok(self)
    }

    /// The same view of each of these tensors, along a new outermost dim.
    pub fn stack(mut self, names: Vec<String>) -> Self {
        self.dims.insert(0, Vec::new());
        self.names = names;
        self
    }

    /// Sizes of the parameter, outermost first.
    pub fn sizes(&self) -> Vec<usize> {
        let sizes = |factors: &Vec<Factor>| match factors.as_slice() {
            [] => self.names.len(),
            factors => factors.iter().map(|factor| factor.size).product(),
        };
        self.dims.iter().map(sizes).collect()
    }

    /// Whether it fills a parameter of this type from inside of its tensors.
    ///
    /// # Errors
    /// It does not; the message has both shapes.
    pub fn check(&self, ty: &TensorType) -> Result<(), WeightError> {
        let wanted: Vec<usize> = ty.shape.iter().map(|(_, size)| *size).collect();
        if self.sizes() != wanted {
            let sizes = self.sizes();
            return Err(self.error(format!("gives {sizes:?}, but {ty} is needed")));
        }
        let is_stacked = self.dims.first().is_some_and(Vec::is_empty);
        let n_stacks = self.dims.iter().filter(|dim| dim.is_empty()).count();
        if self.names.is_empty()
            || n_stacks != usize::from(is_stacked)
            || (self.names.len() > 1 && !is_stacked)
        {
            return Err(self.error("stacks along another dim than the outermost".into()));
        }
        let reach = |factor: &Factor| factor.size.saturating_sub(1).saturating_mul(factor.step);
        let last = self
            .dims
            .iter()
            .flatten()
            .map(reach)
            .fold(self.start, usize::saturating_add);
        let n: usize = self.shape.iter().product();
        let is_empty = self.dims.iter().flatten().any(|factor| factor.size == 0);
        if !is_empty && last >= n {
            return Err(self.error(format!("reads element {last} of {n}")));
        }
        Ok(())
    }

    /// Calls `visit(tensor, element)` for the elements of a region (one interval a dim), row-major:
    /// the index of its tensor in `names`, and its row-major index there.
    ///
    /// # Errors
    /// The region does not lie in the parameter.
    pub fn for_each(
        &self,
        region: &[Interval],
        mut visit: impl FnMut(usize, usize),
    ) -> Result<(), WeightError> {
        let sizes = self.sizes();
        let fits = region.len() == sizes.len()
            && region
                .iter()
                .zip(&sizes)
                .all(|(interval, size)| interval.start + interval.len <= *size);
        if !fits {
            return Err(self.error(format!("the region {region:?} is outside of {sizes:?}")));
        }
        // Steps of every index of every dim: (tensor, element).
        let steps: Vec<Vec<(usize, usize)>> = self
            .dims
            .iter()
            .zip(region)
            .map(|(factors, interval)| {
                let indices = interval.start..interval.start + interval.len;
                indices.map(|index| step_of(factors, index)).collect()
            })
            .collect();
        walk(&steps, (0, self.start), &mut visit);
        Ok(())
    }

    fn single(&self, dim: usize) -> Result<Factor, WeightError> {
        match self.dims.get(dim).map(Vec::as_slice) {
            Some([factor]) => Ok(*factor),
            _ => Err(self.error(format!("has no plain dim {dim}"))),
        }
    }

    fn error(&self, what: String) -> WeightError {
        let name = self.names.first().map_or("", String::as_str);
        WeightError(format!(
            "the source `{name}` of shape {:?} {what}",
            self.shape
        ))
    }
}

/// (tensor, element) of an index of a dim.
fn step_of(factors: &[Factor], index: usize) -> (usize, usize) {
    if factors.is_empty() {
        return (index, 0);
    }
    let mut rest = index;
    let mut element = 0;
    for factor in factors.iter().rev() {
        element += rest % factor.size * factor.step;
        rest /= factor.size;
    }
    (0, element)
}

fn walk(steps: &[Vec<(usize, usize)>], at: (usize, usize), visit: &mut impl FnMut(usize, usize)) {
    let Some((outer, inner)) = steps.split_first() else {
        visit(at.0, at.1);
        return;
    };
    for step in outer {
        walk(inner, (at.0 + step.0, at.1 + step.1), visit);
    }
}

impl WeightMap {
    /// Whether every parameter of the graph has a source of its shape.
    ///
    /// # Errors
    /// One has none, or one of another shape.
    pub fn check(&self, graph: &Graph) -> Result<(), WeightError> {
        for id in graph.params() {
            let tensor = graph.tensor(id);
            let source = self.sources.get(&tensor.name).ok_or_else(|| {
                WeightError(format!("the weight map has no source of `{}`", tensor.name))
            })?;
            source.check(&tensor.ty)?;
        }
        Ok(())
    }

    /// Whether a checkpoint may have a tensor of this name (without prefix) that nothing reads.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignored.iter().any(|pattern| matches(pattern, name))
    }
}

/// Whether `text` is `pattern` with any text for each `*`.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn elements(source: &WeightSource, region: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let region: Vec<_> = region
            .iter()
            .map(|&(start, len)| Interval { start, len })
            .collect();
        let mut elements = Vec::new();
        source
            .for_each(&region, |tensor, element| elements.push((tensor, element)))
            .unwrap();
        elements
    }

    #[test]
    fn a_projection_is_transposed_and_split() {
        // [out: 2 heads of 3, in: 4] as [in, heads, head].
        let source = WeightSource::new("w", [6, 4])
            .split(0, &[2, 3])
            .and_then(|source| source.permute(&[2, 0, 1]))
            .unwrap();
        let ty = TensorType::new(DType::F32, [("embed", 4), ("heads", 2), ("head", 3)]);
        assert_eq!(source.check(&ty), Ok(()));
        let all = elements(&source, &[(0, 4), (0, 2), (0, 3)]);
        assert_eq!(all[..4], [(0, 0), (0, 4), (0, 8), (0, 12)]);
        let part = elements(&source, &[(3, 1), (1, 1), (1, 2)]);
        assert_eq!(part, [(0, 19), (0, 23)]);
    }

    #[test]
    fn pairs_become_halves() {
        let source = WeightSource::new("w", [8])
            .slice(0, 2, 6)
            .and_then(|source| source.deinterleave(0))
            .unwrap();
        let all: Vec<_> = elements(&source, &[(0, 6)])
            .into_iter()
            .map(|e| e.1)
            .collect();
        assert_eq!(all, [2, 4, 6, 3, 5, 7]);
    }

    #[test]
    fn experts_are_stacked() {
        let source = WeightSource::new("", [2, 3])
            .permute(&[1, 0])
            .unwrap()
            .stack(vec!["a".into(), "b".into()]);
        assert_eq!(source.sizes(), [2, 3, 2]);
        let part = elements(&source, &[(1, 1), (2, 1), (0, 2)]);
        assert_eq!(part, [(1, 2), (1, 5)]);
    }

    #[test]
    fn misfits_are_refused() {
        let ty = TensorType::new(DType::F32, [("n", 5)]);
        let message = WeightSource::new("w", [6]).check(&ty).unwrap_err();
        insta::assert_snapshot!(message, @"the source `w` of shape [6] gives [6], but f32[n:5] is needed");
        let mut beyond = WeightSource::new("w", [5]);
        beyond.start = 1;
        let message = beyond.check(&ty).unwrap_err();
        insta::assert_snapshot!(message, @"the source `w` of shape [5] reads element 5 of 5");
        assert!(WeightSource::new("w", [6]).split(0, &[4, 2]).is_err());
        assert!(WeightSource::new("w", [6]).slice(0, 4, 3).is_err());
        assert!(WeightSource::new("w", [6]).permute(&[1]).is_err());
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.bias", "h.0.attn.bias", true),
            ("h.*.attn.bias", "h.0.attn.bias", true),
            ("h.*.attn.bias", "h.0.attn.c_attn.bias", false),
            (
                "model.layers.61.*",
                "model.layers.61.embed_tokens.weight",
                true,
            ),
            ("a*b", "ab", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
