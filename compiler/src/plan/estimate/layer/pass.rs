//! Seconds of passes over layers, by what takes them.
//!
//! Enters and leaves: seconds. Invariant: sums are sums; no pass is sooner done than its kernels are
//! launched.

/// Seconds of one pass over a layer or a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pass {
    pub compute: f64,
    /// Exposed communication by axis.
    pub tp: f64,
    pub cp: f64,
    pub ep: f64,
    /// Kernels that are launched.
    pub kernels: f64,
}

impl Pass {
    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.compute + self.tp + self.cp + self.ep
    }

    /// This and another, one after the other.
    #[must_use]
    pub fn then(self, other: Self) -> Self {
        Self {
            compute: self.compute + other.compute,
            tp: self.tp + other.tp,
            cp: self.cp + other.cp,
            ep: self.ep + other.ep,
            kernels: self.kernels + other.kernels,
        }
    }

    /// So many times.
    #[must_use]
    pub fn times(self, count: f64) -> Self {
        Self {
            compute: self.compute * count,
            tp: self.tp * count,
            cp: self.cp * count,
            ep: self.ep * count,
            kernels: self.kernels * count,
        }
    }

    /// Not sooner than the host launches its kernels.
    pub(super) fn launched(mut self, launch_s: f64) -> Self {
        self.compute += (self.kernels * launch_s - self.seconds()).max(0.0);
        self
    }
}

/// The passes of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerCost {
    pub forward: Pass,
    pub backward_input: Pass,
    pub backward_weight: Pass,
    /// Before the backward pass.
    pub recompute: Pass,
}

impl LayerCost {
    /// This and another.
    #[must_use]
    pub fn then(self, other: Self) -> Self {
        Self {
            forward: self.forward.then(other.forward),
            backward_input: self.backward_input.then(other.backward_input),
            backward_weight: self.backward_weight.then(other.backward_weight),
            recompute: self.recompute.then(other.recompute),
        }
    }

    /// So many of them.
    #[must_use]
    pub fn times(self, count: f64) -> Self {
        Self {
            forward: self.forward.times(count),
            backward_input: self.backward_input.times(count),
            backward_weight: self.backward_weight.times(count),
            recompute: self.recompute.times(count),
        }
    }
}
