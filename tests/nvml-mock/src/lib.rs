//! A MOCK of NVIDIA's `libnvidia-ml.so.1`: what tests, benchmarks and the demo load in its place. No
//! GPU is behind it, and it says so on stderr at every init, unless its configuration says `quiet`.
//!
//! It is a shared library with the driver's C symbols, so that what is tested is what ships: dlopen,
//! nvml-wrapper, the structs and their versions, the return codes. Its GPUs are in the TOML file that
//! `$MOCK_NVML_CONFIG` names, or else in `libnvidia-ml-mock.toml` beside a `libnvidia-ml-mock.so`:
//! one process can then load several mocks, each from its own directory. The file is read again when
//! it changes, so a test can lose a GPU while the agent runs. See [`config`] for what it can say,
//! and `fixtures/` for real GPUs.
//!
//! Where a file is wrong, that is said on stderr, and every call returns UNKNOWN (999).
//!
//! Not here: calls that darter does not make. nvml-wrapper takes a library that lacks some.
#![allow(non_snake_case, reason = "the names of NVML's functions")]
#![allow(non_upper_case_globals, reason = "and of its constants, in patterns")]

pub mod config;
pub mod file;
mod state;
#[macro_use]
mod glue;
pub mod events;
pub mod fields;
pub mod gpm;
pub mod health;
pub mod identity;
pub mod mig;
pub mod processes;
pub mod system;
pub mod telemetry;

/// Every symbol that the library exports.
pub fn exports() -> Vec<&'static str> {
    let groups = [
        system::NAMES,
        identity::NAMES,
        telemetry::NAMES,
        fields::NAMES,
        health::NAMES,
        processes::NAMES,
        mig::NAMES,
        events::NAMES,
        gpm::NAMES,
    ];
    // It returns a text, not a code.
    let mut all = groups.concat();
    all.push("nvmlErrorString");
    all
}
