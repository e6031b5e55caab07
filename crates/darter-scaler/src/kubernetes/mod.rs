//! Kubernetes, as the scaler needs it: what it says, who may act and who may speak, and what is written there.
//!
//! `watch` makes facts of it; `leader` and `lease` let one scaler of several act, and `fence` nobody else;
//! `review` asks whose a token is; `actuators` carry out what was decided. Not here: any decision.

mod actuators;
mod events;
mod fence;
mod leader;
mod lease;
mod metrics;
mod moment;
mod review;
mod settings;
mod side;
mod table;
mod watch;

pub use actuators::{Actuators, Undone, undo};
pub use events::{About, Events, Said, write as write_events};
pub use fence::{Late, NotLeading, fenced};
pub use leader::{Elector, Lead, Record, Step, Times, TimesError};
pub use lease::Election;
pub use metrics::{KindLabels, Metrics};
pub use moment::Moment;
pub use review::{Denied, Reviews, Right, Who};
pub use settings::Settings;
pub use side::{Side, SideError};
pub use watch::Watches;

/// Who writes, for the API server: by it what we wrote is found again.
pub const MANAGER: &str = "darter-scaler";
