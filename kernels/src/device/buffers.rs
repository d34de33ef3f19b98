//! Buffers that live as long as a job: weights, gradients, states of an optimizer.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

/// What a page is at least; addresses that are advised about are multiples of it.
const PAGE_BYTES: usize = 4096;
/// Smaller buffers hold no large page.
const SMALLEST_BYTES: usize = 4 << 20;

/// `[len]` zeros of type `kind`.
///
/// On a CPU they lie in large pages where the system gives them when asked (`transparent_hugepage` `madvise` or `always`):
/// the processor then has to look up fewer addresses, and reading all weights once, which is what a step of generation
/// for one sequence does, takes 10 to 20 % less time (docs/LOG.md).
pub fn lasting_zeros(len: usize, kind: Kind, device: Device) -> Tensor {
    if device != Device::Cpu {
        return Tensor::zeros([len as i64], (kind, device));
    }
    let mut buffer = Tensor::empty([len as i64], (kind, device));
    // Before they are touched: the first touch decides what a page is.
    ask_for_large_pages(&buffer, len * kind.elt_size_in_bytes());
    buffer.zero_()
}

fn ask_for_large_pages(buffer: &Tensor, bytes: usize) {
    let begin = (buffer.data_ptr() as usize).next_multiple_of(PAGE_BYTES);
    let end = (buffer.data_ptr() as usize + bytes) / PAGE_BYTES * PAGE_BYTES;
    if bytes < SMALLEST_BYTES || end <= begin {
        return;
    }
    // SAFETY: the range lies within the buffer, which is alive; the advice changes how it is backed, not what it holds.
    // Where it is refused pages stay small.
    let _ = unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_zeros_of_any_size() {
        for len in [0, 1, 4095, 3 << 20] {
            let buffer = lasting_zeros(len, Kind::Float, Device::Cpu);
            assert_eq!(buffer.size(), [len as i64]);
            assert_eq!(f64::try_from(buffer.abs().sum(Kind::Double)).unwrap(), 0.0);
        }
    }
}
