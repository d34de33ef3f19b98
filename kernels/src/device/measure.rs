//! Memory in use and the speed of matrix products.
#![allow(unsafe_code)]

use super::DeviceError;
use std::ffi::c_char;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

unsafe extern "C" {
    fn tangelo_free(message: *mut c_char);
    /// Writes current, peak and reserved bytes of libtorch's allocator for one GPU.
    fn tangelo_gpu_memory(index: i32, out: *mut i64) -> *mut c_char;
    fn tangelo_count_allocations_begin() -> *mut c_char;
    fn tangelo_count_allocations_end(peak: *mut i64) -> *mut c_char;
    fn tangelo_debug_info_current(out: *mut *mut RawDebugInfo) -> *mut c_char;
    fn tangelo_debug_info_swap(info: *mut RawDebugInfo) -> *mut c_char;
    fn tangelo_debug_info_free(info: *mut RawDebugInfo) -> *mut c_char;
}

/// Opaque: lives in the shim.
#[repr(C)]
struct RawDebugInfo {
    _private: [u8; 0],
}

/// Main memory of this process, in bytes; 0 where the system does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Now.
    pub resident_bytes: u64,
    /// At most, since the process began.
    pub peak_resident_bytes: u64,
}

/// What libtorch's allocator holds on a GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuMemoryUse {
    /// In tensors now.
    pub allocated_bytes: u64,
    /// In tensors at most.
    pub peak_allocated_bytes: u64,
    /// In tensors, or kept for new ones.
    pub reserved_bytes: u64,
    /// Of the device, taken by no process.
    pub free_bytes: u64,
}

/// Lets this process keep the memory that it frees, for its next step. To be called before there are other threads.
///
/// A training step frees and allocates the same large tensors again and again; by default glibc returns each to the
/// kernel, which then fills every page with zeros for the next one (measured: 9 % of a step). From one arena that is
/// never trimmed they come back at once, and from one step to the next the peak stays what it is.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [(libc::M_MMAP_MAX, 0), (libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, -1)] {
        // SAFETY: sets a number in glibc's allocator; where it refuses, allocation is slower and otherwise the same.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Main memory of this process now and at its peak.
pub fn memory() -> MemoryUse {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    MemoryUse { resident_bytes: status_bytes(&status, "VmRSS:"), peak_resident_bytes: status_bytes(&status, "VmHWM:") }
}

/// Memory of this process' tensors on a GPU; `None` for the CPU, or where libtorch does not tell.
pub fn gpu_memory(device: Device) -> Option<GpuMemoryUse> {
    let Device::Cuda(index) = device else { return None };
    let mut bytes = [0i64; 4];
    // SAFETY: writes four integers, or answers a text that it gave away.
    let error = unsafe { tangelo_gpu_memory(i32::try_from(index).ok()?, bytes.as_mut_ptr()) };
    if !error.is_null() {
        // SAFETY: as above; freed once.
        unsafe { tangelo_free(error) };
        return None;
    }
    let [allocated_bytes, peak_allocated_bytes, reserved_bytes, free_bytes] =
        bytes.map(|count| u64::try_from(count).unwrap_or(0));
    Some(GpuMemoryUse { allocated_bytes, peak_allocated_bytes, reserved_bytes, free_bytes })
}

/// Runs `work` and counts the bytes of tensors in main memory that this thread allocates meanwhile: at most, less what it
/// frees of them, those included that communication threads free for it. Tensors that other threads allocate by themselves
/// are not seen; libtorch may warn of those that were there before.
pub fn count_allocations<R>(work: impl FnOnce() -> R) -> (R, u64) {
    // SAFETY: pushes a counter onto this thread's own list; it is popped below, or unused if `work` panics.
    crate::ffi::check(unsafe { tangelo_count_allocations_begin() });
    let result = work();
    let mut peak = 0;
    // SAFETY: writes one integer; the counter pushed above is on top.
    crate::ffi::check(unsafe { tangelo_count_allocations_end(&mut peak) });
    (result, u64::try_from(peak).unwrap_or(0))
}

/// Where a thread's allocations are counted, so that another thread which works for it can count there, too.
pub(crate) struct Counting(*mut RawDebugInfo);

// SAFETY: a shared pointer to counters that are atomic.
unsafe impl Send for Counting {}

impl Counting {
    /// Of this thread.
    pub(crate) fn of_this_thread() -> Counting {
        let mut info = std::ptr::null_mut();
        // SAFETY: writes one pointer, which is freed in `drop`.
        crate::ffi::check(unsafe { tangelo_debug_info_current(&mut info) });
        Counting(info)
    }

    /// Runs `work`, which must not panic, with this thread's allocations counted there.
    pub(crate) fn during<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: the pointer is open until `drop`.
        crate::ffi::check(unsafe { tangelo_debug_info_swap(self.0) });
        let result = work();
        // SAFETY: as above; gives back what the thread had.
        crate::ffi::check(unsafe { tangelo_debug_info_swap(self.0) });
        result
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        // SAFETY: it was opened by this value alone; freed once.
        crate::ffi::check(unsafe { tangelo_debug_info_free(self.0) });
    }
}

/// Host memory that can still be had without swapping, bytes: the machine's, or what this process's control group (a
/// container's or a Slurm job's) has left of its limit, where that is less. `None` where the kernel does not say.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = Some(status_bytes(&text, "MemAvailable:")).filter(|&bytes| bytes > 0)?;
    Some(control_group_memory().map_or(machine, |group| group.min(machine)))
}

/// What the control group (v2) and those above it leave, where one of them has a limit.
fn control_group_memory() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let own = std::path::Path::new("/sys/fs/cgroup").join(path);
    let number = |folder: &std::path::Path, file: &str| -> Option<u64> {
        std::fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
    };
    let left = |folder: &std::path::Path| {
        // Pages of files count as used, and go when memory is short.
        let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse().ok()).unwrap_or(0);
        Some(number(folder, "memory.max")?.saturating_sub(number(folder, "memory.current")?.saturating_sub(cached)))
    };
    own.ancestors().filter(|folder| folder.starts_with("/sys/fs/cgroup")).filter_map(left).min()
}

fn status_bytes(status: &str, key: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

/// Floating-point operations per second of the fastest large matrix product this process can do on the device, with
/// its present number of threads: the best of a few square sizes and, on the CPU, of libtorch's two product libraries.
/// Takes about the given time. This is the denominator of MFU, so it is a peak that was reached, not a data sheet's.
pub fn measured_matmul_peak_flops(device: Device, kind: Kind, seconds: f64) -> Result<f64, DeviceError> {
    let sizes: &[i64] = if device.is_cuda() { &[4096, 8192] } else { &[512, 1024, 2048] };
    let budget = Duration::from_secs_f64(seconds.max(0.0) / sizes.len() as f64);
    let mut best = 0.0f64;
    for &size in sizes {
        let measured = tch::no_grad(|| measure_size(device, kind, size, budget));
        let flops = measured.map_err(|error| {
            DeviceError::Unavailable(format!("a {size} x {size} product of {kind:?} on {device:?} failed: {error}"))
        })?;
        best = best.max(flops);
    }
    Ok(best)
}

fn measure_size(device: Device, kind: Kind, size: i64, budget: Duration) -> Result<f64, tch::TchError> {
    let random = || Tensor::f_randn([size, size], (Kind::Float, device))?.f_to_kind(kind);
    let (a, b) = (random()?, random()?);
    let plain = fastest(device, budget / 2, || a.f_matmul(&b))?;
    let mut seconds = plain;
    if device == Device::Cpu && kind == Kind::Float {
        // Plain fp32 products go to MKL, which some processors run at half of what oneDNN reaches.
        let (a, b) = (a.f_to_mkldnn(None::<Kind>)?, b.f_to_mkldnn(None::<Kind>)?);
        let bias: Option<Tensor> = None;
        let product = || Tensor::f_mkldnn_linear(&a, &b, bias.as_ref());
        seconds = seconds.min(fastest(device, budget / 2, product)?);
    }
    Ok(2.0 * (size as f64).powi(3) / seconds)
}

/// The shortest time of the product, over as many runs as fit.
fn fastest(
    device: Device,
    budget: Duration,
    product: impl Fn() -> Result<Tensor, tch::TchError>,
) -> Result<f64, tch::TchError> {
    let synchronize = || {
        if let Device::Cuda(index) = device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    drop(product()?);
    synchronize();
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..1_000_000 {
        let start = Instant::now();
        drop(product()?);
        synchronize();
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed() >= budget {
            break;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_with_what_is_touched() {
        let before = memory();
        assert!(before.resident_bytes > 1 << 20 && before.peak_resident_bytes >= before.resident_bytes);
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = memory();
        assert!(after.peak_resident_bytes >= before.resident_bytes + block.len() as u64 / 2, "{before:?} {after:?}");
    }

    #[test]
    fn a_gpu_that_is_not_there_holds_nothing() {
        if crate::device::driver_present() {
            println!("skipped: this machine has a CUDA driver");
            return;
        }
        assert_eq!(gpu_memory(Device::Cuda(0)), None);
    }

    #[test]
    fn the_peak_is_plausible() {
        // Any processor that runs libtorch does more than 1 GFLOP/s, and none does 10 PFLOP/s.
        for kind in [Kind::Float, Kind::BFloat16] {
            let flops = measured_matmul_peak_flops(Device::Cpu, kind, 0.05).unwrap();
            assert!((1e9..1e16).contains(&flops), "{flops}");
        }
    }
}
