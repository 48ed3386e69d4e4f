//! The inference server.

pub mod models;
