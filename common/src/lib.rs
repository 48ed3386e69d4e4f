//! What balancer and node share: names, configuration primitives, the wire contract, the registry, shutdown, reload, systemd, telemetry.
//!
//! This crate knows neither server. A thing belongs here only when both of them need it; what crosses a process is a type in
//! [`contract`], what comes from a file passes through [`config`].

pub mod ids;
pub mod config;
pub mod contract;
pub mod registry;
pub mod tls;
pub mod data_dir;
pub mod replace;
pub mod holder;
pub mod shutdown;
pub mod reload;
pub mod systemd;
pub mod telemetry;
pub mod trace;
pub mod logs;
