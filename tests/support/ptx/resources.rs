//! What NVIDIA's assembler says of kernels: registers, spills, shared memory.

/// What NVIDIA's assembler says of an entry.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Resources {
    pub entry: String,
    pub registers: usize,
    /// Bytes stored and loaded because registers ran out.
    pub spilled: usize,
    /// Bytes of a block's memory.
    pub shared: usize,
}

/// Assembles `text` for `chip`; `None`, with a word about it, where there is no assembler
/// (`MESHWEAVE_PTXAS`, or the one that `make test` fetches).
pub fn assemble(text: &str, chip: &str) -> Option<Vec<Resources>> {
    let fetched = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/tools/nvidia/cuda_nvcc/bin/ptxas"
    );
    let ptxas = std::env::var("MESHWEAVE_PTXAS").unwrap_or(fetched.into());
    if !std::path::Path::new(&ptxas).exists() {
        eprintln!("skipped: no assembler of PTX at {ptxas}; `make test` fetches it");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("kernels.ptx");
    std::fs::write(&source, text).unwrap();
    let output = std::process::Command::new(ptxas)
        .args(["-v", "-arch", chip, "-o"])
        .arg(directory.path().join("kernels.cubin"))
        .arg(source)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // Products of warp groups that the assembler makes wait for one another.
    assert!(!said.contains("Performance Loss"), "{said}");
    let mut all: Vec<Resources> = Vec::new();
    // The number before a word.
    let before = |line: &str, word: &str| -> usize {
        line.split(word)
            .next()
            .and_then(|start| start.split_whitespace().last())
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    };
    for line in said.lines() {
        if line.contains("Compiling entry function") {
            let entry = line.split('\'').nth(1).unwrap().to_string();
            all.push(Resources {
                entry,
                ..Resources::default()
            });
        }
        let Some(last) = all.last_mut() else { continue };
        if line.contains("spill stores") {
            last.spilled = before(line, "bytes spill stores") + before(line, "bytes spill loads");
        }
        if line.contains("Used ") {
            last.registers = before(line, "registers");
            if line.contains("bytes smem") {
                last.shared = before(line, "bytes smem");
            }
        }
    }
    Some(all)
}
