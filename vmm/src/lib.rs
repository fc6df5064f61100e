//! The Spore VMM. See `README.md` beside this crate for the map.

pub mod api;
pub mod devices;
pub mod memory;
