//! Models of which rows often leave sizes out.
//!
//! Enters: a name. Leaves: the sizes that the model's publisher states.
//! Invariant: what a row states comes first.

/// A published model: layers, width, heads, key heads, feed-forward width, vocabulary; and, in the words
/// of the column `extra_arch`, what else there is.
pub(super) struct Known {
    name: &'static str,
    pub sizes: [usize; 6],
    pub extra: &'static str,
}

#[rustfmt::skip] // A table: one line a model.
const KNOWN: [Known; 34] = [
    known("llama-3.1-405b", [126, 16384, 128, 8, 53248, 128_256], "untied"),
    known("llama3.1-405b", [126, 16384, 128, 8, 53248, 128_256], "untied"),
    known("llama3-405b", [126, 16384, 128, 8, 53248, 128_256], "untied"),
    known("llama3.1-70b", [80, 8192, 64, 8, 28672, 128_256], "untied"),
    known("llama3.1-8b", [32, 4096, 32, 8, 14336, 128_256], "untied"),
    known("llama3-70b", [80, 8192, 64, 8, 28672, 128_256], "untied"),
    known("llama3-8b", [32, 4096, 32, 8, 14336, 128_256], "untied"),
    known("llama2-70b", [80, 8192, 64, 8, 28672, 32_000], "untied"),
    known("llama2-13b", [40, 5120, 40, 40, 13824, 32_000], "untied"),
    known("llama2-7b", [32, 4096, 32, 32, 11008, 32_000], "untied"),
    known("llama-65b", [80, 8192, 64, 64, 22016, 32_000], "untied"),
    known("llama-30b", [60, 6656, 52, 52, 17920, 32_000], "untied"),
    known("llama-13b", [40, 5120, 40, 40, 13824, 32_000], "untied"),
    known("llama-7b", [32, 4096, 32, 32, 11008, 32_000], "untied"),
    // The shapes of nanotron's benchmark.
    known("llama-like-1.3b", [16, 2048, 32, 32, 8192, 131_072], "tied embeddings"),
    known("llama-like-3.6b", [28, 3072, 32, 32, 8192, 131_072], "tied embeddings"),
    known("llama-like-8.9b", [32, 4096, 32, 32, 14336, 131_072], "untied"),
    known("llama-like-70b(gqa)", [80, 8192, 64, 8, 28672, 131_072], "untied"),
    known("llama-like-80b", [80, 8192, 64, 64, 28672, 131_072], "untied"),
    known("llama-like-469b", [126, 16384, 128, 128, 53248, 131_072], "untied"),
    known("mistral-7b", [32, 4096, 32, 8, 14336, 32_000], "untied"),
    known("qwen3-8b", [36, 4096, 32, 8, 12288, 151_936], "untied"),
    known("gpt3-175b", [96, 12288, 96, 96, 49152, 51_200], "tied embeddings"),
    known("gpt-175b", [96, 12288, 96, 96, 49152, 51_200], "tied embeddings"),
    known("bloom-176b", [70, 14336, 112, 112, 57344, 250_880], "tied embeddings"),
    known("deepseek-v3", [61, 7168, 128, 128, 18432, 129_280], "MLA q_lora1536 kv_lora512 nope128 rope64 v128; first 3 layers dense; 1 shared expert; experts 256 topk 8 moe_ffn 2048"),
    known("deepseek-v2-lite", [27, 2048, 16, 16, 10944, 102_400], "MLA (no q lora) kv_lora512; first layer dense; 2 shared experts; experts 64 topk 6 moe_ffn 1408"),
    known("moonlight-16b-a3b", [27, 2048, 16, 16, 11264, 163_840], "MLA (no q lora) kv_lora512; first layer dense; 2 shared experts; experts 64 topk 6 moe_ffn 1408"),
    known("qwen3-30b-a3b", [48, 2048, 32, 4, 6144, 151_936], "untied; head_dim 128 experts 128 topk 8 moe_ffn 768"),
    known("qwen3-235b-a22b", [94, 4096, 64, 4, 12288, 151_936], "untied; head_dim 128 experts 128 topk 8 moe_ffn 1536"),
    known("mixtral-8x22b-g8t8", [56, 6144, 48, 8, 16384, 32_000], "untied; head_dim 128 experts 64 topk 8 moe_ffn 2048"),
    known("mixtral-8x22b", [56, 6144, 48, 8, 16384, 32_000], "untied; head_dim 128 experts 8 topk 2 moe_ffn 16384"),
    known("mixtral-8x7b", [32, 4096, 32, 8, 14336, 32_000], "untied; head_dim 128 experts 8 topk 2 moe_ffn 14336"),
    known("gpt-oss-120b", [36, 2880, 64, 8, 2880, 201_088], "untied; sliding window 128 in every other layer; head_dim 64 experts 128 topk 4 moe_ffn 2880"),
];

const fn known(name: &'static str, sizes: [usize; 6], extra: &'static str) -> Known {
    Known { name, sizes, extra }
}

/// The model whose name a row's model begins with; both in lower case, spaces as hyphens.
pub(super) fn find(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| name.starts_with(known.name))
}

/// Words that say that a run is none of a decoder's full training, and what they say.
pub(super) const UNLIKE: [(&str, &str); 4] = [
    ("lora", "only adapters are trained"),
    (
        "hybrid",
        "layers other than attention and feed-forward blocks",
    ),
    (
        "mamba",
        "layers other than attention and feed-forward blocks",
    ),
    ("diffusion", "no decoder"),
];
