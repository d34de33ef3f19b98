//! Which device a rank computes on.
#![allow(unsafe_code)]

use super::DeviceError;
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::OnceLock;
use tch::Device;

/// What is asked for. What `auto` means to a user is decided with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// The GPU with the rank's local index, or an error.
    Cuda,
}

/// The device of a rank. Opens libtorch's CUDA half where a GPU was asked for.
pub fn choose(choice: DeviceChoice, local_rank: usize) -> Result<Device, DeviceError> {
    if choice == DeviceChoice::Cpu {
        return Ok(Device::Cpu);
    }
    // A GPU without a driver or a usable libtorch_cuda is a broken machine, not a CPU machine: say so.
    let num_devices = open_cuda()?;
    if local_rank < num_devices {
        return Ok(Device::Cuda(local_rank));
    }
    Err(DeviceError::Unavailable(format!(
        "local rank {local_rank} needs a GPU of its own, but this process sees {num_devices} (CUDA_VISIBLE_DEVICES \
         counts): start at most {num_devices} ranks on this node, or set `device = \"cpu\"`"
    )))
}

/// Makes operations on a GPU repeat their bits from run to run, where libtorch has such a form of them. To be called
/// before the first of them, for cuBLAS reads its workspace's shape when it starts.
pub fn use_deterministic_operations() -> Result<(), DeviceError> {
    unsafe extern "C" {
        fn tangelo_use_deterministic_operations() -> *mut std::ffi::c_char;
        fn tangelo_free(message: *mut std::ffi::c_char);
    }
    // SAFETY: answers null or a text that it gave away.
    let message = unsafe { tangelo_use_deterministic_operations() };
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: as above; freed once.
    unsafe { tangelo_free(message) };
    Err(DeviceError::Unavailable(format!("deterministic operations: {text}")))
}

/// Whether this machine has a CUDA driver.
pub fn driver_present() -> bool {
    open(c"libcuda.so.1", libc::RTLD_NOW).is_ok()
}

/// Opens libtorch_cuda, once per process, and counts the GPUs. Without a CUDA driver nothing is opened, which saves
/// half a second and 275 MB at start.
pub fn open_cuda() -> Result<usize, DeviceError> {
    static OPENED: OnceLock<Result<usize, DeviceError>> = OnceLock::new();
    OPENED.get_or_init(|| try_open_cuda().map_err(DeviceError::Unavailable)).clone()
}

fn try_open_cuda() -> Result<usize, String> {
    open(c"libcuda.so.1", libc::RTLD_NOW)
        .map_err(|detail| format!("no CUDA driver on this machine ({detail}): set `device = \"cpu\"`"))?;
    open_libtorch_cuda().map_err(|detail| {
        format!(
            "a CUDA driver is here, but libtorch_cuda cannot be opened ({detail}): install the CUDA build of torch \
             2.11.0, or set `device = \"cpu\"`"
        )
    })?;
    match usize::try_from(tch::Cuda::device_count()) {
        Ok(num_devices) if num_devices > 0 => Ok(num_devices),
        _ => {
            Err("a CUDA driver is here, but it shows this process no GPU: see CUDA_VISIBLE_DEVICES and nvidia-smi"
                .into())
        }
    }
}

/// By name first, as the linker's search path has it; then beside the libtorch that is loaded.
fn open_libtorch_cuda() -> Result<(), String> {
    let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL;
    open(c"libtorch_cuda.so", flags).or_else(|by_name| {
        let beside = libtorch_folder().map(|folder| folder.join("libtorch_cuda.so")).filter(|path| path.is_file());
        let path = beside.and_then(|path| CString::new(path.into_os_string().into_encoded_bytes()).ok());
        open(&path.ok_or(by_name)?, flags)
    })
}

/// The folder that libtorch_cpu was loaded from.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .find_map(|line| line.find('/').map(|at| &line[at..]).filter(|p| p.ends_with("/libtorch_cpu.so")))?;
    PathBuf::from(path).parent().map(PathBuf::from)
}

/// Opens a library for the rest of the process.
pub(crate) fn open(name: &CStr, flags: libc::c_int) -> Result<(), String> {
    // SAFETY: the name is a C string; the libraries named here have initialisers made to be run by dlopen, and the
    // handle is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns null or a C string that stays valid until this thread's next dl call.
    let text = unsafe {
        let text = libc::dlerror();
        if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
    };
    Err(text.unwrap_or_else(|| format!("{} does not open", name.to_string_lossy())))
}

/// Threads that libtorch uses inside one operator, in this process.
pub fn set_threads(num_threads: usize) {
    let num_threads = num_threads.max(1);
    tch::set_num_threads(i32::try_from(num_threads).unwrap_or(i32::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_always_there() {
        assert_eq!(choose(DeviceChoice::Cpu, 3).unwrap(), Device::Cpu);
    }

    #[test]
    fn a_gpu_is_there_or_said_not_to_be() {
        if driver_present() {
            assert!(choose(DeviceChoice::Cuda, 0).unwrap().is_cuda());
            assert!(choose(DeviceChoice::Cuda, 1000).unwrap_err().to_string().contains("GPU of its own"));
        } else {
            assert!(choose(DeviceChoice::Cuda, 0).unwrap_err().to_string().contains("no CUDA driver"));
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.contains("libtorch_cuda.so"));
        }
    }

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        assert!(libtorch_folder().unwrap().join("libtorch_cpu.so").is_file());
    }

    #[test]
    fn threads_are_set() {
        set_threads(2);
        assert_eq!(tch::get_num_threads(), 2);
    }
}
