//! The three libraries of NVIDIA's that are loaded while the program runs, and what is owned in them.
//!
//! `unsafe` is at home in this folder: [`library`] finds functions by name, [`driver`], [`nvrtc`] and [`cufile`] have their types
//! and call them, and [`owned`] and [`kernel`] keep what they made until nothing uses it any more. Handles are numbers here: only the
//! libraries look behind them.

pub(super) mod cufile;
pub(super) mod driver;
pub(super) mod kernel;
mod library;
pub(super) mod nvrtc;
pub(super) mod owned;
