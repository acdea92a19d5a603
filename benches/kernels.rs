//! Generated kernels over 4096×4096 `f32`, next to a plain copy: bytes read and written once.
//!
//! `cargo bench --bench kernels`

#[cfg(feature = "mlir")]
mod generated {
    use std::ffi::c_void;

    use divan::Bencher;
    use divan::counter::BytesCount;
    use meshweave_compiler::codegen::kernel::{
        Elem, Kernel, KernelBuilder, Mutability, ReduceKind, UnaryOp, Val,
    };
    use meshweave_compiler::mlir::{self, CompileOptions, HostTarget};

    const N_ROWS: usize = 4096;
    const N_LANES: usize = 4096;

    type KernelFn = unsafe extern "C" fn(*mut *mut c_void, i64, i64);

    fn bytes() -> BytesCount {
        BytesCount::new(2 * 4 * N_ROWS * N_LANES)
    }

    fn matrices() -> (Vec<f32>, Vec<f32>) {
        let n = N_ROWS * N_LANES;
        let x = (0..n).map(|i| (i % 1013) as f32 / 506.0 - 1.0).collect();
        (x, vec![0.0; n])
    }

    #[divan::bench]
    fn copy(bencher: Bencher) {
        let (x, mut y) = matrices();
        bencher
            .counter(bytes())
            .bench_local(|| divan::black_box(&mut y).copy_from_slice(divan::black_box(&x)));
    }

    #[divan::bench]
    fn gelu(bencher: Bencher) {
        bench(bencher, "gelu", |b, x| b.gelu(x));
    }

    #[divan::bench]
    fn silu(bencher: Bencher) {
        bench(bencher, "silu", |b, x| b.silu(x));
    }

    #[divan::bench]
    fn rms_norm(bencher: Bencher) {
        bench(bencher, "rms_norm", |b, x| {
            let square = b.mul(x, x);
            let sum = b.reduce(ReduceKind::Sum, square);
            let mean = b.scale(sum, 1.0 / N_LANES as f32);
            let rstd = b.unary(UnaryOp::Rsqrt, mean);
            b.mul(x, rstd)
        });
    }

    #[divan::bench]
    fn softmax(bencher: Bencher) {
        bench(bencher, "softmax", |b, x| {
            let max = b.reduce(ReduceKind::Max, x);
            let centered = b.sub(x, max);
            let exp = b.exp(centered);
            let sum = b.reduce(ReduceKind::Sum, exp);
            let one = b.f32(1.0);
            let inverse = b.div(one, sum);
            b.mul(exp, inverse)
        });
    }

    fn bench(bencher: Bencher, name: &str, f: impl Fn(&mut KernelBuilder, Val) -> Val) {
        let Some((library, symbol)) = load(name, f) else {
            return;
        };
        // SAFETY: the symbol was just compiled with this signature.
        let Ok(function) = (unsafe { library.get::<KernelFn>(symbol.as_bytes()) }) else {
            return;
        };
        let (mut x, mut y) = matrices();
        let mut args: [*mut c_void; 2] = [x.as_mut_ptr().cast(), y.as_mut_ptr().cast()];
        bencher.counter(bytes()).bench_local(|| {
            // SAFETY: both matrices have the kernel's size.
            unsafe { function(args.as_mut_ptr(), 0, N_ROWS as i64) };
        });
    }

    fn load(
        name: &str,
        f: impl Fn(&mut KernelBuilder, Val) -> Val,
    ) -> Option<(libloading::Library, String)> {
        let mut b = KernelBuilder::new(name, &[N_ROWS], N_LANES);
        let x = b.arg(Elem::F32, Mutability::Read);
        let y = b.arg(Elem::F32, Mutability::Write);
        let access = b.dense(x);
        let x = b.load(access);
        let v = f(&mut b, x);
        let access = b.dense(y);
        b.store(access, v);
        let kernel: Kernel = b.finish().ok()?;
        let object =
            mlir::compile(&[kernel], &HostTarget::detect(), &CompileOptions::default()).ok()?;
        let directory = tempfile::tempdir().ok()?;
        let path = directory.path().join("kernels.so");
        mlir::link(&object, &path).ok()?;
        // SAFETY: the object has no initializers.
        let library = unsafe { libloading::Library::new(&path) }.ok()?;
        Some((library, object.symbols.first()?.clone()))
    }
}

fn main() {
    divan::main();
}
