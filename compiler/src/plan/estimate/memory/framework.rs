//! What programs hold beyond what a mapping says: copies of gradients, copies of logits, dropout masks.
//!
//! Enters: nothing. Leaves: a [`Framework`], as the source code of a training program states it.
//! Invariant: every value follows from a line of a public program that is named here; none is fitted.

/// How logits become a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Every rank of `tp` keeps its slice of the vocabulary: half logits, their f32 copy, and the
    /// softmax, which the backward pass overwrites (`_VocabParallelCrossEntropy` of Megatron-LM).
    Sliced,
    /// Logits are gathered over `tp` and go through the library's cross entropy: half logits, f32
    /// log-probabilities, and the f32 gradients of the choice and of the log-softmax
    /// (`torch.nn.functional.cross_entropy`).
    Gathered,
    /// Head and loss run over tiles of the sequence, forward and backward at once, so that only one
    /// tile's logits exist (Liger Kernel, arXiv 2410.10989; ALST, arXiv 2506.13996).
    Tiled,
}

/// What a program holds that its mapping does not say. The default is Megatron-Core.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Framework {
    /// Bytes a parameter of a second copy of the gradients, in the buckets they are reduced in.
    pub bucket_bytes: u8,
    /// Updated parameters of ZeRO-1 are gathered in one piece, beside the parameters themselves.
    pub gathers_at_once: bool,
    pub loss: Loss,
    /// Feed-forward blocks run over tiles of the sequence, again in the backward pass (ALST).
    pub tiles_ffn: bool,
    /// Parameters that are gathered at least before ZeRO-3 drops any, and gradients that are collected
    /// at least before it reduces them, in elements.
    pub gathered_elements: f64,
    /// Attention probabilities and the two outputs of a layer are dropped out, and their masks kept.
    pub dropout: bool,
    /// Collectives of `tp` run on streams that hold back the whole-sequence tensors they read, until
    /// the host meets the device again.
    pub pins_sequences: bool,
}

impl Framework {
    /// Megatron-Core: f32 gradients are the buckets; the sequence is gathered into one global buffer.
    pub const MEGATRON: Self = Self {
        bucket_bytes: 0,
        gathers_at_once: false,
        loss: Loss::Sliced,
        tiles_ffn: false,
        gathered_elements: 0.0,
        dropout: false,
        pins_sequences: false,
    };
    /// Megatron-LM's GPT with the command line's defaults, `--attention-dropout 0.1 --hidden-dropout 0.1`.
    pub const MEGATRON_GPT: Self = Self {
        dropout: true,
        ..Self::MEGATRON
    };
    /// nanotron: half gradients in the buckets of PyTorch's DDP beside the f32 accumulators
    /// (`optim/gradient_accumulator.py`), `all_gather_coalesced` of all parameters after a step of
    /// ZeRO-1 (`optim/zero.py`), asynchronous collectives of `tp` without
    /// `TORCH_NCCL_AVOID_RECORD_STREAMS` (`parallel/tensor_parallel/functional.py`).
    pub const NANOTRON: Self = Self {
        bucket_bytes: 2,
        gathers_at_once: true,
        pins_sequences: true,
        ..Self::MEGATRON
    };
    /// Aleph Alpha's scaling: the head is a `ColumnParallelLinear` whose output is concatenated over
    /// `tp` (`layers/lm_head.py`) before `torch.nn.functional.cross_entropy` (`losses/cross_entropy.py`).
    pub const SCALING: Self = Self {
        loss: Loss::Gathered,
        ..Self::MEGATRON
    };
    /// Programs on PyTorch's own FSDP with the library's cross entropy.
    pub const PYTORCH: Self = Self {
        loss: Loss::Gathered,
        ..Self::MEGATRON
    };
}

impl Framework {
    /// DeepSpeed with its defaults: `stage3_max_live_parameters` and twice `reduce_bucket_size`
    /// (`overlap_comm`) are 10⁹ elements (`runtime/zero/config.py`).
    pub const DEEPSPEED: Self = Self {
        gathered_elements: 1e9,
        ..Self::PYTORCH
    };
    /// DeepSpeed for long sequences (ALST): tiled loss and tiled feed-forward blocks.
    pub const DEEPSPEED_TILED: Self = Self {
        loss: Loss::Tiled,
        tiles_ffn: true,
        ..Self::DEEPSPEED
    };
}

impl Default for Framework {
    fn default() -> Self {
        Self::MEGATRON
    }
}
