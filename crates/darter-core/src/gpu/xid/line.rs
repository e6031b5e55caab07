//! The kernel's log, as far as the NVIDIA driver writes of errors in it.

use std::time::Duration;

use super::FALLEN_OFF_THE_BUS;
use crate::gpu::{PciAddress, Time};

/// An error of a GPU, as a line of the kernel's log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which GPU.
    pub pci: PciAddress,
    /// Its code.
    pub xid: u32,
    /// What a line of an NVLink 5 error (144 to 150) says besides.
    pub link: Option<LinkFault>,
}

/// An error of an NVLink, from Blackwell on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFault {
    /// The unit of the chip that has it, such as `NETIR_LINK_EVT`.
    pub unit: String,
    /// Whether the driver calls it fatal.
    pub is_fatal: Option<bool>,
    /// Which link.
    pub link: Option<u8>,
}

/// Unit names have some 16 characters; a line that goes on without a space is no unit.
const UNIT_MAX: usize = 32;

/// The time since the boot and the text of a record of `/dev/kmsg`.
///
/// `None` if it is not the kernel's own: whoever may write to `/dev/kmsg` can write there what he likes, under
/// another facility than the kernel's, which is 0.
pub fn kmsg(record: &str) -> Option<(Time, &str)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    // Facility and level; the level has the lower three bits.
    if priority >> 3 != 0 {
        return None;
    }
    let micros = fields.nth(1)?.parse().ok()?;
    // Further lines of a record are its dictionary.
    Some((Time::ZERO + Duration::from_micros(micros), text.lines().next().unwrap_or_default()))
}

/// The error of which a line of the kernel's log speaks, if it does.
///
/// `NVRM: Xid (PCI:0000:c1:00): 79, …`, also without `PCI:` (old drivers) and with the MIG instance behind the
/// address; `NVRM: GPU 0000:c1:00.0: GPU has fallen off the bus.` is 79.
pub fn parse(line: &str) -> Option<Line> {
    // Programs choose their names, and names stand in lines: only the beginning is the driver's.
    let line = line.trim_start();
    let line = line.strip_prefix('[').and_then(|line| line.split_once("] ")).map_or(line, |(_, line)| line);
    let text = line.strip_prefix("NVRM: ")?;
    if let Some(text) = text.strip_prefix("Xid (") {
        return xid(text);
    }
    if !text.contains("has fallen off the bus") {
        return None;
    }
    let mut words = text.split_whitespace().map(|word| word.trim_end_matches(':').trim_start_matches("PCI:"));
    let pci = words.find_map(|word| word.parse().ok())?;
    Some(Line { pci, xid: FALLEN_OFF_THE_BUS, link: None })
}

fn xid(text: &str) -> Option<Line> {
    let (place, text) = text.split_once("): ")?;
    let pci = place.split_whitespace().next()?.trim_start_matches("PCI:").parse().ok()?;
    let digits = text.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(text.len());
    let (code, rest) = text.split_at(digits);
    let xid = code.parse().ok()?;
    // `79.`, `79abc`: not a form that any driver writes.
    let rest = match rest.strip_prefix(',') {
        Some(rest) => rest,
        None if rest.trim().is_empty() => "",
        None => return None,
    };
    let link = (144..=150).contains(&xid).then(|| link(rest)).flatten();
    Some(Line { pci, xid, link })
}

/// `NETIR_LINK_EVT Nonfatal XC0 i0 Link 08 (0x…)`; the link is -1 where there is none.
fn link(text: &str) -> Option<LinkFault> {
    let words: Vec<_> = text.split_whitespace().take(16).collect();
    let unit = words.first().filter(|unit| unit.len() <= UNIT_MAX)?;
    let is_fatal = words.iter().find_map(|word| match *word {
        "Fatal" => Some(true),
        "Nonfatal" => Some(false),
        _ => None,
    });
    let number = words.iter().skip_while(|word| **word != "Link").nth(1);
    Some(LinkFault { unit: (*unit).to_owned(), is_fatal, link: number.and_then(|number| number.parse().ok()) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(pci: &str, xid: u32) -> Option<Line> {
        Some(Line { pci: pci.parse().unwrap(), xid, link: None })
    }

    #[test]
    fn lines_of_all_drivers_are_read() {
        for (line, expected) in [
            ("NVRM: Xid (PCI:0000:c1:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", 79),
            ("NVRM: Xid (PCI:0000:c1:00): 119, pid=1234, name=vllm, Timeout waiting for RPC from GSP!", 119),
            ("NVRM: Xid (0000:c1:00): 13, Graphics Exception", 13),
            ("NVRM: Xid (PCI:0000:c1:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9).", 94),
            ("NVRM: Xid (PCI:0000:c1:00 GPU-I:05 GPU-CI:00): 31, pid=7, MMU Fault", 31),
            ("NVRM: Xid (PCI:0000:c1:00): 45", 45),
            ("[171167.620236] NVRM: Xid (PCI:0000:c1:00): 48, An uncorrectable double bit error", 48),
            ("NVRM: GPU 0000:c1:00.0: GPU has fallen off the bus.", 79),
            ("NVRM: GPU at 0000:c1:00.0 has fallen off the bus.", 79),
            ("NVRM: GPU at PCI:0000:c1:00 has fallen off the bus.", 79),
        ] {
            assert_eq!(parse(line), at("0000:c1:00", expected), "{line}");
        }
    }

    #[test]
    fn what_the_driver_did_not_write_is_no_error() {
        for line in [
            "",
            "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.95.05",
            "NVRM: GPU at PCI:0000:c1:00: GPU-3b2c",
            "NVRM: Xid (PCI:0000:c1:00): , no code",
            "NVRM: Xid (PCI:0000:c1:00): 79x",
            "NVRM: Xid (PCI:0000:c1:00): 99999999999999, too long",
            "NVRM: Xid (PCI:nonsense): 79, GPU has fallen off the bus.",
            "NVRM: GPU has fallen off the bus.",
            "oom-kill: task=NVRM: Xid (PCI:0000:c1:00): 79, a program with an evil name",
            "nvidia-nvswitch0: SXid (PCI:0000:c1:00): 12028, Non-fatal, Link 32",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn errors_of_nvlink_5_carry_unit_severity_and_link() {
        let line = "NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT  Fatal   XC0 i0 Link 09 (0x025525c6 0x00000000)";
        let link = Some(LinkFault { unit: "NETIR_LINK_EVT".to_owned(), is_fatal: Some(true), link: Some(9) });
        assert_eq!(parse(line), Some(Line { pci: "0018:01:00".parse().unwrap(), xid: 149, link }));
        let line = "NVRM: Xid (PCI:0018:01:00): 145, RLW_REMAP Nonfatal XC1 i0 Link -1 (0x00000004 0x00000001)";
        let link = Some(LinkFault { unit: "RLW_REMAP".to_owned(), is_fatal: Some(false), link: None });
        assert_eq!(parse(line).unwrap().link, link);
        let line = "NVRM: Xid (PCI:0018:01:00): 48, RLW_REMAP Nonfatal XC1 i0 Link 3";
        assert_eq!(parse(line).unwrap().link, None, "not a code of NVLink 5");
    }

    #[test]
    fn a_record_of_kmsg_has_its_time_and_only_the_kernel_is_believed() {
        let text = "NVRM: Xid (PCI:0000:c1:00): 79, gone";
        let time = Time::from_micros(98_765_432);
        assert_eq!(kmsg(&format!("3,1021,98765432,-;{text}\n SUBSYSTEM=pci\n")), Some((time, text)));
        assert_eq!(kmsg(&format!("12,1021,98765432,-;{text}")), None, "written by a program");
        assert_eq!(kmsg(&format!("3,1021;{text}")), None);
        assert_eq!(kmsg(text), None);
    }

    proptest! {
        #[test]
        fn no_line_is_too_odd(text in "(NVRM: (Xid \\()?)?(PCI:)?[0-9a-f:.)]{0,20}.{0,60}") {
            let _ = parse(&text);
            let _ = kmsg(&text);
        }

        #[test]
        fn what_is_written_is_read(domain: u16, bus: u8, device in 0u8..32, code in 1u32..200) {
            let pci = PciAddress { domain: domain.into(), bus, device };
            let line = parse(&format!("NVRM: Xid (PCI:{domain:04x}:{bus:02x}:{device:02x}): {code}, pid=1"));
            prop_assert_eq!(line.map(|line| (line.pci, line.xid)), Some((pci, code)));
        }
    }
}
