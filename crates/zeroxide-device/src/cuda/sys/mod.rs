//! The two libraries of NVIDIA's that are loaded while the program runs, and what is owned in them.
//!
//! `unsafe` is at home in this folder: [`library`] finds functions by name, [`driver`] and [`nvrtc`] have their types
//! and call them, and [`owned`] and [`kernel`] keep what they made until nothing uses it any more. Handles are numbers here: only the
//! libraries look behind them.

pub(super) mod driver;
pub(super) mod kernel;
mod library;
pub(super) mod nvrtc;
pub(super) mod owned;
