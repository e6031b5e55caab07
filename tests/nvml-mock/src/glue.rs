//! Between C and Rust: how functions are exported, and how answers get to where a caller wants them.

use std::ffi::{c_char, c_uint};
use std::mem::MaybeUninit;

use nvml_wrapper_sys::bindings::*;

use crate::state::{Answer, Code};

/// Where a caller wants a value: null, or memory that need not hold one yet.
pub(crate) type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

/// Exports functions with the C ABI, which return a code, and lists their names. `SYMBOL` is its own.
macro_rules! exports {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        /// The symbols of this module.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        $(
            /// As nvml.h has it.
            ///
            /// # Safety
            ///
            /// A pointer is null or points to what nvml.h says, for as long as the call lasts.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> nvml_wrapper_sys::bindings::nvmlReturn_t {
                #[allow(dead_code, reason = "not every function asks for its name")]
                const SYMBOL: &str = stringify!($name);
                let act = || -> $crate::state::Answer { $body };
                act().err().unwrap_or(nvml_wrapper_sys::bindings::nvmlReturn_enum_NVML_SUCCESS)
            }
        )*
    };
}

/// A value that the configuration may lack.
pub(crate) fn supported<T>(value: Option<T>) -> Result<T, Code> {
    value.ok_or(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED)
}

pub(crate) fn put<T>(to: Out<'_, T>, value: T) -> Answer {
    to.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?.write(value);
    Ok(())
}

/// NVML's booleans: 0 and 1.
pub(crate) fn put_bool(to: Out<'_, c_uint>, value: bool) -> Answer {
    put(to, value.into())
}

/// Writes a text and a zero.
///
/// # Safety
///
/// `to` is null or has room for `length` bytes.
pub(crate) unsafe fn put_text(to: *mut c_char, length: c_uint, text: &str) -> Answer {
    if to.is_null() {
        return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
    }
    if text.len() >= length as usize {
        return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
    }
    // SAFETY: the text and a zero are at most `length` bytes, and the caller has room for those.
    unsafe {
        to.copy_from_nonoverlapping(text.as_ptr().cast(), text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// Writes a list. `count` says for how many there is room, and then how many there are: written, or,
/// with INSUFFICIENT_SIZE, to be written. No room at all asks for their number.
///
/// # Safety
///
/// `to` is null or has room for `count` items.
pub(crate) unsafe fn put_list<T: Copy>(count: Option<&mut c_uint>, to: *mut T, items: &[T]) -> Answer {
    let count = count.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
    let room = *count as usize;
    *count = c_uint::try_from(items.len()).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
    if items.is_empty() {
        return Ok(());
    }
    if items.len() > room {
        return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
    }
    if to.is_null() {
        return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
    }
    // SAFETY: there are at most as many as the caller has room for.
    unsafe { to.copy_from_nonoverlapping(items.as_ptr(), items.len()) };
    Ok(())
}

/// `text` in an array of C's characters; what is too long is cut.
pub(crate) fn chars<const N: usize>(text: &str) -> [c_char; N] {
    let mut array = [0; N];
    for (to, byte) in array[..N - 1].iter_mut().zip(text.bytes()) {
        *to = byte.cast_signed();
    }
    array
}
