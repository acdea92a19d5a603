//! Terms: what a rule says a class equals, on one rank and on all.
//!
//! Enters: the term each rank's rule gave. Leaves: one joint term, where all ranks agree in
//! structure and in the classes at the leaves.
//! Invariant: a joint op has one kind per rank.

use egg::Id;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::OpKind;

/// An expression over classes, for one rank.
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    Class(Id),
    Op {
        kind: OpKind,
        inputs: Vec<Term>,
        /// The result's type where it depends on the rank, as for reduce_scatter.
        ty: Option<TensorType>,
    },
}

impl Term {
    /// An op of one result that follows from its inputs.
    pub fn op(kind: OpKind, inputs: impl IntoIterator<Item = Term>) -> Self {
        Self::Op {
            kind,
            inputs: inputs.into_iter().collect(),
            ty: None,
        }
    }

    /// A collective whose result's type depends on the rank.
    pub fn typed(kind: OpKind, input: Term, ty: TensorType) -> Self {
        Self::Op {
            kind,
            inputs: vec![input],
            ty: Some(ty),
        }
    }
}

impl From<Id> for Term {
    fn from(id: Id) -> Self {
        Self::Class(id)
    }
}

/// An expression over classes, for all ranks.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum JointTerm {
    Class(Id),
    Op {
        kinds: Vec<OpKind>,
        inputs: Vec<JointTerm>,
        types: Option<Vec<TensorType>>,
    },
}

/// The terms of all ranks as one, or `None` where they differ in structure.
pub(super) fn join(terms: Vec<Term>) -> Option<JointTerm> {
    let mut kinds = Vec::with_capacity(terms.len());
    let mut inputs: Vec<Vec<Term>> = Vec::new();
    let mut types = Vec::new();
    let n_ranks = terms.len();
    let mut class = None;
    for (rank, term) in terms.into_iter().enumerate() {
        match term {
            Term::Class(id) => {
                if !kinds.is_empty() || (rank > 0 && class != Some(id)) {
                    return None;
                }
                class = Some(id);
            }
            Term::Op {
                kind,
                inputs: of_rank,
                ty,
            } => {
                if class.is_some() || (rank > 0 && inputs.len() != of_rank.len()) {
                    return None;
                }
                kinds.push(kind);
                types.extend(ty);
                if rank == 0 {
                    inputs = of_rank.into_iter().map(|term| vec![term]).collect();
                } else {
                    for (joined, term) in inputs.iter_mut().zip(of_rank) {
                        joined.push(term);
                    }
                }
            }
        }
    }
    if let Some(id) = class {
        return Some(JointTerm::Class(id));
    }
    let types = match types.len() {
        0 => None,
        n if n == n_ranks => Some(types),
        _ => return None,
    };
    let same_op = kinds
        .windows(2)
        .all(|pair| std::mem::discriminant(&pair[0]) == std::mem::discriminant(&pair[1]));
    if kinds.is_empty() || !same_op {
        return None;
    }
    Some(JointTerm::Op {
        kinds,
        inputs: inputs.into_iter().map(join).collect::<Option<_>>()?,
        types,
    })
}
