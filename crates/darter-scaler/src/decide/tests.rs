//! What must hold of every decision, over random states; and what single rules say.

mod any;
mod properties;
mod rules;
