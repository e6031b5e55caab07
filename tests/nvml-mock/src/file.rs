//! From a file to a [`Config`]: what it is based on, what it says of each GPU, whether it makes sense.
//!
//! A file may name a `base`, one of the fixtures. `absent` lists keys (`"gpu.utilization"`) that the
//! base has and this one has not; what the file says itself then comes on top, table by table. `count`
//! is how many GPUs there are, `[gpu]` says what all of them are like, `[gpus.3]` what one is.

use serde::Deserialize as _;
use toml::{Table, Value};

use crate::config::Config;

/// The fixtures: real GPUs as they were seen, and machines with something wrong.
pub const FIXTURES: &[(&str, &str)] = &[
    ("a100-mig-mixed", include_str!("../fixtures/a100-mig-mixed.toml")),
    ("a10g", include_str!("../fixtures/a10g.toml")),
    ("count-0", include_str!("../fixtures/count-0.toml")),
    ("count-short", include_str!("../fixtures/count-short.toml")),
    ("driver-580-65", include_str!("../fixtures/driver-580-65.toml")),
    ("driver-580-82", include_str!("../fixtures/driver-580-82.toml")),
    ("driver-mismatch", include_str!("../fixtures/driver-mismatch.toml")),
    ("ecc", include_str!("../fixtures/ecc.toml")),
    ("fabric-not-started", include_str!("../fixtures/fabric-not-started.toml")),
    ("gpu-lost", include_str!("../fixtures/gpu-lost.toml")),
    ("h100x8", include_str!("../fixtures/h100x8.toml")),
    ("h200-busy", include_str!("../fixtures/h200-busy.toml")),
    ("h200-idle", include_str!("../fixtures/h200-idle.toml")),
    ("h200-mig", include_str!("../fixtures/h200-mig.toml")),
    ("hang-power", include_str!("../fixtures/hang-power.toml")),
    ("init-unknown", include_str!("../fixtures/init-unknown.toml")),
    ("no-driver", include_str!("../fixtures/no-driver.toml")),
    ("process-race", include_str!("../fixtures/process-race.toml")),
    ("recovery-reboot", include_str!("../fixtures/recovery-reboot.toml")),
    ("recovery-reset", include_str!("../fixtures/recovery-reset.toml")),
    ("remap-failed", include_str!("../fixtures/remap-failed.toml")),
    ("remap-pending", include_str!("../fixtures/remap-pending.toml")),
    ("sram-exceeded", include_str!("../fixtures/sram-exceeded.toml")),
    ("t4-healthy", include_str!("../fixtures/t4-healthy.toml")),
    ("too-hot", include_str!("../fixtures/too-hot.toml")),
    ("unsupported", include_str!("../fixtures/unsupported.toml")),
    ("xid-63", include_str!("../fixtures/xid-63.toml")),
    ("xid-74", include_str!("../fixtures/xid-74.toml")),
    ("xid-79", include_str!("../fixtures/xid-79.toml")),
    ("xid-94", include_str!("../fixtures/xid-94.toml")),
    ("xid-storm", include_str!("../fixtures/xid-storm.toml")),
];

/// So many files may stand on one another: more is a circle.
const BASES_MAX: usize = 8;

/// What a file with this text says, or what is wrong with it.
pub fn parse(text: &str) -> Result<Config, String> {
    let mut table = read(text, BASES_MAX)?;
    let count = table.remove("count").ok_or("no `count` of GPUs")?;
    let count = count.as_integer().and_then(|count| u32::try_from(count).ok()).ok_or("`count` is no number")?;
    let common = sub_table(&mut table, "gpu")?;
    let mut own = sub_table(&mut table, "gpus")?;
    let mut gpus = Vec::new();
    for index in 0..count {
        let mut gpu = common.clone();
        merge(&mut gpu, sub_table(&mut own, &index.to_string())?);
        gpus.push(Value::Table(gpu));
    }
    if let Some(index) = own.keys().next() {
        return Err(format!("`gpus.{index}`: there are {count} GPUs"));
    }
    table.insert("gpus".to_owned(), Value::Array(gpus));
    let config = Config::deserialize(Value::Table(table)).map_err(|error| error.to_string().trim_end().to_owned())?;
    check(&config, count)?;
    Ok(config)
}

/// A file's own table over that of its base.
fn read(text: &str, bases: usize) -> Result<Table, String> {
    let mut own: Table = text.parse().map_err(|error| format!("no TOML: {error}"))?;
    let absent = own.remove("absent");
    let Some(base) = own.remove("base") else {
        return if absent.is_none() { Ok(own) } else { Err("`absent` without a `base`".to_owned()) };
    };
    let base = base.as_str().ok_or("`base` is no text")?;
    let (_, text) = FIXTURES.iter().find(|(name, _)| *name == base).ok_or_else(|| format!("no fixture `{base}`"))?;
    let bases = bases.checked_sub(1).ok_or_else(|| format!("`{base}` stands on itself"))?;
    let mut table = read(text, bases)?;
    for path in absent.as_ref().map_or(Some(&Vec::new()), Value::as_array).ok_or("`absent` is no list")? {
        let path = path.as_str().ok_or("`absent` lists keys as text")?;
        remove(&mut table, path).ok_or_else(|| format!("`absent`: `{base}` has no `{path}`"))?;
    }
    merge(&mut table, own);
    Ok(table)
}

/// Takes away what `path` names, as `gpu.fields.82`.
fn remove(table: &mut Table, path: &str) -> Option<Value> {
    match path.split_once('.') {
        Some((head, rest)) => remove(table.get_mut(head)?.as_table_mut()?, rest),
        None => table.remove(path),
    }
}

/// Tables go into tables; anything else takes the place of what was there.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            // A value of a field is a table of one key, its type: it is one thing.
            (Some(Value::Table(old)), Value::Table(new)) if !is_field_value(&new) => merge(old, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

fn is_field_value(table: &Table) -> bool {
    let mut keys = table.keys();
    let first = keys.next().map(String::as_str);
    matches!(first, Some("f64" | "u32" | "u64" | "i64" | "i32" | "u16" | "code")) && keys.next().is_none()
}

fn sub_table(table: &mut Table, key: &str) -> Result<Table, String> {
    match table.remove(key) {
        None => Ok(Table::new()),
        Some(Value::Table(sub)) => Ok(sub),
        Some(_) => Err(format!("`{key}` is no table")),
    }
}

/// What types cannot say.
fn check(config: &Config, count: u32) -> Result<(), String> {
    if let Some(reported) = config.reported_count.filter(|reported| *reported > count) {
        return Err(format!("`reported_count` {reported} of {count} GPUs"));
    }
    for (number, entry) in config.overrides.iter().enumerate() {
        if entry.symbol != "*" && !crate::exports().contains(&entry.symbol.as_str()) {
            return Err(format!("`overrides` {number}: the mock has no `{}`", entry.symbol));
        }
        if entry.return_code.is_none() && entry.delay_ms == 0 && !entry.hang && !entry.crash {
            return Err(format!("`overrides` {number} does nothing"));
        }
        if entry.gpu.is_some_and(|gpu| gpu >= count) {
            return Err(format!("`overrides` {number}: there are {count} GPUs"));
        }
    }
    for (number, event) in config.events.iter().enumerate() {
        if event.gpu >= count {
            return Err(format!("`events` {number}: there are {count} GPUs"));
        }
        if config.events[..number].iter().any(|earlier| earlier.id == event.id) {
            return Err(format!("`events` {number}: another has the id {}", event.id));
        }
    }
    for (number, gpu) in config.gpus.iter().enumerate() {
        let Some(mig) = &gpu.mig else { continue };
        // A handle has four bits for it.
        if mig.max_devices > 16 || mig.devices.iter().any(|device| device.index >= mig.max_devices) {
            return Err(format!("`gpus.{number}.mig`: an index is below `max_devices`, and that at most 16"));
        }
        let taken = |n: usize| mig.devices[..n].iter().any(|earlier| earlier.index == mig.devices[n].index);
        if (0..mig.devices.len()).any(taken) {
            return Err(format!("`gpus.{number}.mig`: two devices with one index"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_an_error_wherever_it_stands() {
        for (text, key) in [
            ("count = 0\nquite = true", "quite"),
            ("count = 1\n[gpu]\nnam = ''", "nam"),
            ("count = 1\n[gpus.0]\nnam = ''", "nam"),
            ("count = 1\n[gpus.1]\nname = ''", "gpus.1"),
            ("count = 1\n[gpu.memory]\ntotal = 1\nreserved = 0\nused = 0\nfree = 1", "free"),
            ("count = 1\n[gpu.fields]\n82x = { u32 = 1 }", "82x"),
            ("count = 1\n[gpu.fields]\n82 = { u8 = 1 }", "u8"),
            ("count = 1\n[[overrides]]\nsymbol = '*'\nreturn_code = 1\nafter = 1", "after"),
            ("count = 1\n[[overrides]]\nsymbol = 'nvmlDeviceGetPower'\nreturn_code = 1", "nvmlDeviceGetPower"),
            ("count = 1\n[[overrides]]\nsymbol = '*'", "does nothing"),
            ("base = 'h200-idle'\nabsent = ['gpu.nam']", "gpu.nam"),
            ("base = 'h300'", "h300"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_stands_on_its_base_and_a_gpu_on_what_all_are_like() {
        let config = parse(
            "base = 'h200-idle'\nabsent = ['gpu.utilization']\ncount = 2\n\
             [gpu.memory]\nused = 5\n[gpu.fields]\n82 = { code = 3 }\n[gpus.1]\npower = 1",
        );
        let config = config.unwrap();
        let base = &parse("base = 'h200-idle'").unwrap().gpus[0];
        let memory = |used| base.memory.clone().map(|memory| crate::config::Memory { used, ..memory });
        assert_eq!(config.gpus.len(), 2);
        for (gpu, power) in config.gpus.iter().zip([base.power, Some(1)]) {
            assert_eq!(gpu.memory, memory(5));
            assert_eq!(gpu.utilization, None);
            assert_eq!(gpu.power, power);
            let key = crate::config::FieldKey { id: 82, scope: 0 };
            assert_eq!(gpu.fields[&key], crate::config::FieldValue::Code(3));
            assert_eq!(gpu.name, base.name);
        }
    }
}
