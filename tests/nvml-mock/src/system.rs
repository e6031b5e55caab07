//! Init, shutdown, versions, names of processes and of errors.

use std::ffi::{CStr, c_char, c_int, c_uint};

use nvml_wrapper_sys::bindings::*;

use crate::glue::{Out, put, put_text, supported};
use crate::state;

exports! {
    fn nvmlInit_v2() {
        state::init(SYMBOL)
    }

    // The flags say what to do without GPUs; this library does that anyway.
    fn nvmlInitWithFlags(_flags: c_uint) {
        state::init(SYMBOL)
    }

    fn nvmlShutdown() {
        state::shutdown(SYMBOL)
    }

    fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) {
        let config = state::begin(SYMBOL, None)?;
        // SAFETY: as our caller says.
        unsafe { put_text(version, length, supported(config.driver_version.as_deref())?) }
    }

    fn nvmlSystemGetNVMLVersion(version: *mut c_char, length: c_uint) {
        let config = state::begin(SYMBOL, None)?;
        // SAFETY: as our caller says.
        unsafe { put_text(version, length, supported(config.nvml_version.as_deref())?) }
    }

    fn nvmlSystemGetCudaDriverVersion(version: Out<'_, c_int>) {
        let config = state::begin(SYMBOL, None)?;
        put(version, supported(config.cuda_version)?)
    }

    // The driver's loads libcuda; an override says what comes of it where there is none.
    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<'_, c_int>) {
        let config = state::begin(SYMBOL, None)?;
        put(version, supported(config.cuda_version)?)
    }

    fn nvmlSystemGetProcessName(pid: c_uint, name: *mut c_char, length: c_uint) {
        let config = state::begin(SYMBOL, None)?;
        let text = config.process_names.get(&pid).ok_or(nvmlReturn_enum_NVML_ERROR_NOT_FOUND)?;
        // SAFETY: as our caller says.
        unsafe { put_text(name, length, text) }
    }
}

/// What a return code means. Works without init.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(result: nvmlReturn_t) -> *const c_char {
    let text: &CStr = match result {
        0 => c"The operation was successful",
        1 => c"Uninitialized",
        2 => c"Invalid Argument",
        3 => c"Not Supported",
        4 => c"Insufficient Permissions",
        5 => c"Already Initialized",
        6 => c"Not Found",
        7 => c"Insufficient Size",
        8 => c"Insufficient External Power",
        9 => c"Driver Not Loaded",
        10 => c"Timeout",
        11 => c"Interrupt Request Issue",
        12 => c"NVML Shared Library Not Found",
        13 => c"Function Not Found",
        14 => c"Corrupted infoROM",
        15 => c"GPU is lost",
        16 => c"GPU requires reset",
        17 => c"GPU access blocked by the operating system",
        18 => c"Driver/library version mismatch",
        19 => c"In use by another client",
        20 => c"Insufficient Memory",
        21 => c"No data",
        22 => c"Operation is not supported with ECC enabled",
        23 => c"Insufficient Resources",
        24 => c"Frequency Not Supported",
        25 => c"Argument Version Mismatch",
        26 => c"Deprecated",
        27 => c"Not Ready",
        28 => c"GPU Not Found",
        29 => c"Invalid State",
        30 => c"Reset Type Not Supported",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}
