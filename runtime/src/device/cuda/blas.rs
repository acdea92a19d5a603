//! Products by cuBLASLt, where it is installed.
//!
//! In: products over strided operands. Out: calls of the library, each with the algorithm that its own
//! heuristic ranks first.
//! Invariant: the library works on matrices whose columns lie together; a [`Form`] is the same product
//! seen so, with operands exchanged where the result's rows lie together.

use std::collections::BTreeMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use meshweave_dsl::dtype::DType;

use super::nvrtc::preload;
use super::{Precision, StreamIdx};
use crate::device::gpu::{Address, Matrix, Product, ProductIdx, Side};
use crate::error::{Error, Result};

/// Memory that algorithms may use, for each stream that has products.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The library with the products that were prepared.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    precision: Precision,
    products: Vec<Prepared>,
    workspaces: BTreeMap<StreamIdx, CUdeviceptr>,
}

struct Prepared {
    form: Form,
    operation: sys::cublasLtMatmulDesc_t,
    /// Of a, b and c as the library sees them.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    accumulate: bool,
}

/// A product of matrices whose columns lie together: `c (m × n) = op(a) op(b)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    m: usize,
    n: usize,
    k: usize,
    a: Operand,
    b: Operand,
    c: Operand,
    /// The library's `a` is the product's `b`, and the other way round.
    exchanged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operand {
    transposed: bool,
    /// Elements from one stored column to the next.
    pitch: usize,
}

impl Form {
    /// `None` where an operand's columns and rows both lie apart, or over each other, and where a bias
    /// is not along the rows of what the library sees, which its epilogue adds to.
    fn of(product: &Product) -> Option<Form> {
        let Product {
            m, n, k, a, b, c, ..
        } = *product;
        let straight = stored(c, m, n).filter(|c| !c.transposed);
        if let Some(c) = straight.filter(|_| product.bias != Some(Side::Columns)) {
            return Some(Form {
                m,
                n,
                k,
                a: stored(a, m, k)?,
                b: stored(b, k, n)?,
                c,
                exchanged: false,
            });
        }
        if product.bias == Some(Side::Rows) {
            return None;
        }
        // cᵀ = bᵀ aᵀ.
        let turned = |matrix: Matrix| Matrix {
            row: matrix.column,
            column: matrix.row,
            ..matrix
        };
        Some(Form {
            m: n,
            n: m,
            k,
            a: stored(turned(b), n, k)?,
            b: stored(turned(a), k, m)?,
            c: stored(turned(c), n, m).filter(|c| !c.transposed)?,
            exchanged: true,
        })
    }
}

/// How a matrix of so many rows and columns lies.
fn stored(matrix: Matrix, n_rows: usize, n_columns: usize) -> Option<Operand> {
    let fits = |inner: usize, n_inner: usize, pitch: usize, n_outer: usize| {
        let together = inner == 1 || n_inner == 1;
        // A single column has no pitch of its own.
        let pitch = if n_outer == 1 { n_inner } else { pitch };
        (together && pitch >= n_inner).then_some(pitch)
    };
    if let Some(pitch) = fits(matrix.row, n_rows, matrix.column, n_columns) {
        return Some(Operand {
            transposed: false,
            pitch,
        });
    }
    fits(matrix.column, n_columns, matrix.row, n_rows).map(|pitch| Operand {
        transposed: true,
        pitch,
    })
}

impl Blas {
    /// The library; `None` where it is not installed. The device's context is current.
    ///
    /// # Errors
    /// `Exhausted` when it is there but does not start.
    pub(super) fn load(precision: Precision) -> Result<Option<Blas>> {
        preload();
        // SAFETY: looks for a library and loads it.
        if !unsafe { sys::is_culib_present() } {
            tracing::info!("no cuBLASLt: generated kernels do all products");
            return Ok(None);
        }
        let handle =
            result::create_handle().map_err(|error| blas_error("does not start", error))?;
        Ok(Some(Blas {
            handle,
            precision,
            products: Vec::new(),
            workspaces: BTreeMap::new(),
        }))
    }

    /// Prepares a product; `None` where the library cannot express it or knows no algorithm.
    ///
    /// # Errors
    /// Those of the library.
    pub(super) fn prepare(&mut self, product: &Product) -> Result<Option<ProductIdx>> {
        let Some(form) = Form::of(product) else {
            return Ok(None);
        };
        let failed = |error| blas_error("cannot prepare a product", error);
        // The library has products of f32, and of bf16 to either, with f32 sums.
        let types = [product.factors, product.result].map(data_type);
        let [Some(factors), Some(sums)] = types else {
            return Ok(None);
        };
        if product.factors == DType::F32 && product.result != DType::F32 {
            return Ok(None);
        }
        let compute = match (product.factors, self.precision) {
            (DType::F32, Precision::Tf32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let f32_type = sys::cudaDataType_t::CUDA_R_32F;
        let operation = result::create_matmul_desc(compute, f32_type).map_err(failed)?;
        for (operand, attribute) in [
            (
                form.a,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            ),
            (
                form.b,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
            ),
        ] {
            let value = i32::from(operand.transposed);
            // SAFETY: the attribute is a 32-bit enum, 0 for as it is and 1 for transposed.
            unsafe {
                let value = (&raw const value).cast();
                result::set_matmul_desc_attribute(operation, attribute, value, 4)
                    .map_err(failed)?;
            }
        }
        if product.bias.is_some() {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE;
            // SAFETY: the attribute is a 32-bit enum.
            unsafe {
                let value = (&raw const epilogue).cast();
                result::set_matmul_desc_attribute(operation, attribute, value, 4)
                    .map_err(failed)?;
            }
            // Algorithms are chosen for an address as aligned as all the product's are.
            set_bias(operation, product.alignment as Address)?;
        }
        let (a, b) = if form.exchanged {
            (product.b, product.a)
        } else {
            (product.a, product.b)
        };
        let layout = |data_type, operand: Operand, rows: usize, columns: usize, batch: usize| {
            let (rows, columns) = if operand.transposed {
                (columns, rows)
            } else {
                (rows, columns)
            };
            let (rows, columns, pitch) = (rows as u64, columns as u64, operand.pitch as i64);
            let layout = result::create_matrix_layout(data_type, rows, columns, pitch)?;
            let (count, stride) = (product.n_batch as i32, batch as i64);
            // SAFETY: the attributes have these types.
            unsafe {
                use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
                let set = result::set_matrix_layout_attribute;
                let (count, stride) = ((&raw const count).cast(), (&raw const stride).cast());
                set(
                    layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                    count,
                    4,
                )?;
                set(
                    layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    stride,
                    8,
                )?;
            }
            Ok::<_, result::CublasError>(layout)
        };
        let layouts = [
            layout(factors, form.a, form.m, form.k, a.batch).map_err(failed)?,
            layout(factors, form.b, form.k, form.n, b.batch).map_err(failed)?,
            layout(sums, form.c, form.m, form.n, product.c.batch).map_err(failed)?,
        ];
        let Some(algorithm) = self.algorithm(operation, layouts, product.alignment)? else {
            return Ok(None);
        };
        self.products.push(Prepared {
            form,
            operation,
            layouts,
            algorithm,
            accumulate: product.accumulate,
        });
        Ok(Some(ProductIdx(self.products.len() - 1)))
    }

    /// The algorithm that the library thinks is the fastest; `None` when it knows none.
    fn algorithm(
        &self,
        operation: sys::cublasLtMatmulDesc_t,
        [a, b, c]: [sys::cublasLtMatrixLayout_t; 3],
        alignment: usize,
    ) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let failed = |error| blas_error("cannot choose an algorithm", error);
        let preference = result::create_matmul_pref().map_err(failed)?;
        let (alignment, n_bytes) = (alignment as u32, WORKSPACE_BYTES);
        // SAFETY: the attributes have these types; the handles are the library's.
        unsafe {
            let set = result::set_matmul_pref_attribute;
            let bytes = (&raw const n_bytes).cast::<c_void>();
            set(
                preference,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                bytes,
                8,
            )
            .map_err(failed)?;
            for attribute in [
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                set(preference, attribute, (&raw const alignment).cast(), 4).map_err(failed)?;
            }
            let found =
                result::get_matmul_algo_heuristic(self.handle, operation, a, b, c, c, preference);
            let _ = result::destroy_matmul_pref(preference);
            Ok(found.ok().map(|found| found.algo))
        }
    }

    /// Starts a product on a stream.
    ///
    /// # Errors
    /// Those of the library; `Exhausted` when there is no memory for its workspace.
    pub(super) fn run(
        &mut self,
        product: ProductIdx,
        ([a, b, c], bias): ([Address; 3], Option<Address>),
        (stream_idx, stream): (StreamIdx, CUstream),
    ) -> Result<()> {
        let workspace = match self.workspaces.get(&stream_idx) {
            Some(workspace) => *workspace,
            None => {
                // SAFETY: freed with this value.
                let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }.map_err(|error| {
                    Error::Exhausted(format!(
                        "no {WORKSPACE_BYTES} bytes for cuBLASLt to work in: {error}; add a memory budget \
                         to the plan"
                    ))
                })?;
                self.workspaces.insert(stream_idx, workspace);
                workspace
            }
        };
        let prepared = &self.products[product.0];
        if let Some(bias) = bias {
            set_bias(prepared.operation, bias)?;
        }
        let (a, b) = if prepared.form.exchanged {
            (b, a)
        } else {
            (a, b)
        };
        let (alpha, beta) = (1.0_f32, if prepared.accumulate { 1.0_f32 } else { 0.0 });
        let [a_layout, b_layout, c_layout] = prepared.layouts;
        // SAFETY: the layouts describe matrices inside of the operands' buffers; factors are read before
        // the call returns; the workspace is this stream's alone.
        unsafe {
            result::matmul(
                self.handle,
                prepared.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                a as *const c_void,
                a_layout,
                b as *const c_void,
                b_layout,
                c as *const c_void,
                c_layout,
                c as *mut c_void,
                c_layout,
                &raw const prepared.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| blas_error("fails", error))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: nothing runs any more (the device has been waited for); each handle is freed once.
        unsafe {
            for product in &self.products {
                let _ = result::destroy_matmul_desc(product.operation);
                for layout in product.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            for workspace in self.workspaces.values() {
                let _ = driver::free_sync(*workspace);
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}

/// The library's name of an element type; `None` where it is not given such products.
fn data_type(dtype: DType) -> Option<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Some(sys::cudaDataType_t::CUDA_R_32F),
        DType::Bf16 => Some(sys::cudaDataType_t::CUDA_R_16BF),
        DType::F16 | DType::I32 => None,
    }
}

/// The vector that a product adds; the library reads the attribute when the product is started.
fn set_bias(operation: sys::cublasLtMatmulDesc_t, bias: Address) -> Result<()> {
    let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
    // SAFETY: the attribute is a pointer of 64 bits.
    unsafe { result::set_matmul_desc_attribute(operation, attribute, (&raw const bias).cast(), 8) }
        .map_err(|error| blas_error("refuses a bias", error))
}

fn blas_error(what: &str, error: result::CublasError) -> Error {
    Error::Exhausted(format!(
        "cuBLASLt {what}: {error}; check that it is of the driver's version, or hide it from the loader: \
         generated kernels do without"
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The library's definition of a product, on operands whose columns lie together.
    fn library(form: &Form, a: &[f32], b: &[f32], c: &mut [f32]) {
        let at = |operand: Operand, row: usize, column: usize| {
            let (row, column) = if operand.transposed {
                (column, row)
            } else {
                (row, column)
            };
            column * operand.pitch + row
        };
        for (i, j) in (0..form.m).flat_map(|i| (0..form.n).map(move |j| (i, j))) {
            let terms = (0..form.k).map(|x| a[at(form.a, i, x)] * b[at(form.b, x, j)]);
            c[at(form.c, i, j)] = terms.sum();
        }
    }

    proptest! {
        #[test]
        fn a_form_is_its_product(
            sizes in proptest::array::uniform3(1usize..5),
            turned in any::<[bool; 3]>(),
            padding in 0usize..3,
        ) {
            let [m, n, k] = sizes;
            let dense = |n_rows: usize, n_columns: usize, turned: bool| {
                let (row, column) = if turned { (1, n_rows + padding) } else { (n_columns + padding, 1) };
                (Matrix { row, column, batch: 0 }, (n_rows + padding) * (n_columns + padding))
            };
            let (a, n_a) = dense(m, k, turned[0]);
            let (b, n_b) = dense(k, n, turned[1]);
            let (c, n_c) = dense(m, n, turned[2]);
            let product =
                Product {
                    m, n, k, n_batch: 1, a, b, c,
                    factors: DType::F32, result: DType::F32,
                    accumulate: false, bias: None, alignment: 4,
                };
            let form = Form::of(&product).unwrap();
            let values = |n: usize| (0..n).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>();
            let (a_values, b_values) = (values(n_a), values(n_b));
            let (mut expected, mut found) = (vec![0.0; n_c], vec![0.0; n_c]);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let terms = (0..k).map(|x| {
                    a_values[i * a.row + x * a.column] * b_values[x * b.row + j * b.column]
                });
                expected[i * c.row + j * c.column] = terms.sum();
            }
            let (first, second) =
                if form.exchanged { (&b_values, &a_values) } else { (&a_values, &b_values) };
            library(&form, first, second, &mut found);
            prop_assert_eq!(found, expected);
        }
    }
}
