//! The table `[prewarm]`.

use darter_core::ImageName;
use serde::{Deserialize, Serialize};

use super::check::{Fault, require};

/// A node that waits for more is not started but filled.
const IMAGES_MAX: usize = 64;

/// Images that are to be here before they are asked for. The keys are described in `default.toml`.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Prewarm {
    pub images: Vec<String>,
}

pub(super) fn check_prewarm(prewarm: &Prewarm) -> Result<(), Fault> {
    let key = "prewarm.images";
    require(prewarm.images.len() <= IMAGES_MAX, key, || format!("must be at most {IMAGES_MAX}"))?;
    for image in &prewarm.images {
        let name = image.parse::<ImageName>();
        require(name.is_ok(), key, || name.err().map(|error| error.to_string()).unwrap_or_default())?;
    }
    Ok(())
}
