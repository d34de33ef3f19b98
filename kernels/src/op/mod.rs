//! The operators of the model, its loss and its optimizer. Each lies in a folder of its own with `reference.rs`, the
//! same thing in plain tch operations, first.
//!
//! Conventions: activations are token-major, `[T, ...]` with T the packed tokens of a micro-batch, and contiguous
//! where an operator says so. On a CPU the shim's kernels run; elsewhere, and for float64, the reference does.
//! Failures panic with a message, as tch's plain operations do.
//!
//! **Main gradients.** Weights never use `.grad`, which would accumulate in the weight's own type. An operator with a
//! weight takes the tensor its gradient is *added* to in place: contiguous, of the weight's shape, fp32 (float64 for a
//! float64 weight). Without one, the weight is frozen and gradients flow to the activations alone. The weight must not
//! require a gradient itself. A weight may be a view of whole rows of a larger buffer.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod distribution;
pub mod embedding;
pub mod linear;
pub mod logprob;
pub mod muon;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

pub use adamw::{AdamW, AdamWState, DecaySegment, adamw_step};
pub use attention::{PagedBatch, PagedKv, attention, attention_with_past, attention_with_prefixes};
pub use cross_entropy::{CrossEntropy, cross_entropy_chunked, cross_entropy_loss};
pub use embedding::{embedding, embedding_backward};
pub use linear::linear;
pub use logprob::{Draw, Drawn, draw_key, sample, token_logprobs};
pub use muon::{AdjustLr, Muon, muon_step};
pub use reduce::chunk_square_sums;
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::{qkv_rope, rope};
pub use swiglu::swiglu;

pub use crate::ffi::cpu_kernels_name;

/// The type sums are kept in: double for double, float for everything narrower.
pub(crate) fn accumulate_kind(tensor: &tch::Tensor) -> tch::Kind {
    if tensor.kind() == tch::Kind::Double { tch::Kind::Double } else { tch::Kind::Float }
}

/// Whether the shim's CPU kernels take this tensor; the reference does the rest.
pub(crate) fn has_cpu_kernels(tensor: &tch::Tensor) -> bool {
    tensor.device() == tch::Device::Cpu && matches!(tensor.kind(), tch::Kind::Float | tch::Kind::BFloat16)
}
