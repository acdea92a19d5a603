//! Planning: from a graph, a cluster and partial decisions to a plan with a certificate.

pub mod cost;
pub mod directives;
