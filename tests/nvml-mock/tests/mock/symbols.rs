//! What the library exports: C functions that the driver's has too, and nothing else; and that its
//! structs are those of the header.

use std::collections::BTreeSet;
use std::mem::{offset_of, size_of};

use nvml_wrapper_sys::bindings::*;
use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSymbol as _};

/// NVML functions of drivers 590.48.01 and 610.57.04 that we or nvml-wrapper call. GetRetiredPages is
/// one that nvml-wrapper calls to count what it then asks `_v2` for.
const DRIVER: &str = include_str!("../../symbols.txt");

#[test]
fn it_exports_symbols_of_the_driver_and_no_others() {
    let driver: BTreeSet<_> = DRIVER.lines().collect();
    let claimed: BTreeSet<_> = nvidia_ml_mock::exports().into_iter().collect();
    assert_eq!(claimed, driver);
    let bytes = std::fs::read(crate::built()).unwrap();
    let library: ElfFile64 = ElfFile64::parse(&*bytes).unwrap();
    let defined = library.dynamic_symbols().filter(|symbol| symbol.is_definition() && symbol.is_global());
    let exported: BTreeSet<_> = defined.map(|symbol| symbol.name().unwrap()).collect();
    assert_eq!(exported, driver);
}

#[test]
fn structs_have_the_sizes_of_the_header() {
    for (name, size, expected) in [
        ("PciInfo", size_of::<nvmlPciInfo_t>(), 68),
        ("Memory_v2", size_of::<nvmlMemory_v2_t>(), 40),
        ("Utilization", size_of::<nvmlUtilization_t>(), 8),
        ("ProcessInfo", size_of::<nvmlProcessInfo_t>(), 24),
        ("EventData", size_of::<nvmlEventData_t>(), 32),
        ("FieldValue", size_of::<nvmlFieldValue_t>(), 40),
        ("DeviceAttributes", size_of::<nvmlDeviceAttributes_t>(), 40),
        ("Sample", size_of::<nvmlSample_t>(), 16),
        ("ViolationTime", size_of::<nvmlViolationTime_t>(), 16),
        ("ProcessUtilizationSample", size_of::<nvmlProcessUtilizationSample_t>(), 32),
        ("GpmSupport", size_of::<nvmlGpmSupport_t>(), 8),
        ("GpmMetric", size_of::<nvmlGpmMetric_t>(), 40),
        ("GpmMetricsGet", size_of::<nvmlGpmMetricsGet_t>(), 8424),
        ("MarginTemperature_v1", size_of::<nvmlMarginTemperature_v1_t>(), 8),
        ("GpuFabricInfo_v2", size_of::<nvmlGpuFabricInfo_v2_t>(), 36),
        ("GpuFabricInfo_v3", size_of::<nvmlGpuFabricInfo_v3_t>(), 40),
        ("EccSramErrorStatus_v1", size_of::<nvmlEccSramErrorStatus_v1_t>(), 104),
    ] {
        assert_eq!(size, expected, "{name}");
    }
    // Where the fields are that are read or written by their place.
    assert_eq!(offset_of!(nvmlPciInfo_t, busId), 36);
    assert_eq!(offset_of!(nvmlFieldValue_t, value), 32);
    assert_eq!(offset_of!(nvmlEventData_t, gpuInstanceId), 24);
    assert_eq!(offset_of!(nvmlGpmMetricsGet_t, metrics), 24);
}
