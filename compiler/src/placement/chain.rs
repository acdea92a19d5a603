//! The chain of layers that affinity placement divides, and what a division keeps.
//!
//! Enters: transition shares between the experts of adjacent layers. Leaves: the share of
//! transitions whose two experts lie in one group.
//! Invariant: a division gives every group exactly `experts / groups` experts in every layer.
//!
//! ExFlow (arXiv 2401.08383, §4) minimizes the transitions between groups; what is kept is their
//! complement. Traces are aggregated to E²·(L−1) shares first, so the work does not grow with tokens.

use meshweave_dsl::trace::statistics::Transitions;

/// Which group every expert of every layer lies in: `division[layer][expert]`.
pub type Division = Vec<Vec<u16>>;

/// A chain of layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub layers: usize,
    pub experts: usize,
    /// Per pair of adjacent layers, E × E, from (row) to (column).
    pub pairs: Vec<Vec<f32>>,
    /// The same, from (column) to (row).
    pub reversed: Vec<Vec<f32>>,
}

impl Chain {
    /// A chain of `pairs.len() + 1` layers.
    pub fn new(transitions: &Transitions) -> Self {
        let experts = transitions.experts;
        let reversed = transitions
            .pairs
            .iter()
            .map(|pair| transpose(pair, experts));
        Self {
            layers: transitions.pairs.len() + 1,
            experts,
            reversed: reversed.collect(),
            pairs: transitions.pairs.clone(),
        }
    }

    /// The sum of all shares: what a single group would keep.
    pub fn total(&self) -> f64 {
        let all = self.pairs.iter().flatten();
        all.map(|share| f64::from(*share)).sum()
    }

    /// What a division keeps of a pair of layers.
    pub fn kept_of_pair(&self, division: &Division, pair: usize) -> f64 {
        let (from, to) = (&division[pair], &division[pair + 1]);
        let rows = self.pairs[pair].chunks(self.experts);
        rows.zip(from)
            .map(|(row, group)| -> f64 {
                let kept = row.iter().zip(to).filter(|(_, other)| *other == group);
                kept.map(|(share, _)| f64::from(*share)).sum()
            })
            .sum()
    }

    /// What a division keeps of all pairs.
    pub fn kept(&self, division: &Division) -> f64 {
        (0..self.pairs.len())
            .map(|pair| self.kept_of_pair(division, pair))
            .sum()
    }

    /// The division into blocks of consecutive experts, the same in every layer: what engines do
    /// unless told otherwise.
    pub fn linear(&self, groups: usize) -> Division {
        let size = self.experts / groups.max(1);
        let layer: Vec<u16> = (0..self.experts)
            .map(|expert| (expert / size.max(1)) as u16)
            .collect();
        vec![layer; self.layers]
    }

    /// A part of the chain: the given experts of every layer, the same number in each.
    pub fn restricted(&self, kept: &[Vec<usize>]) -> Self {
        let experts = kept.first().map_or(0, Vec::len);
        let pairs = self.pairs.iter().zip(kept.windows(2)).map(|(pair, kept)| {
            let rows = kept[0].iter();
            rows.flat_map(|from| kept[1].iter().map(move |to| pair[from * self.experts + to]))
                .collect()
        });
        Self::new(&Transitions {
            experts,
            pairs: pairs.collect(),
        })
    }
}

/// What a transition is worth by where its two experts lie.
///
/// Groups are devices; `per_node` consecutive ones form a node. With `same_node` 0 the nodes do not
/// matter; with both, devices and nodes are placed at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    pub groups: usize,
    pub per_node: usize,
    /// Worth of staying on the device, beyond that of staying in the node.
    pub same_device: f64,
    /// Worth of staying in the node.
    pub same_node: f64,
}

impl Levels {
    /// Devices alone.
    pub fn flat(groups: usize) -> Self {
        Self {
            groups,
            per_node: 1,
            same_device: 1.0,
            same_node: 0.0,
        }
    }

    /// Worth of a transition between two groups.
    pub fn worth(&self, a: u16, b: u16) -> f64 {
        let node = |group: u16| usize::from(group) / self.per_node;
        match (a == b, node(a) == node(b)) {
            (true, _) => self.same_device + self.same_node,
            (false, true) => self.same_node,
            (false, false) => 0.0,
        }
    }

    /// Worth of all transitions under a division.
    pub fn value(&self, chain: &Chain, division: &Division) -> f64 {
        let on_device = self.same_device * chain.kept(division);
        if self.same_node == 0.0 {
            return on_device;
        }
        on_device + self.same_node * chain.kept(&self.nodes(division))
    }

    /// The nodes of a division.
    pub fn nodes(&self, division: &Division) -> Division {
        let node = |group: &u16| group / self.per_node as u16;
        let layers = division.iter();
        layers
            .map(|layer| layer.iter().map(node).collect())
            .collect()
    }
}

/// The transpose of a square matrix.
pub fn transpose<T: Copy>(matrix: &[T], n: usize) -> Vec<T> {
    (0..n * n).map(|at| matrix[(at % n) * n + at / n]).collect()
}

/// Experts of every group in a layer, ascending.
pub fn members(layer: &[u16], groups: usize) -> Vec<Vec<usize>> {
    let mut members = vec![Vec::with_capacity(layer.len() / groups.max(1)); groups];
    for (expert, group) in layer.iter().enumerate() {
        members[usize::from(*group)].push(expert);
    }
    members
}
