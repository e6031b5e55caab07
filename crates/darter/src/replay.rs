//! `darter replay`: decides recorded decisions of the scaler again.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use darter_scaler::Millis;
use darter_scaler::record::{Again, again, next_line};

use crate::show;

/// What is decided again.
#[derive(clap::Args)]
pub(crate) struct Recorded {
    /// Lines of JSON, as the scaler writes them; - reads standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(recorded: &Recorded) -> Result<ExitCode> {
    let name = recorded.file.display();
    let mut from: Box<dyn BufRead> = match recorded.file.as_os_str() == "-" {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(BufReader::new(File::open(&recorded.file).with_context(|| format!("cannot open {name}"))?)),
    };
    let (mut records, mut differ) = (0_u64, 0_u64);
    while let Some(line) = next_line(&mut from).with_context(|| format!("{name}: record {}", records + 1))? {
        records += 1;
        let outcome = again(&line).with_context(|| format!("{name}: record {records}"))?;
        differ += u64::from(matches!(outcome, Again::Differs { .. }));
        show::print(&said(records, &outcome))?;
    }
    let summary = match (records, differ) {
        (0, _) => "no records\n".to_owned(),
        (_, 0) => format!("{records} decisions, every one the same to the bit\n"),
        _ => format!("{records} decisions, {differ} of them differ\n"),
    };
    show::print(&summary)?;
    Ok(if differ == 0 && records > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn said(record: u64, outcome: &Again) -> String {
    let at = |now: &Millis| format!("record {record} of {now} UTC");
    match outcome {
        Again::Same { now, actions } => format!("{}: the same, {actions} actions\n", at(now)),
        Again::Differs { now, at: path, recorded, decided } => {
            format!("{}: DIFFERS at {path}\n  recorded {recorded}\n  decided  {decided}\n", at(now))
        }
    }
}
