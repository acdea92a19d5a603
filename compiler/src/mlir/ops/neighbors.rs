//! Accesses of several neighboring elements at once.
//!
//! Enters: addresses that are multiples of the access's size. Leaves: one load or store, and the
//! elements by themselves.
//! Invariant: an element has the value that an access of its own would give.

use melior::ir::Attribute;
use melior::ir::attribute::IntegerAttribute;
use melior::ir::r#type::IntegerType;

use super::super::Error;
use super::{Form, Ops, V};
use crate::codegen::kernel::Elem;

impl<'c> Ops<'c> {
    /// Loads `n` neighbors, a power of two and more than one, at an address that is a multiple of their
    /// size; those of bf16 widened to f32.
    pub fn load_neighbors(
        &mut self,
        ptr: V<'c>,
        elem: Elem,
        n: usize,
    ) -> Result<Vec<V<'c>>, Error> {
        let (word, n_words) = words(elem, n);
        let alignment = self.aligned_to(elem.size() * n);
        let ty = self.ty(word, Form::Vector(n_words));
        let all = self.op1("llvm.load", &[ptr], &[("alignment", alignment)], ty)?;
        let ty = self.ty(word, Form::Scalar);
        let mut values = Vec::with_capacity(n);
        for position in 0..n_words {
            let position = self.int(Form::Scalar, position as i32)?;
            let word = self.op1("llvm.extractelement", &[all, position], &[], ty)?;
            if elem != Elem::Bf16 {
                values.push(word);
                continue;
            }
            // A bf16 is the upper half of its f32.
            let (half, upper) = (
                self.int(Form::Scalar, 16)?,
                self.int(Form::Scalar, -1 << 16)?,
            );
            let low = self.same("arith.shli", &[word, half])?;
            let high = self.same("arith.andi", &[word, upper])?;
            let f32_ty = self.ty(Elem::F32, Form::Scalar);
            for bits in [low, high] {
                values.push(self.bitcast(bits, f32_ty)?);
            }
        }
        Ok(values)
    }

    /// Stores neighbors, as many as [`Ops::load_neighbors`] loads, rounded as by [`Ops::store`].
    pub fn store_neighbors(
        &mut self,
        ptr: V<'c>,
        values: &[V<'c>],
        elem: Elem,
    ) -> Result<(), Error> {
        let (word, n_words) = words(elem, values.len());
        let alignment = self.aligned_to(elem.size() * values.len());
        let per_word = values.len() / n_words;
        let mut parts = Vec::with_capacity(n_words);
        for values in values.chunks(per_word) {
            parts.push(match elem {
                Elem::Bf16 => {
                    let pair = self.vector(Elem::F32, values)?;
                    let narrow_ty = self.parsed("vector<2xbf16>")?;
                    let narrow = self.op1("arith.truncf", &[pair], &[], narrow_ty)?;
                    let ty = self.ty(word, Form::Scalar);
                    self.op1("llvm.bitcast", &[narrow], &[], ty)?
                }
                _ => values[0],
            });
        }
        let all = self.vector(word, &parts)?;
        self.op0("llvm.store", &[all, ptr], &[("alignment", alignment)])
    }

    /// A vector of these elements.
    fn vector(&mut self, elem: Elem, values: &[V<'c>]) -> Result<V<'c>, Error> {
        let ty = self.ty(elem, Form::Vector(values.len()));
        let mut all = self.op1("llvm.mlir.poison", &[], &[], ty)?;
        for (position, value) in values.iter().enumerate() {
            let position = self.int(Form::Scalar, position as i32)?;
            all = self.op1("llvm.insertelement", &[all, *value, position], &[], ty)?;
        }
        Ok(all)
    }

    fn aligned_to(&self, n_bytes: usize) -> Attribute<'c> {
        let ty = IntegerType::new(self.context, 64).into();
        IntegerAttribute::new(ty, n_bytes as i64).into()
    }
}

/// The element of the words that hold `n` elements, and their number: two of bf16 are one.
fn words(elem: Elem, n: usize) -> (Elem, usize) {
    match elem {
        Elem::Bf16 => (Elem::I32, n / 2),
        _ => (elem, n),
    }
}
