//! One call into NVML: announced before, so that others see when it hangs, and counted after.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;

use super::{Shared, lock};
use crate::metrics::{CallLabels, Metrics, NvmlErrorLabels};

/// A call that runs now.
#[derive(Debug, Clone, Copy)]
pub(super) struct InCall {
    pub(super) name: &'static str,
    pub(super) since: Instant,
    /// For how long it is meant to wait: nothing but a wait for events is.
    pub(super) meant: Duration,
}

/// A thread that makes calls.
#[derive(Debug, Clone, Copy)]
pub(super) enum Caller {
    /// It asks in rounds.
    Rounds,
    /// It waits for events.
    Events,
}

/// The call that each thread makes now.
#[derive(Debug, Default)]
pub(super) struct InCalls([Mutex<Option<InCall>>; 2]);

impl InCalls {
    pub(super) fn set(&self, caller: Caller, call: Option<InCall>) {
        *lock(&self.0[caller as usize]) = call;
    }

    /// The call that has taken the longest, over what it is meant to wait, and how much longer.
    pub(super) fn slowest(&self) -> Option<(&'static str, Duration)> {
        let calls = self.0.iter().filter_map(|call| *lock(call));
        let over = calls.map(|call| (call.name, call.since.elapsed().saturating_sub(call.meant)));
        over.max_by_key(|(_, over)| *over)
    }
}

/// What the whole of NVML, or one GPU, turned out to be in the middle of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Loss {
    /// This GPU is off the bus; the others may be well.
    Gpu,
    /// NVML must be started again: the driver was unloaded, or another one was loaded.
    Driver,
}

/// Makes calls for one session of NVML.
pub(super) struct Calls<'a> {
    shared: &'a Shared,
    caller: Caller,
    metrics: &'a Metrics,
    /// What a GPU does not know: not asked again until the next driver.
    unsupported: BTreeSet<(u32, &'static str)>,
}

impl<'a> Calls<'a> {
    pub(super) const fn new(shared: &'a Shared, caller: Caller, metrics: &'a Metrics) -> Self {
        Self { shared, caller, metrics, unsupported: BTreeSet::new() }
    }

    /// A call that concerns all GPUs.
    pub(super) fn make<T>(
        &self,
        name: &'static str,
        call: impl FnOnce() -> Result<T, NvmlError>,
    ) -> Result<T, NvmlError> {
        self.timed(name, Duration::ZERO, call)
    }

    /// A call that waits, for so long at most, and is no slower for it. Nothing where nothing came.
    pub(super) fn wait<T>(
        &self,
        name: &'static str,
        at_most: Duration,
        call: impl FnOnce() -> Result<T, NvmlError>,
    ) -> Result<Option<T>, NvmlError> {
        self.timed(name, at_most, || match call() {
            Err(NvmlError::Timeout) => Ok(None),
            said => said.map(Some),
        })
    }

    fn timed<T>(
        &self,
        name: &'static str,
        meant: Duration,
        call: impl FnOnce() -> Result<T, NvmlError>,
    ) -> Result<T, NvmlError> {
        let since = Instant::now();
        self.shared.calls.set(self.caller, Some(InCall { name, since, meant }));
        let said = call();
        self.shared.calls.set(self.caller, None);
        let seconds = since.elapsed().as_secs_f64();
        self.metrics.nvml_call_seconds.get_or_create(&CallLabels { call: name }).observe(seconds);
        if let Err(error) = said.as_ref()
            && !is_unsupported(error)
        {
            self.metrics.nvml_errors.get_or_create(&NvmlErrorLabels { call: name, code: code(error) }).inc();
        }
        said
    }

    /// Questions to one GPU.
    pub(super) const fn of<'b>(&'b mut self, gpu: u32) -> Questions<'b, 'a> {
        Questions { calls: self, gpu, loss: None }
    }
}

/// Questions to one GPU. Once it is lost the rest are not asked: each might take long.
pub(super) struct Questions<'b, 'a> {
    calls: &'b mut Calls<'a>,
    gpu: u32,
    pub(super) loss: Option<Loss>,
}

impl Questions<'_, '_> {
    /// The answer; nothing where there is none.
    pub(super) fn ask<T>(&mut self, name: &'static str, call: impl FnOnce() -> Result<T, NvmlError>) -> Option<T> {
        if self.loss.is_some() || self.calls.unsupported.contains(&(self.gpu, name)) {
            return None;
        }
        match self.calls.make(name, call) {
            Ok(answer) => Some(answer),
            Err(error) => {
                if is_unsupported(&error) {
                    self.calls.unsupported.insert((self.gpu, name));
                }
                self.loss = loss(&error);
                None
            }
        }
    }
}

/// Whether asking again cannot help.
pub(super) const fn is_unsupported(error: &NvmlError) -> bool {
    matches!(error, NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_))
}

/// NVML_ERROR_GPU_NOT_FOUND, which the wrapper has no name for.
const GPU_NOT_FOUND: u32 = 28;

fn loss(error: &NvmlError) -> Option<Loss> {
    match error {
        NvmlError::GpuLost | NvmlError::UnexpectedVariant(GPU_NOT_FOUND) => Some(Loss::Gpu),
        NvmlError::Uninitialized | NvmlError::DriverNotLoaded | NvmlError::LibRmVersionMismatch => Some(Loss::Driver),
        _ => None,
    }
}

/// NVML's number of an error (`nvmlReturn_t`); 0 for what the wrapper itself found wrong.
pub(super) const fn code(error: &NvmlError) -> u32 {
    match error {
        NvmlError::Uninitialized => 1,
        NvmlError::InvalidArg => 2,
        NvmlError::NotSupported => 3,
        NvmlError::NoPermission => 4,
        NvmlError::NotFound => 6,
        NvmlError::InsufficientSize(_) => 7,
        NvmlError::InsufficientPower => 8,
        NvmlError::DriverNotLoaded => 9,
        NvmlError::Timeout => 10,
        NvmlError::IrqIssue => 11,
        NvmlError::LibraryNotFound => 12,
        NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_) => 13,
        NvmlError::CorruptedInfoROM => 14,
        NvmlError::GpuLost => 15,
        NvmlError::ResetRequired => 16,
        NvmlError::OperatingSystem => 17,
        NvmlError::LibRmVersionMismatch => 18,
        NvmlError::InUse => 19,
        NvmlError::InsufficientMemory => 20,
        NvmlError::NoData => 21,
        NvmlError::VgpuEccNotSupported => 22,
        NvmlError::Unknown => 999,
        NvmlError::UnexpectedVariant(code) => *code,
        _ => 0,
    }
}
