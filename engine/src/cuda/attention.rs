//! Which kernel computes the attention of prompts.
//!
//! The portable one (`mma`, from compute capability 8.0 on) runs on every device. The other (bulk copies and products of
//! warpgroups) is for compute capability 9.0 alone, and may round differently: what it computes has a numerics id of its
//! own.

use common::config::PrefillAttention;
use kernels::cuda::Device;
use kernels::cuda::ops::{AttentionKernels, PrefillKernel};

use crate::spec::ModelSpec;

/// The kernel, and why it is that one.
pub(crate) fn choose(
    wanted: PrefillAttention,
    device: &dyn Device,
    spec: &ModelSpec,
    kernels: AttentionKernels,
    is_batch_invariant: bool,
) -> (PrefillKernel, String) {
    match why_not_hopper(wanted, device, spec, kernels, is_batch_invariant) {
        Some(reason) => (PrefillKernel::Portable, reason),
        None => (PrefillKernel::Hopper, "the GPU has compute capability 9.0".to_string()),
    }
}

fn why_not_hopper(
    wanted: PrefillAttention,
    device: &dyn Device,
    spec: &ModelSpec,
    kernels: AttentionKernels,
    is_batch_invariant: bool,
) -> Option<String> {
    if wanted == PrefillAttention::Portable {
        return Some("--prefill-attention portable".to_string());
    }
    if !kernels.has_prefill {
        return Some(format!("tensor cores have no kernel for prompts with heads of {} in this type", spec.head_dim));
    }
    if is_batch_invariant {
        return Some("a row has to have the bits of decoding it, which are those of the portable kernel".to_string());
    }
    if spec.num_heads == spec.num_kv_heads {
        return Some("each head has keys of its own, and the other kernel shares them between two heads".to_string());
    }
    let (needed, most) = (PrefillKernel::Hopper.shared_bytes(spec.head_dim), device.shared_bytes_max());
    if needed > most {
        return Some(format!("the other kernel needs {needed} bytes of shared memory, there are {most}"));
    }
    device.check_hopper_kernels().err()
}
