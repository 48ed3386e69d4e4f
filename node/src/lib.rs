//! The inference server.

pub mod kernels;
pub mod weights;
pub mod kv;
pub mod sched;
pub mod batch;
pub mod model;
pub mod sample;
pub mod stop;
pub mod models;
