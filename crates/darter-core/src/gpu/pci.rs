//! Where a GPU sits on the PCI bus: the one name that the kernel, sysfs and NVML share.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Domain, bus and device of a GPU. Its function is 0.
///
/// sysfs writes `0000:c1:00.0`, NVML eight digits of domain, the driver's log no function; all are read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    /// The domain (segment).
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device.
    pub device: u8,
}

/// Not the address of a PCI device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address: expected one such as 0000:c1:00.0")]
pub struct NotPci(String);

impl FromStr for PciAddress {
    type Err = NotPci;

    fn from_str(text: &str) -> Result<Self, NotPci> {
        let wrong = || NotPci(text.chars().take(32).collect());
        let address = text
            .split_once('.')
            .map_or(Some(text), |(address, function)| matches!(function.as_bytes(), [b'0'..=b'7']).then_some(address));
        let fields: Vec<_> = address.ok_or_else(wrong)?.split(':').collect();
        let [domain, bus, device] = fields[..] else { return Err(wrong()) };
        let is_hex = |field: &str, digits: &[usize]| {
            digits.contains(&field.len()) && field.bytes().all(|digit| digit.is_ascii_hexdigit())
        };
        if !is_hex(domain, &[4, 8]) || !is_hex(bus, &[2]) || !is_hex(device, &[2]) {
            return Err(wrong());
        }
        Ok(Self {
            domain: u32::from_str_radix(domain, 16).map_err(|_| wrong())?,
            bus: u8::from_str_radix(bus, 16).map_err(|_| wrong())?,
            device: u8::from_str_radix(device, 16).map_err(|_| wrong())?,
        })
    }
}

impl TryFrom<String> for PciAddress {
    type Error = NotPci;

    fn try_from(text: String) -> Result<Self, NotPci> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_sysfs_and_nvml_name_the_same_device() {
        let address: PciAddress = "0000:c1:00".parse().unwrap();
        for text in ["0000:c1:00.0", "00000000:C1:00.0", "0000:C1:00"] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        assert_eq!(address.to_string(), "0000:c1:00.0");
        assert_eq!("00010000:00:1e.0".parse::<PciAddress>().unwrap().to_string(), "10000:00:1e.0");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "c1:00",
            "c1:00.0",
            "0000:c1:00.8",
            "0000:c1:00.",
            "0000:c1:0",
            "0000:c1:+0",
            "0000:cg:00",
            "0:0:0",
            "a:b:c:d",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }
}
