//! The host as a device: one arena a rank, at the size that the program states.
//!
//! In: a number of bytes. Out: addresses inside of it.
//! Invariant: an arena is allocated once, zeroed, and never moves; predicted peak = allocated.

use memmap2::{Advice, MmapMut};
use meshweave_dsl::program::Buffer;

use crate::error::{Error, Result};

/// One rank's memory.
pub struct Arena {
    map: MmapMut,
    n_bytes: usize,
}

impl Arena {
    /// Allocates `n_bytes` zero bytes, aligned to a page, in huge pages where the system gives them.
    ///
    /// # Errors
    /// `Exhausted` when the system has no such memory.
    pub fn allocate(n_bytes: usize) -> Result<Arena> {
        let map = MmapMut::map_anon(n_bytes.max(1)).map_err(|error| {
            Error::Exhausted(format!(
                "cannot allocate an arena of {n_bytes} bytes: {error}; shard over more devices or add a \
                 memory budget to the plan"
            ))
        })?;
        // Only a hint: without huge pages everything works, with more misses of the address cache.
        let _ = map.advise(Advice::HugePage);
        Ok(Arena { map, n_bytes })
    }

    /// Bytes of the arena.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The address of a buffer. It stays valid as long as the arena; who writes through it must
    /// know that nobody else uses the buffer meanwhile.
    ///
    /// # Errors
    /// `Invalid` when the buffer is not inside of the arena or not aligned to its elements.
    pub fn address(&mut self, buffer: &Buffer) -> Result<*mut u8> {
        let n_bytes = buffer.ty.n_bytes();
        let inside = buffer
            .offset
            .checked_add(n_bytes)
            .is_some_and(|end| end <= self.n_bytes);
        if !inside || !buffer.offset.is_multiple_of(buffer.ty.dtype.n_bytes()) {
            return Err(Error::Invalid(format!(
                "damaged program: buffer `{}` of {n_bytes} bytes at offset {} does not lie in an arena of \
                 {} bytes; compile again",
                buffer.name, buffer.offset, self.n_bytes
            )));
        }
        // The offset is inside of the map, checked above.
        Ok(self.map.as_mut_ptr().wrapping_add(buffer.offset))
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::dtype::DType;
    use meshweave_dsl::graph::TensorType;

    use super::*;

    fn buffer(offset: usize, size: usize) -> Buffer {
        let ty = TensorType::new(DType::F32, [("x", size)]);
        Buffer {
            name: "x".into(),
            offset,
            ty,
            persistent: false,
        }
    }

    #[test]
    fn buffers_lie_inside() {
        let mut arena = Arena::allocate(256).unwrap();
        assert_eq!(arena.n_bytes(), 256);
        let base = arena.address(&buffer(0, 64)).unwrap() as usize;
        assert_eq!(base % 64, 0);
        assert_eq!(
            arena.address(&buffer(192, 16)).unwrap() as usize,
            base + 192
        );
        let error = arena.address(&buffer(192, 17)).unwrap_err();
        insta::assert_snapshot!(error, @"damaged program: buffer `x` of 68 bytes at offset 192 does not lie in an arena of 256 bytes; compile again");
        assert!(arena.address(&buffer(2, 1)).is_err());
        assert!(arena.address(&buffer(usize::MAX - 3, 2)).is_err());
    }
}
